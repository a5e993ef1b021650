"""Gradient release: the gradient of one layer at a time."""

from ._release.layered import LayeredLoss as LayeredLoss
from ._release.step import release_step as release_step

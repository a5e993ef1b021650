"""Gradient release: steps in which gradients of only one layer exist at a time."""

from ._release.layered import LayeredLoss as LayeredLoss
from ._release.step import release_step as release_step

"""All optimizers of this library by their names, for whatever lists them."""

from .adam import adam, adamw
from .adan import adan
from .ademamix import ademamix
from .lamb import lamb
from .lars import lars
from .lion import lion
from .muon import muon
from .rmsprop import rmsprop
from .sgd import sgd, sgdw


OPTIMIZERS = {
    make.__name__: make
    for make in (
        adamw,
        adam,
        adan,
        ademamix,
        lamb,
        lars,
        lion,
        muon,
        rmsprop,
        sgd,
        sgdw,
    )
}

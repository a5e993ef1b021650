"""All optimizers of this library by their names, for whatever lists them."""

from .adafactor import adafactor
from .adam import adam, adamw
from .adan import adan
from .ademamix import ademamix
from .lamb import lamb
from .lars import lars
from .lion import lion
from .muon import muon
from .rmsprop import rmsprop
from .schedule_free import schedule_free_adamw
from .sgd import sgd, sgdw


OPTIMIZERS = {
    make.__name__: make
    for make in (
        adafactor,
        adamw,
        adam,
        adan,
        ademamix,
        lamb,
        lars,
        lion,
        muon,
        rmsprop,
        schedule_free_adamw,
        sgd,
        sgdw,
    )
}

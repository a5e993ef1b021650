"""Memory-efficient optimizers for JAX and Equinox."""

from ._codec import (
    AbstractMomentCodec as AbstractMomentCodec,
    Dither as Dither,
    FlashOptimCodec as FlashOptimCodec,
    FourthRootCodec as FourthRootCodec,
    FullPrecision as FullPrecision,
    MomentCodecs as MomentCodecs,
    QuantMoment as QuantMoment,
    SoftsignCodec as SoftsignCodec,
)
from ._optimizer import (
    master_weights as master_weights,
    Optimizer as Optimizer,
    optimizer as optimizer,
)
from ._rule import AbstractRule as AbstractRule
from ._rules.adam import Adam as Adam, adam as adam, adamw as adamw
from ._rules.lion import Lion as Lion, lion as lion
from ._rules.sgd import SGD as SGD, sgd as sgd, sgdw as sgdw
from ._split import ECCWeight as ECCWeight
from ._state import OptimizerState as OptimizerState
from .precision import cast as cast


__version__ = "0.1.0"

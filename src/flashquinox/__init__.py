"""Memory-efficient optimizers for JAX and Equinox."""

from . import _serialization as _serialization
from ._codec import (
    AbstractMomentCodec as AbstractMomentCodec,
    Dither as Dither,
    QuantMoment as QuantMoment,
)
from ._codecs.companded import CompandedCodec as CompandedCodec
from ._codecs.fitted_log import FittedLogCodec as FittedLogCodec
from ._codecs.flashoptim import FlashOptimCodec as FlashOptimCodec
from ._codecs.full_precision import FullPrecision as FullPrecision
from ._codecs.softsign import SoftsignCodec as SoftsignCodec
from ._curves import (
    AbstractCurve as AbstractCurve,
    MuLawCurve as MuLawCurve,
    RationalCurve as RationalCurve,
)
from ._decay_mask import decay_mask as decay_mask
from ._fsdp import fsdp_shardings as fsdp_shardings
from ._layered import LayeredLoss as LayeredLoss
from ._map_params import map_params as map_params
from ._moment_codecs import MomentCodecs as MomentCodecs
from ._moments import map_moments as map_moments
from ._optimizer import Optimizer as Optimizer, optimizer as optimizer
from ._rule import AbstractRule as AbstractRule
from ._rules.adam import Adam as Adam, adam as adam, adamw as adamw
from ._rules.lion import Lion as Lion, lion as lion
from ._rules.sgd import SGD as SGD, sgd as sgd, sgdw as sgdw
from ._split import ECCWeight as ECCWeight
from ._state import OptimizerState as OptimizerState
from .memory import (
    DeviceMemory as DeviceMemory,
    memory_plan as memory_plan,
    MemoryPlan as MemoryPlan,
)
from .precision import (
    cast as cast,
    check_numerics as check_numerics,
    ensure_precision as ensure_precision,
    from_master_weights as from_master_weights,
    LeafNumerics as LeafNumerics,
    master_weights as master_weights,
    narrow as narrow,
    NumericsError as NumericsError,
    NumericsReport as NumericsReport,
    widen as widen,
    Widened as Widened,
)
from .release import release_step as release_step


__version__ = "0.1.0"

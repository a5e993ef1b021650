"""Memory-efficient optimizers for JAX and Equinox."""

from ._checkpoint import serialization as _serialization  # noqa: F401
from ._common.short_types import show_short_types as _show_short_types
from ._common.version import __version__ as __version__
from ._model.decay_mask import decay_mask as decay_mask
from ._optimizer.accumulate import (
    accumulate as accumulate,
    AccumulatingOptimizer as AccumulatingOptimizer,
)
from ._optimizer.accumulation_state import AccumulationState as AccumulationState
from ._optimizer.adafactor import adafactor as adafactor
from ._optimizer.adam import adam as adam, adamw as adamw
from ._optimizer.adan import adan as adan
from ._optimizer.add_updates import add_updates as add_updates
from ._optimizer.ademamix import ademamix as ademamix
from ._optimizer.compress import (
    compress as compress,
    CompressedState as CompressedState,
)
from ._optimizer.ema import EMA as EMA, ema as ema, EMAState as EMAState
from ._optimizer.lamb import lamb as lamb
from ._optimizer.lars import lars as lars
from ._optimizer.lion import lion as lion
from ._optimizer.map_moments import map_moments as map_moments
from ._optimizer.map_params import map_params as map_params
from ._optimizer.muon import muon as muon
from ._optimizer.optimizer import Optimizer as Optimizer, optimizer as optimizer
from ._optimizer.options import Options as Options
from ._optimizer.rmsprop import rmsprop as rmsprop
from ._optimizer.schedule_free import (
    schedule_free_adamw as schedule_free_adamw,
    schedule_free_weights as schedule_free_weights,
)
from ._optimizer.sgd import sgd as sgd, sgdw as sgdw
from ._optimizer.state import OptimizerState as OptimizerState
from ._rules.adafactor import Adafactor as Adafactor
from ._rules.adam import Adam as Adam
from ._rules.adan import Adan as Adan
from ._rules.ademamix import AdEMAMix as AdEMAMix
from ._rules.lamb import Lamb as Lamb
from ._rules.lars import Lars as Lars
from ._rules.lion import Lion as Lion
from ._rules.muon import Momentum as Momentum, Muon as Muon
from ._rules.rmsprop import RMSProp as RMSProp
from ._rules.rule import (
    AbstractRule as AbstractRule,
    hyperparameter as hyperparameter,
    Moment as Moment,
)
from ._rules.schedule_free import ScheduleFreeAdamW as ScheduleFreeAdamW
from ._rules.sgd import SGD as SGD
from ._rules.whole_leaf import (
    AbstractMatrixRule as AbstractMatrixRule,
    AbstractMeansRule as AbstractMeansRule,
    AbstractWholeLeafRule as AbstractWholeLeafRule,
)
from ._sharding.fsdp import fsdp_shardings as fsdp_shardings
from ._storage.codec import (
    AbstractMomentCodec as AbstractMomentCodec,
    Dither as Dither,
)
from ._storage.companded import CompandedCodec as CompandedCodec
from ._storage.curves import (
    AbstractCurve as AbstractCurve,
    MuLawCurve as MuLawCurve,
    RationalCurve as RationalCurve,
)
from ._storage.fitted_log import FittedLogCodec as FittedLogCodec
from ._storage.flashoptim import FlashOptimCodec as FlashOptimCodec
from ._storage.full_precision import FullPrecision as FullPrecision
from ._storage.linear import LinearCodec as LinearCodec
from ._storage.moment_codecs import MomentCodecs as MomentCodecs
from ._storage.quant_moment import QuantMoment as QuantMoment
from ._storage.softsign import SoftsignCodec as SoftsignCodec
from ._storage.split import ECCWeight as ECCWeight
from ._storage.storage import Storage as Storage
from ._storage.tapered import TaperedCodec as TaperedCodec
from .memory import (
    DeviceMemory as DeviceMemory,
    memory_plan as memory_plan,
    MemoryPlan as MemoryPlan,
)
from .precision import (
    cast as cast,
    check_numerics as check_numerics,
    ensure_precision as ensure_precision,
    Float32Layer as Float32Layer,
    from_master_weights as from_master_weights,
    LeafNumerics as LeafNumerics,
    master_weights as master_weights,
    narrow_corrections as narrow_corrections,
    NumericsError as NumericsError,
    NumericsReport as NumericsReport,
    prepare as prepare,
    widen_corrections as widen_corrections,
)
from .release import LayeredLoss as LayeredLoss, release_step as release_step


_show_short_types(vars().values())

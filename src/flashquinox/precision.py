"""The precision of a model: narrow weights, master weights, and changing between
them."""

from ._model.float32_layer import Float32Layer as Float32Layer
from ._optimizer.master_weights import (
    from_master_weights as from_master_weights,
    master_weights as master_weights,
)
from ._precision.cast import cast as cast
from ._precision.numerics import (
    check_numerics as check_numerics,
    ensure_precision as ensure_precision,
    LeafNumerics as LeafNumerics,
    NumericsError as NumericsError,
    NumericsReport as NumericsReport,
)
from ._precision.prepare import prepare as prepare
from ._precision.width import (
    narrow_corrections as narrow_corrections,
    widen_corrections as widen_corrections,
)

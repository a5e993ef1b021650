"""The precision of a model: narrow weights, and the master weights behind them."""

from ._cast import cast as cast
from ._master_weights import (
    from_master_weights as from_master_weights,
    master_weights as master_weights,
)
from ._numerics import (
    check_numerics as check_numerics,
    ensure_precision as ensure_precision,
    LeafNumerics as LeafNumerics,
    NumericsError as NumericsError,
    NumericsReport as NumericsReport,
)
from ._widened import Widened as Widened
from ._width import narrow as narrow, widen as widen

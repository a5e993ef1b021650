"""Whether a traced function is elementwise.

Each backend cuts leaves into tiles of its own shapes and in its own order. So a
function of tiles must compute each element from the same element of its arguments, and
from values that are the same for all elements. The function is traced, and each value
in it is assigned one of three sorts. Where none fits, the operation mixes elements, and
the error names it.
"""

import enum
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.core
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from .. import _compat
from .arithmetic import Replaceable


class Sort(enum.IntEnum):
    # All elements are the same, as those of a scalar that was broadcast.
    UNIFORM = 0
    # A constant whose elements differ: it depends on the position of an element.
    VARIED = 1
    # Each element depends on the same one of the arguments, in row-major order.
    ELEMENTS = 2


class Crossed(NamedTuple):
    """A value that mixes elements: `reason` names the operation and says why. It does
    no harm if no result depends on it, such as the sum through which a function is
    differentiated."""

    reason: str


Found: TypeAlias = Sort | Crossed


class NotElementwise(Exception):
    """A function is not elementwise. The text names the operation and says why."""


class Traced(NamedTuple):
    """What is known about an elementwise function.

    - `out`: the shapes of its results.
    - `signature`: its operations and constants, without their shapes.
    """

    out: Any
    signature: list[Any]


def trace(function: Callable, *args: Any) -> Traced:
    """Traces a function of trees of `jax.ShapeDtypeStruct`s. Scalar arguments are the
    same for all elements; all other arrays have one entry for each element.

    **Raises:**

    `NotElementwise` if the function is not. Errors of the function itself are passed
    on.
    """
    traced, out = jax.make_jaxpr(function, return_shape=True)(*args)
    sorts = [Sort.ELEMENTS if x.shape else Sort.UNIFORM for x in jtu.tree_leaves(args)]
    walk = _Walk()
    for found in walk.call(_compat.Function.of(traced), sorts):
        if isinstance(found, Crossed):
            raise NotElementwise(found.reason)
        if found == Sort.VARIED:
            raise NotElementwise("a result depends on the position of an element")
    return Traced(out, walk.signature)


class _Walk:
    def __init__(self) -> None:
        self.signature: list[Any] = []

    def call(self, function: _compat.Function, args: Sequence[Found]) -> list[Found]:
        constant = self._constant
        return _compat.evaluate(function, args, constant, constant, self._results)

    def _constant(self, value: Any) -> Found:
        if isinstance(value, jax.core.Tracer):
            return Sort.UNIFORM if np.ndim(value) == 0 else Sort.VARIED
        if jnp.issubdtype(getattr(value, "dtype", float), jax.dtypes.extended):
            return Crossed("it uses random keys")
        array = np.asarray(value)
        elements = {x.tobytes() for x in array.ravel()[:, None]}
        self.signature.append((str(array.dtype), *sorted(elements)))
        return Sort.UNIFORM if len(elements) <= 1 else Sort.VARIED

    def _results(self, eqn: Any, args: list[Found]) -> list[Found]:
        name = eqn.primitive.name
        if "callback" in name or eqn.effects:
            raise NotElementwise(f"`{name}` has effects beside its results")
        called = _compat.called(eqn)
        if called is not None:
            return self.call(called, args)
        match name:
            case "cond":
                return self._branch(_compat.Branches.of(eqn, args))
            case "while":
                return self._repeat(_compat.While.of(eqn, args))
            case "scan":
                return self._scan(_compat.Scan.of(eqn, args), len(eqn.outvars))
        if name in _PAIRWISE and len(args) == len(eqn.outvars):
            return args
        result = self._result(eqn, args)
        if isinstance(result, Crossed):
            return [result for _ in eqn.outvars]
        if result is not None:
            return [result]
        # Any operation on constants is allowed, if it does not depend on the size of
        # the tile: so the signature gets the shapes.
        shapes = [[atom.aval.shape for atom in x] for x in (eqn.invars, eqn.outvars)]
        self.signature.append((name, str(shapes)))
        return [Sort.VARIED if shape else Sort.UNIFORM for shape in shapes[1]]

    def _result(self, eqn: Any, args: list[Found]) -> Found | None:
        """The sort of the result of an operation that calls no function. `None` if it
        is an operation on constants, which may do anything."""
        name = eqn.primitive.name
        for arg in args:
            if isinstance(arg, Crossed):
                return arg
        if name.startswith("random_") or name in _RANDOM:
            return Crossed(f"`{name}` makes random numbers")
        is_foreign = eqn.primitive is not getattr(lax, f"{name}_p", eqn.primitive)
        if is_foreign:
            return Crossed(f"`{name}` is a primitive that is not JAX's own")
        if name in _ELEMENTWISE or Replaceable.of(eqn.primitive) is not None:
            self.signature.append((name, *_numbers(eqn)))
            return _elementwise(eqn, args)
        if Sort.ELEMENTS in args:
            if args == [Sort.ELEMENTS] and _keeps_order(name, eqn):
                return Sort.ELEMENTS
            return Crossed(f"`{name}` {_REASONS.get(name, _OTHER_REASON)}")
        if name in _REARRANGING and args[0] == Sort.UNIFORM:
            # The result may have the shape of the tile: all its elements are the same.
            return Sort.UNIFORM
        return None

    def _branch(self, cond: _compat.Branches) -> list[Found]:
        found = [self.call(branch, cond.operands) for branch in cond.branches]
        return [_joined("cond", x, cond.index) for x in zip(*found, strict=True)]

    def _repeat(self, loop: _compat.While) -> list[Found]:
        def turn(carry: list[Found]) -> list[Found]:
            return self.call(loop.body, [*loop.body_consts, *carry])

        carry = _until_stable("while", loop.carry, turn)
        (again,) = self.call(loop.condition, [*loop.condition_consts, *carry])
        return [_joined("while", [x], again) for x in carry]

    def _scan(self, loop: _compat.Scan, results: int) -> list[Found]:
        if Sort.ELEMENTS in loop.xs:
            return [Crossed("`scan` goes through its elements")] * results
        carried = len(loop.carry)
        ys: list[Found] = []
        # One iteration gets a slice of them, which may be a scalar.
        of_turn = loop.body.jaxpr.invars[len(loop.consts) + carried :]
        xs = [
            Sort.UNIFORM if x == Sort.VARIED and not atom.aval.shape else x
            for x, atom in zip(loop.xs, of_turn, strict=True)
        ]

        def turn(carry: list[Found]) -> list[Found]:
            found = self.call(loop.body, [*loop.consts, *carry, *xs])
            ys[:] = found[carried:]
            return found[:carried]

        carry = _until_stable("scan", loop.carry, turn)
        self.signature.append(("scan", loop.length))
        stacked = Crossed("`scan` stacks its elements")
        return [*carry, *(stacked if y == Sort.ELEMENTS else Sort.VARIED for y in ys)]


def _elementwise(eqn: Any, args: list[Found]) -> Found:
    name, shape = eqn.primitive.name, eqn.outvars[0].aval.shape
    if Sort.ELEMENTS not in args:
        return Sort.VARIED if Sort.VARIED in args else Sort.UNIFORM
    if Sort.VARIED in args:
        return Crossed(
            f"`{name}` combines it with an array that depends on the position of an "
            "element"
        )
    for atom, arg in zip(eqn.invars, args, strict=True):
        if arg == Sort.ELEMENTS and atom.aval.shape != shape:
            return Crossed(f"`{name}` changes its shape")
    return Sort.ELEMENTS


def _until_stable(
    name: str, carry: list[Found], turn: Callable[[list[Found]], list[Found]]
) -> list[Found]:
    while True:
        after = [_joined(name, x) for x in zip(carry, turn(carry), strict=True)]
        if after == carry:
            return carry
        carry = after


def _joined(
    name: str, values: Sequence[Found], condition: Found = Sort.UNIFORM
) -> Found:
    """The sort of a value that is one of these, depending on a condition."""
    sorts: set[Sort] = set()
    for value in (condition, *values):
        if isinstance(value, Crossed):
            return value
        sorts.add(value)
    if {Sort.VARIED, Sort.ELEMENTS} <= sorts:
        return Crossed(
            f"`{name}` chooses between it and an array that depends on the position of "
            "an element"
        )
    return max(sorts)


def _numbers(eqn: Any) -> list[Any]:
    """The parameters of an operation that are numbers, such as an exponent."""
    numbers = {k: v for k, v in eqn.params.items() if isinstance(v, (int, float))}
    return sorted(numbers.items())


def _keeps_order(name: str, eqn: Any) -> bool:
    """Whether an operation keeps the row-major order of the elements."""
    before, after = eqn.invars[0].aval, eqn.outvars[0].aval
    if before.size != after.size:
        return False
    if name == "transpose":
        moved = [i for i in eqn.params["permutation"] if before.shape[i] != 1]
        return moved == sorted(moved)
    # Reductions that keep the size are over axes of length 1.
    return name in _REARRANGING or name in _REDUCTIONS


_ELEMENTWISE = frozenset(
    """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e
    bitcast_convert_type cbrt ceil clamp clz complex conj convert_element_type cos cosh
    digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma
    igamma_grad_a igammac imag integer_pow is_finite le le_to lgamma log log1p log2
    logistic lt lt_to max min mul mulhi ne neg nextafter not one_minus_square or
    polygamma polynomial population_count pow real reduce_precision
    regularized_incomplete_beta rem round rsqrt select_n shift_left
    shift_right_arithmetic shift_right_logical sign sin sinh sqrt square sub tan tanh
    xor zeta
    """.split()
)
# Operations on several values, each result of which is the corresponding value.
_PAIRWISE = frozenset(
    """
    copy copy_p device_put name optimization_barrier pvary sharding_constraint
    stop_gradient
    """.split()
)
_REARRANGING = frozenset("broadcast_in_dim reshape squeeze transpose".split())
_REDUCTIONS = frozenset(
    f"reduce_{name}" for name in ("sum", "prod", "max", "min", "and", "or", "xor")
)
_RANDOM = frozenset(("threefry2x32", "rng_uniform", "rng_bit_generator"))
_OTHER_REASON = "is not an operation that is known to be elementwise"
_REASONS = (
    dict.fromkeys(
        [*_REDUCTIONS, "reduce", "argmax", "argmin"], "reduces it over its elements"
    )
    | dict.fromkeys(
        ["cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"],
        "goes through its elements in order",
    )
    | dict.fromkeys(
        ["sort", "top_k", "rev", "transpose", "gather", "scatter"], "moves its elements"
    )
    | dict.fromkeys(
        ["concatenate", "stack"],
        "puts arrays together (use `jnp.where` or `jnp.maximum`)",
    )
    | dict.fromkeys(["reshape", "squeeze", "broadcast_in_dim"], "changes its shape")
    | dict.fromkeys(
        ["slice", "dynamic_slice", "split", "unstack", "pad"], "takes a part of it"
    )
    | dict.fromkeys(
        ["dot_general", "conv_general_dilated", "fft", "cholesky", "triangular_solve"],
        "combines its elements",
    )
)

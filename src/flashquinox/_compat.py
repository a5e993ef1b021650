"""Everything that this library takes of JAX and that JAX does not promise to keep:
`jax.extend`, `jax.interpreters`, and how what it traced is made up.

- `jax.extend.core.Primitive` and `jax.interpreters`: operations that kernels recognize,
    and derivatives that are errors. Without them, this library cannot be imported.
- How traced operations are made up, and `jax.extend.core.Literal`: the rules of users
    are looked at, and kernels evaluate functions. Without them, no optimizer is built.
- `jax.extend.core.jaxpr_as_fun`: kernels for GPUs. Without it, they cannot be traced,
    and `backend="xla"` can.
- `partial_eval.dce_jaxpr`: `release_step` keeps no gradients that are zero. Without it,
    they are kept.
- The `abstract_device` of a mesh, and `jax_default_device`: kernels are those of the
    device that a program is traced for. Without them, of the first local device.

Pallas is imported by the backends alone, when they are needed: see
`_backends.platforms`.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn, TypeAlias

import jax
import jax.extend.core as jex
from jax.interpreters import ad, batching, mlir, partial_eval


Primitive: TypeAlias = jex.Primitive


#
# Operations of one's own
#


def operation(name: str, function: Callable[..., jax.Array]) -> Primitive:
    """An elementwise function as an operation of its own, which is that function
    wherever nobody asks for the operation."""
    primitive = Primitive(name)
    compiled = jax.jit(function)
    primitive.def_impl(compiled)
    primitive.def_abstract_eval(
        lambda *avals: jax.make_jaxpr(compiled)(*avals).out_avals[0]
    )
    ad.primitive_jvps[primitive] = lambda primals, tangents: jax.jvp(
        function, primals, tuple(map(ad.instantiate_zeros, tangents))
    )
    is_unary = len(inspect.signature(function).parameters) == 1
    batched = batching.defvectorized if is_unary else batching.defbroadcasting
    batched(primitive)
    lowered = mlir.lower_fun(function, multiple_results=False)
    mlir.register_lowering(primitive, lowered)
    return primitive


def refusal(name: str, refuse: Callable[..., NoReturn]) -> Primitive:
    """An operation that can be traced, differentiated and batched, and raises where its
    result is needed: in computing it, and in pulling a cotangent back through it.
    `refuse` gets what it is bound with."""
    primitive = Primitive(name)
    primitive.def_impl(refuse)
    primitive.def_abstract_eval(lambda x, **_: x)
    ad.deflinear2(primitive, refuse)
    batching.primitive_batchers[primitive] = lambda args, axes, **kwargs: (
        primitive.bind(*args, **kwargs),
        axes[0],
    )
    mlir.register_lowering(primitive, refuse)
    return primitive


#
# What was traced
#


def as_function(traced: Any) -> Callable[..., list[Any]]:
    """A function from flat arguments to flat results, of what `jax.make_jaxpr` gave."""
    return jex.jaxpr_as_fun(traced)


def inputs_read(function: Callable[[Any], Any], values: Any) -> list[bool]:
    """Of each leaf of `values`, whether the result of a function depends on it."""
    jaxpr = jax.make_jaxpr(function)(values).jaxpr
    eliminate = getattr(partial_eval, "dce_jaxpr", None)
    if eliminate is None:
        return [True] * len(jaxpr.invars)
    _, read = eliminate(jaxpr, [True] * len(jaxpr.outvars))
    return list(read)


# With these, a function is only called: what they mean beside that is for derivatives,
# compilation and memory.
_CALLS = frozenset(
    """
    jit pjit closed_call core_call eval_jaxpr composite checkpoint remat remat2
    custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr
    """.split()
)
# Under which names they have it.
_PARAMETERS = ("jaxpr", "call_jaxpr", "fun_jaxpr")


class Function(NamedTuple):
    """A traced function: its operations, and the arrays that it closes over."""

    jaxpr: Any
    consts: Sequence[Any]

    @staticmethod
    def of(jaxpr: Any) -> "Function":
        # A closed one, or in later versions of JAX, every one.
        if hasattr(jaxpr, "consts"):
            return Function(jaxpr.jaxpr, jaxpr.consts)
        return Function(jaxpr, ())


def evaluate(
    function: Function,
    args: Sequence[Any],
    constant: Callable[[Any], Any],
    literal: Callable[[Any], Any],
    apply: Callable[[Any, list[Any]], Sequence[Any]],
) -> list[Any]:
    """What a traced function gives, of values of any kind: `constant` makes them of
    arrays that it closes over, `literal` of numbers in it, and `apply(operation,
    operands)` gives the results of an operation."""
    jaxpr = function.jaxpr
    known = [*map(constant, function.consts), *args]
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], known, strict=True))
    # No `def`: of one, tests that check types would make a function at each call.
    read = lambda atom: (
        literal(atom.val) if isinstance(atom, jex.Literal) else values[atom]
    )
    for eqn in jaxpr.eqns:
        results = apply(eqn, [read(atom) for atom in eqn.invars])
        values.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def called(eqn: Any) -> Function | None:
    """The function of an operation that only calls one. `None` for others."""
    if eqn.primitive.name == "call_hi_primitive":
        # It is traced when it is asked for.
        primitive = eqn.params["_prim"]
        expand = lambda *args: primitive.expand(*primitive.in_tree.unflatten(args))
        return Function.of(jax.make_jaxpr(expand)(*(x.aval for x in eqn.invars)))
    if eqn.primitive.name not in _CALLS:
        return None
    (name,) = (name for name in _PARAMETERS if name in eqn.params)
    return Function.of(eqn.params[name])


class Branches(NamedTuple):
    """`lax.cond` and `lax.switch`."""

    branches: list[Function]
    index: Any
    operands: list[Any]

    @staticmethod
    def of(eqn: Any, operands: Sequence[Any]) -> "Branches":
        branches = [Function.of(x) for x in eqn.params["branches"]]
        return Branches(branches, operands[0], list(operands[1:]))


class While(NamedTuple):
    """`lax.while_loop`. Each function takes its constants, then what is carried."""

    condition: Function
    body: Function
    condition_consts: list[Any]
    body_consts: list[Any]
    carry: list[Any]

    @staticmethod
    def of(eqn: Any, operands: Sequence[Any]) -> "While":
        first = eqn.params["cond_nconsts"]
        second = first + eqn.params["body_nconsts"]
        return While(
            Function.of(eqn.params["cond_jaxpr"]),
            Function.of(eqn.params["body_jaxpr"]),
            list(operands[:first]),
            list(operands[first:second]),
            list(operands[second:]),
        )


class Scan(NamedTuple):
    """`lax.scan`, which `lax.fori_loop` is too where it knows how often."""

    body: Function
    consts: list[Any]
    carry: list[Any]
    xs: list[Any]
    length: int
    reverse: bool

    @staticmethod
    def of(eqn: Any, operands: Sequence[Any]) -> "Scan":
        params = eqn.params
        if "num_consts" in params:
            consts, carried = params["num_consts"], params["num_carry"]
        else:
            consts, carried, _ = (len(part) for part in params["ft_in"].unpack())
        return Scan(
            Function.of(params["jaxpr"]),
            list(operands[:consts]),
            list(operands[consts : consts + carried]),
            list(operands[consts + carried :]),
            params["length"],
            params["reverse"],
        )


#
# Devices
#


def traced_device() -> Any:
    """The device that a program is traced for: that of an abstract mesh, or the default
    one."""
    mesh = jax.sharding.get_abstract_mesh()
    device = getattr(mesh, "abstract_device", None)
    if device is not None:
        return device
    device = getattr(jax.config, "jax_default_device", None) or jax.local_devices()[0]
    if isinstance(device, str):
        return jax.local_devices(backend=device)[0]
    return device

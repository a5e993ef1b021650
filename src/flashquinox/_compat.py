"""All uses of parts of JAX that JAX does not promise to keep: `jax.extend`,
`jax.interpreters`, and the structure of jaxprs.

- `jax.extend.core.Primitive` and `jax.interpreters` define primitives that kernels
    recognize, derivatives that are errors, and steps that are lowered for each platform
    by a function of its own. Without them, this library cannot be imported.
- The parameters of primitives in a jaxpr, and `jax.extend.core.Literal`, are needed to
    check the rules of users and to evaluate functions in kernels. Without them, no
    optimizer can be made.
- `jax.extend.core.jaxpr_as_fun`: kernels apply what was traced once. Without it, no
    kernel can be traced; `backend="xla"` works.
- `partial_eval.dce_jaxpr` tells `release_step` which gradients are zero, so that it
    does not store them. Without it, they are stored.
- The `abstract_device` of a mesh and `jax_default_device` give the device that a
    program is traced for, which decides its kernels. Without them, the first local
    device decides.

Pallas is only imported by backends, when they are needed: see `_backends.platforms`.
"""

import functools
import inspect
import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn, TypeAlias

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.interpreters import ad, batching, mlir, partial_eval


Primitive: TypeAlias = jex.Primitive
Literal: TypeAlias = jex.Literal


#
# Own primitives
#


def operation(name: str, function: Callable[..., jax.Array]) -> Primitive:
    """A primitive for an elementwise function. It is compiled, batched and
    differentiated as that function, and kernels can recognize it."""
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
    """A primitive that can be traced, differentiated and batched. It raises when its
    value is computed, or a cotangent is pulled back through it: `refuse` is called with
    the arguments of the primitive."""
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


class ByPlatform:
    """A function with another implementation on each platform. Unlike those of
    `jax.lax.platform_dependent`, only the one of the platform that a program is
    compiled for is ever traced.

    `implementation(key, platform)` is the function for programs of a platform, of which
    `"default"` stands for all that `serve` was not called with. It takes the operands,
    and returns arrays as those of the last operand, `like`.
    """

    def __init__(
        self, name: str, implementation: Callable[[Any, str], Callable[..., Any]]
    ):
        self.name = name
        self._implementation = implementation
        # Traced once in a process, whatever the program.
        self._function = functools.lru_cache(maxsize=1024)(self._make_function)
        self._primitive = Primitive(name)
        self._primitive.multiple_results = True
        self._primitive.def_impl(self._compute)
        self._primitive.def_abstract_eval(_avals_of_like)
        batching.primitive_batchers[self._primitive] = self._batch
        mlir.register_lowering(self._primitive, partial(self._lower, "default"))
        self._served: set[str] = set()

    def serve(self, platform: str) -> None:
        """From now on, programs for this platform have an implementation of their
        own."""
        if platform not in self._served:
            self._served.add(platform)
            rule = partial(self._lower, platform)
            mlir.register_lowering(self._primitive, rule, platform=platform)

    def __call__(self, key: Hashable, *operands: Any) -> Any:
        flat, structure = jtu.tree_flatten(operands)
        likes, structure_of_like = jtu.tree_flatten(operands[-1])
        new = self._primitive.bind(
            *flat,
            key=key,
            structure=structure,
            likes=len(likes),
            # Of each `vmap` around it, which operands have an axis of its members.
            maps=(),
            # As when it was traced.
            mesh=jax.sharding.get_abstract_mesh(),
            x64=bool(jax.config.jax_enable_x64),
        )
        return structure_of_like.unflatten(new)

    def function_of(self, params: Mapping[str, Any], platform: str) -> Callable:
        """What an equation of this primitive with these parameters computes there."""
        key, structure, maps = [params[x] for x in ("key", "structure", "maps")]
        return self._function(platform, key, structure, maps)

    def _make_function(
        self,
        platform: str,
        key: Hashable,
        structure: Any,
        maps: tuple[tuple[bool, ...], ...],
    ) -> Callable[..., list[Any]]:
        """The implementation, of flat arrays."""

        def function(*flat: Any) -> list[Any]:
            compute = self._implementation(key, platform)
            return jtu.tree_leaves(compute(*structure.unflatten(flat)))

        for mapped in maps:
            in_axes = tuple([0 if x else None for x in mapped])
            function = jax.vmap(function, in_axes=in_axes)
        return jax.jit(function)

    def _compute(
        self, *flat: Any, key: Hashable, structure: Any, maps: Any, **_: Any
    ) -> list[Any]:
        """Without compiling it."""
        devices = {device for x in flat for device in getattr(x, "devices", set)()}
        platform = devices.pop().platform if devices else "default"
        platform = {"gpu": "cuda"}.get(platform, platform)
        return self._function(platform, key, structure, maps)(*flat)

    def _lower(
        self,
        platform: str,
        ctx: Any,
        *flat: Any,
        key: Hashable,
        structure: Any,
        maps: Any,
        mesh: Any,
        x64: bool,
        **_: Any,
    ) -> Any:
        function = self._function(platform, key, structure, maps)
        with jax.sharding.use_abstract_mesh(mesh), jax.enable_x64(x64):
            return mlir.lower_fun(function, multiple_results=True)(ctx, *flat)

    def _batch(
        self, flat: Sequence[Any], axes: Sequence[Any], **params: Any
    ) -> tuple[list[Any], list[int]]:
        is_mapped = [axis is not None for axis in axes]
        arrays = [
            x if axis is None else jnp.moveaxis(x, axis, 0)
            for x, axis in zip(flat, axes, strict=True)
        ]
        size = arrays[is_mapped.index(True)].shape[0]
        # What is new depends on all operands.
        first_like = len(flat) - params["likes"]
        for i in range(first_like, len(flat)):
            if not is_mapped[i]:
                arrays[i] = jnp.broadcast_to(arrays[i], (size, *arrays[i].shape))
        is_mapped[first_like:] = [True] * params["likes"]
        params["maps"] = (*params["maps"], tuple(is_mapped))
        return self._primitive.bind(*arrays, **params), [0] * params["likes"]


def _avals_of_like(*avals: Any, likes: int, **_: Any) -> list[Any]:
    # What varies over an axis of a mesh makes everything vary.
    varying = frozenset().union(*[getattr(x, "vma", ()) for x in avals])
    new = [x.update(weak_type=False) for x in avals[len(avals) - likes :]]
    return [x.update(vma=varying) if varying else x for x in new]


#
# Traced functions
#


def as_function(traced: Any) -> Callable[..., list[Any]]:
    """The result of `jax.make_jaxpr` as a function from flat arguments to flat
    results."""
    return jex.jaxpr_as_fun(traced)


def inputs_read(function: Callable[[Any], Any], values: Any) -> list[bool]:
    """For each leaf of `values`, whether the result of a function depends on it."""
    jaxpr = jax.make_jaxpr(function)(values).jaxpr
    eliminate = getattr(partial_eval, "dce_jaxpr", None)
    if eliminate is None:
        return [True] * len(jaxpr.invars)
    _, read = eliminate(jaxpr, [True] * len(jaxpr.outvars))
    return list(read)


# Primitives that only call a function. What else they mean concerns derivatives,
# compilation or memory.
CALLS = frozenset(
    """
    jit pjit closed_call core_call eval_jaxpr composite checkpoint remat remat2
    call_hi_primitive custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr
    """.split()
)
# The names of the parameter that holds the function.
_PARAMETERS = ("jaxpr", "call_jaxpr", "fun_jaxpr")


class Function(NamedTuple):
    """A traced function: its operations, and the arrays that it closes over."""

    jaxpr: Any
    consts: Sequence[Any]

    @staticmethod
    def of(jaxpr: Any) -> "Function":
        # A closed jaxpr. In later versions of JAX, every jaxpr has constants.
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
    """Evaluates a traced function on values of any kind. `constant` makes such values
    of the arrays that it closes over, `literal` of the numbers in it, and
    `apply(operation, operands)` gives the results of an operation."""
    jaxpr = function.jaxpr
    known = [*map(constant, function.consts), *args]
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], known, strict=True))
    for eqn in jaxpr.eqns:
        operands = [
            literal(x.val) if isinstance(x, Literal) else values[x] for x in eqn.invars
        ]
        values.update(zip(eqn.outvars, apply(eqn, operands), strict=True))
    return [
        literal(x.val) if isinstance(x, Literal) else values[x] for x in jaxpr.outvars
    ]


def called(eqn: Any) -> Function | None:
    """The function that an operation calls, if it does nothing else. Otherwise
    `None`."""
    if eqn.primitive.name == "call_hi_primitive":
        # Its function is traced here.
        primitive = eqn.params["_prim"]
        expand = lambda *args: primitive.expand(*primitive.in_tree.unflatten(args))
        return Function.of(jax.make_jaxpr(expand)(*(x.aval for x in eqn.invars)))
    if eqn.primitive.name not in CALLS:
        return None
    (name,) = [name for name in _PARAMETERS if name in eqn.params]
    return Function.of(eqn.params[name])


class Tape(NamedTuple):
    """The operations of a traced function, to be applied to arrays of other lengths
    than those that it was traced with. That takes a tenth of the time of tracing it
    again."""

    inputs: list[int]
    outputs: list[int]
    # Numbers in the function, by the slots of their values.
    known: dict[int, Any]
    # Each with the slots that it reads and those that it writes, its parameters, and
    # which of these is a shape with one of the lengths.
    operations: list[tuple[Any, list[int], list[int], dict[str, Any], str | None]]

    @staticmethod
    def of(function: Function, lengths: frozenset[int]) -> "Tape | None":
        """The tape of a function that was traced with these lengths of axes, which
        stand for nothing else in it. `None` if the function has other operations than
        those of all elements: loops, branches, and parts of arrays."""
        known: dict[int, Any] = {}
        operations: list[Any] = []
        slots = itertools.count()

        # As `evaluate`, with slots for values; but without a call for each operation
        # and number, which a step pays for.
        def record(function: Function, inputs: list[int]) -> list[int]:
            jaxpr = function.jaxpr
            own: dict[Any, int] = dict(zip(jaxpr.invars, inputs, strict=True))
            for var, const in zip(jaxpr.constvars, function.consts, strict=True):
                own[var] = slot = next(slots)
                known[slot] = const
            for eqn in jaxpr.eqns:
                # Literals differ by their identity.
                for x in eqn.invars:
                    if isinstance(x, Literal):
                        own[id(x)] = slot = next(slots)
                        known[slot] = x.val
                operands = [
                    own[id(x) if isinstance(x, Literal) else x] for x in eqn.invars
                ]
                inner, name = None, eqn.primitive.name
                if name in CALLS:
                    inner = called(eqn)
                if inner is not None:
                    results = record(inner, operands)
                else:
                    shape = None
                    if name not in _WITHOUT_LENGTHS or eqn.effects:
                        shape = _shape_parameter(eqn, lengths)
                    results = [next(slots) for _ in eqn.outvars]
                    operations.append(
                        (eqn.primitive, operands, results, eqn.params, shape)
                    )
                own.update(zip(eqn.outvars, results, strict=True))
            for x in jaxpr.outvars:
                if isinstance(x, Literal):
                    own[id(x)] = slot = next(slots)
                    known[slot] = x.val
            return [own[id(x) if isinstance(x, Literal) else x] for x in jaxpr.outvars]

        inputs = [next(slots) for _ in function.jaxpr.invars]
        try:
            outputs = record(function, inputs)
        except _OtherOperation:
            return None
        if any([getattr(x, "shape", ()) != () for x in known.values()]):
            return None
        return Tape(inputs, outputs, known, operations)

    def replay(self, lengths: dict[int, int], args: Sequence[Any]) -> list[Any]:
        """What the function gives for these arguments, with new lengths for those that
        it was traced with."""
        values = self.known | dict(zip(self.inputs, args, strict=True))
        for primitive, operands, results, params, shape in self.operations:
            if shape is not None:
                new = [lengths.get(length, length) for length in params[shape]]
                params = params | {shape: tuple(new)}
            found = primitive.bind(*[values[i] for i in operands], **params)
            if primitive.multiple_results:
                values.update(zip(results, found, strict=True))
            else:
                values[results[0]] = found
        return [values[i] for i in self.outputs]


# Operations whose parameters are never lengths: most of those of a step.
_WITHOUT_LENGTHS = frozenset(
    """
    abs add and bitcast_convert_type convert_element_type div eq exp floor ge gt
    integer_pow is_finite le log lt max min mul ne neg not or reduce_max reduce_min
    round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign
    sqrt square sub
    """.split()
)


class _OtherOperation(Exception):
    """Of which a tape does not know what lengths do to it."""


def _shape_parameter(eqn: Any, lengths: frozenset[int]) -> str | None:
    """Which parameter of an operation has lengths in it: that of its shape, or none."""
    found = None
    for name, value in eqn.params.items():
        if name in ("shape", "new_sizes"):
            found = name if lengths & set(value) else found
        elif name == "sharding" and value is not None:
            raise _OtherOperation
        elif isinstance(value, tuple | list) and any(
            [isinstance(x, int) and x in lengths for x in jax.tree.leaves(value)]
        ):
            raise _OtherOperation
        else:
            for x in value if isinstance(value, tuple) else (value,):
                if callable(x) or hasattr(x, "eqns") or hasattr(x, "jaxpr"):
                    raise _OtherOperation
    if eqn.effects:
        raise _OtherOperation
    return found


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
    """`lax.while_loop`. Both functions take their constants, then the carry."""

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
    """`lax.scan`, and `lax.fori_loop` with a known number of iterations."""

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
    """The device that a program is traced for: that of the abstract mesh that is set,
    or the default device."""
    mesh = jax.sharding.get_abstract_mesh()
    device = getattr(mesh, "abstract_device", None)
    if device is not None:
        return device
    device = getattr(jax.config, "jax_default_device", None) or jax.local_devices()[0]
    if isinstance(device, str):
        return jax.local_devices(backend=device)[0]
    return device

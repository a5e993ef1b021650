"""What a device holds in training, before anything is allocated."""

import dataclasses
import math
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from .._common import meshes
from .._common.dtypes import NARROW_DTYPES
from .._common.text import aligned, shown
from .._model.blocks import count_layers, part_of
from .._model.trained import TRAINABLE_DTYPES
from .._model.trees import flatten, is_array, Leaf, match
from .._optimizer.optimizer import Optimizer, transformation_of
from .._optimizer.state import OptimizerState
from .._sharding import state_specs
from .._sharding.fsdp import fsdp_shardings
from .._sharding.resolve import as_explicit
from .._storage.defaults import GROUP_SIZE
from .._storage.quant_moment import QuantMoment


@dataclasses.dataclass(frozen=True)
class DeviceMemory:
    """The bytes on one device in a [`flashquinox.MemoryPlan`][].

    - `parameters`: the parameters of the model over the number of devices.
    - `weights`: the weights that are trained.
    - `corrections`: what extends narrow weights.
    - `master_weights`: in mixed precision, the float32 weights.
    - `moments`: the codes of moments, or all of them where they are uncompressed.
    - `scales`: the scales of moments, and the parameters of codecs that learn.
    - `gradients`: the most that exist at one time, in the dtypes of the weights. `None`
        if that is not known.
    - `other`: all else: arrays of the model that are not trained, the number of steps,
        and the state of Optax's wrappers.
    """

    parameters: float
    weights: int
    corrections: int
    master_weights: int
    moments: int
    scales: int
    gradients: int | None
    other: int

    @property
    def at_rest(self) -> int:
        """All but the gradients."""
        return sum(getattr(self, name) for name in CATEGORIES if name != "gradients")

    @property
    def total(self) -> int | None:
        """All of it; `None` if the gradients are not known."""
        return None if self.gradients is None else self.at_rest + self.gradients

    @property
    def bytes_per_parameter(self) -> float | None:
        """`total` over `parameters`."""
        return None if self.total is None else self.total / max(1, self.parameters)


# JAX counts them in 32 bits.
MOST_DEVICES = 2**31 - 1
CATEGORIES = (
    "weights",
    "corrections",
    "master_weights",
    "moments",
    "scales",
    "other",
    "gradients",
)


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """What [`flashquinox.memory_plan`][] found. `str(plan)` is a table.

    - `parameters`: the number of weights that are trained, on all devices together.
    - `devices`: how many there are.
    - `step`: a step of this optimizer with all gradients at once.
    - `gradient_release`: a step in which a layer is updated as soon as its gradient is
        known. Its `gradients` are `None` if the model has no stacked blocks.
    - `mixed_precision`: the same optimizer by Optax, in mixed precision: float32 master
        weights and float32 moments, beside the same weights and gradients.
    - `whole`: those bytes of the weights that every device has a copy of.
    """

    parameters: int
    devices: int
    step: DeviceMemory
    gradient_release: DeviceMemory
    mixed_precision: DeviceMemory
    whole: int

    def columns(self) -> dict[str, DeviceMemory]:
        """The three of them by the names they have in the table."""
        return {
            "flashquinox": self.step,
            "gradient release": self.gradient_release,
            "mixed precision": self.mixed_precision,
        }

    def table(self, device_memory: int | None = None) -> str:
        """The table as text, and what has to be known to read it.

        **Arguments:**

        - `device_memory`: the memory of a device, in bytes: for a line that says how
            much of it is left.
        """
        columns = self.columns()
        sizes = [x.total or x.at_rest for x in columns.values()]
        unit, name = unit_of(max(sizes))
        cell = lambda size: f"{size / unit:.3f} {name}"
        rows = [("on each device", *columns)]
        for category in CATEGORIES:
            found = [getattr(x, category) for x in columns.values()]
            if any(size is None or size >= unit / 2000 for size in found):
                label = category.replace("_", " ")
                rows.append((label, *map(_or(cell, "no blocks", "-"), found)))
        of_all = lambda show: [
            _or(show, "-", "-")(x) for x in (y.total for y in columns.values())
        ]
        rows.append(("total", *of_all(cell)))
        share = max(1, self.step.parameters)
        rows.append(("bytes per parameter", *of_all(lambda x: f"{x / share:.3f}")))
        if device_memory is not None:
            left = lambda x: (
                f"{cell(device_memory - x)} left"
                if x <= device_memory
                else f"{cell(x - device_memory)} too much"
            )
            rows.append((f"of {cell(device_memory)}", *of_all(left)))
        notes = [textwrap.fill(note, 80) for note in self._notes()]
        return "\n".join([aligned(rows, left=1), "", *notes])

    def _notes(self) -> list[str]:
        mixed = self.mixed_precision
        share = max(1, mixed.parameters)
        notes = [
            "Not in it: activations, and the temporaries of a step.",
            "Mixed precision: Optax with float32 master weights and float32 moments, "
            "beside the same weights and gradients; without gradients, "
            f"{mixed.at_rest / share:.3f} bytes per parameter.",
        ]
        if self.gradient_release.gradients is None:
            notes.append(
                "Gradient release: not known here, as it takes the layers of a stack "
                "one at a time."
            )
        if self.devices > 1 and self.whole > 0:
            unit, name = unit_of(self.whole)
            notes.append(
                f"Weights of {self.whole / unit:.3f} {name} are whole on every device."
            )
        return notes

    def __str__(self) -> str:
        return self.table()


def unit_of(size: int) -> tuple[float, str]:
    """The unit in which to write a size."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return unit, name
    return 1e3, "kB"


def _or(show: Callable[[Any], str], unknown: str, nothing: str) -> Callable[[Any], str]:
    return lambda x: unknown if x is None else nothing if x == 0 else show(x)


def memory_plan(
    model: PyTree,
    optim: optax.GradientTransformation | optax.MultiSteps,
    mesh: Mesh | AbstractMesh | int | None = None,
    *,
    blocks: Callable[[PyTree], PyTree] | None = None,
    prologue: Callable[[PyTree], PyTree] | None = None,
    epilogue: Callable[[PyTree], PyTree] | None = None,
) -> MemoryPlan:
    r"""What every device will hold in training: weights, corrections, moments, scales
    and gradients. Nothing is allocated, and no devices are needed.

    The state is that which `optim.init` would make, so that codecs, groups that are not
    full and vectors that stay float32 are counted as they are. It is divided as the
    weights are: by the optimizer's `shardings`; as an array, or a
    `jax.ShapeDtypeStruct`, says itself; otherwise by [`flashquinox.fsdp_shardings`][].

    With gradient release, of the gradients $g$ of what the prologue reads ($P$), of
    what the epilogue reads ($E$), and of $L$ layers, there are at one time

    $$\max\left(\sum_{E} g, \; \frac1L \sum_\text{blocks} g + \sum_{P \cap E} g, \;
    \sum_{P} g\right)$$

    as what only the epilogue reads is updated before the blocks, and what the prologue
    reads, a tied embedding included, after them.

    Activations and the temporaries of a step come on top.

    ??? Example

        ```python
        model = eqx.filter_eval_shape(make_model, key)
        print(fq.memory_plan(model, fq.adamw(1e-3), mesh=8))
        ```

    **Arguments:**

    - `model`: any pytree, of arrays or of `jax.ShapeDtypeStruct`s, as from
        `eqx.filter_eval_shape`; in the dtypes that training has.
    - `optim`: a [`flashquinox.Optimizer`][], or one that is wrapped by Optax.
    - `mesh`: the devices that the model is divided among: a `jax.sharding.Mesh`, an
        `AbstractMesh`, or how many there are. `None` for where the weights are, which
        is one device if they do not say.
    - `blocks`: for gradient release: a function from the model to its stacked blocks,
        of which every array has the layers along its first axis.
    - `prologue`, `epilogue`: likewise, functions from the model to those parts that are
        read before the blocks, and after them. `None` is everything outside of the
        blocks.

    **Returns:**

    A [`flashquinox.MemoryPlan`][].

    **Raises:**

    `TypeError` or `ValueError` if model, optimizer and mesh do not fit together. The
    message names the leaf.
    """
    call = "memory_plan"
    if not hasattr(optim, "init"):
        raise TypeError(
            f"`{call}`: `optim` is no optimizer but {shown(optim)}. Pass "
            "`flashquinox.adamw(1e-3)`, say, or a transformation of Optax with such an "
            "optimizer in it."
        )
    leaves, rebuild = flatten(model)
    parts = {
        name: None if choose is None else set(part_of(call, name, choose, model)[0])
        for name, choose in (
            ("blocks", blocks),
            ("prologue", prologue),
            ("epilogue", epilogue),
        )
    }
    explicit = _shardings(call, model, leaves, optim, mesh, blocks)
    leaves = [
        leaf._replace(value=_struct(leaf.value, sharding))
        if is_array(leaf.value)
        else leaf
        for leaf, sharding in zip(leaves, explicit, strict=True)
    ]
    state = _state(optim, rebuild([x.value for x in leaves]), explicit)
    states = [x for x in _nodes(state, OptimizerState) if isinstance(x, OptimizerState)]
    if not states:
        raise TypeError(
            f"`{call}`: the state of `optim` has no `flashquinox.OptimizerState` in "
            f"it; got {shown(optim)}. Pass `flashquinox.adamw(1e-3)`, say, or a "
            "transformation of Optax with such an optimizer in it."
        )
    # Where `init` would put it all.
    there = {path: sharding for x in states for path, sharding in x.shardings}
    arrays = {
        i: _struct(leaf.value, there.get(leaf.unwrapped, leaf.value.sharding))
        for i, leaf in enumerate(leaves)
        if is_array(leaf.value)
    }
    trained = {i: x for i, x in arrays.items() if x.dtype in TRAINABLE_DTYPES}
    moments = _stored([tree for x in states for tree in x.moments.values()], there)
    corrections = _stored([x.corrections for x in states], there)
    codes = [x.codes if isinstance(x, QuantMoment) else x for x in moments]
    rest = [
        [] if isinstance(x, OptimizerState) else x
        for x in _nodes(state, OptimizerState)
    ]
    everywhere = meshes.everywhere(list(there.values()))
    devices = 1 if everywhere is None else everywhere.mesh.size
    parameters = sum(math.prod(x.shape) for x in trained.values())
    weights = _bytes(trained.values())
    step = DeviceMemory(
        parameters=parameters / devices,
        weights=weights,
        corrections=_bytes(corrections),
        master_weights=0,
        moments=_bytes(codes),
        scales=_bytes(jtu.tree_leaves(moments)) - _bytes(codes),
        gradients=weights,
        other=_bytes(arrays.values())
        - weights
        + _bytes(jtu.tree_leaves([rest, [x.steps for x in states]])),
    )
    narrow = [x for x in trained.values() if x.dtype in NARROW_DTYPES]
    whole = [x for x in trained.values() if _elements(x) == math.prod(x.shape)]
    return MemoryPlan(
        parameters=parameters,
        devices=devices,
        step=step,
        gradient_release=dataclasses.replace(
            step, gradients=_released(call, leaves, trained, **parts)
        ),
        mixed_precision=dataclasses.replace(
            step,
            corrections=0,
            master_weights=4 * sum(map(_elements, narrow)),
            moments=4 * sum(map(_elements, codes)),
            scales=0,
        ),
        whole=_bytes(whole) if devices > 1 else 0,
    )


def _nodes(tree: PyTree, kind: type) -> list[Any]:
    """The leaves of a tree, and nodes of this kind in place of theirs."""
    return jtu.tree_leaves(tree, is_leaf=lambda x: isinstance(x, kind))


def _state(
    optim: optax.GradientTransformation | optax.MultiSteps,
    shapes: PyTree,
    explicit: list[NamedSharding | None],
) -> PyTree:
    """What `init` would make, and how it would be divided."""
    # Also of arrays that it makes from nothing; and on no other mesh that is set.
    nowhere = AbstractMesh((), ())
    mesh: Any = next((x.mesh for x in explicit if x is not None), nowhere)
    with jax.sharding.use_abstract_mesh(mesh):
        return eqx.filter_eval_shape(optim.init, shapes)


#
# Devices
#


def _shardings(
    call: str,
    model: PyTree,
    leaves: list[Leaf],
    optim: optax.GradientTransformation | optax.MultiSteps,
    mesh: Mesh | AbstractMesh | int | None,
    blocks: Callable[[PyTree], PyTree] | None,
) -> list[NamedSharding | None]:
    """How each array is divided, as a matter of types: then arrays that are made from
    them tell how they are divided too. `None` if all are on one device."""
    given, group_size = [None] * len(leaves), int(GROUP_SIZE)
    if isinstance(optim, Optimizer):
        transformation = transformation_of(optim)
        values, structure = transformation.shardings
        tree = jtu.tree_unflatten(structure, values)
        given = match(call, "shardings", tree, leaves, prefix=True)
        if isinstance(transformation.group_size, int):
            group_size = transformation.group_size
    own = [getattr(leaf.value, "sharding", None) for leaf in leaves]
    own = [x if isinstance(x, NamedSharding) and x.mesh.size > 1 else None for x in own]
    known = next((x.mesh for x in (*given, *own) if x is not None), None)
    devices = known if mesh is None else _as_mesh(call, mesh)
    if devices is None or devices.size == 1:
        return [None] * len(leaves)
    axes = AbstractMesh(
        devices.axis_sizes,
        devices.axis_names,
        axis_types=(AxisType.Explicit,) * len(devices.axis_names),
    )
    defaults = [NamedSharding(axes, PartitionSpec())] * len(leaves)
    if mesh is not None:
        tree = fsdp_shardings(model, axes, blocks=blocks, group_size=group_size)
        defaults = match(call, "shardings", tree, leaves)
    chosen = []
    for leaf, here, there, otherwise in zip(leaves, given, own, defaults, strict=True):
        if here is None and there is not None and there.mesh.shape != axes.shape:
            raise ValueError(
                f"`{call}`: the weight at `{leaf.name}` is on the mesh "
                f"{meshes.mesh_text(there.mesh)}, not on "
                f"{meshes.mesh_text(axes)}. Pass shapes, which are on none, as "
                "`eqx.filter_eval_shape` gives them; or leave `mesh` out."
            )
        sharding = here or there or otherwise
        if is_array(leaf.value) and sharding is not None:
            sharding = as_explicit(call, leaf, sharding, axes)
        chosen.append(sharding if is_array(leaf.value) else None)
    return chosen


def _as_mesh(call: str, mesh: Any) -> Mesh | AbstractMesh:
    if isinstance(mesh, Mesh | AbstractMesh):
        return mesh
    if isinstance(mesh, int) and not isinstance(mesh, bool):
        if 1 <= mesh <= MOST_DEVICES:
            return AbstractMesh((mesh,), ("fsdp",))
    raise TypeError(
        f"`{call}(mesh=...)` takes a `jax.sharding.Mesh`, an `AbstractMesh`, or a "
        f"number of devices from 1 to {MOST_DEVICES}; got {shown(mesh)}."
    )


def _struct(x: Any, sharding: NamedSharding | None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _stored(trees: list[PyTree], there: dict[Any, NamedSharding]) -> list[Any]:
    """What is stored for weights, in trees like the model, divided as these are."""
    found = []
    for leaf in (leaf for tree in trees for leaf in flatten(tree)[0]):
        value = leaf.value
        if value is not None and leaf.unwrapped in there:
            shardings = state_specs.of_arrays(value, there[leaf.unwrapped])
            value = jtu.tree_map(_struct, value, shardings)
        found += [] if value is None else [value]
    return found


def _elements(x: Any) -> int:
    """How many of an array are on one device."""
    if not isinstance(x.sharding, NamedSharding):
        return math.prod(x.shape)
    return math.prod(x.shape) // math.prod(meshes.divisions(x.sharding))


def _bytes(arrays: Iterable[Any]) -> int:
    return sum(_elements(x) * x.dtype.itemsize for x in arrays)


#
# Gradient release
#


def _released(
    call: str,
    leaves: list[Leaf],
    trained: dict[int, jax.ShapeDtypeStruct],
    blocks: set[int] | None,
    prologue: set[int] | None,
    epilogue: set[int] | None,
) -> int | None:
    """The most bytes of gradients that are there at one time: before the blocks, at one
    of them, and after them."""
    if blocks is None:
        return None
    stacked = [i for i in trained if i in blocks]
    layers = count_layers(call, [leaves[i] for i in stacked])
    layer = _bytes(trained[i] for i in stacked) // layers
    outside = set(trained) - blocks
    first = outside if prologue is None else outside & prologue
    last = outside if epilogue is None else outside & epilogue
    of = lambda numbers: _bytes(trained[i] for i in numbers)
    # What neither reads is updated before the blocks too.
    return max(of(outside - (first - last)), layer + of(first & last), of(first))

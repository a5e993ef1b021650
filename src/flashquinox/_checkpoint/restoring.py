"""Filling a model and a state from a checkpoint: which arrays to read, and what becomes
of them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from jaxtyping import PyTree

from .._common import eager
from .._common.placement import compute_like, no_mesh
from .._common.target import Target
from .._model.trees import is_array
from .._optimizer.checksums import checksums
from .._storage.codec import AbstractMomentCodec
from .._storage.layout import Layout
from .._storage.quant_moment import QuantMoment, StoredMoment
from .._storage.regroup import regroup
from .._storage.split import decode_stored
from . import manifests
from .named_leaves import (
    base_of,
    checksums_of,
    digests,
    flatten_named,
    parts,
    quant_moments,
)
from .weights import as_stored, is_of_model, Source, sources


class Wanted:
    """A model and a state to restore to. With a state of `None`, only the weights are
    restored."""

    def __init__(self, call: str, model: PyTree, state: PyTree):
        self._call = call
        self._leaves, self._rebuild = flatten_named(call, model, state)
        self._alone = state is None
        self._likes = {x.name: x.value for x in self._leaves if is_array(x.value)}
        self._moments = quant_moments(model, state)
        self._targets = {
            name: Target.of(call, name, x) for name, x in self._likes.items()
        }

    def plan(self, where: str, contents: dict[str, Any]) -> "Plan":
        """Which arrays to read, according to the contents of a manifest.

        **Raises:**

        `CheckpointError` if the checkpoint does not fit.
        """
        arrays, call = contents["arrays"], self._call
        summed = {
            name: weight
            for name, weight in checksums_of(self._likes).items()
            if name not in arrays and weight in self._likes
        }
        origins = {name: Source(name) for name in self._likes if name not in summed}
        unwanted = checksums_of(arrays).keys() - self._likes.keys()
        of_interest = {name: x for name, x in arrays.items() if name not in unwanted}
        if self._alone:
            origins = sources(call, where, arrays, self._likes)
            of_interest = {name: x for name, x in arrays.items() if is_of_model(name)}
        likes = {
            origin.name: as_stored(self._likes[name], arrays[origin.name])
            if origin.widened
            else self._likes[name]
            for name, origin in origins.items()
        }
        regrouped = manifests.check(
            call, where, of_interest, contents["moments"], likes, self._moments
        )
        shardings, stored = {}, {}
        for name, origin in origins.items():
            target = self._targets[name]
            for part in filter(None, (origin.name, origin.correction)):
                shardings[part] = target.sharding_of_read(automatic=origin.widened)
                dtype = arrays[part]["dtype"] if origin.widened else target.dtype
                stored[part] = jax.ShapeDtypeStruct(target.shape, jnp.dtype(dtype))
        for name in regrouped:
            codes, scales = parts(name)
            shardings[codes] = self._targets[codes].sharding_of_read(automatic=True)
            # They have another shape than those of `state`, and may not divide evenly.
            shardings[scales] = None
            found = arrays[scales]
            stored[scales] = jax.ShapeDtypeStruct(
                tuple(found["shape"]), jnp.dtype(found["dtype"])
            )
        groups = {
            name: Groups(
                manifests.layout_of(arrays, name, contents["moments"][name]),
                contents["moments"][name].get("relative_to"),
                codec,
            )
            for name, codec in regrouped.items()
        }
        expected = {name: arrays[name]["digest"] for name in stored}
        return Plan(shardings, stored, expected, origins, groups, summed)

    def fill(self, plan: "Plan", read: dict[str, Any]) -> tuple[PyTree, PyTree]:
        """The model and the state, filled with the arrays that were read."""
        read = dict(read)
        with no_mesh():
            is_relative = lambda name: self._moments[name].relative_to is not None
            # Those that others are relative to come first.
            for name in sorted(plan.groups, key=is_relative):
                codes, scales = parts(name)
                like, groups = self._moments[name], plan.groups[name]
                base = None
                if like.relative_to is not None and groups.relative_to is None:
                    base = self._base(base_of(name, like.relative_to), read)
                read[codes], read[scales] = regroup(
                    read[codes],
                    read[scales],
                    (groups.layout.axes, groups.layout.group_size),
                    like,
                    read.get(f"{name}.parameter"),
                    groups.codec,
                    base,
                )
        new = {}
        for name, origin in plan.origins.items():
            x, like = read[origin.name], self._likes[name]
            if origin.widened:
                correction = [read[origin.correction]] if origin.correction else []
                pair, likes = [x, *correction], [like, *(like for _ in correction)]
                decode = eager.elementwise(decode_stored)
                x = compute_like(self._call, name, decode, pair, likes)
            new[name] = self._targets[name].put(x)
        for name, weight in plan.summed.items():
            x = new[weight]
            summed = _checksum(self._likes[name].ndim)
            x = compute_like(self._call, name, summed, [x], [self._likes[weight]])
            new[name] = self._targets[name].put(x)
        return self._rebuild([new.get(x.name, x.value) for x in self._leaves])

    def _base(self, name: str, read: dict[str, Any]) -> StoredMoment:
        """A moment of those that were read."""
        if name not in self._moments:
            return read[name]
        like = self._moments[name]
        codes, scales = (jnp.asarray(read[part]) for part in parts(name))
        return QuantMoment(
            codes,
            scales,
            like.axes,
            like.group_size,
            like.codec,
            read.get(f"{name}.parameter"),
        )


@dataclasses.dataclass(frozen=True)
class Groups:
    """How a moment was stored that must be encoded again."""

    layout: Layout
    relative_to: str | None
    codec: AbstractMomentCodec


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which arrays of a checkpoint to read, and for what.

    - `shardings`, `stored`, `digests`: for each array to read, by its name in the
        checkpoint, its target sharding, its stored shape and dtype, and its digest.
    - `origins`: for each leaf to fill, the arrays that it comes from.
    - `groups`: for each moment that must be encoded again, how it is stored.
    - `summed`: for each checksum that the checkpoint does not have, its weight.
    """

    shardings: dict[str, Sharding | None]
    stored: dict[str, jax.ShapeDtypeStruct]
    digests: dict[str, int]
    origins: dict[str, Source]
    groups: dict[str, Groups]
    summed: dict[str, str]

    def altered(self, read: dict[str, Any]) -> str | None:
        """The name of an array that differs from what was saved, if there is one."""
        with no_mesh():
            found = digests(read)
        return next((name for name in found if found[name] != self.digests[name]), None)


def _checksum(members: int) -> Callable[[Any], Any]:
    """A function from a weight to its checksum, mapped over this many axes of ensemble
    members."""
    function = lambda x: checksums([x])[0]
    for _ in range(members):
        function = jax.vmap(function)
    return function

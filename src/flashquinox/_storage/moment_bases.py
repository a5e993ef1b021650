"""What moments that are stored relative to others are relative to."""

from typing import Any

import jax.tree_util as jtu

from .quant_moment import QuantMoment


class Bases:
    """Tells the moments of states what they are relative to in these. States of one
    object are usually of one structure, which is found once: JAX makes a state for each
    call of a compiled step."""

    __slots__ = ("_structures",)

    _structures: dict[str, Any]

    def __init__(self):
        self._structures = {}

    def known(self, moments: Any) -> Any:
        """The same moments of a state, which know the others that they are relative
        to."""
        if not isinstance(moments, dict):
            return moments
        flat = self._flat(moments)
        for name, leaves in flat.items():
            is_new = False
            for i, moment in enumerate(leaves):
                if not isinstance(moment, QuantMoment):
                    continue
                relative_to = moment.relative_to
                # Trees of something else than moments have no bases.
                if relative_to is None or len(flat.get(relative_to, ())) != len(leaves):
                    continue
                leaves[i] = new = with_base(moment, flat[relative_to][i])
                is_new |= new is not moment
            if is_new:
                new = self._structures[name].unflatten(leaves)
                moments = moments | {name: new}
        return moments

    def _flat(self, moments: dict[str, Any]) -> dict[str, list[Any]]:
        if len(moments) == len(self._structures):
            try:
                return {
                    name: structure.flatten_up_to(moments[name])
                    for name, structure in self._structures.items()
                }
            except (KeyError, ValueError):
                pass
        flat = {
            name: jtu.tree_flatten(tree, is_leaf=_is_moment)
            for name, tree in moments.items()
        }
        self._structures = {name: structure for name, (_, structure) in flat.items()}
        return {name: leaves for name, (leaves, _) in flat.items()}


def _is_moment(x: Any) -> bool:
    return isinstance(x, QuantMoment)


def with_base(moment: QuantMoment, base: Any) -> QuantMoment:
    """A moment that knows what it is relative to."""
    held = getattr(moment, "base", None)
    if held is base:
        return moment
    if held is not None:
        # It is in several states, with several bases.
        moment = jtu.tree_map(lambda x: x, moment)
    moment.base = base
    return moment


def base_name(moments: Any) -> str | None:
    """The name of the moment that a tree of moments is relative to, if it is."""
    leaves = jtu.tree_leaves(moments, is_leaf=_is_moment)
    names = [getattr(x, "relative_to", None) for x in leaves]
    return next((name for name in names if name is not None), None)


def bases_first(moments: dict[str, Any]) -> list[str]:
    """The names of the moments of a state, before those of moments relative to them."""
    return sorted(moments, key=lambda name: base_name(moments[name]) is not None)

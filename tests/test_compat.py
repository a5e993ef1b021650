"""What JAX does not promise is used in one folder, and may be missing where it says."""

import ast
import gc
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.interpreters import partial_eval

import flashquinox
from flashquinox import _compat as compat


_SOURCES = Path(flashquinox.__file__).parent
_NOT_PROMISED = ("jax._src", "jax.extend", "jax.interpreters", "jaxlib")


def _imported(path: Path) -> set[str]:
    """The modules, and what is imported from them, of a file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
    return names


def _is_promised(name: str) -> bool:
    return not any(name == x or name.startswith(f"{x}.") for x in _NOT_PROMISED)


def test_one_folder_has_all_that_is_not_promised():
    paths = sorted(_SOURCES.rglob("*.py"))
    users = {
        str(path.relative_to(_SOURCES)): wrong
        for path in paths
        if (wrong := {name for name in _imported(path) if not _is_promised(name)})
    }
    assert {name.split("/")[0] for name in users} == {"_compat"}, users


@pytest.mark.parametrize("is_there", [True, False])
def test_inputs_read(is_there, monkeypatch):
    if not is_there:
        monkeypatch.delattr(partial_eval, "dce_jaxpr")
    function = lambda values: values["a"] * 2
    values = {"a": jnp.ones(2), "b": jnp.ones(3)}
    assert compat.inputs_read(function, values) == [True, not is_there]


def test_traced_device():
    first = jax.local_devices()[0]
    assert compat.traced_device() == first
    with jax.default_device(jax.devices()[3]):
        assert compat.traced_device() == jax.devices()[3]
    kind = jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=kind)
    with jax.sharding.use_abstract_mesh(mesh):
        assert compat.traced_device() == kind


def test_garbage_is_collected_after_lowering():
    """Not while a function is lowered; again after it, also after an error, unless the
    caller has switched it off."""
    seen = []

    def implementation(fails, platform, is_exported):
        def function(like):
            seen.append((platform, gc.isenabled()))
            if fails:
                raise ValueError("no")
            return like + 1

        return function

    by_platform = compat.ByPlatform("collections", implementation)
    by_platform.serve("cpu")
    step = lambda fails: jax.jit(lambda x: by_platform(fails, x))
    assert step(False)(jnp.ones(2)).tolist() == [2, 2]
    assert seen == [("cpu", False)] and gc.isenabled()
    with pytest.raises(ValueError, match="no"):
        step(True)(jnp.ones(2))
    assert gc.isenabled()
    gc.disable()
    try:
        step(False)(jnp.ones(3))
        assert not gc.isenabled()
    finally:
        gc.enable()

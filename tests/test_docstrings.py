"""The examples in docstrings, which the reference shows, are executed: each among the
names that it takes for granted."""

import ast
import re
import textwrap
from pathlib import Path

import jax
import pytest


_SOURCE = Path(__file__).parents[1] / "src" / "flashquinox"
_EXAMPLE = re.compile(r"^( *)```python\n(.*?)^\1```", re.DOTALL | re.MULTILINE)


def _examples():
    for path in sorted(_SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
            text = ast.get_docstring(node) if isinstance(node, kinds) else None
            name = getattr(node, "name", path.stem)
            for match in _EXAMPLE.finditer(text or ""):
                yield name, textwrap.dedent(match[2])


_EXAMPLES = list(_examples())
_COMMON = """
import equinox as eqx
import flashquinox as fq
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from flashquinox.checkpoint import Checkpoints
from flashquinox.exchange import from_optax, load_safetensors
from flashquinox.exchange import save_safetensors, to_optax
from jax.sharding import NamedSharding, PartitionSpec
from typing import Unpack

key = jr.key(0)
optim = fq.adamw(1e-3)
float32_model = eqx.nn.MLP(8, 8, 8, 1, key=key)
model, state = fq.prepare(float32_model, optim)
batch = jnp.ones((2, 8), jnp.bfloat16)
loss = lambda model, batch, *key: jnp.mean(jax.vmap(model)(batch) ** 2)


def advance(model, state):
    count = lambda state: state.steps.count
    return model, eqx.tree_at(count, state, replace_fn=lambda x: x + 1)
"""
_MASTERS = """
class Model(eqx.Module):
    head: eqx.nn.Linear

model, state = fq.prepare(Model(float32_model.layers[0]), optim)
"""
_LAYERS = """
class Block(eqx.Module):
    weight: jax.Array

    def __call__(self, x):
        return x + x @ self.weight

class Parts(eqx.Module):
    embedding: jax.Array
    blocks: Block
    norm: eqx.nn.RMSNorm

model = Parts(jr.normal(key, (16, 8)), Block(jnp.zeros((2, 8, 8))), eqx.nn.RMSNorm(8))
tokens = jnp.zeros((2, 5), jnp.int32)
cross_entropy = lambda logits, labels: jnp.mean(
    optax.softmax_cross_entropy_with_integer_labels(logits, labels)
)
"""
_MESH = (
    "mesh = jax.make_mesh((2,), ('fsdp',), axis_types=(jax.sharding.AxisType.Auto,))"
)
# What an example takes for granted beside that, and what follows it.
_BEFORE = {
    "Checkpoints": "train_step = advance",
    "restore": """
checkpoints = Checkpoints("checkpoints")
checkpoints.save(1, model, state)
checkpoints.wait()
""",
    "load_safetensors": """
save_safetensors("model.safetensors", model)
save_safetensors("float32.safetensors", model, state)
""",
    "from_optax": """
params = eqx.filter(float32_model, eqx.is_inexact_array)
optax_state = optax.adamw(1e-3).init(params)
""",
    "memory_plan": "make_model = lambda key: eqx.nn.MLP(8, 8, 8, 1, key=key)",
    "from_master_weights": _MASTERS,
    "map_moments": """
dead_neurons = jnp.zeros(8, bool)
state = optim.init({"w": jnp.ones((8, 4)), "b": jnp.ones(8)})
""",
    "map_params": f"""
{_MESH}
model = eqx.filter(model, eqx.is_array)
state = optim.init(model)
shardings = fq.fsdp_shardings(model, mesh)
""",
    "LayeredLoss": _LAYERS,
    "decode": """
state = optim.init({"w": jnp.ones((8, 1024))})
""",
}
_AFTER = {
    "restore": "checkpoints.close()",
    "Optimizer": "train_step(model, state, batch)",
    "accumulate": "train_step(batch, model, state)",
    "ema": "train_step(batch, model, state, average)",
    "Options": "my_adamw(1e-3, skip_nonfinite=True)",
    "AbstractRule": "optim.init(jnp.ones((4, 32)))",
    "AbstractWholeLeafRule": "optim.init(jnp.ones((4, 32)))",
}


@pytest.mark.slow
@pytest.mark.parametrize("name, source", _EXAMPLES, ids=[name for name, _ in _EXAMPLES])
def test_example(name, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "example"}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for part in (_COMMON, _BEFORE.get(name, ""), source, _AFTER.get(name, "")):
            exec(compile(part, name, "exec"), names)


def test_what_examples_need_is_of_examples():
    names = {name for name, _ in _EXAMPLES}
    assert len(_EXAMPLES) >= 20 and {*_BEFORE, *_AFTER} <= names

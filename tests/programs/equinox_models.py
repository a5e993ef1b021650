"""Small models of the kinds that Equinox's documentation trains, each with data and a
loss: written for tests, with layers of `equinox.nn` in the ways they are used there."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax


class Program(NamedTuple):
    """A model and how it is trained.

    - `make`: the model and its `equinox.nn.State`, which is `None` if it has none.
    - `loss`: of a model, its state, a key and a dtype to compute in; and the new state.
    - `learning_rate`, `steps`: of AdamW.
    - `keep`: which layers stay float32 where the others are bfloat16.
    - `trained`: which leaves are: a tree of booleans like the model, of the model.
    """

    make: Callable[[], tuple[Any, Any]]
    loss: Callable[..., tuple[jax.Array, Any]]
    learning_rate: float | optax.Schedule = 3e-3
    steps: int = 12
    keep: Any = None
    trained: Callable[[Any], Any] | None = None


def _cross_entropy(logits, labels):
    logits = logits.astype(jnp.float32)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def _images(n: int, channels: int = 1):
    """Bright squares in one of four corners, in noise; and which corner."""
    labels = jnp.arange(n) % 4
    noise = 0.3 * jr.normal(jr.key(10), (n, channels, 8, 8))
    row, column = labels // 2, labels % 2
    i, j = jnp.arange(8) // 4, jnp.arange(8) // 4
    bright = (i[None] == row[:, None])[:, :, None] & (j[None] == column[:, None])[
        :, None
    ]
    return noise + bright[:, None], labels


#
# Image classification
#


class _CNN(eqx.Module):
    layers: list

    def __init__(self, key):
        keys = jr.split(key, 3)
        self.layers = [
            eqx.nn.Conv2d(1, 4, 3, key=keys[0]),
            eqx.nn.MaxPool2d(2, 2),
            jax.nn.relu,
            jnp.ravel,
            eqx.nn.Linear(36, 32, key=keys[1]),
            eqx.nn.Identity(),
            jax.nn.sigmoid,
            eqx.nn.Linear(32, 4, key=keys[2]),
            jax.nn.log_softmax,
        ]

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def _cnn_loss(model, state, key, dtype):
    del key
    x, labels = _images(16)
    return _cross_entropy(jax.vmap(model)(x.astype(dtype)), labels), state


#
# A recurrent network
#


class _RNN(eqx.Module):
    cell: eqx.nn.GRUCell
    linear: eqx.nn.Linear
    bias: jax.Array

    def __init__(self, key):
        cell_key, linear_key = jr.split(key)
        self.cell = eqx.nn.GRUCell(2, 16, key=cell_key)
        self.linear = eqx.nn.Linear(16, 1, use_bias=False, key=linear_key)
        self.bias = jnp.zeros(1)

    def __call__(self, xs):
        start = jnp.zeros(self.cell.hidden_size, xs.dtype)
        last, _ = jax.lax.scan(lambda h, x: (self.cell(x, h), None), start, xs)
        return (self.linear(last) + self.bias)[0]


def _rnn_loss(model, state, key, dtype):
    """Which way spirals turn."""
    del key
    t = jnp.linspace(0, 6, 10)
    sign = jnp.where(jnp.arange(16) % 2 == 0, 1.0, -1.0)
    phase = jnp.linspace(0, 6, 16)[:, None] + sign[:, None] * t
    xs = jnp.stack([t * jnp.cos(phase), t * jnp.sin(phase)], axis=-1) / 6
    logits = jax.vmap(model)(xs.astype(dtype)).astype(jnp.float32)
    labels = (sign + 1) / 2
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, labels)), state


#
# Transformers
#


class _Block(eqx.Module):
    norms: list[eqx.nn.LayerNorm]
    attention: eqx.nn.MultiheadAttention
    linear: eqx.nn.Linear
    dropout: eqx.nn.Dropout

    def __init__(self, size, key):
        keys = jr.split(key)
        self.norms = [eqx.nn.LayerNorm(size), eqx.nn.LayerNorm(size)]
        self.attention = eqx.nn.MultiheadAttention(2, size, key=keys[0])
        self.linear = eqx.nn.Linear(size, size, key=keys[1])
        self.dropout = eqx.nn.Dropout(0.1)

    def __call__(self, x, key):
        keys = jr.split(key)
        y = jax.vmap(self.norms[0])(x)
        x = x + self.dropout(self.attention(y, y, y), key=keys[0])
        y = jax.vmap(self.norms[1])(x)
        return x + self.dropout(jax.nn.gelu(jax.vmap(self.linear)(y)), key=keys[1])


class _Bert(eqx.Module):
    tokens: eqx.nn.Embedding
    places: eqx.nn.Embedding
    # Integers among the weights.
    order: jax.Array
    block: _Block
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jr.split(key, 4)
        self.tokens = eqx.nn.Embedding(20, 16, key=keys[0])
        self.places = eqx.nn.Embedding(8, 16, key=keys[1])
        self.order = jnp.arange(8)
        self.block = _Block(16, keys[2])
        self.head = eqx.nn.Linear(16, 20, key=keys[3])

    def __call__(self, tokens, key):
        x = jax.vmap(self.tokens)(tokens) + jax.vmap(self.places)(self.order)
        return jax.vmap(self.head)(self.block(x, key))


def _bert_loss(model, state, key, dtype):
    """Which token was masked: each is the one before it plus 3."""
    del dtype
    tokens = (jnp.arange(8)[:, None] + 3 * jnp.arange(8)) % 19
    masked = tokens.at[:, ::4].set(19)
    logits = jax.vmap(model)(masked, jr.split(key, 8))
    return _cross_entropy(logits, tokens), state


class _ViT(eqx.Module):
    patches: eqx.nn.Conv2d
    class_token: jax.Array
    places: jax.Array
    blocks: _Block
    head: eqx.nn.Sequential

    def __init__(self, key):
        keys = jr.split(key, 4)
        self.patches = eqx.nn.Conv2d(3, 16, 4, stride=4, key=keys[0])
        self.class_token = 0.02 * jr.normal(keys[1], (1, 16))
        self.places = 0.02 * jr.normal(keys[2], (5, 16))
        # A stack of layers, for `scan`.
        self.blocks = eqx.filter_vmap(lambda key: _Block(16, key))(jr.split(keys[3]))
        linear = eqx.nn.Linear(16, 4, key=keys[3])
        self.head = eqx.nn.Sequential([eqx.nn.LayerNorm(16), linear])

    def __call__(self, x, key):
        x = self.patches(x).reshape(16, -1).T
        x = jnp.concatenate([self.class_token, x]) + self.places
        arrays, rest = eqx.partition(self.blocks, eqx.is_array)

        def body(x, block_and_key):
            block, key = block_and_key
            return eqx.combine(block, rest)(x, key), None

        x, _ = jax.lax.scan(body, x, (arrays, jr.split(key)))
        return self.head(x[0])


def _vit_loss(model, state, key, dtype):
    x, labels = _images(16, channels=3)
    logits = jax.vmap(model)(x.astype(dtype), jr.split(key, 16))
    return _cross_entropy(logits, labels), state


#
# Images to images
#


class _Mixer(eqx.Module):
    """The score of noisy images, at a time."""

    into: eqx.nn.Conv2d
    along: eqx.nn.MLP
    across: eqx.nn.MLP
    norm: eqx.nn.LayerNorm
    out: eqx.nn.ConvTranspose2d

    def __init__(self, key):
        keys = jr.split(key, 4)
        self.into = eqx.nn.Conv2d(2, 16, 2, stride=2, key=keys[0])
        self.along = eqx.nn.MLP(16, 16, 32, 1, key=keys[1])
        self.across = eqx.nn.MLP(16, 16, 32, 1, key=keys[2])
        self.norm = eqx.nn.LayerNorm((16, 16))
        self.out = eqx.nn.ConvTranspose2d(16, 1, 2, stride=2, key=keys[3])

    def __call__(self, t, x):
        t = jnp.broadcast_to(t, x.shape)
        y = self.into(jnp.concatenate([x, t])).reshape(16, 16)
        y = y + jax.vmap(self.along)(y)
        y = y + jax.vmap(self.across)(y.T).T
        return self.out(self.norm(y).reshape(16, 4, 4))


def _diffusion_loss(model, state, key, dtype):
    del key
    x, _ = _images(16)
    t = (0.1 + 1.9 * jnp.linspace(0, 1, 16)).reshape(-1, 1, 1, 1)
    std = jnp.sqrt(1 - jnp.exp(-t))
    noise = jr.normal(jr.key(11), x.shape)
    noisy = x * jnp.exp(-t / 2) + std * noise
    score = jax.vmap(model)(t.astype(dtype), noisy.astype(dtype))
    return jnp.mean((score.astype(jnp.float32) * std + noise) ** 2), state


class _UNet(eqx.Module):
    first: eqx.nn.Conv2d
    down: eqx.nn.Conv2d
    middle: eqx.nn.GroupNorm
    up: eqx.nn.ConvTranspose2d
    last: eqx.nn.Conv2d

    def __init__(self, key):
        keys = jr.split(key, 4)
        self.first = eqx.nn.Conv2d(1, 8, 3, padding=1, key=keys[0])
        self.down = eqx.nn.Conv2d(8, 16, 3, stride=2, padding=1, key=keys[1])
        self.middle = eqx.nn.GroupNorm(4, 16)
        self.up = eqx.nn.ConvTranspose2d(16, 8, 2, stride=2, key=keys[2])
        self.last = eqx.nn.Conv2d(16, 1, 1, key=keys[3])

    def __call__(self, x):
        skip = jax.nn.silu(self.first(x))
        x = jax.nn.silu(self.middle(self.down(skip)))
        return self.last(jnp.concatenate([skip, self.up(x)]))


def _unet_loss(model, state, key, dtype):
    """Where the bright square is."""
    del key
    x, _ = _images(16)
    target = x > 0.5
    logits = jax.vmap(model)(x.astype(dtype)).astype(jnp.float32)
    loss = optax.sigmoid_binary_cross_entropy(logits, target.astype(jnp.float32))
    return jnp.mean(loss), state


#
# Layers with a state
#


class _Norms(eqx.Module):
    linear: eqx.nn.Linear
    batch_norm: eqx.nn.BatchNorm
    spectral: eqx.nn.SpectralNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jr.split(key, 4)
        self.linear = eqx.nn.Linear(64, 32, key=keys[0])
        self.batch_norm = eqx.nn.BatchNorm(32, "batch", mode="batch")
        middle = eqx.nn.Linear(32, 32, key=keys[1])
        self.spectral = eqx.nn.SpectralNorm(middle, "weight", key=keys[2])
        self.head = eqx.nn.Linear(32, 4, key=keys[3])

    def __call__(self, x, state):
        x, state = self.batch_norm(self.linear(x.reshape(-1)), state)
        x, state = self.spectral(jax.nn.relu(x), state)
        return self.head(jax.nn.relu(x)), state


def _norms_loss(model, state, key, dtype):
    del key
    x, labels = _images(16)
    batched = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    logits, state = batched(x.astype(dtype), state)
    return _cross_entropy(logits, labels), state


#
# Frozen layers
#


def _last_layer(model):
    nothing = jax.tree.map(lambda _: False, model)
    where = lambda tree: (tree.layers[-1].weight, tree.layers[-1].bias)
    return eqx.tree_at(where, nothing, replace=(True, True))


def _regression_loss(model, state, key, dtype):
    del key
    x = jr.normal(jr.key(12), (32, 4))
    y = jnp.sin(x @ jr.normal(jr.key(13), (4, 3)))
    found = jax.vmap(model)(x.astype(dtype)).astype(jnp.float32)
    return jnp.mean((found - y) ** 2), state


def _stateless(make):
    return lambda: (make(jr.key(0)), None)


_mlp = lambda key: eqx.nn.MLP(4, 3, 32, 2, key=key)

PROGRAMS = {
    "classification": Program(_stateless(_CNN), _cnn_loss, learning_rate=1e-2),
    "recurrent": Program(_stateless(_RNN), _rnn_loss, learning_rate=2e-2),
    "bert": Program(_stateless(_Bert), _bert_loss, learning_rate=1e-2),
    "vit": Program(_stateless(_ViT), _vit_loss, keep=eqx.nn.LayerNorm),
    "diffusion": Program(
        _stateless(_Mixer),
        _diffusion_loss,
        learning_rate=optax.warmup_cosine_decay_schedule(0.0, 1e-2, 3, 14),
        keep="norm",
    ),
    "unet": Program(_stateless(_UNet), _unet_loss, learning_rate=1e-2),
    "norms": Program(lambda: eqx.nn.make_with_state(_Norms)(jr.key(0)), _norms_loss),
    "frozen": Program(
        _stateless(_mlp), _regression_loss, learning_rate=1e-2, trained=_last_layer
    ),
}

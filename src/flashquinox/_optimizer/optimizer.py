from typing import Any, cast, TYPE_CHECKING

import optax
from jaxtyping import Array, PyTree, ScalarLike

from .._backends.dispatch import Backend
from .._model.trees import Model, Updates
from .._rules.rule import AbstractRule
from .._storage import defaults
from .._storage.defaults import Bits, GROUP_SIZE, Integer, MASTER_WEIGHT_BITS
from .._storage.moment_codecs import MomentCodecs
from . import argument_checks as arguments
from .checksums import check_verify_weights, Verify
from .defaults import with_static_defaults
from .engine import Mask, ScalarOrSchedule, Transformation
from .method import Method
from .state import OptimizerState
from .text import optimizer_text


class Optimizer(optax.GradientTransformationExtraArgs):
    """An optimizer with compressed state, made by [`flashquinox.adamw`][],
    [`flashquinox.adam`][], [`flashquinox.lion`][], [`flashquinox.sgd`][],
    [`flashquinox.sgdw`][], or, from a rule of your own, by [`flashquinox.optimizer`][].

    It is also an `optax.GradientTransformationExtraArgs`, and so goes wherever one
    goes: `optax.chain`, `optax.MultiSteps`, `optax.inject_hyperparams`, and so on.

    ??? Example

        ```python
        model = fq.cast(model, jnp.bfloat16)
        optim = fq.adamw(1e-3)
        state = optim.init(model)

        @eqx.filter_jit(donate="all")
        def train_step(model, state, batch):
            grads = eqx.filter_grad(loss)(model, batch)
            return optim.step(model, state, grads)
        ```
    """

    # At run time, the two fields of the tuple: `Method`s of one `Transformation`.
    if TYPE_CHECKING:

        def init(self, params: PyTree) -> OptimizerState: ...

        def update(
            self,
            updates: Updates,
            state: OptimizerState,
            params: PyTree | None = None,
            **extra_args: Any,
        ) -> tuple[Updates, OptimizerState]: ...

    def __repr__(self) -> str:
        """One line: the call that makes such an optimizer, without what is left at its
        default in it."""
        return optimizer_text(transformation_of(self))

    def step(
        self,
        model: Model,
        state: OptimizerState,
        grads: PyTree,
        *,
        max_norm: ScalarLike | None = None,
    ) -> tuple[Model, OptimizerState]:
        """Takes one step.

        **Arguments:**

        - `model`: any pytree. Leaves that are not floating-point arrays are left alone.
        - `state`: from `init`, or from the previous step.
        - `grads`: a pytree like `model`, as from `eqx.filter_grad`: gradients in
            bfloat16, float16, float32 or float64, in the shapes of the weights. `None`
            in place of a leaf, or of a whole subtree, leaves its weights and their
            state untouched: for what is frozen, `init` may have got `None` too.
        - `max_norm`: the largest Euclidean norm of all gradients together, over all
            leaves and all devices, in float32. Those of a larger norm are scaled down
            to it, as by `optax.clip_by_global_norm`; but where they are read, not in
            memory. A number or a scalar array, which may be traced; `None` is no
            clipping.

        **Returns:**

        A 2-tuple of the new model and the new state, in the dtypes of the old.

        **Raises:**

        `TypeError` or `ValueError` if the trees, shapes or dtypes do not fit together,
        or the state is that of another optimizer. The message names the leaf.
        """
        return transformation_of(self).step(model, state, grads, max_norm)


def transformation_of(optim: Optimizer) -> Transformation:
    """What makes and takes the steps of an optimizer."""
    return cast(Any, optim.update).module


@with_static_defaults
def optimizer(
    rule: AbstractRule,
    learning_rate: ScalarOrSchedule,
    *,
    weight_decay: ScalarOrSchedule = 0.0,
    decoupled: bool = True,
    decouple_lr: bool = False,
    peak_learning_rate: ScalarLike | None = None,
    mask: Mask | None = None,
    master_weight_bits: Bits = MASTER_WEIGHT_BITS,
    moments: str | tuple[str, str] | MomentCodecs = "flashquinox",
    group_size: Integer | Array = GROUP_SIZE,
    skip_nonfinite: bool = False,
    dither_weights: bool = False,
    verify_weights: Verify = None,
    backend: Backend = "auto",
    shardings: PyTree = None,
) -> Optimizer:
    r"""An optimizer from a rule: yours, or one of this library's.

    **Arguments:**

    - `rule`: a [`flashquinox.AbstractRule`][].
    - `learning_rate`: a float, a scalar array, or an Optax schedule: a function of the
        number of steps taken, from 0, to a scalar. `init` calls it once, for what it
        returns to be checked.
    - `weight_decay`: likewise.
    - `decoupled`: if `True`, $w \leftarrow (1 - \alpha\lambda) w + u$. If `False`, L2
        regularization: $\lambda w$ is added to the gradient.
    - `decouple_lr`: if `True`, decoupled decay is $\lambda \alpha / \alpha_\text{peak}$
        instead of $\lambda\alpha$: it follows the shape of the schedule, not its
        height.
    - `peak_learning_rate`: $\alpha_\text{peak}$. Needed with `decouple_lr=True`, unless
        `learning_rate` is a number, which is its own peak.
    - `mask`: which weights decay: a pytree of booleans like the model or a prefix of
        it, or a function from the floating-point part of the model to one. As in
        `optax.adamw`.
    - `master_weight_bits`: the precision in which bfloat16 and float16 weights
        accumulate updates. 24 adds an `int8` correction per weight, 32 an `int16`;
        `None` none. `"auto"` is 24 for such weights, and nothing for a model, or a
        group of weights, that has none; a number is an error there.
    - `moments`: how moments are stored: `"flashquinox"` (8 bits), `"learned"` (8 bits,
        by curves that follow the moments), `"flashoptim"` (8 bits, the paper's codec),
        `"float32"` (uncompressed), another name or a pair of names in
        [`flashquinox.MomentCodecs`][], or one of these.
    - `group_size`: how many elements share a scale: a multiple of 16 from 16 to 128.
    - `skip_nonfinite`: if `True`, a step with a NaN or an infinity in any gradient, or
        in what a schedule returns, changes neither weights nor state. If `False`, it
        damages the leaves it came to, no others.
    - `dither_weights`: with `master_weight_bits=None`, whether bfloat16 and float16
        weights are rounded by a threshold that rotates from step to step, instead of to
        nearest: steps that are too small for the weight then arrive in their share of
        the cases.
    - `verify_weights`: whether each step checks that the weights it gets are those to
        which their corrections belong, as they are not if something scales the updates
        of the last step, or changes weights by hand. `"error"` raises, `"warn"` warns
        from the host; both name the leaf. The state then has a checksum of each weight
        with a correction, and a step reads these weights twice more. `None` is no
        check.
    - `backend`: `"auto"` takes the kernels of the platform that a program is compiled
        for, and plain XLA where there is none. `"xla"` takes plain XLA everywhere.
        `"tpu"` makes states for TPUs on any machine, and takes their kernels, which
        platforms without them interpret (slowly: for debugging). `"gpu"` likewise takes
        the kernels for NVIDIA GPUs, also in a program that is made without one:
        `"auto"` takes them where JAX's default device is one.
    - `shardings`: a tree like the model, or a prefix of it, of
        `jax.sharding.NamedSharding`s, or `None` where that is known: how weights are
        divided among devices. Only needed where JAX does not tell and `init` has not
        seen it: see [Train on many devices](../sharding.md).

    **Returns:**

    A [`flashquinox.Optimizer`][].

    **Raises:**

    `ValueError` or `TypeError` for arguments out of range; arrays that are traced are
    not checked. Likewise for a rule or a codec that is not elementwise, and for one
    whose parts do not fit together. `ImportError` for `backend="gpu"` or `"tpu"` where
    JAX has not what those kernels are made with; `"auto"` then takes plain XLA, with
    one warning.
    """
    return build_optimizer(
        "optimizer",
        rule,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        decoupled=decoupled,
        decouple_lr=decouple_lr,
        peak_learning_rate=peak_learning_rate,
        mask=mask,
        master_weight_bits=master_weight_bits,
        moments=moments,
        group_size=group_size,
        skip_nonfinite=skip_nonfinite,
        dither_weights=dither_weights,
        verify_weights=verify_weights,
        backend=backend,
        shardings=shardings,
    )


def build_optimizer(
    call: str,
    rule: AbstractRule,
    *,
    learning_rate: ScalarOrSchedule,
    weight_decay: ScalarOrSchedule,
    decoupled: bool,
    decouple_lr: bool,
    peak_learning_rate: ScalarLike | None,
    mask: Mask | None,
    master_weight_bits: Bits,
    moments: str | tuple[str, str] | MomentCodecs,
    group_size: Integer | Array,
    skip_nonfinite: bool,
    dither_weights: bool,
    verify_weights: Verify,
    backend: Backend,
    shardings: PyTree,
) -> Optimizer:
    """`optimizer`, for errors that name `call` as the user wrote it."""
    arguments.check_hyperparameters(call, rule, learning_rate, weight_decay)
    arguments.check_mask(call, mask, weight_decay)
    arguments.check_decoupling(call, decoupled, decouple_lr)
    peak = arguments.check_peak(call, learning_rate, decouple_lr, peak_learning_rate)
    bits = arguments.check_master_weight_bits(call, master_weight_bits)
    transformation = Transformation(
        call=call,
        rule=rule,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        decoupled=bool(decoupled),
        peak_learning_rate=peak,
        mask=mask,
        master_weight_bits=bits,
        codecs=arguments.check_moments(call, moments),
        group_size=defaults.check_group_size(call, group_size),
        skip_nonfinite=arguments.check_flag(call, "skip_nonfinite", skip_nonfinite),
        dither_weights=arguments.check_dither_weights(call, dither_weights, bits),
        verify_weights=check_verify_weights(call, verify_weights),
        backend=arguments.check_backend(call, backend),
        shardings=arguments.check_shardings(call, shardings),
    )
    # Optax's types know no state that is not made of arrays.
    init, update = Method(transformation, "init"), Method(transformation, "update")
    return Optimizer(cast(Any, init), cast(Any, update))

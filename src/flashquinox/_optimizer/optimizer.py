import dataclasses
from typing import Any, cast, TYPE_CHECKING, Unpack

import optax
from jaxtyping import PyTree, ScalarLike

from .._model.trees import Model, Updates
from .._rules.whole_leaf import AnyRule
from .._storage.storage import check_storage, Storage
from .argument_checks import check_hyperparameters
from .engine import StepEngine
from .factory import factory
from .groups import AbstractChoice, Group
from .method import Method
from .options import check_options, Options
from .schedules import ScalarOrSchedule
from .settings import Settings
from .state import OptimizerState
from .text import optimizer_text
from .weight_decay import check_weight_decay, Decay, Mask, WeightDecay


class Optimizer(optax.GradientTransformationExtraArgs):
    """An optimizer with compressed state, made by [`flashquinox.adamw`][],
    [`flashquinox.adam`][], [`flashquinox.adan`][], [`flashquinox.lion`][],
    [`flashquinox.sgd`][], [`flashquinox.sgdw`][], or, from a rule of your own, by
    [`flashquinox.optimizer`][].

    It is also an `optax.GradientTransformationExtraArgs`, and so goes wherever one
    goes: `optax.chain`, `optax.MultiSteps`, `optax.inject_hyperparams`, and so on.

    ??? Example

        ```python
        optim = fq.adamw(1e-3)
        model, state = fq.prepare(float32_model, optim)

        @eqx.filter_jit(donate="all")
        def train_step(model, state, batch):
            grads = eqx.filter_grad(loss)(model, batch)
            return optim.step(model, state, grads)
        ```
    """

    # At run time, the two fields of the tuple: `Method`s of one `StepEngine`.
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
        return optimizer_text(settings_of(self))

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
        return _engine_of(self).advance("step", model, state, grads, max_norm)


def settings_of(optim: Optimizer) -> Settings:
    """What an optimizer was built from."""
    return _engine_of(optim).settings


def _engine_of(optim: Optimizer) -> StepEngine:
    return cast(Any, optim.update).module


@factory
def optimizer(
    rule: AnyRule,
    learning_rate: ScalarOrSchedule,
    *,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask | None = None,
    decay: Decay = "decoupled",
    peak_learning_rate: ScalarLike | None = None,
    storage: Storage = Storage(),
    **options: Unpack[Options],
) -> Optimizer:
    r"""An optimizer from a rule: yours, or one of this library's.

    **Arguments:**

    - `rule`: a [`flashquinox.AbstractRule`][], or one that needs whole leaves: a
        [`flashquinox.AbstractWholeLeafRule`][], a
        [`flashquinox.AbstractMeansRule`][] or a [`flashquinox.AbstractMatrixRule`][].
    - `learning_rate`: a float, a scalar array, or an Optax schedule: a function of the
        number of steps taken, from 0, to a scalar. `init` calls it once, for what it
        returns to be checked.
    - `weight_decay`: likewise.
    - `mask`: which weights decay: a pytree of booleans like the model or a prefix of
        it, or a function from the floating-point part of the model to one. As in
        `optax.adamw`.
    - `decay`: which form weight decay has. `"decoupled"`: $w \leftarrow
        (1 - \alpha\lambda) w + u$. `"independent"`: the same with $\lambda \alpha /
        \alpha_\text{peak}$ for $\lambda\alpha$: it follows the shape of the schedule,
        not its height. `"unscaled"`: the same with $\lambda$ for $\lambda\alpha$.
        `"l2"`: L2 regularization: $\lambda w$ is added to the gradient; of rules that
        need whole leaves, and of [`flashquinox.ScheduleFreeAdamW`][], to the direction.
    - `peak_learning_rate`: $\alpha_\text{peak}$. Needed with `decay="independent"`,
        unless `learning_rate` is a number, which is its own peak.
    - `storage`: how weights and moments are stored: a [`flashquinox.Storage`][].
    - `options`: what all optimizers take: how steps are executed, such as what a NaN
        does and where the state lives. See [`flashquinox.Options`][].

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
        learning_rate,
        WeightDecay(weight_decay, mask, decay, peak_learning_rate),
        storage,
        options,
    )


def build_optimizer(
    call: str,
    rule: AnyRule,
    learning_rate: ScalarOrSchedule,
    decay: WeightDecay,
    storage: Storage,
    options: Options,
    others: tuple[Group, ...] = (),
    choice: AbstractChoice | None = None,
) -> Optimizer:
    """`optimizer`, for errors that name `call` as the user wrote it. `others` are
    groups of leaves that are trained by other rules, as `choice` says."""
    groups = []
    for group in (Group(rule, learning_rate, decay), *others):
        check_hyperparameters(call, group)
        checked = check_weight_decay(call, group.decay, group.learning_rate)
        groups.append(dataclasses.replace(group, decay=checked))
    settings = Settings(
        call=call,
        groups=tuple(groups),
        choice=choice,
        storage=check_storage(call, storage),
        **check_options(call, options),
    )
    # Optax's types know no state that is not made of arrays.
    engine = StepEngine(settings)
    init, update = Method(engine, "init"), Method(engine, "update")
    return Optimizer(cast(Any, init), cast(Any, update))

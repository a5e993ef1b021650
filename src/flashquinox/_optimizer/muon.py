from collections.abc import Callable, Sequence
from typing import Any, Unpack

from jaxtyping import ScalarLike

from .._common.number_checks import check_constant, check_flag, check_in_range
from .._common.text import shown
from .._rules.adam import Adam
from .._rules.muon import Muon
from .._rules.newton_schulz import Coefficients, named_coefficients, NAMES
from .._storage.storage import Storage
from .dimension_numbers import ByDimensionNumbers, DimensionNumbers
from .factory import factory
from .groups import Group
from .optimizer import build_optimizer, Optimizer
from .options import Options
from .schedules import ScalarOrSchedule
from .weight_decay import decoupled, DecoupledDecay, Mask


@factory
def muon(
    learning_rate: ScalarOrSchedule,
    ns_coeffs: str | Sequence[Any] = "quintic",
    ns_steps: int = 5,
    beta: ScalarLike = 0.95,
    eps: float = 1e-8,
    *,
    nesterov: bool = True,
    consistent_rms: ScalarLike | None = None,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask | None = None,
    decay: DecoupledDecay = "decoupled",
    peak_learning_rate: ScalarLike | None = None,
    weight_dimension_numbers: DimensionNumbers | Callable | None = None,
    adam_learning_rate: ScalarOrSchedule | None = None,
    adam_b1: ScalarLike = 0.9,
    adam_b2: ScalarLike = 0.999,
    adam_eps: ScalarLike = 1e-8,
    adam_weight_decay: ScalarOrSchedule = 0.0,
    storage: Storage = Storage(),
    **options: Unpack[Options],
) -> Optimizer:
    r"""Muon for matrices, AdamW for all other weights, in one state and one step:
    [`flashquinox.Muon`][] or [`flashquinox.Adam`][], and

    $$w_t = (1 - \alpha_t \lambda) w_{t-1} + u_t$$

    in 4.0625 bytes per parameter of a matrix at rest: a bfloat16 weight, an 8-bit
    correction, and one 8-bit moment with a 16-bit scale per 32 elements; 5.125 bytes
    per parameter of other weights.

    Equal matrices are stacked for the Newton-Schulz iteration. On a mesh, the stack is
    divided among all devices, each of which gets whole matrices: by two all-to-alls for
    each stack where matrices are divided.

    ??? cite "References"

        Jordan et al., *Muon: An optimizer for hidden layers in neural networks*, 2024,
        [kellerjordan.github.io/posts/muon](https://kellerjordan.github.io/posts/muon/);
        Liu et al., *Muon is Scalable for LLM Training*,
        [arXiv:2502.16982](https://arxiv.org/abs/2502.16982). Storage: FlashOptim,
        [arXiv:2602.23349](https://arxiv.org/abs/2602.23349).

    Arguments have the names and defaults of `optax.contrib.muon`, but for these:
    `mask` is its `weight_decay_mask` and exempts weights of both kinds;
    `weight_dimension_numbers` is its `muon_weight_dimension_numbers`; presets of
    `ns_coeffs` have other names; and `mu_dtype`, `adaptive`, `preconditioning` and
    `adam_eps_root` do not exist.

    **Arguments:**

    - `learning_rate`: $\alpha$: a float, or an Optax schedule of the number of steps
        taken, from 0.
    - `ns_coeffs`: the coefficients $(a, b, c)$ of the iteration: `"quintic"`,
        `"polar_express"`, three numbers, or three numbers for each iteration.
    - `ns_steps`: the number of iterations.
    - `beta`: $\beta \in [0, 1)$: the decay rate of the momentum.
    - `eps`: $\epsilon \ge 0$: is added to the norm of a matrix.
    - `nesterov`: whether to use Nesterov momentum, in AdamW too, as Optax does.
    - `consistent_rms`: $\rho$, by which updates have a root mean square of about
        $\rho$, whatever their shape; 0.2 is about that of AdamW's, so that AdamW's
        learning rates and weight decays fit. `None` is the original scaling by
        $\sqrt{\max(1, m / n)}$ of a matrix with $n$ inputs and $m$ outputs.
    - `weight_decay`: $\lambda$ of matrices, times the learning rate.
    - `mask`: which weights decay, of both kinds: a pytree of booleans like the model or
        a prefix of it, or a function from the floating-point part of the model to one.
    - `decay`: `"decoupled"`, or `"independent"` of the height of the learning rate:
        $\lambda \alpha_t / \alpha_\text{peak}$ in place of $\lambda\alpha_t$.
    - `peak_learning_rate`: $\alpha_\text{peak}$. Needed with `decay="independent"`,
        unless the learning rates are numbers, which are their own peaks.
    - `weight_dimension_numbers`: which weights are matrices: a pytree like the model or
        a prefix of it, or a function from the floating-point part of the model to one,
        of `optax.contrib.MuonDimensionNumbers`: the axes of inputs and those of
        outputs, such as `(0, (1, 2))` of (embed, heads, head_dim). All other axes are
        of a stack of matrices: heads, or layers. `None` stands for AdamW. By default,
        matrices are the weights of `equinox.nn.Linear`, `LSTMCell` and `GRUCell`,
        alone or stacked by `vmap`, and all other weights with two axes that
        [`flashquinox.decay_mask`][] selects, inputs before outputs; but for those of
        `equinox.nn.Embedding`, and of all classes whose names end in `Embedding` or
        `Embed`; and for those with a name on their path that is one of embeddings or of
        the layer that makes logits: `embedding`, `position`, `wte` or `lm_head`, say.
    - `adam_learning_rate`: that of other weights. `None` is `learning_rate`.
    - `adam_b1`, `adam_b2`, `adam_eps`, `adam_weight_decay`: of other weights, as in
        [`flashquinox.adamw`][].
    - `storage`: how weights and moments are stored: a [`flashquinox.Storage`][]. The
        iteration raises what 8 bits round: with a [`flashquinox.TaperedCodec`][] for
        the momentum, in one byte per parameter more, updates are those in float32.
    - `options`: what all optimizers take: how steps are executed, such as what a NaN
        does and where the state lives. See [`flashquinox.Options`][].

    **Returns:**

    A [`flashquinox.Optimizer`][], which is also an
    `optax.GradientTransformationExtraArgs`.

    **Raises:**

    `ValueError` or `TypeError` for arguments out of range.
    """
    check_in_range("muon", "eps", eps, 0.0, float("inf"))
    check_constant("muon", "eps", eps)
    matrices = Muon(
        beta,
        consistent_rms,
        check_flag("muon", "nesterov", nesterov),
        _coefficients(ns_coeffs, ns_steps),
        float(eps),
    )
    rate = learning_rate if adam_learning_rate is None else adam_learning_rate
    others = Group(
        Adam(adam_b1, adam_b2, adam_eps, nesterov),
        rate,
        decoupled("muon", adam_weight_decay, mask, decay, peak_learning_rate),
        prefix="adam_",
    )
    return build_optimizer(
        "muon",
        matrices,
        learning_rate,
        decoupled("muon", weight_decay, mask, decay, peak_learning_rate),
        storage,
        options,
        (others,),
        ByDimensionNumbers(weight_dimension_numbers),
    )


def _coefficients(given: Any, steps: Any) -> tuple[Coefficients, ...]:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(
            f"`muon(ns_steps=...)` takes a number of iterations, at least 1; got "
            f"{shown(steps)}."
        )
    if isinstance(given, str) and given in NAMES:
        return named_coefficients(given, steps)
    try:
        if all(isinstance(x, int | float) for x in given):
            given = [given] * steps
        found: Any = tuple([tuple([float(x) for x in one]) for one in given])
    except (TypeError, ValueError):
        found = ()
    if len(found) == steps and all(len(one) == 3 for one in found):
        return found
    raise ValueError(
        f"`muon(ns_coeffs=...)` takes {', '.join(map(repr, NAMES))}, three numbers, or "
        f"three numbers for each of the {steps} iterations; got {shown(given)}."
    )

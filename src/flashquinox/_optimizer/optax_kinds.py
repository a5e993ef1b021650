"""What the states of Optax's transformations hold: by the class of a state and the name
of a field, how its arrays may be stored."""

from typing import Literal, TypeAlias


# "exact" is for arrays that must not be rounded: weights of the past, of which small
# differences are taken, previous gradients, and sums of gradients in which old ones do
# not fade.
StateKind: TypeAlias = Literal["signed", "nonnegative", "exact"]

# All that Optax 0.2.8 has. Other states need `kinds=...`.
_SIGNED = """
    ApplyEvery.grad_acc DAdaptAdamWState.exp_avg DAdaptAdamWState.grad_sum EmaState.ema
    PerElementMeanAndVarianceEMAState.mean_grads_ema
    MomoAdamState.exp_avg MomoState.exp_avg MuonState.mu
    ProdigyState.exp_avg ProdigyState.grad_sum ScaleByAdamState.mu ScaleByAdanState.m
    ScaleByAdanState.v ScaleByAdemamixState.m1
    ScaleByAmsgradState.mu ScaleByBeliefState.mu ScaleByLionState.mu
    ScaleByNovogradState.mu ScaleByRStdDevState.mu ScaleBySM3State.nu
    ScaleBySimplifiedAdEMAMixState.m SophiaState.mu SophiaState.nu TraceState.trace
"""
_NONNEGATIVE = """
    COCOBState.scale COCOBState.subgradients DAdaptAdamWState.exp_avg_sq FactoredState.v
    FactoredState.v_col FactoredState.v_row MadgradState.grad_sum_sq
    PerElementMeanAndVarianceEMAState.variance_grads_ema
    MomoAdamState.exp_avg_sq ProdigyState.exp_avg_sq ScaleByAdaDeltaState.e_g
    ScaleByAdaDeltaState.e_x ScaleByAdamState.nu ScaleByAdanState.n
    ScaleByAdemamixState.nu ScaleByAmsgradState.nu ScaleByAmsgradState.nu_max
    ScaleByBeliefState.nu ScaleByNovogradState.nu ScaleByRStdDevState.nu
    ScaleByRmsState.nu ScaleByRmsWithCountState.nu ScaleByRpropState.step_sizes
    ScaleByRssState.sum_of_squares ScaleBySM3State.mu ScaleBySimplifiedAdEMAMixState.n
"""
_EXACT = """
    AccumulateAvgUpdatesState.avg_grad MultiStepsState.acc_grads
    PerElementMeanAndSumSqDiffGradsState.mean_grads
    PerElementMeanAndSumSqDiffGradsState.sum_sq_diff_grads
    COCOBState.cumulative_gradients COCOBState.init_particles COCOBState.reward
    GaLoreState.projector MadgradState.s MadgradState.x0 MechanicState.x0
    MuonState.ns_coeffs
    ProdigyState.params0 SAMState.cache ScaleByAdanState.g
    ScaleByAdemamixState.m2
    ScaleByDistanceOverGradientsState.grad_sum_of_squares
    ScaleByDistanceOverGradientsState.init_params DoGState.init_params
    DoWGState.init_params ScaleByOptimisticGradientState.previous_gradient
    ScaleByRpropState.prev_updates ScheduleFreeState.z
"""
# Differences of what these hold are divided by each other; or it may be anything.
_EXACT_STATES = """
    ScaleByLBFGSState ScaleByZoomLinesearchState MonitorState SnapshotState
"""

_NAMES: dict[StateKind, str] = {
    "signed": _SIGNED,
    "nonnegative": _NONNEGATIVE,
    "exact": _EXACT + _EXACT_STATES,
}
KINDS: dict[str, StateKind] = {
    name: kind for kind, names in _NAMES.items() for name in names.split()
}

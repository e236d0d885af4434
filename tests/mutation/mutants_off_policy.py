"""Slips in importance weights, and in what learns from the data of other policies."""

from __future__ import annotations

from harness import Mutant

IMPORTANCE, CRITIC = "upslope.estimators.importance", "upslope.algorithms.critic_advantage"
SAMPLED, VTRACE, STALE = (f"upslope.algorithms.{name}" for name in ("importance_sampled", "vtrace", "stale"))

OFF = "another policy acted"
WEIGHTED = f"ImportanceSampled: per_decision; perturbed critic, {OFF}"
BASELINED = f"ImportanceSampled: per_decision, critic as baseline; perturbed critic, {OFF}"
ON_TOKENS = f"ImportanceSampled: trajectory, tokens; exact critic, {OFF}"
FOLLOWED = f"VTraceActorCritic: whole weights; {OFF}, held against what follows"
DECOUPLED = f"PPO: decoupled, TD residual; {OFF}, held against what follows"

IN_IMPORTANCE = (
    Mutant(
        "weights of single steps",
        IMPORTANCE,
        "return log_ratio.cumsum(-1)",
        "return log_ratio",
        "a reward is weighted by its own step alone",
        ("per_decision_log_weight: rewards", WEIGHTED),
    ),
    Mutant(
        "weights of what follows",
        IMPORTANCE,
        "return log_ratio.cumsum(-1)",
        "return log_ratio.flip(-1).cumsum(-1).flip(-1)",
        "a reward is weighted by what is decided after it",
        ("per_decision_log_weight: rewards", WEIGHTED),
    ),
    Mutant(
        "weights upside down",
        IMPORTANCE,
        "log_ratio = (log_prob - behaviour_log_prob).detach()",
        "log_ratio = (behaviour_log_prob - log_prob).detach()",
        "the ratio of who acted to who is asked about",
        ("per_decision_log_weight: rewards", WEIGHTED),
    ),
    Mutant(
        "hidden steps are weighed",
        IMPORTANCE,
        "log_ratio = log_ratio.masked_fill(~mask, 0.0)",
        "log_ratio = log_ratio.masked_fill(mask & ~mask, 0.0)",
        "what nobody chose changes the weight",
        ("per_decision_log_weight: steps that nobody chose",),
    ),
    Mutant(
        "weights that sum to 1",
        IMPORTANCE,
        "return log_weight.softmax(0) * log_weight.shape[0]",
        "return log_weight.softmax(0)",
        "the sum of the weights for their mean",
        ("self_normalised_weight: held against",),
    ),
    Mutant(
        "weights normalised over time",
        IMPORTANCE,
        "return log_weight.softmax(0) * log_weight.shape[0]",
        "return log_weight.softmax(-1) * log_weight.shape[-1]",
        "each row by its own mean",
        ("self_normalised_weight: held against",),
    ),
    Mutant(
        "effective sample size without squares",
        IMPORTANCE,
        "weight.shape[0] * weight.square().sum(0)",
        "weight.shape[0] * weight.sum(0)",
        "the sum for the sum of squares",
        ("effective_sample_size",),
    ),
)

IN_IMPORTANCE_SAMPLED = (
    Mutant(
        "trajectory weights from the first step",
        SAMPLED,
        "log_weight = log_weight[:, -1:].expand_as(log_weight)",
        "log_weight = log_weight[:, :1].expand_as(log_weight)",
        "the ratio of the first step for that of the episode",
        (ON_TOKENS,),
    ),
    Mutant(
        "unweighted rewards",
        SAMPLED,
        "psi = reward_to_go(reward * weight, discount, cut, mask=mask)",
        "psi = reward_to_go(reward, discount, cut, mask=mask)",
        "the weights are measured and not used",
        (WEIGHTED, ON_TOKENS),
    ),
    Mutant(
        "unweighted baseline",
        SAMPLED,
        "psi = baselined(psi, weight * value)",
        "psi = baselined(psi, value)",
        "V without the weight of what led to it",
        (BASELINED,),
    ),
    Mutant(
        "unweighted bootstrap",
        SAMPLED,
        "bootstrap=next_value * weight",
        "bootstrap=next_value",
        "V' at a time limit without its weight",
        ("ImportanceSampled: per_decision, critic as baseline; exact critic, another policy acted, time limit 2",),
    ),
    Mutant(
        "a cap of e^cap",
        SAMPLED,
        "log_weight.clamp(max=math.log(self.cap))",
        "log_weight.clamp(max=self.cap)",
        "the logarithm is capped at the weight's cap",
        ("ImportanceSampled: trajectory, cap 1.1, tokens; exact critic, another policy acted",),
    ),
    Mutant(
        "gamma^t kept twice",
        SAMPLED,
        "psi = psi * discount_weight(",
        "psi = psi * discount_weight(trajectory.time, self.gamma, dtype=psi.dtype) * discount_weight(",
        "gamma^2t",
        ("ImportanceSampled: per_decision, gamma^t kept; perturbed critic, another policy acted",),
    ),
)

IN_VTRACE = (
    Mutant(
        "V-trace with its clips exchanged",
        VTRACE,
        "rho_clip=self.rho_bar,\n            trace_clip=self.c_bar,",
        "rho_clip=self.c_bar,\n            trace_clip=self.rho_bar,",
        "c_bar truncates the weight of a step",
        ("VTraceActorCritic: rho whole, traces truncated at 0.5",),
    ),
    Mutant(
        "V-trace of its own log-probs",
        CRITIC,
        "trajectory.proximal_log_prob,\n        trajectory.behaviour_log_prob,",
        "trajectory.proximal_log_prob,\n        trajectory.proximal_log_prob,",
        "no correction",
        (FOLLOWED,),
    ),
    Mutant(
        "V-trace without its weight",
        VTRACE,
        "advantage = found.advantage\n",
        "advantage = unweighted_advantage(found)\n",
        "a step counts however likely it is",
        (FOLLOWED,),
    ),
)

IN_STALE = (
    Mutant(
        "weights of the learner to itself",
        STALE,
        "            old,\n            batch.behaviour_log_prob,",
        "            old,\n            old,",
        "p for b: weights of 1",
        (DECOUPLED,),
    ),
    Mutant(
        "the ratio stays with who acted",
        STALE,
        'if self.anchor == "behaviour":\n            return batch.behaviour_log_prob',
        'if self.anchor in ("behaviour", "proximal"):\n            return batch.behaviour_log_prob',
        "the anchor is ignored",
        (f"PPO: clipped around the learner, no weights; {OFF}, held against what follows",),
    ),
    Mutant(
        "V-trace weighted twice",
        STALE,
        "return Signal(advantage=unweighted_advantage(found), value_target=found.value_target)",
        "return Signal(advantage=found.advantage, value_target=found.value_target)",
        "rho in the advantage and in the ratio",
        ("PPO: advantages of V-trace",),
    ),
)

OFF_POLICY = (*IN_IMPORTANCE, *IN_IMPORTANCE_SAMPLED, *IN_VTRACE, *IN_STALE)

"""Slips in eligibility traces and average rewards."""

from __future__ import annotations

from harness import Mutant

TRACES, LEARNER = "upslope.algorithms.traces", "upslope.train.traces"
AVERAGE, CURVATURE = "upslope.algorithms.average_reward", "upslope.estimators.curvature"

KEPT = "ActorCriticLambda: lambda 0.5, I = gamma^t; exact critic, on-policy"
VIEWS = "ActorCriticLambda: lambda 0.5; backward = forward view, row by row, actor and critic"
LIMIT = "TDLambda: lambda 0.5; the mean update, a time limit"
PREDICTION = "TDLambda: lambda 0.5; the mean update"
CONTINUING = "ActorCriticLambda: lambda 0.5, average reward; exact critic, on-policy"
FORWARD = "ActorCriticLambda: lambda 0.5, I = gamma^t; forward view"
A2C_ROW = "AverageReward: A2C, lambda 0.5; exact critic, on-policy"
BY_HAND = "test_a_differential_update_is_its_formula"
ONLINE = "test_an_online_step_is_its_formula"

BACKWARD = (
    Mutant(
        "traces never restart",
        LEARNER,
        "restart, live = (trajectory.time == 0)[:, 0], trajectory.mask[:, 0]",
        "restart, live = torch.zeros_like(trajectory.mask[:, 0]), trajectory.mask[:, 0]",
        "an episode's steps are credited with what the next one brings",
        (),
        (ONLINE,),
    ),
    Mutant(
        "traces without I",
        LEARNER,
        "if gamma != 1.0:",
        "if gamma > 1.0:",
        "gamma^t is missing from the score",
        (KEPT, VIEWS),
        (ONLINE,),
    ),
    Mutant(
        "traces decay by gamma alone",
        TRACES,
        "actor_decay=self.gamma * self.actor_trace_decay,",
        "actor_decay=self.gamma,",
        "lambda does nothing in the actor's trace",
        (VIEWS,),
    ),
    Mutant(
        "prediction decays by lambda alone",
        TRACES,
        "critic_decay=self.gamma * self.trace_decay, actor_decay=None",
        "critic_decay=self.trace_decay, actor_decay=None",
        "gamma is missing from the trace",
        (PREDICTION, LIMIT),
    ),
    Mutant(
        "traces bootstrap at the end",
        LEARNER,
        "residual = td_residual(trajectory.reward, trajectory.discount(rule.discount), value, next_value)",
        "discount = torch.full_like(trajectory.reward, rule.discount)\n"
        "            residual = td_residual(trajectory.reward, discount, value, self._policy.values(trajectory)[0])",
        "what never follows counts",
        (VIEWS, PREDICTION),
        (ONLINE,),
    ),
    Mutant(
        "traces downhill",
        LEARNER,
        "step = (residual.to(self._trace.dtype) @ self._trace) * (-ratio / len(residual))",
        "step = (residual.to(self._trace.dtype) @ self._trace) * (ratio / len(residual))",
        "the sign",
        (KEPT, VIEWS, PREDICTION),
        (ONLINE,),
    ),
    Mutant(
        "traces added up over environments",
        LEARNER,
        "step = (residual.to(self._trace.dtype) @ self._trace) * (-ratio / len(residual))",
        "step = (residual.to(self._trace.dtype) @ self._trace) * -ratio",
        "the step grows with the number of environments",
        (),
        (ONLINE,),
    ),
    Mutant(
        "traces forget r_bar",
        LEARNER,
        "residual = differential_td_residual(trajectory.reward, average, value, next_value)",
        "residual = differential_td_residual(trajectory.reward, 0.0, value, next_value)",
        "the residual is not differential",
        (),
        (ONLINE,),
    ),
    Mutant(
        "traces forget the critic's step size",
        LEARNER,
        "self._critic.descend(residual, rule.value_ratio)",
        "self._critic.descend(residual, 1.0)",
        "value_ratio does nothing",
        (),
        (ONLINE,),
    ),
    Mutant(
        "r_bar moves away",
        LEARNER,
        'now.state["average_reward"] + step_size',
        'now.state["average_reward"] - step_size',
        "the average reward moves downhill",
        (),
        (ONLINE,),
    ),
)

FORWARD_VIEW = (
    Mutant(
        "forward view without I",
        TRACES,
        "        if self.discounted_states:\n            psi = psi * discount_weight",
        "        if not self.discounted_states:\n            psi = psi * discount_weight",
        "gamma^t where it should not be",
        (FORWARD, VIEWS),
    ),
)

DIFFERENTIAL = (
    Mutant(
        "r_bar is not subtracted",
        AVERAGE,
        "replace(trajectory, reward=reward - average)",
        "replace(trajectory, reward=reward)",
        "returns are not differential",
        (),
        (BY_HAND,),
    ),
    Mutant(
        "r_bar by the wrong residual",
        AVERAGE,
        "differential_td_residual(reward, average, value, next_value)[mask].mean()",
        "differential_td_residual(reward, average, next_value, value)[mask].mean()",
        "V and V' are exchanged",
        (),
        (BY_HAND,),
    ),
    Mutant(
        "values drift",
        AVERAGE,
        "value_target=signal.value_target - excess",
        "value_target=signal.value_target + excess",
        "the mean of V is pushed away from 0",
        (),
        (BY_HAND,),
    ),
    Mutant(
        "values of the wrong method",
        AVERAGE,
        "value, next_value, now)\n        assert signal",
        "next_value, value, now)\n        assert signal",
        "V and V' are exchanged",
        (A2C_ROW,),
        (BY_HAND,),
    ),
)

TRACE_MUTANTS: tuple[Mutant, ...] = (*BACKWARD, *FORWARD_VIEW, *DIFFERENTIAL)

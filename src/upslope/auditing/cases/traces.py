"""The rows of eligibility traces, through the learner that follows them: step by step, with nothing moved.

The backward view of whole episodes is held against the exact gradient, and against the forward view: the training step
on the algorithm's own loss, whose Psi is GAE and whose target is the lambda-return.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from upslope.algorithms import ActorCriticLambda, Algorithm, TDLambda
from upslope.auditing.cases.audited import audited, small_network
from upslope.auditing.cases.case import Case
from upslope.auditing.cases.measurement import Found, identity, row
from upslope.auditing.declared import Circumstances, Claim, in_words, put_to_the_test
from upslope.auditing.measuring import report
from upslope.auditing.report import AuditReport
from upslope.auditing.setting import FiniteSetting, Unit
from upslope.auditing.source import AlgorithmSource, Recorder, TraceSource
from upslope.exact import FiniteMDP, StatePolicy, problem, solve
from upslope.train.traces import TraceLearner
from upslope.trajectory import Policy, Trajectory

_GAMMA, _LIMIT, _SAMPLES = 0.8, 2, 1_000
_LAMBDAS = (0.5, 1.0)
_CONTINUING = ActorCriticLambda(gamma=1.0, actor_trace_decay=0.5, average_reward_ratio=0.1)


def cases() -> Iterator[Case]:
    """All rows of traces."""
    for decay in _LAMBDAS:
        for discounted in (False, True):
            algorithm = _episodic(decay, discounted=discounted)
            words = f"lambda {decay}" + (", I = gamma^t" if discounted else "")
            for circumstances in put_to_the_test(algorithm.target, limit=_LIMIT):
                yield audited(words, algorithm, "six-state", circumstances)
    kept = _episodic(0.5, discounted=True)
    yield audited("lambda 0.5, I = gamma^t, sampled", kept, "six-state", Circumstances(), samples=_SAMPLES)
    yield audited("lambda 0.5, I = gamma^t", kept, "noisy-rewards", Circumstances())
    own = Circumstances(critic="perturbed")
    yield audited("lambda 1.0, a network", _episodic(1.0, discounted=False), "six-state", own, policy=small_network(7))
    for circumstances in put_to_the_test(_CONTINUING.target, limit=_LIMIT):
        if circumstances.limit is not None:
            continue
        yield audited("lambda 0.5, average reward", _CONTINUING, "ring", circumstances)
    for decay in _LAMBDAS:
        yield _forward(f"lambda {decay}, I = gamma^t; forward view", _episodic(decay, discounted=True), "episodes")
    yield _forward("lambda 0.5, average reward; forward view", _CONTINUING, "fragments")
    for decay in _LAMBDAS:
        for algorithm in (_episodic(decay, discounted=True), TDLambda(gamma=_GAMMA, trace_decay=decay)):
            name = f"lambda {decay}; backward = forward view, row by row, actor and critic"
            yield row(type(algorithm).__name__, name, partial(_both_views, algorithm))
        yield row("TDLambda", f"lambda {decay}; the mean update", partial(_prediction, decay))
    yield row("TDLambda", "lambda 0.5; the mean update, a time limit", partial(_at_limit, 0.5))


def _episodic(decay: float, *, discounted: bool) -> ActorCriticLambda:
    return ActorCriticLambda(
        gamma=_GAMMA, actor_trace_decay=decay, critic_trace_decay=0.7, discounted_states=discounted
    )


def _forward(words: str, algorithm: ActorCriticLambda, unit: Unit) -> Case:
    """The algorithm's own loss, through the training step."""

    def run() -> AuditReport:
        named = problem("ring" if algorithm.continuing else "six-state")
        setting = FiniteSetting.build(named, gamma=algorithm.gamma, unit=unit, row_steps=2)
        source = AlgorithmSource(algorithm, state=_state(algorithm, setting.mdp, setting.policy))
        exact, followed = setting.exact_gradient(algorithm.target), in_words(algorithm.target)
        claim = Claim(target=exact, target_name=followed, declared="unbiased")
        return report(setting, source, claim, subject="ActorCriticLambda")

    return Case(subject="ActorCriticLambda", setting=words, run=run)


def _state(algorithm: Algorithm, mdp: FiniteMDP, policy: Policy) -> dict[str, float]:
    if mdp.kind != "continuing":
        return dict(algorithm.initial_state())
    with torch.no_grad():
        return {**algorithm.initial_state(), "average_reward": float(solve(mdp, policy).objective)}


def backward_view(
    algorithm: Algorithm, policy: StatePolicy, actor: Sequence[nn.Parameter], trajectory: Trajectory
) -> Tensor:
    """[P] what the learner adds up to over the steps of a batch, for all parameters, with nothing moved."""
    recorder = Recorder(tuple(policy.parameters()))
    learner = TraceLearner(policy, algorithm, recorder, actor=actor, critic=[policy.value])
    TraceSource(algorithm, algorithm.initial_state()).follow(learner, trajectory)
    return torch.stack(recorder.ascents).sum(0)


def _both_views(algorithm: Algorithm) -> Found:
    """Every episode there is, by the one and by the other."""
    setting = FiniteSetting.build(problem("six-state"), gamma=_GAMMA, unit="episodes", critic="perturbed")
    source, everything = AlgorithmSource(algorithm), tuple(setting.policy.parameters())
    backward, forward = list[Tensor](), list[Tensor]()
    for _, trajectory in setting.every():
        backward.append(backward_view(algorithm, setting.policy, setting.parameters, trajectory))
        forward.append(source.ascent(setting.policy, everything, trajectory))
    name = "the forward view of every episode"
    return identity(torch.cat(backward), torch.cat(forward), problem=setting.name, target_name=name)


def _prediction(decay: float) -> Found:
    """The mean of the critic's update: eta_1(s) (T^lambda V - V)(s), T^lambda by a linear solve."""
    setting = FiniteSetting.build(problem("six-state"), gamma=_GAMMA, unit="episodes", critic="perturbed")
    algorithm, policy, mdp = TDLambda(gamma=_GAMMA, trace_decay=decay), setting.policy, setting.mdp
    found = torch.zeros(mdp.states, dtype=torch.float64)
    for probability, trajectory in setting.every():
        total = backward_view(algorithm, policy, setting.parameters, trajectory)
        found = found + probability * _of_critic(policy, total)
    with torch.no_grad():
        solution, value = solve(mdp, policy), policy.value.masked_fill(mdp.terminal, 0.0)
        move = torch.einsum("sa,sax->sx", solution.policy, mdp.transition).masked_fill(mdp.terminal[:, None], 0.0)
        gain = torch.einsum("sa,sax,sax->s", solution.policy, mdp.transition, mdp.reward).masked_fill(mdp.terminal, 0.0)
        residual = gain + _GAMMA * move @ value - value
        system = torch.eye(mdp.states, dtype=torch.float64) - _GAMMA * decay * move
        expected = solution.undiscounted_visits * torch.linalg.solve(system, residual)
    return identity(found, expected, problem=setting.name, target_name="eta_1(s) (T^lambda V - V)(s)")


def _at_limit(decay: float) -> Found:
    """Where a limit cuts an episode the trace ends with the value of what was seen last: the forward view does, too."""
    limited = FiniteSetting.build(problem("six-state"), gamma=_GAMMA, unit="episodes", critic="perturbed", limit=_LIMIT)
    algorithm, everything = TDLambda(gamma=_GAMMA, trace_decay=decay), tuple(limited.policy.parameters())
    source = AlgorithmSource(algorithm)
    found, expected = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    for probability, trajectory in limited.every():
        total = backward_view(algorithm, limited.policy, limited.parameters, trajectory)
        found = torch.cat([found, probability * total])
        expected = torch.cat([expected, probability * source.ascent(limited.policy, everything, trajectory)])
    return identity(found, expected, problem=f"{limited.name}, time limit {_LIMIT}", target_name="the forward view")


def _of_critic(policy: StatePolicy, total: Tensor) -> Tensor:
    """The critic's part of a flat vector over all parameters."""
    start = 0
    for parameter in policy.parameters():
        if parameter is policy.value:
            return total[start : start + parameter.numel()]
        start += parameter.numel()
    raise AssertionError("the policy has no critic")

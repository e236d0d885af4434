"""Policies that look at earlier steps of their row: all rows, their probabilities, and the exact gradient."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from upslope.estimators import flatten
from upslope.exact import (
    FiniteMDP,
    enumerate_episodes,
    enumerate_fragments,
    enumerated_gradient,
    policy_gradient,
    problem,
    solve,
)
from upslope.trajectory import AskedTwice, Evaluation, Observation, Sampler, Steps, Trajectory


class Recurrent(AskedTwice, nn.Module):
    """A GRU over one-hot observations."""

    def __init__(self, observations: int, actions: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.observations = observations
        self.gru = nn.GRU(observations, 3, batch_first=True, dtype=torch.float64)
        self.head = nn.Linear(3, actions, dtype=torch.float64)
        nn.init.normal_(self.head.weight)

    @property
    def sequential(self) -> bool:
        return True

    def log_prob(self, observation: Observation, action: Tensor) -> Tensor:
        assert isinstance(observation, Tensor)
        seen = torch.nn.functional.one_hot(observation, self.observations).to(torch.float64)
        log_policy = self.head(self.gru(seen)[0]).log_softmax(-1)
        return log_policy.gather(-1, action.unsqueeze(-1)).squeeze(-1)

    def sampler(self) -> Sampler:
        raise NotImplementedError

    def evaluate(self, steps: Steps) -> Evaluation:
        raise NotImplementedError

    def values(self, trajectory: Trajectory) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


def aliased(name: str) -> FiniteMDP:
    """Two kinds of states to be seen."""
    mdp = problem(name).mdp
    return replace(mdp, observation=torch.arange(mdp.states) % 2)


def expected_return(mdp: FiniteMDP, policy: Recurrent, limit: int) -> Tensor:
    """J by recursion over histories, one at a time."""

    def onward(state: int, seen: list[int], time: int) -> Tensor:
        if bool(mdp.terminal[state]) or time == limit:
            return torch.zeros((), dtype=torch.float64)
        history = torch.tensor([[*seen, int(mdp.observation[state])]])
        total = torch.zeros((), dtype=torch.float64)
        for action in range(mdp.actions):
            taken = torch.full_like(history, action)
            chance = policy.log_prob(history, taken)[0, -1].exp()
            for following in mdp.transition[state, action].nonzero().flatten().tolist():
                later = onward(following, history[0].tolist(), time + 1)
                gain = mdp.reward[state, action, following] + mdp.gamma * later
                total = total + chance * mdp.transition[state, action, following] * gain
        return total

    starts = mdp.start.nonzero().flatten().tolist()
    return torch.stack([mdp.start[state] * onward(state, [], 0) for state in starts]).sum()


@pytest.mark.parametrize(("name", "limit"), [("loops", 3), ("six-state", 3), ("short-corridor", 5)])
def test_the_gradient_of_a_recurrent_policy_is_exact(name: str, limit: int) -> None:
    mdp = aliased(name)
    policy = Recurrent(2, mdp.actions)
    rows = enumerate_episodes(mdp, policy, limit=limit)
    assert float(rows.behaviour_probability.sum()) == pytest.approx(1.0, abs=1e-13)
    parameters = list(policy.parameters())
    expected = flatten(torch.autograd.grad(expected_return(mdp, policy, limit), parameters))
    actual = enumerated_gradient(rows, policy, mdp.gamma)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    assert actual.norm() > 1e-2


def test_a_recurrent_policy_does_look_back() -> None:
    mdp = aliased("loops")
    policy = Recurrent(2, mdp.actions)
    rows = enumerate_episodes(mdp, policy, limit=3)
    same = (rows.trajectory.observation[:, 2] == 0) & (rows.trajectory.action[:, 2] == 0) & (rows.length == 3)
    assert rows.trajectory.behaviour_log_prob[same, 2].std() > 1e-3


def test_every_action_of_a_recurrent_policy_is_followed() -> None:
    """The rows are those of any other policy that leaves nothing out."""
    mdp = aliased("six-state")
    rows = enumerate_episodes(mdp, Recurrent(2, 2))
    named = problem("six-state")
    others = enumerate_episodes(named.mdp, named.policy(0))
    assert torch.equal(rows.state, others.state)
    assert torch.equal(rows.trajectory.action, others.trajectory.action)
    assert torch.equal(rows.luck, others.luck)


def test_what_needs_a_table_says_so() -> None:
    mdp = aliased("six-state")
    policy = Recurrent(2, 2)
    for ask in (
        lambda: solve(mdp, policy),
        lambda: policy_gradient(mdp, policy),
        lambda: enumerate_fragments(mdp, policy, steps=2),
    ):
        with pytest.raises(ValueError, match="looks at earlier steps of its row"):
            ask()

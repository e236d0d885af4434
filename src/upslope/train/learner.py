"""Who moves the parameters, and what it carries from update to update."""

from __future__ import annotations

from typing import Protocol, final

from upslope.algorithms.protocol import Algorithm, Now, Traces
from upslope.diagnostics import Meter
from upslope.policies import ActorCritic
from upslope.streams import Shuffler
from upslope.train.optimizer import FlatOptimizer
from upslope.train.step import Learned, learn
from upslope.train.traces import TraceLearner, actor_and_critic
from upslope.trajectory import Policy, Trajectory, Tree


class Learner(Protocol):
    """From trajectories to moved parameters, one update at a time."""

    def learn(
        self,
        trajectory: Trajectory,
        *,
        now: Now,
        learning_rate: float,
        generator: Shuffler,
        meter: Meter | None,
        reference: Policy | None,
    ) -> Learned:
        """Update the policy from one trajectory; the arguments are those of `upslope.train.step.learn`."""
        ...

    def state(self) -> Tree:
        """What it carries, for a checkpoint."""
        ...

    def load_state(self, tree: Tree) -> None:
        """Go on from `state()`."""
        ...


@final
class GradientLearner:
    """Follows the gradient of an algorithm's loss with an optimiser; a `Learner`.

    Args:
        policy: whose parameters the optimiser holds.
        algorithm: whose formulas and passes are followed.
        optimizer: takes the steps and carries its moments.
    """

    def __init__(self, policy: Policy, algorithm: Algorithm, optimizer: FlatOptimizer) -> None:
        self._policy, self._algorithm, self._optimizer = policy, algorithm, optimizer

    def learn(
        self,
        trajectory: Trajectory,
        *,
        now: Now,
        learning_rate: float,
        generator: Shuffler,
        meter: Meter | None,
        reference: Policy | None,
    ) -> Learned:
        """Update the policy from one trajectory."""
        return learn(
            self._policy,
            self._algorithm,
            self._optimizer,
            trajectory,
            now=now,
            learning_rate=learning_rate,
            generator=generator,
            meter=meter,
            reference=reference,
        )

    def state(self) -> Tree:
        """The optimiser's."""
        return self._optimizer.state()

    def load_state(self, tree: Tree) -> None:
        """Go on from `state()`."""
        self._optimizer.load_state(tree)


def learner_of(policy: ActorCritic, algorithm: Algorithm, optimizer: FlatOptimizer) -> Learner:
    """Who learns as the algorithm declares: by eligibility traces, or by the gradient of its loss.

    Where the critic alone learns, what it shares with the actor stays as it is.
    """
    rule = algorithm.passes.rule
    if not isinstance(rule, Traces):
        return GradientLearner(policy, algorithm, optimizer)
    parts = actor_and_critic(policy)
    if rule.actor_decay is None:
        for_actions = {id(parameter) for parameter in parts["actor"]}
        parts["critic"] = [parameter for parameter in parts["critic"] if id(parameter) not in for_actions]
    return TraceLearner(policy, algorithm, optimizer, **parts)

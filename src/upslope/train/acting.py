"""Who acts, and what is learnt from: the policy that learns, an older one, or another; the last rollout, or several."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import final

from torch import Tensor

from upslope.collect.rows import join_rows
from upslope.errors import UsageError
from upslope.policies import ActorCritic
from upslope.train.config import RolloutConfig
from upslope.trajectory import Trajectory, Tree


@final
class Acting:
    """Chooses who acts in each update of an agent's run, and joins the rollouts that it learns from.

    `behaviour_log_prob` is always that of who acted. With a lag of n, update u acts with the parameters and normaliser
    statistics that the policy had when update u - n began (those of the run's beginning before there are such), as in
    a training whose actors hear of new parameters n updates late.

    Args:
        policy: that learns; its parameters still where it was built (no optimiser has taken them yet).
        rollout: who acts, and how many rollouts are learnt from together.
        given: the policy of `rollout.behaviour`, which acts throughout; None where there is none.
        recorded: whether what another policy did comes from a file.

    Raises:
        UsageError: if the policy has a memory that another one's steps would leave unknown.
    """

    def __init__(
        self, policy: ActorCritic, rollout: RolloutConfig, *, given: ActorCritic | None, recorded: bool
    ) -> None:
        if given is not None and policy.sequential and rollout.steps is not None:
            raise UsageError(
                "the policy that learns has a memory, and where another one acted nobody knows what it held in the "
                "middle of an episode: learn from whole episodes (rollout.episodes, with rollout.steps=None)"
            )
        self._policy, self._given = policy, given
        self._lag, self._recorded = rollout.lag, recorded
        self._older: deque[tuple[int, dict[str, Tensor]]] = deque(maxlen=rollout.lag + 1)
        self._stale = copy.deepcopy(policy).requires_grad_(False) if rollout.lag else None
        self._earlier: deque[tuple[int, Trajectory]] = deque(maxlen=rollout.batches - 1)
        self._staleness = 0.0
        self._rows_each = 1 if rollout.row_steps is None else (rollout.steps or 0) // rollout.row_steps

    def policy(self, update: int) -> ActorCritic:
        """Who acts in update `update`, which begins, or begins again."""
        if self._given is not None:
            return self._given
        older = self._older_than(update)
        if self._stale is None or older is None:
            return self._policy
        self._stale.load_state_dict(older[1])
        return self._stale

    def _older_than(self, update: int) -> tuple[int, dict[str, Tensor]] | None:
        """The update, and what the policy was before it, from which `update` acts; None if that is the policy now."""
        return next((older for older in self._older if older[0] >= update - self._lag), None)

    def gather(self, trajectory: Trajectory, update: int, gamma: float) -> Trajectory:
        """What update `update` learns from: its own rollout and those before it that are still used, oldest first.

        `policy_version` is that of who acted in the newest. What an update collected that failed and is begun again is
        left out. Rewards are scaled where the policy scales them: those of earlier rollouts by what is known now.

        Args:
            trajectory: just collected with `policy()`, rewards as the environment gave them.
            update: which one begins.
            gamma: the algorithm's discount factor.
        """
        older = self._older_than(update)
        trajectory = replace(trajectory, policy_version=update if older is None else older[0])
        if self._given is not None:
            trajectory = replace(trajectory, memory=None)
        self._remember(update)
        while self._earlier and self._earlier[-1][0] >= update:
            self._earlier.pop()
        before = [rollout for _, rollout in self._earlier]
        together = [*before, trajectory]
        self._staleness = sum(update - rollout.policy_version for rollout in together) / len(together)
        normalizer = self._policy.reward_normalizer
        scaled = together
        if normalizer is not None:
            newest = replace(trajectory, reward=normalizer.scale(trajectory, gamma, rows_each=self._rows_each))
            scaled = [*(replace(earlier, reward=normalizer(earlier.reward)) for earlier in before), newest]
        self._earlier.append((update, trajectory))
        return joined(scaled)

    def _remember(self, update: int) -> None:
        """Keep what the policy is before the update; once, if the update is begun again."""
        if self._stale is None or (self._older and self._older[-1][0] >= update):
            return
        self._older.append((update, {name: t.detach().clone() for name, t in self._policy.state_dict().items()}))

    def named(self, metrics: dict[str, float]) -> dict[str, float]:
        """The metrics of an update under names that say what they are of where another policy acted.

        `staleness` is the mean number of updates between who acted and who learns. The error of the first ratio, which
        is one only where a policy learns from itself, goes; the distance from another policy that was given becomes
        `behaviour_kl`, as it is not how far an update moved.
        """
        another = self._given is not None or self._recorded
        if not another and self._stale is None and self._earlier.maxlen == 0:
            return metrics
        metrics = {name: value for name, value in metrics.items() if name not in ("first_ratio_error", "mismatch")}
        if not another:
            metrics["staleness"] = self._staleness
        elif "kl" in metrics:
            metrics["behaviour_kl"] = metrics.pop("kl")
        return metrics

    def state(self) -> Tree:
        """Older parameters and earlier rollouts, for a checkpoint."""
        return {
            "older": [{"version": version, "tensors": dict(tensors)} for version, tensors in self._older],
            "earlier": [
                {"update": update, "rollout": {f.name: getattr(rollout, f.name) for f in fields(rollout)}}
                for update, rollout in self._earlier
            ],
        }

    def load_state(self, tree: Tree) -> None:
        """Go on from `state()`."""
        self._older.extend((int(entry["version"]), dict(entry["tensors"])) for entry in tree["older"])
        self._earlier.extend((int(entry["update"]), Trajectory(**entry["rollout"])) for entry in tree["earlier"])


def joined(rollouts: Sequence[Trajectory]) -> Trajectory:
    """The rows of several rollouts below one another, padded to the longest; groups stay apart.

    Args:
        rollouts: of the same environments, at least one; `policy_version` is that of the last.
    """
    if len(rollouts) == 1:
        return rollouts[0]
    parts, label = list[Trajectory](), 0
    for rollout in rollouts:
        group = rollout.group
        if group is not None and len(group):
            group = group - group.min() + label
            label = int(group.max()) + 1
        parts.append(replace(rollout, group=group))
    return replace(join_rows(parts), policy_version=rollouts[-1].policy_version)

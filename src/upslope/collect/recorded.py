"""Recorded episodes -> rows of what somebody else did: to be imitated, or weighted by the probability of doing it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from upslope.collect.environments import EnvironmentCollector
from upslope.collect.example_order import ExampleOrder
from upslope.collect.given_data import RecordedConfig
from upslope.collect.rows import Piece, row_lengths, take_pieces
from upslope.collect.trajectory_file import Recording
from upslope.collect.vector import VectorEnvironment
from upslope.errors import UsageError
from upslope.spaces import Composite, Space, space_to_tree
from upslope.streams import Purpose, derived_seed
from upslope.trajectory import Policy, Trajectory, Tree


class RecordedCollector:
    """Brings rows of recorded episodes in an order derived from the seed; a `upslope.trajectory.Collector`.

    Demonstrations were sampled by nobody: `behaviour_log_prob` is NaN where the mask is True. What is weighted keeps
    that of who was recorded. What a recurrent recorder carried is left out, since it means nothing to another policy.

    Args:
        recording: with episodes of the same spaces as the environments.
        environments: that the policy is made for; stepped by nobody.
        config: how many rows, and how long.
        seed: of the run.
        weighted: whether the rows are to be weighted by the log-probs of who was recorded.
        whole: whether every row must be an episode from its start to its end.

    Attributes:
        environments: as given; closed with the collector.
        steps_taken: chosen steps of the last update's rows.

    Raises:
        UsageError: if the spaces differ, or nothing is recorded, or not what is needed of it.
    """

    def __init__(
        self,
        recording: Recording,
        environments: VectorEnvironment,
        config: RecordedConfig,
        *,
        seed: int,
        weighted: bool = False,
        whole: bool = False,
    ) -> None:
        own = (environments.observation_space, environments.action_space)
        check_recorded_spaces((recording.observation_space, recording.action_space), own, str(config.file))
        self.environments = environments
        self._trajectory = _weighted(recording.trajectory, config) if weighted else unsampled(recording.trajectory)
        self._pieces = _pieces(recording.trajectory, config.length)
        if not self._pieces:
            raise UsageError(f"{config.file} holds no chosen step: record episodes that a policy acted in")
        if whole:
            _check_whole(recording.trajectory, config)
        self._rows = config.rows
        self._order = ExampleOrder(len(self._pieces), seed=seed)
        self.steps_taken = 0

    def collect(self, policy: Policy, update: int) -> Trajectory:
        """The next rows."""
        pieces = [self._pieces[index] for index in self._order.take(self._rows)]
        trajectory = take_pieces(self._trajectory, pieces)
        self.steps_taken = int(trajectory.mask.sum())
        return replace(trajectory, policy_version=update)

    def finished(self) -> list[tuple[float, int]]:
        """No episode is played."""
        return []

    def rebuild(self, update: int) -> None:
        """Begin `update`: the rows before it are known from their number."""
        self._order.cursor = update * self._rows

    def snapshot(self) -> Tree:
        """Which rows come next."""
        return {"rows": self._order.snapshot()}

    def restore(self, tree: Tree) -> None:
        """Go on exactly there.

        Raises:
            ValueError: if it was made with another number of rows.
        """
        self._order.restore(tree["rows"])

    def close(self) -> None:
        """Close the environments."""
        self.environments.close()


def record_episodes(
    policy: Policy,
    environments: VectorEnvironment,
    *,
    episodes: int,
    seed: int,
    about: Mapping[str, str] | None = None,
) -> Recording:
    """Let a policy play whole episodes, sampling its actions.

    Args:
        policy: who acts.
        environments: to act in; left open.
        episodes: at least one for each environment.
        seed: decides where episodes begin and what is sampled; no training with the same seed sees the same numbers.
        about: the recording, in words.

    Raises:
        ValueError: if there are fewer episodes than environments.
        NonFiniteError: if an observation, action or reward is NaN or infinite.
        EnvironmentFailureError: if an environment raises, crashes or hangs, or an episode does not end.
    """
    own = derived_seed(seed, Purpose.RECORDING)
    trajectory = EnvironmentCollector(environments, episodes=episodes, seed=own).collect(policy, 0)
    return Recording(
        trajectory=trajectory,
        observation_space=environments.observation_space,
        action_space=environments.action_space,
        about=dict(about or {}),
    )


def unsampled(trajectory: Trajectory) -> Trajectory:
    """The same as given data: no log-prob of who acted, no group, no memory."""
    nobody = torch.full_like(trajectory.behaviour_log_prob, torch.nan).masked_fill(~trajectory.mask, 0.0)
    return replace(trajectory, behaviour_log_prob=nobody, group=None, memory=None)


def _weighted(trajectory: Trajectory, config: RecordedConfig) -> Trajectory:
    """The same with the log-probs of who acted, without group and memory."""
    if not bool(trajectory.behaviour_log_prob[trajectory.mask].isfinite().all()):
        raise UsageError(
            f"{config.file} does not say how probable its actions were (behaviour_log_prob is not finite), by which "
            "they are to be weighted: record episodes of a policy with `upslope record`, or imitate these with SFT"
        )
    return replace(trajectory, group=None, memory=None)


def _check_whole(trajectory: Trajectory, config: RecordedConfig) -> None:
    ends = trajectory.terminated | trajectory.truncated
    last = (row_lengths(trajectory) - 1).clamp(min=0).unsqueeze(-1)
    chosen = trajectory.mask.any(-1)
    whole = (trajectory.time[:, 0] == 0) & (ends.sum(-1) == 1) & ends.gather(1, last).squeeze(-1)
    if not bool(whole[chosen].all()):
        raise UsageError(
            f"{int((chosen & ~whole).sum())} of the rows in {config.file} are no whole episodes, and their weights "
            "need all that was decided before: record whole ones (`upslope record` does), or take VTraceActorCritic"
        )


def _pieces(trajectory: Trajectory, length: int | None) -> Sequence[Piece]:
    found: list[Piece] = []
    for row, end in enumerate(row_lengths(trajectory).tolist()):
        step = end if length is None else length
        found += [Piece(row=row, start=at, stop=min(at + step, end)) for at in range(0, end, max(step, 1))]
    chosen = trajectory.mask
    return [piece for piece in found if bool(chosen[piece.row, piece.start : piece.stop].any())]


def check_recorded_spaces(recorded: tuple[Space, Space], environments: tuple[Space, Space], what: str) -> None:
    """Refuse what is of another world; only how far observations reach may differ.

    Args:
        recorded: observation and action space of what is to be used.
        environments: those of the environments.
        what: it is called in the error.

    Raises:
        UsageError: with both spaces.
    """
    for name, theirs, ours in zip(("observations", "actions"), recorded, environments, strict=True):
        if _outline(theirs) != _outline(ours):
            raise UsageError(
                f"{what} is of {name} in {theirs}, and the environment has {ours}: take one of the same environment"
            )


def _outline(space: Space) -> object:
    if isinstance(space, Composite):
        return [(name, _without_bounds(space_to_tree(leaf))) for name, leaf in space.entries]  # pyright: ignore[reportArgumentType]
    return _without_bounds(space_to_tree(space))


def _without_bounds(tree: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in tree.items() if name not in ("low", "high")}

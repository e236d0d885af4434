"""Where an agent's experience comes from: the collector that the configuration of a run asks for."""

from __future__ import annotations

from typing import Protocol

from upslope.algorithms.protocol import Traces
from upslope.collect import EnvironmentCollector
from upslope.collect.given_data import RecordedConfig, SegmentPairsConfig
from upslope.collect.groups import GroupCollector
from upslope.collect.recorded import RecordedCollector, record_episodes
from upslope.collect.segments import SegmentPairCollector, draw_segment_pairs, read_preferences
from upslope.collect.trajectory_file import read_recording
from upslope.collect.vector import VectorEnvironment
from upslope.train.config import RolloutConfig, Run
from upslope.trajectory import Collector, Policy


class Experience(Collector, Protocol):
    """A collector of an agent's run, whose length is counted in steps."""

    @property
    def environments(self) -> VectorEnvironment:
        """Those of the run; closed with the collector."""
        ...

    @property
    def steps_taken(self) -> int:
        """By which the last update brought the run nearer to its end: environment steps, or steps learnt from."""
        ...

    def finished(self) -> list[tuple[float, int]]:
        """(raw return, length) of the episodes that ended since this was last asked."""
        ...

    def rebuild(self, update: int) -> None:
        """Begin `update` with nothing kept from the ones before."""
        ...


def build_experience(run: Run, environments: VectorEnvironment, policy: Policy) -> Experience:
    """The collector of a run.

    Args:
        run: the configuration, resolved.
        environments: closed with the collector.
        policy: with the weights the run begins with; plays the episodes that segments are taken from, where they come
            from no file.

    Raises:
        UsageError: if a file is missing, damaged or of another world, or the environments do not fit what is asked.
    """
    rollout = run.rollout
    if isinstance(rollout, RecordedConfig):
        return RecordedCollector(
            read_recording(rollout.file),
            environments,
            rollout,
            seed=run.seed,
            weighted=run.weighs_recorded,
            whole=run.weighs_recorded and run.algorithm.passes.whole_episodes,
        )
    if isinstance(rollout, SegmentPairsConfig):
        return _segment_pairs(run, rollout, environments, policy)
    if rollout.group_size is not None:
        assert rollout.episodes is not None
        return GroupCollector(
            environments,
            episodes=rollout.episodes,
            size=rollout.group_size,
            start=rollout.group_start,
            seed=run.seed,
            truncation=run.environment.truncation,
        )
    return EnvironmentCollector(
        environments,
        steps=rollout.steps,
        episodes=rollout.episodes,
        seed=run.seed,
        truncation=run.environment.truncation,
        row_steps=rollout.row_steps,
        log_prob=not leaves_log_prob_out(run, policy),
    )


def leaves_log_prob_out(run: Run, policy: Policy) -> bool:
    """Whether an update's b_t is worked out only when somebody asks for it (`upslope.collect.sealing.with_log_prob`).

    So it is where the algorithm does not read it. A policy with a memory is watched by it in every update, and of
    rollouts that are learnt from several times nobody knows the policy any longer when it is asked for.

    Args:
        run: the configuration, resolved.
        policy: that learns.
    """
    rollout = run.rollout
    if not isinstance(rollout, RolloutConfig) or rollout.steps is None or run.algorithm.passes.behaviour_log_prob:
        return False
    return isinstance(run.algorithm.passes.rule, Traces) or (rollout.batches == 1 and not policy.sequential)


def _segment_pairs(
    run: Run, rollout: SegmentPairsConfig, environments: VectorEnvironment, policy: Policy
) -> SegmentPairCollector:
    if rollout.file is not None:
        recording = read_recording(rollout.file)
    else:
        recording = record_episodes(policy, environments, episodes=rollout.episodes, seed=run.seed)
    if rollout.preferences is not None:
        pairs = read_preferences(rollout.preferences, recording.trajectory)
    else:
        pairs = draw_segment_pairs(
            recording.trajectory, drawn=rollout.drawn, length=rollout.length, by=rollout.by, seed=run.seed
        )
    return SegmentPairCollector(recording, pairs, environments, rollout, seed=run.seed)

"""An agent in training: everything that moves, one update at a time, and as a tree that a checkpoint can hold."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from upslope.algorithms.protocol import Now, Traces, scheduled
from upslope.collect import EnvironmentFailureError, NonFiniteError
from upslope.collect.sealing import with_log_prob
from upslope.collect.vector import VectorEnvironment
from upslope.diagnostics import Meter, untouched
from upslope.errors import OffPolicyError
from upslope.policies import ActorCritic
from upslope.spaces import Discrete, MultiBinary, MultiDiscrete, Space, space_to_tree
from upslope.streams import LateStream, Purpose, torch_stream
from upslope.train.acting import Acting
from upslope.train.config import Run
from upslope.train.experience import build_experience, leaves_log_prob_out
from upslope.train.given import environment_again
from upslope.train.learner import learner_of
from upslope.train.optimizer import FlatOptimizer
from upslope.train.run_directory import RunDirectory
from upslope.train.saving import save
from upslope.train.session import Figures, ResumeError
from upslope.train.shaping import named_potential
from upslope.train.starting_weights import Hold, Places, begin, check_hashes
from upslope.trajectory import Trajectory, Tree

FIGURES = Figures(
    shown=(
        ("return", "episode_return", "{:.1f}"),
        ("length", "episode_length", "{:.1f}"),
        ("KL", "kl", "{:.4f}"),
        ("entropy", "entropy", "{:.3f}"),
        ("explained variance", "explained_variance", "{:.2f}"),
        ("clipped", "clip_fraction", "{:.1%}"),
        ("policy loss", "policy_loss", "{:.4f}"),
        ("value loss", "value_loss", "{:.4g}"),
        ("learning rate", "learning_rate", "{:.2g}"),
    ),
    spoken=("episode_return", "kl", "entropy", "explained_variance"),
    unit="steps",
)
"""What is shown of an agent's updates."""

ENDLESS_FIGURES = replace(
    FIGURES,
    shown=(("average reward", "average_reward", "{:.3f}"), *FIGURES.shown),
    spoken=("average_reward", *FIGURES.spoken),
)
"""The same where the average reward is followed."""


class ControlSession:
    """Policy, optimiser, environments and counters of one run; a `Session`.

    Args:
        run: the configuration, resolved.
        environments: where experience comes from; closed with the session.
        encoder: the user's own encoder, if any.
        places: of the policies the run begins with.

    Raises:
        UsageError: if a policy that the run begins with does not fit it.
    """

    failures = (EnvironmentFailureError, NonFiniteError, OffPolicyError)

    def __init__(self, run: Run, environments: VectorEnvironment, *, encoder: nn.Module | None, places: Places) -> None:
        self.run = run
        self.figures = ENDLESS_FIGURES if run.algorithm.target.gradient == "average_reward" else FIGURES
        generator = torch_stream(run.seed, Purpose.INITIALISATION)
        spaces = (environments.observation_space, environments.action_space)
        self.policy = ActorCritic(*spaces, run.policy, generator=generator, encoder=encoder)
        self.spaces = [space_to_tree(space) for space in spaces]
        self.beginning = begin(self.policy, run, places, encoder)
        self.acting = Acting(self.policy, run.acting, given=self.beginning.behaviour, recorded=run.weighs_recorded)
        optimizer = FlatOptimizer(self.policy, run.optimizer)
        self.hold = Hold(self.policy, optimizer, run.critic_first)
        self.learner = learner_of(self.policy, run.algorithm, optimizer)
        watched = run.log.diagnose_every and not isinstance(run.algorithm.passes.rule, Traces)
        self.meter = Meter(*_actor_gradient(self.policy, optimizer)) if watched else None
        self.most_entropy = _most_entropy(environments.action_space)
        self.collector = build_experience(run, environments, self.policy)
        self.log_prob_left_out = leaves_log_prob_out(run, self.policy)
        self.algorithm = run.algorithm
        self.still = run.algorithm.target.gradient == "prediction"
        self.algorithm_state = self.algorithm.initial_state()
        self.update = 0
        self.steps = 0
        self.episodes = 0
        self.returns: deque[float] = deque(maxlen=100)
        self.lengths: deque[float] = deque(maxlen=100)

    @property
    def progress(self) -> float:
        """The share of the run's environment steps already taken."""
        return min(self.steps / self.run.steps, 1.0)

    def open(self, directory: RunDirectory, tell: Callable[[str], None], *, resumed: bool) -> None:
        """Nothing to do: an agent's session keeps no files of its own."""

    def logged(self) -> None:
        """Nothing to do."""

    def advance(self) -> dict[str, float]:
        """One update: collect, learn, and only then let the normalisers see what was collected."""
        run, policy = self.run, self.policy
        start = time.perf_counter()
        acting = self.acting.policy(self.update)
        trajectory = self.collector.collect(acting, self.update)
        collected = time.perf_counter()
        trajectory = self._looked_at(trajectory, acting)
        seen = self.beginning.shaped(trajectory, self.algorithm.gamma)
        seen = self.acting.gather(seen, self.update, self.algorithm.gamma)
        learning_rate = scheduled(run.optimizer.schedule, run.optimizer.learning_rate, self.progress)
        self.hold.before(self.update)
        learned = self.learner.learn(
            seen,
            now=Now(progress=self.progress, state=self.algorithm_state),
            learning_rate=learning_rate,
            generator=LateStream(run.seed, Purpose.SHUFFLE, 0, self.update),
            meter=self.meter,
            reference=self.beginning.reference,
        )
        if not self.still:
            policy.observe(trajectory)
        self.algorithm_state = learned.state
        self.update += 1
        self.steps += self.collector.steps_taken
        for episode_return, length in self.collector.finished():
            self.episodes += 1
            self.returns.append(episode_return)
            self.lengths.append(length)
        metrics = {
            **self.acting.named(learned.metrics),
            **{f"state/{name}": number for name, number in learned.state.items()},
        }
        metrics["learning_rate"], metrics["progress"] = learning_rate, self.progress
        if self.meter is not None and self.most_entropy is not None and "entropy" in metrics:
            metrics["entropy_share"] = metrics["entropy"] / self.most_entropy
        metrics["collect_seconds"] = collected - start
        metrics["learn_seconds"] = time.perf_counter() - collected
        if self.returns:
            metrics["episode_return"] = sum(self.returns) / len(self.returns)
            metrics["episode_length"] = sum(self.lengths) / len(self.lengths)
        return metrics

    def _looked_at(self, trajectory: Trajectory, acting: ActorCritic) -> Trajectory:
        """What was collected, with b_t at least where the update gets a closer look."""
        if self.meter is None:
            return trajectory
        every, after = self.run.log.diagnose_every, self.steps + self.collector.steps_taken
        closely = after // every > self.steps // every
        self.meter.look(closely=closely)
        if not (closely and self.log_prob_left_out):
            return trajectory
        with untouched(acting, trajectory.reward.device):
            return with_log_prob(trajectory, acting)

    def state(self, *, collector: bool = True) -> Tree:
        """All of it; without the environments if they failed, so that they are made anew on resume.

        Environments whose state cannot be taken are made anew here, too, so that going on and resuming are the same.
        """
        environments = self.collector.snapshot() if collector else None
        if self.collector.environments.resume == "rebuild":
            self._forget_open_returns()
        return {
            "update": self.update,
            "steps": self.steps,
            "episodes": self.episodes,
            "returns": list(self.returns),
            "lengths": list(self.lengths),
            "spaces": self.spaces,
            "frozen": dict(self.beginning.hashes),
            "algorithm": dict(self.algorithm_state),
            "policy": {name: tensor.detach() for name, tensor in self.policy.state_dict().items()},
            "optimizer": self.learner.state(),
            "acting": self.acting.state(),
            "meter": None if self.meter is None else self.meter.state(),
            "collector": environments,
        }

    def load_state(self, tree: Tree) -> None:
        """Go on from `state()`.

        Raises:
            ResumeError: if the spaces or the network are not those of the checkpoint.
        """
        check_hashes(self.beginning.hashes, tree["frozen"])
        for what, old, new in zip(("observation", "action"), tree["spaces"], self.spaces, strict=True):
            if _listed(old) != _listed(new):
                raise ResumeError(
                    f"the {what} space of the environment changed: the checkpoint has {old}, the environment now has "
                    f"{new}. Resume with the environment the run was made with, or start a new run"
                )
        try:
            self.policy.load_state_dict(tree["policy"])
        except RuntimeError as error:
            raise ResumeError(
                f"the checkpoint's network is not the one configured: {error}. Resume without changing the policy"
            ) from error
        self.learner.load_state(tree["optimizer"])
        self.acting.load_state(tree["acting"])
        if self.meter is not None and tree["meter"] is not None:
            self.meter.load_state(tree["meter"])
        self.algorithm_state = dict(tree["algorithm"])
        self.update, self.steps, self.episodes = tree["update"], tree["steps"], tree["episodes"]
        self.returns.extend(tree["returns"])
        self.lengths.extend(tree["lengths"])
        if tree["collector"] is None:
            self.collector.rebuild(self.update)
            self._forget_open_returns()
        else:
            self.collector.restore(tree["collector"])

    def _forget_open_returns(self) -> None:
        if self.policy.reward_normalizer is not None:
            self.policy.reward_normalizer.restart()

    def save_policy(self, path: Path) -> None:
        """Write the policy folder."""
        save(self.policy, path)

    def resume_command(self, directory: Path) -> list[str]:
        """The words of the command that goes on with the run."""
        again = [*environment_again(self.run.environment), *named_potential(self.run)]
        return ["upslope", "resume", str(directory), *again]

    def close(self) -> None:
        """Give back the environments."""
        self.collector.close()


def _actor_gradient(policy: ActorCritic, optimizer: FlatOptimizer) -> list[Tensor]:
    """The gradients of what serves the actor alone, in one piece or several: shared parameters hear the critic, too."""
    modules: list[nn.Module] = [policy.actor]
    if policy.critic is None or policy.critic_encoder is not None:
        modules.append(policy.encoder)
    if policy.critic is None and policy.torso is not None:
        modules.append(policy.torso)
    if policy.memory is not None and (policy.critic is None or policy.memory.critic is not None):
        modules.append(policy.memory.actor)
    own = {id(parameter) for module in modules for parameter in module.parameters()}
    spans, position = list[tuple[int, int]](), 0
    for parameter in policy.parameters():
        if parameter.requires_grad:
            end = position + parameter.numel()
            if id(parameter) in own:
                joins = bool(spans) and spans[-1][1] == position
                spans.append((spans.pop()[0] if joins else position, end))
            position = end
    return [optimizer.gradient[start:end] for start, end in spans]


def _most_entropy(space: Space) -> float | None:
    """The entropy of choosing blindly; None where actions are continuous."""
    if isinstance(space, Discrete):
        return math.log(space.n) if space.n > 1 else None
    if isinstance(space, MultiDiscrete):
        return sum(math.log(choices) for choices in space.choices) or None
    return space.n * math.log(2.0) if isinstance(space, MultiBinary) else None


def _listed(tree: object) -> object:
    if isinstance(tree, Mapping):
        return {key: _listed(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_listed(value) for value in tree]
    return tree

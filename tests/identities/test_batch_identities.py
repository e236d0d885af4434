"""What must not matter: padding, hidden steps, the order of rows, and how a batch is split."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from identity_strategies import PROPERTY, SEEDS, Experience, close, experiences, normal
from torch import Tensor, nn
from torch.nn.functional import pad

import upslope.algorithms
from upslope.algorithms import (
    A2C,
    GRPO,
    KTO,
    NPG,
    PPO,
    RLOO,
    SFT,
    TRPO,
    ActorCriticLambda,
    Algorithm,
    AverageReward,
    ImportanceSampled,
    Now,
    OneStepActorCritic,
    Preference,
    Reinforce,
    RewardModel,
    StaleData,
    TDLambda,
    VTraceActorCritic,
)
from upslope.estimators import (
    fixed_length,
    gae,
    lambda_return,
    n_step_return,
    reward_to_go,
    score_function,
    sequence_log_prob,
    sequence_log_ratio,
    standardise,
    step_count,
    step_mean,
    total_reward,
    trajectory_count,
    trajectory_mean,
    trajectory_sum,
    vtrace,
    weighted_sum,
)
from upslope.exact import StatePolicy, TabularPolicy
from upslope.train.step import learn
from upslope.trajectory import Trajectory

STATES, ACTIONS = 5, 3
PSI = ("total_reward", "reward_to_go", "baselined", "action_value", "advantage", "td_residual")
ALGORITHMS: dict[str, Algorithm] = {
    **{f"reinforce {psi}": Reinforce(psi=psi, entropy_coefficient=0.01) for psi in PSI},
    "reinforce gamma^t standardised": Reinforce(psi="baselined", discounted_states=True, normalize_advantage=True),
    "one step": OneStepActorCritic(discounted_states=True, entropy_coefficient=0.01),
    "a2c": A2C(gae_lambda=0.8, entropy_coefficient=0.01),
    "a2c standardised": A2C(normalize_advantage=True),
    "ppo": PPO(epochs=2, minibatches=2, value_clip=0.1, entropy_coefficient=0.01),
    "ppo one minibatch": PPO(epochs=2, minibatches=1, normalize_advantage=False, dual_clip=3.0),
    "ppo decoupled": PPO(
        epochs=2, minibatches=1, stale=StaleData(anchor="proximal", importance_cap=1.2, advantage="vtrace")
    ),
    "v-trace": VTraceActorCritic(gae_lambda=0.8, entropy_coefficient=0.01),
    "v-trace standardised": VTraceActorCritic(normalize_advantage=True),
    "importance sampled": ImportanceSampled(baseline="critic", discounted_states=True, entropy_coefficient=0.01),
    "importance sampled by episode": ImportanceSampled(weights="trajectory", cap=1.1, self_normalised=True),
    "trpo": TRPO(critic_epochs=2, critic_minibatches=1, entropy_coefficient=0.01),
    "trpo reward to go": TRPO(psi="reward_to_go", normalize_advantage=False),
    "npg": NPG(normalize_advantage=False, critic_epochs=1, critic_minibatches=1),
    "ppo kl": PPO(epochs=1, minibatches=2, clip=None, kl_coefficient=0.3, recompute_advantage=True),
}
ON_SEQUENCES = {GRPO, RLOO, SFT, Preference, KTO, RewardModel}
"""Their rows belong together; tests/algorithms/test_sequence_algorithms.py asks the same of them."""
ON_TRACES = {ActorCriticLambda, AverageReward, TDLambda}
"""They learn step by step, or where nothing terminates: test_trace_identities.py has them."""
EVERY_ALGORITHM = pytest.mark.parametrize("name", list(ALGORITHMS))
ONE_MINIBATCH = pytest.mark.parametrize(
    "name", [name for name, each in ALGORITHMS.items() if each.passes.minibatches == 1]
)
UPDATES = settings(PROPERTY, max_examples=15)
TABLES = ("gae", "lambda_return", "n_step_return", "reward_to_go", "total_reward", "value_target", "policy_advantage")


def test_no_algorithm_is_left_out() -> None:
    """One that is added shows here."""
    classes = (member for _, member in inspect.getmembers(upslope.algorithms, inspect.isclass))
    trained = {
        member
        for member in classes
        if callable(getattr(member, "loss", None)) and not getattr(member, "_is_protocol", False)
    }
    assert trained == {type(algorithm) for algorithm in ALGORITHMS.values()} | ON_SEQUENCES | ON_TRACES


@dataclass
class Recording:
    """A stepper that keeps every gradient and moves nothing."""

    policy: TabularPolicy | WholeRows
    micro_batches: int = 1
    gradients: list[Tensor] = field(default_factory=list[Tensor])

    def zero_gradient(self) -> None:
        self.policy.zero_grad()

    def step(self, learning_rate: float) -> float:
        parts = (self.policy.theta, self.policy.value)
        self.gradients.append(
            torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in parts])
        )
        return 0.0

    @property
    def parameters(self) -> list[Tensor]:
        return [part for part in (self.policy.theta, self.policy.value) if part.requires_grad]

    def step_by(self, move: Callable[[], None]) -> float:
        return self.step(0.0)


class WholeRows(StatePolicy):
    """The same table, for a loop that believes steps depend on earlier ones and so keeps rows whole."""

    def __init__(self, theta: Tensor) -> None:
        super().__init__(STATES, ACTIONS)
        self.theta = nn.Parameter(theta)

    @property
    def sequential(self) -> bool:
        return True

    def preferences(self) -> Tensor:
        return self.theta


def table_policy() -> TabularPolicy:
    policy = TabularPolicy(STATES, ACTIONS, normal(1, STATES, ACTIONS))
    with torch.no_grad():
        policy.value.copy_(normal(2, STATES))
    return policy


def learned(
    name: str, trajectory: Trajectory, micro_batches: int = 1, *, whole_rows: bool = False
) -> tuple[list[Tensor], dict[str, float]]:
    """The gradients of every optimiser step, and the metrics."""
    policy, algorithm = table_policy(), ALGORITHMS[name]
    if whole_rows:
        table, policy = policy, WholeRows(policy.theta.detach().clone())
        policy.value = table.value
    recording = Recording(policy, micro_batches)
    result = learn(
        policy,
        algorithm,
        recording,
        trajectory,
        now=Now(state=algorithm.initial_state()),
        learning_rate=0.1,
        generator=np.random.default_rng(0),
    )
    if whole_rows:
        assert result.metrics.pop("mismatch") > 0.0  # told of policies that read rows alone
    return recording.gradients, result.metrics


def same(left: tuple[list[Tensor], dict[str, float]], right: tuple[list[Tensor], dict[str, float]]) -> None:
    assert len(left[0]) == len(right[0]) > 0
    for one, two in zip(left[0], right[0], strict=True):
        close(one, two)
    assert left[1].keys() == right[1].keys()
    for name, value in left[1].items():
        assert right[1][name] == pytest.approx(value, rel=1e-9, abs=1e-9, nan_ok=True), name


@st.composite
def ragged(draw: st.DrawFn, *, whole_episodes: bool) -> Trajectory:
    """Rows of different lengths. Whole episodes end once and are padded; fragments go on after a step that only reset.

    The behaviour policy is not quite the one that learns, so that ratios are not 1.
    """
    lengths = draw(st.lists(st.integers(1, 6), min_size=2, max_size=4))
    seed, rows, width = draw(SEEDS), len(lengths), max(lengths)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(-1)
    last = torch.arange(width) == torch.tensor(lengths).unsqueeze(-1) - 1
    dice = torch.rand(rows, width, generator=generator)
    terminated, truncated = last & (dice < 0.5), last & (dice >= 0.5)
    if not whole_episodes:
        inside = mask & ~last & (dice < 0.3)
        inside[:, 1:] &= ~inside[:, :-1]
        terminated, truncated = terminated | (inside & (dice < 0.15)), truncated | (inside & (dice >= 0.15))
        mask[:, 1:] &= ~inside[:, :-1]
    ends = terminated | truncated
    open_end = (truncated & mask) | (~ends & mask & (torch.arange(width) == width - 1))
    observation = torch.randint(STATES, (rows, width), generator=generator)
    action = torch.randint(ACTIONS, (rows, width), generator=generator)
    time = torch.zeros(rows, width, dtype=torch.long)
    for t in range(1, width):
        time[:, t] = torch.where(ends[:, t - 1] | ~mask[:, t - 1], 0, time[:, t - 1] + 1)
    drift = 0.1 * torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return Trajectory(
        observation=observation,
        action=action,
        reward=torch.randn(rows, width, generator=generator, dtype=torch.float64).masked_fill(~mask, 0.0),
        terminated=terminated,
        truncated=truncated,
        mask=mask,
        behaviour_log_prob=(table_policy().log_prob(observation, action).detach() + drift).masked_fill(~mask, 0.0),
        time=time,
        final_observation=torch.randint(STATES, (int(open_end.sum()),), generator=generator),
        final_index=open_end.flatten().nonzero().squeeze(-1),
    )


def chosen_enough(name: str, trajectory: Trajectory) -> bool:
    """Standardising and minibatches need a few steps."""
    algorithm = ALGORITHMS[name]
    return int(trajectory.mask.sum()) >= 2 * algorithm.passes.minibatches


def rearranged(trajectory: Trajectory, places: Tensor, shape: tuple[int, int]) -> Trajectory:
    """The positions of a trajectory at new places [B * T] of a larger or other shape; the rest is hidden rubbish."""
    size = shape[0] * shape[1]
    taken = torch.zeros(size, dtype=torch.bool).index_fill(0, places, True)
    assert isinstance(trajectory.observation, Tensor)
    assert isinstance(trajectory.final_observation, Tensor)

    def move(tensor: Tensor, rubbish: float) -> Tensor:
        filled = torch.full((size,), rubbish, dtype=tensor.dtype)
        return filled.index_copy(0, places, tensor.flatten()).view(shape)

    index, order = places[trajectory.final_index].sort()
    return replace(
        trajectory,
        observation=move(trajectory.observation, STATES - 1),
        action=move(trajectory.action, ACTIONS - 1),
        reward=move(trajectory.reward, 1e6),
        terminated=move(trajectory.terminated, False) | ~taken.view(shape),
        truncated=move(trajectory.truncated, False),
        mask=move(trajectory.mask, False),
        behaviour_log_prob=move(trajectory.behaviour_log_prob, torch.nan),
        time=move(trajectory.time, 77),
        final_observation=trajectory.final_observation[order],
        final_index=index,
    )


@EVERY_ALGORITHM
@UPDATES
@given(st.data(), st.integers(2, 40))
def test_any_micro_batch_split_gives_the_same_gradient(name: str, data: st.DataObject, micro_batches: int) -> None:
    """At every optimiser step, and the same metrics; ragged masks, more parts than steps too."""
    trajectory = data.draw(ragged(whole_episodes=ALGORITHMS[name].passes.whole_episodes))
    if chosen_enough(name, trajectory):
        same(learned(name, trajectory), learned(name, trajectory, micro_batches))


@ONE_MINIBATCH
@UPDATES
@given(st.data(), st.integers(1, 5))
def test_rows_kept_whole_have_the_gradient_of_their_steps(name: str, data: st.DataObject, micro_batches: int) -> None:
    """Where a policy looks at earlier steps batches are [B, T], hidden steps among them; in any split."""
    trajectory = data.draw(ragged(whole_episodes=ALGORITHMS[name].passes.whole_episodes))
    if not chosen_enough(name, trajectory):
        return
    expected = learned(name, trajectory)
    same(learned(name, trajectory, whole_rows=True), expected)
    gradients, _ = learned(name, trajectory, micro_batches, whole_rows=True)
    for one, two in zip(gradients, expected[0], strict=True):
        close(one, two)


@EVERY_ALGORITHM
@UPDATES
@given(st.data(), st.integers(0, 3), st.integers(0, 3))
def test_padding_left_and_right_changes_no_gradient(name: str, data: st.DataObject, left: int, right: int) -> None:
    """Padded positions are hidden and ended, and full of rubbish."""
    trajectory = data.draw(ragged(whole_episodes=ALGORITHMS[name].passes.whole_episodes))
    if not chosen_enough(name, trajectory):
        return
    rows, width = trajectory.shape
    wider = left + width + right
    places = (torch.arange(rows).unsqueeze(-1) * wider + left + torch.arange(width)).flatten()
    same(learned(name, trajectory), learned(name, rearranged(trajectory, places, (rows, wider))))


@ONE_MINIBATCH
@UPDATES
@given(st.data(), SEEDS)
def test_row_order_changes_no_gradient(name: str, data: st.DataObject, seed: int) -> None:
    """Of whole batches: minibatches are drawn by place."""
    trajectory = data.draw(ragged(whole_episodes=ALGORITHMS[name].passes.whole_episodes))
    if not chosen_enough(name, trajectory):
        return
    rows, width = trajectory.shape
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    places = (order.unsqueeze(-1) * width + torch.arange(width)).flatten()
    same(learned(name, trajectory), learned(name, rearranged(trajectory, places, (rows, width))))


@EVERY_ALGORITHM
@UPDATES
@given(st.data())
def test_masked_steps_have_no_gradient(name: str, data: st.DataObject) -> None:
    """Rubbish where nothing was chosen (NaN in the log-prob that no policy gave) moves no gradient and no metric."""
    trajectory = data.draw(ragged(whole_episodes=ALGORITHMS[name].passes.whole_episodes))
    if not chosen_enough(name, trajectory):
        return
    hidden = ~trajectory.mask
    assert isinstance(trajectory.observation, Tensor)
    garbled = replace(
        trajectory,
        observation=trajectory.observation.masked_fill(hidden, STATES - 1),
        action=trajectory.action.masked_fill(hidden, ACTIONS - 1),
        reward=trajectory.reward.masked_fill(hidden, 1e6),
        behaviour_log_prob=trajectory.behaviour_log_prob.masked_fill(hidden, torch.nan),
        time=trajectory.time.masked_fill(hidden, 12345),
    )
    same(learned(name, trajectory), learned(name, garbled))


def tables(data: Experience, log_ratio: Tensor) -> dict[str, Tensor]:
    """Everything that takes a mask, [B, T]."""
    target = vtrace(log_ratio, torch.zeros_like(log_ratio), *data.critic, trace_decay=0.9, mask=data.mask)
    return {
        "gae": gae(*data.critic, gae_lambda=0.8, mask=data.mask),
        "lambda_return": lambda_return(*data.steps, data.next_value, data.cut, trace_decay=0.8, mask=data.mask),
        "n_step_return": n_step_return(*data.steps, data.next_value, data.cut, steps=2, mask=data.mask),
        "reward_to_go": reward_to_go(*data.steps, data.cut, bootstrap=data.next_value, mask=data.mask),
        "total_reward": total_reward(*data.steps, data.cut, mask=data.mask),
        "value_target": target.value_target,
        "policy_advantage": target.advantage,
    }


@PROPERTY
@given(experiences(holes=True), SEEDS)
def test_hidden_rewards_and_values_are_not_read_even_if_nan(data: Experience, seed: int) -> None:
    """A V' is read only at the last hidden step before a chosen one or a cut, where it stands for the chosen one's."""
    log_ratio = 0.5 * normal(seed, *data.mask.shape)
    hidden, nan = ~data.mask, torch.nan
    followed = torch.cat((data.mask[:, 1:], torch.ones_like(data.mask[:, :1])), -1) | data.cut
    expected = tables(data, log_ratio)
    rubbish = replace(
        data,
        reward=data.reward.masked_fill(hidden, nan),
        value=data.value.masked_fill(hidden, nan),
        next_value=data.next_value.masked_fill(hidden & ~followed, nan),
    )
    found = tables(rubbish, log_ratio.masked_fill(hidden, nan))
    for name in TABLES:
        close(found[name][data.mask], expected[name][data.mask])
        if name != "value_target":
            assert (found[name][hidden] == 0).all()


@PROPERTY
@given(experiences(holes=True), SEEDS, st.integers(0, 4), st.integers(0, 4))
def test_padding_with_nan_left_and_right_changes_no_estimate(
    data: Experience, seed: int, left: int, right: int
) -> None:
    log_ratio = 0.5 * normal(seed, *data.mask.shape)

    def padded(tensor: Tensor, rubbish: float) -> Tensor:
        return pad(tensor, (left, right), value=rubbish)

    wider = Experience(
        reward=padded(data.reward, torch.nan),
        discount=padded(data.discount, 0.9),
        value=padded(data.value, torch.nan),
        next_value=padded(data.next_value, torch.nan),
        cut=padded(data.cut, False),
        terminated=padded(data.terminated, False),
        mask=padded(data.mask, False),
    )
    found, expected = tables(wider, padded(log_ratio, torch.nan)), tables(data, log_ratio)
    width = data.mask.shape[-1]
    for name in TABLES:
        inside = found[name][:, left : left + width]
        close(inside[data.mask], expected[name][data.mask])


@PROPERTY
@given(experiences(holes=True), SEEDS)
def test_the_last_step_of_a_row_is_cut_whether_or_not_it_says_so(data: Experience, seed: int) -> None:
    log_ratio, unsaid = 0.5 * normal(seed, *data.mask.shape), data.cut.clone()
    unsaid[:, -1] = False
    expected = tables(data, log_ratio), tables(replace(data, mask=torch.ones_like(data.mask)), log_ratio)
    data = replace(data, cut=unsaid)
    found = tables(data, log_ratio), tables(replace(data, mask=torch.ones_like(data.mask)), log_ratio)
    for one, two in zip(found, expected, strict=True):
        for name in TABLES:
            close(one[name], two[name])


@PROPERTY
@given(experiences(holes=True), SEEDS)
def test_row_order_changes_no_estimate(data: Experience, seed: int) -> None:
    log_ratio = 0.5 * normal(seed, *data.mask.shape)
    order = torch.randperm(data.mask.shape[0], generator=torch.Generator().manual_seed(seed))
    moved = Experience(**{name: tensor[order] for name, tensor in vars(data).items()})
    expected = tables(data, log_ratio)
    for name, found in tables(moved, log_ratio[order]).items():
        close(found, expected[name][order])


def reductions(mask: Tensor, cut: Tensor | None, steps: int | None, rows: int | None) -> list[Tensor]:
    common = {"cut": cut, "trajectories": rows, "dtype": torch.float64}
    return [
        step_mean(mask, steps=steps, dtype=torch.float64),
        trajectory_mean(mask, **common),
        trajectory_sum(mask, **common),
        fixed_length(mask, 11, **common),
    ]


@pytest.mark.parametrize("several", [False, True])
@PROPERTY
@given(experiences(holes=True))
def test_reductions_are_their_definitions(several: bool, data: Experience) -> None:
    """m/sum(m), m/(len_i N), m/N, m/(L N); N counts rows with a chosen step, or what lies between two cuts of one."""
    lengths: list[tuple[int, int, int, int]] = []
    for row in range(data.mask.shape[0]):
        start = 0
        ends = data.cut[row].nonzero().squeeze(-1).tolist() if several else [data.mask.shape[1] - 1]
        for end in ends:
            lengths.append((row, start, end + 1, int(data.mask[row, start : end + 1].sum())))
            start = end + 1
    number = sum(length > 0 for *_, length in lengths)
    cut = data.cut if several else None
    assert step_count(data.mask) == int(data.mask.sum())
    assert trajectory_count(data.mask, cut=cut) == number
    if number == 0:
        for function in (step_mean, trajectory_mean, trajectory_sum):
            with pytest.raises(ValueError, match="mask has no True position"):
                function(data.mask)
        return
    chosen = data.mask.double()
    mean = torch.zeros_like(chosen)
    for row, start, end, length in lengths:
        mean[row, start:end] = chosen[row, start:end] / (max(length, 1) * number)
    expected = chosen / chosen.sum(), mean, chosen / number, chosen / (11 * number)
    for found, weight in zip(reductions(data.mask, cut, None, None), expected, strict=True):
        close(found, weight)
    assert float(expected[0].sum()) == pytest.approx(1.0)
    assert float(expected[1].sum()) == pytest.approx(1.0)


@PROPERTY
@given(experiences(holes=True), SEEDS, st.integers(1, 4))
def test_rows_in_any_split_have_the_gradient_of_the_whole(data: Experience, seed: int, size: int) -> None:
    """With the denominators of the whole, the parts' gradients add up, padded as each part is."""
    if not data.mask.any():
        return
    log_prob, psi = normal(seed, *data.mask.shape).requires_grad_(), normal(seed + 1, *data.mask.shape)
    steps, rows = step_count(data.mask), trajectory_count(data.mask, cut=data.cut)
    whole = reductions(data.mask, data.cut, None, None)
    for kind, weight in enumerate(whole):
        expected = torch.autograd.grad(weighted_sum(score_function(log_prob, psi), weight), log_prob)[0]
        found = torch.zeros_like(psi)
        for start in range(0, len(psi), size):
            part = slice(start, start + size)
            piece = reductions(data.mask[part], data.cut[part], steps, rows)[kind]
            value = weighted_sum(score_function(log_prob[part], psi[part]), piece)
            found = found + torch.autograd.grad(value, log_prob)[0]
        close(found, expected)
        close(expected, weight * psi)


@PROPERTY
@given(experiences(holes=True), SEEDS, st.sampled_from([torch.nan, torch.inf, -torch.inf, 1e300]))
def test_a_weighted_sum_hides_rubbish_and_its_gradient(data: Experience, seed: int, rubbish: float) -> None:
    """So do sequence log-probs, log-ratios and standardised advantages: zero gradient, no trace of it in the value."""
    hidden, clean = ~data.mask, normal(seed, *data.mask.shape)
    if int(data.mask.sum()) < 2:
        return
    weight = step_mean(data.mask, dtype=torch.float64)
    for function in (
        lambda value: weighted_sum(value, weight),
        lambda value: sequence_log_prob(value, data.mask).square().sum(),
        lambda value: sequence_log_prob(value, data.mask, length_normalised=True).square().sum(),
        lambda value: sequence_log_ratio(value, 0.3 * clean, data.mask).exp().sum(),
        lambda value: sequence_log_ratio(value, 0.3 * clean, data.mask, length_normalised=False).exp().sum(),
        lambda value: (standardise(value, data.mask) ** 3).sum(),
    ):
        plain, dirty = clean.clone().requires_grad_(), clean.masked_fill(hidden, rubbish).requires_grad_()
        left, right = function(plain), function(dirty)
        close(right, left)
        expected, found = torch.autograd.grad(left, plain)[0], torch.autograd.grad(right, dirty)[0]
        close(found, expected)
        assert (found[hidden] == 0).all()

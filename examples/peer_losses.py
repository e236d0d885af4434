"""Losses as other libraries define them, and the classic slips, held against exact gradients.

    python examples/peer_losses.py
    python examples/peer_losses.py --only trl verl rloo

Every function below is a loss in the form that `upslope audit examples/peer_losses.py:trl --problem tokens` takes: it
asks for what it needs by name and returns what is to be minimised. The formulas are the default ones of TRL 1.10, verl,
OpenRLHF, NeMo-RL, prime-rl and the Tinker cookbook (summer 2026) on on-policy data; the code is our own.

Completion losses are looked at on two prompts with completions of up to three tokens, rewards 0 and 1, in batches of
one group of four; control losses on a problem with discount 0.9, and on one with a time limit. Every batch there can be
is weighted by its probability, so that nothing is left to chance; PPO, whose batches are large, is sampled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor

from upslope.auditing.loss_audit import LossAudit, audit_loss
from upslope.auditing.setting import FiniteSetting
from upslope.auditing.tokens import TokenSetting
from upslope.exact import TokenMDP, problem


def totals(reward: Tensor, group: Tensor) -> Tensor:
    """Total rewards [groups, G]; the rows of a group are neighbours."""
    return reward.sum(-1).view(len(group.unique()), -1)


def clipped(log_prob: Tensor, behaviour_log_prob: Tensor, advantage: Tensor) -> Tensor:
    """min(rho A, clip(rho, 0.8, 1.2) A) per step."""
    ratio = (log_prob - behaviour_log_prob).exp()
    return torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)


def token_mean(each: Tensor, mask: Tensor) -> Tensor:
    """The mean over all chosen tokens of the batch."""
    return (each * mask).sum() / mask.sum()


# What libraries do by default.


def trl(log_prob, behaviour_log_prob, reward, mask, group):
    """TRL GRPOTrainer: group mean, standard deviation (ddof 1) + 1e-4, clip, mean over the batch's tokens."""
    total = totals(reward, group)
    advantage = (total - total.mean(-1, keepdim=True)) / (total.std(-1, keepdim=True) + 1e-4)
    return -token_mean(clipped(log_prob, behaviour_log_prob, advantage.view(-1, 1)), mask)


def verl(log_prob, behaviour_log_prob, reward, mask, group):
    """verl GRPO: the same with 1e-6, and a dual clip at 3 for negative advantages."""
    total = totals(reward, group)
    advantage = ((total - total.mean(-1, keepdim=True)) / (total.std(-1, keepdim=True) + 1e-6)).view(-1, 1)
    objective = clipped(log_prob, behaviour_log_prob, advantage)
    dual = torch.where(advantage < 0, torch.maximum(objective, 3.0 * advantage), objective)
    return -token_mean(dual, mask)


def openrlhf(log_prob, behaviour_log_prob, reference_log_prob, reward, mask, group):
    """OpenRLHF group_norm: 1e-9, clipped to +-10, then 0.01 k1 taken off each token's reward, unbaselined."""
    total = totals(reward, group)
    advantage = (total - total.mean(-1, keepdim=True)) / (total.std(-1, keepdim=True) + 1e-9)
    penalty = 0.01 * (behaviour_log_prob - reference_log_prob) * mask
    penalty_to_go = penalty.flip(-1).cumsum(-1).flip(-1)
    advantage = advantage.clamp(-10, 10).view(-1, 1) - penalty_to_go
    return -token_mean(clipped(log_prob, behaviour_log_prob, advantage), mask)


def nemo_rl(log_prob, behaviour_log_prob, reference_log_prob, reward, mask, group):
    """NeMo-RL: mean and deviation of the others, where that deviation is not 0; 0.01 k3 in the loss."""
    total = totals(reward, group)
    size = total.shape[-1]
    others = torch.stack([total[:, [j for j in range(size) if j != i]] for i in range(size)], dim=1)
    centred, spread = total - others.mean(-1), others.std(-1)
    advantage = torch.where(spread > 0, centred / (spread + 1e-6), centred).view(-1, 1)
    back = reference_log_prob - log_prob
    each = 0.01 * (back.exp() - 1 - back) - clipped(log_prob, behaviour_log_prob, advantage)
    return token_mean(each, mask)


def prime_rl(log_prob, behaviour_log_prob, reward, mask, group):
    """prime-rl: mean-centred; tokens whose probability moved by 0.2 are left out; 1e-3 squared log-ratio."""
    total = totals(reward, group)
    advantage = (total - total.mean(-1, keepdim=True)).view(-1, 1)
    near = (log_prob.exp() - behaviour_log_prob.exp()).abs().detach() <= 0.2
    log_ratio = log_prob - behaviour_log_prob
    return token_mean(1e-3 * log_ratio.square() - near * log_ratio.exp() * advantage, mask)


def tinker(log_prob, behaviour_log_prob, reward, mask, group):
    """Tinker cookbook: mean-centred, importance-weighted, summed over everything."""
    total = totals(reward, group)
    advantage = (total - total.mean(-1, keepdim=True)).view(-1, 1)
    return -((log_prob - behaviour_log_prob).exp() * advantage * mask).sum()


def dr_grpo(log_prob, behaviour_log_prob, reward, mask, group, longest=3):
    """Dr. GRPO: mean-centred, summed over tokens, over rows times the longest length."""
    total = totals(reward, group)
    advantage = (total - total.mean(-1, keepdim=True)).view(-1, 1)
    return -(clipped(log_prob, behaviour_log_prob, advantage) * mask).sum() / (len(mask) * longest)


def rloo(log_prob, behaviour_log_prob, reference_log_prob, reward, mask, group):
    """RLOO (Ahmadian et al. 2024): 0.05 k1 in the reward, mean of the others as baseline, whole completions."""
    penalised = reward - 0.05 * (behaviour_log_prob - reference_log_prob) * mask
    total = totals(penalised, group)
    size = total.shape[-1]
    advantage = (total - total.mean(-1, keepdim=True)) * size / (size - 1)
    return -((log_prob * mask).sum(-1) * advantage.flatten()).mean()


def ppo_control(log_prob, behaviour_log_prob, value, next_value, reward, terminated, truncated, mask, gamma):
    """PPO as CleanRL writes it: GAE 0.95, truncation as termination, standardised advantages, no gamma^t."""
    value, done = value.detach(), terminated | truncated
    residual = reward + gamma * next_value * ~done - value
    advantage, following = torch.zeros_like(value), torch.zeros_like(value[:, 0])
    for step in reversed(range(value.shape[1])):
        following = residual[:, step] + gamma * 0.95 * following * ~done[:, step]
        advantage[:, step] = following
    chosen = advantage[mask]
    advantage = (advantage - chosen.mean()) / (chosen.std(correction=0) + 1e-8)
    return -token_mean(clipped(log_prob, behaviour_log_prob, advantage), mask)


# One choice or one slip at a time, on completions.


def centred(log_prob, reward, mask, group):
    """Nothing wrong: mean-centred, summed over a completion's tokens, averaged over completions."""
    total = totals(reward, group)
    advantage = (total - total.mean(-1, keepdim=True)).view(-1, 1)
    return -(log_prob * advantage * mask).sum(-1).mean()


def divided_by_group_std(log_prob, reward, mask, group):
    """The same over the group's standard deviation."""
    total = totals(reward, group)
    advantage = (total - total.mean(-1, keepdim=True)) / (total.std(-1, keepdim=True) + 1e-6)
    return -(log_prob * advantage.view(-1, 1) * mask).sum(-1).mean()


def standardised(log_prob, reward, mask):
    """Advantages standardised over the tokens of the batch."""
    each = (reward.sum(-1, keepdim=True) * mask)[mask]
    advantage = torch.zeros_like(reward).masked_scatter(mask, (each - each.mean()) / (each.std() + 1e-8))
    return -(log_prob * advantage * mask).sum(-1).mean()


def length_normalised(log_prob, reward, mask, group):
    """The mean over each completion's tokens, then over completions (the GRPO paper)."""
    total = totals(reward, group)
    advantage = (total - total.mean(-1, keepdim=True)).view(-1, 1)
    return -((log_prob * advantage * mask).sum(-1) / mask.sum(-1)).mean()


def batch_token_mean(log_prob, reward, mask, group):
    """The sum over all tokens of the batch over their number (DAPO)."""
    total = totals(reward, group)
    advantage = (total - total.mean(-1, keepdim=True)).view(-1, 1)
    return -token_mean(log_prob * advantage, mask)


def micro_batches(log_prob, reward, mask, group, rows=1):
    """The same in micro-batches of one row each, whose means are averaged: rows are ragged."""
    total = totals(reward, group)
    each = -log_prob * (total - total.mean(-1, keepdim=True)).view(-1, 1)
    parts = [token_mean(each[i : i + rows], mask[i : i + rows]) for i in range(0, len(mask), rows)]
    return torch.stack(parts).mean()


def shifted_log_prob(evaluation, observation, reward, mask, group):
    """Each position scored for the token it read instead of the one that followed."""
    log_policy = evaluation.distribution.parameters
    return centred(log_policy.gather(-1, observation.unsqueeze(-1)).squeeze(-1), reward, mask, group)


def mask_with_prompt(log_prob, reward, mask, group):
    """A mask that begins one token early, in the prompt; the group's advantages cancel there."""
    return centred(log_prob, reward, mask | mask.roll(-1, -1), group)


def mask_with_prompt_no_baseline(log_prob, reward, mask):
    """The same without a baseline: every prompt token is made more likely by every reward."""
    return -(log_prob * reward.sum(-1, keepdim=True) * (mask | mask.roll(-1, -1))).sum(-1).mean()


def mask_without_last(log_prob, reward, mask, group):
    """A mask that leaves out the last token of each completion, the end."""
    return centred(log_prob, reward, mask & mask.roll(-1, -1), group)


def wrong_sign(log_prob, reward, mask, group):
    """The objective where its negative belongs."""
    return -centred(log_prob, reward, mask, group)


def k1_in_loss(log_prob, reference_log_prob, mask):
    """A penalty alone: the log-ratio, differentiated."""
    return ((log_prob - reference_log_prob) * mask).sum(-1).mean()


def k2_in_loss(log_prob, reference_log_prob, mask):
    """A penalty alone: half the squared log-ratio of each token."""
    return (0.5 * (log_prob - reference_log_prob).square() * mask).sum(-1).mean()


def k3_in_loss(log_prob, reference_log_prob, mask):
    """A penalty alone: k3 of each token."""
    back = reference_log_prob - log_prob
    return ((back.exp() - 1 - back) * mask).sum(-1).mean()


def k3_of_completions_in_loss(log_prob, reference_log_prob, mask):
    """A penalty alone: k3 of each completion's log-ratio."""
    back = ((reference_log_prob - log_prob) * mask).sum(-1)
    return (back.exp() - 1 - back).mean()


def k1_in_reward(log_prob, behaviour_log_prob, reference_log_prob, mask):
    """A penalty alone: the log-ratio of the completion as a reward, without gradient."""
    worth = -((behaviour_log_prob - reference_log_prob) * mask).sum(-1, keepdim=True)
    return -(log_prob * worth * mask).sum(-1).mean()


# One choice or one slip at a time, in control.


def returns(reward: Tensor, end_value: Tensor, gamma: float) -> Tensor:
    """G_t, with a value added where a row is cut."""
    result, following = torch.zeros_like(reward), torch.zeros_like(reward[:, 0])
    for step in reversed(range(reward.shape[1])):
        following = reward[:, step] + gamma * (following + end_value[:, step])
        result[:, step] = following
    return result


def reinforce(log_prob, reward, mask, time, gamma):
    """Nothing wrong: sum_t gamma^t l_t G_t."""
    weight = gamma**time * returns(reward, torch.zeros_like(reward), gamma)
    return -(log_prob * weight * mask).sum(-1).mean()


def dropped_gamma(log_prob, reward, mask, gamma):
    """The same without gamma^t."""
    return -(log_prob * returns(reward, torch.zeros_like(reward), gamma) * mask).sum(-1).mean()


def total_return(log_prob, reward, mask, gamma):
    """Every step weighted with the whole discounted return."""
    whole = returns(reward, torch.zeros_like(reward), gamma)[:, :1]
    return -(log_prob * whole * mask).sum(-1).mean()


def bootstrapped(log_prob, value, next_value, reward, truncated, mask, time, gamma):
    """Nothing wrong: what followed a time limit is worth its value."""
    weight = gamma**time * (returns(reward, next_value * truncated, gamma) - value.detach())
    return -(log_prob * weight * mask).sum(-1).mean()


def truncation_as_termination(log_prob, value, reward, mask, time, gamma):
    """What followed a time limit is worth nothing."""
    return -(log_prob * gamma**time * (returns(reward, 0 * reward, gamma) - value.detach()) * mask).sum(-1).mean()


def residual_to_zero(log_prob, value, next_value, reward, truncated, mask, time, gamma):
    """The TD residual, with truncation as termination."""
    residual = reward + gamma * next_value * ~truncated - value.detach()
    return -(log_prob * gamma**time * residual * mask).sum(-1).mean()


def right_answer(prompt: tuple[int, ...], completion: tuple[int, ...]) -> float:
    """After (1, 1): two 1s and the end. After (0, 0, 1): at least two 1s."""
    return float(completion == (1, 1, 0)) if prompt == (1, 1) else float(completion[:2] == (1, 1))


def completions() -> TokenSetting:
    """Two tokens, of which 0 ends; up to three per completion; four completions per prompt."""
    prompts = ((1, 1), (0, 0, 1))
    tokens = TokenMDP(vocabulary=2, end=0, limit=3, prompts=prompts, prompt_probability=(0.4, 0.6), reward=right_answer)
    return TokenSetting.build(tokens, name="right-or-wrong", size=4, seed=1)


def episodes() -> FiniteSetting:
    """Whole episodes of the problem six-state."""
    return FiniteSetting.build(problem("six-state"), gamma=0.9, unit="episodes", rows=64)


def limited_episodes() -> FiniteSetting:
    """Episodes of the problem time-limit, truncated after four steps."""
    return FiniteSetting.build(problem("time-limit"), gamma=0.9, unit="episodes", rows=64)


@dataclass(frozen=True)
class Section:
    title: str
    setting: Callable[[], TokenSetting | FiniteSetting]
    intended: str
    """The gradient that these losses are meant to follow."""
    losses: tuple[Callable[..., Tensor], ...]
    samples: int | None = None
    """Episodes to draw; None weights every batch there is."""


LIMITED = "grad J of episodes cut at 4 steps and bootstrapped there"
SECTIONS = (
    Section("Defaults", completions, "grad J", (trl, verl, openrlhf, nemo_rl, prime_rl, tinker, dr_grpo, rloo)),
    Section(
        "One at a time",
        completions,
        "grad J",
        (
            *(centred, divided_by_group_std, standardised, length_normalised, batch_token_mean, micro_batches),
            *(shifted_log_prob, mask_with_prompt, mask_with_prompt_no_baseline, mask_without_last, wrong_sign),
        ),
    ),
    Section(
        "A KL penalty alone",
        completions,
        "-grad KL(pi || ref)",
        (k1_in_loss, k2_in_loss, k3_in_loss, k3_of_completions_in_loss, k1_in_reward),
    ),
    Section("Control", episodes, "grad J", (reinforce, dropped_gamma, total_return)),
    Section("Control, in batches of 64 episodes", episodes, "grad J", (ppo_control,), samples=64_000),
    Section(
        "With a time limit",
        limited_episodes,
        LIMITED,
        (bootstrapped, truncation_as_termination, residual_to_zero),
    ),
    Section("With a time limit, in batches of 64 episodes", limited_episodes, LIMITED, (ppo_control,), samples=64_000),
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    only: tuple[str, ...] = ()
    """Names of losses; all if there are none."""


def row(name: str, audit: LossAudit, intended: str) -> str:
    """One line of the table: beside the intended gradient, and what is followed instead. Bias is what no learning rate
    mends: the part of the mean at right angles to that gradient, over the part along it.
    """
    beside = audit.following.comparison(intended)
    says = str(audit.following).replace("|", "\\|")
    if audit.following.kind == "nothing":
        return f"| `{name}` | | 0 | | {says} |"
    cosine = min(abs(beside.cosine), 1.0)
    bias = "downhill" if beside.cosine < 0.0 else f"{math.sqrt(1.0 - cosine**2) / cosine:.1%}"
    return f"| `{name}` | {beside.cosine:.4f} | {beside.factor:.3f} | {bias} | {says} |"


def main(settings: Settings) -> dict[tuple[str, str], LossAudit]:
    """Audit and print; the audits by section and loss."""
    found: dict[tuple[str, str], LossAudit] = {}
    for section in SECTIONS:
        losses = [loss for loss in section.losses if not settings.only or loss.__name__ in settings.only]
        if not losses:
            continue
        setting = section.setting()
        print(f"\n{section.title}: {setting.name}; meant to follow {section.intended}")
        print("\n| loss | cosine | factor | bias | what the audit says |\n|---|---|---|---|---|")
        for loss in losses:
            audit = audit_loss(loss, setting, samples=section.samples)
            print(row(loss.__name__, audit, section.intended))
            found[section.title, loss.__name__] = audit
    return found


if __name__ == "__main__":
    main(tyro.cli(Settings))

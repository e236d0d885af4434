"""Slips in what learns from whole sequences: groups, ratios, penalties on the distance from a reference, given data."""

from __future__ import annotations

from harness import Mutant

GRPO, RLOO, SFT = "upslope.algorithms.grpo", "upslope.algorithms.rloo", "upslope.algorithms.sft"
PREFERENCE, KTO = "upslope.algorithms.preference", "upslope.algorithms.kto"
REWARD_MODEL, PAIRS = "upslope.algorithms.reward_model", "upslope.algorithms.pairs"
KL, RATIOS, GROUP = "upslope.algorithms.reference_kl", "upslope.algorithms.ratios", "upslope.algorithms.group_baseline"
ADVANTAGES, REINFORCE, PPO = "upslope.estimators.advantages", "upslope.algorithms.reinforce", "upslope.algorithms.ppo"

UNBIASED_GRPO, UNBIASED_RLOO = "GRPO: scale none, trajectory_sum; on-policy", "RLOO: as it comes; on-policy"
IN_REWARD = "RLOO: k1 in the reward; on-policy"
DEMONSTRATIONS = "test_every_update_of_demonstrations_is_its_formula"
LABELS, SCORES = "test_every_update_of_labels_is_its_formula", "test_every_update_of_scores_is_its_formula"
STEPS = "test_every_penalty_per_step_is_its_formula"


def groups(name: str) -> str:
    """The killer that writes out the update of this case."""
    return f"test_every_update_of_groups_is_its_formula[name={name}]"


def pairs(name: str) -> str:
    """The same of pairs."""
    return f"test_every_update_of_pairs_is_its_formula[name={name}]"


IN_GROUPS = (
    Mutant(
        "grpo downhill",
        GRPO,
        "per_step = -objective if kept is None else -objective * kept",
        "per_step = objective if kept is None else objective * kept",
        "the sign",
        (UNBIASED_GRPO,),
        (groups("grpo"),),
    ),
    Mutant(
        "grpo forgets its weights",
        GRPO,
        "per_step = -objective if kept is None else -objective * kept",
        "per_step = -objective",
        "importance weights and masks do nothing",
        (),
        (groups("grpo, truncated weights"),),
    ),
    Mutant(
        "grpo keeps what went too far",
        GRPO,
        "kept = (~((advantage > 0.0) & (risen > high) | (advantage < 0.0) & (risen < -low))).to(log_prob.dtype)",
        "kept = (~((advantage > 0.0) & (risen < -low) | (advantage < 0.0) & (risen > high))).to(log_prob.dtype)",
        "the sides of the mask are exchanged",
        (),
        (groups("grpo, dropped steps"),),
    ),
    Mutant(
        "grpo rewards a squared log-ratio",
        GRPO,
        "per_step = per_step + self.squared_log_ratio * (log_prob - anchor).square()",
        "per_step = per_step - self.squared_log_ratio * (log_prob - anchor).square()",
        "the sign of the penalty",
        (),
        (groups("grpo, dropped steps"),),
    ),
    Mutant(
        "grpo's anchor is what generated",
        GRPO,
        "anchor = log_prob.detach() if batch.proximal_log_prob is None else batch.proximal_log_prob",
        "anchor = batch.behaviour_log_prob",
        "the learner's own log-probs are not used",
        (),
        (groups("grpo, truncated weights"),),
    ),
    Mutant(
        "grpo rewards distance from the reference",
        GRPO,
        "per_step = per_step + penalty",
        "per_step = per_step - penalty",
        "the sign of the KL",
        ("GRPO: k2 in the loss; on-policy",),
        (groups("grpo, k2 in the loss"),),
    ),
    Mutant(
        "grpo penalises entropy",
        GRPO,
        "per_step = per_step - coefficient * evaluation.entropy",
        "per_step = per_step + coefficient * evaluation.entropy",
        "the sign of the bonus",
        (),
        (groups("grpo, exact KL"),),
    ),
    Mutant(
        "rloo downhill",
        RLOO,
        "per_step = -objective",
        "per_step = objective",
        "the sign",
        (UNBIASED_RLOO,),
        (groups("rloo"),),
    ),
    Mutant(
        "rloo takes the mean of all",
        RLOO,
        'trajectory, baseline="leave_one_out", scale="none"',
        'trajectory, baseline="mean", scale="none"',
        "(G - 1) / G of the direction",
        (UNBIASED_RLOO,),
        (groups("rloo"),),
    ),
    Mutant(
        "rloo averages over steps",
        RLOO,
        'reduced(batch, "trajectory_sum", None)',
        'reduced(batch, "trajectory_mean", None)',
        "long completions weigh less",
        (UNBIASED_RLOO,),
        (groups("rloo"),),
    ),
    Mutant(
        "the total of a group counts hidden rewards",
        GROUP,
        "return torch.where(counted, reward, 0.0).sum(-1)",
        "return torch.where(counted, reward, 0.5).sum(-1)",
        "positions that nobody chose are rewarded",
        (UNBIASED_RLOO,),
        (groups("rloo"),),
    ),
    Mutant(
        "a penalty after the baseline is not summed ahead",
        GROUP,
        "advantage = advantage + ahead",
        "advantage = advantage - reference_kl.of_reward(trajectory)",
        "a step sees its own penalty alone",
        ("RLOO: k1 in the reward, after the baseline; on-policy",),
        (groups("grpo, KL after the baseline"),),
    ),
    Mutant(
        "the scale of the others counts the lone one",
        ADVANTAGES,
        "spread = (squares.clamp(min=0.0) / (size - 2).clamp(min=1)).sqrt() + epsilon",
        "spread = (squares.clamp(min=0.0) / (size - 1).clamp(min=1)).sqrt() + epsilon",
        "ddof 0 of the others",
        (),
        (groups("grpo, means of steps"),),
    ),
    Mutant(
        "group_relative ignores its baseline",
        ADVANTAGES,
        "scaled = scaled * (sizes / (sizes - 1))[index]",
        "scaled = scaled * 1.0",
        "leave_one_out is the mean",
        ("GRPO: leave one out; on-policy",),
        (groups("grpo, sums"),),
    ),
)

IN_RATIOS = (
    Mutant(
        "a sum over a sequence is not shared out",
        RATIOS,
        'return objective / mask.sum(-1, keepdim=True).clamp(min=1) if level == "sequence_sum" else objective',
        "return objective",
        "long completions count more",
        ("RLOO: ratio of sequence sums, no clip; on-policy",),
        (groups("rloo, ratio of sums"),),
    ),
    Mutant(
        "the mean ratio is the sum",
        RATIOS,
        'length_normalised=level == "sequence")',
        "length_normalised=False)",
        "GSPO's ratio is not normalised by length",
        (),
        (groups("grpo, ratio of sequences"),),
    ),
    Mutant(
        "beyond the cap is the cap",
        RATIOS,
        'return weight.clamp(max=cap) if correction == "truncate" else weight.masked_fill(weight > cap, 0.0)',
        "return weight.clamp(max=cap)",
        "masking is truncation",
        (),
        (groups("grpo, masked weights"),),
    ),
    Mutant(
        "a constant length of one more",
        RATIOS,
        "return fixed_length(mask, length, dtype=dtype)",
        "return fixed_length(mask, length + 1, dtype=dtype)",
        "off by one",
        ("GRPO: Dr. GRPO, L = 2; on-policy",),
        (groups("grpo, constant length"),),
    ),
)

IN_PENALTIES = (
    Mutant(
        "the reward is not penalised",
        KL,
        "return replace(trajectory, reward=trajectory.reward - self.of_reward(trajectory))",
        "return trajectory",
        "the KL in the reward does nothing",
        (IN_REWARD,),
        (groups("rloo, KL"),),
    ),
    Mutant(
        "the right estimate is k3",
        KL,
        'return "k2" if self.place == "loss" else "k1"',
        'return "k3" if self.place == "loss" else "k1"',
        "the forward KL by default",
        ("GRPO: k2 in the loss; on-policy",),
        (groups("grpo, k2 in the loss"),),
    ),
    Mutant(
        "the exact KL the other way",
        KL,
        "return self.coefficient * evaluation.distribution.kl(batch.reference_distribution)",
        "return self.coefficient * batch.reference_distribution.kl(evaluation.distribution)",
        "KL(ref || pi)",
        ("RLOO: exact KL in the loss; on-policy",),
        (groups("grpo, exact KL"),),
    ),
    Mutant(
        "a penalty without its coefficient",
        KL,
        "return self.coefficient * _ESTIMATES[self.estimate](log_prob, reference)",
        "return _ESTIMATES[self.estimate](log_prob, reference)",
        "beta is 1",
        ("RLOO: k2 in the loss; on-policy",),
        (groups("grpo, k2 in the loss"),),
    ),
    Mutant(
        "reinforce leaves out its reference",
        REINFORCE,
        "trajectory = self.reference_kl.rewarded(trajectory)",
        "trajectory = trajectory",
        "the reward is not penalised",
        ("Reinforce: reward_to_go, k1 in the reward; perturbed critic, on-policy",),
        (STEPS,),
    ),
    Mutant(
        "ppo leaves out its reference",
        PPO,
        "trajectory = self.reference_kl.rewarded(trajectory)",
        "trajectory = trajectory",
        "the reward is not penalised",
        (),
        (STEPS,),
    ),
    Mutant(
        "ppo rewards distance from the reference",
        PPO,
        "per_step = per_step if penalty is None else per_step + penalty",
        "per_step = per_step if penalty is None else per_step - penalty",
        "the sign of the KL in the loss",
        (),
        (STEPS,),
    ),
)

IN_GIVEN_DATA = (
    Mutant(
        "sft unlearns",
        SFT,
        "value = weighted_sum(negative_log_likelihood(log_prob), batch.weight)",
        "value = -weighted_sum(negative_log_likelihood(log_prob), batch.weight)",
        "the sign",
        ("SFT: trajectory_sum, completions of the reference",),
        (DEMONSTRATIONS,),
    ),
    Mutant(
        "sft knows one reduction",
        SFT,
        "weight=reduced(batch, self.reduction, None)",
        'weight=reduced(batch, "step_mean", None)',
        "the mean over steps for every choice",
        ("SFT: trajectory_sum, completions of the reference",),
        (DEMONSTRATIONS,),
    ),
    Mutant(
        "the pair the other way round",
        PREFERENCE,
        "chosen, rejected = score[0::2], score[1::2]",
        "rejected, chosen = score[0::2], score[1::2]",
        "what was rejected is preferred",
        ("Preference: sigmoid, expected update",),
        (pairs("sigmoid"),),
    ),
    Mutant(
        "dpo of mean log-ratios",
        PREFERENCE,
        "batch.reference_log_prob, batch.mask, length_normalised=False)",
        "batch.reference_log_prob, batch.mask, length_normalised=True)",
        "the log-ratio is divided by the length",
        ("Preference: sigmoid, expected update",),
        (pairs("sigmoid"),),
    ),
    Mutant(
        "the likelihood of the rejected",
        PREFERENCE,
        "negative_log_likelihood(likely[0::2])",
        "negative_log_likelihood(likely[1::2])",
        "the NLL term is of the wrong answer",
        (),
        (pairs("cdpo"),),
    ),
    Mutant(
        "label smoothing does nothing",
        PREFERENCE,
        "return dpo_sigmoid(chosen, rejected, beta=beta, label_smoothing=self.label_smoothing)",
        "return dpo_sigmoid(chosen, rejected, beta=beta)",
        "cDPO is DPO",
        (),
        (pairs("cdpo"),),
    ),
    Mutant(
        "a pair weighs as a row",
        PAIRS,
        "return row_weight(batch).view(-1, 2).sum(-1)",
        "return row_weight(batch).view(-1, 2).mean(-1)",
        "half the gradient",
        ("Preference: sigmoid, expected update",),
        (pairs("sigmoid"), SCORES),
    ),
    Mutant(
        "kto's point is that of the piece",
        KTO,
        "point = batch.reference_point.flatten()[0]",
        "point = self._log_ratio(log_prob.detach(), batch).mean()",
        "z changes with the split",
        (),
        (LABELS,),
    ),
    Mutant(
        "kto's point may be negative",
        KTO,
        "point = self._log_ratio(batch.proximal_log_prob, batch).mean().clamp(min=0.0)",
        "point = 0.5 * self._log_ratio(batch.proximal_log_prob, batch).mean()",
        "z is another number",
        ("KTO: single answers, z = max(0, d)",),
        (LABELS,),
    ),
    Mutant(
        "kto takes all for desirable",
        KTO,
        "(batch.advantage > 0.0).any(-1)",
        "(batch.advantage != 0.0).any(-1)",
        "labels are not read",
        ("KTO: single answers, z = max(0, d)",),
        (LABELS,),
    ),
    Mutant(
        "a reward model scores the first step",
        REWARD_MODEL,
        "last = (batch.mask * position).amax(-1, keepdim=True)",
        "last = 0 * (batch.mask * position).amax(-1, keepdim=True)",
        "V of another prefix",
        ("RewardModel: expected update of the scores",),
        (SCORES,),
    ),
    Mutant(
        "a reward model wants the rejected",
        REWARD_MODEL,
        "each = -logsigmoid(chosen - rejected - self.margin)",
        "each = -logsigmoid(rejected - chosen - self.margin)",
        "the sign",
        ("RewardModel: expected update of the scores",),
        (SCORES,),
    ),
)

SEQUENCES = IN_GROUPS + IN_RATIOS + IN_PENALTIES + IN_GIVEN_DATA

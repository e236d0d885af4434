"""Slips in the masks of valid actions."""

from __future__ import annotations

from harness import Mutant

MASKING = "upslope.policies.masking"
ALONE = "test_masked_is_a_distribution_over_the_valid_choices_alone"
SAMPLED = "test_the_sampler_masks_as_the_policy_does_and_takes_valid_choices_alone"
EMPTY = "test_a_choice_without_a_valid_value_masks_nothing_and_leaves_the_others"
ROWS = ("Reinforce: valid actions only: reward_to_go", "PPO: valid actions only: clip", "Masking")

MASKS = (
    Mutant(
        "invalid actions are unlikely, not impossible",
        MASKING,
        "torch.cat(parts, -1)), -torch.inf)",
        "torch.cat(parts, -1)), -1.0)",
        "invalid actions keep a probability",
        ROWS,
        (ALONE,),
    ),
    Mutant(
        "updates forget the mask",
        MASKING,
        "parts = [part | ~part.any(-1, keepdim=True) for part in mask.split(self.sizes, -1)]",
        "parts = [part | True for part in mask.split(self.sizes, -1)]",
        "the gradient is that of all actions",
        ROWS,
        (ALONE,),
    ),
    Mutant(
        "an empty choice is empty everywhere",
        MASKING,
        "parts = [part | ~part.any(-1, keepdim=True)",
        "parts = [part | ~mask.any(-1, keepdim=True)",
        "a choice without a valid value has no probabilities at all",
        (),
        (EMPTY,),
    ),
    Mutant(
        "the sampler forgets the mask",
        MASKING,
        "-np.inf, where=invalid)",
        "-np.inf, where=invalid & False)",
        "invalid actions are sampled",
        (),
        (SAMPLED,),
    ),
    Mutant(
        "the sampler masks the first choice alone",
        MASKING,
        "            begin += size",
        "            begin += 0",
        "masks of later choices fall on the first",
        (),
        (SAMPLED,),
    ),
    Mutant(
        "valid and invalid change places in the sampler",
        MASKING,
        "invalid = ~part",
        "invalid = part.copy()",
        "only invalid actions are sampled",
        (),
        (SAMPLED,),
    ),
)

"""Slips in potential-based shaping, in bonuses that fall over the run, and in an agent's distance from a reference."""

from __future__ import annotations

from harness import Mutant

SHAPING, PROTOCOL = "upslope.estimators.shaping", "upslope.algorithms.protocol"
KL = "upslope.algorithms.reference_kl"
ACTOR_CRITIC, PPO = "upslope.algorithms.actor_critic", "upslope.algorithms.ppo"
REINFORCE, GRPO, RLOO = "upslope.algorithms.reinforce", "upslope.algorithms.grpo", "upslope.algorithms.rloo"

SUBJECT = "potential_shaping"
RETURNS = "test_shaping_takes_the_potential_off_every_return"
ADVANTAGES = "test_advantages_are_the_same_with_a_critic_less_the_potential"
UNREAD = "test_steps_that_nobody_chose_and_states_after_the_end_are_not_read"
FALLS = "test_a_bonus_falls_as_it_is_scheduled[name={}]"
PENALTY = "test_every_penalty_per_step_is_its_formula[name={}]"
COEFFICIENT = "coefficient = scheduled(self.entropy_schedule, self.entropy_coefficient, now.progress)"
CONSTANT = "coefficient = self.entropy_coefficient"

SHAPED = (
    Mutant(
        "shaping the wrong way round",
        SHAPING,
        "return discount * torch.where(discount > 0, next_potential, 0.0) - potential",
        "return potential - discount * torch.where(discount > 0, next_potential, 0.0)",
        "the sign of F",
        (SUBJECT,),
        (ADVANTAGES,),
    ),
    Mutant(
        "shaping without the discount",
        SHAPING,
        "return discount * torch.where(discount > 0, next_potential, 0.0) - potential",
        "return torch.where(discount > 0, next_potential, 0.0) - potential",
        "F = Phi' - Phi does not cancel where gamma is not 1",
        (SUBJECT,),
        (),
    ),
    Mutant(
        "potential after the end",
        SHAPING,
        "return discount * torch.where(discount > 0, next_potential, 0.0) - potential",
        "return torch.where(discount > 0, discount, 1.0) * next_potential - potential",
        "Phi of a terminal state counts, and the best actions change",
        (SUBJECT,),
        (),
    ),
    Mutant(
        "shaping of skipped steps without the discount",
        SHAPING,
        "return (discount * following - potential).masked_fill(~mask, 0.0)",
        "return (following - potential).masked_fill(~mask, 0.0)",
        "F = Phi' - Phi where steps are skipped",
        (),
        (RETURNS, ADVANTAGES),
    ),
    Mutant(
        "shaping reads what nobody chose",
        SHAPING,
        "return (discount * following - potential).masked_fill(~mask, 0.0)",
        "return discount * following - potential",
        "skipped positions have a reward of their own",
        (),
        (UNREAD,),
    ),
    Mutant(
        "shaping looks one position ahead",
        SHAPING,
        "_, following = skip_unchosen(mask, discount, next_potential, cut)",
        "following = torch.where(discount > 0, next_potential, 0.0)",
        "the next position instead of the next chosen step",
        (),
        (RETURNS, ADVANTAGES),
    ),
)

SCHEDULES = (
    *(
        Mutant(
            f"{name} keeps its bonus",
            module,
            COEFFICIENT,
            CONSTANT,
            "the schedule does nothing",
            (),
            (FALLS.format(name),),
        )
        for name, module in (("ppo", PPO), ("reinforce", REINFORCE), ("grpo", GRPO), ("rloo", RLOO))
    ),
    Mutant(
        "a straight line that rises",
        PROTOCOL,
        "return initial * remaining",
        "return initial * (1.0 - remaining)",
        "coefficients grow over the run",
        (),
        (FALLS.format("a2c"), FALLS.format("one step")),
    ),
)

REFERENCES = (
    Mutant(
        "a2c has no penalty in its reward",
        ACTOR_CRITIC,
        "trajectory = self.reference_kl.rewarded(trajectory)",
        "pass",
        "the penalty in the reward is left out",
        (),
        (PENALTY.format("reward k1"),),
    ),
    Mutant(
        "a2c has no penalty in its loss",
        ACTOR_CRITIC,
        "return self.reference_kl.added(loss, batch, evaluation)",
        "return loss",
        "the penalty in the loss is left out",
        (),
        (PENALTY.format("loss k2"), PENALTY.format("loss exact")),
    ),
    Mutant(
        "a penalty that draws away",
        KL,
        "value = loss.value if penalty is None else loss.value + weighted_sum(penalty, batch.weight)",
        "value = loss.value if penalty is None else loss.value - weighted_sum(penalty, batch.weight)",
        "the sign of the penalty in the loss",
        (),
        (PENALTY.format("loss k2"), PENALTY.format("loss exact")),
    ),
)

FINE_TUNING: tuple[Mutant, ...] = (*SHAPED, *SCHEDULES, *REFERENCES)

"""Slips in the natural step, its closed-form products and the surrogate that it climbs."""

from __future__ import annotations

from harness import Mutant

STEP, PRODUCT, SURROGATE = "upslope.train.natural", "upslope.policies.fused_fisher", "upslope.algorithms.surrogate"

TABLE, NETWORK = "TRPO: one step of a table", "TRPO: one step of a network, from"
GAUSSIAN = "TRPO: one step of a Gaussian network"
FAR, REFUSED = "TRPO: a table: as far as the bound lets it", "TRPO: refused"
DIRECTION = "TRPO: direction from all batches, without damping"
UPHILL = "TRPO: GAE, lambda 0.95; exact critic, on-policy"
TO_GO = "TRPO: reward to go; perturbed critic, on-policy"
GROUP = "TRPO: group, completions; perturbed critic, on-policy"

IN_STEP = (
    Mutant(
        "the bound is on KL(new || old)",
        STEP,
        "self._old[number].kl(distribution)",
        "distribution.kl(self._old[number])",
        "curvature is the same, but the step may go further than it says",
        (TABLE, FAR),
    ),
    Mutant(
        "damping subtracted",
        STEP,
        "product(vector) + settings.damping * vector",
        "product(vector) - settings.damping * vector",
        "flat directions become steep ones downhill",
        (TABLE, NETWORK),
    ),
    Mutant(
        "a line search that forgets the KL",
        STEP,
        "max_divergence=settings.max_divergence,\n                backtrack",
        "max_divergence=1e9,\n                backtrack",
        "any step that looks better is taken",
        (FAR,),
    ),
    Mutant(
        "a line search that forgets the surrogate",
        STEP,
        "objective=self._before,",
        "objective=float('-inf'),",
        "a step that makes things worse is taken",
        (REFUSED,),
    ),
    Mutant(
        "a refused step is not undone",
        STEP,
        "            self._put(found.parameters)\n",
        "            self._put(found.parameters if found.fraction else start + step)\n",
        "the parameters stay at an attempt",
        (REFUSED,),
    ),
    Mutant(
        "log_std left out",
        STEP,
        "of_actor = [gradient is not None for gradient in found]",
        "of_actor = [gradient is not None and gradient.shape != (2,) for gradient in found]",
        "exploration never shrinks",
        (GAUSSIAN,),
    ),
    Mutant(
        "downhill",
        STEP,
        "gradient = -flatten(",
        "gradient = flatten(",
        "the loss is climbed",
        (TABLE, NETWORK),
    ),
    Mutant(
        "KL summed over steps",
        STEP,
        ".sum() / self._steps",
        ".sum()",
        "the bound is tighter the more data there is",
        (TABLE,),
    ),
    Mutant(
        "the length from the damped matrix",
        STEP,
        "image = product(direction)",
        "image = product(direction) + settings.damping * direction",
        "steps shorter than the bound lets them be",
        (TABLE, NETWORK),
    ),
    Mutant(
        "a fixed step size is scaled as well",
        STEP,
        "length = settings.step_size\n",
        "length = settings.step_size and 2.0 * settings.step_size\n",
        "another step size than the one set",
        ("NPG: a fixed step size",),
    ),
)

IN_PRODUCT = (
    Mutant(
        "products without the slope of activations",
        PRODUCT,
        "                raised *= layer.slope\n",
        "                raised = raised * 1.0\n",
        "the Jacobian of another network",
        (NETWORK,),
    ),
    Mutant(
        "biases do not count in J v",
        PRODUCT,
        "            raised += tensors[2 * number + 1]\n",
        "            raised += 0.0 * tensors[2 * number + 1]\n",
        "no curvature along biases",
        (NETWORK,),
    ),
    Mutant(
        "the constant outputs do not count",
        PRODUCT,
        "constant = np.broadcast_to(tensors[-1], ",
        "constant = np.broadcast_to(0.0 * tensors[-1], ",
        "no curvature along log_std",
        (GAUSSIAN,),
    ),
    Mutant(
        "the sum over steps in place of the mean",
        PRODUCT,
        "Metric(chosen, 1.0 / steps)",
        "Metric(chosen, 1.0)",
        "damping fades with the size of the batch",
        (NETWORK,),
    ),
)

IN_SURROGATE = (
    Mutant(
        "the bonus is a penalty",
        SURROGATE,
        "per_step = per_step - coefficient * evaluation.entropy",
        "per_step = per_step + coefficient * evaluation.entropy",
        "the policy becomes sure of itself",
        ("TRPO: the loss, by hand",),
    ),
    Mutant(
        "the bonus never fades",
        SURROGATE,
        "scheduled(self.entropy_schedule, self.entropy_coefficient, now.progress)",
        "self.entropy_coefficient",
        "a schedule that is not followed",
        ("TRPO: the loss, by hand",),
    ),
    Mutant(
        "the surrogate upside down",
        SURROGATE,
        "per_step, coefficient = -objective, ",
        "per_step, coefficient = objective, ",
        "down the gradient",
        (UPHILL, TO_GO),
    ),
    Mutant(
        "episodes averaged by step",
        SURROGATE,
        'step_mean if self.psi == "gae" else trajectory_sum',
        "step_mean",
        "steps of long episodes weigh less",
        (TO_GO,),
    ),
    Mutant(
        "the group's mean has the row itself in it",
        SURROGATE,
        'baseline="leave_one_out"',
        'baseline="mean"',
        "(G - 1) / G of the gradient",
        (GROUP,),
    ),
)

IN_ALGORITHMS = (
    Mutant(
        "TRPO with twice its bound",
        "upslope.algorithms.trpo",
        "                max_divergence=self.max_divergence,\n",
        "                max_divergence=2.0 * self.max_divergence,\n",
        "steps of twice the KL",
        (TABLE, FAR),
    ),
    Mutant(
        "NPG without its damping",
        "upslope.algorithms.npg",
        "                damping=self.damping,\n",
        "                damping=0.0 * self.damping,\n",
        "long steps along flat directions",
        ("NPG: one step of a table",),
    ),
)

NATURAL = (*IN_STEP, *IN_PRODUCT, *IN_SURROGATE, *IN_ALGORITHMS)

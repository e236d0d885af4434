"""Rows of what learns from groups of completions and stays near a reference: each held against its own declaration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Literal

from upslope.algorithms import A2C, GRPO, PPO, RLOO, Algorithm, ReferenceKL, Reinforce
from upslope.auditing.audit import audit
from upslope.auditing.cases.case import Case
from upslope.auditing.declared import Circumstances

_BETA = 0.3
_FEW = 4_000
_STALE = Circumstances(behaviour="stale")
_SUMS = GRPO(scale="none", reduction="trajectory_sum")


def cases() -> Iterator[Case]:
    """All rows."""
    yield from _leave_one_out()
    yield from _group_relative()
    yield from _biased_by_choice()
    yield from _penalties()
    yield from _steps_and_critics()


def _leave_one_out() -> Iterator[Case]:
    summed = RLOO(ratio="sequence_sum")
    yield _case("as it comes", RLOO(), problem="tokens")
    yield _case("as it comes", RLOO(), given=_STALE)
    yield _case("G = 3", RLOO(), size=3)
    yield _case("2 groups of 2", RLOO(), groups=2)
    yield _case("as it comes, sampled", RLOO(), samples=_FEW)
    yield _case("ratio of sequence sums, no clip", summed)
    yield _case("ratio of sequence sums, no clip", summed, problem="tokens", given=_STALE)
    clipped = replace(summed, clip_low=0.1, clip_high=0.1)
    yield _case("ratio of sequence sums, clipped at 0.1", clipped)
    yield _case("ratio of sequence sums, clipped at 0.1", clipped, given=_STALE)
    yield _case("ratio per step", RLOO(ratio="step"))
    yield _case("ratio per step", RLOO(ratio="step"), given=_STALE)
    yield _case("ratio of sequence means", RLOO(ratio="sequence"))


def _group_relative() -> Iterator[Case]:
    """Choices that keep the direction."""
    yield _case("scale none, trajectory_sum", _SUMS, problem="tokens")
    yield _case("scale none, trajectory_sum", _SUMS, given=_STALE)
    for words, algorithm in (
        ("G = 3", _SUMS),
        ("leave one out", replace(_SUMS, baseline="leave_one_out")),
        ("Dr. GRPO, L = 2", GRPO(scale="none", reduction="fixed_length", fixed_length=2)),
        ("ratio of sequence means (GSPO)", replace(_SUMS, ratio="sequence")),
        ("ratio of sequence sums", replace(_SUMS, ratio="sequence_sum")),
        ("clipped weights (CISPO)", replace(_SUMS, clip_shape="weight")),
        ("dual clip", replace(_SUMS, dual_clip=3.0)),
        ("probability mask, squared log-ratio", _dppo()),
        ("importance weights capped at 2", replace(_SUMS, importance_cap=2.0)),
    ):
        yield _case(words, algorithm, size=3 if words == "G = 3" else 2)
    loose = replace(_SUMS, ratio="sequence_sum", clip_low=None, clip_high=None)
    yield _case("ratio of sequence sums, no clip", loose, given=_STALE)
    yield _case("importance weights capped at 1.05", replace(_SUMS, importance_cap=1.05), given=_STALE)
    passes = replace(_SUMS, epochs=2, minibatches=2)
    yield _case("2 passes of 2 minibatches", passes, samples=_FEW)


def _dppo() -> GRPO:
    mask = replace(_SUMS, clip_low=None, clip_high=None, probability_low=0.2, probability_high=0.2)
    return replace(mask, squared_log_ratio=1e-3)


def _biased_by_choice() -> Iterator[Case]:
    """What the algorithm itself says bends the direction."""
    yield _case("as it comes", GRPO())
    yield _case("as it comes", GRPO(), problem="tokens")
    yield _case("scale group, trajectory_sum, G = 4", replace(_SUMS, scale="group"), size=4)
    yield _case("scale batch, trajectory_sum, 2 groups of 2", replace(_SUMS, scale="batch"), groups=2)
    others = replace(_SUMS, baseline="leave_one_out", scale="leave_one_out")
    yield _case("scale of the others, trajectory_sum, G = 3", others, size=3)
    yield _case("scale none, trajectory_mean", GRPO(scale="none"))
    yield _case("scale none, step_mean", GRPO(scale="none", reduction="step_mean"))
    yield _case("advantage clipped at 0.2", replace(_SUMS, advantage_clip=0.2), problem="tokens")
    yield _case("entropy bonus", replace(_SUMS, entropy_coefficient=0.1))
    yield _case("entropy bonus", RLOO(entropy_coefficient=0.1))


_WRONG: tuple[tuple[Literal["loss", "reward"], Literal["k1", "k2", "k3"]], ...] = (
    ("loss", "k1"),
    ("loss", "k3"),
    ("reward", "k2"),
    ("reward", "k3"),
)
_AT_STEPS: tuple[tuple[Literal["loss", "reward"], Literal["k1", "k2", "k3", "exact"]], ...] = (
    ("reward", "k1"),
    ("loss", "k2"),
    ("loss", "exact"),
    ("loss", "k3"),
)


def _penalties() -> Iterator[Case]:
    """KL to a reference in the reward and in the loss, by every estimate."""
    after = replace(_kl("reward"), baselined=False)
    for kind in (RLOO(), _SUMS):
        yield _case("k1 in the reward", replace(kind, reference_kl=_kl("reward")), problem="tokens")
        yield _case("k1 in the reward", replace(kind, reference_kl=_kl("reward")), given=_STALE)
        yield _case("k1 in the reward, after the baseline", replace(kind, reference_kl=after))
        yield _case("k2 in the loss", replace(kind, reference_kl=_kl("loss")), problem="tokens")
        yield _case("exact KL in the loss", replace(kind, reference_kl=_kl("loss", "exact")))
        for place, estimator in _WRONG:
            wrong = replace(kind, reference_kl=_kl(place, estimator))
            yield _case(f"{estimator} in the {place}", wrong)


def _steps_and_critics() -> Iterator[Case]:
    """A penalty at each step of single completions."""
    for place, estimator in _AT_STEPS:
        plain = Reinforce(gamma=1.0, reference_kl=_kl(place, estimator))
        words = f"{estimator} in the {place}"
        yield _case(f"reward_to_go, {words}", plain, given=Circumstances(critic="perturbed"))
        if place == "reward":
            yield _case(f"reward_to_go, {words}", plain, given=Circumstances(critic="perturbed", behaviour="stale"))
            for critic in (replace(plain, psi="advantage", gae_lambda=0.5), replace(plain, psi="td_residual")):
                yield _case(f"{critic.psi}, {words}", critic, problem="tokens")
                yield _case(f"{critic.psi}, {words}", critic, given=Circumstances(critic="perturbed"))
        proximal = PPO(gamma=1.0, normalize_advantage=False, epochs=1, minibatches=1)
        for averaged in (proximal, A2C(gamma=1.0)):
            yield _case(f"one completion a batch, {words}", replace(averaged, reference_kl=_kl(place, estimator)))


def _kl(place: Literal["loss", "reward"], estimator: Literal["k1", "k2", "k3", "exact"] | None = None) -> ReferenceKL:
    return ReferenceKL(coefficient=_BETA, place=place, estimator=estimator)


def _case(
    words: str,
    algorithm: Algorithm,
    *,
    problem: str = "tokens-binary",
    given: Circumstances | None = None,
    size: int = 2,
    groups: int = 1,
    samples: int | None = None,
) -> Case:
    circumstances = given or Circumstances()
    run = partial(
        audit,
        algorithm,
        problem,
        circumstances=circumstances,
        samples=samples,
        size=size if algorithm.passes.groups else 1,
        groups=groups,
        rows=4,
    )
    acted = "another policy acted" if circumstances.behaviour == "stale" else "on-policy"
    setting = f"{words}; {acted}" if algorithm.passes.groups else f"{words}; {circumstances}"
    return Case(subject=type(algorithm).__name__, setting=setting, run=run)

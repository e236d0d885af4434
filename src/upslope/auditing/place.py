"""Where a loss of the user's own is audited: a problem by name, one of the user's own, or a setting."""

from __future__ import annotations

from typing import TypeAlias

from upslope.auditing.candidates import episodes_end
from upslope.auditing.setting import FiniteSetting
from upslope.auditing.tokens import TokenSetting
from upslope.errors import UsageError
from upslope.exact import PROBLEMS, TOKEN_PROBLEMS, FiniteMDP, NamedProblem, TokenMDP
from upslope.exact._named import random_table

Problem: TypeAlias = str | TokenMDP | NamedProblem | FiniteMDP | TokenSetting | FiniteSetting
"""A name, a problem of one's own, or that with a policy on it."""


def setting_of(problem: Problem, size: int, gamma: float | None, seed: int) -> TokenSetting | FiniteSetting:
    """The setting of a name, of a problem of one's own with a random policy, or as it is.

    Args:
        problem: what there is.
        size: completions in a group, unless it is a setting.
        gamma: discount of a control problem; its own if None.
        seed: of the policy's parameters, unless it is a setting.

    Raises:
        UsageError: if there is no such problem, its episodes do not end, or gamma does not go with it.
    """
    if isinstance(problem, TokenSetting | FiniteSetting):
        if gamma is not None:
            raise UsageError("a setting has its own discount: give gamma to FiniteSetting.build instead")
        setting = problem
    elif isinstance(problem, TokenMDP) or (isinstance(problem, str) and problem in TOKEN_PROBLEMS):
        if gamma not in (None, 1.0):
            raise UsageError(f"completions have no discount: leave gamma out (it is {gamma})")
        setting = TokenSetting.build(problem, name="your problem", size=size, seed=seed)
    else:
        named = _named(problem)
        _check_it_ends(named.name, named.mdp)
        discount = named.mdp.gamma if gamma is None else gamma
        setting = FiniteSetting.build(named, gamma=discount, unit="episodes", seed=seed)
    if isinstance(setting, FiniteSetting):
        _check_it_ends(setting.name, setting.mdp)
        if setting.limit is None and not episodes_end(setting):
            raise UsageError(
                f"episodes of {setting.name} need not end: give them a time limit, FiniteSetting.build(..., limit=20)"
            )
    return setting


def _check_it_ends(name: str, mdp: FiniteMDP) -> None:
    if mdp.kind == "continuing":
        raise UsageError(f"{name} goes on without end, and a loss is audited on whole episodes: choose another problem")


def _named(problem: str | NamedProblem | FiniteMDP) -> NamedProblem:
    if isinstance(problem, NamedProblem):
        return problem
    if isinstance(problem, FiniteMDP):
        return NamedProblem(
            name="your problem",
            summary="",
            mdp=problem,
            policy=random_table(int(problem.observation.max()) + 1, problem.actions),
        )
    if not isinstance(problem, str):
        raise UsageError(
            f"{problem!r:.80} is no problem: give a name, a FiniteMDP, a TokenMDP, a NamedProblem, a FiniteSetting or "
            "a TokenSetting"
        )
    if problem not in PROBLEMS:
        raise UsageError(f"there is no problem {problem!r}; there are: {', '.join((*TOKEN_PROBLEMS, *PROBLEMS))}")
    return PROBLEMS[problem]()

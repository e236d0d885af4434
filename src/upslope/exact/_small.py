"""Problems made for auditing: no symmetry, each with one difficulty."""

from __future__ import annotations

from upslope.exact._named import NamedProblem, random_table
from upslope.exact.finite import FiniteMDP


def bandit() -> NamedProblem:
    """One decision, random rewards."""
    mean, spread = (1.0, 0.2, -0.5, 0.6), (1.0, 0.3, 2.0, 0.0)
    nothing = [[0.0, 0.0], [0.0, 0.0]]
    value = [[m - d, m + d] for m, d in zip(mean, spread, strict=True)]
    return NamedProblem(
        name="bandit",
        summary="one state, four actions, each with two equally likely rewards",
        mdp=FiniteMDP.from_tables(
            [[[0.0, 1.0]] * 4] * 2,
            [list(mean), [0.0] * 4],
            terminal=[1],
            reward_value=[[[[m, m], pair] for m, pair in zip(mean, value, strict=True)], [nothing] * 4],
            reward_probability=[[[[0.5, 0.5]] * 2] * 4] * 2,
        ),
        policy=random_table(2, 4),
        published={f"value of action {action}": m for action, m in enumerate(mean)},
        source="worked out by hand",
    )


def two_state() -> NamedProblem:
    """Stay or go, twice."""
    return NamedProblem(
        name="two-state",
        summary="two states and an end: the first leads to the second or out, the second out or back; gamma 0.9",
        mdp=FiniteMDP.from_tables(
            [
                [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
                [[0.0, 0.0, 1.0], [0.5, 0.0, 0.5]],
                [[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]],
            ],
            [[1.0, 0.5], [-1.0, 2.0], [0.0, 0.0]],
            terminal=[2],
            gamma=0.9,
        ),
        policy=random_table(3, 2),
        published={"value of the start under the even policy": (0.75 + 0.45 * 0.5) / (1 - 0.45 * 0.225)},
        source="worked out by hand: v0 = 0.75 + 0.45 v1, v1 = 0.5 + 0.225 v0",
    )


def six_state() -> NamedProblem:
    """Three to four layers, stochastic, with two starts and ragged lengths."""
    end = 6
    follows = {
        (0, 0): {1: 0.7, 2: 0.3},
        (0, 1): {1: 0.2, 2: 0.8},
        (1, 0): {3: 0.6, 4: 0.4},
        (1, 1): {4: 0.5, end: 0.5},
        (2, 0): {3: 0.1, 4: 0.9},
        (2, 1): {3: 0.75, 4: 0.25},
        (3, 0): {5: 0.5, end: 0.5},
        (3, 1): {5: 0.9, end: 0.1},
        (4, 0): {5: 0.2, end: 0.8},
        (4, 1): {3: 0.35, end: 0.65},
        (5, 0): {end: 1.0},
        (5, 1): {end: 1.0},
    }
    gain = [[0.3, -0.2], [1.0, -0.7], [0.1, 0.9], [-1.3, 0.4], [0.8, 0.25], [2.0, -1.0], [0.0, 0.0]]
    return NamedProblem(
        name="six-state",
        summary="six states in layers, two starts, stochastic, episodes of 1 to 5 steps; gamma 0.8",
        mdp=_from_links(follows, gain, start=[0.7, 0.3, 0, 0, 0, 0, 0], terminal=[end], gamma=0.8),
        policy=random_table(7, 2),
    )


def loops() -> NamedProblem:
    """Episodes that may come back to where they were."""
    return NamedProblem(
        name="loops",
        summary="three states that lead back to each other, and an end; episodes of any length; gamma 0.9",
        mdp=_loops(0.9),
        policy=random_table(4, 2),
    )


def time_limit() -> NamedProblem:
    """The same, cut after four steps."""
    return NamedProblem(
        name="time-limit",
        summary="the states of loops, longer lasting and with more to gain later, truncated after 4 steps; gamma 0.95",
        mdp=_loops(0.95, end=0.15, late=3.0),
        policy=random_table(4, 2),
        limit=4,
    )


def noisy_rewards() -> NamedProblem:
    """Rewards that are random given the transition."""
    transition = [
        [[0.0, 0.8, 0.2, 0.0], [0.0, 0.3, 0.7, 0.0]],
        [[0.0, 0.0, 0.4, 0.6], [0.0, 0.0, 0.0, 1.0]],
        [[0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0]],
        [[0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0]],
    ]
    base = [[0.5, -0.5], [1.5, 0.0], [-1.0, 0.7], [0.0, 0.0]]
    value = [[[[b - 2.0, b, b + 1.0]] * 4 for b in row] for row in base]
    share = [0.25, 0.25, 0.5]
    return NamedProblem(
        name="noisy-rewards",
        summary="three states in layers; every reward has three values around its mean; gamma 0.9",
        mdp=FiniteMDP.from_tables(
            transition,
            base,
            terminal=[3],
            gamma=0.9,
            reward_value=value,
            reward_probability=[[[share] * 4] * 2] * 4,
        ),
        policy=random_table(4, 2),
    )


def ring() -> NamedProblem:
    """Five states in a circle, walked for ever."""
    states, slip = 5, 0.2
    follows = {
        (s, a): {(s + (1 if a == 0 else -1)) % states: 1.0 - slip, s: slip} for s in range(states) for a in range(2)
    }
    gain = [[0.0, 0.5], [1.0, -0.3], [0.2, 0.0], [-1.0, 2.0], [0.4, -0.6]]
    return NamedProblem(
        name="ring",
        summary="five states in a circle, forward or back with slips, for ever; average reward",
        mdp=_from_links(follows, gain, start=[1.0, 0, 0, 0, 0], continuing=True),
        policy=random_table(5, 2),
    )


def two_state_continuing() -> NamedProblem:
    """Stay or change, for ever."""
    return NamedProblem(
        name="two-state-continuing",
        summary="stay or change between two states for ever, reward 1 in the second; average reward",
        mdp=_from_links(
            {(0, 0): {0: 1.0}, (0, 1): {1: 1.0}, (1, 0): {1: 1.0}, (1, 1): {0: 1.0}},
            [[0.0, 0.0], [1.0, 1.0]],
            start=[1.0, 0.0],
            continuing=True,
        ),
        policy=random_table(2, 2),
        published={"average reward of the even policy": 0.5},
        source="by hand: changing with probability x in the first and y in the second, r_bar = x / (x + y)",
    )


def _loops(gamma: float, *, end: float = 0.4, late: float = 1.0) -> FiniteMDP:
    follows = {
        (0, 0): {1: 0.9, 0: 0.1},
        (0, 1): {2: 0.6, 1: 0.4},
        (1, 0): {0: 0.5, 2: 0.5},
        (1, 1): {2: 0.8, 1: 0.2},
        (2, 0): {0: 1.0 - end, 3: end},
        (2, 1): {1: 0.5 - end / 2, 3: 0.5 + end / 2},
    }
    gain = [[0.1, -0.2], [0.4, 0.0], [late, 0.5 * late], [0.0, 0.0]]
    return _from_links(follows, gain, start=[0.8, 0.2, 0.0, 0.0], terminal=[3], gamma=gamma)


def _from_links(
    follows: dict[tuple[int, int], dict[int, float]],
    gain: list[list[float]],
    *,
    start: list[float],
    terminal: list[int] | None = None,
    gamma: float = 1.0,
    continuing: bool = False,
) -> FiniteMDP:
    """From what follows (state, action), with which probability, and rewards [S][A]."""
    states, actions = range(len(gain)), range(len(gain[0]))
    transition = [[[follows.get((s, a), {}).get(x, 0.0) for x in states] for a in actions] for s in states]
    return FiniteMDP.from_tables(
        transition,
        gain,
        start=start,
        terminal=terminal or [],
        gamma=gamma,
        kind="continuing" if continuing else "episodic",
    )

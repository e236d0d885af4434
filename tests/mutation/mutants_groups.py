"""Slips in groups of episodes and pairs of segments, and who should see them."""

from __future__ import annotations

from harness import Mutant

GROUPS, SEGMENTS, RECORDED = "upslope.collect.groups", "upslope.collect.segments", "upslope.collect.recorded"
ROWS = "upslope.collect.rows"
PAIRED = "Preference: sigmoid, segments of episodes preferred by return"
CLONED = "SFT: trajectory_sum, episodes of another agent"

IN_GROUPS_OF_EPISODES: tuple[Mutant, ...] = (
    Mutant(
        "groups of the wrong rows",
        GROUPS,
        "self._group = torch.arange(episodes) // size",
        "self._group = torch.arange(episodes) % size",
        "episodes of different starts are compared",
        (),
        ("test_group_i_is_of_rows_that_begin_alike",),
    ),
    Mutant(
        "every episode begins elsewhere",
        GROUPS,
        "self._leader = np.arange(environments.num_envs) // size * size",
        "self._leader = np.arange(environments.num_envs)",
        "each environment leads itself",
        (),
        ("test_group_i_is_of_rows_that_begin_alike",),
    ),
)

IN_SEGMENTS: tuple[Mutant, ...] = (
    Mutant(
        "the rejected segment is labelled chosen",
        SEGMENTS,
        "label = torch.tensor([1.0, -1.0]).repeat(len(pairs)).unsqueeze(-1)",
        "label = torch.tensor([-1.0, 1.0]).repeat(len(pairs)).unsqueeze(-1)",
        "pairs stand the wrong way round",
        (),
        ("test_pairs_of_segments_stand_the_right_way_round",),
    ),
    Mutant(
        "the rejected segment comes first",
        SEGMENTS,
        "for pair in pairs for piece in (pair.chosen, pair.rejected)",
        "for pair in pairs for piece in (pair.rejected, pair.chosen)",
        "the worse one is preferred",
        (PAIRED,),
        ("test_pairs_of_segments_stand_the_right_way_round",),
    ),
    Mutant(
        "lower returns are preferred",
        SEGMENTS,
        "if returns[first, start] > returns[second, start] else (second, first)",
        "if returns[first, start] < returns[second, start] else (second, first)",
        "the sign of the preference",
        (),
        ("test_the_segment_with_the_higher_return_is_preferred",),
    ),
    Mutant(
        "a piece begins a step late",
        ROWS,
        "source = (row * positions + start).unsqueeze(-1) + steps.where(inside, 0)",
        "source = (row * positions + start + 1).unsqueeze(-1) + steps.where(inside, -1)",
        "observations and actions of the steps after",
        (PAIRED,),
        ("test_pairs_of_segments_stand_the_right_way_round",),
    ),
    Mutant(
        "demonstrations were sampled",
        RECORDED,
        "return replace(trajectory, behaviour_log_prob=nobody, group=None, memory=None)",
        "return replace(trajectory, group=None, memory=None)",
        "another policy's log-probs pass for those of who acted",
        (),
        ("test_nobody_sampled_what_is_given",),
    ),
)

GROUPED: tuple[Mutant, ...] = (*IN_GROUPS_OF_EPISODES, *IN_SEGMENTS)

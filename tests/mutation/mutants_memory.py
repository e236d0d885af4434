"""Slips in the memory of policies."""

from __future__ import annotations

from harness import Mutant

PACKING, FUSED, RECURRENT = "upslope.policies.packing", "upslope.policies.fused_recurrent", "upslope.policies.recurrent"
TRANSFORMER, MEMORY, COLLECT = (
    "upslope.policies.memory_transformer",
    "upslope.policies.memory",
    "upslope.collect.environments",
)
REPLAYED, CARRIED = (
    "test_replaying_a_memory_is_acting_with_it",
    "test_what_a_rollout_carries_on_is_what_its_rows_end_with",
)
VALUED = "test_a_final_observation_is_valued_with_the_memory_of_its_episode"
TWIN, AFTER = "test_a_fused_layer_has_the_gradient_of_its_twin", "test_the_memory_after_a_step_is_where_its_row_goes_on"
SIDE_BY_SIDE = ("A2C: lambda 1.0, a memory (lstm)", "A2C: lambda 1.0, a memory (transformer)")
WHOLE = "Reinforce: reward_to_go, gamma^t kept, a memory"


def of(name: str, *kinds: str) -> tuple[str, ...]:
    """A test for some kinds of memory."""
    return tuple(f"{name}[kind={kind}]" for kind in kinds)


MEMORIES = (
    Mutant(
        "memory is not reset within a row",
        PACKING,
        "begins = np.zeros(len(place), dtype=bool) if time is None else time.cpu().numpy().reshape(-1)[place] == 0",
        "begins = np.zeros(len(place), dtype=bool)",
        "an episode remembers the one before",
        SIDE_BY_SIDE,
        of(REPLAYED, "gru", "lstm", "transformer"),
    ),
    Mutant(
        "memory is reset one step late",
        PACKING,
        "time.cpu().numpy().reshape(-1)[place] == 0",
        "time.cpu().numpy().reshape(-1)[place] == 1",
        "an episode's first step remembers the one before",
        SIDE_BY_SIDE,
        of(CARRIED, "gru", "lstm"),
    ),
    Mutant(
        "what a row begins with is ignored",
        PACKING,
        "        if memory is None:\n            return like.new_zeros(len(self.row), *shape)",
        "        if memory is None or True:\n            return like.new_zeros(len(self.row), *shape)",
        "every row begins with nothing",
        (),
        (*of(REPLAYED, "gru", "lstm", "transformer"), *of(AFTER, "gru", "lstm", "transformer")),
    ),
    Mutant(
        "a row's memory goes into all its episodes",
        PACKING,
        "going_on.masked_fill(self.fresh.view(-1, *(1 for _ in shape)), 0.0)",
        "going_on",
        "later episodes of a row begin with what it began with",
        SIDE_BY_SIDE,
        of(REPLAYED, "gru", "lstm"),
    ),
    Mutant(
        "rows run into one another",
        PACKING,
        "first[1:] |= row[1:] != row[:-1]",
        "first[1:] |= False",
        "a row goes on from the row before",
        (),
        of(AFTER, "gru", "lstm", "transformer"),
    ),
    Mutant(
        "a rollout does not forget",
        COLLECT,
        "            sampler.restart(step.finished)",
        "            sampler.restart(step.finished[:0])",
        "what acts remembers the episode before",
        (),
        of(CARRIED, "gru", "lstm", "transformer"),
    ),
    Mutant(
        "final observations are seen with an empty memory",
        MEMORY,
        "core.replay(final[order], one_step, core.after(trace, packing, ends))",
        "core.replay(final[order], one_step, None)",
        "V' of open ends forgets the episode",
        (),
        of(VALUED, "gru", "lstm", "transformer"),
    ),
    Mutant(
        "no gradient through time",
        FUSED,
        "            behind[:count] += here * update[begin:end]",
        "            behind[:count] = 0.0",
        "what is to be remembered is not learnt",
        (f"{WHOLE} (gru)",),
        of(TWIN, "gru"),
    ),
    Mutant(
        "a cell's gradient forgets what was kept",
        FUSED,
        "            inner *= keep[begin:end]",
        "            inner *= 1.0 - keep[begin:end]",
        "the gradient through the cells is wrong",
        (f"{WHOLE} (lstm)",),
        of(TWIN, "lstm"),
    ),
    Mutant(
        "gates change places",
        RECURRENT,
        "        return candidate + gates[:, size:] * (hidden - candidate)",
        "        return hidden + gates[:, size:] * (candidate - hidden)",
        "what acts keeps what it should replace",
        (),
        of(REPLAYED, "gru"),
    ),
    Mutant(
        "attention looks ahead",
        TRANSFORMER,
        "near = (distance >= 0) & (distance <= context)",
        "near = (distance >= -1) & (distance <= context)",
        "a step sees the one after it",
        (f"{WHOLE} (transformer)",),
        of(REPLAYED, "transformer"),
    ),
    Mutant(
        "attention sees what is not there",
        TRANSFORMER,
        "held = key >= context - length.unsqueeze(-1)",
        "held = key >= 0 * length.unsqueeze(-1)",
        "empty keys before an episode's start are attended to",
        (),
        of(REPLAYED, "transformer"),
    ),
)

"""What of a language model's run decides the estimate, beside the algorithm itself."""

from __future__ import annotations

from upslope.collect.experience import CompletionConfig, DemonstrationConfig, PairConfig
from upslope.policies.language.sampling import Sampling
from upslope.train.language.config import START, LanguageRun


def describe_language_run(run: LanguageRun) -> dict[str, str]:
    """What `describe()` of the algorithm says, and a row for each other setting that changes the estimate.

    Args:
        run: the configuration.
    """
    rows = dict(run.algorithm.describe())
    if run.reference is not None:
        rows["reference"] = (
            "the policy the run starts from, frozen" if run.reference == START else f"{run.reference}, frozen"
        )
    rows["experience"] = _experience(run.experience)
    if isinstance(run.experience, CompletionConfig):
        rows.update(_completions(run.experience))
    if run.optimizer.max_gradient_norm is not None:
        rows["gradient clipping"] = f"the whole gradient scaled down to a norm of {run.optimizer.max_gradient_norm:g}"
    if run.model.lora is not None:
        rows["parameters"] = f"LoRA adapters of rank {run.model.lora.rank} alone"
    return rows


def _experience(experience: CompletionConfig | DemonstrationConfig | PairConfig) -> str:
    if isinstance(experience, CompletionConfig):
        group = f"{experience.group} completions each, a group" if experience.group > 1 else "1 completion each"
        return f"{experience.prompts} prompts per update, {group}, of at most {experience.limit} tokens"
    if isinstance(experience, DemonstrationConfig):
        learnt = "the answers alone" if experience.completion_only else "prompts and answers"
        return f"{experience.rows} demonstrations per update, learning {learnt}"
    drawn = "of the data"
    if experience.drawn is not None:
        drawn = (
            f"of the best and the worst of {experience.group} completions of the starting policy "
            f"({experience.drawn} pairs, {sampling_words(experience.sampling)})"
        )
    return f"{experience.pairs} pairs per update, {drawn}"


def _completions(experience: CompletionConfig) -> dict[str, str]:
    rows = {"sampling": f"{sampling_words(experience.sampling)}; the learner's log-probs are of the same distribution"}
    if experience.refill:
        rows["dead groups"] = f"replaced by new prompts, up to {experience.refill} more rounds (dynamic sampling)"
    if experience.mask_truncated:
        rows["truncated completions"] = "not learnt from; their rewards count in their group's baseline"
    if experience.overlong is not None:
        rows["overlong penalty"] = (
            f"0 up to {experience.limit - experience.overlong.buffer} tokens, then down to "
            f"{-experience.overlong.penalty:g} at {experience.limit}"
        )
    return rows


def sampling_words(sampling: Sampling) -> str:
    """How tokens are drawn, in words."""
    parts = [f"temperature {sampling.temperature:g}"]
    parts += [] if sampling.top_k is None else [f"top-k {sampling.top_k}"]
    parts += [] if sampling.top_p == 1.0 else [f"top-p {sampling.top_p:g}"]
    return ", ".join(parts)

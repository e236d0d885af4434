"""Which figures of a language model's updates are shown while it learns."""

from __future__ import annotations

from upslope.algorithms import KTO
from upslope.collect.experience import CompletionConfig, PairConfig
from upslope.train.language.config import LanguageRun
from upslope.train.session import Figures

_COMPLETIONS = Figures(
    shown=(
        ("reward", "reward", "{:.3f}"),
        ("accuracy", "accuracy", "{:.3f}"),
        ("score", "score", "{:.3f}"),
        ("live groups", "live_groups", "{:.0%}"),
        ("length", "length", "{:.1f}"),
        ("truncated", "truncated", "{:.1%}"),
        ("failed", "failed", "{:.0f}"),
        ("KL", "kl", "{:.4f}"),
        ("reference KL", "reference_kl", "{:.4f}"),
        ("entropy", "entropy", "{:.3f}"),
        ("mismatch", "mismatch", "{:.1e}"),
        ("clipped", "clip_fraction", "{:.1%}"),
        ("clipped up", "clip_fraction_positive", "{:.1%}"),
        ("clipped down", "clip_fraction_negative", "{:.1%}"),
        ("tokens/s", "tokens_per_second", "{:,.0f}"),
        ("generate", "generate_seconds", "{:.2f} s"),
        ("score", "reward_seconds", "{:.2f} s"),
        ("learn", "learn_seconds", "{:.2f} s"),
    ),
    spoken=("reward", "accuracy", "live_groups", "length", "entropy", "tokens_per_second"),
    unit="updates",
)
_DEMONSTRATIONS = Figures(
    shown=(
        ("loss", "nll", "{:.4f}"),
        ("entropy", "entropy", "{:.3f}"),
        ("likely", "likely_share", "{:.1%}"),
        ("gradient", "gradient_norm", "{:.3g}"),
        ("learning rate", "learning_rate", "{:.2g}"),
        ("tokens/s", "tokens_per_second", "{:,.0f}"),
    ),
    spoken=("nll", "entropy", "tokens_per_second"),
    unit="updates",
)
_LABELLED = Figures(
    shown=(
        ("loss", "loss", "{:.4f}"),
        ("told apart", "accuracy", "{:.1%}"),
        ("gain", "gain", "{:.3f}"),
        ("log-prob", "log_prob", "{:.3f}"),
        ("z", "reference_point", "{:.3f}"),
        ("tokens/s", "tokens_per_second", "{:,.0f}"),
    ),
    spoken=("loss", "accuracy", "gain", "tokens_per_second"),
    unit="updates",
)
_PAIRS = Figures(
    shown=(
        ("loss", "loss", "{:.4f}"),
        ("pairs right", "pair_accuracy", "{:.1%}"),
        ("margin", "margin", "{:.3f}"),
        ("score margin", "score_margin", "{:.3f}"),
        ("chosen log-prob", "chosen_log_prob", "{:.3f}"),
        ("rejected log-prob", "rejected_log_prob", "{:.3f}"),
        ("tokens/s", "tokens_per_second", "{:,.0f}"),
    ),
    spoken=("loss", "pair_accuracy", "chosen_log_prob", "tokens_per_second"),
    unit="updates",
)


def figures_of(run: LanguageRun) -> Figures:
    """The figures that say how such a run goes."""
    if isinstance(run.experience, CompletionConfig):
        return _COMPLETIONS
    if isinstance(run.algorithm, KTO):
        return _LABELLED
    return _PAIRS if isinstance(run.experience, PairConfig) else _DEMONSTRATIONS

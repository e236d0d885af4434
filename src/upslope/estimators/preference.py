"""Preference losses, to be MINIMISED: one value per pair (KTO: per sequence), `[...]`.

Write d_w and d_l for the log-ratio log(pi / ref) of the chosen and the rejected sequence, from
`sequence_log_ratio(..., length_normalised=False)`, and D = beta (d_w - d_l). Pair accuracy can rise while the
policy gets worse: report the chosen log-prob itself too, and consider adding `negative_log_likelihood` of it.
The same losses serve pairs of trajectory segments.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from upslope.estimators._checks import require_bool


def dpo_sigmoid(
    chosen_log_ratio: Tensor, rejected_log_ratio: Tensor, *, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """Sigmoid DPO: -log s(D); with label smoothing e, cDPO: (1-e) (-log s(D)) + e (-log s(-D)).

    Rafailov et al. (2023); cDPO: Mitchell (2023).

    >>> chosen, rejected = torch.tensor([2.0]), torch.tensor([0.0])
    >>> dpo_sigmoid(chosen, rejected, beta=0.5)
    tensor([0.3133])
    >>> dpo_sigmoid(chosen, rejected, beta=0.5, label_smoothing=0.1)
    tensor([0.4133])

    Args:
        chosen_log_ratio: `[...]`, d_w, with gradient.
        rejected_log_ratio: `[...]`, d_l, with gradient.
        beta: positive.
        label_smoothing: e, the assumed rate of swapped labels, in [0, 0.5).

    Raises:
        ValueError: shapes differ or a number is out of its range.
    """
    margin = _margin(chosen_log_ratio, rejected_log_ratio, beta)
    _require_smoothing(label_smoothing)
    if label_smoothing == 0.0:
        return -logsigmoid(margin)
    return -(1.0 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


def robust_dpo(chosen_log_ratio: Tensor, rejected_log_ratio: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO: [(1-e) (-log s(D)) - e (-log s(-D))] / (1 - 2e), unbiased under labels swapped at rate e.

    At e = 0 it is sigmoid DPO. Chowdhury et al. (2024).

    >>> robust_dpo(torch.tensor([2.0]), torch.tensor([0.0]), beta=0.5, label_smoothing=0.1)
    tensor([0.1883])

    Args:
        chosen_log_ratio: `[...]`, d_w, with gradient.
        rejected_log_ratio: `[...]`, d_l, with gradient.
        beta: positive.
        label_smoothing: e, in [0, 0.5).

    Raises:
        ValueError: shapes differ or a number is out of its range.
    """
    margin = _margin(chosen_log_ratio, rejected_log_ratio, beta)
    _require_smoothing(label_smoothing)
    kept, swapped = (1.0 - label_smoothing) * logsigmoid(margin), label_smoothing * logsigmoid(-margin)
    return (swapped - kept) / (1.0 - 2.0 * label_smoothing)


def ipo(
    chosen_log_ratio: Tensor,
    rejected_log_ratio: Tensor,
    *,
    beta: float,
    length_normalised: bool,
    chosen_length: Tensor | None = None,
    rejected_length: Tensor | None = None,
) -> Tensor:
    """IPO: (d_w - d_l - 1 / (2 beta))^2, with d summed, or divided by its length if so asked.

    Azar et al. (2023) sum; some libraries divide by the length, which is another loss with another beta.

    >>> chosen, rejected = torch.tensor([4.0]), torch.tensor([2.0])
    >>> ipo(chosen, rejected, beta=0.5, length_normalised=False)
    tensor([1.])
    >>> lengths = {"chosen_length": torch.tensor([2]), "rejected_length": torch.tensor([4])}
    >>> ipo(chosen, rejected, beta=0.5, length_normalised=True, **lengths)
    tensor([0.2500])

    Args:
        chosen_log_ratio: `[...]`, d_w summed over chosen steps, with gradient.
        rejected_log_ratio: `[...]`, d_l summed over chosen steps, with gradient.
        beta: positive.
        length_normalised: divide each sum by its length.
        chosen_length: `[...]`, number of chosen steps; needed exactly if `length_normalised`.
        rejected_length: `[...]`, likewise.

    Raises:
        ValueError: shapes differ, beta <= 0, or the lengths do not go with `length_normalised`.
    """
    _margin(chosen_log_ratio, rejected_log_ratio, beta)
    given = chosen_length is not None, rejected_length is not None
    if given != (length_normalised, length_normalised):
        raise ValueError(
            "chosen_length and rejected_length must be given exactly when length_normalised=True; "
            f"got length_normalised={length_normalised}, lengths given: {given}"
        )
    if chosen_length is not None and rejected_length is not None:
        _require_pair_shape("chosen_length", chosen_length, chosen_log_ratio)
        _require_pair_shape("rejected_length", rejected_length, chosen_log_ratio)
        chosen_log_ratio = chosen_log_ratio / chosen_length
        rejected_log_ratio = rejected_log_ratio / rejected_length
    return (chosen_log_ratio - rejected_log_ratio - 0.5 / beta).square()


def hinge(chosen_log_ratio: Tensor, rejected_log_ratio: Tensor, *, beta: float) -> Tensor:
    """Hinge loss on the margin: max(0, 1 - D). Zhao et al. (2023, SLiC).

    >>> hinge(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 1.0]), beta=0.25)
    tensor([0.5000, 1.2500])

    Args:
        chosen_log_ratio: `[...]`, d_w, with gradient.
        rejected_log_ratio: `[...]`, d_l, with gradient.
        beta: positive.

    Raises:
        ValueError: shapes differ or beta <= 0.
    """
    return (1.0 - _margin(chosen_log_ratio, rejected_log_ratio, beta)).clamp(min=0.0)


def simpo(chosen_log_prob: Tensor, rejected_log_prob: Tensor, *, beta: float, margin: float) -> Tensor:
    """SimPO, without a reference: -log s(beta (l_w - l_l) - margin), l the mean log-prob. Meng et al. (2024).

    >>> simpo(torch.tensor([-1.0]), torch.tensor([-2.0]), beta=2.0, margin=1.0)
    tensor([0.3133])

    Args:
        chosen_log_prob: `[...]`, l_w, mean over chosen steps, with gradient.
        rejected_log_prob: `[...]`, l_l, likewise.
        beta: positive.
        margin: the target reward margin, in units of beta times log-prob.

    Raises:
        ValueError: shapes differ or beta <= 0.
    """
    return -logsigmoid(_margin(chosen_log_prob, rejected_log_prob, beta) - margin)


def orpo(chosen_log_prob: Tensor, rejected_log_prob: Tensor, *, beta: float) -> Tensor:
    """ORPO, without a reference: -l_w + beta * (-log s(log odds_w - log odds_l)), odds = p / (1 - p), p = e^l.

    Hong et al. (2024).

    >>> orpo(torch.tensor([0.5]).log(), torch.tensor([0.5]).log(), beta=1.0)
    tensor([1.3863])

    Args:
        chosen_log_prob: `[...]`, l_w, mean over chosen steps, negative, with gradient.
        rejected_log_prob: `[...]`, l_l, likewise.
        beta: positive; weight of the odds-ratio term.

    Raises:
        ValueError: shapes differ or beta <= 0.
    """
    _margin(chosen_log_prob, rejected_log_prob, beta)
    log_odds = _log_odds(chosen_log_prob) - _log_odds(rejected_log_prob)
    return negative_log_likelihood(chosen_log_prob) - beta * logsigmoid(log_odds)


def kto(
    log_ratio: Tensor,
    desirable: Tensor,
    reference_kl: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO, unpaired: w_d (1 - s(beta (d - z))) where desirable, w_u (1 - s(beta (z - d))) elsewhere.

    z is an estimate of KL(pi || ref), taken as a number and not below 0. Ethayarajh et al. (2024).

    >>> kto(torch.tensor([1.0, 1.0]), torch.tensor([True, False]), torch.tensor(1.0), beta=0.1)
    tensor([0.5000, 0.5000])

    Args:
        log_ratio: `[...]`, d of each sequence, with gradient.
        desirable: `[...]`, boolean.
        reference_kl: z, a scalar tensor.
        beta: positive.
        desirable_weight: w_d.
        undesirable_weight: w_u.

    Raises:
        ValueError: shapes differ, `desirable` is not boolean, `reference_kl` is no scalar, or beta <= 0.
    """
    _require_beta(beta)
    _require_pair_shape("desirable", desirable, log_ratio)
    require_bool("desirable", desirable)
    if reference_kl.numel() != 1:
        raise ValueError(f"reference_kl must be one number; got shape {tuple(reference_kl.shape)}")
    gain = beta * (log_ratio - reference_kl.detach().reshape(()).clamp(min=0.0))
    return torch.where(desirable, desirable_weight * torch.sigmoid(-gain), undesirable_weight * torch.sigmoid(gain))


def negative_log_likelihood(log_prob: Tensor) -> Tensor:
    """Negative log-likelihood: -l, per step or per sequence.

    >>> negative_log_likelihood(torch.tensor([-1.0, -2.5]))
    tensor([1.0000, 2.5000])

    Args:
        log_prob: any shape, with gradient.
    """
    return -log_prob


def _margin(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    _require_beta(beta)
    if chosen.shape != rejected.shape:
        raise ValueError(
            f"the rejected sequences must have the shape of the chosen ones, {tuple(chosen.shape)}; "
            f"got {tuple(rejected.shape)}"
        )
    return beta * (chosen - rejected)


def _require_beta(beta: float) -> None:
    if beta <= 0:
        raise ValueError(f"beta must be positive; got {beta}")


def _require_pair_shape(name: str, tensor: Tensor, reference: Tensor) -> None:
    if tensor.shape != reference.shape:
        raise ValueError(
            f"{name} must have the shape of the log-ratios, {tuple(reference.shape)}; got {tuple(tensor.shape)}"
        )


def _require_smoothing(label_smoothing: float) -> None:
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5); got {label_smoothing}")


def _log_odds(log_prob: Tensor) -> Tensor:
    bounded = log_prob.clamp(max=-torch.finfo(log_prob.dtype).eps)
    return bounded - torch.log(-torch.expm1(bounded))

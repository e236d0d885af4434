"""Weights that make the data of one policy speak of another: products of ratios, in logarithms until they are used.

The weight of a whole trajectory is `sequence_log_ratio(..., length_normalised=False).exp()`; a weight is truncated by
`clamp`. Rows come first, `[B, ...]`, where a batch is normalised or counted.
"""

from torch import Tensor

from upslope.estimators._checks import require_bool, require_same_shape


def per_decision_log_weight(log_prob: Tensor, behaviour_log_prob: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logarithm of the per-decision weight: log w_t = sum over k <= t of (l_k - b_k).

    w_t is the ratio of the probabilities of everything decided up to step t, and all that a reward at t needs: what is
    decided later does not change it. E[w_t r_t] under the policy that acted is E[r_t] under the other one.
    Precup, Sutton & Singh (2000).

    >>> l, b = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([0.0, 4.0, 0.0])
    >>> per_decision_log_weight(l, b)
    tensor([ 1.0000, -1.0000, -0.5000])
    >>> per_decision_log_weight(l, b, torch.tensor([True, False, True]))
    tensor([1.0000, 1.0000, 1.5000])

    Args:
        log_prob: `[..., T]`, l, under the policy that is asked about; no gradient flows into it.
        behaviour_log_prob: `[..., T]`, b, under the one that acted.
        mask: `[..., T]`, boolean; at False positions nothing is read and the weight stays what it was, after the last
            step of an episode, too.

    Raises:
        ValueError: shapes differ or `mask` is not boolean.
    """
    require_same_shape("log_prob", log_prob, ("behaviour_log_prob", behaviour_log_prob))
    log_ratio = (log_prob - behaviour_log_prob).detach()
    if mask is not None:
        require_same_shape("log_prob", log_prob, ("mask", mask))
        require_bool("mask", mask)
        log_ratio = log_ratio.masked_fill(~mask, 0.0)
    return log_ratio.cumsum(-1)


def self_normalised_weight(log_weight: Tensor) -> Tensor:
    """Weights divided by their mean over the batch: w_i / (1/B sum_j w_j), the mean being that of the first dimension.

    Their mean is 1 whatever the weights are, and none is larger than B. What they estimate is biased, by less the more
    rows there are: a ratio of two means. Also called weighted importance sampling.

    >>> self_normalised_weight(torch.tensor([3.0, 1.0]).log())
    tensor([1.5000, 0.5000])
    >>> self_normalised_weight(torch.tensor([1000.0, 1000.0]))
    tensor([1., 1.])

    Args:
        log_weight: `[B, ...]`, of each row, such as `[B]` of trajectories or `[B, T]` per decision.

    Raises:
        ValueError: there is no row.
    """
    _require_rows(log_weight)
    return log_weight.softmax(0) * log_weight.shape[0]


def effective_sample_size(log_weight: Tensor) -> Tensor:
    """The share of the samples that weights leave: (sum w)^2 / (n sum w^2) over the first dimension; 1 for equal ones.

    n times it is about how many samples of one's own would be worth as much. Kong (1992).

    >>> effective_sample_size(torch.tensor([3.0, 1.0]).log())
    tensor(0.8000)
    >>> effective_sample_size(torch.tensor([[0.0, 0.0], [0.0, -1000.0]]))
    tensor([1.0000, 0.5000])

    Args:
        log_weight: `[n, ...]`, the logarithms of the weights.

    Returns:
        `[...]`, between 1/n and 1.

    Raises:
        ValueError: there is no sample.
    """
    _require_rows(log_weight)
    weight = (log_weight - log_weight.amax(0)).exp()
    return weight.sum(0).square() / (weight.shape[0] * weight.square().sum(0))


def _require_rows(log_weight: Tensor) -> None:
    if not log_weight.dim() or not log_weight.shape[0]:
        raise ValueError(f"log_weight must hold at least one row, [n, ...]; got {tuple(log_weight.shape)}")

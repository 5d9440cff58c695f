"""What an ensemble says, and how sure it is: pure functions of its members' logits.

The entropy of the mean prediction is the expected entropy of the members, what noise in the data
makes of it, plus the mutual information, what the members do not agree on (Depeweg et al. 2018).
All in nats. The logarithm of the mean is `funcnets.losses.ensemble_log_probabilities`.
"""

from __future__ import annotations

import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from funcnets import _torch
from funcnets.losses import ensemble_log_probabilities
from funcnets.tree.flatten import describe

Logits = Float[Tensor, "members *batch classes"]


def mean(
    logits: Logits, weights: Float[Tensor, " members"] | None = None
) -> Float[Tensor, "*batch classes"]:
    """The mean of the members' probabilities.

    Args:
        weights: of the members, which sum to one; as of `greedy_selection`. A member of weight zero
            counts for nothing, whatever its logits are.

    Raises:
        ValueError: where the shapes do not fit, or the weights are negative or do not sum to one.

    >>> mean(torch.tensor([[[0.0, 0.0]], [[0.0, float("-inf")]]]))  # 1/2, 1/2 and 1, 0
    tensor([[0.7500, 0.2500]])
    """
    found = _probabilities("mean", logits)
    if weights is None:
        return reduce(found, "members ... -> ...", "mean")
    if weights.shape != logits.shape[:1]:
        raise ValueError(
            f"mean: weights: expected [{len(logits)}] (as the members), got {describe(weights)}"
        )
    fit = (weights >= 0).all() & ((weights.sum() - 1).abs() <= 0.01)
    if not _torch.inlining() and not bool(fit):
        raise ValueError(f"mean: weights: expected none below 0 and a sum of 1, got {weights}")
    shape = (-1, *(1,) * (found.ndim - 1))
    found = torch.where(weights.reshape(shape) > 0, found, 0.0)
    return einsum(weights.to(found.dtype), found, "members, members ... -> ...")


def variance(logits: Logits) -> Float[Tensor, "*batch classes"]:
    """The variance of each class's probability over the members (that of the population).

    >>> variance(torch.tensor([[[0.0, 0.0]], [[0.0, float("-inf")]]]))
    tensor([[0.0625, 0.0625]])
    """
    return _probabilities("variance", logits).var(0, correction=0)


def entropy(logits: Logits) -> Float[Tensor, "*batch"]:
    """The entropy of the mean prediction: all uncertainty there is.

    >>> entropy(torch.tensor([[[0.0, float("-inf")]], [[float("-inf"), 0.0]]]))  # log(2)
    tensor([0.6931])
    """
    _check("entropy", logits)
    return _entropy(ensemble_log_probabilities(logits))


def expected_entropy(logits: Logits) -> Float[Tensor, "*batch"]:
    """The mean of the members' entropies: what more members or data would not take away.

    >>> expected_entropy(torch.tensor([[[0.0, float("-inf")]], [[float("-inf"), 0.0]]]))
    tensor([0.])
    """
    _check("expected_entropy", logits)
    return reduce(_entropy(logits.log_softmax(-1)), "members ... -> ...", "mean")


def mutual_information(logits: Logits) -> Float[Tensor, "*batch"]:
    """What the members do not agree on: `entropy` less `expected_entropy`, at least zero.

    >>> mutual_information(torch.tensor([[[0.0, float("-inf")]], [[float("-inf"), 0.0]]]))
    tensor([0.6931])
    """
    _check("mutual_information", logits)
    return (entropy(logits) - expected_entropy(logits)).clamp(min=0)


def disagreement(logits: Logits) -> Float[Tensor, "*batch"]:
    """The share of the pairs of members that predict different classes.

    >>> disagreement(torch.tensor([[[2.0, 1.0]], [[2.0, 1.0]], [[1.0, 2.0]]]))
    tensor([0.6667])
    """
    _check("disagreement", logits)
    members, classes = logits.shape[0], logits.shape[-1]
    if members < 2:
        raise ValueError(f"disagreement: logits: expected 2 or more members, got {members}")
    predicted = rearrange(logits.argmax(-1), "... -> ... 1")
    votes = predicted == torch.arange(classes, device=logits.device)
    count = reduce(votes.to(logits.dtype), "members ... classes -> ... classes", "sum")
    same = reduce(count * (count - 1), "... classes -> ...", "sum")
    return 1 - same / (members * (members - 1))


def _entropy(log_probabilities: Tensor) -> Tensor:
    # Of a probability of zero nothing: its logarithm is minus infinity.
    return -torch.xlogy(log_probabilities.exp(), log_probabilities.exp()).sum(-1)


def _probabilities(name: str, logits: Tensor) -> Tensor:
    _check(name, logits)
    return logits.softmax(-1)


def _check(name: str, logits: Tensor) -> None:
    if logits.ndim < 2 or not logits.shape[0] or not logits.shape[-1]:
        raise ValueError(
            f"{name}: logits: expected [members, ..., classes], got {describe(logits)}"
        )

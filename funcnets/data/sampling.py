"""Samples drawn by weight, and with replacement: pure functions of a key."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from funcnets import _torch, random
from funcnets.data.order import Batches, Full, check_order, cut
from funcnets.tree.flatten import describe


def weighted_batches(
    key: random.Key,
    weights: Float[Tensor, " samples"],
    num: int,
    batch_size: int,
    *,
    replacement: bool = True,
    drop_last: bool = False,
) -> Batches | Full:
    """``num`` samples, drawn in proportion to their weights, cut into batches.

    As `torch.utils.data.WeightedRandomSampler`.

    Args:
        weights: of at least zero, which need not sum to one.
        replacement: whether a sample can be drawn several times. Without, each is drawn from those
            that are left (Efraimidis and Spirakis 2006).

    Raises:
        ValueError: where weights are no list of numbers of at least zero with a positive sum, or
            too few are positive.

    >>> found = weighted_batches(random.key(0), torch.tensor([0.0, 1.0, 3.0]), 6, batch_size=3)
    >>> [batch.tolist() for batch in found]
    [[1, 2, 1], [1, 2, 2]]
    """
    check_order("weighted_batches", num, batch_size, drop_last)
    least = 1 if replacement else num
    _check_weights(weights, least)
    exact = weights.to(torch.float64)
    if replacement:
        total = exact.cumsum(0)
        unit = random.uniform(key, (num,), dtype=torch.float64)
        drawn = torch.searchsorted(total, unit * total[-1], right=True)
        # Rounding may lead beyond the last; the last of positive weight is the first at the total.
        order = torch.minimum(drawn, torch.searchsorted(total, total[-1:]))
    else:
        order = (exact.log() + random.gumbel(key, weights.shape, torch.float64)).topk(num).indices
    return cut(order, batch_size, drop_last)


def bootstrap(key: random.Key, n: int) -> Int64[Tensor, " n"]:
    """n of n samples, drawn with replacement: a data set of its own for a member of an ensemble.

    ``sample[batch]`` for each batch of `batches` goes through it once.

    >>> bootstrap(random.key(0), 5).tolist()
    [4, 3, 3, 1, 4]
    """
    check_order("bootstrap", n, 1, False)
    return random.randint(key, (n,), 0, n)


def out_of_bag(sample: Int64[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """Which of the n samples a `bootstrap` left out: 37 % of them, to validate with.

    >>> out_of_bag(torch.tensor([0, 2, 2]))
    tensor([False,  True, False])
    """
    return torch.ones_like(sample, dtype=torch.bool).scatter(0, sample, False)


def _check_weights(weights: Tensor, least: int) -> None:
    if weights.ndim != 1 or not weights.is_floating_point():
        raise ValueError(
            f"weighted_batches: weights: expected numbers [samples], got {describe(weights)}"
        )
    if _torch.inlining():
        return  # the values are not to be looked at
    positive = int((weights > 0).sum())
    if not bool((weights >= 0).all()) or not bool(weights.sum().isfinite()) or positive < least:
        raise ValueError(
            f"weighted_batches: weights: expected finite numbers of at least zero, {least} or more "
            f"of them positive, got {positive} positive and a sum of {float(weights.sum()):g}"
        )

"""Verification: is a pair similar? From distances and labels to rates, and to a threshold.

A pair is accepted where its distance is at most the threshold. All functions are pure and of fixed
shapes, so they work under vmap (one curve per member of an ensemble) and compiled.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from funcnets.tree.flatten import describe


class Roc(NamedTuple):
    """The receiver operating characteristic, from accepting no pair to accepting all.

    Attributes:
        thresholds: minus infinity and then the distances in ascending order.
        false_accept: at each threshold the share of the pairs not similar that are accepted.
        true_accept: the share of the similar pairs that are accepted; one minus it is the false
            reject rate.
        accuracy: the share of all pairs that are accepted or rejected rightly.
    """

    thresholds: Float[Tensor, " points"]
    false_accept: Float[Tensor, " points"]
    true_accept: Float[Tensor, " points"]
    accuracy: Float[Tensor, " points"]


class Point(NamedTuple):
    """A threshold, and the rate that it gives."""

    rate: Float[Tensor, ""]
    threshold: Float[Tensor, ""]


def roc(distances: Float[Tensor, " pairs"], similar: Shaped[Tensor, " pairs"]) -> Roc:
    """The rates at every threshold, as `sklearn.metrics.roc_curve` of minus the distances.

    There is a point for each pair, and one for accepting none. Equal distances give equal points,
    for there is no threshold between them. Rates of which there are no pairs are nan.

    Args:
        similar: 1 or True for a similar pair, 0 or False for another.

    Raises:
        ValueError: where the shapes do not fit, or there is no pair.

    >>> curve = roc(torch.tensor([0.1, 0.4, 0.35]), torch.tensor([1, 1, 0]))
    >>> curve.true_accept, curve.false_accept
    (tensor([0.0000, 0.5000, 0.5000, 1.0000]), tensor([0., 0., 1., 1.]))
    """
    if distances.ndim != 1 or not len(distances) or similar.shape != distances.shape:
        raise ValueError(
            "roc: expected distances [pairs] and similar [pairs], at least one, "
            f"got {describe(distances)} and {describe(similar)}"
        )
    order = distances.argsort()
    ordered, right = distances[order], similar[order].to(distances.dtype)
    # Of equal distances all are accepted, or none: the counts at the last of them.
    last = torch.cat([ordered[1:] != ordered[:-1], torch.ones_like(order[:1], dtype=torch.bool)])
    true, false = (_at_last(counted.cumsum(0), last) for counted in (right, 1 - right))
    trues, falses = right.sum(), (1 - right).sum()
    return Roc(
        torch.cat([torch.full_like(ordered[:1], -float("inf")), ordered]),
        _from_zero(false / falses),
        _from_zero(true / trues),
        torch.cat([rearrange(falses, "-> 1"), true + falses - false]) / len(distances),
    )


def area_under(curve: Roc) -> Float[Tensor, ""]:
    """The area under the curve: how often a similar pair is nearer than another one.

    As `sklearn.metrics.roc_auc_score`.

    >>> area_under(roc(torch.tensor([0.1, 0.4, 0.35]), torch.tensor([1, 1, 0])))
    tensor(0.5000)
    """
    return torch.trapezoid(curve.true_accept, curve.false_accept)


def equal_error_rate(curve: Roc) -> Point:
    """Where as large a share is falsely accepted as falsely rejected, linearly between points.

    >>> equal_error_rate(roc(torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([1, 0, 1, 0])))
    Point(rate=tensor(0.5000), threshold=tensor(0.2000))
    """
    excess = curve.false_accept + curve.true_accept - 1  # from -1 up to 1
    after = (excess >= 0).to(torch.int64).argmax()
    before = (after - 1).clamp(min=0)
    low, high = _pick(excess, before), _pick(excess, after)
    share = -low / (high - low)
    first, second = _pick(curve.thresholds, before), _pick(curve.thresholds, after)
    return Point(
        torch.lerp(_pick(curve.false_accept, before), _pick(curve.false_accept, after), share),
        # Nothing lies between minus infinity and the smallest distance.
        torch.where(first.isinf(), second, torch.lerp(first, second, share)),
    )


def best_accuracy(curve: Roc) -> Point:
    """The highest accuracy, and the smallest of the thresholds that give it.

    >>> best_accuracy(roc(torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([1, 1, 0, 1])))
    Point(rate=tensor(0.7500), threshold=tensor(0.2000))
    """
    best = curve.accuracy.argmax()
    return Point(_pick(curve.accuracy, best), _pick(curve.thresholds, best))


def true_accept_at(curve: Roc, false_accept: float) -> Point:
    """The share of similar pairs accepted, and the largest threshold, at a false accept rate.

    Args:
        false_accept: the rate that may not be exceeded.

    >>> true_accept_at(roc(torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([1, 1, 0, 1])), 0.0)
    Point(rate=tensor(0.6667), threshold=tensor(0.2000))
    """
    if not 0 <= false_accept <= 1:
        raise ValueError(
            f"true_accept_at: false_accept: expected a rate between 0 and 1, got {false_accept}"
        )
    last = (curve.false_accept <= false_accept).sum() - 1
    return Point(_pick(curve.true_accept, last), _pick(curve.thresholds, last))


def _at_last(counts: Float[Tensor, " n"], last: Bool[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Ascending counts, each replaced by the next that is last among equals."""
    marked = counts.masked_fill(~last, float("inf"))
    return marked.flip(0).cummin(0).values.flip(0)


def _from_zero(rates: Float[Tensor, " n"]) -> Float[Tensor, " points"]:
    return torch.cat([0 * rates[:1], rates])  # nan stays nan


def _pick(values: Float[Tensor, " points"], place: Tensor) -> Float[Tensor, ""]:
    """``values[place]``, which under vmap would ask for the value of place."""
    return rearrange(values.gather(0, rearrange(place, "-> 1")), "1 ->")

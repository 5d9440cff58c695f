"""Samplers of pairs, triplets and balanced batches: pure functions of a key and of the labels.

What the labels say is worked out once, by `group` or `group_forgeries`, and checked there. A
sampler then draws indices of samples, in time that does not grow with their number, and works under
vmap over keys and compiled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from funcnets import random
from funcnets.tree.flatten import describe

Indices = Int64[Tensor, " num"]


@dataclass(frozen=True, eq=False)
class Groups:
    """The samples in the order of their classes.

    Attributes:
        order: indices of the samples, those of one class together.
        start: of each class, the place in ``order`` where it begins.
        count: its number of samples.
        several: the classes that have more than one sample.
        largest: the largest number of samples in a class.
        smallest: the smallest.
    """

    order: Int64[Tensor, " samples"]
    start: Int64[Tensor, " classes"]
    count: Int64[Tensor, " classes"]
    several: Int64[Tensor, " several"]
    largest: int
    smallest: int


def group(labels: Shaped[Tensor, " samples"]) -> Groups:
    """Sorts samples by class, once, for the samplers.

    Args:
        labels: any integers; equal ones make a class. Classes are numbered in ascending order.

    Raises:
        ValueError: where labels are no list of integers, or none.

    >>> groups = group(torch.tensor([5, 3, 5]))
    >>> groups.order.tolist(), groups.count.tolist(), groups.several.tolist()
    ([1, 0, 2], [1, 2], [1])
    """
    if labels.ndim != 1 or not len(labels) or labels.dtype.is_floating_point:
        raise ValueError(f"group: labels: expected integers [samples], got {describe(labels)}")
    count = labels.unique(return_counts=True)[1]
    return Groups(
        labels.argsort(stable=True),
        count.cumsum(0) - count,
        count,
        rearrange((count > 1).nonzero(), "several 1 -> several"),
        int(count.max()),
        int(count.min()),
    )


def triplets(key: random.Key, groups: Groups, num: int) -> tuple[Indices, Indices, Indices]:
    """``num`` times an anchor, another sample of its class, and a sample of another class.

    The class of the anchor is drawn uniformly from those with several samples, anchor and positive
    uniformly within it, and the negative uniformly from all samples of other classes.

    Raises:
        ValueError: where no class has two samples, or there is only one class.

    >>> labels = torch.tensor([0, 0, 1, 1, 2])
    >>> anchor, positive, negative = triplets(random.key(0), group(labels), 8)
    >>> bool((labels[anchor] == labels[positive]).all() and (anchor != positive).all())
    True
    >>> bool((labels[anchor] != labels[negative]).any())
    True
    """
    _check_several("triplets", groups)
    keys = random.split(key, 4).unbind()
    chosen = groups.several[random.randint(keys[0], (num,), 0, len(groups.several))]
    start, count = groups.start[chosen], groups.count[chosen]
    first = _below(keys[1], count)
    second = _below(keys[2], count - 1)
    second = second + (second >= first)
    # Of the places in order, those of the class are left out.
    other = _below(keys[3], len(groups.order) - count)
    other = other + torch.where(other >= start, count, 0)
    return groups.order[start + first], groups.order[start + second], groups.order[other]


def pairs(
    key: random.Key, groups: Groups, num: int, similar: float = 0.5
) -> tuple[Indices, Indices, Bool[Tensor, " num"]]:
    """``num`` pairs of samples, and whether they are of one class.

    Drawn as `triplets`: the first is the anchor, the second its positive or its negative.

    Args:
        similar: how probable a pair of one class is.

    Raises:
        ValueError: as `triplets`, or where ``similar`` is no probability.

    >>> labels = torch.tensor([0, 0, 1, 1, 2])
    >>> first, second, same = pairs(random.key(0), group(labels), 8)
    >>> bool(((labels[first] == labels[second]) == same).all())
    True
    """
    if not 0 <= similar <= 1:
        raise ValueError(f"pairs: similar: expected a rate between 0 and 1, got {similar}")
    _check_several("pairs", groups)
    draw, choose = random.split(key)
    anchor, positive, negative = triplets(draw, groups, num)
    same = random.bernoulli(choose, (num,), similar)
    return anchor, torch.where(same, positive, negative), same


def _check_several(name: str, groups: Groups) -> None:
    if not len(groups.several) or len(groups.count) < 2:
        raise ValueError(
            f"{name}: expected two or more classes, one of them with two or more samples, got "
            f"{len(groups.count)} of at most {groups.largest} samples"
        )


def balanced(
    key: random.Key, groups: Groups, classes: int, samples: int
) -> Int64[Tensor, "classes samples"]:
    """A batch of distinct classes, of each as many distinct samples.

    Raises:
        ValueError: where there are fewer classes, or one has fewer samples.

    >>> labels = torch.tensor([0, 0, 1, 1, 2, 2])
    >>> labels[balanced(random.key(0), group(labels), classes=2, samples=2)].diff(dim=1).tolist()
    [[0], [0]]
    """
    if not 1 <= classes <= len(groups.count):
        raise ValueError(f"balanced: classes: expected 1 to {len(groups.count)}, got {classes}")
    if not 1 <= samples <= groups.smallest:
        raise ValueError(
            f"balanced: samples: expected 1 to {groups.smallest} (the smallest class), "
            f"got {samples}"
        )
    which, within = random.split(key)
    chosen = random.permutation(which, len(groups.count))[:classes]
    # The samples of highest score: a random order, of as many as the class has.
    score = random.uniform(within, (classes, groups.largest), dtype=torch.float64)
    place = torch.arange(groups.largest, device=score.device)
    absent = place >= rearrange(groups.count[chosen], "classes -> classes 1")
    drawn = score.masked_fill(absent, -1.0).topk(samples, dim=1).indices
    return groups.order[rearrange(groups.start[chosen], "classes -> classes 1") + drawn]


@dataclass(frozen=True, eq=False)
class Forgeries:
    """Samples in the order of their persons, of each first those of their own hand.

    Attributes:
        order: indices of the samples.
        start: of each person, the place in ``order`` where theirs begin.
        real: the number of genuine samples, two or more.
        fake: the number of forgeries, one or more.
    """

    order: Int64[Tensor, " samples"]
    start: Int64[Tensor, " persons"]
    real: Int64[Tensor, " persons"]
    fake: Int64[Tensor, " persons"]


def group_forgeries(
    persons: Shaped[Tensor, " samples"], forged: Bool[Tensor, " samples"]
) -> Forgeries:
    """Sorts signatures by person, once, for `forgery_triplets`.

    Args:
        persons: whose signature it is, or pretends to be; any integers.
        forged: whether it only pretends.

    Raises:
        ValueError: where the shapes do not fit, or someone has fewer than two genuine ones or no
            forgery.

    >>> found = group_forgeries(torch.tensor([4, 4, 4]), torch.tensor([False, True, False]))
    >>> found.order.tolist(), found.real.tolist(), found.fake.tolist()
    ([0, 2, 1], [2], [1])
    """
    if persons.ndim != 1 or not len(persons) or forged.shape != persons.shape:
        raise ValueError(
            "group_forgeries: expected persons [samples] and forged [samples], at least one, "
            f"got {describe(persons)} and {describe(forged)}"
        )
    names, place, count = persons.unique(return_inverse=True, return_counts=True)
    fake = torch.zeros_like(count).index_add(0, place, forged.to(count.dtype))
    real = count - fake
    for name, genuine, false in zip(names.tolist(), real.tolist(), fake.tolist(), strict=True):
        if genuine < 2 or not false:
            raise ValueError(
                f"group_forgeries: person {name}: expected two or more genuine samples and one or "
                f"more forged, got {genuine} and {false}"
            )
    order = (2 * place + forged).argsort(stable=True)
    return Forgeries(order, count.cumsum(0) - count, real, fake)


def forgery_triplets(
    key: random.Key, signatures: Forgeries, num: int
) -> tuple[Indices, Indices, Indices]:
    """``num`` times two genuine samples of a person, and a forgery of the same person's.

    Persons are drawn uniformly, and so are the samples of each.

    >>> persons, forged = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([False, False, True] * 2)
    >>> anchor, positive, negative = forgery_triplets(
    ...     random.key(0), group_forgeries(persons, forged), 4
    ... )
    >>> bool((persons[anchor] == persons[negative]).all() and forged[negative].all())
    True
    """
    keys = random.split(key, 4).unbind()
    person = random.randint(keys[0], (num,), 0, len(signatures.start))
    start, real, fake = (
        counts[person] for counts in (signatures.start, signatures.real, signatures.fake)
    )
    first = _below(keys[1], real)
    second = _below(keys[2], real - 1)
    second = second + (second >= first)
    places = first, second, real + _below(keys[3], fake)
    anchor, positive, negative = (signatures.order[start + place] for place in places)
    return anchor, positive, negative


def _below(key: random.Key, bounds: Int64[Tensor, " num"]) -> Indices:
    """Integers, each from 0 to one less than its bound."""
    unit: Float[Tensor, " num"] = random.uniform(key, bounds.shape, dtype=torch.float64)
    return torch.minimum((unit * bounds).to(torch.int64), bounds - 1)

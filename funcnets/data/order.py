"""The order of an epoch: which sample is in which batch, as a pure function of a key.

The batches of epoch e are those of ``random.fold_in(key, e)``, so that a run goes on at any step
from a key and a number alone; `stream` does so for any order here. Indices are on the key's device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeAlias, overload

import torch
from einops import rearrange
from jaxtyping import Int64
from torch import Tensor

from funcnets import random
from funcnets.data.pairs import Groups

Batches: TypeAlias = tuple[Int64[Tensor, " _"], ...]  # the last may be shorter
Full: TypeAlias = Int64[Tensor, "steps batch"]


@overload
def batches(
    key: random.Key, n: int, batch_size: int, drop_last: Literal[False] = False
) -> Batches: ...
@overload
def batches(key: random.Key, n: int, batch_size: int, drop_last: Literal[True]) -> Full: ...
def batches(key: random.Key, n: int, batch_size: int, drop_last: bool = False) -> Batches | Full:
    """All samples in random order, each once, cut into batches.

    Args:
        n: the number of samples.
        drop_last: leave out the last batch where it is not full.

    Returns:
        The indices of each batch, the last of which may be shorter; with ``drop_last`` one tensor
        [steps, batch_size].

    Raises:
        ValueError: where there is no sample, or with ``drop_last`` no full batch.

    >>> [batch.tolist() for batch in batches(random.key(0), 5, batch_size=2)]
    [[3, 1], [2, 4], [0]]
    """
    check_order("batches", n, batch_size, drop_last)
    return cut(random.permutation(key, n), batch_size, drop_last)


@overload
def stratified_batches(
    key: random.Key, groups: Groups, batch_size: int, drop_last: Literal[False] = False
) -> Batches: ...
@overload
def stratified_batches(
    key: random.Key, groups: Groups, batch_size: int, drop_last: Literal[True]
) -> Full: ...
def stratified_batches(
    key: random.Key, groups: Groups, batch_size: int, drop_last: bool = False
) -> Batches | Full:
    """As `batches`, with the share of every class in each batch near that in all samples.

    The samples of a class are spread evenly over the epoch (Webster's apportionment), and the order
    of the full batches is shuffled then. In a batch of b, a class whose share of all is s has b s
    samples, give or take at most 1 + s times the number of classes.

    Args:
        groups: from `group`, of the labels.

    >>> from funcnets.data.pairs import group
    >>> labels = torch.tensor([0, 0, 0, 0, 1, 1])
    >>> found = stratified_batches(random.key(0), group(labels), 3)
    >>> [labels[batch].sum().item() for batch in found]
    [1, 1]
    """
    n = len(groups.order)
    check_order("stratified_batches", n, batch_size, drop_last)
    draw, shuffle = random.split(key)
    order = _spread(draw, groups)
    return cut(_shuffled(shuffle, order, batch_size), batch_size, drop_last)


@overload
def balanced_batches(
    key: random.Key, groups: Groups, batch_size: int, drop_last: Literal[False] = False
) -> Batches: ...
@overload
def balanced_batches(
    key: random.Key, groups: Groups, batch_size: int, drop_last: Literal[True]
) -> Full: ...
def balanced_batches(
    key: random.Key, groups: Groups, batch_size: int, drop_last: bool = False
) -> Batches | Full:
    """An epoch in which every class comes as often as the largest one.

    Samples of smaller classes are repeated, those of one class equally often (give or take once),
    and every batch has as many of one class as of another, give or take two. (`balanced` draws one
    batch of distinct samples, for losses that compare them.)

    >>> from funcnets.data.pairs import group
    >>> labels = torch.tensor([0, 0, 0, 0, 1, 1])
    >>> found = balanced_batches(random.key(0), group(labels), 4)
    >>> [labels[batch].sum().item() for batch in found]
    [2, 2]
    """
    classes = len(groups.count)
    check_order("balanced_batches", classes * groups.largest, batch_size, drop_last)
    within, across, shuffle = random.split(key, 3).unbind()
    # Each class goes through its samples in a random order, again and again.
    place = within_classes(within, groups)
    turn = torch.arange(groups.largest, device=place.device)
    turns = turn % rearrange(groups.count, "classes -> classes 1")
    found = place[rearrange(groups.start, "classes -> classes 1") + turns]
    # In every turn one sample of each class, in an order drawn for it.
    score = random.uniform(across, (groups.largest, classes), dtype=torch.float64)
    found = rearrange(found, "classes turns -> turns classes").gather(1, score.argsort(1))
    order = groups.order[rearrange(found, "turns classes -> (turns classes)")]
    return cut(_shuffled(shuffle, order, batch_size), batch_size, drop_last)


def stream(
    order: Callable[[random.Key], Sequence[Tensor]], key: random.Key, start: int = 0
) -> Iterator[Tensor]:
    """The batches of one epoch after another, without end.

    Args:
        order: from a key to the batches of an epoch, of which every epoch has as many.
        start: the number of batches that are passed over: those of the epochs before are not drawn,
            and what follows is what would have followed.

    >>> order = lambda key: batches(key, 5, batch_size=2)
    >>> first, again = stream(order, random.key(0)), stream(order, random.key(0), start=100)
    >>> for _ in range(100):
    ...     _ = next(first)
    >>> bool((next(first) == next(again)).all())
    True
    """
    if start < 0:
        raise ValueError(f"stream: start: expected at least 0, got {start}")
    steps = len(order(random.fold_in(key, 0)))
    epoch, place = divmod(start, steps)
    while True:
        yield from order(random.fold_in(key, epoch))[place:]
        epoch, place = epoch + 1, 0


def check_order(name: str, n: int, batch_size: int, drop_last: bool) -> None:
    """Raises where there is nothing to cut into batches."""
    if n < 1:
        raise ValueError(f"{name}: expected at least one sample, got {n}")
    if batch_size < 1:
        raise ValueError(f"{name}: batch_size: expected at least 1, got {batch_size}")
    if drop_last and n < batch_size:
        raise ValueError(
            f"{name}: batch_size: expected at most {n} (the samples), for there to be a full "
            f"batch, got {batch_size}"
        )


def cut(order: Tensor, batch_size: int, drop_last: bool) -> Batches | Full:
    """An order, cut into batches."""
    if not drop_last:
        return order.split(batch_size)
    steps = len(order) // batch_size
    return rearrange(order[: steps * batch_size], "(steps batch) -> steps batch", steps=steps)


def within_classes(key: Tensor, groups: Groups) -> Tensor:
    """Places in ``groups.order``, those of a class together as there, but in random order."""
    n = len(groups.order)
    return (_class_at(groups) * n + random.permutation(key, n)).argsort()


def _class_at(groups: Groups) -> Tensor:
    """The class of each sample of ``groups.order``."""
    place = torch.arange(len(groups.order), device=groups.start.device)
    return torch.searchsorted(groups.start, place, right=True) - 1


def _spread(key: Tensor, groups: Groups) -> Tensor:
    """The samples, each class in random order and spread evenly among the others."""
    within, ties = random.split(key)
    samples, number = groups.order[within_classes(within, groups)], _class_at(groups)
    place = torch.arange(len(samples), device=samples.device)
    time = (place - groups.start[number] + 0.5) / groups.count[number].to(torch.float64)
    mixed = random.permutation(ties, len(samples))
    return samples[mixed[time[mixed].argsort(stable=True)]]


def _shuffled(key: Tensor, order: Tensor, batch_size: int) -> Tensor:
    """The full batches in another order; what is left over stays last."""
    steps = len(order) // batch_size
    full = rearrange(order[: steps * batch_size], "(steps batch) -> steps batch", batch=batch_size)
    mixed = rearrange(full[random.permutation(key, steps)], "steps batch -> (steps batch)")
    return torch.cat([mixed, order[steps * batch_size :]])

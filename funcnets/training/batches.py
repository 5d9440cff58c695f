"""The batches of a run in their order, from any step on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor
from torch.func import vmap

from funcnets import tree
from funcnets.data.order import batches as ordered
from funcnets.data.order import check_order
from funcnets.random import Key
from funcnets.training.state import order_key
from funcnets.tree.flatten import Tree

Batches: TypeAlias = Callable[[Tensor], Iterable[Any]] | Iterable[Any]


class Epoch(Sequence[Any]):
    """The batches of one epoch, cut out of the data when they are asked for.

    >>> import torch
    >>> list(Epoch(torch.arange(4), [torch.tensor([3, 1]), torch.tensor([0, 2])]))
    [tensor([3, 1]), tensor([0, 2])]
    """

    def __init__(self, data: Tree, index: Sequence[Tensor]) -> None:
        self._data = data
        self._index = index

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(f"expected one of {len(self)} batches, got {place}")
        index = self._index[place]
        return tree.map(lambda leaf: leaf[index], self._data)


def minibatches(
    data: Tree, order: int | Callable[[Tensor], Iterable[Tensor]], *, drop_last: bool = False
) -> Callable[[Tensor], Epoch]:
    """From a key to the batches of an epoch in the order of that key: what `fit` takes.

    Args:
        data: a tree of tensors with the samples along the first axis, ``(inputs, targets)`` say.
        order: the number of samples in a batch, for the order of `funcnets.data.batches`, with
            ``drop_last`` as there; or any other order, a function from a key to the indices of
            each batch: ``lambda key: data.stratified_batches(key, groups, 64)``.

    Returns:
        A function of a key, or of keys [members, 2], which gives each member an order of its own:
        batches [members, batch, ...].

    >>> import torch
    >>> from funcnets import random
    >>> epoch = minibatches((torch.arange(6), torch.arange(6)), 4)(random.key(0))
    >>> [len(inputs) for inputs, targets in epoch]
    [4, 2]
    """
    sizes = {leaf.shape[0] if leaf.ndim else 0 for leaf in tree.leaves(data)}
    if len(sizes) != 1 or 0 in sizes:
        found = tree.leaves_with_path(data)
        shapes = ", ".join(f"{tree.join(path)} {list(leaf.shape)}" for path, leaf in found)
        raise ValueError(f"minibatches: expected data with one number of samples, got {shapes}")
    count = sizes.pop()
    if isinstance(order, int):
        check_order("minibatches", count, order, drop_last)

    def one(key: Key) -> tuple[Tensor, ...]:
        if not isinstance(order, int):
            return tuple(order(key))
        return tuple(ordered(key, count, order, True) if drop_last else ordered(key, count, order))

    def epoch(key: Tensor) -> Epoch:
        return Epoch(data, one(key) if key.ndim == 1 else vmap(one)(key))

    return epoch


class Turn(NamedTuple):
    """A batch and its place: the epoch, the number of the step, and whether the epoch ends."""

    epoch: int
    step: int
    last: bool
    batch: Any


def turns(batches: Batches, key: Tensor, start: int = 0) -> Iterator[Turn]:
    """The batches without end, epoch by epoch, from step number ``start`` on.

    Args:
        batches: a function of a key that gives an epoch's batches, or the batches themselves, which
            then come again every epoch. What is a sequence is entered in the middle; of anything
            else the batches before ``start`` are read and dropped.
        key: ``state.key``, of shape [2] or [members, 2].

    Raises:
        ValueError: where an epoch has no batch.
        TypeError: the batches are neither a function nor a sequence, or have names.
    """
    known = callable(batches) or hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")
    if not known or isinstance(batches, (str, bytes, dict)):
        raise TypeError(
            "batches: expected a function of a key, as minibatches gives it, or a sequence of "
            f"batches, got {tree.describe(batches)}"
        )
    step = 0
    for epoch in itertools.count():
        order: Any = batches
        if callable(batches):
            keyed = order_key if key.ndim == 1 else vmap(order_key, in_dims=(0, None))
            order = batches(keyed(key, epoch))
        begin = step
        if hasattr(order, "__getitem__") and hasattr(order, "__len__"):
            step += min(max(start - step, 0), len(order))
            for i in range(step - begin, len(order)):
                yield Turn(epoch, step, i + 1 == len(order), order[i])
                step += 1
        else:
            rest = iter(order)
            batch = next(rest, _END)
            while batch is not _END:
                following = next(rest, _END)
                if step >= start:
                    yield Turn(epoch, step, following is _END, batch)
                step, batch = step + 1, following
        if step == begin:
            raise ValueError(f"batches: epoch {epoch}: expected at least one batch, got none")


_END = object()

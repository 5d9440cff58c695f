"""Batches of samples of near lengths, so that little of a batch is padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from jaxtyping import Int, Int64
from torch import Tensor

from funcnets import random
from funcnets.tree.flatten import describe

Batches: TypeAlias = tuple[Int64[Tensor, " _"], ...]  # of different sizes


@dataclass(frozen=True, eq=False)
class Buckets:
    """The samples in the order of their lengths, cut into buckets.

    Attributes:
        samples: of each bucket, the indices.
        batch_sizes: of the batches of each bucket.
        longest: the length of the longest sample of each.
    """

    samples: Batches
    batch_sizes: tuple[int, ...]
    longest: tuple[int, ...]


def buckets(
    lengths: Int[Tensor, " samples"],
    num: int = 8,
    *,
    batch_size: int | None = None,
    tokens: int | None = None,
) -> Buckets:
    """Sorts samples by length, once, for `bucket_batches`.

    Args:
        lengths: of at least one.
        num: of buckets, with as many samples in one as in another, give or take one.
        batch_size: of all batches; or instead
        tokens: what a padded batch may hold at most, its samples times the longest of its bucket.

    Raises:
        ValueError: where lengths are no list of positive integers, a sample has more than
            ``tokens``, or not exactly one of ``batch_size`` and ``tokens`` is given.

    >>> import torch
    >>> found = buckets(torch.tensor([5, 1, 4, 2]), 2, tokens=8)
    >>> [samples.tolist() for samples in found.samples], found.batch_sizes, found.longest
    ([[1, 3], [2, 0]], (4, 1), (2, 5))
    """
    if lengths.ndim != 1 or not len(lengths) or lengths.is_floating_point():
        raise ValueError(
            f"buckets: lengths: expected integers [samples], at least one, got {describe(lengths)}"
        )
    if int(lengths.min()) < 1:
        raise ValueError(f"buckets: lengths: expected at least 1, got {int(lengths.min())}")
    if num < 1:
        raise ValueError(f"buckets: num: expected at least 1, got {num}")
    if (batch_size is None) == (tokens is None):
        raise ValueError(
            f"buckets: expected one of batch_size and tokens, got {batch_size} and {tokens}"
        )
    order = lengths.argsort(stable=True)
    parts = order.tensor_split(min(num, len(order)))
    longest = tuple(int(lengths[part[-1]]) for part in parts)
    if batch_size is not None:
        sizes = (batch_size,) * len(parts)
    else:
        assert tokens is not None
        if longest[-1] > tokens:
            raise ValueError(
                f"buckets: tokens: expected at least {longest[-1]} (the length of sample "
                f"{int(order[-1])}), got {tokens}"
            )
        sizes = tuple(tokens // length for length in longest)
    if min(sizes) < 1:
        raise ValueError(f"buckets: batch_size: expected at least 1, got {batch_size}")
    return Buckets(parts, sizes, longest)


def bucket_batches(key: random.Key, buckets: Buckets) -> Batches:
    """All samples, each once, in batches of one bucket each, in random order.

    Every epoch has as many batches. (Their sizes differ, so this does not work under vmap over
    keys.)

    >>> import torch
    >>> found = buckets(torch.tensor([5, 1, 4, 2]), 2, tokens=8)
    >>> [batch.tolist() for batch in bucket_batches(random.key(0), found)]
    [[3, 1], [0], [2]]
    """
    *within, across = random.split(key, len(buckets.samples) + 1).unbind()
    cut: list[Tensor] = []
    for own, samples, size in zip(within, buckets.samples, buckets.batch_sizes, strict=True):
        cut.extend(samples[random.permutation(own, len(samples))].split(size))
    return tuple(cut[place] for place in random.permutation(across, len(cut)).tolist())

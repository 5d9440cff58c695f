"""What the tests of trees share: trees as Hypothesis draws them, and when two are the same."""

import torch

from funcnets import tree
from funcnets.testing.strategies import nested, tensors
from funcnets.testing.strategies import trees as params

__all__ = ["nested", "params", "same", "tensors"]


def same(first, second):
    """Whether names, dtypes, shapes, values and batch sizes are equal, whatever the order."""
    a, b = tree.entries(first), tree.entries(second)
    if a is None or b is None:
        if a is not b or first.dtype != second.dtype or first.shape != second.shape:
            return False
        return torch.equal(first, second)
    size = getattr(first, "batch_size", None) == getattr(second, "batch_size", None)
    return size and a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)

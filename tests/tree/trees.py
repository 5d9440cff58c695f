"""Parameter trees as Hypothesis draws them."""

import torch
from hypothesis import strategies as st
from tensordict import TensorDict

from funcnets import random, tree

NAMES = st.sampled_from(
    ["weight", "bias", "running_mean", "running_var", "0", "1", "conv1", "layer1", "fc"]
)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool])
SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)


def _tensor(shape, dtype, seed):
    values = random.normal(random.key(seed), shape, 0.0, 3.0, torch.float64)
    return values > 0 if dtype == torch.bool else values.to(dtype)


def tensors(shapes=SHAPES, dtypes=DTYPES):
    return st.builds(_tensor, shapes, dtypes, st.integers(0, 2**32))


def nested(leaves=None, min_size=1):
    """Nested dicts of tensors, without empty ones below the root."""
    leaves = tensors() if leaves is None else leaves
    return st.dictionaries(
        NAMES,
        st.recursive(
            leaves,
            lambda inner: st.dictionaries(NAMES, inner, min_size=1, max_size=3),
            max_leaves=8,
        ),
        min_size=min_size,
        max_size=4,
    )


def params(leaves=None, min_size=1):
    return nested(leaves, min_size).map(lambda entries: TensorDict(entries))


def same(first, second):
    """Whether names, dtypes, shapes, values and batch sizes are equal, whatever the order."""
    a, b = tree.entries(first), tree.entries(second)
    if a is None or b is None:
        if a is not b or first.dtype != second.dtype or first.shape != second.shape:
            return False
        return torch.equal(first, second)
    size = getattr(first, "batch_size", None) == getattr(second, "batch_size", None)
    return size and a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)

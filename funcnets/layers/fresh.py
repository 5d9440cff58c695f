"""Steps that write over a tensor just made, which nothing else reads: no memory for a second one.

Memory not taken is memory not cleared: a training step of ResNet-18 gains about five in a hundred.
The steps write so only in plain eager code. Under a transform they make a new tensor, for vmap
cannot write members into a tensor that has none, and under a trace too, for the compiler plans the
memory. What a tap may have kept is not fresh.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from funcnets import _torch
from funcnets.layers.activations import Activation

# Those whose derivative is told by their outputs; the others would keep a copy of the input.
_IN_PLACE: frozenset[Callable[..., Tensor]] = frozenset({F.relu, F.relu6})


def activate_fresh(activation: Activation, x: Tensor) -> Tensor:
    """``activation(x)``, in the memory of ``x`` where that gains something."""
    if activation not in _IN_PLACE or _torch.inlining():
        return activation(x)
    return activation(x, inplace=True)  # type: ignore[call-arg]


def add_fresh(x: Tensor, other: Tensor) -> Tensor:
    """``x + other``, in the memory of ``x`` where that is possible."""
    if _torch.inlining() or x.shape != other.shape or x.dtype != other.dtype:
        return x + other
    return x.add_(other)

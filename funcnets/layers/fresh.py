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

# Those whose derivative is told by their outputs; for the others autograd would copy the input.
_BY_OUTPUTS: frozenset[Callable[..., Tensor]] = frozenset({F.relu, F.relu6})
_WITHOUT_GRADIENT: frozenset[Callable[..., Tensor]] = _BY_OUTPUTS | {
    F.celu,
    F.elu,
    F.hardsigmoid,
    F.hardswish,
    F.hardtanh,
    F.leaky_relu,
    F.mish,
    F.selu,
    F.silu,
}


def activate_fresh(activation: Activation, x: Tensor) -> Tensor:
    """``activation(x)``, in the memory of ``x`` where that gains something."""
    known = _BY_OUTPUTS if x.requires_grad else _WITHOUT_GRADIENT
    if activation not in known or _torch.inlining():
        return activation(x)
    return activation(x, inplace=True)  # type: ignore[call-arg]


def add_fresh(x: Tensor, other: Tensor) -> Tensor:
    """``x + other``, in the memory of ``x`` where that is possible."""
    if _torch.inlining() or x.shape != other.shape or x.dtype != other.dtype:
        return x + other
    return x.add_(other)

"""Pooling.

Pooling has no parameters, so torch's own functions are the layers: they work under vmap, grad and
forward mode as they are. Beside them stand those that torch.nn has no function for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from einops import reduce
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import (
    adaptive_avg_pool1d,
    adaptive_avg_pool2d,
    adaptive_avg_pool3d,
    adaptive_max_pool1d,
    adaptive_max_pool2d,
    adaptive_max_pool3d,
    avg_pool1d,
    avg_pool2d,
    avg_pool3d,
    max_pool1d,
    max_pool2d,
    max_pool3d,
)

from funcnets.layers.activations import Activation
from funcnets.layers.fresh import activate_fresh

__all__ = [
    "activate_and_pool",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "global_avg_pool",
    "global_max_pool",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
]

_OF_THE_LARGEST = frozenset({max_pool1d, max_pool2d, max_pool3d})


def global_avg_pool(
    x: Float[Tensor, "batch channels *spatial"],
) -> Float[Tensor, "batch channels"]:
    """The mean of each channel over all spatial axes.

    >>> import torch
    >>> global_avg_pool(torch.ones(2, 3, 8, 8)).shape
    torch.Size([2, 3])
    """
    return reduce(x, "batch channels ... -> batch channels", "mean")


def global_max_pool(
    x: Float[Tensor, "batch channels *spatial"],
) -> Float[Tensor, "batch channels"]:
    """The maximum of each channel over all spatial axes.

    >>> import torch
    >>> global_max_pool(torch.arange(4.0).reshape(1, 2, 2))
    tensor([[1., 3.]])
    """
    return reduce(x, "batch channels ... -> batch channels", "max")


def activate_and_pool(
    activation: Activation,
    pool: Callable[..., Tensor],
    x: Float[Tensor, "batch channels *spatial"],
    *window: Any,
    tap: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "batch channels *pooled"]:
    """``pool(activation(x), *window)``: the same numbers and gradients, for less where that can be.

    ReLU keeps the order of values, so the largest of a window are found before it as well as after,
    and then they alone are rectified.

    Args:
        pool: one of the functions of this file.
        window: its further arguments: size, stride, padding.
        tap: is given the activations, and returns what is pooled in their place.

    >>> import torch
    >>> activate_and_pool(F.relu, max_pool1d, torch.tensor([[[-2.0, -1.0, 3.0, -4.0]]]), 2)
    tensor([[[0., 3.]]])
    """
    if activation is F.relu and pool in _OF_THE_LARGEST and tap is None:
        return activate_fresh(activation, pool(x, *window))
    x = activation(x)
    return pool(x if tap is None else tap(x), *window)

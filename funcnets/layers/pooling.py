"""Pooling.

Pooling has no parameters, so torch's own functions are the layers: they work under vmap, grad and
forward mode as they are. Beside them stand those that torch.nn has no function for, and a faster
`max_pool2d`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
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
    max_pool3d,
)

from funcnets import _torch
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

# From how many numbers and channels on it pays to look for the largest with channels last.
_MANY_NUMBERS, _SEVERAL_CHANNELS = 2**16, 8

Sizes: TypeAlias = int | tuple[int, ...] | list[int]


def max_pool2d(
    x: Float[Tensor, "*batch channels height width"],
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """`torch.nn.functional.max_pool2d`, bit for bit, its gradients included.

    On a CPU torch looks for the largest of a window number by number where images are contiguous,
    and in all channels at once where those come last. So eager code finds the places in a copy with
    channels last, and gathers from there: a half of the time of a forward and a backward pass, a
    third of a forward pass.

    >>> max_pool2d(torch.arange(16.0).reshape(1, 1, 4, 4), 2)
    tensor([[[[ 5.,  7.],
              [13., 15.]]]])
    """
    window: Any = kernel_size, stride, padding, dilation, ceil_mode, return_indices
    if return_indices or not _gains_with_channels_last(x):
        return F.max_pool2d(x, *window)
    last = rearrange(x.detach(), "batch channels height width -> batch height width channels")
    _, places = F.max_pool2d(
        rearrange(last.contiguous(), "batch height width channels -> batch channels height width"),
        *window[:-1],
        return_indices=True,
    )
    flat = "batch channels height width -> batch channels (height width)"
    found = rearrange(x, flat).gather(2, rearrange(places, flat))
    return rearrange(
        found,
        "batch channels (height width) -> batch channels height width",
        height=places.shape[2],
    )


def _gains_with_channels_last(x: Tensor) -> bool:
    if torch.compiler.is_dynamo_compiling() or _torch.abstract():
        return False  # what compiles lays out its own loops
    if x.ndim != 4 or x.device.type != "cpu" or x.shape[1] < _SEVERAL_CHANNELS:
        return False
    # In narrower dtypes a sum of several gradients would be rounded otherwise.
    if x.dtype not in (torch.float32, torch.float64):
        return False
    held = _torch.physical(x)
    return held.numel() >= _MANY_NUMBERS and held.stride(-3) != 1


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

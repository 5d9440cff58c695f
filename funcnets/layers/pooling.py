"""Pooling.

Pooling has no parameters, so torch's own functions are the layers: they work under vmap, grad and
forward mode as they are. Beside them stand the two that torch.nn has no function for.
"""

from __future__ import annotations

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

__all__ = [
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

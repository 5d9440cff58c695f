"""A convolution, its norm and its activation: the brick of most convolutional networks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from tensordict import TensorDict
from torch import Tensor

from funcnets import random
from funcnets.layers.activations import Activation
from funcnets.layers.buffers import finish, with_buffers
from funcnets.layers.conv import Size, conv, init_conv
from funcnets.layers.fresh import activate_fresh
from funcnets.layers.initializers import Initializer
from funcnets.layers.norm import batch_norm, init_batch_norm
from funcnets.layers.params import entries
from funcnets.random import Key


def init_conv_norm(
    key: Key,
    in_channels: int,
    out_channels: int,
    kernel_size: Size = 3,
    *,
    dims: int = 2,
    groups: int = 1,
    weight_init: Initializer | None = None,
    dtype: torch.dtype = torch.float32,
) -> TensorDict:
    """Parameters of `conv_norm`: the convolution ``0`` (without bias) and the batch norm ``1``.

    The names are those of ``torchvision.ops.Conv2dNormActivation``; arguments as in `init_conv`.
    """
    conv_key, norm_key = random.split(key)
    return TensorDict(
        {
            "0": init_conv(
                conv_key,
                in_channels,
                out_channels,
                kernel_size,
                dims=dims,
                groups=groups,
                bias=False,
                weight_init=weight_init,
                dtype=dtype,
            ),
            "1": init_batch_norm(norm_key, out_channels, dtype=dtype),
        }
    )


def conv_norm(
    params: TensorDict,
    x: Float[Tensor, "batch channels *spatial"],
    *,
    stride: Size = 1,
    padding: Size | None = None,
    dilation: int = 1,
    groups: int = 1,
    activation: Activation | None = F.relu,
    momentum: float = 0.1,
    eps: float = 1e-5,
    train: bool = False,
) -> Any:
    """Convolution, batch norm and activation, as ``torchvision.ops.Conv2dNormActivation``.

    Args:
        padding: of the convolution; by default what keeps the size at stride 1 (odd kernels).
        activation: None for none.
        momentum: of the batch norm, as ``eps``.

    Returns:
        The outputs, and with ``train=True`` also the new buffers.

    >>> params = init_conv_norm(random.key(0), 3, 8)
    >>> conv_norm(params, torch.ones(1, 3, 16, 16), stride=2).shape
    torch.Size([1, 8, 8, 8])
    """
    found = entries(params)
    if padding is None:
        kernel = entries(found["0"])["weight"].shape[2:]
        padding = [(size - 1) // 2 * dilation for size in kernel]
    x = conv(found["0"], x, stride=stride, padding=padding, dilation=dilation, groups=groups)
    x, buffers = with_buffers(batch_norm, found["1"], x, train=train, momentum=momentum, eps=eps)
    if activation is not None:
        x = activate_fresh(activation, x)
    return finish(x, {"1": buffers}, train)

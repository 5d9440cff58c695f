"""Residual blocks: what they compute is added to their input (He et al. 2016)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from tensordict import TensorDict
from torch import Tensor

from funcnets import random
from funcnets.layers.buffers import finish, with_buffers
from funcnets.layers.conv import conv, init_conv
from funcnets.layers.conv_norm import conv_norm, init_conv_norm
from funcnets.layers.dropout import Rate, stochastic_depth
from funcnets.layers.fresh import activate_fresh, add_fresh
from funcnets.layers.initializers import Initializer, kaiming_normal, zeros
from funcnets.layers.norm import batch_norm, init_batch_norm
from funcnets.layers.params import check_positive, entries
from funcnets.layers.squeeze_excitation import init_squeeze_excitation, squeeze_excitation
from funcnets.random import Key

_KAIMING = kaiming_normal(mode="fan_out", nonlinearity="relu")


def init_residual_block(
    key: Key,
    in_channels: int,
    out_channels: int,
    *,
    downsample: bool | None = None,
    squeeze: int | None = None,
    zero_init: bool = False,
    weight_init: Initializer = _KAIMING,
    dtype: torch.dtype = torch.float32,
) -> TensorDict:
    """Parameters of a basic `residual_block`, named as in ``torchvision.models.resnet.BasicBlock``.

    Two 3x3 convolutions with norms: ``conv1``, ``bn1``, ``conv2``, ``bn2``; then ``downsample``
    (a 1x1 convolution ``0`` and a norm ``1``) and ``se`` where there are any.

    Args:
        downsample: whether the shortcut has a convolution, as it must where the block has a stride;
            by default, where the channels change.
        squeeze: channels between the two layers of squeeze-and-excitation; None for none.
        zero_init: whether the last norm begins at zero, so that the block begins as the identity.
    """
    shapes = {1: (out_channels, in_channels, 3, 1), 2: (out_channels, out_channels, 3, 1)}
    return _init_block(key, in_channels, shapes, downsample, squeeze, zero_init, weight_init, dtype)


def init_bottleneck_block(
    key: Key,
    in_channels: int,
    out_channels: int,
    width: int,
    *,
    groups: int = 1,
    downsample: bool | None = None,
    squeeze: int | None = None,
    zero_init: bool = False,
    weight_init: Initializer = _KAIMING,
    dtype: torch.dtype = torch.float32,
) -> TensorDict:
    """Parameters of a bottleneck `residual_block`, as in ``torchvision.models.resnet.Bottleneck``.

    A 1x1, a 3x3 and a 1x1 convolution; names and arguments as in `init_residual_block`.

    Args:
        width: channels of the 3x3 convolution.
        groups: of the 3x3 convolution.
    """
    shapes = {
        1: (width, in_channels, 1, 1),
        2: (width, width, 3, groups),
        3: (out_channels, width, 1, 1),
    }
    return _init_block(key, in_channels, shapes, downsample, squeeze, zero_init, weight_init, dtype)


def residual_block(
    params: TensorDict,
    x: Float[Tensor, "batch channels height width"],
    *,
    stride: int = 1,
    drop_rate: Rate = 0.0,
    train: bool = False,
    key: Key | None = None,
) -> Any:
    """``relu(branch(x) + shortcut(x))``, basic or bottleneck as the parameters say.

    As ``torchvision.models.resnet.BasicBlock`` and ``Bottleneck``. The stride is that of the 3x3
    convolution (in the basic block, the first), and of the shortcut.

    Args:
        drop_rate: of stochastic depth, in training: the probability with which a sample's branch is
            left out; then ``key`` is needed.

    Returns:
        The outputs, and with ``train=True`` also the new buffers.

    Raises:
        ValueError: for a stride without a downsampling shortcut.

    >>> params = init_residual_block(random.key(0), 8, 16)
    >>> residual_block(params, torch.ones(1, 8, 6, 6), stride=2).shape
    torch.Size([1, 16, 3, 3])
    """
    found, new = entries(params), {}
    convolutions = sum(name.startswith("conv") for name in found)
    if stride != 1 and "downsample" not in found:
        raise ValueError(
            f"residual_block: params: expected an entry downsample, as stride={stride}, "
            f"got {', '.join(found)}"
        )
    out = x
    strided = convolutions - 1
    for i in range(1, convolutions + 1):
        kernel = found[f"conv{i}"]
        weight = entries(kernel)["weight"]
        out = conv(
            kernel,
            out,
            stride=stride if i == strided else 1,
            padding=weight.shape[-1] // 2,
            groups=out.shape[1] // weight.shape[1],
        )
        out, new[f"bn{i}"] = with_buffers(batch_norm, found[f"bn{i}"], out, train=train)
        if i < convolutions:
            out = activate_fresh(F.relu, out)
    if "se" in found:
        out = squeeze_excitation(found["se"], out)
    if train and key is not None:
        out = stochastic_depth(key, out, drop_rate, "row")
    if "downsample" in found:
        x, new["downsample"] = with_buffers(
            conv_norm, found["downsample"], x, train=train, stride=stride, activation=None
        )
    return finish(activate_fresh(F.relu, add_fresh(out, x)), new, train)


def _init_block(
    key: Key,
    in_channels: int,
    shapes: dict[int, tuple[int, int, int, int]],
    downsample: bool | None,
    squeeze: int | None,
    zero_init: bool,
    weight_init: Initializer,
    dtype: torch.dtype,
) -> TensorDict:
    """Convolutions of the shapes (out_channels, in_channels, kernel_size, groups), each normed."""
    keys = random.split(key, len(shapes) + 2).unbind()
    out_channels = shapes[len(shapes)][0]
    found = {}
    for i, (outputs, inputs, kernel_size, groups) in shapes.items():
        check_positive("init_residual_block", in_channels=inputs, out_channels=outputs)
        last = zero_init and i == len(shapes)
        found[f"conv{i}"] = init_conv(
            keys[i - 1],
            inputs,
            outputs,
            kernel_size,
            groups=groups,
            bias=False,
            weight_init=weight_init,
            dtype=dtype,
        )
        found[f"bn{i}"] = init_batch_norm(
            keys[i - 1], outputs, weight_init=zeros() if last else None, dtype=dtype
        )
    if in_channels != out_channels if downsample is None else downsample:
        found["downsample"] = init_conv_norm(
            keys[-1], in_channels, out_channels, 1, weight_init=weight_init, dtype=dtype
        )
    if squeeze is not None:
        found["se"] = init_squeeze_excitation(keys[-2], out_channels, squeeze, dtype=dtype)
    return TensorDict(found)

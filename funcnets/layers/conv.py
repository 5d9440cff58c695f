"""Convolutions in one, two and three dimensions; the weight tells which."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from tensordict import TensorDict
from torch import Tensor

from funcnets import random
from funcnets.layers.initializers import Initializer
from funcnets.layers.linear import uniform_within
from funcnets.layers.params import check_positive, entries, fail, shape, weight_and_bias
from funcnets.random import Key

Size = int | Sequence[int]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def init_conv(
    key: Key,
    in_channels: int,
    out_channels: int,
    kernel_size: Size,
    *,
    dims: int = 2,
    groups: int = 1,
    bias: bool = True,
    weight_init: Initializer | None = None,
    bias_init: Initializer | None = None,
    dtype: torch.dtype = torch.float32,
) -> TensorDict:
    """Parameters of `conv`: weight [out_channels, in_channels / groups, *kernel] and bias.

    Args:
        kernel_size: one size for all dimensions, or one per dimension.
        dims: spatial dimensions, 1 to 3, as in ``torch.nn.Conv1d`` to ``Conv3d``, whose default
            draws these are: uniform within ``1 / sqrt(fan_in)``.

    Raises:
        ValueError: where ``groups`` does not divide the channels.
    """
    _check_channels("init_conv", in_channels, out_channels, groups)
    kernel = _kernel("init_conv", kernel_size, dims)
    size = (out_channels, in_channels // groups, *kernel)
    default = uniform_within(math.prod(size[1:]))
    weight_key, bias_key = random.split(key)
    found = {"weight": (weight_init or default)(weight_key, size, dtype)}
    if bias:
        found["bias"] = (bias_init or default)(bias_key, (out_channels,), dtype)
    return TensorDict(found)


def conv(
    params: TensorDict,
    x: Float[Tensor, "*input"],
    *,
    stride: Size = 1,
    padding: Size | Literal["same", "valid"] = 0,
    dilation: Size = 1,
    groups: int = 1,
    padding_mode: PaddingMode = "zeros",
) -> Float[Tensor, "*output"]:
    """Cross-correlation of the spatial axes, as ``torch.nn.Conv1d``, ``Conv2d`` and ``Conv3d``.

    Args:
        x: [batch, channels, *spatial] or [channels, *spatial], with as many spatial axes as the
            weight has.
        padding: at both ends of each spatial axis; "same" keeps the size (stride 1 only), and an
            odd total puts the larger part at the end; "valid" is none.
        padding_mode: what the padding holds.

    >>> params = init_conv(random.key(0), 3, 8, 3)
    >>> conv(params, torch.ones(1, 3, 32, 32), stride=2, padding=1).shape
    torch.Size([1, 8, 16, 16])
    """
    weight, bias = weight_and_bias("conv", params, x)
    dims = _check_weight("conv", weight, "[out_channels, in_channels / groups, *kernel]")
    if groups < 1 or weight.shape[0] % groups:
        fail("conv", "weight", f"out_channels divisible by groups={groups}", weight.shape)
    _check_input("conv", x, weight.shape[1] * groups, dims)
    if padding_mode != "zeros" or padding == "same":
        x, padding = _pad("conv", x, weight, stride, padding, dilation, padding_mode)
    elif padding == "valid":
        padding = 0
    return _CONV[dims](x, weight, bias, stride, padding, dilation, groups)


def init_conv_transpose(
    key: Key,
    in_channels: int,
    out_channels: int,
    kernel_size: Size,
    *,
    dims: int = 2,
    groups: int = 1,
    bias: bool = True,
    weight_init: Initializer | None = None,
    bias_init: Initializer | None = None,
    dtype: torch.dtype = torch.float32,
) -> TensorDict:
    """Parameters of `conv_transpose`: weight [in_channels, out_channels / groups, *kernel], bias.

    Arguments as in `init_conv`. The defaults are those of ``torch.nn.ConvTranspose1d`` to
    ``ConvTranspose3d``: uniform within ``1 / sqrt(out_channels / groups * prod(kernel))``.
    """
    layer = "init_conv_transpose"
    _check_channels(layer, in_channels, out_channels, groups)
    kernel = _kernel(layer, kernel_size, dims)
    size = (in_channels, out_channels // groups, *kernel)
    default = uniform_within(math.prod(size[1:]))
    weight_key, bias_key = random.split(key)
    found = {"weight": (weight_init or default)(weight_key, size, dtype)}
    if bias:
        found["bias"] = (bias_init or default)(bias_key, (out_channels,), dtype)
    return TensorDict(found)


def conv_transpose(
    params: TensorDict,
    x: Float[Tensor, "*input"],
    *,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
) -> Float[Tensor, "*output"]:
    """The adjoint of `conv` in its input, as ``torch.nn.ConvTranspose1d`` to ``ConvTranspose3d``.

    Args:
        x: [batch, channels, *spatial] or [channels, *spatial].
        padding: taken away at both ends of each output axis.
        output_padding: added at the end of each output axis, to choose among the sizes that a
            strided convolution maps to one.

    >>> params = init_conv_transpose(random.key(0), 8, 3, 3)
    >>> x = torch.ones(1, 8, 16, 16)
    >>> conv_transpose(params, x, stride=2, padding=1, output_padding=1).shape
    torch.Size([1, 3, 32, 32])
    """
    weight, bias = weight_and_bias("conv_transpose", params, x)
    dims = _check_weight("conv_transpose", weight, "[in_channels, out_channels / groups, *kernel]")
    if groups < 1 or weight.shape[0] % groups:
        fail("conv_transpose", "weight", f"in_channels divisible by groups={groups}", weight.shape)
    _check_input("conv_transpose", x, weight.shape[0], dims)
    transposed = _CONV_TRANSPOSE[dims]
    return transposed(x, weight, bias, stride, padding, output_padding, groups, dilation)


def init_separable_conv(
    key: Key,
    in_channels: int,
    out_channels: int,
    kernel_size: Size,
    *,
    dims: int = 2,
    bias: bool = True,
    weight_init: Initializer | None = None,
    bias_init: Initializer | None = None,
    dtype: torch.dtype = torch.float32,
) -> TensorDict:
    """Parameters of `separable_conv`: the subtrees ``depthwise`` and ``pointwise``, each of `conv`.

    Arguments as in `init_conv`; the initializers serve both.
    """
    depthwise_key, pointwise_key = random.split(key)
    init = partial(
        init_conv,
        dims=dims,
        bias=bias,
        weight_init=weight_init,
        bias_init=bias_init,
        dtype=dtype,
    )
    return TensorDict(
        {
            "depthwise": init(
                depthwise_key, in_channels, in_channels, kernel_size, groups=in_channels
            ),
            "pointwise": init(pointwise_key, in_channels, out_channels, 1),
        }
    )


def separable_conv(
    params: TensorDict,
    x: Float[Tensor, "*input"],
    *,
    stride: Size = 1,
    padding: Size | Literal["same", "valid"] = 0,
    dilation: Size = 1,
    padding_mode: PaddingMode = "zeros",
) -> Float[Tensor, "*output"]:
    """A convolution of each channel alone, then one of size 1 across channels (Chollet 2017).

    Arguments as in `conv`; all of them shape the depthwise step.

    >>> params = init_separable_conv(random.key(0), 8, 16, 3)
    >>> separable_conv(params, torch.ones(1, 8, 32, 32), padding=1).shape
    torch.Size([1, 16, 32, 32])
    """
    depthwise, pointwise = params["depthwise"], params["pointwise"]
    x = conv(
        depthwise,
        x,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=entries(depthwise)["weight"].shape[0],
        padding_mode=padding_mode,
    )
    return conv(pointwise, x)


def _pad(
    layer: str,
    x: Tensor,
    weight: Tensor,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    mode: str,
) -> tuple[Tensor, Size]:
    """The input with what the convolution itself cannot pad, and what is left for it to pad."""
    dims = weight.ndim - 2
    if padding == "same":
        if any(step != 1 for step in _per_dimension(layer, "stride", stride, dims)):
            raise ValueError(f"{layer}: padding: same needs stride 1, got stride={stride}")
        steps = _per_dimension(layer, "dilation", dilation, dims)
        totals = [step * (size - 1) for step, size in zip(steps, weight.shape[2:], strict=True)]
    elif padding == "valid":
        totals = [0] * dims
    elif isinstance(padding, str):
        raise ValueError(f"{layer}: padding: expected same, valid or sizes, got {padding}")
    else:
        totals = [2 * size for size in _per_dimension(layer, "padding", padding, dims)]
    if mode == "zeros" and not any(total % 2 for total in totals):
        return x, [total // 2 for total in totals]
    # F.pad counts axes from the last.
    ends = [end for total in reversed(totals) for end in (total // 2, total - total // 2)]
    return F.pad(x, ends, mode="constant" if mode == "zeros" else mode), 0


def _per_dimension(layer: str, name: str, size: Size, dims: int) -> tuple[int, ...]:
    sizes = (size,) * dims if isinstance(size, int) else tuple(size)
    if len(sizes) != dims:
        raise ValueError(f"{layer}: {name}: expected an int or {dims} ints, got {list(sizes)}")
    return sizes


def _kernel(layer: str, kernel_size: Size, dims: int) -> tuple[int, ...]:
    if dims not in _CONV:
        raise ValueError(f"{layer}: dims: expected 1, 2 or 3, got {dims}")
    kernel = _per_dimension(layer, "kernel_size", kernel_size, dims)
    check_positive(layer, kernel_size=min(kernel))
    return kernel


def _check_channels(layer: str, in_channels: int, out_channels: int, groups: int) -> None:
    check_positive(layer, in_channels=in_channels, out_channels=out_channels, groups=groups)
    for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
        if channels % groups:
            raise ValueError(f"{layer}: {name}: expected a multiple of {groups=}, got {channels}")


def _check_weight(layer: str, weight: Tensor, expected: str) -> int:
    dims = weight.ndim - 2
    if dims not in _CONV:
        fail(layer, "weight", f"{expected} with 1 to 3 kernel sizes", weight.shape)
    return dims


def _check_input(layer: str, x: Tensor, channels: int, dims: int) -> None:
    if x.ndim - dims not in (1, 2) or x.shape[-dims - 1] != channels:
        spatial = ("length",) if dims == 1 else ("depth", "height", "width")[-dims:]
        fail(layer, "x", shape("(batch)", channels, *spatial), x.shape)

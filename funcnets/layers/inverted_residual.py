"""Inverted residual blocks: narrow between the blocks, wide within (Sandler et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from tensordict import TensorDict
from torch import Tensor

from funcnets import random
from funcnets.layers.activations import Activation
from funcnets.layers.buffers import finish, with_buffers
from funcnets.layers.conv import Size
from funcnets.layers.conv_norm import conv_norm, init_conv_norm
from funcnets.layers.dropout import Rate, stochastic_depth
from funcnets.layers.fresh import add_fresh
from funcnets.layers.initializers import Initializer, kaiming_normal, zeros
from funcnets.layers.params import check_positive, entries
from funcnets.layers.squeeze_excitation import init_squeeze_excitation, squeeze_excitation
from funcnets.random import Key

_KAIMING = kaiming_normal(mode="fan_out")


def init_inverted_residual(
    key: Key,
    in_channels: int,
    out_channels: int,
    expanded_channels: int,
    kernel_size: Size = 3,
    *,
    squeeze: int | None = None,
    fused: bool = False,
    weight_init: Initializer = _KAIMING,
    dtype: torch.dtype = torch.float32,
) -> TensorDict:
    """Parameters of `inverted_residual`: ``block``, a sequence of `conv_norm` layers.

    A 1x1 convolution that expands, a depthwise one, squeeze-and-excitation if any, and a 1x1
    convolution that projects, named as in ``torchvision.models.efficientnet.MBConv`` and in the
    ``InvertedResidual`` of ``torchvision.models.mobilenetv3``.

    Args:
        expanded_channels: channels within; where they are ``in_channels``, nothing expands.
        squeeze: channels between the two layers of squeeze-and-excitation; None for none.
        fused: whether one full convolution takes the place of the expanding and the depthwise one,
            as in torchvision's ``FusedMBConv``; where nothing expands, it is the only one.

    Raises:
        ValueError: for a fused block with ``squeeze``.
    """
    check_positive(
        "init_inverted_residual",
        in_channels=in_channels,
        out_channels=out_channels,
        expanded_channels=expanded_channels,
    )
    if fused and squeeze is not None:
        raise ValueError(
            f"init_inverted_residual: squeeze: expected None in a fused block, got {squeeze}"
        )
    keys = iter(random.split(key, 4).unbind())

    def layer(inputs: int, outputs: int, kernel_size: Size = 1, groups: int = 1) -> TensorDict:
        return init_conv_norm(
            next(keys),
            inputs,
            outputs,
            kernel_size,
            groups=groups,
            weight_init=weight_init,
            dtype=dtype,
        )

    expands = expanded_channels != in_channels
    if fused and not expands:
        parts = [layer(in_channels, out_channels, kernel_size)]
    elif fused:
        parts = [
            layer(in_channels, expanded_channels, kernel_size),
            layer(expanded_channels, out_channels),
        ]
    else:
        parts = [layer(in_channels, expanded_channels)] if expands else []
        parts.append(layer(expanded_channels, expanded_channels, kernel_size, expanded_channels))
        if squeeze is not None:
            parts.append(
                init_squeeze_excitation(
                    next(keys),
                    expanded_channels,
                    squeeze,
                    weight_init=weight_init,
                    bias_init=zeros(),
                    dtype=dtype,
                )
            )
        parts.append(layer(expanded_channels, out_channels))
    return TensorDict({"block": {str(i): part for i, part in enumerate(parts)}})


def inverted_residual(
    params: TensorDict,
    x: Float[Tensor, "batch channels height width"],
    *,
    stride: int = 1,
    dilation: int = 1,
    shortcut: bool | None = None,
    activation: Activation = F.relu,
    squeeze_activation: Activation = F.relu,
    gate: Callable[[Tensor], Tensor] = torch.sigmoid,
    momentum: float = 0.1,
    eps: float = 1e-5,
    drop_rate: Rate = 0.0,
    train: bool = False,
    key: Key | None = None,
) -> Any:
    """Expand, convolve, project, and add the input where it has the shape of the result.

    As ``torchvision.models.efficientnet.MBConv`` and ``FusedMBConv`` and the ``InvertedResidual``
    of ``torchvision.models.mobilenetv3``; the parameters tell which. The last convolution has no
    activation, unless it is the only one.

    Args:
        stride: of the spatial convolution, as ``dilation``.
        shortcut: whether the input is added; by default at stride 1 between equal channels.
        activation: after the convolutions.
        squeeze_activation: within squeeze-and-excitation, which ends with the ``gate``.
        momentum: of the batch norms, as ``eps``.
        drop_rate: of stochastic depth, in training and where there is a shortcut: the probability
            with which a sample's branch is left out; then ``key`` is needed.

    Returns:
        The outputs, and with ``train=True`` also the new buffers.

    >>> params = init_inverted_residual(random.key(0), 8, 16, 32, squeeze=2)
    >>> inverted_residual(params, torch.ones(1, 8, 6, 6), stride=2).shape
    torch.Size([1, 16, 3, 3])
    """
    block = entries(entries(params)["block"])
    last = len(block) - 1
    squeezes = last > 0 and "fc1" in entries(block[str(last - 1)])
    spatial = max(last - 1 - squeezes, 0)
    out, new = x, {}
    for i in range(last + 1):
        part = block[str(i)]
        if squeezes and i == last - 1:
            out = squeeze_excitation(part, out, activation=squeeze_activation, gate=gate)
            continue
        out, new[str(i)] = with_buffers(
            conv_norm,
            part,
            out,
            train=train,
            stride=stride if i == spatial else 1,
            dilation=dilation if i == spatial else 1,
            groups=out.shape[1] // entries(entries(part)["0"])["weight"].shape[1],
            activation=activation if i == spatial or i != last else None,
            momentum=momentum,
            eps=eps,
        )
    if stride == 1 and out.shape[1] == x.shape[1] if shortcut is None else shortcut:
        if train and key is not None:
            out = stochastic_depth(key, out, drop_rate, "row")
        # What an activation gave, its derivative may ask for again.
        out = out + x if spatial == last else add_fresh(out, x)
    return finish(out, {"block": new}, train)

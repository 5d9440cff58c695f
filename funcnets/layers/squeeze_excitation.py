"""Squeeze-and-excitation: each channel scaled by what the mean over space says."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from tensordict import TensorDict
from torch import Tensor

from funcnets import random
from funcnets.layers.activations import Activation
from funcnets.layers.conv import conv, init_conv
from funcnets.layers.initializers import Initializer
from funcnets.layers.params import entries
from funcnets.layers.pooling import adaptive_avg_pool2d
from funcnets.random import Key


def init_squeeze_excitation(
    key: Key,
    channels: int,
    squeezed: int,
    *,
    weight_init: Initializer | None = None,
    bias_init: Initializer | None = None,
    dtype: torch.dtype = torch.float32,
) -> TensorDict:
    """Parameters of `squeeze_excitation`: 1x1 convolutions ``fc1`` and ``fc2``, as torchvision's.

    Args:
        squeezed: channels between the two, as ``channels // 16`` in the paper.
    """

    def one(key: Key, inputs: int, outputs: int) -> TensorDict:
        return init_conv(
            key, inputs, outputs, 1, weight_init=weight_init, bias_init=bias_init, dtype=dtype
        )

    fc1, fc2 = random.split(key)
    return TensorDict({"fc1": one(fc1, channels, squeezed), "fc2": one(fc2, squeezed, channels)})


def squeeze_excitation(
    params: TensorDict,
    x: Float[Tensor, "batch channels height width"],
    *,
    activation: Activation = F.relu,
    gate: Callable[[Tensor], Tensor] = torch.sigmoid,
) -> Float[Tensor, "batch channels height width"]:
    """``x`` times a gate per sample and channel (Hu et al. 2018).

    As ``torchvision.ops.SqueezeExcitation``, with ``gate`` for its ``scale_activation``.

    >>> params = init_squeeze_excitation(random.key(0), 16, 4)
    >>> squeeze_excitation(params, torch.ones(2, 16, 5, 5)).shape
    torch.Size([2, 16, 5, 5])
    """
    found = entries(params)
    squeezed = activation(conv(found["fc1"], adaptive_avg_pool2d(x, 1)))
    return x * gate(conv(found["fc2"], squeezed))

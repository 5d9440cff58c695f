"""The position-wise feed-forward part of a Transformer's block, plain or gated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from tensordict import TensorDict
from torch import Tensor

from funcnets import random
from funcnets.layers.activations import geglu, squared_relu, swiglu
from funcnets.layers.dropout import Rate, dropout_if
from funcnets.layers.linear import init_linear, linear
from funcnets.layers.params import check_positive, entries
from funcnets.random import Key

FeedForward: TypeAlias = Literal["relu", "gelu", "swiglu", "geglu", "squared_relu"]

GATED = frozenset({"swiglu", "geglu"})
_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "relu": F.relu,
        "gelu": F.gelu,
        "squared_relu": squared_relu,
        "swiglu": swiglu,
        "geglu": geglu,
    }
)


def init_feed_forward(
    key: Key,
    width: int,
    hidden: int,
    *,
    activation: FeedForward = "relu",
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
) -> TensorDict:
    """Parameters of `feed_forward`: ``linear1`` and ``linear2``, each as `init_linear` makes it.

    A gated activation ("swiglu", "geglu") wants ``linear1`` twice as wide: [2 * hidden, width],
    the values above the gates.
    """
    _function("init_feed_forward", activation)
    check_positive("init_feed_forward", width=width, hidden=hidden)
    first, second = random.split(key)
    inner = 2 * hidden if activation in GATED else hidden
    return TensorDict(
        {
            "linear1": init_linear(first, width, inner, bias=bias, dtype=dtype),
            "linear2": init_linear(second, hidden, width, bias=bias, dtype=dtype),
        }
    )


def feed_forward(
    params: TensorDict,
    x: Float[Tensor, "*batch width"],
    *,
    activation: FeedForward = "relu",
    dropout: Rate = 0.0,
    key: Key | None = None,
) -> Float[Tensor, "*batch width"]:
    """``linear2(activation(linear1(x)))`` of each token (Vaswani et al. 2017).

    Args:
        activation: "relu", "gelu", "squared_relu" (So et al. 2021), or one of the gated units
            "swiglu" and "geglu" (Shazeer 2020).
        dropout: the rate after the activation, applied if ``key`` is given as well.

    >>> params = init_feed_forward(random.key(0), 4, 16, activation="swiglu")
    >>> feed_forward(params, torch.ones(2, 3, 4), activation="swiglu").shape
    torch.Size([2, 3, 4])
    """
    function = _function("feed_forward", activation)
    found = entries(params)
    x = function(linear(found["linear1"], x))
    return linear(found["linear2"], dropout_if(key, x, dropout))


def _function(layer: str, activation: str) -> Callable[[Tensor], Tensor]:
    if activation not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise ValueError(f"{layer}: activation: expected one of {known}, got {activation}")
    return _ACTIVATIONS[activation]

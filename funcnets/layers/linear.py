"""Linear and bilinear maps of the last axis."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Float
from tensordict import TensorDict
from torch import Tensor

from funcnets import random
from funcnets.layers.initializers import Initializer, uniform
from funcnets.layers.params import check_dtype, check_positive, fail, shape, weight_and_bias
from funcnets.random import Key


def init_linear(
    key: Key,
    in_features: int,
    out_features: int,
    *,
    bias: bool = True,
    weight_init: Initializer | None = None,
    bias_init: Initializer | None = None,
    dtype: torch.dtype = torch.float32,
) -> TensorDict:
    """Parameters of `linear`: weight [out_features, in_features] and bias [out_features].

    Both are uniform within ``1 / sqrt(in_features)`` by default, as in ``torch.nn.Linear``.
    """
    check_positive("init_linear", in_features=in_features, out_features=out_features)
    default = uniform_within(in_features)
    weight_key, bias_key = random.split(key)
    entries = {"weight": (weight_init or default)(weight_key, (out_features, in_features), dtype)}
    if bias:
        entries["bias"] = (bias_init or default)(bias_key, (out_features,), dtype)
    return TensorDict(entries)


def linear(
    params: TensorDict, x: Float[Tensor, "*batch in_features"]
) -> Float[Tensor, "*batch out_features"]:
    """``x @ weight.T + bias``, as ``torch.nn.Linear``.

    >>> params = init_linear(random.key(0), 3, 2)
    >>> linear(params, torch.ones(5, 3)).shape
    torch.Size([5, 2])
    """
    weight, bias = weight_and_bias("linear", params, x)
    if weight.ndim != 2:
        fail("linear", "weight", "[out_features, in_features]", weight.shape)
    if not x.ndim or x.shape[-1] != weight.shape[1]:
        fail("linear", "x", shape("...", weight.shape[1]), x.shape)
    return F.linear(x, weight, bias)


def init_bilinear(
    key: Key,
    in1_features: int,
    in2_features: int,
    out_features: int,
    *,
    bias: bool = True,
    weight_init: Initializer | None = None,
    bias_init: Initializer | None = None,
    dtype: torch.dtype = torch.float32,
) -> TensorDict:
    """Parameters of `bilinear`: weight [out_features, in1_features, in2_features] and bias.

    Both are uniform within ``1 / sqrt(in1_features)`` by default, as in ``torch.nn.Bilinear``.
    """
    check_positive(
        "init_bilinear",
        in1_features=in1_features,
        in2_features=in2_features,
        out_features=out_features,
    )
    default = uniform_within(in1_features)
    weight_key, bias_key = random.split(key)
    size = (out_features, in1_features, in2_features)
    entries = {"weight": (weight_init or default)(weight_key, size, dtype)}
    if bias:
        entries["bias"] = (bias_init or default)(bias_key, (out_features,), dtype)
    return TensorDict(entries)


def bilinear(
    params: TensorDict,
    x1: Float[Tensor, "*batch in1_features"],
    x2: Float[Tensor, "*batch in2_features"],
) -> Float[Tensor, "*batch out_features"]:
    """``x1 @ weight[o] @ x2 + bias[o]`` for each output o, as ``torch.nn.Bilinear``.

    >>> params = init_bilinear(random.key(0), 3, 4, 2)
    >>> bilinear(params, torch.ones(5, 3), torch.ones(5, 4)).shape
    torch.Size([5, 2])
    """
    weight, bias = weight_and_bias("bilinear", params, x1)
    check_dtype("bilinear", x2, weight, "weight")
    if weight.ndim != 3:
        fail("bilinear", "weight", "[out_features, in1_features, in2_features]", weight.shape)
    for name, x, features in (("x1", x1, weight.shape[1]), ("x2", x2, weight.shape[2])):
        if not x.ndim or x.shape[-1] != features:
            fail("bilinear", name, shape("...", features), x.shape)
    # Not F.bilinear: its operator has no vmap rule and falls back to a loop.
    half = einsum(x1, weight, "... in1, out in1 in2 -> ... out in2")
    result = einsum(half, x2, "... out in2, ... in2 -> ... out")
    return result if bias is None else result + bias


def uniform_within(fan_in: int) -> Initializer:
    """torch.nn's default for weights and biases: uniform within ``1 / sqrt(fan_in)``."""
    bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
    return uniform(-bound, bound)

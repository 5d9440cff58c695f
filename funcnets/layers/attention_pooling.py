"""Attention pooling: a sequence to one vector, by weights that are learned."""

from __future__ import annotations

from typing import Literal, overload

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from tensordict import TensorDict
from torch import Tensor

from funcnets import random
from funcnets.layers.linear import init_linear, linear
from funcnets.layers.params import check_positive, fail
from funcnets.random import Key


def init_attention_pooling(
    key: Key, width: int, hidden: int | None = None, *, dtype: torch.dtype = torch.float32
) -> TensorDict:
    """Parameters of `attention_pooling`: ``proj`` and ``score``, two linear layers.

    Args:
        hidden: the width between the two; that of the sequence by default.
    """
    hidden = width if hidden is None else hidden
    check_positive("init_attention_pooling", width=width, hidden=hidden)
    proj_key, score_key = random.split(key)
    return TensorDict(
        {
            "proj": init_linear(proj_key, width, hidden, dtype=dtype),
            # A bias would add the same to every score and change no weight.
            "score": init_linear(score_key, hidden, 1, bias=False, dtype=dtype),
        }
    )


@overload
def attention_pooling(
    params: TensorDict,
    x: Float[Tensor, "*batch time width"],
    padding: Bool[Tensor, "*batch time"] | None = None,
    *,
    weights: Literal[False] = False,
) -> Float[Tensor, "*batch width"]: ...


@overload
def attention_pooling(
    params: TensorDict,
    x: Float[Tensor, "*batch time width"],
    padding: Bool[Tensor, "*batch time"] | None = None,
    *,
    weights: Literal[True],
) -> tuple[Float[Tensor, "*batch width"], Float[Tensor, "*batch time"]]: ...


def attention_pooling(
    params: TensorDict,
    x: Float[Tensor, "*batch time width"],
    padding: Bool[Tensor, "*batch time"] | None = None,
    *,
    weights: bool = False,
) -> Float[Tensor, "*batch width"] | tuple[Float[Tensor, "*batch width"], Tensor]:
    """The mean over time, weighted by ``softmax(score(tanh(proj(x))))`` (Yang et al. 2016).

    Args:
        padding: True at the elements that there are; by default all. Where there is none, the
            result is zero.
        weights: whether to return the weights too, [*batch, time].

    >>> params = init_attention_pooling(random.key(0), 4)
    >>> attention_pooling(params, torch.ones(2, 5, 4))[0]
    tensor([1., 1., 1., 1.])
    """
    layer = "attention_pooling"
    if x.ndim < 2 or not x.shape[-2]:
        fail(layer, "x", "[..., time of at least 1, width]", x.shape)
    if padding is not None and padding.shape != x.shape[:-1]:
        fail(layer, "padding", str(list(x.shape[:-1])), padding.shape)
    scores = rearrange(
        linear(params["score"], linear(params["proj"], x).tanh()), "... time 1 -> ... time"
    )
    if padding is None:
        shares = scores.softmax(-1)
    else:
        # A finite floor: where nothing is there, no NaN, in the gradient either.
        floor = torch.finfo(scores.dtype).min
        shares = torch.where(padding, torch.where(padding, scores, floor).softmax(-1), 0.0)
        x = torch.where(rearrange(padding, "... time -> ... time 1"), x, 0.0)
    pooled = einsum(shares, x, "... time, ... time width -> ... width")
    return (pooled, shares) if weights else pooled

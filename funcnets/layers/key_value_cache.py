"""Keys and values of the tokens so far: what attention to them need not compute again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from tensordict import TensorDict
from torch import Tensor

from funcnets.layers.attention import (
    Positions,
    attention_inputs,
    attention_outputs,
    attention_queries,
    check_padding,
)
from funcnets.layers.params import entries, fail
from funcnets.layers.scaled_dot_product import WeightsTap, scaled_dot_product_attention


class KeyValueCache(NamedTuple):
    """The keys and values of one layer, and how many of each row are real.

    Attributes:
        keys: [*batch, heads, capacity, head_width], of the tokens in order; what lies behind the
            first ``length`` has no meaning.
        values: likewise.
        length: [*batch], integers.
    """

    keys: Tensor
    values: Tensor
    length: Tensor


def cached_attention(
    params: TensorDict,
    x: Float[Tensor, "*batch time width"],
    cache: KeyValueCache,
    *,
    heads: int,
    counts: Int[Tensor, "*batch"] | None = None,
    positions: Positions | None = None,
    bias: Float[Tensor, ...] | None = None,
    window: int | None = None,
    normalize: bool = False,
    tap: WeightsTap | None = None,
) -> tuple[Float[Tensor, "*batch time width"], KeyValueCache]:
    """`attention`, causal, of new tokens to themselves and to those in the cache.

    Args:
        cache: of the tokens before; tokens beyond its capacity are lost.
        counts: how many of the new tokens of each row are real (the others lie behind them, and
            count as not there); by default all.
        positions, window, normalize: as in `attention`; keys are kept as ``positions`` turns them.
        bias: added to the scores, broadcasts to [*batch, heads, time, capacity].
        tap: gets the attention weights, [*batch, heads, time, capacity].

    Returns:
        What `attention` gives, and the cache with the new tokens in it.

    >>> from funcnets import random
    >>> from funcnets.layers import init_attention
    >>> empty = torch.zeros(2, 6, 4)
    >>> cache = KeyValueCache(empty, empty, torch.tensor(0))
    >>> params = init_attention(random.key(0), width=8, heads=2)
    >>> outputs, cache = cached_attention(params, torch.ones(5, 8), cache, heads=2)
    >>> outputs.shape, cache.length
    (torch.Size([5, 8]), tensor(5))
    """
    if "bias_k" in entries(params):
        raise ValueError("cached_attention: params: expected no bias_k and bias_v")
    q, k, v = attention_inputs(params, x, None, None, heads, positions, normalize)
    expected = (*k.shape[:-2], cache.keys.shape[-2], k.shape[-1])
    for name, kept in (("keys", cache.keys), ("values", cache.values)):
        if kept.shape != expected:
            fail("cached_attention", f"cache: {name}", str(list(expected)), kept.shape)
    places = new_places(cache.length, x.shape[-2])
    new = KeyValueCache(
        _written(cache.keys, k, cache.length, counts),
        _written(cache.values, v, cache.length, counts),
        cache.length + (x.shape[-2] if counts is None else counts.to(cache.length.dtype)),
    )
    mask = _seen(places, cache.keys.shape[-2], window)
    outputs = scaled_dot_product_attention(
        q, new.keys, new.values, mask=rearrange(mask, "... q k -> ... 1 q k"), bias=bias, tap=tap
    )
    return attention_outputs(params, outputs), new


def memory_attention(
    params: TensorDict,
    x: Float[Tensor, "*batch time width"],
    keys: Float[Tensor, "*batch groups memory_time head_width"],
    values: Float[Tensor, "*batch groups memory_time head_width"],
    *,
    heads: int,
    padding: Bool[Tensor, "*batch memory_time"] | None = None,
    tap: WeightsTap | None = None,
) -> Float[Tensor, "*batch time width"]:
    """`attention` to a memory whose keys and values `attention_inputs` gave before.

    >>> from funcnets import random
    >>> from funcnets.layers import init_attention
    >>> params, memory = init_attention(random.key(0), width=8, heads=2), torch.ones(7, 8)
    >>> _, keys, values = attention_inputs(params, memory, None, None, heads=2)
    >>> memory_attention(params, torch.ones(5, 8), keys, values, heads=2).shape
    torch.Size([5, 8])
    """
    mask = None
    if padding is not None:
        check_padding("memory_attention", padding, (*keys.shape[:-3], keys.shape[-2]))
        mask = rearrange(padding, "... keys -> ... 1 1 keys")
    q = attention_queries(params, x, heads)
    outputs = scaled_dot_product_attention(q, keys, values, mask=mask, tap=tap)
    return attention_outputs(params, outputs)


def new_places(length: Int[Tensor, "*batch"], time: int) -> Int[Tensor, "*batch time"]:
    """The places of ``time`` tokens that follow ``length`` others.

    >>> new_places(torch.tensor([0, 2]), 3)
    tensor([[0, 1, 2],
            [2, 3, 4]])
    """
    return rearrange(length, "... -> ... 1") + torch.arange(time, device=length.device)


def _seen(places: Tensor, capacity: int, window: int | None) -> Bool[Tensor, "*batch time slots"]:
    """Which slots a token at each of the places attends to; what was never written lies behind."""
    back = rearrange(places, "... time -> ... time 1") - torch.arange(
        capacity, device=places.device
    )
    return back >= 0 if window is None else (back >= 0) & (back < window)


def _written(kept: Tensor, new: Tensor, length: Tensor, counts: Tensor | None) -> Tensor:
    """The kept rows with the new ones behind the first ``length``."""
    # Read from the side of the slots, so that a token beyond the capacity is left out, in compiled
    # code too, where nothing can check it.
    slots = torch.arange(kept.shape[-2], device=kept.device)
    source = slots - rearrange(length, "... -> ... 1")
    time = new.shape[-2]
    end = time if counts is None else rearrange(counts, "... -> ... 1")
    here = rearrange((source >= 0) & (source < end), "... slots -> ... 1 slots 1")
    if time > 1:
        index = repeat(
            source.clamp(0, time - 1),
            "... slots -> ... heads slots d",
            heads=new.shape[-3],
            d=new.shape[-1],
        )
        new = new.gather(-2, index)
    return torch.where(here, new, kept)

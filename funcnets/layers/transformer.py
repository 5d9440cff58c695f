"""The layers of a Transformer: attention and feed-forward, each with a norm and a shortcut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from tensordict import TensorDict
from torch import Tensor

from funcnets import random
from funcnets.layers.attention import Positions, attention, init_attention
from funcnets.layers.dropout import Rate, draws, dropout_if
from funcnets.layers.feed_forward import FeedForward, feed_forward, init_feed_forward
from funcnets.layers.key_value_cache import KeyValueCache, cached_attention, memory_attention
from funcnets.layers.norm import init_layer_norm, init_rms_norm, layer_norm, rms_norm
from funcnets.layers.params import entries
from funcnets.layers.scaled_dot_product import WeightsTap
from funcnets.random import Key

Norm: TypeAlias = Literal["layer", "rms"]
_State = TypeVar("_State")


def init_encoder_layer(
    key: Key,
    width: int,
    heads: int,
    hidden: int = 2048,
    *,
    key_value_heads: int | None = None,
    activation: FeedForward = "relu",
    norm: Norm = "layer",
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
) -> TensorDict:
    """Parameters of `encoder_layer`, as those of ``torch.nn.TransformerEncoderLayer``.

    ``self_attn`` (see `init_attention`), ``linear1`` and ``linear2`` (see `init_feed_forward`),
    ``norm1`` and ``norm2``.

    Args:
        hidden: the width between the linear layers (of a gated activation: behind the gate).
        key_value_heads: as in `init_attention`.
        norm: "layer", or "rms", which has no bias.
        bias: of all linear layers and norms.
    """
    attention_key, feed_forward_key = random.split(key)
    made = init_attention(
        attention_key, width, heads, key_value_heads=key_value_heads, bias=bias, dtype=dtype
    )
    inner = init_feed_forward(
        feed_forward_key, width, hidden, activation=activation, bias=bias, dtype=dtype
    )
    norms = {f"norm{i}": _init_norm(key, width, norm, bias, dtype) for i in (1, 2)}
    return TensorDict({"self_attn": made, **dict(inner.items()), **norms})


def encoder_layer(
    params: TensorDict,
    x: Float[Tensor, "*batch time width"],
    *,
    heads: int,
    norm_first: bool = False,
    activation: FeedForward = "relu",
    norm: Norm = "layer",
    eps: float | None = None,
    mask: Bool[Tensor, ...] | None = None,
    causal: bool = False,
    padding: Bool[Tensor, ...] | None = None,
    positions: Positions | None = None,
    bias: Float[Tensor, ...] | None = None,
    window: int | None = None,
    normalize: bool = False,
    dropout: Rate = 0.0,
    key: Key | None = None,
    tap: WeightsTap | None = None,
    fused: bool = True,
) -> Float[Tensor, "*batch time width"]:
    """Self-attention and a feed-forward part, as ``torch.nn.TransformerEncoderLayer``.

    Masks say what may be attended to, where torch's boolean masks say what may not.

    Args:
        norm_first: norms before each part (Xiong et al. 2020) instead of behind its shortcut.
        activation: of the feed-forward part; see `feed_forward`.
        norm: which kind the parameters are of, "layer" or "rms".
        eps: of the norms; by default as in `layer_norm` and `rms_norm`.
        mask, causal, padding, positions, bias, window, normalize, tap, fused: see `attention`.
        dropout: the rate for the attention weights, after the activation, and at the end of each
            part; applied if ``key`` is given as well.

    >>> import torch
    >>> params = init_encoder_layer(random.key(0), width=8, heads=2, hidden=16)
    >>> encoder_layer(params, torch.ones(3, 5, 8), heads=2, causal=True).shape
    torch.Size([3, 5, 8])
    """
    keys = _keys(key, dropout, 4)

    def attend(x: Tensor) -> tuple[Tensor, None]:
        outputs = attention(
            entries(params)["self_attn"],
            x,
            heads=heads,
            mask=mask,
            causal=causal,
            padding=padding,
            positions=positions,
            bias=bias,
            window=window,
            normalize=normalize,
            dropout=dropout,
            key=keys[0],
            tap=tap,
            fused=fused,
        )
        return outputs, None

    return _parts(params, x, attend, norm_first, activation, norm, eps, dropout, keys)[0]


def cached_encoder_layer(
    params: TensorDict,
    x: Float[Tensor, "*batch time width"],
    cache: KeyValueCache,
    *,
    heads: int,
    counts: Int[Tensor, "*batch"] | None = None,
    norm_first: bool = False,
    activation: FeedForward = "relu",
    norm: Norm = "layer",
    eps: float | None = None,
    positions: Positions | None = None,
    bias: Float[Tensor, ...] | None = None,
    window: int | None = None,
    normalize: bool = False,
    dropout: Rate = 0.0,
    key: Key | None = None,
    tap: WeightsTap | None = None,
) -> tuple[Float[Tensor, "*batch time width"], KeyValueCache]:
    """`encoder_layer`, causal, for tokens that follow those in the cache; and the new cache.

    Args:
        cache, counts, positions, bias, window, normalize, tap: see `cached_attention`. No dropout
            of the attention weights.
    """
    keys = _keys(key, dropout, 4)

    def attend(x: Tensor) -> tuple[Tensor, KeyValueCache]:
        return cached_attention(
            entries(params)["self_attn"],
            x,
            cache,
            heads=heads,
            counts=counts,
            positions=positions,
            bias=bias,
            window=window,
            normalize=normalize,
            tap=tap,
        )

    return _parts(params, x, attend, norm_first, activation, norm, eps, dropout, keys)


def init_decoder_layer(
    key: Key,
    width: int,
    heads: int,
    hidden: int = 2048,
    *,
    key_value_heads: int | None = None,
    activation: FeedForward = "relu",
    norm: Norm = "layer",
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
) -> TensorDict:
    """Parameters of `decoder_layer`, as those of ``torch.nn.TransformerDecoderLayer``.

    Those of `init_encoder_layer`, with ``multihead_attn`` (to the memory) and ``norm3``.
    """
    own, other = random.split(key)
    made = init_encoder_layer(
        own,
        width,
        heads,
        hidden,
        key_value_heads=key_value_heads,
        activation=activation,
        norm=norm,
        bias=bias,
        dtype=dtype,
    )
    made["multihead_attn"] = init_attention(
        other, width, heads, key_value_heads=key_value_heads, bias=bias, dtype=dtype
    )
    made["norm3"] = _init_norm(key, width, norm, bias, dtype)
    return made


def decoder_layer(
    params: TensorDict,
    x: Float[Tensor, "*batch time width"],
    memory: Float[Tensor, "*batch memory_time width"],
    *,
    heads: int,
    norm_first: bool = False,
    activation: FeedForward = "relu",
    norm: Norm = "layer",
    eps: float | None = None,
    mask: Bool[Tensor, ...] | None = None,
    causal: bool = False,
    padding: Bool[Tensor, ...] | None = None,
    memory_mask: Bool[Tensor, ...] | None = None,
    memory_padding: Bool[Tensor, ...] | None = None,
    dropout: Rate = 0.0,
    key: Key | None = None,
    tap: WeightsTap | None = None,
    memory_tap: WeightsTap | None = None,
    fused: bool = True,
) -> Float[Tensor, "*batch time width"]:
    """Self-attention, attention to a memory, feed-forward: ``torch.nn.TransformerDecoderLayer``.

    As there, self-attention is causal only where ``causal`` or a mask makes it so. Arguments are
    those of `encoder_layer`; ``memory_mask`` and ``memory_padding`` say what of the memory may be
    attended to, and ``memory_tap`` gets the weights of that attention.

    >>> import torch
    >>> params = init_decoder_layer(random.key(0), width=8, heads=2, hidden=16)
    >>> x, memory = torch.ones(3, 5, 8), torch.ones(3, 7, 8)
    >>> decoder_layer(params, x, memory, heads=2, causal=True).shape
    torch.Size([3, 5, 8])
    """
    found, keys = entries(params), _keys(key, dropout, 6)

    def attend(x: Tensor) -> tuple[Tensor, None]:
        outputs = attention(
            found["self_attn"],
            x,
            heads=heads,
            mask=mask,
            causal=causal,
            padding=padding,
            dropout=dropout,
            key=keys[0],
            tap=tap,
            fused=fused,
        )
        return outputs, None

    def attend_to_memory(x: Tensor) -> Tensor:
        return attention(
            found["multihead_attn"],
            x,
            memory,
            heads=heads,
            mask=memory_mask,
            padding=memory_padding,
            dropout=dropout,
            key=keys[4],
            tap=memory_tap,
            fused=fused,
        )

    return _parts(
        params, x, attend, norm_first, activation, norm, eps, dropout, keys, attend_to_memory
    )[0]


def cached_decoder_layer(
    params: TensorDict,
    x: Float[Tensor, "*batch time width"],
    cache: KeyValueCache,
    memory_keys: Float[Tensor, "*batch groups memory_time head_width"],
    memory_values: Float[Tensor, "*batch groups memory_time head_width"],
    *,
    heads: int,
    counts: Int[Tensor, "*batch"] | None = None,
    norm_first: bool = False,
    activation: FeedForward = "relu",
    norm: Norm = "layer",
    eps: float | None = None,
    memory_padding: Bool[Tensor, "*batch memory_time"] | None = None,
    dropout: Rate = 0.0,
    key: Key | None = None,
    tap: WeightsTap | None = None,
    memory_tap: WeightsTap | None = None,
) -> tuple[Float[Tensor, "*batch time width"], KeyValueCache]:
    """`decoder_layer`, causal, for tokens that follow those in the cache; and the new cache.

    Args:
        cache, counts: see `cached_attention`. No dropout of the attention weights.
        memory_keys, memory_values: see `memory_attention`; ``multihead_attn`` makes them.
    """
    found, keys = entries(params), _keys(key, dropout, 6)

    def attend(x: Tensor) -> tuple[Tensor, KeyValueCache]:
        return cached_attention(found["self_attn"], x, cache, heads=heads, counts=counts, tap=tap)

    def attend_to_memory(x: Tensor) -> Tensor:
        return memory_attention(
            found["multihead_attn"],
            x,
            memory_keys,
            memory_values,
            heads=heads,
            padding=memory_padding,
            tap=memory_tap,
        )

    return _parts(
        params, x, attend, norm_first, activation, norm, eps, dropout, keys, attend_to_memory
    )


def _parts(
    params: TensorDict,
    x: Tensor,
    attend: Callable[[Tensor], tuple[Tensor, _State]],
    norm_first: bool,
    activation: FeedForward,
    norm: Norm,
    eps: float | None,
    dropout: Rate,
    keys: tuple[Tensor | None, ...],
    attend_to_memory: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, _State]:
    """The parts of a layer, each within its shortcut, and the state that attention gives."""
    found = entries(params)

    def before(name: str, x: Tensor) -> Tensor:
        return _norm(found[name], x, norm, eps) if norm_first else x

    def behind(name: str, x: Tensor, added: Tensor, key: Tensor | None) -> Tensor:
        x = x + dropout_if(key, added, dropout)
        return x if norm_first else _norm(found[name], x, norm, eps)

    added, state = attend(before("norm1", x))
    x, last = behind("norm1", x, added, keys[1]), "norm2"
    if attend_to_memory is not None:
        added = attend_to_memory(before("norm2", x))
        x, last = behind("norm2", x, added, keys[5]), "norm3"
    added = feed_forward(
        params, before(last, x), activation=activation, dropout=dropout, key=keys[2]
    )
    return behind(last, x, added, keys[3]), state


def _keys(key: Tensor | None, dropout: Rate, num: int) -> tuple[Tensor | None, ...]:
    """As many keys, all None where nothing is drawn."""
    if key is None or not draws(key, dropout):
        return (None,) * num
    return random.split(key, num).unbind()


def _init_norm(key: Key, width: int, norm: Norm, bias: bool, dtype: torch.dtype) -> TensorDict:
    if norm == "rms":
        return init_rms_norm(key, width, dtype=dtype)
    return init_layer_norm(key, width, bias=bias, dtype=dtype)


def _norm(params: TensorDict, x: Tensor, norm: Norm, eps: float | None) -> Tensor:
    if norm == "rms":
        return rms_norm(params, x, eps=eps)
    return layer_norm(params, x, eps=1e-5 if eps is None else eps)

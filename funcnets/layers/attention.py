"""Attention with several heads: projections around `scaled_dot_product_attention`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from tensordict import TensorDict
from torch import Tensor

from funcnets import random
from funcnets.layers.dropout import Rate
from funcnets.layers.initializers import normal, xavier_uniform
from funcnets.layers.linear import linear, uniform_within
from funcnets.layers.params import check_dtype, check_positive, entries, fail, shape
from funcnets.layers.scaled_dot_product import (
    WeightsTap,
    band_mask,
    check_mask,
    scaled_dot_product_attention,
)
from funcnets.random import Key
from funcnets.tree.flatten import describe

# What turns the queries and keys of every head by their places: (queries, keys) to the same.
Positions = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def init_attention(
    key: Key,
    width: int,
    heads: int,
    *,
    key_value_heads: int | None = None,
    key_width: int | None = None,
    value_width: int | None = None,
    bias: bool = True,
    bias_kv: bool = False,
    dtype: torch.dtype = torch.float32,
) -> TensorDict:
    """Parameters of `attention`, named and distributed as in ``torch.nn.MultiheadAttention``.

    ``in_proj_weight`` [3 * width, width], ``in_proj_bias`` and ``out_proj``; where keys or values
    have another width, ``q_proj_weight``, ``k_proj_weight`` and ``v_proj_weight`` in place of the
    first. With fewer heads for keys and values, their rows are ``key_value_heads * width / heads``.

    Args:
        key_value_heads: a divisor of ``heads``, by default ``heads``; 1 is multi-query attention.
        key_width, value_width: of the keys and values given to `attention`; by default ``width``.
        bias: of all four projections.
        bias_kv: whether to add ``bias_k`` and ``bias_v``, one more key and its value that are
            learned, which every query may attend to.
    """
    layer = "init_attention"
    groups = heads if key_value_heads is None else key_value_heads
    key_width = width if key_width is None else key_width
    value_width = width if value_width is None else value_width
    check_positive(
        layer,
        width=width,
        heads=heads,
        key_value_heads=groups,
        key_width=key_width,
        value_width=value_width,
    )
    if width % heads:
        raise ValueError(f"{layer}: heads: expected a divisor of the width, {width}, got {heads}")
    if heads % groups:
        raise ValueError(
            f"{layer}: key_value_heads: expected a divisor of the heads, {heads}, got {groups}"
        )
    shared = groups * (width // heads)
    made = xavier_uniform()
    q_key, k_key, v_key, out_key = random.split(key, 4)
    found: dict[str, Any] = {}
    if key_width == value_width == width:
        found["in_proj_weight"] = made(q_key, (width + 2 * shared, width), dtype)
    else:
        found["q_proj_weight"] = made(q_key, (width, width), dtype)
        found["k_proj_weight"] = made(k_key, (shared, key_width), dtype)
        found["v_proj_weight"] = made(v_key, (shared, value_width), dtype)
    out_proj = {"weight": uniform_within(width)(out_key, (width, width), dtype)}
    if bias:
        found["in_proj_bias"] = torch.zeros(width + 2 * shared, dtype=dtype, device=key.device)
        out_proj["bias"] = torch.zeros(width, dtype=dtype, device=key.device)
    if bias_kv:
        made = normal(std=shared**-0.5)
        for name, one in zip("kv", random.split(random.fold_in(key, 4)), strict=True):
            found[f"bias_{name}"] = made(one, (1, 1, shared), dtype)
    return TensorDict({**found, "out_proj": TensorDict(out_proj)})


@overload
def attention(
    params: TensorDict,
    queries: Tensor,
    keys: Tensor | None = None,
    values: Tensor | None = None,
    *,
    weights: Literal[False] = False,
    **options: Any,
) -> Tensor: ...


@overload
def attention(
    params: TensorDict,
    queries: Tensor,
    keys: Tensor | None = None,
    values: Tensor | None = None,
    *,
    weights: Literal[True],
    **options: Any,
) -> tuple[Tensor, Tensor]: ...


@overload
def attention(
    params: TensorDict,
    queries: Tensor,
    keys: Tensor | None = None,
    values: Tensor | None = None,
    *,
    weights: bool,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]: ...


def attention(  # type: ignore[misc]
    params: TensorDict,
    queries: Float[Tensor, "*batch queries width"],
    keys: Float[Tensor, "*batch keys key_width"] | None = None,
    values: Float[Tensor, "*batch keys value_width"] | None = None,
    *,
    heads: int,
    mask: Bool[Tensor, ...] | None = None,
    causal: bool = False,
    padding: Bool[Tensor, ...] | None = None,
    positions: Positions | None = None,
    bias: Float[Tensor, ...] | None = None,
    window: int | None = None,
    normalize: bool = False,
    dropout: Rate = 0.0,
    key: Key | None = None,
    weights: bool = False,
    tap: WeightsTap | None = None,
    zero_attention: bool = False,
    fused: bool = True,
) -> (
    Float[Tensor, "*batch queries width"]
    | tuple[Float[Tensor, "*batch queries width"], Float[Tensor, "*batch heads queries seen"]]
):
    """Attention with several heads (Vaswani et al. 2017), as ``torch.nn.MultiheadAttention``.

    Batches come first; there is no batch-second layout. Masks say what may be attended to, where
    torch's boolean masks say what may not. A query with nothing to attend to gives what the output
    projection makes of zeros (its bias). Parameters with ``bias_k`` and ``bias_v`` are one more key
    behind the others, which no mask covers.

    Args:
        keys: what is attended to; by default the queries.
        values: what is then read, by default the keys.
        heads: how many; the parameters tell whether keys and values have fewer.
        mask: True where a query may attend to a key; broadcasts to [*batch, heads, queries, keys],
            so that one of [heads, queries, keys] is a mask for each head, and one for each sample
            is [batch, 1, queries, keys].
        causal: a query attends to no later key; with fewer queries than keys, they are the last.
        padding: True where a key is a real token, False where it is padding: [*batch, keys].
        positions: a function of the projected queries and keys, [*batch, heads, time, head_width],
            to the same with their places in them; see `rotary`.
        bias: added to the scores, see `alibi_bias` and `relative_bias`; broadcasts as the mask.
        window: how far is attended to; see `scaled_dot_product_attention`.
        normalize: whether queries and keys are divided by their root mean square, per head, before
            ``positions`` (Henry et al. 2020).
        dropout: the rate at which attention weights are dropped, if ``key`` is given as well.
        weights: whether to return the attention weights of each head, too.
        tap: gets the attention weights; see `scaled_dot_product_attention`.
        zero_attention: whether to add one more key and its value, of zeros, behind all others
            (``add_zero_attn``).
        fused: False keeps to plain arithmetic; see `scaled_dot_product_attention`.

    Raises:
        ValueError: where heads do not divide the width, or a shape or dtype does not fit.

    >>> params = init_attention(random.key(0), width=8, heads=2)
    >>> attention(params, torch.ones(3, 5, 8), heads=2, causal=True).shape
    torch.Size([3, 5, 8])
    """
    q, k, v = attention_inputs(params, queries, keys, values, heads, positions, normalize)
    if mask is not None or bias is not None:
        check_mask("attention", mask, bias, (*q.shape[:-1], k.shape[-2]))
    if padding is not None:
        check_padding("attention", padding, (*k.shape[:-3], k.shape[-2]))
        real = rearrange(padding, "... keys -> ... 1 1 keys")
        mask = real if mask is None else mask & real
    more = [_more_keys(params, k.shape[-1])] if "bias_k" in entries(params) else []
    if zero_attention:
        more.append((torch.zeros_like(k[..., :1, :]), torch.zeros_like(v[..., :1, :])))
    if more:
        # Places are those of the keys without these.
        band = band_mask(q.shape[-2], k.shape[-2], causal=causal, window=window, device=q.device)
        mask = band if mask is None else mask if band is None else mask & band
        causal, window, time = False, None, k.shape[-2]
        mask, bias = (_wider(one, time, len(more)) for one in (mask, bias))
        k, v = (
            torch.cat([x, *(one.expand(*x.shape[:-2], 1, -1) for one in each)], -2)
            for x, each in zip((k, v), zip(*more, strict=True), strict=True)
        )
    outputs = scaled_dot_product_attention(
        q,
        k,
        v,
        mask=mask,
        bias=bias,
        causal=causal,
        window=window,
        dropout=dropout,
        key=key,
        weights=weights,
        tap=tap,
        fused=fused,
    )
    if isinstance(outputs, tuple):
        return attention_outputs(params, outputs[0]), outputs[1]
    return attention_outputs(params, outputs)


def attention_inputs(
    params: TensorDict,
    queries: Float[Tensor, "*batch queries width"],
    keys: Float[Tensor, "*batch keys key_width"] | None,
    values: Float[Tensor, "*batch keys value_width"] | None,
    heads: int,
    positions: Positions | None = None,
    normalize: bool = False,
) -> tuple[
    Float[Tensor, "*batch heads queries head_width"],
    Float[Tensor, "*batch groups keys head_width"],
    Float[Tensor, "*batch groups keys head_width"],
]:
    """Queries, keys and values of every head: what `attention` begins with.

    They are projected, and where asked for normalised and given their places, as `attention` says.

    >>> params = init_attention(random.key(0), width=8, heads=4, key_value_heads=2)
    >>> q, k, v = attention_inputs(params, torch.ones(5, 8), None, None, heads=4)
    >>> q.shape, k.shape
    (torch.Size([4, 5, 2]), torch.Size([2, 5, 2]))
    """
    layer = "attention"
    found = entries(params)
    keys = queries if keys is None else keys
    values = keys if values is None else values
    weight, bias = found.get("in_proj_weight", None), found.get("in_proj_bias", None)
    packed: tuple[Tensor, ...] = (weight,) if weight is not None else _separate(layer, found)
    width = packed[0].shape[1 if weight is not None else 0]
    _check_heads(width, heads)
    head_width = width // heads
    rows = (packed[0].shape[0] - width) // 2 if weight is not None else packed[1].shape[0]
    _check_rows(layer, packed, width, rows, heads, head_width)
    _check_input(layer, "queries", queries, packed[0], queries, keys)
    if keys is not queries or len(packed) > 1:
        _check_input(layer, "keys", keys, packed[len(packed) // 3], queries, keys)
    if values is not keys or len(packed) > 1:
        _check_input(layer, "values", values, packed[-1], queries, keys)

    sizes = (width, rows, rows)
    if weight is not None and keys is queries and values is queries:
        parts = F.linear(queries, weight, bias).split(sizes, -1)
    elif weight is not None and values is keys:
        sides = (width, 2 * rows)
        matrices = weight.split(sides)
        biases = (None, None) if bias is None else bias.split(sides)
        q, both = (
            F.linear(x, w, b) for x, w, b in zip((queries, keys), matrices, biases, strict=True)
        )
        parts = (q, *both.split(rows, -1))
    else:
        matrices = packed if weight is None else weight.split(sizes)
        biases = (None, None, None) if bias is None else bias.split(sizes)
        inputs = (queries, keys, values)
        parts = tuple(F.linear(x, w, b) for x, w, b in zip(inputs, matrices, biases, strict=True))
    q, k, v = (
        rearrange(part, "... time (heads d) -> ... heads time d", d=head_width) for part in parts
    )
    if normalize:
        q, k = (F.rms_norm(x, x.shape[-1:]) for x in (q, k))
    if positions is not None:
        q, k = positions(q, k)
    return q, k, v


def attention_queries(
    params: TensorDict, queries: Float[Tensor, "*batch queries width"], heads: int
) -> Float[Tensor, "*batch heads queries head_width"]:
    """The queries of every head alone, for keys and values that are there already.

    >>> params = init_attention(random.key(0), width=8, heads=4)
    >>> attention_queries(params, torch.ones(5, 8), heads=4).shape
    torch.Size([4, 5, 2])
    """
    found = entries(params)
    weight, bias = found.get("in_proj_weight", None), found.get("in_proj_bias", None)
    weight = _separate("attention", found)[0] if weight is None else weight
    width = weight.shape[1]
    _check_heads(width, heads)
    _check_input("attention", "queries", queries, weight, queries, queries)
    q = F.linear(queries, weight[:width], None if bias is None else bias[:width])
    return rearrange(q, "... time (heads d) -> ... heads time d", heads=heads)


def attention_outputs(
    params: TensorDict, x: Float[Tensor, "*batch heads queries head_width"]
) -> Float[Tensor, "*batch queries width"]:
    """The output projection of the heads together: what `attention` ends with.

    >>> params = init_attention(random.key(0), width=8, heads=4)
    >>> attention_outputs(params, torch.ones(4, 5, 2)).shape
    torch.Size([5, 8])
    """
    joined = rearrange(x, "... heads time d -> ... time (heads d)")
    return linear(entries(params)["out_proj"], joined)


def check_padding(layer: str, padding: Tensor, expected: tuple[int, ...]) -> None:
    """Raises unless padding is boolean and of the shape expected."""
    if padding.dtype != torch.bool:
        raise ValueError(
            f"{layer}: padding: expected bool (True = a real token), got {describe(padding)}"
        )
    if padding.shape != expected:
        fail(layer, "padding", str(list(expected)), padding.shape)


def _more_keys(params: TensorDict, head_width: int) -> tuple[Tensor, Tensor]:
    found = entries(params)
    pattern = "1 1 (groups d) -> groups 1 d"
    return (
        rearrange(found["bias_k"], pattern, d=head_width),
        rearrange(found["bias_v"], pattern, d=head_width),
    )


def _wider(x: Tensor | None, time: int, more: int) -> Tensor | None:
    """A mask or a bias over ``time`` keys with ``more`` keys behind, which it does not touch."""
    if x is None:
        return None
    x = x.expand(*x.shape[:-1], time)
    return torch.cat([x, x.new_full((*x.shape[:-1], more), x.dtype == torch.bool)], -1)


def _check_heads(width: int, heads: int) -> None:
    if heads < 1 or width % heads:
        raise ValueError(f"attention: heads: expected a divisor of the width, {width}, got {heads}")


def _separate(layer: str, found: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (found.get(f"{name}_proj_weight", None) for name in "qkv")
    if q is None or k is None or v is None:
        raise KeyError(
            f"{layer}: params: expected an entry in_proj_weight, or q_proj_weight, k_proj_weight "
            f"and v_proj_weight, got {', '.join(found.keys()) or 'none'}"
        )
    return q, k, v


def _check_rows(
    layer: str, packed: tuple[Tensor, ...], width: int, rows: int, heads: int, head_width: int
) -> None:
    groups = rows // head_width
    if len(packed) == 1:
        name, matrix, expected = "in_proj_weight", packed[0], width + 2 * rows
    else:
        name, matrix, expected = "v_proj_weight", packed[2], rows
    if any(one.ndim != 2 for one in packed):
        fail(layer, name, "[rows, width]", matrix.shape)
    if matrix.shape[0] != expected or rows % head_width or groups < 1 or heads % groups:
        fail(
            layer,
            name,
            f"rows for whole heads of {head_width} (the width, {width}, over {heads} heads), "
            f"as many for keys as for values, their number a divisor of {heads}",
            matrix.shape,
        )


def _check_input(
    layer: str, name: str, x: Tensor, matrix: Tensor, queries: Tensor, keys: Tensor
) -> None:
    if x.dtype != matrix.dtype:
        check_dtype(f"{layer}: {name}", x, matrix, "the projection")
    whole = x.ndim >= 2 and x.shape[-1] == matrix.shape[1] and x.shape[-2] >= 1
    batch: tuple[int | str, ...] = ("...",) if name == "queries" else tuple(queries.shape[:-2])
    time: int | str = keys.shape[-2] if name == "values" else "time"
    if not whole:
        expected = shape(*batch, time, matrix.shape[1])
        fail(layer, name, f"{expected} with at least one token", x.shape)
    if x.shape[:-2] != queries.shape[:-2] or (name == "values" and x.shape[-2] != time):
        expected = shape(*batch, time, matrix.shape[1])
        fail(layer, name, f"{expected} (as {'keys' if name == 'values' else 'queries'})", x.shape)

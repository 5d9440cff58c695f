"""Scaled dot-product attention of queries to keys: one fused kernel, or plain arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, overload

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from jaxtyping import Bool, Float
from torch import Tensor

from funcnets import _torch
from funcnets.layers.dropout import Rate, draws, dropout_if
from funcnets.layers.params import check_dtype, fail, shape
from funcnets.random import Key
from funcnets.tree.flatten import describe

# What reads the attention weights, and what it gives takes their place.
WeightsTap: TypeAlias = Callable[[Tensor], Tensor]
# The least number of queries that are taken together where a window leaves most keys unseen.
BLOCK = 32


@overload
def scaled_dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, *, weights: Literal[False] = False, **options: Any
) -> Tensor: ...


@overload
def scaled_dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, *, weights: Literal[True], **options: Any
) -> tuple[Tensor, Tensor]: ...


@overload
def scaled_dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, *, weights: bool, **options: Any
) -> Tensor | tuple[Tensor, Tensor]: ...


def scaled_dot_product_attention(  # type: ignore[misc]
    q: Float[Tensor, "*batch heads queries head_width"],
    k: Float[Tensor, "*batch groups keys head_width"],
    v: Float[Tensor, "*batch groups keys value_width"],
    *,
    mask: Bool[Tensor, ...] | None = None,
    bias: Float[Tensor, ...] | None = None,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    dropout: Rate = 0.0,
    key: Key | None = None,
    weights: bool = False,
    tap: WeightsTap | None = None,
    fused: bool = True,
) -> (
    Float[Tensor, "*batch heads queries value_width"]
    | tuple[
        Float[Tensor, "*batch heads queries value_width"],
        Float[Tensor, "*batch heads queries keys"],
    ]
):
    """``softmax(scale * q @ k.T + bias) @ v``, as ``F.scaled_dot_product_attention``.

    A query with no key to attend to gives zeros, and no gradient. Where keys and values have fewer
    heads than the queries (Ainslie et al. 2023), each serves as many consecutive heads of queries.

    torch's fused kernel computes it where a first derivative is all that can be asked for; plain
    arithmetic of the same result does under vmap and jvp, in a gradient of a gradient, with
    dropout, and where the weights are returned or tapped. What cannot be seen beforehand is a
    second derivative by plain autograd (``create_graph=True``), and any transform within plain
    torch.compile, where the kernel has no second derivative and a vmap of it is a loop: ask for
    plain arithmetic there with ``fused=False``.

    Args:
        mask: True where a query may attend to a key; broadcasts to [*batch, heads, queries, keys].
        bias: added to the scores; broadcasts likewise. Minus infinity is as good as a mask.
        causal: a query attends to no later key. With fewer queries than keys, the queries are the
            last ones, as when the keys before them come from a cache.
        window: a query attends to the ``window`` latest keys, its own place included, if causal,
            and otherwise to those less than ``window`` places away (Beltagy et al. 2020).
        scale: of the scores; by default ``1 / sqrt(head_width)``.
        dropout: the rate at which weights are dropped, if ``key`` is given as well.
        weights: whether to return the attention weights, too (after dropout).
        tap: a function that is given the attention weights, before dropout, and whose result takes
            their place; see `funcnets.taps`.
        fused: False keeps to plain arithmetic.

    Raises:
        ValueError: where shapes or dtypes do not fit, or there is no query or no key.

    >>> q = torch.ones(1, 2, 3, 4)
    >>> v = torch.arange(3.0).reshape(1, 1, 3, 1).expand(1, 2, 3, 1)
    >>> scaled_dot_product_attention(q, q, v, causal=True)[0, 0, :, 0]
    tensor([0.0000, 0.5000, 1.0000])
    """
    _check(q, k, v, mask, bias, window)
    queries, keys = q.shape[-2], k.shape[-2]
    whole = mask is None and bias is None and queries <= keys  # so every query has its own key
    seen = weights or tap is not None
    if window is not None and _in_blocks(queries, keys, window, mask, bias, seen):
        return _banded(q, k, v, mask, causal, window, scale, dropout, key, fused)
    plain = (
        seen
        or not fused
        or draws(key, dropout)
        or not _torch.first_order()
        # The kernels of the CPU have no vmap rule. Dynamo does not tell whether there is a vmap.
        or (_torch.vmapping() and not torch.compiler.is_dynamo_compiling())
    )
    if plain or not whole or queries != keys or window is not None:
        band = band_mask(queries, keys, causal=causal, window=window, device=q.device)
        if band is not None:
            mask = band if mask is None else mask & band
        causal = False
    if plain:
        return _arithmetic(q, k, v, mask, bias, whole, scale, dropout, key, weights, tap)
    return _fused(q, k, v, mask, bias, causal, whole, scale)


def band_mask(
    queries: int,
    keys: int,
    *,
    causal: bool = False,
    window: int | None = None,
    device: torch.device | None = None,
) -> Bool[Tensor, "queries keys"] | None:
    """Which keys a query sees by their places alone: a mask, or None where it sees all.

    The queries are the last of the places that the keys have.

    >>> band_mask(2, 3, causal=True).int()
    tensor([[1, 1, 0],
            [1, 1, 1]], dtype=torch.int32)
    """
    if window is not None and window >= max(queries, keys):
        window = None
    if window is None and (not causal or (queries == 1 and keys >= 1)):
        return None
    places = torch.arange(keys, device=device)
    back = rearrange(torch.arange(keys - queries, keys, device=device), "q -> q 1") - places
    if window is None:
        return back >= 0
    return (back >= 0) & (back < window) if causal else back.abs() < window


def _in_blocks(
    queries: int, keys: int, window: int, mask: Tensor | None, bias: Tensor | None, seen: bool
) -> bool:
    """Whether a window is narrow enough to compute its scores alone, and nothing needs the others.

    A mask of the keys alone, such as padding, can be cut into blocks with them.
    """
    cut = mask is None or mask.shape[-2] == 1
    return queries == keys >= 4 * max(window, BLOCK) and cut and bias is None and not seen


def _banded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    window: int,
    scale: float | None,
    dropout: Rate,
    key: Tensor | None,
    fused: bool,
) -> Tensor:
    """Blocks of queries, each against its own block of keys and the neighbours that it can see.

    Time and memory grow with the length times the window, not with the length squared.
    """
    time, size = q.shape[-2], max(window, BLOCK)
    missing, after = -time % size, 0 if causal else size
    reach = 2 * size + after

    def neighbours(x: Tensor) -> Tensor:
        """[..., time, d] to [..., blocks, d, reach]."""
        return F.pad(x, (0, 0, size, missing + after)).unfold(-2, reach, size)

    k, v = (rearrange(neighbours(x), "... g b d j -> ... b g j d") for x in (k, v))
    q = rearrange(F.pad(q, (0, 0, 0, missing)), "... h (b i) d -> ... b h i d", i=size)
    places = torch.arange(reach, device=q.device)
    back = rearrange(torch.arange(size, 2 * size, device=q.device), "i -> i 1") - places
    band = (back >= 0) & (back < window) if causal else back.abs() < window
    exists = neighbours(torch.ones(time, 1, dtype=torch.bool, device=q.device))
    band = band & rearrange(exists, "b 1 j -> b 1 1 j")
    if mask is not None:
        mask = mask.expand(*mask.shape[:-1], time)  # it may be one for all keys
        mask = neighbours(rearrange(mask, "... 1 j -> ... j 1"))
        mask = rearrange(
            mask, "... h b 1 j -> ... b h 1 j" if mask.ndim > 3 else "b 1 j -> b 1 1 j"
        )
        band = band & mask
    outputs = scaled_dot_product_attention(
        q, k, v, mask=band, scale=scale, dropout=dropout, key=key, fused=fused
    )
    return rearrange(outputs, "... b h i d -> ... h (b i) d")[..., :time, :]


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    whole: bool,
    scale: float | None,
) -> Tensor:
    if bias is not None:
        bias = bias.to(q.dtype)
        mask = bias if mask is None else torch.where(mask, bias, -math.inf)
    batch = q.shape[:-3]
    if len(batch) != 1:  # the kernels take one batch axis
        q, k, v = (rearrange(x, "... h t d -> (...) h t d") for x in (q, k, v))
        if mask is not None and mask.ndim > 3:
            mask = mask.expand(*batch, *mask.shape[-3:])
            mask = rearrange(mask, "... h q k -> (...) h q k")
    if (shared := q.shape[1] // k.shape[1]) > 1:
        k, v = (repeat(x, "b g t d -> b (g n) t d", n=shared) for x in (k, v))
    some = None
    if mask is not None and not whole and q.device.type != "cpu":
        # Not every kernel of a GPU gives zeros, and no gradient, where there is nothing to see.
        some = reduce(mask if bias is None else mask != -math.inf, "... q k -> ... q 1", "any")
        mask = mask | ~some if bias is None else torch.where(some, mask, 0.0)
    outputs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    if some is not None:
        outputs = torch.where(some, outputs, 0.0)
    if len(batch) == 1:
        return outputs
    return outputs.unflatten(0, batch) if batch else rearrange(outputs, "1 h q d -> h q d")


def _arithmetic(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    whole: bool,
    scale: float | None,
    rate: Rate,
    key: Tensor | None,
    weights: bool,
    tap: WeightsTap | None,
) -> Any:
    shared = q.shape[-3] // k.shape[-3]
    q = q * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if shared > 1:  # the queries of one group as more queries of one head
        q = rearrange(q, "... (g n) q d -> ... g (n q) d", n=shared)
    scores = q @ rearrange(k, "... k d -> ... d k")
    if shared > 1:
        scores = rearrange(scores, "... g (n q) k -> ... (g n) q k", n=shared)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
        seen = bias != -math.inf
        mask = seen if mask is None else mask & seen
    if mask is not None:
        # Not minus infinity: a row of it alone is NaN on the way there and back, if not at the end.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    probabilities = scores.softmax(-1)
    if mask is not None and not whole:
        some = reduce(mask, "... q k -> ... q 1", "any")
        probabilities = torch.where(some, probabilities, 0.0)
    if tap is not None:
        probabilities = tap(probabilities)
    probabilities = dropout_if(key, probabilities, rate)
    if shared > 1:
        outputs = rearrange(probabilities, "... (g n) q k -> ... g (n q) k", n=shared) @ v
        outputs = rearrange(outputs, "... g (n q) d -> ... (g n) q d", n=shared)
    else:
        outputs = probabilities @ v
    return (outputs, probabilities) if weights else outputs


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    window: int | None,
) -> None:
    layer = "scaled_dot_product_attention"
    if q.ndim < 3 or not q.shape[-2] or not q.shape[-1]:
        fail(layer, "q", "[..., heads, queries, head_width], none of them 0", q.shape)
    batch = q.shape[:-3]
    if k.ndim != q.ndim or k.shape[:-3] != batch or k.shape[-1] != q.shape[-1] or not k.shape[-2]:
        expected = shape(*batch, "heads", "keys", q.shape[-1])
        fail(layer, "k", f"{expected} with at least one key (as q)", k.shape)
    if q.shape[-3] % k.shape[-3]:
        fail(layer, "k", f"heads that divide {q.shape[-3]} (as q)", k.shape)
    if v.shape[:-1] != k.shape[:-1]:
        fail(layer, "v", f"{shape(*k.shape[:-1], 'value_width')} (as k)", v.shape)
    for x in (k, v):
        if x.dtype != q.dtype:
            check_dtype(layer, x, q, "q")
    if mask is not None or bias is not None:
        check_mask(layer, mask, bias, (*q.shape[:-1], k.shape[-2]))
    if window is not None and window < 1:
        raise ValueError(f"{layer}: window: expected at least 1, got {window}")


def check_mask(
    layer: str, mask: Tensor | None, bias: Tensor | None, sizes: tuple[int, ...]
) -> None:
    """Raises unless a mask is boolean, a bias floating, and both broadcast to the scores' sizes."""
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(
            f"{layer}: mask: expected bool (True = may attend; what is added to the scores is "
            f"bias), got {describe(mask)}"
        )
    if bias is not None and not bias.is_floating_point():
        raise ValueError(f"{layer}: bias: expected floating-point numbers, got {describe(bias)}")
    for name, given in (("mask", mask), ("bias", bias)):
        if given is None:
            continue
        pairs = zip(reversed(given.shape), reversed(sizes), strict=False)
        if not 2 <= given.ndim <= len(sizes) or any(size not in (1, full) for size, full in pairs):
            fail(layer, name, f"what broadcasts to {list(sizes)}", given.shape)

"""Where a token stands: added to it, turned into it (rotary), or added to the attention scores."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, Int
from tensordict import TensorDict
from torch import Tensor

from funcnets.layers.initializers import Initializer, normal
from funcnets.layers.params import check_positive, entries, fail
from funcnets.random import Key

# How many places there are, 0 to n - 1, or which they are.
Places = int | Int[Tensor, "*batch time"]


def sinusoidal(
    positions: Places,
    width: int,
    *,
    base: float = 10000.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Float[Tensor, "*batch time width"]:
    """Sines and cosines of the place, alternating, at ``width / 2`` wave lengths.

    Those wave lengths grow from ``2 * pi`` towards ``base`` times that (Vaswani et al. 2017).

    Args:
        positions: a number of places, or their indices [*batch, time].
        width: of the result, even.

    >>> sinusoidal(2, 4)
    tensor([[0.0000, 1.0000, 0.0000, 1.0000],
            [0.8415, 0.5403, 0.0100, 0.9999]])
    """
    _check_multiple("sinusoidal", "width", width, 2)
    angles = _angles("sinusoidal", positions, width, base, dtype, device)
    both = torch.stack([angles.sin(), angles.cos()], -1)
    return rearrange(both, "... time half two -> ... time (half two)").to(dtype)


def sincos_2d(
    height: int,
    width: int,
    features: int,
    *,
    base: float = 10000.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Float[Tensor, "height width features"]:
    """Sines and cosines of the row, then of the column, of each place of a grid.

    A quarter of the features each, as a Vision Transformer without learned positions adds them to
    its patches (Chen et al. 2021, "MoCo v3").

    Args:
        features: of each place, a multiple of 4.

    >>> sincos_2d(1, 2, 4)
    tensor([[[0.0000, 1.0000, 0.0000, 1.0000],
             [0.0000, 1.0000, 0.8415, 0.5403]]])
    """
    layer = "sincos_2d"
    check_positive(layer, height=height, width=width)
    _check_multiple(layer, "features", features, 4)
    rows, columns = (
        torch.cat([angles.sin(), angles.cos()], -1).to(dtype)
        for angles in (
            _angles(layer, size, features // 2, base, dtype, device) for size in (height, width)
        )
    )
    rows = repeat(rows, "h half -> h w half", w=width)
    columns = repeat(columns, "w half -> h w half", h=height)
    return torch.cat([rows, columns], -1)


def init_learned_positions(
    key: Key,
    length: int,
    width: int,
    *,
    weight_init: Initializer | None = None,
    dtype: torch.dtype = torch.float32,
) -> TensorDict:
    """Parameters of `learned_positions`: weight [length, width], normal of deviation 0.02."""
    check_positive("init_learned_positions", length=length, width=width)
    return TensorDict({"weight": (weight_init or normal(std=0.02))(key, (length, width), dtype)})


def learned_positions(
    params: TensorDict, positions: Places, *, offset: int = 0
) -> Float[Tensor, "*batch time width"]:
    """A learned vector for each place (Gehring et al. 2017).

    Args:
        positions: a number of places, or their indices [*batch, time].
        offset: the first place, where a number of them is given: what a cache already holds.

    Raises:
        ValueError: where there are more places than learned vectors.

    >>> from funcnets import random
    >>> params = init_learned_positions(random.key(0), length=8, width=4)
    >>> learned_positions(params, 5).shape
    torch.Size([5, 4])
    """
    layer = "learned_positions"
    weight = entries(params)["weight"]
    if weight.ndim != 2:
        fail(layer, "weight", "[length, width]", weight.shape)
    if isinstance(positions, Tensor):
        return F.embedding(positions, weight)
    if positions < 1 or offset < 0 or offset + positions > weight.shape[0]:
        raise ValueError(
            f"{layer}: positions: expected at most {weight.shape[0]} (as weight), "
            f"got {positions} from {offset} on"
        )
    return weight[offset : offset + positions]


def rotary(
    x: Float[Tensor, "*batch time width"],
    positions: Int[Tensor, ...] | int | None = None,
    base: float = 10000.0,
    *,
    interleaved: bool = False,
) -> Float[Tensor, "*batch time width"]:
    """Turns queries or keys by angles that grow with their place (Su et al. 2021, "RoFormer").

    The product of a turned query and a turned key depends on how far they are apart, not on where
    they stand. For one turn in many layers, compute the angles once: `rotary_positions`.

    Args:
        x: queries or keys of every head, of an even width.
        positions: the place of each, which broadcasts to ``x.shape[:-1]`` (so [batch, 1, time]
            where it differs between samples); or the place of the first, by default 0.
        base: the largest wave length is about ``2 * pi * base``.
        interleaved: which features are turned as one pair: neighbours, as in the paper, or by
            default feature i with ``i + width / 2``, as in GPT-NeoX and Llama.

    >>> rotary(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    tensor([[1.0000, 0.0000],
            [0.5403, 0.8415]])
    """
    if positions is None or isinstance(positions, int):
        first = positions or 0
        positions = torch.arange(first, first + x.shape[-2], device=x.device)
    _check_multiple("rotary", "head width", x.shape[-1], 2)
    return _turn(x, *_rotary_table(positions, x.shape[-1], base, x.dtype), interleaved)


def rotary_positions(
    queries: Places,
    head_width: int,
    *,
    keys: Places | None = None,
    base: float = 10000.0,
    interleaved: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """`rotary` as the ``positions`` that `attention` takes, its angles computed once.

    Args:
        queries: how many places, or which; see `rotary`.
        keys: those of the keys, by default as the queries.

    >>> from funcnets import random
    >>> from funcnets.layers import attention, init_attention
    >>> params = init_attention(random.key(0), width=8, heads=2)
    >>> turn = rotary_positions(5, head_width=4)
    >>> attention(params, torch.ones(3, 5, 8), heads=2, positions=turn).shape
    torch.Size([3, 5, 8])
    """
    _check_multiple("rotary_positions", "head_width", head_width, 2)

    def table(places: Places) -> tuple[Tensor, Tensor]:
        if not isinstance(places, Tensor):
            places = torch.arange(places, device=device)
        return _rotary_table(places, head_width, base, dtype)

    of_queries = table(queries)
    of_keys = of_queries if keys is None else table(keys)

    def turn(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return _turn(q, *of_queries, interleaved), _turn(k, *of_keys, interleaved)

    return turn


def alibi_bias(
    heads: int,
    queries: int,
    keys: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Float[Tensor, "heads queries keys"]:
    """Minus the distance between query and key, times a slope for each head: a ``bias``.

    Slopes are the powers of ``2 ** (-8 / heads)``, and where heads are no power of two those of
    the next lower one and every other of the next higher one's (Press et al. 2022, "ALiBi").

    Args:
        keys: by default as many as queries; where there are more, the queries are the last.

    >>> alibi_bias(1, 2) == torch.tensor([[[0.0, -1 / 256], [-1 / 256, 0.0]]])
    tensor([[[True, True],
             [True, True]]])
    """
    keys = queries if keys is None else keys
    check_positive("alibi_bias", heads=heads, queries=queries, keys=keys)
    whole = 2 ** int(math.log2(heads))
    slopes = [2.0 ** (-8 * (i + 1) / whole) for i in range(whole)]
    slopes += [2.0 ** (-4 * (2 * i + 1) / whole) for i in range(heads - whole)]
    slope = rearrange(torch.tensor(slopes, dtype=dtype, device=device), "heads -> heads 1 1")
    return -slope * _distance(queries, keys, device).abs().to(dtype)


def init_relative_bias(
    key: Key,
    heads: int,
    buckets: int = 32,
    *,
    weight_init: Initializer | None = None,
    dtype: torch.dtype = torch.float32,
) -> TensorDict:
    """Parameters of `relative_bias`: weight [buckets, heads], normal of deviation 0.02."""
    check_positive("init_relative_bias", heads=heads, buckets=buckets)
    return TensorDict({"weight": (weight_init or normal(std=0.02))(key, (buckets, heads), dtype)})


def relative_bias(
    params: TensorDict,
    queries: int,
    keys: int | None = None,
    *,
    causal: bool = False,
    max_distance: int = 128,
) -> Float[Tensor, "heads queries keys"]:
    """A learned number for each head and distance between query and key: a ``bias``.

    Distances share numbers by buckets that widen with the distance (Raffel et al. 2020, "T5").

    Args:
        keys: by default as many as queries; where there are more, the queries are the last.
        causal: whether later keys are masked, so that no bucket is spent on them.
        max_distance: from here on, distances share the last bucket.

    >>> from funcnets import random
    >>> relative_bias(init_relative_bias(random.key(0), heads=2), queries=3).shape
    torch.Size([2, 3, 3])
    """
    layer = "relative_bias"
    keys = queries if keys is None else keys
    check_positive(layer, queries=queries, keys=keys)
    weight = entries(params)["weight"]
    if weight.ndim != 2:
        fail(layer, "weight", "[buckets, heads]", weight.shape)
    distance = _distance(queries, keys, weight.device)
    bucket = relative_bucket(distance, weight.shape[0], causal=causal, max_distance=max_distance)
    return rearrange(F.embedding(bucket, weight), "queries keys heads -> heads queries keys")


def relative_bucket(
    distance: Int[Tensor, "*shape"],
    buckets: int = 32,
    *,
    causal: bool = False,
    max_distance: int = 128,
) -> Int[Tensor, "*shape"]:
    """The bucket of T5 that the distance of a query from a key, ``query - key``, falls into.

    Small distances have a bucket each, larger ones share them logarithmically. Unless ``causal``,
    half of the buckets are for keys after the query.

    >>> relative_bucket(torch.tensor([0, 1, 7, 8, 200, -1]))
    tensor([ 0,  1,  7,  8, 15, 17])
    """
    layer = "relative_bucket"
    side = buckets if causal else buckets // 2
    single = side // 2
    if single < 1 or (not causal and buckets % 2):
        few = "2 or more" if causal else "an even number from 4 on"
        raise ValueError(f"{layer}: buckets: expected {few}, got {buckets}")
    if max_distance <= single:
        raise ValueError(
            f"{layer}: max_distance: expected more than {single} (as {buckets=}), "
            f"got {max_distance}"
        )
    away = distance.clamp(min=0) if causal else distance.abs()
    share = (away.clamp(min=1) / single).log() / math.log(max_distance / single)
    far = (single + (share * (side - single)).to(torch.int64)).clamp(max=side - 1)
    bucket = torch.where(away < single, away, far)
    return bucket if causal else bucket + (distance < 0) * side


def _distance(queries: int, keys: int, device: torch.device | None) -> Tensor:
    """``query - key`` of places [queries, keys], the queries being the last."""
    places = torch.arange(keys, device=device)
    return rearrange(torch.arange(keys - queries, keys, device=device), "q -> q 1") - places


def _angles(
    layer: str,
    positions: Places,
    width: int,
    base: float,
    dtype: torch.dtype,
    device: torch.device | None,
) -> Tensor:
    """Place times frequency [..., time, width / 2], in at least float32."""
    if not isinstance(positions, Tensor):
        check_positive(layer, positions=positions)
        positions = torch.arange(positions, device=device)
    exact = torch.promote_types(dtype, torch.float32)
    steps = torch.arange(0, width, 2, dtype=exact, device=positions.device)
    return rearrange(positions, "... -> ... 1") * base ** (-steps / width)


def _rotary_table(
    positions: Tensor, width: int, base: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    angles = _angles("rotary", positions, width, base, dtype, None)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    if 2 * cos.shape[-1] != x.shape[-1]:
        fail("rotary", "x", f"[..., time, {2 * cos.shape[-1]}]", x.shape)
    sizes = zip(reversed(cos.shape[:-1]), reversed(x.shape[:-1]), strict=False)
    if cos.ndim > x.ndim or any(size not in (1, full) for size, full in sizes):
        fail("rotary", "positions", f"what broadcasts to {list(x.shape[:-1])}", cos.shape[:-1])
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    if interleaved:
        a, b = rearrange(x, "... (half two) -> two ... half", two=2).unbind()
        return rearrange(
            torch.stack([a * cos - b * sin, a * sin + b * cos]), "two ... half -> ... (half two)"
        )
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def _check_multiple(layer: str, name: str, size: int, of: int) -> None:
    if size < 1 or size % of:
        kind = "an even number" if of == 2 else f"a multiple of {of}"
        raise ValueError(f"{layer}: {name}: expected {kind}, got {size}")

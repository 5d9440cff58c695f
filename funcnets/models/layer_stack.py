"""Many layers of one kind: each on its own, in one stacked tree, or one that serves at all depths.

What the Transformers share, their weights' first values and the lookup of tokens among it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from einops import rearrange
from tensordict import TensorDict
from torch import Tensor

from funcnets import _torch, layers, random, tree
from funcnets.control import scan
from funcnets.layers.params import entries
from funcnets.layers.scaled_dot_product import WeightsTap
from funcnets.models import blocks
from funcnets.taps import Taps

Share: TypeAlias = Literal["none", "stacked", "all"]
# The tap of the attention weights of a layer, by the name of the attention ("self_attn").
Look: TypeAlias = Callable[[str], WeightsTap | None]
# Parameters, x, and what else there is at this depth; to x and what it gives at this depth.
Layer: TypeAlias = Callable[[Any, Tensor, Any, Look], tuple[Tensor, Any]]


def check_layers(model: str, depth: int, share: str, least: int = 1) -> None:
    """Raises unless the depth is a number of layers, and share one of "none", "stacked", "all"."""
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < least:
        raise ValueError(f"{model}: depth: expected {least} or more, got {depth!r}")
    blocks.check_choice(model, "share", share, ("none", "stacked", "all"))


def check_heads(model: str, width: int, heads: int, key_value_heads: int | None) -> None:
    """Raises unless heads divide the width, and those of keys and values the heads."""
    if width % heads:
        raise ValueError(f"{model}: heads: expected a divisor of the width, {width}, got {heads}")
    if key_value_heads is None:
        return
    blocks.check_sizes(model, key_value_heads=key_value_heads)
    if heads % key_value_heads:
        raise ValueError(
            f"{model}: key_value_heads: expected a divisor of the heads, {heads}, "
            f"got {key_value_heads}"
        )


def init_layers(
    key: random.Key, depth: int, share: Share, make: Callable[[random.Key], TensorDict]
) -> TensorDict:
    """The parameters of ``depth`` layers: under "0", "1", ...; stacked to [depth]; or of one."""
    if share == "all":
        return make(key)
    made = [make(one) for one in random.split(key, depth).unbind()]
    return (
        tree.stack(made)
        if share == "stacked"
        else TensorDict({str(i): one for i, one in enumerate(made)})
    )


def run_layers(
    tap: Taps | None,
    place: str,
    params: Any,
    x: Tensor,
    depth: int,
    share: Share,
    layer: Layer,
    xs: Any = None,
) -> tuple[Tensor, Any]:
    """x through all layers, with what they give besides stacked to [depth, ...] (None of None).

    Args:
        place: the name of the layers, before the number of each, for the taps.
        xs: what a layer takes besides: a tree of tensors [depth, ...], or None.
    """
    if share == "stacked":

        def turn(x: Tensor, step: Any) -> tuple[Tensor, Any]:
            return layer(step["params"], x, step["xs"], lambda name: None)

        return scan(turn, x, {"params": params, "xs": xs}, unroll=False)
    found = None if share == "all" else entries(params)
    given = _unstacked(xs, depth)
    outputs = []
    for i in range(depth):
        look = partial(_look, tap, f"{place}.{i}")
        x, output = layer(params if found is None else found[str(i)], x, given[i], look)
        if tap is not None:
            x = tap(f"{place}.{i}", x)
        outputs.append(output)
    return x, tree.map(lambda *each: torch.stack(each), *outputs)


def empty_cache(
    name: str,
    batch: tuple[int, ...],
    size: tuple[int, int, int],
    capacity: int | None,
    context: int,
    like: Tensor,
) -> dict[str, Tensor]:
    """``keys`` and ``values`` [*batch, depth, heads, capacity, head_width] and ``length`` [*batch].

    Args:
        size: depth, heads and head_width.
        capacity: by default the context.
        like: whose dtype and device they have.
    """
    capacity = context if capacity is None else capacity
    blocks.check_sizes(name, capacity=capacity)
    if capacity > context:
        raise ValueError(
            f"{name}: capacity: expected at most {context} (the context), got {capacity}"
        )
    shape = (*batch, *size[:2], capacity, size[2])
    # Apart: what writes into one must not change the other.
    keys, values = (torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(2))
    length = torch.zeros(batch, dtype=torch.int64, device=like.device)
    return {"keys": keys, "values": values, "length": length}


def check_cache(
    model: str,
    name: str,
    cache: TensorDict,
    shape: Sequence[int],
    size: tuple[int, int, int],
    lengths: Tensor | None,
) -> None:
    """Raises unless a cache is as `empty_cache` and has room for tokens of this shape."""
    missing = [part for part in ("keys", "values", "length") if part not in entries(cache)]
    if missing:
        raise KeyError(
            f"{model}: cache: expected entries keys, values and length, got no {missing[0]}"
        )
    batch, time = torch.Size(shape[:-1]), shape[-1]
    for part in ("keys", "values"):
        found = cache[part].shape
        if len(found) != len(batch) + 4 or (*found[:-2], found[-1]) != (*batch, *size):
            wanted = layers.params.shape(*batch, *size[:2], "capacity", size[2])
            raise ValueError(f"{model}: cache: {part}: expected {wanted}, got {list(found)}")
    for part, given in (("cache: length", cache["length"]), ("lengths", lengths)):
        if given is not None and given.shape != batch:
            raise ValueError(f"{model}: {part}: expected {list(batch)}, got {list(given.shape)}")
    if _torch.inlining() or 0 in shape:
        return  # no values to look at
    if lengths is not None and not 0 <= int(lengths.min()) <= int(lengths.max()) <= time:
        raise ValueError(
            f"{model}: lengths: expected 0 to {time}, "
            f"got {int(lengths.min())} to {int(lengths.max())}"
        )
    total = int((cache["length"] + (time if lengths is None else lengths)).max())
    if total > (capacity := cache["keys"].shape[-2]):
        raise ValueError(
            f"{model}: {name}: expected at most {capacity} with those in the cache "
            f"(its capacity), got {total}"
        )


def by_depth(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parts of a cache as `run_layers` takes them: [*batch, depth, ...] to [depth, *batch, ...]."""
    pattern = "... depth h t d -> depth ... h t d"
    return {name: rearrange(part, pattern) for name, part in parts.items()}


def by_row(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The other way."""
    pattern = "depth ... h t d -> ... depth h t d"
    return {name: rearrange(part, pattern) for name, part in parts.items()}


def _look(tap: Taps | None, place: str, name: str) -> WeightsTap | None:
    return None if tap is None else tap.at(f"{place}.{name}.weights")


def normal_weights(
    key: random.Key, params: TensorDict, std: float, scales: dict[str, float] | None = None
) -> TensorDict:
    """The parameters with every matrix normal of this deviation, and linear biases zero.

    Args:
        scales: factors of the deviation by the name of the layer ("linear2"); 0 makes zeros.
    """
    chosen, numbers = {} if scales is None else scales, itertools.count()

    def draw(path: tuple[str, ...], leaf: Tensor) -> Tensor:
        if path[-1].endswith("bias"):
            return torch.zeros_like(leaf)
        if leaf.ndim != 2:
            return leaf
        deviation = std * (chosen.get(path[-2], 1.0) if len(path) > 1 else 1.0)
        if deviation == 0:
            return torch.zeros_like(leaf)
        one = random.fold_in(key, next(numbers))
        return random.normal(one, leaf.shape, std=deviation, dtype=leaf.dtype)

    return tree.map_with_path(draw, params)


def xavier_weights(key: random.Key, params: TensorDict) -> TensorDict:
    """The parameters with every matrix drawn anew, as ``torch.nn.Transformer`` does."""
    made, numbers = layers.initializers.xavier_uniform(), itertools.count()

    def draw(leaf: Tensor) -> Tensor:
        if leaf.ndim != 2:
            return leaf
        return made(random.fold_in(key, next(numbers)), tuple(leaf.shape), leaf.dtype)

    return tree.map(draw, params)


def check_tokens(model: str, name: str, tokens: Tensor, context: int | None = None) -> None:
    """Raises unless they are integers [..., time], at least one and within the context."""
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ValueError(f"{model}: {name}: expected integers, got {tree.describe(tokens)}")
    if not tokens.ndim or not tokens.shape[-1]:
        raise ValueError(
            f"{model}: {name}: expected [..., time] with at least one token, "
            f"got {list(tokens.shape)}"
        )
    if context is not None and tokens.shape[-1] > context:
        raise ValueError(
            f"{model}: {name}: expected at most {context} tokens (the context), "
            f"got {tokens.shape[-1]}"
        )


def check_padding(model: str, name: str, padding: Tensor | None, shape: Sequence[int]) -> None:
    """Raises unless a padding mask is boolean and has a value for each token."""
    if padding is None or (padding.shape == torch.Size(shape) and padding.dtype == torch.bool):
        return
    raise ValueError(
        f"{model}: {name}: expected bool{list(shape)} (True = a real token), "
        f"got {tree.describe(padding)}"
    )


def check_positions(model: str, positions: str, width: int, heads: int) -> None:
    """Raises unless the kind of positions is known and the width fits it."""
    known = ("learned", "sinusoidal", "rotary", "alibi", "none")
    blocks.check_choice(model, "positions", positions, known)
    if positions == "sinusoidal" and width % 2:
        raise ValueError(
            f"{model}: width: expected an even number (sinusoidal positions), got {width}"
        )
    if positions == "rotary" and width // heads % 2:
        raise ValueError(
            f"{model}: heads: expected heads of an even width (rotary positions), "
            f"got {width // heads}"
        )


def check_activation(model: str, activation: str) -> None:
    """Raises unless `funcnets.layers.feed_forward` knows it."""
    known = ("relu", "gelu", "swiglu", "geglu", "squared_relu")
    blocks.check_choice(model, "activation", activation, known)


def add_positions(
    x: Tensor, positions: str, params: Mapping[str, Any], name: str, places: int | Tensor
) -> Tensor:
    """x with learned or sinusoidal vectors added, as it is for other kinds of positions."""
    if positions == "learned":
        return x + layers.learned_positions(params[name], places)
    if positions == "sinusoidal":
        return x + layers.sinusoidal(places, x.shape[-1], dtype=x.dtype, device=x.device)
    return x


def attention_positions(
    positions: str,
    places: int | Tensor,
    keys: int,
    width: int,
    heads: int,
    x: Tensor,
    base: float = 10000.0,
) -> dict[str, Any]:
    """The option of `funcnets.layers.attention` that rotary or ALiBi positions are."""
    if positions == "rotary":
        if isinstance(places, Tensor):
            places = rearrange(places, "... time -> ... 1 time")
        turn = layers.rotary_positions(
            places, width // heads, base=base, dtype=x.dtype, device=x.device
        )
        return {"positions": turn}
    if positions == "alibi":
        if isinstance(places, int):
            bias = layers.alibi_bias(heads, keys, keys, dtype=x.dtype, device=x.device)
            return {"bias": bias}
        one_back = layers.alibi_bias(heads, 1, 2, dtype=x.dtype, device=x.device)[..., :1]
        back = rearrange(places, "... time -> ... 1 time 1") - torch.arange(keys, device=x.device)
        return {"bias": one_back * back.abs().to(x.dtype)}
    return {}


def look_up(model: str, name: str, params: Any, tokens: Tensor) -> Tensor:
    """The embedding of tokens, which on the CPU are found out if they are out of range."""
    if torch.compiler.is_dynamo_compiling():
        return layers.embedding(params, tokens)
    try:
        return layers.embedding(params, tokens)
    except IndexError:
        size = len(entries(params)["weight"])
        raise ValueError(
            f"{model}: {name}: expected tokens from 0 to {size - 1}, got others among them"
        ) from None


def residual_scale(depth: int, parts: int = 2) -> float:
    """GPT-2's factor for what is added to the stream ``parts`` times in each layer."""
    return 1 / math.sqrt(max(1, parts * depth))


def _unstacked(xs: Any, depth: int) -> list[Any]:
    if xs is None:
        return [None] * depth
    found, structure = tree.flatten(xs)
    rows = zip(*(leaf.unbind() for leaf in found), strict=True)
    return [tree.unflatten(structure, list(row)) for row in rows]

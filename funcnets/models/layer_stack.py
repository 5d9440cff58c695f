"""Many layers of one kind: each on its own, in one stacked tree, or one that serves at all depths.

What the Transformers share, their weights' first values and the lookup of tokens among it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from einops import rearrange
from tensordict import TensorDict
from torch import Tensor

from funcnets import layers, random, tree
from funcnets.control import scan
from funcnets.layers.params import entries
from funcnets.models import blocks
from funcnets.taps import Taps

Share: TypeAlias = Literal["none", "stacked", "all"]
# Parameters, x, and what else there is at this depth; to x and what it gives at this depth.
Layer: TypeAlias = Callable[[Any, Tensor, Any], tuple[Tensor, Any]]


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
            return layer(step["params"], x, step["xs"])

        return scan(turn, x, {"params": params, "xs": xs}, unroll=False)
    found = None if share == "all" else entries(params)
    given = _unstacked(xs, depth)
    outputs = []
    for i in range(depth):
        x, output = layer(params if found is None else found[str(i)], x, given[i])
        if tap is not None:
            x = tap(f"{place}.{i}", x)
        outputs.append(output)
    return x, tree.map(lambda *each: torch.stack(each), *outputs)


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
        # At places of one's own every query is given the biases of the last: they differ from its
        # own by the same for all keys, which the softmax does not see.
        queries = keys if isinstance(places, int) else 1
        bias = layers.alibi_bias(heads, queries, keys, dtype=x.dtype, device=x.device)
        return {"bias": bias}
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

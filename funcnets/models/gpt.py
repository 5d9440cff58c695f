"""The decoder-only Transformer: a language model, with its cache as explicit state."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

from jaxtyping import Int
from tensordict import TensorDict
from torch import Tensor

from funcnets import layers, random
from funcnets.layers import init_linear, linear
from funcnets.layers.feed_forward import FeedForward
from funcnets.layers.key_value_cache import KeyValueCache, new_places
from funcnets.layers.params import entries
from funcnets.layers.transformer import Norm, cached_encoder_layer, encoder_layer
from funcnets.model import Model, bind
from funcnets.models import blocks, layer_stack
from funcnets.models.layer_stack import Share
from funcnets.taps import Taps, TapsLike
from funcnets.tree.flatten import tensordict

Positions: TypeAlias = Literal["learned", "sinusoidal", "rotary", "alibi", "none"]


@dataclass(frozen=True)
class Config:
    """What a GPT is made of; see `gpt`."""

    vocabulary: int
    context: int = 256
    width: int = 128
    depth: int = 4
    heads: int = 4
    key_value_heads: int | None = None
    hidden: int | None = None
    positions: Positions = "learned"
    rotary_base: float = 10000.0
    norm: Norm = "layer"
    activation: FeedForward = "gelu"
    normalize: bool = False
    window: int | None = None
    bias: bool = True
    tied: bool = True
    share: Share = "none"
    dropout: float = 0.0
    zero_init: bool = False
    init_std: float = 0.02
    soft_cap: float | None = None

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("vocabulary", "context", "width", "heads")}
        sizes |= {n: v for n in ("hidden", "window") if (v := getattr(self, n)) is not None}
        blocks.check_sizes("gpt", **sizes)
        layer_stack.check_layers("gpt", self.depth, self.share)
        layer_stack.check_heads("gpt", self.width, self.heads, self.key_value_heads)
        blocks.check_choice("gpt", "norm", self.norm, ("layer", "rms"))
        layer_stack.check_positions("gpt", self.positions, self.width, self.heads)
        layer_stack.check_activation("gpt", self.activation)
        blocks.check_rate("gpt", "dropout", self.dropout)
        for name in ("rotary_base", "init_std", "soft_cap"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"gpt: {name}: expected more than 0, got {value!r}")


def gpt(
    vocabulary: int,
    context: int = 256,
    width: int = 128,
    depth: int = 4,
    heads: int = 4,
    *,
    key_value_heads: int | None = None,
    hidden: int | None = None,
    positions: Positions = "learned",
    rotary_base: float = 10000.0,
    norm: Norm = "layer",
    activation: FeedForward = "gelu",
    normalize: bool = False,
    window: int | None = None,
    bias: bool = True,
    tied: bool = True,
    share: Share = "none",
    dropout: float = 0.0,
    zero_init: bool = False,
    init_std: float = 0.02,
    soft_cap: float | None = None,
) -> Model:
    """A language model: tokens [*batch, time] to the logits of the next, [..., time, vocabulary].

    A Transformer with norms before each part and causal attention, first values as in GPT-2
    (Radford et al. 2019). Parameters are ``embedding``, ``positions`` if they are learned,
    ``layers`` (named as those of ``torch.nn.TransformerEncoder``), ``norm``, and ``head`` if not
    ``tied``. Taps are ``embedding``, ``layers.{i}.self_attn.weights`` (the attention [*batch,
    heads, queries, keys], which is computed for the tap alone, and may be replaced), ``layers.{i}``
    (both where layers are not stacked) and ``norm``.

    ``apply(params, tokens, cache=cache)`` gives ``(logits, cache)`` for tokens that follow those in
    the cache, which begins as `gpt_cache`: token by token, or in chunks, the logits are those of
    all at once. With ``lengths`` [*batch], only that many of the tokens of each row are real, and
    stay in the cache. `funcnets.generation` writes texts with it.

    Args:
        context: the largest number of tokens.
        key_value_heads: fewer heads for keys and values (Ainslie et al. 2023); divides ``heads``.
        hidden: the width of the feed-forward part, by default ``4 * width``.
        positions: "learned" or "sinusoidal" vectors added to the embedding, "rotary" queries and
            keys, "alibi" biases, or "none".
        rotary_base: see `funcnets.layers.rotary`.
        norm: "layer" or "rms".
        activation: of the feed-forward part; see `funcnets.layers.feed_forward`.
        normalize: whether queries and keys are divided by their root mean square.
        window: how many of the latest tokens are attended to; by default all.
        bias: of linear layers and norms.
        tied: whether the output projection is the embedding (Press and Wolf 2017).
        share: "none": ``layers.0``, ``layers.1``, ... "stacked": one tree of batch size [depth],
            scanned, so that the time to compile does not grow with the depth. "all": one layer
            is applied at every depth (Lan et al. 2020, "ALBERT").
        dropout: the rate for embeddings, attention weights, activations and the end of each part,
            in training.
        zero_init: whether the last projections of each part begin as zeros.
        init_std: the deviation of the first values; those projections begin as this over
            ``sqrt(2 * depth)``.
        soft_cap: logits become ``soft_cap * tanh(logits / soft_cap)`` (Gemma 2).

    >>> import torch
    >>> model = gpt(vocabulary=10, context=8, width=16, depth=2, heads=2)
    >>> params = model.init(random.key(0))
    >>> logits, cache = model.apply(params, torch.tensor([[1, 2]]), cache=gpt_cache(
    ...     params, model.config, 1))
    >>> logits.shape, cache["length"]
    (torch.Size([1, 2, 10]), tensor([2]))
    """
    config = Config(
        vocabulary,
        context,
        width,
        depth,
        heads,
        key_value_heads,
        hidden,
        positions,
        rotary_base,
        norm,
        activation,
        normalize,
        window,
        bias,
        tied,
        share,
        dropout,
        zero_init,
        init_std,
        soft_cap,
    )
    return bind("gpt", config, init, forward, check)


def init(key: random.Key, config: Config) -> TensorDict:
    """The parameters."""
    embedding_key, positions_key, layers_key, head_key = random.split(key, 4)
    scale = 0.0 if config.zero_init else layer_stack.residual_scale(config.depth)
    std = config.init_std
    normal = layers.initializers.normal(std=std)

    def make(key: random.Key) -> TensorDict:
        made = layers.init_encoder_layer(
            key,
            config.width,
            config.heads,
            config.hidden or 4 * config.width,
            key_value_heads=config.key_value_heads,
            activation=config.activation,
            norm=config.norm,
            bias=config.bias,
        )
        scales = {"out_proj": scale, "linear2": scale}
        return layer_stack.normal_weights(key, made, std, scales)

    params = {
        "embedding": layers.init_embedding(
            embedding_key, config.vocabulary, config.width, weight_init=normal
        )
    }
    if config.positions == "learned":
        params["positions"] = layers.init_learned_positions(
            positions_key, config.context, config.width, weight_init=normal
        )
    params["layers"] = layer_stack.init_layers(layers_key, config.depth, config.share, make)
    params["norm"] = blocks.init_norm(head_key, config.norm, config.width)
    if not config.bias and config.norm == "layer":
        params["norm"] = layers.init_layer_norm(head_key, config.width, bias=False)
    if not config.tied:
        params["head"] = init_linear(
            head_key, config.width, config.vocabulary, bias=False, weight_init=normal
        )
    return TensorDict(params)


def gpt_cache(
    params: TensorDict, config: Config, *batch: int, capacity: int | None = None
) -> TensorDict:
    """The empty cache: ``keys``, ``values`` [*batch, depth, heads, capacity, ...] and ``length``.

    Args:
        params: whose dtype and device it has.
        batch: the leading sizes of the tokens.
        capacity: how many tokens it may come to hold, by default the context; what is never used
            costs time.
    """
    heads = config.key_value_heads or config.heads
    size = (config.depth, heads, config.width // config.heads)
    weight = entries(entries(params)["embedding"])["weight"]
    return tensordict(
        layer_stack.empty_cache("gpt_cache", batch, size, capacity, config.context, weight)
    )


def check(tokens: Tensor, config: Config) -> None:
    """Raises unless tokens are integers, and no more than the context at a time."""
    layer_stack.check_tokens("gpt", "tokens", tokens, config.context)


def forward(
    params: TensorDict,
    tokens: Int[Tensor, "*batch time"],
    *,
    config: Config,
    cache: TensorDict | None = None,
    lengths: Int[Tensor, "*batch"] | None = None,
    train: bool = False,
    key: random.Key | None = None,
    taps: TapsLike = (),
) -> Any:
    """Logits, or with a cache logits and the new cache; in training with (no) new buffers."""
    check(tokens, config)
    draws = train and config.dropout > 0
    if draws and key is None:
        blocks.draw_keys("gpt", None, True, 1)  # raises
    keys = random.split(key, config.depth + 1) if draws and key is not None else None
    time = tokens.shape[-1]
    if cache is not None:
        size = (config.depth, config.key_value_heads or config.heads, config.width // config.heads)
        layer_stack.check_cache("gpt", "tokens", cache, tokens.shape, size, lengths)
    elif lengths is not None:
        raise ValueError("gpt: lengths: expected None without a cache (later tokens change none)")
    places = time if cache is None else new_places(cache["length"], time)

    tap, found = Taps("gpt", taps), entries(params)
    x = layer_stack.look_up("gpt", "tokens", found["embedding"], tokens)
    # Beyond the context nothing is written into the cache, so any row will do.
    rows = places if isinstance(places, int) else places.clamp(max=config.context - 1)
    x = layer_stack.add_positions(x, config.positions, found, "positions", rows)
    if keys is not None:
        x = layers.dropout(keys[0], x, config.dropout)
    x = tap("embedding", x)

    options = _options(config, x, places, time if cache is None else cache["keys"].shape[-2])
    xs = {} if keys is None else {"key": keys[1:]}
    run: layer_stack.Layer = partial(_layer, options=options)
    if cache is not None:
        run = partial(_cached_layer, options=options, length=cache["length"], counts=lengths)
        xs |= layer_stack.by_depth({part: cache[part] for part in ("keys", "values")})
    x, kept = layer_stack.run_layers(
        tap, "layers", found["layers"], x, config.depth, config.share, run, xs or None
    )
    x = tap("norm", blocks.norm(found["norm"], x, config.norm, train=False)[0])
    outputs = layers.unembed(found["embedding"], x) if config.tied else linear(found["head"], x)
    if config.soft_cap is not None:
        outputs = config.soft_cap * (outputs / config.soft_cap).tanh()
    if cache is None:
        return tap.finish(outputs, {}, train)
    new = layer_stack.by_row(kept)
    new["length"] = cache["length"] + (time if lengths is None else lengths)
    return tap.finish((outputs, tensordict(new)), {}, train)


def _options(config: Config, x: Tensor, places: Any, keys: int) -> dict[str, Any]:
    """What every layer is told, besides its parameters."""
    options = {
        "heads": config.heads,
        "norm_first": True,
        "activation": config.activation,
        "norm": config.norm,
        "window": config.window,
        "normalize": config.normalize,
        "dropout": config.dropout,
    }
    return options | layer_stack.attention_positions(
        config.positions, places, keys, config.width, config.heads, x, config.rotary_base
    )


def _layer(
    params: Any, x: Tensor, step: Any, look: layer_stack.Look, options: dict[str, Any]
) -> tuple[Tensor, None]:
    key, tap = None if step is None else step["key"], look("self_attn")
    return encoder_layer(params, x, causal=True, key=key, tap=tap, **options), None


def _cached_layer(
    params: Any,
    x: Tensor,
    step: dict[str, Tensor],
    look: layer_stack.Look,
    options: dict[str, Any],
    length: Tensor,
    counts: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    cache = KeyValueCache(step["keys"], step["values"], length)
    x, new = cached_encoder_layer(
        params, x, cache, counts=counts, key=step.get("key"), tap=look("self_attn"), **options
    )
    return x, {"keys": new.keys, "values": new.values}

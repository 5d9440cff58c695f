"""The Transformer: encoder and decoder, or one of them alone, over tokens or vectors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from tensordict import TensorDict
from torch import Tensor

from funcnets import layers, random, tree
from funcnets.layers import init_linear, linear
from funcnets.layers.attention import attention_inputs
from funcnets.layers.feed_forward import FeedForward
from funcnets.layers.key_value_cache import KeyValueCache, new_places
from funcnets.layers.params import check_dtype, entries
from funcnets.layers.transformer import Norm, cached_decoder_layer, decoder_layer, encoder_layer
from funcnets.model import Model, bind
from funcnets.models import blocks, layer_stack
from funcnets.models.layer_stack import Share
from funcnets.taps import Taps, TapsLike
from funcnets.tree.flatten import tensordict

Positions: TypeAlias = Literal["learned", "sinusoidal", "none"]
# Tokens, or vectors where there is no vocabulary.
Source: TypeAlias = Int[Tensor, "*batch source_time"] | Float[Tensor, "*batch source_time width"]
Target: TypeAlias = Int[Tensor, "*batch target_time"] | Float[Tensor, "*batch target_time width"]

# What of a cache each layer of the decoder has its own of.
CACHED = ("keys", "values", "memory_keys", "memory_values")


@dataclass(frozen=True)
class Config:
    """What a Transformer is made of; see `transformer`."""

    vocabulary: int | None = None
    target_vocabulary: int | None = None
    context: int = 512
    width: int = 128
    heads: int = 4
    encoder_depth: int = 4
    decoder_depth: int = 4
    hidden: int | None = None
    positions: Positions = "sinusoidal"
    norm: Norm = "layer"
    norm_first: bool = False
    activation: FeedForward = "relu"
    bias: bool = True
    tied: bool = True
    share: Share = "none"
    dropout: float = 0.1

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("context", "width", "heads")}
        optional = ("vocabulary", "target_vocabulary", "hidden")
        sizes |= {name: value for name in optional if (value := getattr(self, name)) is not None}
        blocks.check_sizes("transformer", **sizes)
        for name in ("encoder_depth", "decoder_depth"):
            depth = getattr(self, name)
            if isinstance(depth, bool) or not isinstance(depth, int) or depth < 0:
                raise ValueError(f"transformer: {name}: expected 0 or more, got {depth!r}")
        if not self.encoder_depth and not self.decoder_depth:
            raise ValueError("transformer: decoder_depth: expected 1 or more without an encoder")
        if self.target_vocabulary is not None and not (
            self.vocabulary and self.encoder_depth and self.decoder_depth
        ):
            raise ValueError(
                "transformer: target_vocabulary: expected None (the vocabulary serves) but for an "
                f"encoder and a decoder over tokens, got {self.target_vocabulary}"
            )
        blocks.check_choice("transformer", "share", self.share, ("none", "stacked", "all"))
        layer_stack.check_heads("transformer", self.width, self.heads, None)
        kinds = ("learned", "sinusoidal", "none")
        blocks.check_choice("transformer", "positions", self.positions, kinds)
        layer_stack.check_positions("transformer", self.positions, self.width, self.heads)
        blocks.check_choice("transformer", "norm", self.norm, ("layer", "rms"))
        layer_stack.check_activation("transformer", self.activation)
        blocks.check_rate("transformer", "dropout", self.dropout)


def transformer(
    vocabulary: int | None = None,
    target_vocabulary: int | None = None,
    context: int = 512,
    width: int = 128,
    heads: int = 4,
    *,
    encoder_depth: int = 4,
    decoder_depth: int = 4,
    hidden: int | None = None,
    positions: Positions = "sinusoidal",
    norm: Norm = "layer",
    norm_first: bool = False,
    activation: FeedForward = "relu",
    bias: bool = True,
    tied: bool = True,
    share: Share = "none",
    dropout: float = 0.1,
) -> Model:
    """Encoder and decoder (Vaswani et al. 2017): a source and a target to logits of the target.

    ``apply(params, source, target)`` gives [*batch, time, target_vocabulary]: for each token of the
    target the logits of the next, which see the whole source and no later token of the target.
    Without a ``vocabulary`` source and target are vectors [*batch, time, width], and so are the
    outputs: ``torch.nn.Transformer``, with positions. Options by name are ``source_padding`` and
    ``target_padding``, [*batch, time], True for real tokens.

    ``apply(params, source)`` gives what the encoder makes of the source, [*batch, time, width], and
    ``apply(params, memory=memory, target=target)`` begins there. ``apply(params, None, target,
    cache=cache)`` gives ``(outputs, cache)`` for a target that follows what the cache holds, which
    begins as `transformer_cache`: token by token, or in chunks, the outputs are those of all at
    once. With ``lengths`` [*batch], only that many tokens of each row are real, and stay in the
    cache. So ``partial(model.apply, params, None)`` is what `funcnets.generation` writes with.

    Parameters are ``encoder`` and ``decoder`` (named as in ``torch.nn.Transformer``), and for
    tokens ``embedding`` (``target_embedding``, where the target has a vocabulary of its own),
    and ``head`` if not ``tied``; ``positions`` and ``target_positions`` if they are learned. Taps
    are ``encoder.layers.{i}`` and ``decoder.layers.{i}``, their attention's weights [*batch, heads,
    queries, keys], ``encoder.layers.{i}.self_attn.weights`` and with the decoder also
    ``multihead_attn`` (computed for the tap alone, they may be replaced; all these where layers are
    not stacked), ``encoder.norm`` and ``decoder.norm``.

    Args:
        vocabulary: the number of tokens, or None for vectors.
        target_vocabulary: of the target; by default the source's, and the same embedding.
        context: the largest number of tokens of each.
        encoder_depth: how many layers; 0 leaves the encoder away: see `transformer_decoder`.
        decoder_depth: likewise; see `transformer_encoder`.
        hidden: the width of the feed-forward parts, by default ``4 * width``.
        positions: "sinusoidal", "learned" or "none"; embeddings are multiplied by ``sqrt(width)``
            before they are added.
        norm: "layer" or "rms".
        norm_first: norms before each part of a layer, not behind it.
        activation: of the feed-forward parts.
        bias: of linear layers and norms.
        tied: whether the output projection is the embedding of the target.
        share: "none", "stacked" or "all", as in `funcnets.models.gpt`.
        dropout: the rate, in training.

    >>> import torch
    >>> model = transformer(vocabulary=10, width=16, heads=2, encoder_depth=1, decoder_depth=1)
    >>> source, target = torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5]])
    >>> model.apply(model.init(random.key(0)), source, target).shape
    torch.Size([1, 2, 10])
    """
    config = Config(
        vocabulary,
        target_vocabulary,
        context,
        width,
        heads,
        encoder_depth,
        decoder_depth,
        hidden,
        positions,
        norm,
        norm_first,
        activation,
        bias,
        tied,
        share,
        dropout,
    )
    return bind("transformer", config, init, forward)


def transformer_encoder(
    vocabulary: int | None = None,
    context: int = 512,
    width: int = 128,
    heads: int = 4,
    depth: int = 4,
    **options: Any,
) -> Model:
    """The encoder alone: tokens [*batch, time], or vectors, to vectors [*batch, time, width].

    ``apply(params, source, source_padding=...)``, as ``torch.nn.TransformerEncoder`` with
    positions. Options are those of `transformer`, whose family it is of.

    >>> import torch
    >>> model = transformer_encoder(width=16, heads=2, depth=1)
    >>> model.apply(model.init(random.key(0)), torch.ones(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """
    return transformer(
        vocabulary,
        context=context,
        width=width,
        heads=heads,
        encoder_depth=depth,
        decoder_depth=0,
        **options,
    )


def transformer_decoder(
    vocabulary: int | None = None,
    context: int = 512,
    width: int = 128,
    heads: int = 4,
    depth: int = 4,
    **options: Any,
) -> Model:
    """The decoder alone, for a memory that another network gives: a captioner's, say.

    ``apply(params, memory, target)``, the memory vectors [*batch, time, width], the target tokens
    or vectors; as ``torch.nn.TransformerDecoder`` with positions. A decoder without a memory is
    `funcnets.models.gpt`. Options are those of `transformer`, whose family it is of.

    >>> import torch
    >>> model = transformer_decoder(vocabulary=10, width=16, heads=2, depth=1)
    >>> memory, target = torch.ones(1, 7, 16), torch.tensor([[4, 5]])
    >>> model.apply(model.init(random.key(0)), memory, target).shape
    torch.Size([1, 2, 10])
    """
    return transformer(
        vocabulary,
        context=context,
        width=width,
        heads=heads,
        encoder_depth=0,
        decoder_depth=depth,
        **options,
    )


def transformer_cache(
    params: TensorDict,
    config: Config,
    memory: Float[Tensor, "*batch source_time width"],
    *,
    source_padding: Bool[Tensor, "*batch source_time"] | None = None,
    capacity: int | None = None,
) -> TensorDict:
    """The cache with which the decoder begins: no token yet, but all that it keeps of the memory.

    ``keys``, ``values`` [*batch, depth, heads, capacity, ...] and ``length`` are as in
    `funcnets.models.gpt_cache`; ``memory_keys`` and ``memory_values`` are those of the memory, and
    ``memory_padding`` what of it is real.

    Args:
        memory: what ``apply(params, source, source_padding=source_padding)`` gives.
        capacity: how many tokens of a target it may come to hold, by default the context.

    >>> import torch
    >>> model = transformer(vocabulary=10, width=16, heads=2, encoder_depth=1, decoder_depth=1)
    >>> params = model.init(random.key(0))
    >>> memory = model.apply(params, torch.tensor([[1, 2, 3]]))
    >>> cache = transformer_cache(params, model.config, memory)
    >>> logits, cache = model.apply(params, None, torch.tensor([[4, 5]]), cache=cache)
    >>> logits.shape, cache["length"]
    (torch.Size([1, 2, 10]), tensor([2]))
    """
    if not config.decoder_depth:
        raise ValueError("transformer_cache: config: expected one with a decoder")
    found = entries(params)
    _check_vectors("memory", memory, params)
    layer_stack.check_padding(
        "transformer_cache", "source_padding", source_padding, memory.shape[:-1]
    )
    depth, batch = config.decoder_depth, tuple(memory.shape[:-2])
    size = (depth, config.heads, config.width // config.heads)
    cache = layer_stack.empty_cache(
        "transformer_cache", batch, size, capacity, config.context, memory
    )

    def project(
        params: Any, x: Tensor, step: Any, look: layer_stack.Look
    ) -> tuple[Tensor, dict[str, Tensor]]:
        attention = entries(params)["multihead_attn"]
        _, keys, values = attention_inputs(attention, x, None, None, config.heads)
        return x, {"memory_keys": keys, "memory_values": values}

    held = entries(found["decoder"])["layers"]
    _, kept = layer_stack.run_layers(None, "", held, memory, depth, config.share, project)
    if source_padding is None:
        source_padding = torch.ones(memory.shape[:-1], dtype=torch.bool, device=memory.device)
    padding = {"memory_padding": source_padding}
    return tensordict({**cache, **layer_stack.by_row(kept), **padding})


def init(key: random.Key, config: Config) -> TensorDict:
    """The parameters; matrices of the layers as ``torch.nn.Transformer`` draws them."""
    keys = random.split(key, 7).unbind()
    normal = layers.initializers.normal(std=1 / math.sqrt(config.width))

    def stack(key: random.Key, depth: int, make: Callable[..., TensorDict]) -> TensorDict:
        def one(key: random.Key) -> TensorDict:
            made = make(
                key,
                config.width,
                config.heads,
                config.hidden or 4 * config.width,
                activation=config.activation,
                norm=config.norm,
                bias=config.bias,
            )
            return layer_stack.xavier_weights(key, made)

        norm = blocks.init_norm(key, config.norm, config.width)
        if config.norm == "layer" and not config.bias:
            norm = layers.init_layer_norm(key, config.width, bias=False)
        held = layer_stack.init_layers(key, depth, config.share, one)
        return TensorDict({"layers": held, "norm": norm})

    params = {}
    if config.vocabulary is not None:
        params["embedding"] = layers.init_embedding(
            keys[0], config.vocabulary, config.width, weight_init=normal
        )
    if config.target_vocabulary is not None:
        params["target_embedding"] = layers.init_embedding(
            keys[1], config.target_vocabulary, config.width, weight_init=normal
        )
    parts = (("positions", config.encoder_depth), ("target_positions", config.decoder_depth))
    for (name, depth), one in zip(parts, keys[2:4], strict=True):
        if config.positions == "learned" and depth:
            params[name] = layers.init_learned_positions(one, config.context, config.width)
    if config.encoder_depth:
        params["encoder"] = stack(keys[4], config.encoder_depth, layers.init_encoder_layer)
    if config.decoder_depth:
        params["decoder"] = stack(keys[5], config.decoder_depth, layers.init_decoder_layer)
    if config.vocabulary is not None and config.decoder_depth and not config.tied:
        params["head"] = init_linear(
            keys[6],
            config.width,
            config.target_vocabulary or config.vocabulary,
            bias=False,
            weight_init=normal,
        )
    return TensorDict(params)


def forward(
    params: TensorDict,
    source: Source | None = None,
    target: Target | None = None,
    *,
    config: Config,
    memory: Float[Tensor, "*batch source_time width"] | None = None,
    source_padding: Bool[Tensor, "*batch source_time"] | None = None,
    target_padding: Bool[Tensor, "*batch target_time"] | None = None,
    cache: TensorDict | None = None,
    lengths: Int[Tensor, "*batch"] | None = None,
    train: bool = False,
    key: random.Key | None = None,
    taps: TapsLike = (),
) -> Any:
    """Logits or vectors, with a cache also the new one; in training with (no) new buffers."""
    if not config.encoder_depth and memory is None and cache is None:
        source, memory = None, source
    if cache is None:
        _check(params, source, target, memory, source_padding, target_padding, config)
        if lengths is not None:
            raise ValueError("transformer: lengths: expected None without a cache")
    else:
        given = (source, memory, source_padding, target_padding)
        _check_cached(params, target, cache, lengths, given, config)
    draws = train and config.dropout > 0
    if draws and key is None:
        blocks.draw_keys("transformer", None, True, 1)  # raises
    keys = random.split(key, 2) if draws and key is not None else (None, None)
    tap, found = Taps("transformer", taps), entries(params)
    options: dict[str, Any] = {
        "heads": config.heads,
        "norm_first": config.norm_first,
        "activation": config.activation,
        "norm": config.norm,
        "dropout": config.dropout,
    }

    def run(
        part: str, embedding: str, depth: int, x: Tensor, key: Tensor | None, layer: Any
    ) -> tuple[Tensor, Any]:
        each = None if key is None else random.split(key, depth + 1)
        x = _embed(found, embedding, part, x, cache, config)
        if each is not None:
            x = layers.dropout(each[0], x, config.dropout)
        held, xs = entries(found[part]), {} if each is None else {"key": each[1:]}
        if cache is not None:
            xs |= layer_stack.by_depth({name: cache[name] for name in CACHED})
        x, kept = layer_stack.run_layers(
            tap, f"{part}.layers", held["layers"], x, depth, config.share, layer, xs or None
        )
        norm = blocks.norm(held["norm"], x, config.norm, train=False)[0]
        return tap(f"{part}.norm", norm), kept

    def encode(params: Any, x: Tensor, step: Any, look: layer_stack.Look) -> tuple[Tensor, None]:
        key, attended = _key(step), look("self_attn")
        x = encoder_layer(params, x, padding=source_padding, key=key, tap=attended, **options)
        return x, None

    if memory is None and cache is None:
        assert source is not None
        memory, _ = run("encoder", "embedding", config.encoder_depth, source, keys[0], encode)
    if target is None:
        return tap.finish(memory, {}, train)
    remembered = memory

    def decode(params: Any, x: Tensor, step: Any, look: layer_stack.Look) -> tuple[Tensor, Any]:
        own: dict[str, Any] = {"key": _key(step), **options}
        own |= {"tap": look("self_attn"), "memory_tap": look("multihead_attn")}
        if cache is None:
            assert remembered is not None
            own |= {"padding": target_padding, "memory_padding": source_padding}
            return decoder_layer(params, x, remembered, causal=True, **own), None
        x, new = cached_decoder_layer(
            params,
            x,
            KeyValueCache(step["keys"], step["values"], cache["length"]),
            step["memory_keys"],
            step["memory_values"],
            counts=lengths,
            memory_padding=cache["memory_padding"],
            **own,
        )
        return x, {"keys": new.keys, "values": new.values}

    embedding = "embedding" if config.target_vocabulary is None else "target_embedding"
    x, kept = run("decoder", embedding, config.decoder_depth, target, keys[1], decode)
    time = x.shape[-2]
    if config.vocabulary is not None:
        x = layers.unembed(found[embedding], x) if config.tied else linear(found["head"], x)
    if cache is None:
        return tap.finish(x, {}, train)
    length = cache["length"] + (time if lengths is None else lengths)
    new = {**dict(cache.items()), **layer_stack.by_row(kept), "length": length}
    return tap.finish((x, tensordict(new)), {}, train)


def _key(step: Any) -> Tensor | None:
    return None if step is None else step.get("key")


def _embed(
    found: Any, embedding: str, part: str, x: Tensor, cache: TensorDict | None, config: Config
) -> Tensor:
    """Vectors with their positions, which with a cache follow those in it."""
    encoder = part == "encoder"
    if config.vocabulary is not None:
        name = "source" if encoder else "target"
        x = layer_stack.look_up("transformer", name, found[embedding], x)
        x = x * math.sqrt(config.width)
    places: int | Tensor = x.shape[-2]
    if cache is not None:
        # Beyond the context nothing is written into the cache, so any row will do.
        places = new_places(cache["length"], x.shape[-2]).clamp(max=config.context - 1)
    table = "positions" if encoder else "target_positions"
    return layer_stack.add_positions(x, config.positions, found, table, places)


def _check(
    params: TensorDict,
    source: Tensor | None,
    target: Tensor | None,
    memory: Tensor | None,
    source_padding: Tensor | None,
    target_padding: Tensor | None,
    config: Config,
) -> None:
    if (source is None) == (memory is None):
        raise ValueError("transformer: source: expected a source or a memory, and not both")
    if target is None and not (config.encoder_depth and source is not None):
        raise ValueError("transformer: target: expected one for the decoder, got None")
    if target is not None and not config.decoder_depth:
        raise ValueError("transformer: target: expected None (there is no decoder)")
    if memory is not None:
        _check_vectors("memory", memory, params)
    for name, x in (("source", source), ("target", target)):
        if x is not None:
            _check_sequence(name, x, params, config)
    first = memory if memory is not None else source
    assert first is not None
    vectors = memory is not None or config.vocabulary is None
    layer_stack.check_padding(
        "transformer",
        "source_padding",
        source_padding,
        first.shape[:-1] if vectors else first.shape,
    )
    if target is not None:
        wide = config.vocabulary is None
        shape = target.shape[:-1] if wide else target.shape
        layer_stack.check_padding("transformer", "target_padding", target_padding, shape)
        batch = first.shape[: -2 if vectors else -1]
        if batch != shape[:-1]:
            raise ValueError(
                f"transformer: target: expected the batch {list(batch)} (as the source), "
                f"got {list(target.shape)}"
            )


def _check_cached(
    params: TensorDict,
    target: Tensor | None,
    cache: TensorDict,
    lengths: Tensor | None,
    given: tuple[Tensor | None, ...],
    config: Config,
) -> None:
    names = ("source", "memory", "source_padding", "target_padding")
    for name, value in zip(names, given, strict=True):
        if value is not None:
            raise ValueError(f"transformer: {name}: expected None with a cache, which holds all")
    if target is None:
        raise ValueError("transformer: target: expected one with a cache, got None")
    _check_sequence("target", target, params, config)
    for name in (*CACHED, "memory_padding"):
        if name not in entries(cache):
            raise KeyError(f"transformer: cache: expected one of transformer_cache, got no {name}")
    shape = target.shape if config.vocabulary is not None else target.shape[:-1]
    size = (config.decoder_depth, config.heads, config.width // config.heads)
    layer_stack.check_cache("transformer", "target", cache, shape, size, lengths)


def _check_sequence(name: str, x: Tensor, params: TensorDict, config: Config) -> None:
    if config.vocabulary is not None:
        layer_stack.check_tokens("transformer", name, x, config.context)
        return
    _check_vectors(name, x, params)
    if x.shape[-2] > config.context:
        raise ValueError(
            f"transformer: {name}: expected at most {config.context} vectors (the context), "
            f"got {x.shape[-2]}"
        )


def _check_vectors(name: str, x: Tensor, params: TensorDict) -> None:
    found = entries(params)
    weight = entries(entries(found["decoder" if "decoder" in found else "encoder"])["norm"])[
        "weight"
    ]
    width = weight.shape[0]
    if x.ndim < 2 or x.shape[-1] != width or not x.shape[-2] or not x.is_floating_point():
        raise ValueError(
            f"transformer: {name}: expected vectors [..., time, {width}], at least one, "
            f"got {tree.describe(x)}"
        )
    check_dtype(f"transformer: {name}", x, weight, "weight")

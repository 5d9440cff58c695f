"""The Transformer: encoder and decoder, or one of them alone, over tokens or vectors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from jaxtyping import Bool, Float, Int
from tensordict import TensorDict
from torch import Tensor

from funcnets import layers, random, tree
from funcnets.layers import init_linear, linear
from funcnets.layers.feed_forward import FeedForward
from funcnets.layers.params import check_dtype, entries
from funcnets.layers.transformer import Norm, decoder_layer, encoder_layer
from funcnets.model import Model, bind
from funcnets.models import blocks, layer_stack
from funcnets.models.layer_stack import Share
from funcnets.taps import Taps, TapsLike

Positions: TypeAlias = Literal["learned", "sinusoidal", "none"]
# Tokens, or vectors where there is no vocabulary.
Source: TypeAlias = Int[Tensor, "*batch source_time"] | Float[Tensor, "*batch source_time width"]
Target: TypeAlias = Int[Tensor, "*batch target_time"] | Float[Tensor, "*batch target_time width"]


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
    ``apply(params, memory=memory, target=target)`` begins there, so that a text is generated with
    the source encoded once.

    Parameters are ``encoder`` and ``decoder`` (named as in ``torch.nn.Transformer``), and for
    tokens ``embedding`` (``target_embedding``, where the target has a vocabulary of its own),
    and ``head`` if not ``tied``; ``positions`` and ``target_positions`` if they are learned. Taps
    are ``encoder.layers.{i}`` and ``decoder.layers.{i}`` (where layers are not stacked),
    ``encoder.norm`` and ``decoder.norm``.

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
    train: bool = False,
    key: random.Key | None = None,
    taps: TapsLike = (),
) -> Any:
    """Logits or vectors; in training with (no) new buffers."""
    if not config.encoder_depth and memory is None:
        source, memory = None, source
    _check(params, source, target, memory, source_padding, target_padding, config)
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
    ) -> Tensor:
        each = None if key is None else random.split(key, depth + 1)
        place = "positions" if part == "encoder" else "target_positions"
        x = _embed(found, embedding, place, x, config)
        if each is not None:
            x = layers.dropout(each[0], x, config.dropout)
        held = entries(found[part])
        rest = None if each is None else each[1:]
        x, _ = layer_stack.run_layers(
            tap, f"{part}.layers", held["layers"], x, depth, config.share, layer, rest
        )
        return tap(f"{part}.norm", blocks.norm(held["norm"], x, config.norm, train=False)[0])

    def encode(params: Any, x: Tensor, key: Tensor | None) -> tuple[Tensor, None]:
        return encoder_layer(params, x, padding=source_padding, key=key, **options), None

    if memory is None:
        assert source is not None
        memory = run("encoder", "embedding", config.encoder_depth, source, keys[0], encode)
    if target is None:
        return tap.finish(memory, {}, train)
    remembered = memory

    def decode(params: Any, x: Tensor, key: Tensor | None) -> tuple[Tensor, None]:
        x = decoder_layer(
            params,
            x,
            remembered,
            causal=True,
            padding=target_padding,
            memory_padding=source_padding,
            key=key,
            **options,
        )
        return x, None

    embedding = "embedding" if config.target_vocabulary is None else "target_embedding"
    x = run("decoder", embedding, config.decoder_depth, target, keys[1], decode)
    if config.vocabulary is not None:
        x = layers.unembed(found[embedding], x) if config.tied else linear(found["head"], x)
    return tap.finish(x, {}, train)


def _embed(found: Any, embedding: str, place: str, x: Tensor, config: Config) -> Tensor:
    """Vectors with their positions."""
    if config.vocabulary is not None:
        name = "source" if place == "positions" else "target"
        x = layer_stack.look_up("transformer", name, found[embedding], x)
        x = x * math.sqrt(config.width)
    return layer_stack.add_positions(x, config.positions, found, place, x.shape[-2])


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
        if x is None:
            continue
        if config.vocabulary is not None:
            layer_stack.check_tokens("transformer", name, x, config.context)
            continue
        _check_vectors(name, x, params)
        if x.shape[-2] > config.context:
            raise ValueError(
                f"transformer: {name}: expected at most {config.context} vectors (the context), "
                f"got {x.shape[-2]}"
            )
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

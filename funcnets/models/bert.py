"""The encoder-only Transformer with a head that tells masked tokens, and the masking of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from tensordict import TensorDict
from torch import Tensor

from funcnets import layers, random
from funcnets.layers import init_linear, linear
from funcnets.layers.feed_forward import FeedForward
from funcnets.layers.params import entries
from funcnets.layers.transformer import Norm, encoder_layer
from funcnets.model import Model, bind
from funcnets.models import blocks, layer_stack
from funcnets.models.layer_stack import Share
from funcnets.taps import Taps, TapsLike

Positions: TypeAlias = Literal["learned", "sinusoidal", "rotary", "alibi", "none"]


@dataclass(frozen=True)
class Config:
    """What a BERT is made of; see `bert`."""

    vocabulary: int
    context: int = 512
    width: int = 128
    depth: int = 4
    heads: int = 4
    hidden: int | None = None
    segments: int = 0
    positions: Positions = "learned"
    norm: Norm = "layer"
    norm_first: bool = False
    activation: FeedForward = "gelu"
    head: bool = True
    share: Share = "none"
    dropout: float = 0.1
    init_std: float = 0.02

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("vocabulary", "context", "width", "heads")}
        if self.hidden is not None:
            sizes["hidden"] = self.hidden
        blocks.check_sizes("bert", **sizes)
        layer_stack.check_layers("bert", self.depth, self.share)
        layer_stack.check_heads("bert", self.width, self.heads, None)
        if not isinstance(self.segments, int) or self.segments < 0:
            raise ValueError(f"bert: segments: expected 0 or more, got {self.segments!r}")
        blocks.check_choice("bert", "norm", self.norm, ("layer", "rms"))
        layer_stack.check_positions("bert", self.positions, self.width, self.heads)
        layer_stack.check_activation("bert", self.activation)
        blocks.check_rate("bert", "dropout", self.dropout)
        if not self.init_std > 0:
            raise ValueError(f"bert: init_std: expected more than 0, got {self.init_std!r}")


def bert(
    vocabulary: int,
    context: int = 512,
    width: int = 128,
    depth: int = 4,
    heads: int = 4,
    *,
    hidden: int | None = None,
    segments: int = 0,
    positions: Positions = "learned",
    norm: Norm = "layer",
    norm_first: bool = False,
    activation: FeedForward = "gelu",
    head: bool = True,
    share: Share = "none",
    dropout: float = 0.1,
    init_std: float = 0.02,
) -> Model:
    """An encoder of texts: tokens [*batch, time] to logits of each token, [..., time, vocabulary].

    As BERT (Devlin et al. 2019): every token attends to all others, and the head tells from the
    rest the tokens that `mask_tokens` has hidden. Parameters are ``embedding``, ``positions`` (if
    learned), ``segments`` (if any), ``embedding_norm``, ``layers`` (named as those of
    ``torch.nn.TransformerEncoder``), with ``norm_first`` also ``norm``, and the head: ``transform``
    and ``head_norm`` before the embedding serves as output projection, and ``head_bias``. Taps are
    ``embedding``, ``layers.{i}.self_attn.weights`` (the attention [*batch, heads, queries, keys],
    which is computed for the tap alone, and may be replaced), ``layers.{i}`` (both where layers are
    not stacked) and ``encoder``, the last of them.

    ``apply(params, tokens, padding=..., segments=...)``: ``padding`` [*batch, time] is True for
    real tokens (others are attended to by none), ``segments`` [*batch, time] tells for each token
    the part of the text that it is of.

    Args:
        context: the largest number of tokens.
        hidden: the width of the feed-forward part, by default ``4 * width``.
        segments: how many parts a text may have.
        positions: "learned", "sinusoidal", "rotary", "alibi" or "none", as in
            `funcnets.models.gpt`.
        norm: "layer" or "rms".
        norm_first: norms before each part of a layer, not behind it.
        activation: of the feed-forward part.
        head: False leaves the head away: outputs are the encoder's, [..., time, width].
        share: "none", "stacked" or "all" (one layer at every depth, as in ALBERT, Lan et al. 2020);
            as in `funcnets.models.gpt`.
        dropout: the rate, in training.
        init_std: the deviation of the first values.

    >>> model = bert(vocabulary=10, context=8, width=16, depth=2, heads=2, share="all")
    >>> model.apply(model.init(random.key(0)), torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 10])
    """
    config = Config(
        vocabulary,
        context,
        width,
        depth,
        heads,
        hidden,
        segments,
        positions,
        norm,
        norm_first,
        activation,
        head,
        share,
        dropout,
        init_std,
    )
    return bind("bert", config, init, forward, check)


def init(key: random.Key, config: Config) -> TensorDict:
    """The parameters."""
    keys = random.split(key, 5).unbind()
    normal = layers.initializers.normal(std=config.init_std)

    def make(key: random.Key) -> TensorDict:
        made = layers.init_encoder_layer(
            key,
            config.width,
            config.heads,
            config.hidden or 4 * config.width,
            activation=config.activation,
            norm=config.norm,
        )
        return layer_stack.normal_weights(key, made, config.init_std)

    def norm() -> TensorDict:
        return blocks.init_norm(key, config.norm, config.width)

    params: dict[str, Any] = {
        "embedding": layers.init_embedding(
            keys[0], config.vocabulary, config.width, weight_init=normal
        )
    }
    if config.positions == "learned":
        params["positions"] = layers.init_learned_positions(
            keys[1], config.context, config.width, weight_init=normal
        )
    if config.segments:
        params["segments"] = layers.init_embedding(
            keys[2], config.segments, config.width, weight_init=normal
        )
    params["embedding_norm"] = norm()
    params["layers"] = layer_stack.init_layers(keys[3], config.depth, config.share, make)
    if config.norm_first:
        params["norm"] = norm()
    if config.head:
        params["transform"] = init_linear(
            keys[4],
            config.width,
            config.width,
            weight_init=normal,
            bias_init=layers.initializers.zeros(),
        )
        params["head_norm"] = norm()
        params["head_bias"] = torch.zeros(config.vocabulary, device=key.device)
    return TensorDict(params)


def check(tokens: Tensor, config: Config) -> None:
    """Raises unless tokens are integers, and no more than the context."""
    layer_stack.check_tokens("bert", "tokens", tokens, config.context)


def forward(
    params: TensorDict,
    tokens: Int[Tensor, "*batch time"],
    *,
    config: Config,
    padding: Bool[Tensor, "*batch time"] | None = None,
    segments: Int[Tensor, "*batch time"] | None = None,
    train: bool = False,
    key: random.Key | None = None,
    taps: TapsLike = (),
) -> Any:
    """Logits, or the encoder's outputs; in training with (no) new buffers."""
    _check(tokens, padding, segments, config)
    draws = train and config.dropout > 0
    if draws and key is None:
        blocks.draw_keys("bert", None, True, 1)  # raises
    keys = random.split(key, config.depth + 1) if draws and key is not None else None
    tap, found, time = Taps("bert", taps), entries(params), tokens.shape[-1]

    def normed(name: str, x: Tensor) -> Tensor:
        return blocks.norm(found[name], x, config.norm, train=False)[0]

    x = layer_stack.look_up("bert", "tokens", found["embedding"], tokens)
    x = layer_stack.add_positions(x, config.positions, found, "positions", time)
    if segments is not None:
        x = x + layer_stack.look_up("bert", "segments", found["segments"], segments)
    x = normed("embedding_norm", x)
    if keys is not None:
        x = layers.dropout(keys[0], x, config.dropout)
    x = tap("embedding", x)
    options = layer_stack.attention_positions(
        config.positions, time, time, config.width, config.heads, x
    )

    def layer(
        params: Any, x: Tensor, key: Tensor | None, look: layer_stack.Look
    ) -> tuple[Tensor, None]:
        x = encoder_layer(
            params,
            x,
            heads=config.heads,
            norm_first=config.norm_first,
            activation=config.activation,
            norm=config.norm,
            padding=padding,
            dropout=config.dropout,
            key=key,
            tap=look("self_attn"),
            **options,
        )
        return x, None

    rest = None if keys is None else keys[1:]
    x, _ = layer_stack.run_layers(
        tap, "layers", found["layers"], x, config.depth, config.share, layer, rest
    )
    x = tap("encoder", normed("norm", x) if config.norm_first else x)
    if config.head:
        x = normed("head_norm", F.gelu(linear(found["transform"], x)))
        x = layers.unembed(found["embedding"], x) + found["head_bias"]
    return tap.finish(x, {}, train)


def mask_tokens(
    key: random.Key,
    tokens: Int[Tensor, "*shape"],
    *,
    vocabulary: int,
    mask_token: int,
    rate: float = 0.15,
    random_rate: float = 0.1,
    kept_rate: float = 0.1,
    allowed: Bool[Tensor, "*shape"] | None = None,
) -> tuple[Int[Tensor, "*shape"], Bool[Tensor, "*shape"]]:
    """Tokens of which some are hidden, and which those are: what a `bert` is trained to tell.

    Args:
        vocabulary: random tokens are below it.
        mask_token: what stands for a hidden token.
        rate: the probability that a token is chosen.
        random_rate, kept_rate: the parts of the chosen tokens that become a random token, and that
            stay as they are (Devlin et al. 2019).
        allowed: which tokens may be chosen, for instance those that are no padding.

    >>> tokens = torch.arange(8)
    >>> inputs, chosen = mask_tokens(random.key(0), tokens, vocabulary=8, mask_token=8, rate=0.5)
    >>> bool((inputs == tokens)[~chosen].all())
    True
    """
    blocks.check_sizes("mask_tokens", vocabulary=vocabulary)
    for name, value in (("rate", rate), ("random_rate", random_rate), ("kept_rate", kept_rate)):
        blocks.check_rate("mask_tokens", name, value)
    if random_rate + kept_rate > 1:
        raise ValueError(
            "mask_tokens: kept_rate: expected at most 1 with random_rate, "
            f"got {random_rate} + {kept_rate}"
        )
    if allowed is not None and allowed.shape != tokens.shape:
        raise ValueError(
            f"mask_tokens: allowed: expected {list(tokens.shape)}, got {list(allowed.shape)}"
        )
    choice_key, kind_key, token_key = random.split(key, 3)
    chosen = random.bernoulli(choice_key, tokens.shape, rate)
    if allowed is not None:
        chosen = chosen & allowed
    kind = random.uniform(kind_key, tokens.shape)
    drawn = random.randint(token_key, tokens.shape, 0, vocabulary).to(tokens.dtype)
    hidden = torch.where(kind < random_rate, drawn, torch.full_like(tokens, mask_token))
    hidden = torch.where(kind >= 1 - kept_rate, tokens, hidden)
    return torch.where(chosen, hidden, tokens), chosen


def _check(tokens: Tensor, padding: Tensor | None, segments: Tensor | None, config: Config) -> None:
    check(tokens, config)
    layer_stack.check_padding("bert", "padding", padding, tokens.shape)
    if segments is not None:
        if not config.segments:
            raise ValueError("bert: segments: expected None (the model has none)")
        layer_stack.check_tokens("bert", "segments", segments)
        if segments.shape != tokens.shape:
            raise ValueError(
                f"bert: segments: expected {list(tokens.shape)} (as tokens), "
                f"got {list(segments.shape)}"
            )

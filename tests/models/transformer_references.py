"""The Transformers as modules of torch.nn, written apart from the library."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "squared_relu": lambda x: x.relu() ** 2,
    "swiglu": lambda x: x.chunk(2, -1)[0] * F.silu(x.chunk(2, -1)[1]),
    "geglu": lambda x: x.chunk(2, -1)[0] * F.gelu(x.chunk(2, -1)[1]),
}


def make_norm(kind: str, width: int, bias: bool = True) -> nn.Module:
    return nn.RMSNorm(width) if kind == "rms" else nn.LayerNorm(width, bias=bias)


class Projections(nn.Module):
    """The parameters of nn.MultiheadAttention, with fewer heads for keys and values."""

    def __init__(self, width: int, rows: int, bias: bool) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(width + 2 * rows, width))
        if bias:
            self.in_proj_bias = nn.Parameter(torch.zeros(width + 2 * rows))
        self.out_proj = nn.Linear(width, width, bias=bias)


class Layer(nn.Module):
    """One layer, in plain arithmetic, with every option."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        width, bias = config.width, getattr(config, "bias", True)
        hidden = config.hidden or 4 * width
        gated = config.activation in ("swiglu", "geglu")
        self.groups = getattr(config, "key_value_heads", None) or config.heads
        self.self_attn = Projections(width, self.groups * (width // config.heads), bias)
        self.linear1 = nn.Linear(width, 2 * hidden if gated else hidden, bias=bias)
        self.linear2 = nn.Linear(hidden, width, bias=bias)
        self.norm1 = make_norm(config.norm, width, bias)
        self.norm2 = make_norm(config.norm, width, bias)

    def turned(self, x: Tensor) -> Tensor:
        """Rotary positions by complex numbers."""
        half = x.shape[-1] // 2
        base = getattr(self.config, "rotary_base", 10000.0)
        frequency = base ** (-torch.arange(half, dtype=x.dtype) / half)
        angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * frequency
        z = torch.complex(x[..., :half], x[..., half:])
        z = z * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([z.real, z.imag], -1)

    def attend(self, x: Tensor, causal: bool) -> Tensor:
        config, attn = self.config, self.self_attn
        batch, time, width = x.shape
        d = width // config.heads
        projected = F.linear(x, attn.in_proj_weight, getattr(attn, "in_proj_bias", None))
        q, k, v = projected.split([width, self.groups * d, self.groups * d], -1)
        q, k, v = (y.reshape(batch, time, -1, d).transpose(1, 2) for y in (q, k, v))
        if getattr(config, "normalize", False):
            q, k = (
                y / (y.square().mean(-1, True) + torch.finfo(y.dtype).eps).sqrt() for y in (q, k)
            )
        if config.positions == "rotary":
            q, k = self.turned(q), self.turned(k)
        k, v = (y.repeat_interleave(config.heads // self.groups, 1) for y in (k, v))
        scores = q @ k.mT / math.sqrt(d)
        back = torch.arange(time)[:, None] - torch.arange(time)
        if config.positions == "alibi":
            slopes = 2.0 ** (-8 * torch.arange(1, config.heads + 1, dtype=x.dtype) / config.heads)
            scores = scores - slopes[:, None, None] * back.abs()
        seen = back >= 0 if causal else torch.ones_like(back, dtype=torch.bool)
        if (window := getattr(config, "window", None)) is not None:
            seen = seen & (back < window)
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
        return attn.out_proj((weights @ v).transpose(1, 2).reshape(batch, time, width))

    def feed(self, x: Tensor) -> Tensor:
        return self.linear2(ACTIVATIONS[self.config.activation](self.linear1(x)))

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        if getattr(self.config, "norm_first", True):
            x = x + self.attend(self.norm1(x), causal)
            return x + self.feed(self.norm2(x))
        x = self.norm1(x + self.attend(x, causal))
        return self.norm2(x + self.feed(x))


class TorchLayer(nn.TransformerEncoderLayer):
    """torch's own."""

    def __init__(self, config: Any) -> None:
        super().__init__(
            config.width,
            config.heads,
            config.hidden or 4 * config.width,
            dropout=0.0,
            activation=config.activation,
            batch_first=True,
            norm_first=getattr(config, "norm_first", True),
            bias=getattr(config, "bias", True),
        )

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return super().forward(x, src_mask=later if causal else None)


class TorchDecoderLayer(nn.TransformerDecoderLayer):
    """torch's own, causal."""

    def __init__(self, config: Any) -> None:
        super().__init__(
            config.width,
            config.heads,
            config.hidden or 4 * config.width,
            dropout=0.0,
            activation=config.activation,
            batch_first=True,
            norm_first=config.norm_first,
            bias=config.bias,
        )

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return super().forward(x, memory, tgt_mask=later)


def make_layer(config: Any) -> nn.Module:
    """torch's own layer where it has all that the config asks for."""
    plain = {"key_value_heads": None, "window": None, "normalize": False}
    simple = all(getattr(config, name, value) == value for name, value in plain.items())
    known = config.positions not in ("rotary", "alibi") and config.norm == "layer"
    if simple and known and config.activation in ("relu", "gelu"):
        return TorchLayer(config)
    return Layer(config)


def drawn(make: Callable[[], nn.Module], std: float, last: float) -> nn.Module:
    """A layer whose matrices are normal, and whose last projections are scaled."""
    made = make()
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 2:
            scale = last if name in ("self_attn.out_proj.weight", "linear2.weight") else 1.0
            nn.init.normal_(parameter, std=std * scale)
    return made


def xavier(make: Callable[[], nn.Module]) -> nn.Module:
    """A layer whose matrices are drawn as nn.Transformer draws them."""
    made = make()
    for parameter in made.parameters():
        if parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter)
    return made


class Stacked(nn.Module):
    """Layers whose parameters lie along a new first axis."""

    def __init__(self, depth: int, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.depth = depth
        made = [make() for _ in range(depth)]
        self.__dict__["one"] = make()  # no part of it: only its code is used
        for name, part in self.one.named_modules():
            if name:
                self.set_submodule(name, nn.Module())
            for leaf, _ in list(part.named_parameters(recurse=False)):
                each = [getattr(layer.get_submodule(name), leaf) for layer in made]
                stacked = nn.Parameter(torch.stack(each).detach())
                self.get_submodule(name).register_parameter(leaf, stacked)

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        named = dict(self.named_parameters())
        self.one.train(self.training)
        for i in range(self.depth):
            one = {name: leaf[i] for name, leaf in named.items()}
            x = functional_call(self.one, one, (x, *args))
        return x


class Repeated(nn.Module):
    """Of several modules, or the same one several times."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        for i, layer in enumerate(layers):
            self.add_module(str(i), layer)

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        for layer in self.children():
            x = layer(x, *args)
        return x


def make_layers(config: Any, depth: int, make: Callable[[], nn.Module]) -> nn.Module:
    if config.share == "none":
        return Repeated([make() for _ in range(depth)])
    return Stacked(depth, make) if config.share == "stacked" else make()


def through(layers: nn.Module, config: Any, depth: int, x: Tensor, *args: Any) -> Tensor:
    for _ in range(depth if config.share == "all" else 1):
        x = layers(x, *args)
    return x


def waves(time: int, width: int, dtype: torch.dtype) -> Tensor:
    """Sinusoidal positions."""
    table = torch.empty(time, width, dtype=dtype)
    for place in range(time):
        for i in range(0, width, 2):
            angle = place / 10000 ** (i / width)
            table[place, i], table[place, i + 1] = math.sin(angle), math.cos(angle)
    return table


def normal(module: nn.Module, std: float) -> nn.Module:
    nn.init.normal_(module.weight, std=std)
    return module


class GPT(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, width, std = config, config.width, config.init_std
        self.embedding = normal(nn.Embedding(config.vocabulary, width), std)
        if config.positions == "learned":
            self.positions = normal(nn.Embedding(config.context, width), std)
        last = 0.0 if config.zero_init else 1 / math.sqrt(2 * config.depth)
        make = partial(drawn, partial(make_layer, config), std, last)
        self.layers = make_layers(config, config.depth, make)
        self.norm = make_norm(config.norm, width, config.bias)
        if not config.tied:
            self.head = normal(nn.Linear(width, config.vocabulary, bias=False), std)

    def forward(self, tokens: Tensor) -> Tensor:
        config, x = self.config, self.embedding(tokens)
        if config.positions == "learned":
            x = x + self.positions.weight[: tokens.shape[1]]
        if config.positions == "sinusoidal":
            x = x + waves(tokens.shape[1], config.width, x.dtype)
        x = self.norm(through(self.layers, config, config.depth, x, True))
        logits = self.head(x) if not config.tied else x @ self.embedding.weight.T
        if config.soft_cap is not None:
            logits = torch.tanh(logits / config.soft_cap) * config.soft_cap
        return logits


class BERT(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, width, std = config, config.width, config.init_std
        self.embedding = normal(nn.Embedding(config.vocabulary, width), std)
        if config.positions == "learned":
            self.positions = normal(nn.Embedding(config.context, width), std)
        if config.segments:
            self.segments = normal(nn.Embedding(config.segments, width), std)
        self.embedding_norm = make_norm(config.norm, width)
        make = partial(drawn, partial(make_layer, config), std, 1.0)
        self.layers = make_layers(config, config.depth, make)
        if config.norm_first:
            self.norm = make_norm(config.norm, width)
        if config.head:
            self.transform = normal(nn.Linear(width, width), std)
            nn.init.zeros_(self.transform.bias)
            self.head_norm = make_norm(config.norm, width)
            self.head_bias = nn.Parameter(torch.zeros(config.vocabulary))

    def forward(self, tokens: Tensor) -> Tensor:
        config, x = self.config, self.embedding(tokens)
        if config.positions == "learned":
            x = x + self.positions.weight[: tokens.shape[1]]
        if config.positions == "sinusoidal":
            x = x + waves(tokens.shape[1], config.width, x.dtype)
        x = through(self.layers, config, config.depth, self.embedding_norm(x), False)
        if config.norm_first:
            x = self.norm(x)
        if not config.head:
            return x
        return self.head_norm(F.gelu(self.transform(x))) @ self.embedding.weight.T + self.head_bias


class Stack(nn.Module):
    def __init__(self, config: Any, depth: int, kind: Callable[[Any], nn.Module]) -> None:
        super().__init__()
        self.config, self.depth = config, depth
        self.layers = make_layers(config, depth, partial(xavier, partial(kind, config)))
        self.norm = make_norm(config.norm, config.width, config.bias)

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        return self.norm(through(self.layers, self.config, self.depth, x, *args))


class Transformer(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, width = config, config.width
        std = width**-0.5
        if config.vocabulary:
            self.embedding = normal(nn.Embedding(config.vocabulary, width), std)
        if config.target_vocabulary:
            self.target_embedding = normal(nn.Embedding(config.target_vocabulary, width), std)
        if config.positions == "learned" and config.encoder_depth:
            self.positions = normal(nn.Embedding(config.context, width), 0.02)
        if config.positions == "learned" and config.decoder_depth:
            self.target_positions = normal(nn.Embedding(config.context, width), 0.02)
        if config.encoder_depth:
            self.encoder = Stack(config, config.encoder_depth, TorchLayer)
        if config.decoder_depth:
            self.decoder = Stack(config, config.decoder_depth, TorchDecoderLayer)
        size = config.target_vocabulary or config.vocabulary
        if size and config.decoder_depth and not config.tied:
            self.head = normal(nn.Linear(width, size, bias=False), std)

    def embed(self, table: nn.Module | None, positions: nn.Module | None, x: Tensor) -> Tensor:
        if table is not None:
            x = table(x) * self.config.width**0.5
        if positions is not None:
            x = x + positions.weight[: x.shape[1]]
        if self.config.positions == "sinusoidal":
            x = x + waves(x.shape[1], self.config.width, x.dtype)
        return x

    def forward(self, source: Tensor, target: Tensor | None = None) -> Tensor:
        config, table = self.config, getattr(self, "embedding", None)
        if config.encoder_depth:
            x = self.embed(table, getattr(self, "positions", None), source)
            source = self.encoder(x, False)
        if not config.decoder_depth:
            return source
        table = getattr(self, "target_embedding", table)
        x = self.embed(table, getattr(self, "target_positions", None), target)
        x = self.decoder(x, source)
        if table is None:
            return x
        return self.head(x) if not config.tied else x @ table.weight.T

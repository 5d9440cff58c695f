"""A stack of residual blocks over vectors, of any depth, whose blocks may be stacked or shared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from jaxtyping import Float
from tensordict import TensorDict
from torch import Tensor

from funcnets import layers, random, tree
from funcnets.control import scan
from funcnets.layers import init_layer_norm, init_linear, layer_norm, linear, stochastic_depth
from funcnets.model import Model, bind
from funcnets.models import blocks
from funcnets.taps import Taps, TapsLike

Block: TypeAlias = Literal["mlp", "glu"]
Share: TypeAlias = Literal["none", "stacked", "all"]


@dataclass(frozen=True)
class Config:
    """What the network is made of; see `residual_mlp`."""

    in_features: int
    heads: int | tuple[tuple[str, int], ...]
    width: int = 128
    depth: int = 4
    expansion: int = 2
    block: Block | tuple[Block, ...] = "mlp"
    share: Share = "none"
    activation: str = "gelu"
    dropout: float = 0.0
    stochastic_depth: float = 0.0

    def __post_init__(self) -> None:
        outputs = dict(self.heads) if isinstance(self.heads, tuple) else {"": self.heads}
        blocks.check_sizes(
            "residual_mlp",
            in_features=self.in_features,
            width=self.width,
            expansion=self.expansion,
            **{f"heads.{name}" if name else "heads": size for name, size in outputs.items()},
        )
        if not isinstance(self.depth, int) or self.depth < 0:
            raise ValueError(f"residual_mlp: depth: expected 0 or more, got {self.depth!r}")
        blocks.check_choice("residual_mlp", "share", self.share, ("none", "stacked", "all"))
        for kind in (self.block,) if isinstance(self.block, str) else self.block:
            blocks.check_choice("residual_mlp", "block", kind, ("mlp", "glu"))
        if not isinstance(self.block, str):
            if len(self.block) != self.depth:
                raise ValueError(
                    f"residual_mlp: block: expected {self.depth} kinds (as depth), "
                    f"got {len(self.block)}"
                )
            if self.share != "none":
                raise ValueError(
                    f"residual_mlp: block: expected one kind with share={self.share!r}, "
                    f"got {self.block}"
                )
        if not outputs:
            raise ValueError("residual_mlp: heads: expected at least one, got none")
        blocks.check_rate("residual_mlp", "dropout", self.dropout)
        blocks.check_rate("residual_mlp", "stochastic_depth", self.stochastic_depth)
        layers.activation(self.activation)

    def kind(self, i: int) -> Block:
        """The kind of the block at a depth."""
        return self.block if isinstance(self.block, str) else self.block[i]


def residual_mlp(
    in_features: int,
    heads: int | Mapping[str, int] | tuple[tuple[str, int], ...],
    width: int = 128,
    depth: int = 4,
    *,
    expansion: int = 2,
    block: Block | tuple[Block, ...] | list[Block] = "mlp",
    share: Share = "none",
    activation: str = "gelu",
    dropout: float = 0.0,
    stochastic_depth: float = 0.0,
) -> Model:
    """Residual blocks between a linear stem and linear heads, for vectors [..., in_features].

    Every block adds to its input what two linear layers make of it normed,
    ``x + fc2(activation(fc1(norm(x))))`` (the feed-forward half of a Transformer's block), so that
    networks of hundreds of blocks train. Parameters are ``stem``, ``blocks``, ``norm`` and
    ``heads``. Taps are ``stem``, ``blocks.{i}`` (where blocks are not scanned) and ``norm``.

    ``apply(params, x)`` gives a dict of the outputs by name, or [..., heads] where ``heads`` is a
    number; ``apply(params, x, head)`` gives the output of one head, and computes that alone.

    Args:
        heads: the number of outputs, or a number for each of several heads by name.
        width: of the stream between the blocks.
        depth: how many blocks; with none, the network is linear but for the norm.
        expansion: the width inside a block, in units of ``width``.
        block: "mlp", or "glu", whose first layer is twice as wide and gates itself by the
            activation (Shazeer 2020); one kind, or one for each depth.
        share: "none": ``blocks.0``, ``blocks.1``, ... "stacked": one tree of batch size [depth],
            over which `funcnets.scan` runs without being laid out, so that the time to compile does
            not grow with the depth. "all": one block is applied at every depth (as in ALBERT).
        activation: a name that `funcnets.layers.activation` knows.
        dropout: the rate after the activation, in training.
        stochastic_depth: the rate at which a sample skips the last block, in training; it grows
            linearly from 0 (Huang et al. 2016).

    >>> import torch
    >>> model = residual_mlp(4, {"kind": 3, "age": 1}, width=8, depth=5, share="stacked")
    >>> params = model.init(random.key(0))
    >>> params["blocks"].batch_size, model.apply(params, torch.ones(2, 4), "age").shape
    (torch.Size([5]), torch.Size([2, 1]))
    """
    config = Config(
        in_features,
        tuple(dict(heads).items()) if isinstance(heads, Mapping | tuple | list) else heads,
        width,
        depth,
        expansion,
        block if isinstance(block, str) else tuple(block),
        share,
        activation,
        dropout,
        stochastic_depth,
    )
    return bind("residual_mlp", config, init, forward, check)


def init(key: random.Key, config: Config) -> TensorDict:
    """The parameters."""
    stem_key, blocks_key, heads_key = random.split(key, 3)
    count = 1 if config.share == "all" else config.depth
    keys = random.split(blocks_key, count).unbind() if config.depth else ()
    made = [_init_block(one, config, config.kind(i)) for i, one in enumerate(keys)]
    params = {"stem": init_linear(stem_key, config.in_features, config.width)}
    if made and config.share == "all":
        params["blocks"] = made[0]
    elif made and config.share == "stacked":
        params["blocks"] = tree.stack(made)
    elif made:
        params["blocks"] = TensorDict({str(i): one for i, one in enumerate(made)})
    params["norm"] = init_layer_norm(stem_key, config.width)
    if isinstance(config.heads, int):
        params["heads"] = init_linear(heads_key, config.width, config.heads)
    else:
        head_keys = random.split(heads_key, len(config.heads)).unbind()
        params["heads"] = TensorDict(
            {
                name: init_linear(one, config.width, size)
                for (name, size), one in zip(config.heads, head_keys, strict=True)
            }
        )
    return TensorDict(params)


def check(x: Tensor, config: Config) -> None:
    """Raises unless x has the features that the model takes."""
    if x.shape[-1:] != (config.in_features,):
        raise ValueError(
            f"residual_mlp: x: expected [..., {config.in_features}], got {list(x.shape)}"
        )


def forward(
    params: TensorDict,
    x: Float[Tensor, "*batch in_features"],
    head: str | None = None,
    *,
    config: Config,
    train: bool = False,
    key: random.Key | None = None,
    taps: TapsLike = (),
) -> Any:
    """The outputs by name, or of one head; in training with (no) new buffers."""
    check(x, config)
    names = () if isinstance(config.heads, int) else [name for name, _ in config.heads]
    if head is not None and head not in names:
        known = ", ".join(names) or "None (the model has one head, without a name)"
        raise ValueError(f"residual_mlp: head: expected one of {known}, got {head!r}")
    draws = train and config.depth > 0 and (config.dropout > 0 or config.stochastic_depth > 0)
    if draws and key is None:
        blocks.draw_keys("residual_mlp", None, True, config.depth)  # raises
    keys = random.split(key, config.depth) if draws and key is not None else None
    tap = Taps("residual_mlp", taps)
    x = tap("stem", linear(params["stem"], x))
    if config.share == "stacked" and config.depth:
        x = _scanned(params["blocks"], x, keys, config)
    else:
        for i in range(config.depth):
            block = params["blocks"] if config.share == "all" else params["blocks", str(i)]
            rate = config.stochastic_depth * (i + 1) / config.depth
            one = None if keys is None else keys[i]
            x = tap(f"blocks.{i}", _block(block, x, one, rate, config, config.kind(i)))
    x = tap("norm", layer_norm(params["norm"], x))
    outputs: Any
    if isinstance(config.heads, int):
        outputs = linear(params["heads"], x)
    elif head is not None:
        outputs = linear(params["heads", head], x)
    else:
        outputs = {name: linear(params["heads", name], x) for name, _ in config.heads}
    return tap.finish(outputs, {}, train)


def _init_block(key: random.Key, config: Config, kind: Block) -> TensorDict:
    fc1, fc2 = random.split(key)
    inner = config.width * config.expansion
    return TensorDict(
        {
            "norm": init_layer_norm(fc1, config.width),
            "fc1": init_linear(fc1, config.width, inner * (2 if kind == "glu" else 1)),
            "fc2": init_linear(fc2, inner, config.width),
        }
    )


def _block(
    params: TensorDict,
    x: Tensor,
    key: random.Key | None,
    rate: float | Tensor,
    config: Config,
    kind: Block,
) -> Tensor:
    activation = layers.activation(config.activation)
    h = linear(params["fc1"], layer_norm(params["norm"], x))
    h = layers.glu(h, activation) if kind == "glu" else activation(h)
    if key is None:
        return x + linear(params["fc2"], h)
    dropout_key, depth_key = random.split(key)
    if config.dropout > 0:
        h = layers.dropout(dropout_key, h, config.dropout)
    h = linear(params["fc2"], h)
    if config.stochastic_depth > 0:
        h = stochastic_depth(depth_key, h, rate, "row" if h.ndim > 1 else "batch")
    return x + h


def _scanned(stacked: TensorDict, x: Tensor, keys: Tensor | None, config: Config) -> Tensor:
    steps = range(1, config.depth + 1)
    rates = x.new_tensor([config.stochastic_depth * step / config.depth for step in steps])

    def turn(x: Tensor, step: Any) -> tuple[Tensor, None]:
        params, rate, *key = step
        return _block(params, x, key[0] if key else None, rate, config, config.kind(0)), None

    xs = (stacked, rates) if keys is None else (stacked, rates, keys)
    return scan(turn, x, xs, unroll=False)[0]

"""A plain convolutional network: blocks of convolutions, then a linear head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float
from tensordict import TensorDict
from torch import Tensor

from funcnets import layers, random
from funcnets.layers import (
    activate_and_pool,
    activation,
    channel_dropout,
    conv,
    init_conv,
    init_linear,
    linear,
)
from funcnets.layers.fresh import activate_fresh
from funcnets.model import Model, bind
from funcnets.models import blocks
from funcnets.taps import Taps, TapsLike

POOLS: dict[tuple[str, int], Callable[..., Tensor]] = {
    ("max", 1): layers.max_pool1d,
    ("max", 2): layers.max_pool2d,
    ("max", 3): layers.max_pool3d,
    ("avg", 1): layers.avg_pool1d,
    ("avg", 2): layers.avg_pool2d,
    ("avg", 3): layers.avg_pool3d,
}


@dataclass(frozen=True)
class Config:
    """What a network is made of: one block per width, each of ``depth`` convolutions."""

    in_channels: int
    num_classes: int
    widths: tuple[int, ...] = (32, 64)
    depth: int = 1
    kernel_size: int = 3
    dims: int = 2
    activation: str = "relu"
    norm: Literal["batch", "group"] | None = "batch"
    groups: int = 8
    pool: Literal["max", "avg"] | None = "max"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", blocks.check_widths("cnn", self.widths))
        blocks.check_sizes(
            "cnn",
            in_channels=self.in_channels,
            num_classes=self.num_classes,
            depth=self.depth,
            kernel_size=self.kernel_size,
            groups=self.groups,
        )
        blocks.check_choice("cnn", "norm", self.norm, (None, "batch", "group"))
        blocks.check_choice("cnn", "pool", self.pool, (None, "max", "avg"))
        blocks.check_choice("cnn", "dims", self.dims, (1, 2, 3))
        blocks.check_rate("cnn", "dropout", self.dropout)
        activation(self.activation)
        if self.kernel_size % 2 == 0:
            raise ValueError(f"cnn: kernel_size: expected an odd size, got {self.kernel_size}")
        if not self.widths:
            raise ValueError("cnn: widths: expected at least one block, got none")
        if self.norm == "group" and any(width % self.groups for width in self.widths):
            raise ValueError(
                f"cnn: widths: expected multiples of groups={self.groups}, got {self.widths}"
            )


def cnn(
    in_channels: int,
    num_classes: int,
    widths: tuple[int, ...] | list[int] = (32, 64),
    *,
    depth: int = 1,
    kernel_size: int = 3,
    dims: int = 2,
    activation: str = "relu",
    norm: Literal["batch", "group"] | None = "batch",
    groups: int = 8,
    pool: Literal["max", "avg"] | None = "max",
    dropout: float = 0.0,
) -> Model:
    """A convolutional network, from [batch, in_channels, *spatial] to logits [batch, num_classes].

    Every block is ``depth`` times convolution, norm and activation, then pooling by two and channel
    dropout. The mean over what is left of the space goes through a linear layer. Parameters are
    named ``features.{block}.{i}.0`` (convolution) and ``.1`` (norm), as a sequence of
    ``torchvision.ops.Conv2dNormActivation`` is, and ``classifier``. Taps are
    ``features.{block}.{i}`` (after the activation), ``features.{block}`` and ``avgpool``.

    Args:
        widths: channels of the blocks.
        depth: convolutions in each block.
        kernel_size: odd; the padding keeps the size.
        dims: spatial dimensions, 1 to 3.
        activation: a name that `funcnets.layers.activation` knows.
        groups: of channels, for the group norm.
        pool: what follows each block; None keeps the size throughout.
        dropout: the rate at the end of each block, in training.

    >>> import torch
    >>> model = cnn(1, 10)
    >>> params = model.init(random.key(0))
    >>> model.apply(params, torch.ones(5, 1, 8, 8)).shape
    torch.Size([5, 10])
    """
    config = Config(
        in_channels,
        num_classes,
        blocks.check_widths("cnn", widths),
        depth,
        kernel_size,
        dims,
        activation,
        norm,
        groups,
        pool,
        dropout,
    )
    return bind("cnn", config, init, forward, check)


def init(key: random.Key, config: Config) -> TensorDict:
    """The parameters (with buffers, if the norm is "batch")."""
    keys = iter(random.split(key, len(config.widths) * config.depth + 1).unbind())
    channels, features = config.in_channels, {}
    for block, width in enumerate(config.widths):
        convolutions = {}
        for i in range(config.depth):
            conv_key = next(keys)
            # A norm takes the bias away again, so there is none.
            layer = {
                "0": init_conv(
                    conv_key,
                    channels,
                    width,
                    config.kernel_size,
                    dims=config.dims,
                    bias=config.norm is None,
                )
            }
            if config.norm is not None:
                layer["1"] = blocks.init_norm(conv_key, config.norm, width)
            convolutions[str(i)] = layer
            channels = width
        features[str(block)] = convolutions
    classifier = init_linear(next(keys), channels, config.num_classes)
    return TensorDict({"features": features, "classifier": classifier})


def check(x: Tensor, config: Config) -> None:
    """Raises unless x is of the shape that the model takes."""
    smallest = 2 ** len(config.widths) if config.pool else 1
    if (
        x.ndim != 2 + config.dims
        or x.shape[1] != config.in_channels
        or any(size < smallest for size in x.shape[2:])
    ):
        sizes = ", ".join([f"{smallest} or more"] * config.dims)
        raise ValueError(
            f"cnn: x: expected [batch, {config.in_channels}, {sizes}], got {list(x.shape)}"
        )


def forward(
    params: TensorDict,
    x: Float[Tensor, "batch in_channels *spatial"],
    config: Config,
    *,
    train: bool = False,
    key: random.Key | None = None,
    taps: TapsLike = (),
) -> Any:
    """Logits [batch, num_classes]; in training with the new buffers."""
    check(x, config)
    keys = blocks.draw_keys("cnn", key, train and config.dropout > 0, len(config.widths))
    tap, nonlinear = Taps("cnn", taps), activation(config.activation)
    features: dict[str, Any] = {}
    for block in range(len(config.widths)):
        found = features[str(block)] = {}
        for i in range(config.depth):
            name = f"features.{block}.{i}"
            layer = params["features", str(block), str(i)]
            x = conv(layer["0"], x, padding=config.kernel_size // 2)
            if config.norm is not None:
                x, new = blocks.norm(layer["1"], x, config.norm, train=train, groups=config.groups)
                found[str(i)] = {"1": new}
            if config.pool == "max" and i == config.depth - 1:
                pool = POOLS["max", config.dims]
                x = activate_and_pool(nonlinear, pool, x, 2, tap=tap.at(name))
            else:
                x = tap(name, activate_fresh(nonlinear, x))
        if config.pool == "avg":
            x = POOLS["avg", config.dims](x, 2)
        if keys is not None:
            x = channel_dropout(keys[block], x, config.dropout)
        x = tap(f"features.{block}", x)
    x = tap("avgpool", layers.global_avg_pool(x))
    return tap.finish(linear(params["classifier"], x), {"features": features}, train)

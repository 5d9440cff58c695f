"""U-Net: images to a label for each pixel (Ronneberger et al. 2015)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from tensordict import TensorDict
from torch import Tensor

from funcnets import layers, random
from funcnets.layers import activation, conv, conv_transpose, init_conv, init_conv_transpose
from funcnets.layers.fresh import activate_fresh
from funcnets.model import Model, bind
from funcnets.models import blocks
from funcnets.taps import Taps, TapsLike


@dataclass(frozen=True)
class Config:
    """What a U-Net is made of: one level per width, each half the size of the one before.

    Attributes:
        widths: channels of the levels, the last of them the bottom.
        convolutions: 3x3, at each level on the way down, and again on the way up.
        norm: between a convolution and its activation.
        groups: of channels, for the group norm.
        upsample: "transposed", a 2x2 convolution of stride 2 to the channels of the level above,
            or the interpolation, "bilinear" or "nearest", which has no parameters.
        activation: a name that `funcnets.layers.activation` knows.
        dropout: the rate at the end of the bottom, in training.
    """

    in_channels: int
    num_classes: int
    widths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    convolutions: int = 2
    norm: Literal["batch", "group"] | None = "batch"
    groups: int = 8
    upsample: Literal["transposed", "bilinear", "nearest"] = "transposed"
    activation: str = "relu"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", blocks.check_widths("unet", self.widths))
        blocks.check_sizes(
            "unet",
            in_channels=self.in_channels,
            num_classes=self.num_classes,
            convolutions=self.convolutions,
            groups=self.groups,
        )
        blocks.check_choice("unet", "norm", self.norm, (None, "batch", "group"))
        blocks.check_choice(
            "unet", "upsample", self.upsample, ("transposed", "bilinear", "nearest")
        )
        blocks.check_rate("unet", "dropout", self.dropout)
        activation(self.activation)
        if len(self.widths) < 2:
            raise ValueError(f"unet: widths: expected two or more, got {self.widths}")
        if self.norm == "group" and any(width % self.groups for width in self.widths):
            raise ValueError(
                f"unet: widths: expected multiples of groups={self.groups}, got {self.widths}"
            )


def unet(
    in_channels: int,
    num_classes: int,
    widths: tuple[int, ...] | list[int] = (64, 128, 256, 512, 1024),
    *,
    convolutions: int = 2,
    norm: Literal["batch", "group"] | None = "batch",
    groups: int = 8,
    upsample: Literal["transposed", "bilinear", "nearest"] = "transposed",
    activation: str = "relu",
    dropout: float = 0.0,
) -> Model:
    """A U-Net, from [batch, in_channels, height, width] to [batch, num_classes, height, width].

    Each level down is convolutions and max pooling; each level up enlarges what comes from below,
    joins it to what the level had on the way down, and is convolutions again; a 1x1 convolution
    gives the logits. All convolutions keep the size. Any height and width of ``2 ** depth`` or more
    will do, where ``depth`` is one less than there are widths: pooling leaves out an odd row, and
    on the way up a transposed convolution is padded with one of zeros, while an interpolation goes
    to the size that it had.

    The arguments are those of `Config`. Parameters are named ``down.{level}.{i}.0`` (convolution)
    and ``.1`` (norm), the last level being the bottom, ``upsample.{level}``, ``up.{level}.{i}``,
    and ``head``. Taps are ``down.{level}`` (before pooling), ``upsample.{level}`` and
    ``up.{level}``.

    >>> model = unet(1, 2, widths=(8, 16, 32))
    >>> params = model.init(random.key(0))
    >>> logits, found = model.apply(params, torch.ones(3, 1, 21, 30), taps=["down.2"])
    >>> logits.shape, found["down.2"].shape
    (torch.Size([3, 2, 21, 30]), torch.Size([3, 32, 5, 7]))
    """
    config = Config(
        in_channels,
        num_classes,
        blocks.check_widths("unet", widths),
        convolutions,
        norm,
        groups,
        upsample,
        activation,
        dropout,
    )
    return bind("unet", config, init, forward, check)


def init(key: random.Key, config: Config) -> TensorDict:
    """The parameters (with buffers, if the norm is "batch")."""
    down_key, enlarge_key, up_key, head_key = random.split(key, 4)
    widths, depth = config.widths, len(config.widths) - 1
    down, enlarge, up = {}, {}, {}
    for level, width in enumerate(widths):
        channels = widths[level - 1] if level else config.in_channels
        down[str(level)] = _init_level(random.fold_in(down_key, level), channels, width, config)
    for level, width in enumerate(widths[:depth]):
        below = widths[level + 1]
        if config.upsample == "transposed":
            enlarge[str(level)] = init_conv_transpose(
                random.fold_in(enlarge_key, level), below, width, 2
            )
            below = width
        up[str(level)] = _init_level(random.fold_in(up_key, level), width + below, width, config)
    parts = {"down": down, "up": up, "head": init_conv(head_key, widths[0], config.num_classes, 1)}
    return TensorDict({**parts, "upsample": enlarge} if enlarge else parts)


def check(x: Tensor, config: Config) -> None:
    """Raises unless x is a batch of images of the channels and of a size that the model takes."""
    blocks.check_image("unet", x, config.in_channels, smallest=2 ** (len(config.widths) - 1))


def forward(
    params: TensorDict,
    x: Float[Tensor, "batch in_channels height width"],
    config: Config,
    *,
    train: bool = False,
    key: random.Key | None = None,
    taps: TapsLike = (),
) -> Any:
    """Logits [batch, num_classes, height, width]; in training with the new buffers."""
    depth = len(config.widths) - 1
    check(x, config)
    keys = blocks.draw_keys("unet", key, train and config.dropout > 0, 1)
    tap, passed = Taps("unet", taps), []
    down: dict[str, Any] = {}
    up: dict[str, Any] = {}
    for level in range(depth + 1):
        if level:
            x = layers.max_pool2d(x, 2)
        x, down[str(level)] = _level(params["down", str(level)], x, config, train)
        if level == depth and keys is not None:
            x = layers.dropout(keys[0], x, config.dropout)
        x = tap(f"down.{level}", x)
        passed.append(x)
    for level in reversed(range(depth)):
        if config.upsample == "transposed":
            x = conv_transpose(params["upsample", str(level)], x, stride=2)
            x = _pad_to(x, passed[level])
        else:
            x = F.interpolate(x, passed[level].shape[2:], mode=config.upsample)
        x = torch.cat([passed[level], tap(f"upsample.{level}", x)], 1)
        x, up[str(level)] = _level(params["up", str(level)], x, config, train)
        x = tap(f"up.{level}", x)
    return tap.finish(conv(params["head"], x), {"down": down, "up": up}, train)


def _init_level(key: random.Key, channels: int, width: int, config: Config) -> TensorDict:
    found = {}
    for i, conv_key in enumerate(random.split(key, config.convolutions).unbind()):
        # A norm takes the bias away again, so there is none.
        layer = {"0": init_conv(conv_key, channels, width, 3, bias=config.norm is None)}
        if config.norm is not None:
            layer["1"] = blocks.init_norm(conv_key, config.norm, width)
        found[str(i)] = layer
        channels = width
    return TensorDict(found)


def _level(
    params: TensorDict, x: Tensor, config: Config, train: bool
) -> tuple[Tensor, dict[str, Any]]:
    """The convolutions of one level, each with norm and activation, and their new buffers."""
    found = {}
    for i in range(config.convolutions):
        layer = params[str(i)]
        x = conv(layer["0"], x, padding=1)
        if config.norm is not None:
            x, new = blocks.norm(layer["1"], x, config.norm, train=train, groups=config.groups)
            found[str(i)] = {"1": new}
        x = activate_fresh(activation(config.activation), x)
    return x, found


def _pad_to(x: Tensor, other: Tensor) -> Tensor:
    """``x`` with zeros below and to the right, up to the height and width of the other."""
    below, right = other.shape[2] - x.shape[2], other.shape[3] - x.shape[3]
    return F.pad(x, (0, right, 0, below)) if below or right else x

"""MobileNetV2 (Sandler et al. 2018): inverted residuals of depthwise convolutions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from tensordict import TensorDict
from torch import Tensor

from funcnets import layers, random
from funcnets.layers import (
    conv_norm,
    dropout,
    finish,
    init_batch_norm,
    init_conv,
    init_conv_norm,
    init_linear,
    initializers,
    linear,
    with_buffers,
)
from funcnets.layers.fresh import add_fresh
from funcnets.layers.params import entries
from funcnets.model import Model, bind
from funcnets.models import blocks, stages
from funcnets.models.stages import divisible
from funcnets.taps import Taps, TapsLike

KAIMING = initializers.kaiming_normal(mode="fan_out")


class Stage(NamedTuple):
    """Blocks of one width; the first of them has the stride.

    ``expansion`` is the width within a block, relative to that of its input.
    """

    expansion: float
    width: int
    depth: int
    stride: int


STAGES = (
    Stage(1, 16, 1, 1),
    Stage(6, 24, 2, 2),
    Stage(6, 32, 3, 2),
    Stage(6, 64, 4, 2),
    Stage(6, 96, 3, 1),
    Stage(6, 160, 3, 2),
    Stage(6, 320, 1, 1),
)


@dataclass(frozen=True)
class Config:
    """What a network is made of.

    Attributes:
        width_mult: what all widths are multiplied by (the last one only if it is above 1).
        width: channels of the first convolution.
        stages: the blocks, `Stage`s or rows (expansion, width, depth, stride).
        last_width: channels of the last convolution.
        round_nearest: what the scaled widths are multiples of.
        dropout: the rate before the linear layer, in training.
    """

    num_classes: int = 1000
    width_mult: float = 1.0
    in_channels: int = 3
    width: int = 32
    stages: tuple[Any, ...] = STAGES
    last_width: int = 1280
    round_nearest: int = 8
    dropout: float = 0.2

    def __post_init__(self) -> None:
        rows = stages.as_rows("mobilenet_v2", "stages", Stage, self.stages)
        object.__setattr__(self, "stages", rows)
        blocks.check_sizes(
            "mobilenet_v2",
            num_classes=self.num_classes,
            in_channels=self.in_channels,
            width=self.width,
            last_width=self.last_width,
            round_nearest=self.round_nearest,
        )
        stages.check_scale("mobilenet_v2", "width_mult", self.width_mult)
        blocks.check_rate("mobilenet_v2", "dropout", self.dropout)
        for i, stage in enumerate(rows):
            stages.check_scale("mobilenet_v2", f"stages[{i}].expansion", stage.expansion)

    def scaled(self, width: int) -> int:
        """A width times the multiplier, rounded."""
        return divisible(width * self.width_mult, self.round_nearest)

    def last(self) -> int:
        """Channels of the last convolution."""
        return divisible(self.last_width * max(1.0, self.width_mult), self.round_nearest)

    def blocks(self) -> Iterator[tuple[int, int, int, int]]:
        """The input, inner and output channels of each block, and its stride."""
        inputs = self.scaled(self.width)
        for expansion, width, depth, stride in self.stages:
            outputs = self.scaled(width)
            for i in range(depth):
                yield inputs, round(inputs * expansion), outputs, stride if i == 0 else 1
                inputs = outputs


def mobilenet_v2(
    num_classes: int = 1000,
    width_mult: float = 1.0,
    *,
    in_channels: int = 3,
    width: int = 32,
    stages: tuple[Any, ...] | list[Any] = STAGES,
    last_width: int = 1280,
    round_nearest: int = 8,
    dropout: float = 0.2,
) -> Model:
    """MobileNetV2, from images [batch, in_channels, height, width] to [batch, num_classes].

    As ``torchvision.models.mobilenet_v2``, 3.5 million parameters at ``width_mult=1``. The
    arguments are those of `Config`. Taps are ``features.0``, ``features.1``, ..., ``features``,
    ``avgpool``.

    >>> import torch
    >>> model = mobilenet_v2(10, width=8, stages=[(1, 8, 1, 1), (6, 16, 2, 2)], last_width=32)
    >>> model.apply(model.init(random.key(0)), torch.ones(5, 3, 8, 8)).shape
    torch.Size([5, 10])
    """
    config = Config(
        num_classes,
        width_mult,
        in_channels,
        width,
        tuple(stages),
        last_width,
        round_nearest,
        dropout,
    )
    return bind("mobilenet_v2", config, init, forward, check)


def init(key: random.Key, config: Config) -> TensorDict:
    """The parameters and buffers."""
    sizes = list(config.blocks())
    keys = iter(random.split(key, len(sizes) + 3).unbind())
    stem, last = sizes[0][0], sizes[-1][2]
    features = [init_conv_norm(next(keys), config.in_channels, stem, weight_init=KAIMING)]
    features += [init_block(next(keys), *channels) for *channels, _ in sizes]
    features.append(init_conv_norm(next(keys), last, config.last(), 1, weight_init=KAIMING))
    head = init_linear(
        next(keys),
        config.last(),
        config.num_classes,
        weight_init=initializers.normal(std=0.01),
        bias_init=initializers.zeros(),
    )
    named = {str(i): part for i, part in enumerate(features)}
    return TensorDict({"features": named, "classifier": {"1": head}})


def check(x: Tensor, config: Config) -> None:
    """Raises unless x is a batch of images of the channels and of a size that the model takes."""
    blocks.check_image("mobilenet_v2", x, config.in_channels)


def forward(
    params: TensorDict,
    x: Float[Tensor, "batch in_channels height width"],
    config: Config,
    *,
    train: bool = False,
    key: random.Key | None = None,
    taps: TapsLike = (),
) -> Any:
    """Logits [batch, num_classes]; in training with the new buffers."""
    check(x, config)
    keys = blocks.draw_keys("mobilenet_v2", key, train and config.dropout > 0, 1)
    tap, new = Taps("mobilenet_v2", taps), {}
    features = entries(params["features"])
    x, new["0"] = with_buffers(
        conv_norm, features["0"], x, train=train, stride=2, activation=F.relu6
    )
    x = tap("features.0", x)
    place = 1
    for *_, stride in config.blocks():
        name = str(place)
        x, new[name] = with_buffers(block, features[name], x, train=train, stride=stride)
        x = tap(f"features.{place}", x)
        place += 1
    name = str(place)
    x, new[name] = with_buffers(conv_norm, features[name], x, train=train, activation=F.relu6)
    x = tap("features", tap(f"features.{place}", x))
    x = tap("avgpool", layers.global_avg_pool(x))
    if keys is not None:
        x = dropout(keys[0], x, config.dropout)
    return tap.finish(linear(params["classifier", "1"], x), {"features": new}, train)


def init_block(key: random.Key, inputs: int, inner: int, outputs: int) -> TensorDict:
    """Parameters of `block`, named as in torchvision's ``InvertedResidual`` of MobileNetV2.

    A sequence ``conv``: the 1x1 convolution that expands (if it does) and the depthwise one, each
    with its norm; the 1x1 convolution that projects; its norm.
    """
    expand, depthwise, project = random.split(key, 3).unbind()
    parts = []
    if inner != inputs:
        parts.append(init_conv_norm(expand, inputs, inner, 1, weight_init=KAIMING))
    parts.append(init_conv_norm(depthwise, inner, inner, groups=inner, weight_init=KAIMING))
    parts.append(init_conv(project, inner, outputs, 1, bias=False, weight_init=KAIMING))
    parts.append(init_batch_norm(project, outputs))
    return TensorDict({"conv": {str(i): part for i, part in enumerate(parts)}})


def block(
    params: TensorDict,
    x: Float[Tensor, "batch channels height width"],
    *,
    stride: int = 1,
    train: bool = False,
) -> Any:
    """Expand, convolve depthwise, project; plus the input where it has the shape of the result."""
    conv, new, out = entries(entries(params)["conv"]), {}, x
    normed = len(conv) - 2
    for i in range(normed):
        depthwise = i == normed - 1
        out, new[str(i)] = with_buffers(
            conv_norm,
            conv[str(i)],
            out,
            train=train,
            stride=stride if depthwise else 1,
            groups=out.shape[1] if depthwise else 1,
            activation=F.relu6,
        )
    out = layers.conv(conv[str(normed)], out)
    norm = str(normed + 1)
    out, new[norm] = with_buffers(layers.batch_norm, conv[norm], out, train=train)
    if stride == 1 and out.shape[1] == x.shape[1]:
        out = add_fresh(out, x)
    return finish(out, {"conv": new}, train)

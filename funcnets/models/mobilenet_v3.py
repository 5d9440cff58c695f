"""MobileNetV3 (Howard et al. 2019): inverted residuals with squeeze-and-excitation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from tensordict import TensorDict
from torch import Tensor

from funcnets import layers, random
from funcnets.layers import (
    activation,
    conv_norm,
    dropout,
    init_conv_norm,
    init_inverted_residual,
    init_linear,
    initializers,
    inverted_residual,
    linear,
    with_buffers,
)
from funcnets.layers.activations import ACTIVATIONS
from funcnets.layers.params import entries
from funcnets.model import Model, bind
from funcnets.models import blocks, stages
from funcnets.models.stages import divisible
from funcnets.taps import Taps, TapsLike

NORM: dict[str, Any] = {"momentum": 0.01, "eps": 1e-3}


class Block(NamedTuple):
    """One inverted residual.

    ``inner`` is its width within, ``squeeze`` whether it squeezes and excites; a ``dilation`` above
    1 takes the place of the stride.
    """

    kernel_size: int
    inner: int
    width: int
    squeeze: bool
    activation: str
    stride: int
    dilation: int


LARGE = (
    Block(3, 16, 16, False, "relu", 1, 1),
    Block(3, 64, 24, False, "relu", 2, 1),
    Block(3, 72, 24, False, "relu", 1, 1),
    Block(5, 72, 40, True, "relu", 2, 1),
    Block(5, 120, 40, True, "relu", 1, 1),
    Block(5, 120, 40, True, "relu", 1, 1),
    Block(3, 240, 80, False, "hardswish", 2, 1),
    Block(3, 200, 80, False, "hardswish", 1, 1),
    Block(3, 184, 80, False, "hardswish", 1, 1),
    Block(3, 184, 80, False, "hardswish", 1, 1),
    Block(3, 480, 112, True, "hardswish", 1, 1),
    Block(3, 672, 112, True, "hardswish", 1, 1),
    Block(5, 672, 160, True, "hardswish", 2, 1),
    Block(5, 960, 160, True, "hardswish", 1, 1),
    Block(5, 960, 160, True, "hardswish", 1, 1),
)
SMALL = (
    Block(3, 16, 16, True, "relu", 2, 1),
    Block(3, 72, 24, False, "relu", 2, 1),
    Block(3, 88, 24, False, "relu", 1, 1),
    Block(5, 96, 40, True, "hardswish", 2, 1),
    Block(5, 240, 40, True, "hardswish", 1, 1),
    Block(5, 240, 40, True, "hardswish", 1, 1),
    Block(5, 120, 48, True, "hardswish", 1, 1),
    Block(5, 144, 48, True, "hardswish", 1, 1),
    Block(5, 288, 96, True, "hardswish", 2, 1),
    Block(5, 576, 96, True, "hardswish", 1, 1),
    Block(5, 576, 96, True, "hardswish", 1, 1),
)


@dataclass(frozen=True)
class Config:
    """What a network is made of.

    Attributes:
        blocks: the inverted residuals, `Block`s or rows (kernel_size, inner, width, squeeze,
            activation, stride, dilation); the activations' names are those that
            `funcnets.layers.activation` knows.
        width: channels of the first convolution.
        hidden: features of the hidden linear layer.
        dropout: the rate after that, in training.
    """

    blocks: tuple[Any, ...] = LARGE
    num_classes: int = 1000
    in_channels: int = 3
    width: int = 16
    hidden: int = 1280
    dropout: float = 0.2

    def __post_init__(self) -> None:
        rows = stages.as_rows("mobilenet_v3", "blocks", Block, self.blocks)
        object.__setattr__(self, "blocks", rows)
        blocks.check_sizes(
            "mobilenet_v3",
            num_classes=self.num_classes,
            in_channels=self.in_channels,
            width=self.width,
            hidden=self.hidden,
        )
        blocks.check_rate("mobilenet_v3", "dropout", self.dropout)
        for i, block in enumerate(rows):
            blocks.check_choice(
                "mobilenet_v3", f"blocks[{i}].activation", block.activation, tuple(ACTIVATIONS)
            )
            blocks.check_choice("mobilenet_v3", f"blocks[{i}].stride", block.stride, (1, 2))
            if block.kernel_size % 2 == 0:
                raise ValueError(
                    f"mobilenet_v3: blocks[{i}].kernel_size: expected an odd size, "
                    f"got {block.kernel_size}"
                )

    def last(self) -> int:
        """Channels of the last convolution."""
        return 6 * self.blocks[-1].width


def mobilenet_v3(
    blocks: tuple[Any, ...] | list[Any],
    num_classes: int = 1000,
    *,
    in_channels: int = 3,
    width: int = 16,
    hidden: int = 1280,
    dropout: float = 0.2,
) -> Model:
    """MobileNetV3, from images [batch, in_channels, height, width] to [batch, num_classes].

    As ``torchvision.models.mobilenetv3.MobileNetV3``. The arguments are those of `Config`. Taps are
    ``features.0``, ``features.1``, ..., ``features``, ``avgpool``, ``classifier.0``,
    ``classifier.1``.

    >>> import torch
    >>> rows = [(3, 16, 8, True, "relu", 2, 1), (5, 24, 8, False, "hardswish", 1, 1)]
    >>> model = mobilenet_v3(rows, 10, width=8, hidden=16)
    >>> model.apply(model.init(random.key(0)), torch.ones(5, 3, 8, 8)).shape
    torch.Size([5, 10])
    """
    config = Config(tuple(blocks), num_classes, in_channels, width, hidden, dropout)
    return bind("mobilenet_v3", config, init, forward, check)


def mobilenet_v3_large(
    num_classes: int = 1000,
    *,
    width_mult: float = 1.0,
    reduced_tail: bool = False,
    dilated: bool = False,
    **options: Any,
) -> Model:
    """`mobilenet_v3` as ``torchvision.models.mobilenet_v3_large``, 5.5 million parameters.

    Args:
        width_mult: what all widths are multiplied by, and rounded to multiples of 8.
        reduced_tail: whether the last blocks are half as wide.
        dilated: whether the last blocks dilate instead of halving the size.
    """
    rows = _scaled(LARGE, width_mult, reduced_tail, dilated)
    return mobilenet_v3(rows, num_classes, **(_ends(1280, width_mult, reduced_tail) | options))


def mobilenet_v3_small(
    num_classes: int = 1000,
    *,
    width_mult: float = 1.0,
    reduced_tail: bool = False,
    dilated: bool = False,
    **options: Any,
) -> Model:
    """`mobilenet_v3` as ``torchvision.models.mobilenet_v3_small``, 2.5 million parameters.

    The arguments are those of `mobilenet_v3_large`.
    """
    rows = _scaled(SMALL, width_mult, reduced_tail, dilated)
    return mobilenet_v3(rows, num_classes, **(_ends(1024, width_mult, reduced_tail) | options))


def init(key: random.Key, config: Config) -> TensorDict:
    """The parameters and buffers."""
    keys = iter(random.split(key, len(config.blocks) + 4).unbind())
    kaiming = initializers.kaiming_normal(mode="fan_out")
    channels = config.width
    features = [init_conv_norm(next(keys), config.in_channels, channels, weight_init=kaiming)]
    for block in config.blocks:
        features.append(
            init_inverted_residual(
                next(keys),
                channels,
                block.width,
                block.inner,
                block.kernel_size,
                squeeze=divisible(block.inner // 4) if block.squeeze else None,
            )
        )
        channels = block.width
    features.append(init_conv_norm(next(keys), channels, config.last(), 1, weight_init=kaiming))
    head = partial(
        init_linear,
        weight_init=initializers.normal(std=0.01),
        bias_init=initializers.zeros(),
    )
    return TensorDict(
        {
            "features": {str(i): part for i, part in enumerate(features)},
            "classifier": {
                "0": head(next(keys), config.last(), config.hidden),
                "3": head(next(keys), config.hidden, config.num_classes),
            },
        }
    )


def check(x: Tensor, config: Config) -> None:
    """Raises unless x is a batch of images of the channels and of a size that the model takes."""
    blocks.check_image("mobilenet_v3", x, config.in_channels)


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
    keys = blocks.draw_keys("mobilenet_v3", key, train and config.dropout > 0, 1)
    tap, new = Taps("mobilenet_v3", taps), {}
    features, classifier = entries(params["features"]), params["classifier"]
    normed = partial(conv_norm, activation=F.hardswish, **NORM)
    x, new["0"] = with_buffers(normed, features["0"], x, train=train, stride=2)
    x = tap("features.0", x)
    for place, block in enumerate(config.blocks, 1):
        x, new[str(place)] = with_buffers(
            inverted_residual,
            features[str(place)],
            x,
            train=train,
            stride=1 if block.dilation > 1 else block.stride,
            dilation=block.dilation,
            shortcut=block.stride == 1 and block.width == x.shape[1],
            activation=activation(block.activation),
            gate=F.hardsigmoid,
            **NORM,
        )
        x = tap(f"features.{place}", x)
    place = len(config.blocks) + 1
    x, new[str(place)] = with_buffers(normed, features[str(place)], x, train=train)
    x = tap("features", tap(f"features.{place}", x))
    x = tap("avgpool", layers.global_avg_pool(x))
    x = tap("classifier.0", linear(classifier["0"], x))
    x = tap("classifier.1", F.hardswish(x))
    if keys is not None:
        x = dropout(keys[0], x, config.dropout)
    return tap.finish(linear(classifier["3"], x), {"features": new}, train)


def _scaled(
    rows: tuple[Block, ...], width_mult: float, reduced_tail: bool, dilated: bool
) -> tuple[Block, ...]:
    stages.check_scale("mobilenet_v3", "width_mult", width_mult)
    tail, found = len(rows) - 3, []
    for i, row in enumerate(rows):
        # The first block of the tail takes what comes before it, and is as wide within as that.
        inner = row.inner // 2 if reduced_tail and i > tail else row.inner
        width = row.width // 2 if reduced_tail and i >= tail else row.width
        found.append(
            row._replace(
                inner=divisible(inner * width_mult),
                width=divisible(width * width_mult),
                dilation=2 if dilated and i >= tail else 1,
            )
        )
    return tuple(found)


def _ends(hidden: int, width_mult: float, reduced_tail: bool) -> dict[str, int]:
    hidden = hidden // 2 if reduced_tail else hidden
    return {"width": divisible(16 * width_mult), "hidden": divisible(hidden * width_mult)}

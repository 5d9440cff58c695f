"""ConvNeXt (Liu et al. 2022): a convolutional network in the manner of a vision transformer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from tensordict import TensorDict
from torch import Tensor

from funcnets import layers, random
from funcnets.layers import (
    conv,
    init_conv,
    init_layer_norm,
    init_linear,
    initializers,
    linear,
    stochastic_depth,
)
from funcnets.model import Model, bind
from funcnets.models import blocks
from funcnets.models.stages import check_scale
from funcnets.taps import Taps, TapsLike

INIT: dict[str, Any] = {
    "weight_init": initializers.truncated_normal(std=0.02),
    "bias_init": initializers.zeros(),
}

layer_norm = partial(layers.layer_norm, eps=1e-6)


@dataclass(frozen=True)
class Config:
    """What a network is made of.

    Attributes:
        depths: blocks in each stage; a layer between the stages halves the size.
        widths: channels of each stage.
        layer_scale: what the branches' outputs are multiplied by at the start, per channel.
        stochastic_depth: the rate of the last block, in training; it grows linearly from 0.
    """

    depths: tuple[int, ...] = (3, 3, 9, 3)
    widths: tuple[int, ...] = (96, 192, 384, 768)
    num_classes: int = 1000
    in_channels: int = 3
    layer_scale: float = 1e-6
    stochastic_depth: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", blocks.check_widths("convnext", self.widths))
        blocks.check_sizes(
            "convnext",
            num_classes=self.num_classes,
            in_channels=self.in_channels,
            **{f"depths[{i}]": depth for i, depth in enumerate(self.depths)},
        )
        blocks.check_rate("convnext", "stochastic_depth", self.stochastic_depth)
        check_scale("convnext", "layer_scale", self.layer_scale)
        if not self.depths or len(self.depths) != len(self.widths):
            raise ValueError(
                "convnext: depths, widths: expected one of each per stage, "
                f"got {self.depths} and {self.widths}"
            )


def convnext(
    depths: tuple[int, ...] | list[int],
    widths: tuple[int, ...] | list[int],
    num_classes: int = 1000,
    *,
    in_channels: int = 3,
    layer_scale: float = 1e-6,
    stochastic_depth: float = 0.0,
) -> Model:
    """A ConvNeXt, from images [batch, in_channels, height, width] to [batch, num_classes].

    As ``torchvision.models.convnext.ConvNeXt``; each side of the images has to be
    ``2 * 2 ** stages`` or more. The arguments are those of `Config`. Taps are ``features.0``,
    ``features.1.0``, ``features.1``, ``features.2`` (which halves the size), ..., ``features``,
    ``avgpool``.

    >>> import torch
    >>> model = convnext((1, 2), (8, 16), 10)
    >>> model.apply(model.init(random.key(0)), torch.ones(5, 3, 8, 8)).shape
    torch.Size([5, 10])
    """
    widths = blocks.check_widths("convnext", widths)
    config = Config(tuple(depths), widths, num_classes, in_channels, layer_scale, stochastic_depth)
    return bind("convnext", config, init, forward, check)


def convnext_tiny(num_classes: int = 1000, **options: Any) -> Model:
    """`convnext` as ``torchvision.models.convnext_tiny``, 28.6 million parameters."""
    return _convnext((3, 3, 9, 3), 96, num_classes, {"stochastic_depth": 0.1} | options)


def convnext_small(num_classes: int = 1000, **options: Any) -> Model:
    """`convnext` as ``torchvision.models.convnext_small``, 50.2 million parameters."""
    return _convnext((3, 3, 27, 3), 96, num_classes, {"stochastic_depth": 0.4} | options)


def convnext_base(num_classes: int = 1000, **options: Any) -> Model:
    """`convnext` as ``torchvision.models.convnext_base``, 88.6 million parameters."""
    return _convnext((3, 3, 27, 3), 128, num_classes, {"stochastic_depth": 0.5} | options)


def convnext_large(num_classes: int = 1000, **options: Any) -> Model:
    """`convnext` as ``torchvision.models.convnext_large``, 197.8 million parameters."""
    return _convnext((3, 3, 27, 3), 192, num_classes, {"stochastic_depth": 0.5} | options)


def _convnext(
    depths: tuple[int, ...], width: int, num_classes: int, options: dict[str, Any]
) -> Model:
    """With widths that double from stage to stage."""
    widths = tuple(width * 2**stage for stage in range(len(depths)))
    return convnext(depths, widths, num_classes, **options)


def init(key: random.Key, config: Config) -> TensorDict:
    """The parameters."""
    keys = iter(random.split(key, sum(config.depths) + len(config.depths) + 1).unbind())
    first = next(keys)
    features: list[Any] = [
        {
            "0": init_conv(first, config.in_channels, config.widths[0], 4, **INIT),
            "1": init_layer_norm(first, config.widths[0]),
        }
    ]
    for stage, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True)):
        if stage > 0:
            before = config.widths[stage - 1]
            between = next(keys)
            features.append(
                {
                    "0": init_layer_norm(between, before),
                    "1": init_conv(between, before, width, 2, **INIT),
                }
            )
        features.append(
            {str(i): init_block(next(keys), width, config.layer_scale) for i in range(depth)}
        )
    last = next(keys)
    return TensorDict(
        {
            "features": {str(i): part for i, part in enumerate(features)},
            "classifier": {
                "0": init_layer_norm(last, config.widths[-1]),
                "2": init_linear(last, config.widths[-1], config.num_classes, **INIT),
            },
        }
    )


def check(x: Tensor, config: Config) -> None:
    """Raises unless x is a batch of images of the channels and of a size that the model takes."""
    blocks.check_image("convnext", x, config.in_channels, 2 * 2 ** len(config.depths))


def forward(
    params: TensorDict,
    x: Float[Tensor, "batch in_channels height width"],
    config: Config,
    *,
    train: bool = False,
    key: random.Key | None = None,
    taps: TapsLike = (),
) -> Any:
    """Logits [batch, num_classes]; in training with buffers, of which there are none."""
    check(x, config)
    total = sum(config.depths)
    keys = blocks.draw_keys("convnext", key, train and config.stochastic_depth > 0, total)
    tap = Taps("convnext", taps)
    features, classifier = params["features"], params["classifier"]
    x = conv(features["0", "0"], x, stride=4)
    x = tap("features.0", channel_norm(features["0", "1"], x))
    n, place = 0, 1
    for stage, depth in enumerate(config.depths):
        if stage > 0:
            x = channel_norm(features[str(place), "0"], x)
            x = tap(f"features.{place}", conv(features[str(place), "1"], x, stride=2))
            place += 1
        for i in range(depth):
            rate = config.stochastic_depth * n / max(total - 1, 1)
            drop = keys[n] if keys is not None and rate > 0 else None
            x = block(features[str(place), str(i)], x, drop_rate=rate, key=drop)
            x = tap(f"features.{place}.{i}", x)
            n += 1
        x = tap(f"features.{place}", x)
        place += 1
    x = tap("avgpool", layers.global_avg_pool(tap("features", x)))
    x = layer_norm(classifier["0"], x)
    return tap.finish(linear(classifier["2"], x), {}, train)


def init_block(key: random.Key, width: int, layer_scale: float) -> TensorDict:
    """Parameters of `block`, named as in torchvision's ``CNBlock``."""
    depthwise, norm, up, down = random.split(key, 4).unbind()
    return TensorDict(
        {
            "block": {
                "0": init_conv(depthwise, width, width, 7, groups=width, **INIT),
                "2": init_layer_norm(norm, width),
                "3": init_linear(up, width, 4 * width, **INIT),
                "5": init_linear(down, 4 * width, width, **INIT),
            },
            "layer_scale": initializers.constant(layer_scale)(norm, (width, 1, 1)),
        }
    )


def block(
    params: TensorDict,
    x: Float[Tensor, "batch channels height width"],
    *,
    drop_rate: float = 0.0,
    key: random.Key | None = None,
) -> Float[Tensor, "batch channels height width"]:
    """A 7x7 depthwise convolution and an MLP over the channels, scaled and added to the input.

    With a key, each sample's branch is left out with probability ``drop_rate``.
    """
    parts = params["block"]
    out = conv(parts["0"], x, padding=3, groups=x.shape[1])
    out = rearrange(out, "batch channels height width -> batch height width channels")
    out = linear(parts["3"], layer_norm(parts["2"], out))
    out = linear(parts["5"], F.gelu(out))
    out = rearrange(out, "batch height width channels -> batch channels height width")
    out = params["layer_scale"] * out
    if key is not None:
        out = stochastic_depth(key, out, drop_rate, "row")
    return out + x


def channel_norm(
    params: TensorDict, x: Float[Tensor, "batch channels height width"]
) -> Float[Tensor, "batch channels height width"]:
    """The layer norm of the channels at each pixel."""
    x = rearrange(x, "batch channels height width -> batch height width channels")
    x = layer_norm(params, x)
    return rearrange(x, "batch height width channels -> batch channels height width")

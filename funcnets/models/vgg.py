"""VGG networks (Simonyan and Zisserman 2015), with and without batch norm."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from tensordict import TensorDict
from torch import Tensor

from funcnets import random
from funcnets.layers import (
    activate_and_pool,
    adaptive_avg_pool2d,
    batch_norm,
    conv,
    dropout,
    init_batch_norm,
    init_conv,
    init_linear,
    initializers,
    linear,
    max_pool2d,
    with_buffers,
)
from funcnets.layers.fresh import activate_fresh
from funcnets.model import Model, bind
from funcnets.models import blocks
from funcnets.taps import Taps, TapsLike

POOLED = 7


@dataclass(frozen=True)
class Config:
    """What a network is made of.

    Attributes:
        depths: 3x3 convolutions in each stage; every stage ends by halving the size.
        widths: channels of each stage.
        batch_norm: whether a batch norm follows each convolution.
        hidden: features of the two hidden linear layers.
        dropout: the rate after each of those, in training.
    """

    depths: tuple[int, ...] = (1, 1, 2, 2, 2)
    num_classes: int = 1000
    in_channels: int = 3
    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    batch_norm: bool = False
    hidden: int = 4096
    dropout: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", blocks.check_widths("vgg", self.widths))
        blocks.check_sizes(
            "vgg",
            num_classes=self.num_classes,
            in_channels=self.in_channels,
            hidden=self.hidden,
            **{f"depths[{i}]": depth for i, depth in enumerate(self.depths)},
        )
        blocks.check_rate("vgg", "dropout", self.dropout)
        if not self.depths or len(self.depths) != len(self.widths):
            raise ValueError(
                "vgg: depths, widths: expected one of each per stage, "
                f"got {self.depths} and {self.widths}"
            )


def vgg(
    depths: tuple[int, ...] | list[int],
    num_classes: int = 1000,
    *,
    in_channels: int = 3,
    widths: tuple[int, ...] | list[int] = (64, 128, 256, 512, 512),
    batch_norm: bool = False,
    hidden: int = 4096,
    dropout: float = 0.5,
) -> Model:
    """A VGG network, from [batch, in_channels, height, width] to logits [batch, num_classes].

    As ``torchvision.models.vgg``; each side of the images has to be 2 ** stages or more, and what
    is left of them is pooled to 7 x 7. The arguments are those of `Config`. Taps have the names of
    torchvision's modules: ``features.0``, ``features.1``, ..., ``features``, ``avgpool``,
    ``classifier.0``, ``classifier.1``, ``classifier.3``, ``classifier.4``.

    >>> import torch
    >>> model = vgg((1, 2), 10, widths=(4, 8), hidden=16)
    >>> model.apply(model.init(random.key(0)), torch.ones(5, 3, 8, 8)).shape
    torch.Size([5, 10])
    """
    widths = blocks.check_widths("vgg", widths)
    config = Config(tuple(depths), num_classes, in_channels, widths, batch_norm, hidden, dropout)
    return bind("vgg", config, init, forward, check)


def vgg11(num_classes: int = 1000, **options: Any) -> Model:
    """`vgg` as ``torchvision.models.vgg11``, 132.9 million parameters."""
    return vgg((1, 1, 2, 2, 2), num_classes, **options)


def vgg13(num_classes: int = 1000, **options: Any) -> Model:
    """`vgg` as ``torchvision.models.vgg13``, 133.0 million parameters."""
    return vgg((2, 2, 2, 2, 2), num_classes, **options)


def vgg16(num_classes: int = 1000, **options: Any) -> Model:
    """`vgg` as ``torchvision.models.vgg16``, 138.4 million parameters."""
    return vgg((2, 2, 3, 3, 3), num_classes, **options)


def vgg19(num_classes: int = 1000, **options: Any) -> Model:
    """`vgg` as ``torchvision.models.vgg19``, 143.7 million parameters."""
    return vgg((2, 2, 4, 4, 4), num_classes, **options)


def vgg11_bn(num_classes: int = 1000, **options: Any) -> Model:
    """`vgg11` with batch norm, as ``torchvision.models.vgg11_bn``."""
    return vgg11(num_classes, batch_norm=True, **options)


def vgg13_bn(num_classes: int = 1000, **options: Any) -> Model:
    """`vgg13` with batch norm, as ``torchvision.models.vgg13_bn``."""
    return vgg13(num_classes, batch_norm=True, **options)


def vgg16_bn(num_classes: int = 1000, **options: Any) -> Model:
    """`vgg16` with batch norm, as ``torchvision.models.vgg16_bn``."""
    return vgg16(num_classes, batch_norm=True, **options)


def vgg19_bn(num_classes: int = 1000, **options: Any) -> Model:
    """`vgg19` with batch norm, as ``torchvision.models.vgg19_bn``."""
    return vgg19(num_classes, batch_norm=True, **options)


def init(key: random.Key, config: Config) -> TensorDict:
    """The parameters (with buffers, if there are batch norms)."""
    keys = iter(random.split(key, sum(config.depths) + 3).unbind())
    kaiming = initializers.kaiming_normal(mode="fan_out", nonlinearity="relu")
    zeros, normal = initializers.zeros(), initializers.normal(std=0.01)
    channels, place, features = config.in_channels, 0, {}
    for depth, width in zip(config.depths, config.widths, strict=True):
        for _ in range(depth):
            features[str(place)] = init_conv(
                conv_key := next(keys), channels, width, 3, weight_init=kaiming, bias_init=zeros
            )
            place += 1
            if config.batch_norm:
                features[str(place)] = init_batch_norm(conv_key, width)
                place += 1
            place += 1  # the activation
            channels = width
        place += 1  # the pooling
    sizes = {
        "0": (channels * POOLED**2, config.hidden),
        "3": (config.hidden, config.hidden),
        "6": (config.hidden, config.num_classes),
    }
    classifier = {
        name: init_linear(next(keys), *size, weight_init=normal, bias_init=zeros)
        for name, size in sizes.items()
    }
    return TensorDict({"features": features, "classifier": classifier})


def check(x: Tensor, config: Config) -> None:
    """Raises unless x is a batch of images of the channels and of a size that the model takes."""
    blocks.check_image("vgg", x, config.in_channels, 2 ** len(config.depths))


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
    keys = blocks.draw_keys("vgg", key, train and config.dropout > 0, 2)
    tap, new = Taps("vgg", taps), {}
    # The input of each is a place of its own, which a tap may have kept.
    relu = F.relu if taps else partial(activate_fresh, F.relu)
    features, classifier = params["features"], params["classifier"]
    place = 0
    for depth in config.depths:
        for i in range(depth):
            x = tap(f"features.{place}", conv(features[str(place)], x, padding=1))
            place += 1
            if config.batch_norm:
                name = str(place)
                x, new[name] = with_buffers(batch_norm, features[name], x, train=train)
                x = tap(f"features.{place}", x)
                place += 1
            if i < depth - 1:
                x = tap(f"features.{place}", relu(x))
            else:
                seen = tap.at(f"features.{place}")
                x = activate_and_pool(F.relu, max_pool2d, x, 2, 2, tap=seen)
            place += 1
        x = tap(f"features.{place}", x)
        place += 1
    x = tap("avgpool", adaptive_avg_pool2d(tap("features", x), POOLED))
    x = rearrange(x, "batch channels height width -> batch (channels height width)")
    for i, place in enumerate((0, 3)):
        x = tap(f"classifier.{place}", linear(classifier[str(place)], x))
        x = tap(f"classifier.{place + 1}", relu(x))
        if keys is not None:
            x = dropout(keys[i], x, config.dropout)
    return tap.finish(linear(classifier["6"], x), {"features": new}, train)

"""AlexNet (Krizhevsky et al. 2012), in the one-column form of Krizhevsky 2014."""

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
    conv,
    dropout,
    init_conv,
    init_linear,
    linear,
    max_pool2d,
)
from funcnets.layers.fresh import activate_fresh
from funcnets.model import Model, bind
from funcnets.models import blocks
from funcnets.taps import Taps, TapsLike

# The convolutions: place among the features, kernel size, stride, padding, whether pooling follows.
CONVOLUTIONS = (
    (0, 11, 4, 2, True),
    (3, 5, 1, 2, True),
    (6, 3, 1, 1, False),
    (8, 3, 1, 1, False),
    (10, 3, 1, 1, True),
)
SMALLEST = 63  # of which the strides leave one pixel
POOLED = 6


@dataclass(frozen=True)
class Config:
    """What a network is made of.

    Attributes:
        widths: channels of the five convolutions.
        hidden: features of the two hidden linear layers.
        dropout: the rate before each of those, in training.
    """

    num_classes: int = 1000
    in_channels: int = 3
    widths: tuple[int, ...] = (64, 192, 384, 256, 256)
    hidden: int = 4096
    dropout: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", blocks.check_widths("alexnet", self.widths))
        blocks.check_sizes(
            "alexnet",
            num_classes=self.num_classes,
            in_channels=self.in_channels,
            hidden=self.hidden,
        )
        blocks.check_rate("alexnet", "dropout", self.dropout)
        if len(self.widths) != len(CONVOLUTIONS):
            raise ValueError(f"alexnet: widths: expected five, got {self.widths}")


def alexnet(
    num_classes: int = 1000,
    *,
    in_channels: int = 3,
    widths: tuple[int, ...] | list[int] = (64, 192, 384, 256, 256),
    hidden: int = 4096,
    dropout: float = 0.5,
) -> Model:
    """AlexNet, from images [batch, in_channels, height, width] to logits [batch, num_classes].

    As ``torchvision.models.alexnet``, 61.1 million parameters, for images of 63 x 63 or more; what
    is left of them is pooled to 6 x 6. The arguments are those of `Config`. Taps have the names of
    torchvision's modules: ``features.0`` to ``features.12``, ``features``, ``avgpool``,
    ``classifier.1``, ``classifier.2``, ``classifier.4``, ``classifier.5``.

    >>> import torch
    >>> model = alexnet(10, widths=(2, 4, 4, 4, 2), hidden=8)
    >>> model.apply(model.init(random.key(0)), torch.ones(5, 3, 64, 64)).shape
    torch.Size([5, 10])
    """
    widths = blocks.check_widths("alexnet", widths)
    config = Config(num_classes, in_channels, widths, hidden, dropout)
    return bind("alexnet", config, init, forward, check)


def init(key: random.Key, config: Config) -> TensorDict:
    """The parameters."""
    keys = iter(random.split(key, len(CONVOLUTIONS) + 3).unbind())
    channels, features = config.in_channels, {}
    for (place, kernel_size, *_), width in zip(CONVOLUTIONS, config.widths, strict=True):
        features[str(place)] = init_conv(next(keys), channels, width, kernel_size)
        channels = width
    flat = channels * POOLED**2
    classifier = {
        "1": init_linear(next(keys), flat, config.hidden),
        "4": init_linear(next(keys), config.hidden, config.hidden),
        "6": init_linear(next(keys), config.hidden, config.num_classes),
    }
    return TensorDict({"features": features, "classifier": classifier})


def check(x: Tensor, config: Config) -> None:
    """Raises unless x is a batch of images of the channels and of a size that the model takes."""
    blocks.check_image("alexnet", x, config.in_channels, SMALLEST)


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
    keys = blocks.draw_keys("alexnet", key, train and config.dropout > 0, 2)
    tap = Taps("alexnet", taps)
    # The input of each is a place of its own, which a tap may have kept.
    relu = F.relu if taps else partial(activate_fresh, F.relu)
    features, classifier = params["features"], params["classifier"]
    for place, _, stride, padding, pooled in CONVOLUTIONS:
        x = conv(features[str(place)], x, stride=stride, padding=padding)
        x = tap(f"features.{place}", x)
        if pooled:
            seen = tap.at(f"features.{place + 1}")
            x = activate_and_pool(F.relu, max_pool2d, x, 3, 2, tap=seen)
            x = tap(f"features.{place + 2}", x)
        else:
            x = tap(f"features.{place + 1}", relu(x))
    x = tap("avgpool", adaptive_avg_pool2d(tap("features", x), POOLED))
    x = rearrange(x, "batch channels height width -> batch (channels height width)")
    for i, place in enumerate((1, 4)):
        if keys is not None:
            x = dropout(keys[i], x, config.dropout)
        x = tap(f"classifier.{place}", linear(classifier[str(place)], x))
        x = tap(f"classifier.{place + 1}", relu(x))
    return tap.finish(linear(classifier["6"], x), {}, train)

"""Densely connected networks: DenseNet-BC (Huang et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from tensordict import TensorDict
from torch import Tensor

from funcnets import layers, random
from funcnets.control import remat
from funcnets.layers import avg_pool2d, conv, init_conv, init_linear, linear, max_pool2d
from funcnets.layers.fresh import activate_fresh
from funcnets.layers.params import entries
from funcnets.model import Model, bind
from funcnets.models import blocks
from funcnets.taps import Taps, TapsLike

_KAIMING = layers.initializers.kaiming_normal()


@dataclass(frozen=True)
class Config:
    """What a densely connected network is made of.

    Attributes:
        depths: layers in each block; a transition between two blocks halves the size.
        growth_rate: channels that each layer adds to those it reads.
        width: channels of the stem.
        bottleneck: channels between the two convolutions of a layer, in growth rates.
        compression: the share of its channels that a transition keeps.
        dropout: the rate at the end of each layer, in training.
        stem: "imagenet", a 7x7 convolution of stride 2 and a max pooling, or "small", a 3x3
            convolution, for images such as those of CIFAR.
        remat: whether the concatenated features and all that is computed of them before the second
            norm are computed again in the backward pass instead of kept (Pleiss et al. 2017).
    """

    depths: tuple[int, ...] = (6, 12, 24, 16)
    num_classes: int = 1000
    in_channels: int = 3
    growth_rate: int = 32
    width: int = 64
    bottleneck: int = 4
    compression: float = 0.5
    dropout: float = 0.0
    stem: Literal["imagenet", "small"] = "imagenet"
    remat: bool = False

    def __post_init__(self) -> None:
        blocks.check_choice("densenet", "stem", self.stem, ("imagenet", "small"))
        blocks.check_sizes(
            "densenet",
            num_classes=self.num_classes,
            in_channels=self.in_channels,
            growth_rate=self.growth_rate,
            width=self.width,
            bottleneck=self.bottleneck,
            **{f"depths[{i}]": depth for i, depth in enumerate(self.depths)},
        )
        blocks.check_rate("densenet", "dropout", self.dropout)
        blocks.check_rate("densenet", "compression", self.compression)
        if not self.depths:
            raise ValueError("densenet: depths: expected at least one block, got none")
        if any(not self.compressed(channels) for channels in self.channels()[:-1]):
            raise ValueError(
                "densenet: compression: expected a share that leaves a channel or more, "
                f"got {self.compression!r}"
            )

    def channels(self) -> list[int]:
        """Channels at the end of each block."""
        found, channels = [], self.width
        for depth in self.depths:
            found.append(channels + depth * self.growth_rate)
            channels = self.compressed(found[-1])
        return found

    def compressed(self, channels: int) -> int:
        """Channels that a transition leaves of so many."""
        return int(channels * self.compression)

    def smallest(self) -> int:
        """The least height and width of an image: at the end a pixel is left."""
        left = 2 ** (len(self.depths) - 1)
        return left if self.stem == "small" else 4 * left - 3


def densenet(
    depths: tuple[int, ...] | list[int],
    num_classes: int = 1000,
    *,
    in_channels: int = 3,
    growth_rate: int = 32,
    width: int = 64,
    bottleneck: int = 4,
    compression: float = 0.5,
    dropout: float = 0.0,
    stem: Literal["imagenet", "small"] = "imagenet",
    remat: bool = False,
) -> Model:
    """A densely connected network, from images to logits [batch, num_classes].

    Images are [batch, in_channels, height, width], for torchvision's networks of 29 x 29 or more.
    Parameters have the names of torchvision's. The arguments are those of `Config`. Taps are
    ``features.relu0``, ``features.pool0``, ``features.denseblock1.denselayer1`` (the channels that
    it adds), ``features.denseblock1``, ``features.transition1``, ..., ``features.norm5`` and
    ``avgpool``.

    >>> model = densenet((2, 2), 10, growth_rate=4, width=8, stem="small")
    >>> params = model.init(random.key(0))
    >>> taps = ["features.denseblock1", "features.transition1"]
    >>> logits, found = model.apply(params, torch.ones(2, 3, 8, 8), taps=taps)
    >>> [list(found[name].shape) for name in taps]
    [[2, 16, 8, 8], [2, 8, 4, 4]]
    """
    config = Config(
        tuple(depths),
        num_classes,
        in_channels,
        growth_rate,
        width,
        bottleneck,
        compression,
        dropout,
        stem,
        remat,
    )
    return bind("densenet", config, init, forward, check)


def densenet121(num_classes: int = 1000, **options: Any) -> Model:
    """`densenet` as ``torchvision.models.densenet121``, 8.0 million parameters."""
    return densenet((6, 12, 24, 16), num_classes, **options)


def densenet161(num_classes: int = 1000, **options: Any) -> Model:
    """`densenet` as ``torchvision.models.densenet161``, 28.7 million parameters."""
    options = {"growth_rate": 48, "width": 96, **options}
    return densenet((6, 12, 36, 24), num_classes, **options)


def densenet169(num_classes: int = 1000, **options: Any) -> Model:
    """`densenet` as ``torchvision.models.densenet169``, 14.1 million parameters."""
    return densenet((6, 12, 32, 32), num_classes, **options)


def densenet201(num_classes: int = 1000, **options: Any) -> Model:
    """`densenet` as ``torchvision.models.densenet201``, 20.0 million parameters."""
    return densenet((6, 12, 48, 32), num_classes, **options)


def init(key: random.Key, config: Config) -> TensorDict:
    """The parameters and buffers."""
    keys = iter(random.split(key, sum(config.depths) + len(config.depths) + 1).unbind())
    kernel_size = 7 if config.stem == "imagenet" else 3
    features = {
        "conv0": _init_conv(next(keys), config.in_channels, config.width, kernel_size),
        "norm0": layers.init_batch_norm(key, config.width),
    }
    channels, inner = config.width, config.bottleneck * config.growth_rate
    for block, depth in enumerate(config.depths, start=1):
        if block > 1:
            kept = config.compressed(channels)
            features[f"transition{block - 1}"] = TensorDict(
                {
                    "norm": layers.init_batch_norm(key, channels),
                    "conv": _init_conv(next(keys), channels, kept, 1),
                }
            )
            channels = kept
        found = {}
        for layer in range(1, depth + 1):
            first, second = random.split(next(keys))
            found[f"denselayer{layer}"] = {
                "norm1": layers.init_batch_norm(key, channels),
                "conv1": _init_conv(first, channels, inner, 1),
                "norm2": layers.init_batch_norm(key, inner),
                "conv2": _init_conv(second, inner, config.growth_rate, 3),
            }
            channels += config.growth_rate
        features[f"denseblock{block}"] = TensorDict(found)
    features["norm5"] = layers.init_batch_norm(key, channels)
    classifier = init_linear(
        next(keys), channels, config.num_classes, bias_init=layers.initializers.zeros()
    )
    return TensorDict({"features": features, "classifier": classifier})


def check(x: Tensor, config: Config) -> None:
    """Raises unless x is a batch of images of the channels and of a size that the model takes."""
    blocks.check_image("densenet", x, config.in_channels, config.smallest())


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
    needed = train and config.dropout > 0
    keys = iter(blocks.draw_keys("densenet", key, needed, sum(config.depths)) or ())
    tap, new = Taps("densenet", taps), {}
    features, small = params["features"], config.stem == "small"
    x = conv(features["conv0"], x, stride=1 if small else 2, padding=1 if small else 3)
    x, new["norm0"] = layers.with_buffers(layers.batch_norm, features["norm0"], x, train=train)
    if small:
        x = tap("features.relu0", activate_fresh(F.relu, x))
    else:
        seen = tap.at("features.relu0")
        x = layers.activate_and_pool(F.relu, max_pool2d, x, 3, 2, 1, tap=seen)
        x = tap("features.pool0", x)
    for block, depth in enumerate(config.depths, start=1):
        if block > 1:
            name = f"transition{block - 1}"
            x, norm = _norm_relu(features[name, "norm"], x, train)
            new[name] = {"norm": norm}
            x = tap(f"features.{name}", avg_pool2d(conv(features[name, "conv"], x), 2, 2))
        name = f"denseblock{block}"
        held, parts = entries(features[name]), [x]
        found: dict[str, Any] = {}
        new[name] = found
        for layer in (f"denselayer{i + 1}" for i in range(depth)):
            added, found[layer] = _dense_layer(held[layer], parts, train, config.remat)
            if config.dropout > 0 and train:
                added = layers.dropout(next(keys), added, config.dropout)
            parts.append(tap(f"features.{name}.{layer}", added))
        x = tap(f"features.{name}", torch.cat(parts, 1))
    x, new["norm5"] = layers.with_buffers(layers.batch_norm, features["norm5"], x, train=train)
    x = tap("features.norm5", x)
    x = tap("avgpool", layers.global_avg_pool(F.relu(x)))
    return tap.finish(linear(params["classifier"], x), {"features": new}, train)


def _dense_layer(
    params: TensorDict, parts: list[Tensor], train: bool, again: bool
) -> tuple[Tensor, dict[str, Any]]:
    """The channels that a layer adds to those it reads, given as a list, and its new buffers."""
    found = entries(params)
    bottleneck = remat(_bottleneck) if again else _bottleneck
    x, norm1 = bottleneck(found["norm1"], found["conv1"], parts, train)
    x, norm2 = _norm_relu(found["norm2"], x, train)
    return conv(found["conv2"], x, padding=1), {"norm1": norm1, "norm2": norm2}


def _bottleneck(
    norm: TensorDict, kernel: TensorDict, parts: list[Tensor], train: bool
) -> tuple[Tensor, TensorDict | None]:
    # With remat all between the parts and the result is forgotten: what grows as depth squared.
    x, buffers = _norm_relu(norm, torch.cat(parts, 1), train)
    return conv(kernel, x), buffers


def _norm_relu(params: TensorDict, x: Tensor, train: bool) -> tuple[Tensor, TensorDict | None]:
    x, buffers = layers.with_buffers(layers.batch_norm, params, x, train=train)
    return activate_fresh(F.relu, x), buffers


def _init_conv(key: random.Key, channels: int, width: int, kernel_size: int) -> TensorDict:
    return init_conv(key, channels, width, kernel_size, bias=False, weight_init=_KAIMING)

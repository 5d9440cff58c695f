"""Residual networks: ResNet (He et al. 2016), ResNeXt (Xie et al. 2017), Wide ResNet (2016)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from jaxtyping import Float
from tensordict import TensorDict
from torch import Tensor

from funcnets import layers, random
from funcnets.layers import (
    activate_and_pool,
    conv,
    init_bottleneck_block,
    init_conv,
    init_linear,
    init_residual_block,
    linear,
    max_pool2d,
    residual_block,
    with_buffers,
)
from funcnets.layers.fresh import activate_fresh
from funcnets.model import Model, bind
from funcnets.models import blocks
from funcnets.taps import Taps, TapsLike


@dataclass(frozen=True)
class Config:
    """What a residual network is made of.

    Attributes:
        block: "basic" (two 3x3 convolutions) or "bottleneck" (1x1, 3x3, 1x1, four times as wide).
        depths: blocks in each stage; every stage after the first halves the size.
        width: channels of the first stage, before the bottleneck's factor; doubled at each stage.
        groups: of the bottleneck's 3x3 convolution.
        width_per_group: sets the width of the bottleneck's 3x3 convolution.
        stem: "imagenet", a 7x7 convolution of stride 2 and a max pooling, or "small", a 3x3
            convolution, for images such as those of CIFAR.
        zero_init_residual: whether each block begins as the identity.
        squeeze_excitation: whether each block ends with a gate per channel, of reduction 16.
        stochastic_depth: the rate of the last block, in training; it grows linearly from 0.
    """

    block: Literal["basic", "bottleneck"] = "basic"
    depths: tuple[int, ...] = (2, 2, 2, 2)
    num_classes: int = 1000
    in_channels: int = 3
    width: int = 64
    groups: int = 1
    width_per_group: int = 64
    stem: Literal["imagenet", "small"] = "imagenet"
    zero_init_residual: bool = False
    squeeze_excitation: bool = False
    stochastic_depth: float = 0.0

    def __post_init__(self) -> None:
        blocks.check_choice("resnet", "block", self.block, ("basic", "bottleneck"))
        blocks.check_choice("resnet", "stem", self.stem, ("imagenet", "small"))
        blocks.check_sizes(
            "resnet",
            num_classes=self.num_classes,
            in_channels=self.in_channels,
            width=self.width,
            groups=self.groups,
            width_per_group=self.width_per_group,
            **{f"depths[{i}]": depth for i, depth in enumerate(self.depths)},
        )
        blocks.check_rate("resnet", "stochastic_depth", self.stochastic_depth)
        if not self.depths:
            raise ValueError("resnet: depths: expected at least one stage, got none")
        if self.block == "basic" and (self.groups, self.width_per_group) != (1, 64):
            raise ValueError(
                "resnet: groups, width_per_group: expected 1 and 64 for basic blocks, "
                f"got {self.groups} and {self.width_per_group}"
            )
        if self.block == "bottleneck" and self.inner(0) < 1:
            raise ValueError(
                "resnet: width_per_group: expected 64 / width or more, "
                f"got {self.width_per_group} with width={self.width}"
            )

    def outer(self, stage: int) -> int:
        """Channels between the blocks of a stage."""
        return self.width * 2**stage * (4 if self.block == "bottleneck" else 1)

    def inner(self, stage: int) -> int:
        """Channels of the bottleneck's 3x3 convolution."""
        return self.width * 2**stage * self.width_per_group // 64 * self.groups


def resnet(
    block: Literal["basic", "bottleneck"],
    depths: tuple[int, ...] | list[int],
    num_classes: int = 1000,
    *,
    in_channels: int = 3,
    width: int = 64,
    groups: int = 1,
    width_per_group: int = 64,
    stem: Literal["imagenet", "small"] = "imagenet",
    zero_init_residual: bool = False,
    squeeze_excitation: bool = False,
    stochastic_depth: float = 0.0,
) -> Model:
    """A residual network, from images [batch, in_channels, height, width] to [batch, num_classes].

    Parameters have the names of torchvision's, and ``se`` where blocks squeeze and excite. The
    arguments are those of `Config`. Taps are ``relu``, ``maxpool``, ``layer1.0``, ``layer1``, ...,
    ``avgpool``.

    >>> import torch
    >>> model = resnet("basic", (1, 1), 10, width=8, stem="small")
    >>> params = model.init(random.key(0))
    >>> logits, found = model.apply(params, torch.ones(2, 3, 8, 8), taps=["layer2"])
    >>> logits.shape, found["layer2"].shape
    (torch.Size([2, 10]), torch.Size([2, 16, 4, 4]))
    """
    config = Config(
        block,
        tuple(depths),
        num_classes,
        in_channels,
        width,
        groups,
        width_per_group,
        stem,
        zero_init_residual,
        squeeze_excitation,
        stochastic_depth,
    )
    return bind("resnet", config, init, forward, check)


def resnet18(num_classes: int = 1000, **options: Any) -> Model:
    """`resnet` as ``torchvision.models.resnet18``, 11.7 million parameters."""
    return resnet("basic", (2, 2, 2, 2), num_classes, **options)


def resnet34(num_classes: int = 1000, **options: Any) -> Model:
    """`resnet` as ``torchvision.models.resnet34``, 21.8 million parameters."""
    return resnet("basic", (3, 4, 6, 3), num_classes, **options)


def resnet50(num_classes: int = 1000, **options: Any) -> Model:
    """`resnet` as ``torchvision.models.resnet50``, 25.6 million parameters."""
    return resnet("bottleneck", (3, 4, 6, 3), num_classes, **options)


def resnet101(num_classes: int = 1000, **options: Any) -> Model:
    """`resnet` as ``torchvision.models.resnet101``, 44.5 million parameters."""
    return resnet("bottleneck", (3, 4, 23, 3), num_classes, **options)


def resnet152(num_classes: int = 1000, **options: Any) -> Model:
    """`resnet` as ``torchvision.models.resnet152``, 60.2 million parameters."""
    return resnet("bottleneck", (3, 8, 36, 3), num_classes, **options)


def resnext50_32x4d(num_classes: int = 1000, **options: Any) -> Model:
    """`resnet` as ``torchvision.models.resnext50_32x4d``, 25.0 million parameters."""
    return resnet50(num_classes, **{"groups": 32, "width_per_group": 4, **options})


def resnext101_32x8d(num_classes: int = 1000, **options: Any) -> Model:
    """`resnet` as ``torchvision.models.resnext101_32x8d``, 88.8 million parameters."""
    return resnet101(num_classes, **{"groups": 32, "width_per_group": 8, **options})


def resnext101_64x4d(num_classes: int = 1000, **options: Any) -> Model:
    """`resnet` as ``torchvision.models.resnext101_64x4d``, 83.5 million parameters."""
    return resnet101(num_classes, **{"groups": 64, "width_per_group": 4, **options})


def wide_resnet50_2(num_classes: int = 1000, **options: Any) -> Model:
    """`resnet` as ``torchvision.models.wide_resnet50_2``, 68.9 million parameters."""
    return resnet50(num_classes, **{"width_per_group": 128, **options})


def wide_resnet101_2(num_classes: int = 1000, **options: Any) -> Model:
    """`resnet` as ``torchvision.models.wide_resnet101_2``, 126.9 million parameters."""
    return resnet101(num_classes, **{"width_per_group": 128, **options})


def init(key: random.Key, config: Config) -> TensorDict:
    """The parameters and buffers."""
    stem_key, head_key, blocks_key = random.split(key, 3)
    keys = iter(random.split(blocks_key, sum(config.depths)).unbind())
    kaiming = layers.initializers.kaiming_normal(mode="fan_out", nonlinearity="relu")
    params = {
        "conv1": init_conv(
            stem_key,
            config.in_channels,
            config.width,
            7 if config.stem == "imagenet" else 3,
            bias=False,
            weight_init=kaiming,
        ),
        "bn1": layers.init_batch_norm(stem_key, config.width),
    }
    channels = config.width
    for stage, depth in enumerate(config.depths):
        width = config.outer(stage)
        found = {}
        for i in range(depth):
            options: dict[str, Any] = {
                "downsample": i == 0 and (stage > 0 or channels != width),
                "squeeze": max(1, width // 16) if config.squeeze_excitation else None,
                "zero_init": config.zero_init_residual,
            }
            if config.block == "basic":
                block = init_residual_block(next(keys), channels, width, **options)
            else:
                inner, groups = config.inner(stage), config.groups
                block = init_bottleneck_block(
                    next(keys), channels, width, inner, groups=groups, **options
                )
            found[str(i)] = block
            channels = width
        params[f"layer{stage + 1}"] = TensorDict(found)
    params["fc"] = init_linear(head_key, channels, config.num_classes)
    return TensorDict(params)


def check(x: Tensor, config: Config) -> None:
    """Raises unless x is a batch of images of the channels and of a size that the model takes."""
    blocks.check_image("resnet", x, config.in_channels)


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
    depth = sum(config.depths)
    keys = blocks.draw_keys("resnet", key, train and config.stochastic_depth > 0, depth)
    tap, new = Taps("resnet", taps), {}
    small = config.stem == "small"
    x = conv(params["conv1"], x, stride=1 if small else 2, padding=1 if small else 3)
    x, new["bn1"] = with_buffers(layers.batch_norm, params["bn1"], x, train=train)
    if small:
        x = tap("relu", activate_fresh(F.relu, x))
    else:
        x = activate_and_pool(F.relu, max_pool2d, x, 3, 2, 1, tap=tap.at("relu"))
        x = tap("maxpool", x)
    block = 0
    for stage in range(len(config.depths)):
        name = f"layer{stage + 1}"
        found = new[name] = {}
        for i in range(config.depths[stage]):
            x, found[str(i)] = with_buffers(
                residual_block,
                params[name, str(i)],
                x,
                train=train,
                stride=2 if stage > 0 and i == 0 else 1,
                drop_rate=config.stochastic_depth * (block + 1) / depth,
                key=None if keys is None else keys[block],
            )
            x = tap(f"{name}.{i}", x)
            block += 1
        x = tap(name, x)
    x = tap("avgpool", layers.global_avg_pool(x))
    return tap.finish(linear(params["fc"], x), new, train)

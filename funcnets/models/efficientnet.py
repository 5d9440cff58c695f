"""EfficientNet (Tan and Le 2019) and EfficientNetV2 (Tan and Le 2021)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from tensordict import TensorDict
from torch import Tensor

from funcnets import layers, random
from funcnets.layers import (
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
from funcnets.layers.params import entries
from funcnets.model import Model, bind
from funcnets.models import blocks
from funcnets.models import stages as tables
from funcnets.models.stages import divisible
from funcnets.taps import Taps, TapsLike


class Stage(NamedTuple):
    """Blocks of one width; the first of them has the stride.

    ``block`` is "mbconv" (depthwise, with squeeze-and-excitation) or "fused" (one full convolution,
    without); ``expansion`` is the width within, relative to that of the block's input.
    """

    block: str
    expansion: float
    kernel_size: int
    stride: int
    width: int
    depth: int


B0 = (
    Stage("mbconv", 1, 3, 1, 16, 1),
    Stage("mbconv", 6, 3, 2, 24, 2),
    Stage("mbconv", 6, 5, 2, 40, 2),
    Stage("mbconv", 6, 3, 2, 80, 3),
    Stage("mbconv", 6, 5, 1, 112, 3),
    Stage("mbconv", 6, 5, 2, 192, 4),
    Stage("mbconv", 6, 3, 1, 320, 1),
)
V2_S = (
    Stage("fused", 1, 3, 1, 24, 2),
    Stage("fused", 4, 3, 2, 48, 4),
    Stage("fused", 4, 3, 2, 64, 4),
    Stage("mbconv", 4, 3, 2, 128, 6),
    Stage("mbconv", 6, 3, 1, 160, 9),
    Stage("mbconv", 6, 3, 2, 256, 15),
)
V2_M = (
    Stage("fused", 1, 3, 1, 24, 3),
    Stage("fused", 4, 3, 2, 48, 5),
    Stage("fused", 4, 3, 2, 80, 5),
    Stage("mbconv", 4, 3, 2, 160, 7),
    Stage("mbconv", 6, 3, 1, 176, 14),
    Stage("mbconv", 6, 3, 2, 304, 18),
    Stage("mbconv", 6, 3, 1, 512, 5),
)
V2_L = (
    Stage("fused", 1, 3, 1, 32, 4),
    Stage("fused", 4, 3, 2, 64, 7),
    Stage("fused", 4, 3, 2, 96, 7),
    Stage("mbconv", 4, 3, 2, 192, 10),
    Stage("mbconv", 6, 3, 1, 224, 19),
    Stage("mbconv", 6, 3, 2, 384, 25),
    Stage("mbconv", 6, 3, 1, 640, 7),
)


@dataclass(frozen=True)
class Config:
    """What a network is made of.

    Attributes:
        stages: the blocks, `Stage`s or rows (block, expansion, kernel_size, stride, width, depth).
        width: channels of the first convolution.
        last_width: channels of the last convolution; None for four times those of its input.
        dropout: the rate before the linear layer, in training.
        stochastic_depth: the rate that the blocks, from 0 on, grow towards linearly, in training.
        momentum: of the batch norms, as ``eps``.
    """

    stages: tuple[Any, ...] = B0
    num_classes: int = 1000
    in_channels: int = 3
    width: int = 32
    last_width: int | None = None
    dropout: float = 0.2
    stochastic_depth: float = 0.2
    momentum: float = 0.1
    eps: float = 1e-5

    def __post_init__(self) -> None:
        rows = tables.as_rows("efficientnet", "stages", Stage, self.stages)
        object.__setattr__(self, "stages", rows)
        blocks.check_sizes(
            "efficientnet",
            num_classes=self.num_classes,
            in_channels=self.in_channels,
            width=self.width,
            last_width=self.last(),
        )
        blocks.check_rate("efficientnet", "dropout", self.dropout)
        blocks.check_rate("efficientnet", "stochastic_depth", self.stochastic_depth)
        blocks.check_rate("efficientnet", "momentum", self.momentum)
        tables.check_scale("efficientnet", "eps", self.eps)
        for i, stage in enumerate(rows):
            name = f"stages[{i}]"
            blocks.check_choice("efficientnet", f"{name}.block", stage.block, ("mbconv", "fused"))
            tables.check_scale("efficientnet", f"{name}.expansion", stage.expansion)
            if stage.kernel_size % 2 == 0:
                raise ValueError(
                    f"efficientnet: {name}.kernel_size: expected an odd size, "
                    f"got {stage.kernel_size}"
                )

    def last(self) -> int:
        """Channels of the last convolution."""
        return 4 * self.stages[-1].width if self.last_width is None else self.last_width

    def depth(self) -> int:
        """How many blocks there are."""
        return sum(stage.depth for stage in self.stages)

    def blocks(self, stage: int) -> Iterator[tuple[int, int]]:
        """The input channels and the stride of each block of a stage."""
        inputs = self.stages[stage - 1].width if stage else self.width
        _, _, _, stride, width, depth = self.stages[stage]
        yield inputs, stride
        yield from ((width, 1) for _ in range(depth - 1))


def efficientnet(
    stages: tuple[Any, ...] | list[Any],
    num_classes: int = 1000,
    *,
    in_channels: int = 3,
    width: int = 32,
    last_width: int | None = None,
    dropout: float = 0.2,
    stochastic_depth: float = 0.2,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Model:
    """An EfficientNet, from images [batch, in_channels, height, width] to [batch, num_classes].

    As ``torchvision.models.efficientnet.EfficientNet``. The arguments are those of `Config`. Taps
    are ``features.0``, ``features.1.0``, ``features.1``, ..., ``features``, ``avgpool``.

    >>> import torch
    >>> rows = [("fused", 1, 3, 1, 8, 1), ("mbconv", 4, 5, 2, 16, 2)]
    >>> model = efficientnet(rows, 10, width=8)
    >>> model.apply(model.init(random.key(0)), torch.ones(5, 3, 8, 8)).shape
    torch.Size([5, 10])
    """
    config = Config(
        tuple(stages),
        num_classes,
        in_channels,
        width,
        last_width,
        dropout,
        stochastic_depth,
        momentum,
        eps,
    )
    return bind("efficientnet", config, init, forward, check)


def efficientnet_b0(num_classes: int = 1000, **options: Any) -> Model:
    """`efficientnet` as ``torchvision.models.efficientnet_b0``, 5.3 million parameters."""
    return _scaled(1.0, 1.0, num_classes, options)


def efficientnet_b1(num_classes: int = 1000, **options: Any) -> Model:
    """`efficientnet` as ``torchvision.models.efficientnet_b1``, 7.8 million parameters."""
    return _scaled(1.0, 1.1, num_classes, options)


def efficientnet_b2(num_classes: int = 1000, **options: Any) -> Model:
    """`efficientnet` as ``torchvision.models.efficientnet_b2``, 9.1 million parameters."""
    return _scaled(1.1, 1.2, num_classes, {"dropout": 0.3} | options)


def efficientnet_b3(num_classes: int = 1000, **options: Any) -> Model:
    """`efficientnet` as ``torchvision.models.efficientnet_b3``, 12.2 million parameters."""
    return _scaled(1.2, 1.4, num_classes, {"dropout": 0.3} | options)


def efficientnet_b4(num_classes: int = 1000, **options: Any) -> Model:
    """`efficientnet` as ``torchvision.models.efficientnet_b4``, 19.3 million parameters."""
    return _scaled(1.4, 1.8, num_classes, {"dropout": 0.4} | options)


def efficientnet_b5(num_classes: int = 1000, **options: Any) -> Model:
    """`efficientnet` as ``torchvision.models.efficientnet_b5``, 30.4 million parameters."""
    return _scaled(1.6, 2.2, num_classes, {"dropout": 0.4, **_TF_NORM} | options)


def efficientnet_b6(num_classes: int = 1000, **options: Any) -> Model:
    """`efficientnet` as ``torchvision.models.efficientnet_b6``, 43.0 million parameters."""
    return _scaled(1.8, 2.6, num_classes, {"dropout": 0.5, **_TF_NORM} | options)


def efficientnet_b7(num_classes: int = 1000, **options: Any) -> Model:
    """`efficientnet` as ``torchvision.models.efficientnet_b7``, 66.3 million parameters."""
    return _scaled(2.0, 3.1, num_classes, {"dropout": 0.5, **_TF_NORM} | options)


def efficientnet_v2_s(num_classes: int = 1000, **options: Any) -> Model:
    """`efficientnet` as ``torchvision.models.efficientnet_v2_s``, 21.5 million parameters."""
    return efficientnet(V2_S, num_classes, **({"width": 24, "dropout": 0.2, **_V2} | options))


def efficientnet_v2_m(num_classes: int = 1000, **options: Any) -> Model:
    """`efficientnet` as ``torchvision.models.efficientnet_v2_m``, 54.1 million parameters."""
    return efficientnet(V2_M, num_classes, **({"width": 24, "dropout": 0.3, **_V2} | options))


def efficientnet_v2_l(num_classes: int = 1000, **options: Any) -> Model:
    """`efficientnet` as ``torchvision.models.efficientnet_v2_l``, 118.5 million parameters."""
    return efficientnet(V2_L, num_classes, **({"width": 32, "dropout": 0.4, **_V2} | options))


_TF_NORM = {"momentum": 0.01, "eps": 1e-3}
_V2 = {"last_width": 1280, "eps": 1e-3}


def _scaled(
    width_mult: float, depth_mult: float, num_classes: int, options: dict[str, Any]
) -> Model:
    """The baseline with widths and depths multiplied."""
    rows = tuple(
        row._replace(
            width=divisible(row.width * width_mult), depth=math.ceil(row.depth * depth_mult)
        )
        for row in B0
    )
    return efficientnet(rows, num_classes, **({"width": divisible(32 * width_mult)} | options))


def init(key: random.Key, config: Config) -> TensorDict:
    """The parameters and buffers."""
    keys = iter(random.split(key, config.depth() + 3).unbind())
    kaiming = initializers.kaiming_normal(mode="fan_out")
    features: list[Any] = [
        init_conv_norm(next(keys), config.in_channels, config.width, weight_init=kaiming)
    ]
    for i, stage in enumerate(config.stages):
        found = {}
        for j, (inputs, _) in enumerate(config.blocks(i)):
            found[str(j)] = init_inverted_residual(
                next(keys),
                inputs,
                stage.width,
                divisible(inputs * stage.expansion),
                stage.kernel_size,
                squeeze=max(1, inputs // 4) if stage.block == "mbconv" else None,
                fused=stage.block == "fused",
            )
        features.append(found)
    last = config.stages[-1].width
    features.append(init_conv_norm(next(keys), last, config.last(), 1, weight_init=kaiming))
    within = 1 / math.sqrt(config.num_classes)
    head = init_linear(
        next(keys),
        config.last(),
        config.num_classes,
        weight_init=initializers.uniform(-within, within),
        bias_init=initializers.zeros(),
    )
    named = {str(i): part for i, part in enumerate(features)}
    return TensorDict({"features": named, "classifier": {"1": head}})


def check(x: Tensor, config: Config) -> None:
    """Raises unless x is a batch of images of the channels and of a size that the model takes."""
    blocks.check_image("efficientnet", x, config.in_channels)


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
    depth = config.depth()
    draws = train and (config.dropout > 0 or config.stochastic_depth > 0)
    keys = blocks.draw_keys("efficientnet", key, draws, depth + 1)
    tap, new = Taps("efficientnet", taps), {}
    features = entries(params["features"])
    options: dict[str, Any] = {
        "activation": F.silu,
        "momentum": config.momentum,
        "eps": config.eps,
    }
    normed = partial(conv_norm, **options)
    x, new["0"] = with_buffers(normed, features["0"], x, train=train, stride=2)
    x = tap("features.0", x)
    block = 0
    for i in range(len(config.stages)):
        name = str(i + 1)
        stage, found = entries(features[name]), {}
        for j, (_, stride) in enumerate(config.blocks(i)):
            rate = config.stochastic_depth * block / depth
            x, found[str(j)] = with_buffers(
                inverted_residual,
                stage[str(j)],
                x,
                train=train,
                stride=stride,
                squeeze_activation=F.silu,
                drop_rate=rate,
                key=keys[block] if keys is not None and rate > 0 else None,
                **options,
            )
            x = tap(f"features.{name}.{j}", x)
            block += 1
        new[name] = found
        x = tap(f"features.{name}", x)
    name = str(len(config.stages) + 1)
    x, new[name] = with_buffers(normed, features[name], x, train=train)
    x = tap("features", tap(f"features.{name}", x))
    x = tap("avgpool", layers.global_avg_pool(x))
    if keys is not None and config.dropout > 0:
        x = dropout(keys[depth], x, config.dropout)
    return tap.finish(linear(params["classifier", "1"], x), {"features": new}, train)

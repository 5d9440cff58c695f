"""LeNet-5 (LeCun et al. 1998), in its modern form: ReLU, max pooling, a linear last layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from einops import rearrange
from jaxtyping import Float
from tensordict import TensorDict
from torch import Tensor

from funcnets import layers, random
from funcnets.layers import activate_and_pool, activation, conv, init_conv, init_linear, linear
from funcnets.model import Model, bind
from funcnets.models import blocks
from funcnets.taps import Taps, TapsLike

POOLS: dict[str, Callable[..., Tensor]] = {"max": layers.max_pool2d, "avg": layers.avg_pool2d}


@dataclass(frozen=True)
class Config:
    """What a network is made of.

    Attributes:
        size: of the images, which are square.
        widths: channels of the convolutions, each followed by a pooling by two.
        hidden: features of the hidden linear layers.
        padding: of the first convolution; the others have none.
        activation: a name that `funcnets.layers.activation` knows.
    """

    num_classes: int = 10
    in_channels: int = 1
    size: int = 28
    widths: tuple[int, ...] = (6, 16)
    hidden: tuple[int, ...] = (120, 84)
    kernel_size: int = 5
    padding: int = 2
    activation: str = "relu"
    pool: Literal["max", "avg"] = "max"

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", blocks.check_widths("lenet", self.widths))
        blocks.check_sizes(
            "lenet",
            num_classes=self.num_classes,
            in_channels=self.in_channels,
            size=self.size,
            kernel_size=self.kernel_size,
            **{f"hidden[{i}]": features for i, features in enumerate(self.hidden)},
        )
        blocks.check_choice("lenet", "pool", self.pool, tuple(POOLS))
        activation(self.activation)
        if not isinstance(self.padding, int) or self.padding < 0:
            raise ValueError(f"lenet: padding: expected 0 or more, got {self.padding!r}")
        if not self.widths:
            raise ValueError("lenet: widths: expected at least one convolution, got none")
        if self.left() < 1:
            raise ValueError(
                f"lenet: size: expected images of which {len(self.widths)} convolutions and "
                f"poolings leave something, got {self.size}"
            )

    def left(self) -> int:
        """The size of what the convolutions and poolings leave of the images."""
        size = self.size + 2 * self.padding
        for _ in self.widths:
            size = (size - self.kernel_size + 1) // 2
        return size


def lenet(
    num_classes: int = 10,
    in_channels: int = 1,
    size: int = 28,
    *,
    widths: tuple[int, ...] | list[int] = (6, 16),
    hidden: tuple[int, ...] | list[int] = (120, 84),
    kernel_size: int = 5,
    padding: int = 2,
    activation: str = "relu",
    pool: Literal["max", "avg"] = "max",
) -> Model:
    """LeNet-5, from images [batch, in_channels, size, size] to logits [batch, num_classes].

    Convolution, activation and pooling, twice; then linear layers. With ``size=32, padding=0,
    activation="tanh", pool="avg"`` it is close to the original. The arguments are those of
    `Config`. Parameters and taps are named as a sequence ``features`` (0 convolution, 1 activation,
    2 pooling, 3 convolution, ...) and a sequence ``classifier`` (0 linear, 1 activation, ...);
    ``features`` alone is a tap too.

    >>> import torch
    >>> model = lenet()
    >>> model.apply(model.init(random.key(0)), torch.ones(5, 1, 28, 28)).shape
    torch.Size([5, 10])
    """
    config = Config(
        num_classes,
        in_channels,
        size,
        blocks.check_widths("lenet", widths),
        tuple(hidden),
        kernel_size,
        padding,
        activation,
        pool,
    )
    return bind("lenet", config, init, forward, check)


def init(key: random.Key, config: Config) -> TensorDict:
    """The parameters."""
    keys = iter(random.split(key, len(config.widths) + len(config.hidden) + 1).unbind())
    channels, features = config.in_channels, {}
    for i, width in enumerate(config.widths):
        features[str(3 * i)] = init_conv(next(keys), channels, width, config.kernel_size)
        channels = width
    inputs, classifier = channels * config.left() ** 2, {}
    for i, outputs in enumerate((*config.hidden, config.num_classes)):
        classifier[str(2 * i)] = init_linear(next(keys), inputs, outputs)
        inputs = outputs
    return TensorDict({"features": features, "classifier": classifier})


def check(x: Tensor, config: Config) -> None:
    """Raises unless x is a batch of images of the size that the model is made for."""
    size = config.size
    if x.ndim != 4 or tuple(x.shape[1:]) != (config.in_channels, size, size):
        expected = f"[batch, {config.in_channels}, {size}, {size}]"
        raise ValueError(f"lenet: x: expected {expected}, got {list(x.shape)}")


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
    tap, nonlinear = Taps("lenet", taps), activation(config.activation)
    features, classifier = params["features"], params["classifier"]
    for i in range(len(config.widths)):
        place = 3 * i
        x = conv(features[str(place)], x, padding=config.padding if i == 0 else 0)
        x = tap(f"features.{place}", x)
        seen = tap.at(f"features.{place + 1}")
        x = activate_and_pool(nonlinear, POOLS[config.pool], x, 2, tap=seen)
        x = tap(f"features.{place + 2}", x)
    x = tap("features", x)
    x = rearrange(x, "batch channels height width -> batch (channels height width)")
    for i in range(len(config.hidden)):
        x = tap(f"classifier.{2 * i}", linear(classifier[str(2 * i)], x))
        x = tap(f"classifier.{2 * i + 1}", nonlinear(x))
    return tap.finish(linear(classifier[str(2 * len(config.hidden))], x), {}, train)

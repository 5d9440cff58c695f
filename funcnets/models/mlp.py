"""The multilayer perceptron."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float
from tensordict import TensorDict
from torch import Tensor

from funcnets import random
from funcnets.layers import activation, dropout, init_linear, linear
from funcnets.model import Model, bind
from funcnets.models import blocks
from funcnets.taps import Taps, TapsLike


@dataclass(frozen=True)
class Config:
    """What an MLP is made of; it is as deep as there are widths."""

    in_features: int
    out_features: int
    widths: tuple[int, ...] = (256, 256)
    activation: str = "relu"
    norm: Literal["batch", "layer", "rms"] | None = None
    dropout: float = 0.0
    bias: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", blocks.check_widths("mlp", self.widths))
        blocks.check_sizes("mlp", in_features=self.in_features, out_features=self.out_features)
        blocks.check_choice("mlp", "norm", self.norm, (None, "batch", "layer", "rms"))
        blocks.check_rate("mlp", "dropout", self.dropout)
        activation(self.activation)

    def place(self, layer: int) -> int:
        """Where a layer stands in torchvision's sequence of linear, norm, activation, dropout."""
        return layer * (3 if self.norm is None else 4)


def mlp(
    in_features: int,
    out_features: int,
    widths: tuple[int, ...] | list[int] = (256, 256),
    *,
    activation: str = "relu",
    norm: Literal["batch", "layer", "rms"] | None = None,
    dropout: float = 0.0,
    bias: bool = True,
) -> Model:
    """A multilayer perceptron, from [..., in_features] to [..., out_features].

    Parameters have the names of ``torchvision.ops.MLP`` of the same widths; unlike there, no
    dropout follows the last layer. Taps are ``hidden.0``, ``hidden.1``, ..., after the activations.

    Args:
        widths: of the hidden layers, any number of them; without any, one linear map is left.
        activation: a name that `funcnets.layers.activation` knows.
        norm: between a hidden layer and its activation; "batch" takes inputs [batch, in_features].
        dropout: the rate after each activation, in training.

    >>> import torch
    >>> model = mlp(4, 2, widths=(8, 8, 8))
    >>> params = model.init(random.key(0))
    >>> model.apply(params, torch.ones(5, 4)).shape
    torch.Size([5, 2])
    """
    widths = blocks.check_widths("mlp", widths)
    config = Config(in_features, out_features, widths, activation, norm, dropout, bias)
    return bind("mlp", config, init, forward, check)


def init(key: random.Key, config: Config) -> TensorDict:
    """The parameters (with buffers, if the norm is "batch")."""
    sizes = (config.in_features, *config.widths, config.out_features)
    params = {}
    for layer, layer_key in enumerate(random.split(key, len(sizes) - 1).unbind()):
        place, width = config.place(layer), sizes[layer + 1]
        params[str(place)] = init_linear(layer_key, sizes[layer], width, bias=config.bias)
        if config.norm is not None and layer < len(config.widths):
            params[str(place + 1)] = blocks.init_norm(layer_key, config.norm, width)
    return TensorDict(params)


def check(x: Tensor, config: Config) -> None:
    """Raises unless x is of the shape that the model takes."""
    flat = config.norm == "batch"  # which takes axis 1 for the features, whatever else there is
    if x.shape[-1:] != (config.in_features,) or (flat and x.ndim != 2):
        batch = "batch" if flat else "..."
        raise ValueError(f"mlp: x: expected [{batch}, {config.in_features}], got {list(x.shape)}")


def forward(
    params: TensorDict,
    x: Float[Tensor, "*batch in_features"],
    config: Config,
    *,
    train: bool = False,
    key: random.Key | None = None,
    taps: TapsLike = (),
) -> Any:
    """Outputs [..., out_features]; in training with the new buffers."""
    check(x, config)
    depth = len(config.widths)
    keys = blocks.draw_keys("mlp", key, train and config.dropout > 0 and depth > 0, depth)
    tap, buffers = Taps("mlp", taps), {}
    for layer in range(depth):
        place = config.place(layer)
        x = linear(params[str(place)], x)
        if config.norm is not None:
            name = str(place + 1)
            x, buffers[name] = blocks.norm(params[name], x, config.norm, train=train)
        x = tap(f"hidden.{layer}", activation(config.activation)(x))
        if keys is not None:
            x = dropout(keys[layer], x, config.dropout)
    outputs = linear(params[str(config.place(depth))], x)
    return tap.finish(outputs, buffers, train)

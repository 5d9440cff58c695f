"""What the families say of themselves so that they can be grown, and what they share in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

# For each axis of a leaf the group of units along it, None where that does not grow. The second
# axis of a weight is the one that it reads from.
Axes: TypeAlias = tuple[str | None, ...]


class Family(NamedTuple):
    """How the networks of a family grow.

    Attributes:
        fields: of the configuration, those that may differ.
        init: of the family.
        deeper: ``deeper(old, new)``: the old configuration with the layers of the new one, each as
            wide as what it follows. Raises a ValueError where the new one is no growth of the old.
        add: ``add(params, fresh)``: the parameters of the deeper network, the added layers, made of
            fresh ones, being the identity.
        sizes: of a configuration, the number of units in each group.
        axes: of a configuration, the groups along the axes of the leaves, by their dotted names.
    """

    fields: tuple[str, ...]
    init: Callable[..., Any]
    deeper: Callable[[Any, Any], Any]
    add: Callable[[Any, Any], Any]
    sizes: Callable[[Any], dict[str, int]]
    axes: Callable[[Any], dict[str, Axes]]


def vectors(place: str, group: str | None, weight: bool = False) -> dict[str, Axes]:
    """The axes of a bias or, with its weight, of a norm."""
    names = ("bias", "running_mean", "running_var", *(("weight",) if weight else ()))
    return {f"{place}.{name}": (group,) for name in names}


def identity_layer(layer: Any, weight: Tensor) -> dict[str, Tensor]:
    """A linear layer or convolution with this weight and without a bias to speak of."""
    made = {"weight": weight.to(layer["weight"])}
    if "bias" in layer:
        made["bias"] = torch.zeros_like(layer["bias"])
    return made


def identity_norm(norm: Any) -> dict[str, Tensor]:
    """A batch norm whose running statistics and weight undo one another at inference."""
    eps = 1e-5  # the default of layers.batch_norm
    return {**dict(norm.items()), "weight": norm["weight"] * (1 + eps) ** 0.5}


def check_identity(family: str, norm: str | None, activation: str) -> None:
    """Raises unless layers with this norm and activation can be the identity."""
    _choice(family, "norm", norm, (None, "batch"), "to add layers")
    _choice(family, "activation", activation, ("relu", "identity"), "to add layers")


def check_norm(family: str, norm: str | None) -> None:
    """Raises unless the norm treats every unit by itself, so that units can be copied."""
    _choice(family, "norm", norm, (None, "batch"), "to widen")


def _choice(family: str, name: str, value: Any, choices: Sequence[Any], aim: str) -> None:
    if value not in choices:
        known = ", ".join(map(repr, choices))
        raise ValueError(f"grow: {family}: {name}: expected one of {known} {aim}, got {value!r}")

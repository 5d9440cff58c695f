"""Spaces of hyperparameters, drawn from or laid out as a grid: tensors [members] by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor

from funcnets import random

Hyper = dict[str, Shaped[Tensor, " members"]]


@runtime_checkable
class Space(Protocol):
    """The values that a hyperparameter may take, as a function of a number from 0 to 1."""

    def at(self, unit: Float[Tensor, " n"]) -> Shaped[Tensor, " n"]:
        """The values at these shares of the way through the space."""

    def points(self, num: int) -> Shaped[Tensor, " points"]:
        """Values that cover the space, ``num`` of them where it holds that many."""


@dataclass(frozen=True)
class Uniform:
    """All numbers from ``low`` to ``high``, each as probable.

    >>> Uniform(0.0, 0.5).points(3)
    tensor([0.0000, 0.2500, 0.5000], dtype=torch.float64)
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low <= self.high):
            raise ValueError(f"Uniform: expected low <= high, got {self.low} and {self.high}")

    def at(self, unit: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The values at these shares of the way from low to high."""
        return self.low + (self.high - self.low) * unit.to(torch.float64)

    def points(self, num: int) -> Float[Tensor, " points"]:
        """Values at equal distances."""
        return self.at(_even(num))


@dataclass(frozen=True)
class LogUniform:
    """All numbers from ``low`` to ``high``, each order of magnitude as probable.

    >>> LogUniform(1e-4, 1e-2).points(3)
    tensor([0.0001, 0.0010, 0.0100], dtype=torch.float64)
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high < math.inf:
            raise ValueError(
                f"LogUniform: expected 0 < low <= high, got {self.low} and {self.high}"
            )

    def at(self, unit: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The values at these shares of the way from low to high."""
        low, high = math.log(self.low), math.log(self.high)
        found = (low + (high - low) * unit.to(torch.float64)).exp()
        return found.clamp(self.low, self.high)  # against rounding

    def points(self, num: int) -> Float[Tensor, " points"]:
        """Values at equal ratios."""
        return self.at(_even(num))


class Choice:
    """Some numbers, each as probable.

    >>> Choice(16, 32, 64).points(2)
    tensor([16, 32, 64])
    """

    def __init__(self, *values: int | float) -> None:
        if not values or any(not isinstance(value, (int, float)) for value in values):
            raise ValueError(f"Choice: expected numbers, at least one, got {list(values)}")
        self.values = values

    def __repr__(self) -> str:
        return f"Choice{self.values}"

    def at(self, unit: Float[Tensor, " n"]) -> Shaped[Tensor, " n"]:
        """The values at these shares of the way through the list."""
        place = (unit * len(self.values)).to(torch.int64).clamp(max=len(self.values) - 1)
        return self.points(0).to(unit.device)[place]

    def points(self, num: int) -> Shaped[Tensor, " points"]:
        """All values."""
        whole = all(isinstance(value, int) for value in self.values)
        return torch.tensor(self.values, dtype=torch.int64 if whole else torch.float64)


def draw(key: random.Key, spaces: Mapping[str, Space], num: int) -> Hyper:
    """``num`` points of a space, at random: tensors [num] by name (Bergstra and Bengio 2012).

    >>> found = draw(random.key(0), {"learning_rate": LogUniform(1e-4, 1e-1)}, 3)
    >>> found["learning_rate"].shape
    torch.Size([3])
    """
    _check("draw", spaces, num)
    keys = random.split(key, len(spaces)).unbind()
    return {
        name: space.at(random.uniform(own, (num,), dtype=torch.float64))
        for own, (name, space) in zip(keys, spaces.items(), strict=True)
    }


def grid(spaces: Mapping[str, Space], points: int = 3) -> Hyper:
    """Every combination of ``points`` values of each space (of a `Choice` all): tensors by name.

    >>> grid({"weight_decay": Choice(0.0, 1.0), "dropout": Uniform(0.0, 0.5)}, points=2)["dropout"]
    tensor([0.0000, 0.5000, 0.0000, 0.5000], dtype=torch.float64)
    """
    _check("grid", spaces, points)
    values = {name: space.points(points) for name, space in spaces.items()}
    rows = torch.cartesian_prod(*(torch.arange(len(axis)) for axis in values.values()))
    places = rearrange(rows, "members ... -> (...) members")
    return {name: values[name][place] for name, place in zip(values, places, strict=True)}


def _even(num: int) -> Tensor:
    if num == 1:
        return torch.full((1,), 0.5, dtype=torch.float64)
    return torch.linspace(0, 1, num, dtype=torch.float64)


def _check(name: str, spaces: Mapping[str, Space], num: int) -> None:
    if not spaces:
        raise ValueError(f"{name}: spaces: expected at least one, got none")
    for label, space in spaces.items():
        if not isinstance(space, (Uniform, LogUniform, Choice)) and not hasattr(space, "at"):
            raise TypeError(
                f"{name}: spaces: {label}: expected Uniform, LogUniform or Choice, got {space!r}"
            )
    if num < 1:
        raise ValueError(f"{name}: expected at least 1, got {num}")

"""What layers ask of their parameters and inputs before they compute."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from tensordict import TensorDict
from torch import Tensor


def entries(params: TensorDict) -> Mapping[str, Any]:
    """The entries of a parameter tree as a mapping that is cheap to read.

    A TensorDict takes about as long over two entries as a small matrix product does; the plain dict
    inside takes a tenth of that.
    """
    return params._tensordict if type(params) is TensorDict else params


def weight_and_bias(layer: str, params: TensorDict, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """``weight`` and ``bias`` (None where absent), after a check that ``x`` has their dtype."""
    found = entries(params)
    weight = found.get("weight", None)
    if weight is None:
        raise KeyError(f"{layer}: params: expected an entry weight, got {_names(found.keys())}")
    if x.dtype != weight.dtype:
        check_dtype(layer, x, weight, "weight")
    return weight, found.get("bias", None)


def check_dtype(layer: str, x: Tensor, entry: Tensor, name: str) -> None:
    """Raises where ``x`` and a parameter differ in dtype, unless autocast is on and mends that."""
    if x.dtype != entry.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(
            f"{layer}: x: expected {_dtype(entry)} (as {name}), got {_dtype(x)}{list(x.shape)}"
        )


def fail(layer: str, name: str, expected: str, got: Sequence[int]) -> NoReturn:
    """Raises the ValueError for a shape that does not fit."""
    raise ValueError(f"{layer}: {name}: expected {expected}, got {list(got)}")


def shape(*sizes: int | str) -> str:
    """An expected shape as error messages write it.

    >>> shape("...", 784)
    '[..., 784]'
    """
    return "[" + ", ".join(str(size) for size in sizes) + "]"


def check_positive(layer: str, **sizes: int) -> None:
    """Raises unless every size is at least 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{layer}: {name}: expected at least 1, got {size}")


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _names(keys: Iterable[str]) -> str:
    return ", ".join(keys) or "none"

"""How an mlp grows."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from tensordict import TensorDict

from funcnets.growth.family import (
    Axes,
    Family,
    check_identity,
    check_norm,
    identity_layer,
    identity_norm,
    vectors,
)
from funcnets.models.mlp import Config, init


def _deeper(old: Config, new: Config) -> Config:
    more = len(new.widths) - len(old.widths)
    if more < 0:
        raise ValueError(f"grow: mlp: widths: expected as many or more, got {new.widths}")
    if more and not old.widths:
        raise ValueError("grow: mlp: widths: expected a hidden layer to add others to, got none")
    if more:
        check_identity("mlp", old.norm, old.activation)
    if new.widths[: len(old.widths)] != old.widths:
        check_norm("mlp", old.norm)
    return dataclasses.replace(old, widths=(*old.widths, *old.widths[-1:] * more))


def _add(params: Any, fresh: Any) -> Any:
    """An mlp's: the head moves to the end, the layers in between hand on what they get."""
    ours = [name for name, layer in params.items() if layer["weight"].ndim > 1]
    theirs = [name for name, layer in fresh.items() if layer["weight"].ndim > 1]
    made = {}
    for name, layer in fresh.items():
        if name == theirs[-1]:
            made[name] = params[ours[-1]]
        elif name in params and name != ours[-1]:
            made[name] = params[name]
        elif layer["weight"].ndim > 1:
            made[name] = identity_layer(layer, torch.eye(*layer["weight"].shape))
        else:
            made[name] = identity_norm(layer)
    return TensorDict(made)


def _sizes(config: Config) -> dict[str, int]:
    return {f"widths[{i}]": width for i, width in enumerate(config.widths)}


def _axes(config: Config) -> dict[str, Axes]:
    axes: dict[str, Axes] = {}
    groups: list[str | None] = [None, *_sizes(config), None]
    for layer in range(len(config.widths) + 1):
        place = config.place(layer)
        axes[f"{place}.weight"] = groups[layer + 1], groups[layer]
        axes |= vectors(str(place), groups[layer + 1])
        if config.norm == "batch":
            axes |= vectors(str(place + 1), groups[layer + 1], weight=True)
    return axes


FAMILY = Family(("widths",), init, _deeper, _add, _sizes, _axes)

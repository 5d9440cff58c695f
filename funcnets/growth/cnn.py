"""How a cnn grows."""

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
from funcnets.models.cnn import Config, init


def _deeper(old: Config, new: Config) -> Config:
    if len(new.widths) != len(old.widths):
        raise ValueError(
            f"grow: cnn: widths: expected {len(old.widths)} blocks, got {len(new.widths)}"
        )
    if new.depth < old.depth:
        raise ValueError(f"grow: cnn: depth: expected {old.depth} or more, got {new.depth}")
    if new.depth > old.depth:
        check_identity("cnn", old.norm, old.activation)
    if new.widths[: len(old.widths)] != old.widths:
        check_norm("cnn", old.norm)
    return dataclasses.replace(old, depth=new.depth)


def _add(params: Any, fresh: Any) -> Any:
    """A cnn's: the convolutions added to a block have a one in the middle."""
    blocks: dict[str, Any] = {}
    for block, convolutions in fresh["features"].items():
        made = blocks[block] = {}
        for i, layer in convolutions.items():
            if i in params["features", block]:
                made[i] = params["features", block, i]
                continue
            weight = torch.zeros_like(layer["0", "weight"])
            middle: Any = (slice(None), slice(None), *(size // 2 for size in weight.shape[2:]))
            weight[middle] = torch.eye(len(weight), dtype=weight.dtype)
            made[i] = {"0": identity_layer(layer["0"], weight)}
            if "1" in layer:
                made[i]["1"] = identity_norm(layer["1"])
    return TensorDict({"features": blocks, "classifier": params["classifier"]})


def _sizes(config: Config) -> dict[str, int]:
    return {
        f"widths[{block}], convolution {i}": width
        for block, width in enumerate(config.widths)
        for i in range(config.depth)
    }


def _axes(config: Config) -> dict[str, Axes]:
    axes: dict[str, Axes] = {}
    before: str | None = None
    groups = iter(_sizes(config))
    for block in range(len(config.widths)):
        for i in range(config.depth):
            place, group = f"features.{block}.{i}", next(groups)
            axes[f"{place}.0.weight"] = group, before
            axes |= vectors(f"{place}.0", group) | vectors(f"{place}.1", group, weight=True)
            before = group
    axes["classifier.weight"] = None, before
    return axes


FAMILY = Family(("widths", "depth"), init, _deeper, _add, _sizes, _axes)

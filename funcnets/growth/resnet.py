"""How a residual network grows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from tensordict import TensorDict

from funcnets.growth.family import Axes, Family, vectors
from funcnets.models.resnet import Config, init


def _deeper(old: Config, new: Config) -> Config:
    if len(new.depths) != len(old.depths) or any(
        n < o for n, o in zip(new.depths, old.depths, strict=True)
    ):
        raise ValueError(f"grow: resnet: depths: expected {old.depths} or more, got {new.depths}")
    if new.width != old.width and old.groups > 1:
        raise ValueError(
            f"grow: resnet: width: expected {old.width} as before, for there are "
            f"{old.groups} groups, got {new.width}"
        )
    return dataclasses.replace(old, depths=new.depths)


def _add(params: Any, fresh: Any) -> Any:
    """A resnet's: the blocks added to a stage add nothing to their input yet."""

    def added(block: Any) -> Any:
        last = max(name for name in block.keys() if name.startswith("bn"))  # noqa: SIM118
        norm = block[last]
        return {**dict(block.items()), last: {**dict(norm.items()), "weight": norm["weight"] * 0}}

    return TensorDict(
        {
            name: params[name]
            if not name.startswith("layer")
            else {
                i: params[name, i] if i in params[name] else added(block)
                for i, block in part.items()
            }
            for name, part in fresh.items()
        }
    )


def _sizes(config: Config) -> dict[str, int]:
    sizes = {"stem": config.width}
    for stage, place in _blocks(config):
        sizes[_stream(config, stage)] = config.outer(stage)
        inner = config.outer(stage) if config.block == "basic" else config.inner(stage)
        sizes |= {f"{place}.{i}": inner for i in range(1, _convolutions(config))}
        if config.squeeze_excitation:
            sizes[f"{place}.se"] = max(1, config.outer(stage) // 16)
    return sizes


def _axes(config: Config) -> dict[str, Axes]:
    axes: dict[str, Axes] = {"conv1.weight": ("stem", None)} | vectors("bn1", "stem", weight=True)
    before = "stem"
    for stage, place in _blocks(config):
        stream, last = _stream(config, stage), _convolutions(config)
        reads = before
        for i in range(1, last + 1):
            group = stream if i == last else f"{place}.{i}"
            grouped = config.groups > 1 and i == 2  # then no width changes
            axes[f"{place}.conv{i}.weight"] = (None, None) if grouped else (group, reads)
            axes |= vectors(f"{place}.bn{i}", group, weight=True)
            reads = group
        axes[f"{place}.downsample.0.weight"] = stream, before
        axes |= vectors(f"{place}.downsample.1", stream, weight=True)
        axes[f"{place}.se.fc1.weight"] = f"{place}.se", stream
        axes[f"{place}.se.fc2.weight"] = stream, f"{place}.se"
        axes |= vectors(f"{place}.se.fc1", f"{place}.se") | vectors(f"{place}.se.fc2", stream)
        before = stream
    axes["fc.weight"] = None, before
    return axes


def _blocks(config: Config) -> Iterator[tuple[int, str]]:
    for stage, depth in enumerate(config.depths):
        for i in range(depth):
            yield stage, f"layer{stage + 1}.{i}"


def _stream(config: Config, stage: int) -> str:
    """The group of the channels between the blocks; basic blocks begin with the stem's."""
    return "stem" if stage == 0 and config.block == "basic" else f"layer{stage + 1}"


def _convolutions(config: Config) -> int:
    return 2 if config.block == "basic" else 3


FAMILY = Family(("width", "depths"), init, _deeper, _add, _sizes, _axes)

"""The networks with conditional paths as modules of torch.nn, sample by sample."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Gated(nn.Module):
    """Both paths, and for each sample the output of one, with the gradient of the soft choice."""

    def __init__(self, base: nn.Module, shallow: nn.Module, deep: nn.Module, size: int) -> None:
        super().__init__()
        self.base, self.shallow, self.deep = base, shallow, deep
        self.gate = nn.Linear(size, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The outputs and the probabilities of the deep path."""
        h = self.base(x)
        chance = self.gate(h)[:, 0].sigmoid()
        one, other = self.shallow(h), self.deep(h)
        if not self.training:
            return {"outputs": torch.where(chance[:, None] > 0.5, other, one), "gate": chance}
        hard = (chance > 0.5).to(chance.dtype)
        weight = (chance + (hard - chance).detach())[:, None]
        return {"outputs": one + weight * (other - one), "gate": chance}


class EarlyExit(nn.Module):
    """Stages and exits, one sample after the other at inference."""

    def __init__(self, stages: list[nn.Module], exits: list[nn.Module], threshold: float) -> None:
        super().__init__()
        self.stages, self.exits = nn.ModuleList(stages), nn.ModuleList(exits)
        self.threshold = threshold

    def forward(self, x: Tensor) -> object:
        """All logits in training; those of the first exit that is sure at inference."""
        if self.training:
            every = []
            for stage, leave in zip(self.stages, self.exits, strict=True):
                x = stage(x)
                every.append(leave(x))
            return torch.stack(every)
        found, places = [], []
        for sample in x.split(1):
            h, place, logits = sample, -1, None
            while logits is None or (
                logits.softmax(1).max() < self.threshold and place + 1 < len(self.stages)
            ):
                place += 1
                h = self.stages[place](h)
                logits = self.exits[place](h)
            found.append(logits)
            places.append(place)
        return {"logits": torch.cat(found), "exit": torch.tensor(places)}

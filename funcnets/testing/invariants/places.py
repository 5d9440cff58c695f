"""A model as a function of all that has a gradient, and directions to go in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funcnets import random
from funcnets.testing.engine import Try
from funcnets.testing.subject import points
from funcnets.tree.flatten import Path

At = dict[Path, Tensor]


def everything(trial: Try) -> tuple[At, Callable[[At], tuple[Any, Any]]]:
    """Trainable parameters and floating inputs by path; and what makes arguments of such ones."""
    subject, (params, inputs, _) = trial.subject, trial.parts
    held, rebuild = subject.points(params)
    seen, rebuild_inputs = points(inputs)

    def arguments(at: At) -> tuple[Any, Any]:
        parts: dict[str, At] = {"params": {}, "inputs": {}}
        for path, x in at.items():
            parts[path[0]][path[1:]] = x
        return rebuild(parts["params"]), rebuild_inputs(parts["inputs"])

    at = {("params", *path): x for path, x in held.items()}
    return at | {("inputs", *path): x for path, x in seen.items()}, arguments


def in_training(trial: Try) -> tuple[At, Callable[[At], Any]]:
    """As `everything`, with the outputs in training as a function of it."""
    at, arguments = everything(trial)
    subject, key = trial.subject, trial.sample.key
    return at, lambda at: subject.train(*arguments(at), key)[0]


def direction(trial: Try, number: int, like: At) -> At:
    """Random tensors like those given."""
    key = random.fold_in(trial.sample.key, number)
    return {
        path: random.normal(random.fold_in(key, i), x.shape, dtype=torch.float64).to(x)
        for i, (path, x) in enumerate(like.items())
    }


# How far a slope by differences may be off, in units of the sum of all its parts.
DIFFERENCES = {torch.float64: 1e-6, torch.float32: 3e-2}


def closest_difference(f: Callable[[float], Tensor], slope: float, at: At) -> float:
    """Of the slopes of f at 0 by differences over some steps, the one closest to what is expected.

    A kink that lies within one of the steps does not lie within all of them.
    """
    double = all(x.dtype == torch.float64 for x in at.values())
    steps = (1e-6, 1e-7, 1e-8) if double else (1e-2, 3e-3, 1e-3)
    slopes = [(f(h) - f(-h)).item() / (2 * h) for h in steps]
    return min(slopes, key=lambda found: abs(found - slope))


def dot(a: At, b: At) -> Tensor:
    """The sum of the products of all numbers at the same places."""
    return torch.stack([(x * b[path]).sum() for path, x in a.items()]).sum()


def size(a: At, b: At) -> float:
    """As `dot`, of the absolute values: what the rounding of it is measured by."""
    return float(torch.stack([(x * b[path]).abs().sum() for path, x in a.items()]).sum())

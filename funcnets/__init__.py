"""Purely functional neural networks for PyTorch: parameter trees and pure functions."""

import importlib
from typing import TYPE_CHECKING, Any

from funcnets import layers, optim, random, tree
from funcnets.compile import compile
from funcnets.control import cond, remat, route, scan, switch, while_loop
from funcnets.gradients import grad, grad_and_value
from funcnets.model import Model

if TYPE_CHECKING:
    from funcnets import (
        data,
        ensembles,
        finetuning,
        generation,
        losses,
        metrics,
        models,
        per_sample,
        training,
    )
    from funcnets.growth.grow import grow
    from funcnets.serialization import load, read_metadata, save

__version__ = "0.1.0"

__all__ = [
    "Model",
    "compile",
    "cond",
    "data",
    "ensembles",
    "finetuning",
    "generation",
    "grad",
    "grad_and_value",
    "grow",
    "layers",
    "load",
    "losses",
    "metrics",
    "models",
    "optim",
    "per_sample",
    "random",
    "read_metadata",
    "remat",
    "route",
    "save",
    "scan",
    "switch",
    "training",
    "tree",
    "while_loop",
]

# Where to find what is imported when it is first asked for: `import funcnets` takes half the time.
_HOMES = {
    "grow": "growth",
    "load": "serialization",
    "read_metadata": "serialization",
    "save": "serialization",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'funcnets' has no attribute {name!r}")
    home = importlib.import_module(f"funcnets.{_HOMES.get(name, name)}")
    found = getattr(home, name) if name in _HOMES else home
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

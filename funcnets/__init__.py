"""Purely functional neural networks for PyTorch: parameter trees and pure functions."""

from funcnets import (
    data,
    ensembles,
    finetuning,
    generation,
    layers,
    losses,
    metrics,
    models,
    optim,
    per_sample,
    random,
    training,
    tree,
)
from funcnets.compile import compile
from funcnets.control import cond, remat, route, scan, switch, while_loop
from funcnets.gradients import grad, grad_and_value
from funcnets.growth import grow
from funcnets.model import Model
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

"""The families of torchvision, eager: ``scripts/benchmark.py --families``.

A forward pass at inference, and a training step: forward, loss, gradient and torch.optim's fused
Adam, over the same 16 images of 64 x 64. Dropout and stochastic depth are off, so that the results
can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from benchmarks import machine, networks, steps
from benchmarks.race import Case, Contender, Workloads, races
from funcnets import Model, models, random, tree

TARGET = 1.05

# The constructors, and with which arguments ours and torchvision's draw nothing.
NO_DROPOUT = ({"dropout": 0.0}, {"dropout": 0.0})
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "alexnet": NO_DROPOUT,
    "vgg11_bn": NO_DROPOUT,
    "resnet18": ({}, {}),
    "resnet50": ({}, {}),
    "resnext50_32x4d": ({}, {}),
    "densenet121": ({}, {}),
    "mobilenet_v2": NO_DROPOUT,
    "mobilenet_v3_small": NO_DROPOUT,
    "mobilenet_v3_large": NO_DROPOUT,
    "efficientnet_b0": (
        {"dropout": 0.0, "stochastic_depth": 0.0},
        {"dropout": 0.0, "stochastic_depth_prob": 0.0},
    ),
    "convnext_tiny": ({"stochastic_depth": 0.0}, {"stochastic_depth_prob": 0.0}),
}


def model(family: str) -> Model:
    """Ours, of ten classes."""
    return getattr(models, family)(num_classes=10, **FAMILIES[family][0])


def network(family: str) -> nn.Module:
    """Torchvision's."""
    return getattr(torchvision.models, family)(num_classes=10, **FAMILIES[family][1])


def batch(quick: bool) -> tuple[Tensor, Tensor]:
    """Images and their classes."""
    return steps.images(2 if quick else 16, 64)


def forward(family: str, quick: bool) -> Case:
    """Logits at inference."""
    own = model(family)
    params = networks.copied(own.init(random.key(0)))
    x = machine.place(batch(quick)[0])

    def module() -> Contender:
        theirs = network(family)
        tree.to_module(params, theirs)
        return inference(machine.place_module(theirs).eval(), x)

    ours = partial(own.apply, params)
    return Case({}, {"funcnets, eager": lambda: inference(ours, x), "nn.Module, eager": module})


def inference(f: Callable[[Tensor], Tensor], x: Tensor) -> Contender:
    """What calls f without a graph."""
    logits = x  # until there are any

    @torch.no_grad()
    def run() -> None:
        nonlocal logits
        logits = f(x)

    return Contender(run, lambda: {"logits": logits})


def training_step(family: str, quick: bool) -> Case:
    """A step, by our gradients, and by backward() through our model and through a module."""
    build = partial(network, family)
    case = steps.training_step(model(family), build, *batch(quick), F.cross_entropy)
    names = "funcnets, fused torch.optim", "funcnets, backward()", "nn.Module, eager"
    return case._replace(contenders={name: case.contenders[name] for name in names})


WORKLOADS: Workloads = races(
    {
        f"{family}, {kind}": ({"eager": TARGET}, partial(make, family))
        for family in FAMILIES
        for kind, make in (("forward", forward), ("training step", training_step))
    }
)

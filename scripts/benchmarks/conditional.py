"""A network with a shallow and a deep path, where most samples take the shallow one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import funcnets
from benchmarks import machine, networks
from benchmarks.race import Case, Contender, races
from funcnets import models, random


def mlp(quick: bool) -> Case:
    """Inference on 1024 samples of which a fifth are hard, each going its own way.

    The ideal knows beforehand who is hard, and sends two ready batches down the two paths.
    """
    batch, depth = (40, 4) if quick else (1024, 16)
    base = models.mlp(784, 256, ())
    shallow, deep = models.mlp(256, 10, (256,)), models.residual_mlp(256, 10, depth=depth)
    model = models.gated(base, shallow, deep)
    params = networks.copied(model.init(random.key(0)))
    x = machine.place(random.normal(random.key(1), (batch, 784)))
    hard = machine.place(random.permutation(random.key(2), batch) < batch // 5)
    ways = x[~hard], x[hard]

    def ours(params: Any, x: Tensor, hard: Tensor) -> Tensor:
        return model.apply(params, x, hard)

    def ideal(params: Any, easy: Tensor, difficult: Tensor) -> tuple[Tensor, Tensor]:
        first = shallow.apply(params["shallow"], base.apply(params["base"], easy))
        return first, deep.apply(params["deep"], base.apply(params["base"], difficult))

    def routed(f: Any) -> Contender:
        found: Any = None

        def run() -> None:
            nonlocal found
            found = f(params, x, hard)

        return Contender(run, lambda: {"easy": found[~hard], "hard": found[hard]})

    def split(f: Any) -> Contender:
        found: Any = None

        def run() -> None:
            nonlocal found
            found = f(params, *ways)

        return Contender(run, lambda: dict(zip(("easy", "hard"), found, strict=True)))

    def everybody() -> Contender:
        found: Any = None

        def run() -> None:
            nonlocal found
            h = base.apply(params["base"], x)
            paths = shallow.apply(params["shallow"], h), deep.apply(params["deep"], h)
            found = torch.where(hard[:, None], paths[1], paths[0])

        return Contender(run, lambda: {"easy": found[~hard], "hard": found[hard]})

    return Case(
        {},
        {
            "funcnets, eager": lambda: routed(ours),
            "funcnets, compiled": lambda: routed(funcnets.compile(ours)),
            "ideal, eager": lambda: split(ideal),
            "ideal, compiled": lambda: split(funcnets.compile(ideal)),
            "both paths and where, eager": everybody,
        },
        against="ideal",
    )


WORKLOADS = races({"conditional, 80 % easy": ({"eager": 1.15, "compiled": 1.15}, mlp)})

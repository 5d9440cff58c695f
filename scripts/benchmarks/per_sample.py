"""The gradient of each sample of a batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, vmap

import funcnets
from benchmarks import machine, networks
from benchmarks.elsewhere import elsewhere, needs
from benchmarks.race import Case, Contender, races
from funcnets import ensembles, models, per_sample, random, tree


def conv_net(quick: bool) -> Case:
    """128 images of 28 x 28 through two convolutions."""
    batch = 8 if quick else 128
    model = models.cnn(1, 10, (32, 64), norm=None)
    params = networks.copied(model.init(random.key(0)))
    x = machine.place(random.normal(random.key(1), (batch, 1, 28, 28)))
    y = machine.place(random.randint(random.key(2), (batch,), 0, 10))

    def loss(params: Any, batch: Any) -> Tensor:
        return F.cross_entropy(model.apply(params, batch[0]), batch[1])

    def ours(params: Any, x: Tensor, y: Tensor) -> Any:
        return per_sample.gradients(loss, params, (x, y))

    def chosen() -> Contender:
        def one(params: Any, x: Tensor, y: Tensor) -> Any:
            return torch.func.grad(loss)(params, (x[None], y[None]))

        return holding(ensembles.chunked(one, "auto", (None, 0, 0)), params, x, y)

    def build() -> networks.Conv:
        network = networks.Conv(1, 32, 64).to(machine.DEVICE)
        tree.to_module(params, network)
        return network

    def holding(f: Any, *arguments: Any) -> Contender:
        found: Any = None

        def run() -> None:
            nonlocal found
            found = f(*arguments)

        return Contender(run, lambda: networks.named(found))

    def torch_func(compiled: bool) -> Contender:
        network = build()
        weights = {name: p.detach() for name, p in network.named_parameters()}

        def one(weights: Any, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(functional_call(network, weights, (x[None],)), y[None])

        f = vmap(torch.func.grad(one), (None, 0, 0))
        return holding(torch.compile(f) if compiled else f, weights, x, y)

    def opacus() -> Contender:
        needs("opacus")
        from opacus import GradSampleModule

        network = GradSampleModule(build(), loss_reduction="sum")

        def run() -> None:
            network.zero_grad()
            F.cross_entropy(network(x), y, reduction="sum").backward()

        def result() -> dict[str, Tensor]:
            return {
                name.removeprefix("_module."): p.grad_sample
                for name, p in network.named_parameters()
            }

        return Contender(run, result)

    def one_by_one() -> Contender:
        network = build()
        names, weights = zip(*network.named_parameters(), strict=True)

        def f() -> dict[str, Tensor]:
            each = [
                torch.autograd.grad(F.cross_entropy(network(x[i, None]), y[i, None]), weights)
                for i in range(batch)
            ]
            return dict(zip(names, map(torch.stack, zip(*each, strict=True)), strict=True))

        return holding(f)

    return Case(
        {},
        {
            "funcnets, eager": lambda: holding(ours, params, x, y),
            "funcnets, chunk chosen, eager": chosen,
            "funcnets, compiled": lambda: holding(funcnets.compile(ours), params, x, y),
            "torch.func, eager": lambda: torch_func(False),
            "torch.func, compiled": lambda: torch_func(True),
            "Opacus, eager": opacus,
            "nn.Module one by one, eager": one_by_one,
            "Equinox, jit": lambda: elsewhere("per_sample", params, x, y),
        },
    )


WORKLOADS = races({"per-sample gradients, conv net": ({"": 0.9}, conv_net)})

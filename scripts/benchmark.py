"""Our time beside that of what people would write instead, in one process, round by round.

Each round times our step and its rivals once, one after the other; the table gives medians over
the rounds and ratios of medians. The results are compared before anything is timed.

    uv run scripts/benchmark.py --rounds 15
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

import funcnets
from funcnets import models, optim, random, tree

MEMBERS, BATCH = 32, 128

# A contender makes one step each time it is called, and returns the parameters of the first layer.
Contender = Callable[[], Tensor]


def ensemble_of_mlps() -> dict[str, Contender]:
    """32 MLPs 784-256-256-10, batch 128, one full Adam step on the same data."""
    model = models.mlp(784, 10, widths=(256, 256))
    params = vmap(model.init)(random.split(random.key(0), MEMBERS))
    x = random.normal(random.key(1), (BATCH, 784))
    y = random.randint(random.key(2), (BATCH,), 0, 10)
    optimizer = optim.adam(1e-3)

    def loss(params: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model.apply(params, x), y)

    def step(params: Any, state: Any, x: Tensor, y: Tensor) -> tuple[Any, Any]:
        def member(params: Any, state: Any) -> tuple[Any, Any]:
            updates, state = optimizer.update(grad(loss)(params, x, y), state, params)
            return optim.apply_updates(params, updates), state

        return vmap(member)(params, state)

    def ours(step: Any) -> Contender:
        held = tree.map(torch.clone, params), vmap(optimizer.init)(params)

        def run() -> Tensor:
            nonlocal held
            held = step(*held, x, y)
            return held[0]["0", "weight"]

        return run

    def torch_func(**flags: Any) -> Contender:
        layers = [nn.Linear(784, 256), nn.Linear(256, 256), nn.Linear(256, 10)]
        network = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
        networks = [copy.deepcopy(network) for _ in range(MEMBERS)]
        for copied, own in zip(networks, tree.unstack(params), strict=True):
            named = {str(place): own[str(3 * i)] for i, place in enumerate((0, 2, 4))}
            copied.load_state_dict(
                {f"{p}.{n}": leaf for p, layer in named.items() for n, leaf in layer.items()}
            )
        weights, _ = stack_module_state(networks)
        adam = torch.optim.Adam(weights.values(), lr=1e-3, **flags)

        def member(weights: Any) -> Tensor:
            return F.cross_entropy(functional_call(network, weights, (x,)), y)

        def run() -> Tensor:
            detached = {name: weight.detach() for name, weight in weights.items()}
            for name, gradient in vmap(grad(member))(detached).items():
                weights[name].grad = gradient
            adam.step()
            return weights["0.weight"].detach()

        return run

    return {
        "funcnets, compiled and donated": ours(funcnets.compile(step, donate=("params", "state"))),
        "funcnets, eager": ours(step),
        "torch.func, fused Adam": torch_func(fused=True),
        "torch.func, foreach Adam": torch_func(foreach=True),
    }


WORKLOADS = {"ensemble of 32 MLPs": (ensemble_of_mlps, "torch.func, fused Adam")}


def measure(contenders: dict[str, Contender], rounds: int) -> dict[str, float]:
    """The median seconds of a step of each, after a step that must give all the same."""
    first = {name: run().clone() for name, run in contenders.items()}
    for name, result in first.items():
        torch.testing.assert_close(
            result, next(iter(first.values())), rtol=1e-3, atol=2e-4, msg=f"{name}: other numbers"
        )
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def main() -> None:
    """Measures every workload and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    table = Table(title=f"torch {torch.__version__}, {torch.get_num_threads()} threads, CPU")
    for column in ("workload", "", "ratio", "ms"):
        table.add_column(column, justify="right" if column in ("ratio", "ms") else "left")
    for name, (make, rival) in WORKLOADS.items():
        medians = measure(make(), rounds)
        for contender, seconds in medians.items():
            ratio = f"{seconds / medians[rival]:.2f}"
            table.add_row(name, contender, ratio, f"{1e3 * seconds:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()

"""What a call of a compiled function costs beyond the graph it runs; also a program.

    python -m benchmarks.overhead 15 full

prints the rows of so many rounds: in a process of its own, for after the other workloads the same
call takes half as long again.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import asdict
from typing import Any

import torch
from tensordict import TensorDict

import funcnets
from benchmarks import machine
from benchmarks.processes import answer
from benchmarks.race import Row, Settings, Workloads, spread
from funcnets import optim, tree

CALLS = 100


def nested(leaves: int) -> TensorDict:
    """A tree of so many small leaves, two in each of its nodes, ten nodes in each of theirs."""
    layers = leaves // 2
    return TensorDict(
        {
            f"block{b}": {
                f"layer{i}": {"weight": torch.ones(4, 4), "bias": torch.ones(4)}
                for i in range(min(10, layers - b))
            }
            for b in range(0, layers, 10)
        }
    )


def call(settings: Settings) -> list[Row]:
    """A step of gradient descent over one tree of 120 leaves, and of Adam over three of them."""
    size = "quick" if settings.quick else "full"
    return [Row(**row) for row in answer("-m", __spec__.name, str(settings.rounds), size)]


def measure(settings: Settings) -> list[Row]:
    """The same, in this process."""
    steps = {"one tree of 120 leaves": optim.sgd(1e-3), "three trees, Adam": optim.adam(1e-3)}
    return [_above_flat(name, optimizer, settings) for name, optimizer in steps.items()]


def _above_flat(name: str, optimizer: optim.Optimizer, settings: Settings) -> Row:
    """A compiled step beside its graph alone, given its tensors."""
    backend = "aot_eager" if settings.quick else "inductor"
    params = tree.map(machine.place, nested(20 if settings.quick else 120))

    def step(params: Any, state: Any) -> Any:
        updates, state = optimizer.update(params, state, params)  # the gradient of half its square
        return optim.apply_updates(params, updates), state

    def own() -> Any:
        copied = tree.map(torch.clone, params)
        return copied, optimizer.init(copied)

    ours, held = funcnets.compile(step, donate=(0, 1), backend=backend), own()
    held = ours(*held)
    # The one graph that was compiled, without what stands around it; it writes in place, too.
    graph = next(iter(ours._entries.values()))[0].compiled
    flat = tree.leaves(own())

    def run_tree() -> None:
        nonlocal held
        for _ in range(CALLS):
            held = ours(*held)

    def run_flat() -> None:
        for _ in range(CALLS):
            graph(*flat)

    def torchs(f: Any, given: Any) -> Any:
        compiled = torch.compile(f, backend=backend)
        compiled(*given)

        def run() -> None:
            for _ in range(CALLS):
                compiled(*given)

        return run

    runs = {"funcnets, compiled": run_tree, "its graph, flat": run_flat}
    reported: dict[str, str] = {}
    if not settings.quick:
        try:
            runs["torch.compile over TensorDicts"] = torchs(step, own())
        except Exception as error:  # what Dynamo cannot do is a finding, not the end
            reported["torch.compile over TensorDicts"] = f"fails: {type(error).__name__}"
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(settings.rounds):
        for contender, run in runs.items():
            times[contender].append(machine.seconds(run) / CALLS)
    beyond = [
        1e3 * (a - b)
        for a, b in zip(times["funcnets, compiled"], times["its graph, flat"], strict=True)
    ]
    row = Row(f"call of a compiled step, {name}", 0.2, statistics.median(beyond), "ms above flat")
    found = spread(beyond)
    row.low, row.high = found["low"], found["high"]
    row.ours, row.rival = "funcnets, compiled", "its graph, flat"
    row.contenders, row.reported = {n: spread(values) for n, values in times.items()}, reported
    return row


WORKLOADS: Workloads = {"call overhead": call}

if __name__ == "__main__":
    rounds, size = sys.argv[1:]
    print(json.dumps([asdict(row) for row in measure(Settings(int(rounds), size == "quick"))]))

"""How compiling a training step of equal blocks grows with their number; also a program.

    python -m benchmarks.compile_time funcnets 24

prints the seconds of the first step in this process.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from benchmarks import machine, networks
from benchmarks.processes import answer
from benchmarks.race import Row, Settings, Workloads, spread
from funcnets import models, random

SHALLOW, DEEP = 4, 24
KINDS = {
    "funcnets": "funcnets, stacked, compiled",
    "module": "nn.Module, compiled",
    "regional": "nn.Module, each block compiled",
}


def first_step(kind: str, depth: int) -> float:
    """Seconds until the first step of a GPT of so many layers is done."""
    sizes = (65, 64, 64, depth, 4)
    model = models.gpt(*sizes, share="stacked" if kind == "funcnets" else "none")
    params = model.init(random.key(0))
    tokens = machine.place(random.randint(random.key(1), (4, 65), 0, 65))
    batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    if kind == "funcnets":
        start, step = networks.pure_step(model, networks.tokens_loss)
        contender = networks.donated(step, start(networks.copied(params)), *batch)
    else:
        network = networks.GPT(*sizes)
        if kind == "regional":
            for layer in network.layers:
                layer.compile()
        contender = networks.module(
            network, networks.tokens_loss, params, *batch, "default" if kind == "module" else None
        )
    with machine.precision():
        return machine.seconds(contender.step)


def compile_time(settings: Settings) -> list[Row]:
    """24 blocks over 4, each in a fresh process that finds nothing compiled before."""
    if settings.quick:
        return []
    row = Row("cold compile, 24 blocks over 4", 1.3, None)
    ratios: dict[str, list[float]] = {kind: [] for kind in KINDS}
    taken: dict[str, list[float]] = {}
    for _ in range(3 if settings.rounds > 5 else 1):
        for kind, name in KINDS.items():
            pair = [answer("-m", __spec__.name, kind, str(depth)) for depth in (SHALLOW, DEEP)]
            for depth, value in zip((SHALLOW, DEEP), pair, strict=True):
                taken.setdefault(f"{name}, {depth} blocks", []).append(value)
            ratios[kind].append(pair[1] / pair[0])
    found: dict[str, Any] = spread(ratios["funcnets"])
    row.value, row.low, row.high = found["median"], found["low"], found["high"]
    row.contenders = {name: spread(values) for name, values in taken.items()}
    row.ours = f"{KINDS['funcnets']}, {DEEP} blocks"
    row.rival = f"{KINDS['funcnets']}, {SHALLOW} blocks"
    return [row]


WORKLOADS: Workloads = {"cold compile": compile_time}

if __name__ == "__main__":
    print(json.dumps(first_step(sys.argv[1], int(sys.argv[2]))))

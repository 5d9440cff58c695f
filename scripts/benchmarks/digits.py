"""Sixteen conv nets trained on scikit-learn's digits, from nothing to the end; also a program.

    python -m benchmarks.digits data.safetensors result.safetensors epochs one-by-one 0 1 2

trains these members, together or one by one, and leaves their parameters.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import vmap

from benchmarks import machine, networks
from benchmarks.processes import SCRIPTS
from benchmarks.race import Contender, Row, Settings, Workloads, compare, spread
from funcnets import models, optim, random, training, tree

MEMBERS, BATCH = 16, 64
MODEL = models.cnn(in_channels=1, num_classes=10, widths=(32, 64), dropout=0.1)


def keys(members: Sequence[int]) -> tuple[random.Key, random.Key]:
    """Those of some members: for their parameters, and for their runs."""
    both = random.split(random.key(0)).unbind()
    init, run = (random.split(key, MEMBERS)[torch.tensor(members)] for key in both)
    return init, run


def train(x: Tensor, y: Tensor, epochs: int, members: Sequence[int], together: bool) -> Any:
    """The parameters of the members, whose keys are their own, [members]."""
    init_keys, run_keys = keys(members)
    batches = training.minibatches((x, y), BATCH, drop_last=True)
    step = training.make_step(MODEL, F.cross_entropy, optim.adamw(3e-3))

    def fit(step: Any, init: Any, params: Any, keys: Any) -> Any:
        state, _ = training.fit(step, init(params, keys), batches, epochs=epochs, progress=False)
        return training.parameters(state)

    if together:
        return fit(vmap(step), vmap(step.init), vmap(MODEL.init)(init_keys), run_keys)
    pairs = zip(init_keys.unbind(), run_keys.unbind(), strict=True)
    return tree.stack([fit(step, step.init, MODEL.init(first), run) for first, run in pairs])


def launch(
    folder: Path, name: str, epochs: int, kind: str, members: Sequence[int], threads: int
) -> subprocess.Popen[bytes]:
    """A process that trains members and leaves them in a file."""
    environment = os.environ | {"PYTHONPATH": str(SCRIPTS), "OMP_NUM_THREADS": str(threads)}
    places = map(str, members)
    files = str(folder / "data.safetensors"), str(folder / f"{name}.safetensors")
    command = [sys.executable, "-m", __spec__.name, *files, str(epochs), kind, *places]
    return subprocess.Popen(command, env=environment)


def whole_runs(settings: Settings) -> list[Row]:
    """Seconds from the start of the first process to the end of the last."""
    from sklearn.datasets import load_digits  # no process waits for it

    members = range(2 if settings.quick else MEMBERS)
    epochs, rounds = (1, 1) if settings.quick else (30, 3 if settings.rounds > 5 else 1)
    cores = os.cpu_count() or 1

    def alone(folder: Path, kind: str) -> None:
        if launch(folder, kind, epochs, kind, members, cores).wait():
            raise RuntimeError(f"{kind}: its message is above")

    def each_its_own(folder: Path) -> None:
        waiting, running = list(members), list[Any]()
        while waiting or running:
            while waiting and len(running) < cores:
                place = waiting.pop(0)
                running.append(launch(folder, f"own {place}", epochs, "one-by-one", [place], 1))
            if running.pop(0).wait():
                raise RuntimeError("a process has ended; its message is above")

    runs = {
        "funcnets, one vmap": lambda folder: alone(folder, "together"),
        "one after another": lambda folder: alone(folder, "one-by-one"),
        "16 processes": each_its_own,
    }
    digits = load_digits()
    x, y = torch.from_numpy(digits.images / 16).float()[:, None], torch.from_numpy(digits.target)
    first = {
        "together": train(x, y, 1, range(2), True),
        "one by one": train(x, y, 1, range(2), False),
    }
    start = networks.named(vmap(MODEL.init)(keys(range(2))[0]))
    held = {
        name: Contender(lambda: None, functools.partial(networks.named, params))
        for name, params in first.items()
    }
    reported = compare(held, start)
    times: dict[str, list[float]] = {name: [] for name in runs}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file({"x": x, "y": y}, folder / "data.safetensors")
        for _ in range(rounds):
            for kind, run in runs.items():
                times[kind].append(machine.seconds(functools.partial(run, folder)))
    ours, *rivals = times
    found = []
    for rival, target in zip(rivals, (1.0, 2 / 3), strict=True):
        row = Row(f"16 conv nets on digits, over {rival}", target, None)
        row.ours, row.rival, row.reported = ours, rival, reported
        if not reported:
            ratios = spread([a / b for a, b in zip(times[ours], times[rival], strict=True)])
            row.value, row.low, row.high = ratios["median"], ratios["low"], ratios["high"]
        row.contenders = {name: spread(times[name]) for name in (ours, rival)}
        found.append(row)
    return found


WORKLOADS: Workloads = {"16 conv nets on digits": whole_runs}

if __name__ == "__main__":
    source, target, epochs, kind, *members = sys.argv[1:]
    data = load_file(source)
    chosen = [int(place) for place in members]
    found = train(data["x"], data["y"], int(epochs), chosen, kind == "together")
    save_file(networks.named(found), target)

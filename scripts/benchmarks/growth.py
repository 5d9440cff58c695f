"""How time and memory grow with sizes: ``scripts/benchmark.py --growth``.

The time of one training step and the most memory it holds are measured against members, depth,
batch and parameters, at sizes that double; at each size the contenders take turns. The exponent is
fitted over the larger half of the sizes: 1 is linear.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import matplotlib.pyplot as plt
import torch.nn.functional as F
from torch import nn
from torch.func import vmap

from benchmarks import ensembles, machine, memory, networks
from benchmarks.race import OURS, Contender, Row, Settings, Workloads, spread, timed
from funcnets import Model, models, random
from funcnets.ensembles import chunked

LINEAR = 1.05  # what measures as linear

Contenders: TypeAlias = dict[str, Callable[[], Contender]]


class Curve(NamedTuple):
    """What is measured at each size."""

    sizes: list[int]
    contenders: Callable[[int], Contenders]
    work: Callable[[int], int] = lambda size: size  # what time should be linear in


def single(model: Model, build: Callable[[], nn.Module], batch: int) -> Contenders:
    """An eager step of one network, by us and by nn.Module."""
    x = machine.place(random.normal(random.key(1), (batch, 64)))
    y = machine.place(random.randint(random.key(2), (batch,), 0, 10))
    start, step = networks.pure_step(model, F.cross_entropy)
    params = model.init(random.key(0))
    return {
        "funcnets": lambda: networks.pure(step, start(networks.copied(params)), x, y),
        "nn.Module": lambda: networks.module(build(), F.cross_entropy, params, x, y),
    }


def together(model: Model, shape: tuple[int, ...]) -> Any:
    """Eager steps of members on one batch: by vmap, in chunks, and one by one by nn.Module."""
    x = machine.place(random.normal(random.key(1), shape))
    y = machine.place(random.randint(random.key(2), shape[:1], 0, 10))
    start, step = networks.pure_step(model, F.cross_entropy)

    def build() -> Any:
        return networks.mlp(64, 64, 10) if len(shape) == 2 else networks.Conv(1, 16, 32)

    def contenders(members: int) -> Contenders:
        params = vmap(model.init)(random.split(random.key(0), members))

        def pure(step: Callable[..., Any]) -> Callable[[], Contender]:
            return lambda: networks.pure(step, vmap(start)(networks.copied(params)), x, y)

        return {
            "funcnets": pure(vmap(step, (0, None, None))),
            "funcnets, chunk chosen": pure(chunked(step, "auto", (0, None, None))),
            "nn.Module one by one": lambda: ensembles.loop(
                build, networks.copied(params), x, y, False
            ),
        }

    return contenders


def doubling(first: int, last: int) -> list[int]:
    """first, twice that, ..., last."""
    return [first * 2**i for i in range(1 + round(math.log2(last / first)))]


def curves(quick: bool) -> dict[str, Curve]:
    """All that is measured; quick is short."""
    largest = 4 if quick else 256

    def wide(width: int) -> Model:
        return models.mlp(64, 10, (width, width))

    def deep(depth: int) -> Contenders:
        model = models.residual_mlp(64, 10, depth=depth)
        return single(model, lambda: networks.ResidualMLP(64, 10, depth), 32)

    def mlp(width: int, batch: int) -> Contenders:
        return single(wide(width), lambda: networks.mlp(64, width, width, 10), batch)

    return {
        "members, MLP": Curve(doubling(1, largest), together(models.mlp(64, 10, (64,)), (32, 64))),
        "members, conv net": Curve(
            doubling(1, largest),
            together(models.cnn(1, 10, (16, 32), norm=None), (16, 1, 16, 16)),
        ),
        "depth": Curve(doubling(2, 8 if quick else 128), deep),
        "batch": Curve(doubling(16, 64 if quick else 8192), lambda batch: mlp(256, batch)),
        "parameters": Curve(
            doubling(64, 128 if quick else 2048),
            lambda width: mlp(width, 64),
            lambda width: networks.count(wide(width).init(random.key(0))),
        ),
    }


def exponent(sizes: list[int], values: list[float]) -> float:
    """Of the power law through the larger half of the sizes."""
    half = len(sizes) // 2 if len(sizes) > 3 else 0
    pairs = [(math.log(s), math.log(v)) for s, v in zip(sizes, values, strict=True)][half:]
    x, y = zip(*pairs, strict=True)
    return statistics.linear_regression(x, y).slope


def measure(name: str, settings: Settings) -> list[Row]:
    """A row for the time and one for our memory, and how the others grow."""
    curve = curves(settings.quick)[name]
    work = [curve.work(size) for size in curve.sizes]
    times: dict[str, list[dict[str, float]]] = {}
    peaks: dict[str, list[dict[str, float]]] = {}
    for size in curve.sizes:
        held: dict[str, Contender] = {}  # those of the size before are let go of
        for contender, build in curve.contenders(size).items():
            before = memory.live()
            held[contender] = build()
            held[contender].step()
            if contender.startswith(OURS):  # a module's gradients are no objects of Python's
                own = memory.live() - before
                peak = own + memory.growth_within(held[contender].step)
                peaks.setdefault(contender, []).append({"bytes": peak})
        for contender, taken in timed(held, settings.rounds).items():
            times.setdefault(contender, []).append(spread(taken))
    rows = []
    for what, key, found in (("time", "median", times), ("memory", "bytes", peaks)):
        slopes = {
            contender: exponent(work, [one[key] for one in values])
            for contender, values in found.items()
        }
        row = Row(f"{what} against {name}", LINEAR, slopes[OURS], "exponent", ours=OURS)
        for contender, values in found.items():
            for size, one in zip(work, values, strict=True):
                row.contenders[f"{contender}, {size}"] = {"size": float(size)} | one
            if contender != OURS:
                row.notes[contender] = f"exponent {slopes[contender]:.2f}"
        rows.append(row)
    if (loop := times.get("nn.Module one by one")) is not None:
        medians = ([one["median"] for one in values] for values in (times[OURS], loop))
        rows[0].notes["vmap"] = crossing(curve.sizes, *medians)
    return rows


def crossing(sizes: list[int], ours: list[float], loop: list[float]) -> str:
    """From how many members on vmap takes longer than one by one, and where it is at its best."""
    place = len(sizes)
    while place and ours[place - 1] > loop[place - 1]:
        place -= 1
    best = min(range(len(sizes)), key=lambda i: ours[i] / sizes[i])
    stops = f"from {sizes[place]} members on" if place < len(sizes) else "nowhere here"
    return f"stops paying {stops}; takes the least time a member at {sizes[best]}"


def draw(rows: list[Row], path: Path) -> None:
    """A panel for each curve, on logarithmic axes; dashed is linear."""
    shown = [row for row in rows if row.unit == "exponent"]
    figure, panels = plt.subplots(
        2,
        (len(shown) + 1) // 2,
        figsize=(2.9 * ((len(shown) + 1) // 2), 5.6),
        squeeze=False,
        constrained_layout=True,
    )
    for i, row in enumerate(shown):
        axes = panels[i % 2][i // 2]  # time above memory
        series: dict[str, list[tuple[float, float]]] = {}
        for label, found in row.contenders.items():
            value = found["bytes"] / 1e6 if "bytes" in found else 1e3 * found["median"]
            series.setdefault(label.rpartition(",")[0], []).append((found["size"], value))
        for label, points in series.items():
            axes.loglog(*zip(*points, strict=True), marker=".", label=label)
        (first, _), (last, value) = series["funcnets"][0], series["funcnets"][-1]
        axes.loglog([first, last], [value * first / last, value], "k--", linewidth=0.7)
        axes.set_title(f"{row.workload}\nexponent {row.value:.2f}", fontsize=8)
        axes.set_ylabel("MB" if "memory" in row.workload else "ms", fontsize=8)
        if len(series) > 1:
            axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bound(name: str) -> Callable[[Settings], list[Row]]:
    return lambda settings: measure(name, settings)


WORKLOADS: Workloads = {name: _bound(name) for name in curves(True)}

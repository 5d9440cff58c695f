"""Depth chosen at build time: a trained network grown deeper and wider, and what depth costs.

A small ResNet learns scikit-learn's digits; then it is grown into one of twice the depth and width
that computes the same, which trains on. Beside it the big network is trained from the start for as
many epochs. Then a network of residual blocks is compiled at several depths, with its blocks
laid out one after the other and with its blocks stacked and scanned. Run it with
``uv run scripts/depth.py``; ``--help`` lists the flags.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest import mock

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tensordict import TensorDict
from torch import Tensor

import funcnets
from funcnets import models, optim, random, training, tree

SMALL = models.resnet(
    "basic", (1, 1), 10, in_channels=1, width=8, stem="small", stochastic_depth=0.1
)
BIG = models.resnet(
    "basic", (2, 2), 10, in_channels=1, width=16, stem="small", stochastic_depth=0.1
)


class Digits(NamedTuple):
    """Images [samples, 1, 8, 8] between 0 and 1 and labels, four fifths and one fifth."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


class Phase(NamedTuple):
    """A network after some epochs: parameters, and by epoch test accuracy and seconds spent."""

    params: TensorDict
    accuracy: list[float]
    seconds: list[float]


def read_digits(seed: int) -> Digits:
    """The digits, split the same for every class."""
    digits = load_digits()
    train_x, test_x, train_y, test_y = train_test_split(
        digits.images / 16, digits.target, test_size=0.2, stratify=digits.target, random_state=seed
    )
    images = [torch.from_numpy(x).float()[:, None] for x in (train_x, test_x)]
    return Digits(images[0], torch.from_numpy(train_y), images[1], torch.from_numpy(test_y))


def train(
    model: funcnets.Model, params: TensorDict, digits: Digits, epochs: int, key: random.Key
) -> Phase:
    """Trains for some epochs with AdamW, its rate falling to zero along half a cosine."""
    batches = training.minibatches((digits.train_x, digits.train_y), 64, drop_last=True)
    rate = optim.schedules.cosine(3e-3, epochs * (len(digits.train_x) // 64))
    optimizer = optim.adamw(rate, weight_decay=0.05)
    step = training.make_step(model, F.cross_entropy, optimizer, nonfinite=None)

    def evaluate(state: training.State) -> dict[str, Any]:
        test, scores = [(digits.test_x, digits.test_y)], {"accuracy": training.accuracy}
        return training.evaluate(model.apply, training.parameters(state), test, scores)

    state, history = training.fit(
        step, step.init(params, key), batches, epochs=epochs, evaluate=evaluate
    )
    return Phase(
        training.parameters(state),
        [record["evaluation"]["accuracy"] for record in history],
        [record["seconds"] for record in history],
    )


def grow_and_train(digits: Digits, epochs: int, key: random.Key) -> tuple[dict[str, Phase], float]:
    """The small network, the same grown, the big from the start; what growing changed at most."""
    small_key, big_key, grow_key, train_key = random.split(key, 4)
    small = train(SMALL, SMALL.init(small_key), digits, epochs, train_key)
    grown = funcnets.grow(SMALL, small.params, BIG, grow_key)
    with torch.no_grad():
        before = SMALL.apply(small.params, digits.test_x)
        change = (BIG.apply(grown, digits.test_x) - before).abs().max().item()
    on_key = random.fold_in(train_key, 1)
    phases = {
        "small": small,
        "grown": train(BIG, grown, digits, epochs, on_key),
        "big from the start": train(BIG, BIG.init(big_key), digits, 2 * epochs, train_key),
    }
    return phases, change


def compile_times(depths: list[int], backend: str) -> dict[str, list[tuple[float, float]]]:
    """Seconds to the first gradient and to a later one, at each depth, by the way of the blocks."""
    x, y = torch.ones(32, 16), torch.zeros(32, dtype=torch.int64)
    found: dict[str, list[tuple[float, float]]] = {"laid out": [], "stacked and scanned": []}
    first_and_later("none", 1, x, y, backend)  # what happens once in a process
    with Progress() as progress:
        bar = progress.add_task("compiling", total=2 * len(depths))
        for share, times in zip(("none", "stacked"), found.values(), strict=True):
            for depth in depths:
                times.append(first_and_later(share, depth, x, y, backend))
                progress.update(bar, advance=1)
    return found


def first_and_later(
    share: Any, depth: int, x: Tensor, y: Tensor, backend: str
) -> tuple[float, float]:
    """Seconds that the first call of a compiled gradient takes, and the median of nine later."""
    model = models.residual_mlp(16, 10, width=64, depth=depth, share=share)
    params = model.init(random.key(depth))

    def loss(params: TensorDict, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model.apply(params, x), y)

    gradient = funcnets.compile(funcnets.grad(loss), backend=backend)
    seconds = []
    # A folder of its own: in the common one torch would find what it has compiled before.
    with (
        TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder),
    ):
        for _ in range(10):
            begin = time.perf_counter()
            gradient(params, x, y)
            seconds.append(time.perf_counter() - begin)
    return seconds[0], sorted(seconds[1:])[4]


def show(console: Console, phases: dict[str, Phase], change: float) -> None:
    """The table of the three networks."""
    table = Table(title="digits, 20 % held out")
    for column in ("", "parameters", "epochs", "seconds", "accuracy %"):
        table.add_column(column, justify="left" if not column else "right")
    spent, done = 0.0, 0
    for name, phase in phases.items():
        more = name == "grown"  # what the small one took counts for the grown one
        spent = phase.seconds[-1] + (spent if more else 0.0)
        done = len(phase.accuracy) + (done if more else 0)
        count = tree.count(tree.partition(phase.params)[0])
        table.add_row(
            name, f"{count:,}", str(done), f"{spent:.1f}", f"{100 * phase.accuracy[-1]:.2f}"
        )
    console.print(table)
    console.print(f"growing changed no logit by more than {change:.1e}")


def draw(
    path: Path,
    phases: dict[str, Phase],
    depths: list[int],
    times: dict[str, list[tuple[float, float]]],
) -> None:
    """Accuracy by the time spent; seconds to compile and to run by depth."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    begun = 0.0
    for i, (name, phase) in enumerate(phases.items()):
        begun = phases["small"].seconds[-1] if name == "grown" else 0.0
        axes[0].plot(
            [begun + second for second in phase.seconds],
            [100 - 100 * value for value in phase.accuracy],
            color=f"C{i}",
            label=name,
        )
    axes[0].axvline(phases["small"].seconds[-1], color="black", lw=1, ls="--")
    axes[0].set(xlabel="seconds of training", ylabel="test error, %", yscale="log")
    axes[0].legend()
    for i, (name, points) in enumerate(times.items()):
        first, later = zip(*points, strict=True)
        axes[1].plot(depths, first, "o-", color=f"C{i}", label=name)
        axes[2].plot(depths, [1e3 * value for value in later], "o-", color=f"C{i}", label=name)
    axes[1].set(
        xlabel="blocks", ylabel="seconds to the first gradient", xscale="log", ylim=(0, None)
    )
    axes[2].set(xlabel="blocks", ylabel="milliseconds of a gradient", xscale="log", yscale="log")
    for panel in axes[1:]:
        panel.set_xticks(depths, [str(depth) for depth in depths])
        panel.minorticks_off()
        panel.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Trains, grows, compiles, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10, help="of each half of the training")
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/depth"))
    flags = parser.parse_args()
    console = Console()

    phases, change = grow_and_train(read_digits(flags.seed), flags.epochs, random.key(flags.seed))
    show(console, phases, change)

    times = compile_times(flags.depths, flags.backend)
    table = Table(title="a gradient through residual blocks, compiled")
    for column in ("blocks", *(f"{name}: {what}" for name in times for what in ("first", "later"))):
        table.add_column(column, justify="right")
    for i, depth in enumerate(flags.depths):
        cells = [
            (f"{first:.1f} s", f"{1e3 * later:.2f} ms")
            for first, later in (t[i] for t in times.values())
        ]
        table.add_row(str(depth), *(cell for pair in cells for cell in pair))
    console.print(table)
    flags.output.mkdir(parents=True, exist_ok=True)
    draw(flags.output / "depth.png", phases, flags.depths, times)
    console.print(f"figure in {flags.output}")


if __name__ == "__main__":
    main()

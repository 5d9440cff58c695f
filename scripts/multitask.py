"""Several inputs and several outputs on Omniglot: who drew it is new, what it is has to be told.

From an image, its character (of 242) and its alphabet (of 8): two heads on one encoder, trained by
losses that are weighed in several ways. And from an image with its alphabet, its character: two
encoders, fused in several ways, with the alphabet known or not. Five of the twenty people who drew
each alphabet are kept for testing. Run it with ``uv run scripts/multitask.py``; ``--help`` lists
the flags.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import torchvision
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tensordict import TensorDict
from torch import Tensor

from funcnets import Model, data, losses, models, optim, random, training
from funcnets.models.multimodal import Fusion

Losses = dict[str, Tensor]

SIZE = 20  # of the images, in pixels
TASKS = ("character", "alphabet")


def mean(each: Losses) -> Losses:
    """Losses [] of losses [batch]."""
    return {name: loss.mean() for name, loss in each.items()}


# From the log-variances (which only the last one reads) and the losses of each sample to one loss.
WEIGHTINGS: dict[str, Callable[[TensorDict, Losses], Tensor]] = {
    "sum": lambda _, each: losses.weighted_sum(mean(each)),
    "fixed, 1 and 0.3": lambda _, each: losses.weighted_sum(
        mean(each), {"character": 1, "alphabet": 0.3}
    ),
    "summing to one, 1 : 3": lambda _, each: losses.weighted_sum(
        mean(each), {"character": 1, "alphabet": 3}, normalize=True
    ),
    "by the largest in the batch": lambda _, each: losses.weighted_sum(
        losses.scale_by_largest(each)
    ),
    "learned uncertainty": lambda params, each: losses.uncertainty(params, mean(each)),
}
FUSIONS: tuple[Fusion, ...] = ("concat", "sum", "gated", "attention")


class Data(NamedTuple):
    """Images [samples, 1, size, size] and what is known of them by name, each [samples]."""

    images: Tensor
    labels: dict[str, Tensor]


def read(path: Path) -> tuple[Data, Data, tuple[int, int]]:
    """Training and test data, of other drawers, and the numbers of characters and alphabets."""
    found = data.omniglot(path, size=(SIZE, SIZE))
    labels = {"character": found.characters, "alphabet": found.alphabets}

    def chosen(which: Tensor) -> Data:
        return Data(found.images[which], {name: label[which] for name, label in labels.items()})

    held_out = found.drawers >= 15
    sizes = len(found.character_names), len(found.alphabet_names)
    return chosen(~held_out), chosen(held_out), sizes


def encoder() -> Model:
    """From images to 128 features."""
    return models.cnn(1, 128, widths=(16, 32, 128))


def shift(key: random.Key, images: Tensor) -> Tensor:
    """Images [batch, 1, size, size], each moved by up to two pixels in either direction."""
    down, right = random.randint(key, (2, len(images), 1), 0, 5)
    rows, columns = down + torch.arange(SIZE), right + torch.arange(SIZE)
    sample = torch.arange(len(images))[:, None, None, None]
    padded = F.pad(images, (2, 2, 2, 2))
    return padded[sample, 0, rows[:, None, :, None], columns[:, None, None, :]]


def train(
    model: Model,
    weighting: Callable[[TensorDict, Losses], Tensor],
    known: Data,
    *,
    steps: int,
    key: random.Key,
    advance: Callable[[], None],
) -> tuple[TensorDict, list[dict[str, float]]]:
    """The trained parameters, and the weights that uncertainty gives each task after each step.

    Where the alphabet is an input, it is hidden from a random half of each batch.
    """
    init_key, run_key = random.split(key)
    optimizer = optim.adamw(
        optim.schedules.one_cycle(1e-2, steps=steps),
        weight_decay=0.05,
        where=lambda path, leaf: leaf.ndim > 1,
    )
    heads = [name for name, _ in model.config.heads]

    def loss(
        params: TensorDict, batch: Data, key: random.Key
    ) -> tuple[Tensor, dict[str, Tensor], TensorDict]:
        shift_key, hide_key = random.split(key)
        inputs = {"image": shift(shift_key, batch.images)}
        present = {}
        if "alphabet" in model.config.inputs:
            inputs["alphabet"] = batch.labels["alphabet"]
            present["alphabet"] = random.bernoulli(hide_key, (len(batch.images),))
        outputs, buffers = model.apply(params["network"], inputs, present, train=True)
        each = {
            name: F.cross_entropy(outputs[name], batch.labels[name], reduction="none")
            for name in heads
        }
        return weighting(params["weighting"], each), {}, TensorDict({"network": buffers})

    learned = []

    def note(state: training.State, record: dict[str, Any]) -> None:
        variances = state.params["weighting", "log_variance"]
        learned.append({name: float((-variances[name]).exp()) for name in TASKS})
        advance()

    step = training.make_step(None, loss, optimizer, nonfinite=None)
    weights = losses.init_uncertainty(init_key, TASKS)
    params = TensorDict({"network": model.init(init_key), "weighting": weights})
    state, _ = training.fit(
        step,
        step.init(params, run_key),
        training.minibatches(known, 64, drop_last=True),
        steps=steps,
        every=1,
        callbacks=[note],
        progress=False,
    )
    return training.parameters(state)["network"], learned


def accuracy(model: Model, params: TensorDict, test: Data, hidden: bool = False) -> Losses:
    """The share of right answers of each head; hidden: without the alphabet as an input."""
    inputs = {"image": test.images, "alphabet": test.labels["alphabet"]}
    inputs = {name: inputs[name] for name in model.config.inputs}
    outputs = model.apply(params, inputs, {"alphabet": False} if hidden else {})
    return {
        name: (logits.argmax(-1) == test.labels[name]).float().mean()
        for name, logits in outputs.items()
    }


def show(console: Console, title: str, columns: list[str], rows: dict[str, list[Any]]) -> None:
    """A table of accuracies."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="right" if table.columns else "left")
    for name, row in rows.items():
        table.add_row(name, *("" if cell is None else f"{100 * cell:.1f}" for cell in row))
    console.print(table)


def draw(
    path: Path,
    weightings: dict[str, list[Any]],
    fusions: dict[str, list[Any]],
    learned: list[dict[str, float]],
) -> None:
    """Both tables as points, and the weights that uncertainty gave."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    panels = (
        (left, weightings, ("character", "alphabet"), "from the image"),
        (middle, fusions, ("alphabet known", "alphabet hidden"), "character, by fusion"),
    )
    for axes, rows, columns, title in panels:
        for column, color, marker in zip(columns, ("tab:blue", "tab:orange"), "os", strict=True):
            cells = [row[columns.index(column)] for row in rows.values()]
            places = [i for i, cell in enumerate(cells) if cell is not None]
            heights = [100 * float(cells[i]) for i in places]
            axes.plot(heights, places, marker, color=color, label=column)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
        axes.set(xlabel="accuracy on drawers kept apart, %", title=title)
        axes.legend()
    for name in TASKS:
        right.plot([weights[name] for weights in learned], label=name)
    right.set(xlabel="step", ylabel="weight 1 / variance", title="learned uncertainty")
    right.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Trains, compares and draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, help="Omniglot's zip files or folders; by default it is downloaded"
    )
    parser.add_argument("--steps", type=int, default=600, help="of each of the eleven networks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/multitask"))
    flags = parser.parse_args()
    console = Console()

    path = flags.data
    if path is None:
        path = Path("data/omniglot-py/images_background")
        torchvision.datasets.Omniglot(path.parents[1], download=True)
    known, test, (characters, alphabets) = read(path)
    heads = {"character": characters, "alphabet": alphabets}
    console.print(
        f"{len(known.images)} drawings to train on, {len(test.images)} by others to test with; "
        f"{characters} characters of {alphabets} alphabets"
    )

    image = {"image": encoder()}
    both = {**image, "alphabet": models.embedding(alphabets, 128)}
    add = WEIGHTINGS["sum"]
    runs: dict[str, tuple[Model, Callable[[TensorDict, Losses], Tensor]]] = {
        f"{task} alone": (models.multimodal(image, {task: heads[task]}), add) for task in TASKS
    }
    for name, weighting in WEIGHTINGS.items():
        runs[name] = models.multimodal(image, heads), weighting
    for fusion in FUSIONS:
        model = models.multimodal(both, {"character": characters}, fusion=fusion, attention_heads=4)
        runs[f"fusion by {fusion}"] = model, add

    found: dict[str, Losses] = {}
    hidden: dict[str, Losses] = {}
    curves: dict[str, list[dict[str, float]]] = {}
    begin = time.perf_counter()
    with Progress(console=console) as progress:
        bar = progress.add_task("", total=len(runs) * flags.steps)
        for name, (model, weighting) in runs.items():
            progress.update(bar, description=name)
            params, curves[name] = train(
                model,
                weighting,
                known,
                steps=flags.steps,
                key=random.key(flags.seed),
                advance=lambda: progress.advance(bar),
            )
            found[name] = accuracy(model, params, test)
            if "alphabet" in model.config.inputs:
                hidden[name] = accuracy(model, params, test, hidden=True)
    seconds = time.perf_counter() - begin

    alone = [found[f"{task} alone"][task] for task in TASKS]
    weightings = {"a network for each": alone}
    weightings |= {name: [found[name][task] for task in TASKS] for name in WEIGHTINGS}
    fusions: dict[str, list[Any]] = {"image alone": [None, alone[0]]}
    for fusion in FUSIONS:
        name = f"fusion by {fusion}"
        fusions[fusion] = [found[name]["character"], hidden[name]["character"]]
    show(console, "image to character and alphabet, accuracy in %", ["", *TASKS], weightings)
    show(
        console,
        "image and alphabet to character, accuracy in %",
        ["", "alphabet known", "alphabet hidden"],
        fusions,
    )
    error = 100 * (float(alone[0]) * (1 - float(alone[0])) / len(test.images)) ** 0.5
    console.print(f"standard error about {error:.1f}; {len(runs)} networks in {seconds:.0f} s")
    flags.output.mkdir(parents=True, exist_ok=True)
    draw(flags.output / "multitask.png", weightings, fusions, curves["learned uncertainty"])
    console.print(f"figure in {flags.output}")


if __name__ == "__main__":
    main()

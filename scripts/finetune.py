"""A network that knows the characters of some alphabets learns those of others from few drawings.

A small residual network is trained on one of Omniglot's two "minimal" sets, then moved to the
alphabets that only the other set has, of which a few of the twenty drawers are for training and the
rest for testing. Five ways to go there are compared: a new head on frozen features, unfrozen layer
by layer, low-rank overlays (LoRA), all at once with rates by depth, and from scratch. Run it with
``uv run scripts/finetune.py``; ``--help`` lists the flags.
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
from rich.console import Console
from rich.table import Table
from tensordict import TensorDict
from torch import Tensor
from torchvision.datasets.omniglot import Omniglot as Downloads
from torchvision.datasets.utils import download_url

from funcnets import Model, data, finetuning, models, optim, random, training, tree
from funcnets.tree.select import Where

SETS = ("small1", "small2")
SIZE, BATCH, RANK = 28, 64, 8
DEPTHS = ("layer3", "layer2", "layer1")  # below the head, from the top down
ADAPTED = "layer*.conv?.weight"


class Drawings(NamedTuple):
    """Images [samples, 1, SIZE, SIZE] and their characters [samples]."""

    images: Tensor
    labels: Tensor


class Way(NamedTuple):
    """One way to the other characters: what is trained, from where, and how."""

    model: Model
    params: Any
    optimizer: optim.Optimizer
    trainable: Where | None = None


class Outcome(NamedTuple):
    """What came of it: accuracies on the test drawers by step, and what it took."""

    accuracies: dict[int, float]
    trained: int  # parameters
    seconds: float


def network(classes: int) -> Model:
    """The classifier, small enough for one core: 78 thousand parameters below its head."""
    return models.resnet("basic", (1, 1, 1), classes, in_channels=1, width=16, stem="small")


def redraw(key: random.Key, images: Tensor) -> Tensor:
    """The images, each a little turned, sheared, stretched and moved."""
    bend, move = random.split(key).unbind()
    matrix = torch.eye(2) + random.normal(bend, (len(images), 2, 2), std=0.1)
    offset = random.uniform(move, (len(images), 2, 1), -0.15, 0.15)
    grid = F.affine_grid(torch.cat([matrix, offset], 2), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def train(
    way: Way, known: Drawings, steps: int, key: random.Key, test: Drawings | None = None
) -> tuple[Any, Outcome]:
    """The whole tree of the trained network, and the outcome, tested ten times on the way."""

    def loss(params: Any, batch: Drawings, key: random.Key) -> tuple[Tensor, dict[str, Any], Any]:
        shape_key, network_key = random.split(key).unbind()
        images, labels = batch
        logits, buffers = way.model.apply(
            params, redraw(shape_key, images), train=True, key=network_key
        )
        return F.cross_entropy(logits, labels), {}, buffers

    def evaluate(state: training.State) -> dict[str, Tensor]:
        batches = zip(test.images.split(256), test.labels.split(256), strict=True)  # type: ignore[union-attr]
        params = training.parameters(state)
        return training.evaluate(
            way.model.apply, params, list(batches), {"accuracy": training.accuracy}
        )

    begin = time.perf_counter()
    step = training.make_step(None, loss, way.optimizer, trainable=way.trainable)
    state = step.init(way.params, key)
    batches = training.minibatches(known, min(BATCH, len(known.labels)), drop_last=True)
    state, history = training.fit(
        step,
        state,
        batches,
        steps=steps,
        every=max(1, steps // 10),
        evaluate=None if test is None else evaluate,
    )
    accuracies = {record["step"]: record["evaluation"]["accuracy"] for record in history if test}
    trained = tree.count(state.params)
    return training.parameters(state), Outcome(accuracies, trained, time.perf_counter() - begin)


def ways(known: TensorDict, classes: int, steps: int, key: random.Key) -> dict[str, Way]:
    """The five ways, from the parameters of a trained network."""
    model = network(classes)
    init_key, lora_key = random.split(key).unbind()
    fresh = model.init(init_key)
    # All but the head is taken over; the report has the places that kept their fresh values.
    params, report = tree.transfer(tree.partition(known, "fc")[1], fresh)
    assert sorted(report.missing) == ["fc.bias", "fc.weight"]

    def adamw(rate: float) -> optim.Optimizer:
        schedule = optim.schedules.one_cycle(rate, steps, warmup_fraction=0.1)
        return optim.adamw(schedule, weight_decay=0.05, where=lambda path, leaf: leaf.ndim > 1)

    still = finetuning.frozen_statistics(model)
    starts: dict[Where, int] = {name: (i + 1) * steps // 5 for i, name in enumerate(DEPTHS)}
    starts["conv1"] = starts["bn1"] = 4 * steps // 5
    rates: dict[Where, float] = {name: 0.5 ** (i + 1) for i, name in enumerate((*DEPTHS, "conv1"))}
    rates["bn1"] = rates["conv1"]
    overlay = finetuning.init_lora(lora_key, params, ADAPTED, RANK)
    return {
        "new head, features frozen": Way(still, params, adamw(1e-2), "fc"),
        "unfrozen layer by layer": Way(model, params, finetuning.unfreezing(adamw(5e-3), starts)),
        f"LoRA of rank {RANK} and new head": Way(
            finetuning.lora(still, ADAPTED, RANK),
            TensorDict({"base": params, "lora": overlay}),
            adamw(1e-2),
            ("lora", "base.fc"),
        ),
        "all at once, rates by depth": Way(
            model, params, optim.chain(adamw(1e-2), optim.scale_by_path(rates))
        ),
        "from scratch": Way(model, fresh, adamw(1e-2)),
    }


def read(folder: Path, name: str) -> data.Omniglot:
    """One of the small sets, downloaded where it is not there."""
    file = f"images_background_{name}.zip"
    if not (folder / file).exists():
        download_url(f"{Downloads.download_url_prefix}/{file}", folder)
    return data.omniglot(folder / file, size=(SIZE, SIZE))


def split(
    known: data.Omniglot, other: data.Omniglot, drawers: int
) -> tuple[Drawings, Drawings, tuple[str, ...]]:
    """Of the alphabets that only the other set has: training and test drawings, and their names."""
    names = tuple(n for n in other.alphabet_names if n not in known.alphabet_names)
    places = torch.tensor([other.alphabet_names.index(name) for name in names])
    new = torch.isin(other.alphabets, places)
    labels = other.characters[new].unique(return_inverse=True)[1]
    few = other.drawers[new] < drawers
    images = other.images[new]
    return Drawings(images[few], labels[few]), Drawings(images[~few], labels[~few]), names


def show(console: Console, title: str, found: dict[str, Outcome], samples: int) -> None:
    """The table of accuracies."""
    table = Table(title=title)
    for column in ("", "accuracy %", "parameters trained", "seconds"):
        table.add_column(column, justify="left" if not column else "right")
    for name, outcome in found.items():
        last = 100 * list(outcome.accuracies.values())[-1]
        table.add_row(name, f"{last:.1f}", f"{outcome.trained:,}", f"{outcome.seconds:.0f}")
    console.print(table)
    console.print(f"standard error {50 / samples**0.5:.1f} or less, of {samples} test drawings")


def draw(path: Path, found: dict[str, Outcome], samples: int) -> None:
    """Accuracy by step, and the last one by how many parameters were trained."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    for i, (name, outcome) in enumerate(found.items()):
        steps, heights = zip(*outcome.accuracies.items(), strict=True)
        percent = [100 * height for height in heights]
        left.plot(steps, percent, "o-", ms=3, label=name)
        error = 100 * (heights[-1] * (1 - heights[-1]) / samples) ** 0.5
        # Side by side, where several train all parameters.
        place = outcome.trained * 1.04**i
        right.errorbar(place, percent[-1], yerr=error, fmt="o", capsize=3)
    left.set(xlabel="step", ylabel="accuracy on the other drawers / %", ylim=(0, 100))
    left.legend(fontsize=8)
    right.set(xscale="log", xlabel="parameters trained", ylabel="accuracy / %", title="at the end")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Trains, moves on in five ways, compares and draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("outputs/omniglot"), help="of the zips")
    parser.add_argument("--train-set", choices=SETS, default="small1", help="to begin with")
    parser.add_argument("--first-steps", type=int, default=1500, help="on that set")
    parser.add_argument("--steps", type=int, default=400, help="of each way to the other set")
    parser.add_argument("--drawers", type=int, default=5, help="of 20, to learn the others from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/finetune"))
    flags = parser.parse_args()
    if not 0 < flags.drawers < 20:
        parser.error("--drawers: expected 1 to 19")
    console = Console()

    known = read(flags.data, flags.train_set)
    other = read(flags.data, SETS[1 - SETS.index(flags.train_set)])
    few, test, names = split(known, other, flags.drawers)
    first_key, ways_key, run_key, init_key = random.split(random.key(flags.seed), 4).unbind()
    model = network(len(known.character_names))
    rate: Callable[..., Any] = optim.schedules.one_cycle(1e-2, flags.first_steps)
    first = Way(model, model.init(init_key), optim.adamw(rate, weight_decay=0.05))
    params, outcome = train(
        first, Drawings(known.images, known.characters), flags.first_steps, first_key
    )
    console.print(
        f"{len(known.images)} drawings of {len(known.character_names)} characters "
        f"learned in {outcome.seconds:.0f} s"
    )
    classes = int(test.labels.max()) + 1
    console.print(
        f"moved to {classes} characters of {', '.join(names)}: {len(few.labels)} drawings to train "
        f"on, {len(test.labels)} by others to test with"
    )
    found = {}
    for name, way in ways(params, classes, flags.steps, ways_key).items():
        found[name] = train(way, few, flags.steps, run_key, test)[1]
    show(console, f"{flags.drawers} drawings of each character", found, len(test.labels))
    flags.output.mkdir(parents=True, exist_ok=True)
    draw(flags.output / "finetune.png", found, len(test.labels))
    console.print(f"figure in {flags.output}")


if __name__ == "__main__":
    main()

"""Overfit one sample, then one batch, then the training set: for a network that will not learn.

Each stage rules out a class of mistakes. One sample that is not learned means that the loss, the
gradients or the update are wrong; one batch, that samples are mixed up or the network cannot tell
them apart; the training set, that it is too small, or trained too briefly or at a wrong rate. The
norms of the gradients by layer say where to look. Run it with
``uv run scripts/overfit_one.py --model cnn``; ``--help`` lists the flags, and `overfit` takes any
model and data.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from einops import rearrange
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor

from funcnets import Model, grad_and_value, models, optim, random, training, tree

BATCH = 32
NEAR_ZERO = 0.02  # of a cross-entropy that begins at log(classes)

# Of each family one small network, and how it reads images [batch, 1, 8, 8].
FAMILIES: dict[str, tuple[Callable[[], Model], str]] = {
    "mlp": (lambda: models.mlp(64, 10, (128, 128)), "b 1 h w -> b (h w)"),
    "residual_mlp": (lambda: models.residual_mlp(64, 10, 64, depth=4), "b 1 h w -> b (h w)"),
    "cnn": (lambda: models.cnn(1, 10, (16, 32)), "b 1 h w -> b 1 h w"),
    "resnet": (
        lambda: models.resnet("basic", (1, 1), 10, in_channels=1, width=16, stem="small"),
        "b 1 h w -> b 1 h w",
    ),
    "vit": (lambda: models.vit(8, 2, 2, 4, 32, 10, in_channels=1), "b 1 h w -> b 1 h w"),
    "recurrent": (lambda: models.recurrent(8, 10, 64), "b 1 h w -> b h w"),
}


class Stage(NamedTuple):
    """What became of one stage.

    Attributes:
        losses: of the steps; of one sample or batch that of these, else of each minibatch.
        steps: how many it took until the loss was near zero; None where it did not get there.
        before: norm of the gradient over that of the parameters, by layer, at the beginning.
        after: the same at the end.
    """

    name: str
    losses: list[float]
    steps: int | None
    before: dict[str, float]
    after: dict[str, float]


ADVICE = {
    "one sample": "Not even one sample is learned: look at the rate, the sign of the update, a "
    "loss that does not see the outputs, and layers without a gradient below.",
    "one batch": "One sample is learned, but not a batch: are inputs and targets of one sample "
    "together, and do different inputs give different outputs? Else the rate is too large.",
    "training set": "A batch is learned, but not the training set: a larger network, more steps, a "
    "rate that falls, less regularisation; or the labels contradict each other.",
}


def overfit(
    model: Model,
    inputs: Tensor,
    labels: Tensor,
    key: random.Key,
    *,
    rate: float | Tensor = 3e-3,
    steps: int = 300,
    epochs: int = 15,
) -> list[Stage]:
    """The three stages, up to the first that fails.

    Args:
        model: of logits [batch, classes]; each stage begins with new parameters, the same ones.
        steps: at most so many for one sample and for one batch.
        epochs: at most so many over all.
    """
    init_key, run_key, choice_key = random.split(key, 3).unbind()
    order = random.permutation(choice_key, len(labels))
    params = model.init(init_key)
    stages = []
    for name in ADVICE:
        chosen = {"one sample": order[:1], "one batch": order[:BATCH]}.get(name, order)
        known = inputs[chosen], labels[chosen]
        limit = steps if len(chosen) <= BATCH else epochs * math.ceil(len(chosen) / BATCH)
        stages.append(_stage(name, model, params, known, run_key, rate, limit))
        if stages[-1].steps is None:
            break
    return stages


def _stage(
    name: str,
    model: Model,
    params: Any,
    known: tuple[Tensor, Tensor],
    key: random.Key,
    rate: float | Tensor,
    limit: int,
) -> Stage:
    """Trains until the loss, for a stage of many batches the mean over an epoch, is near zero."""
    step = training.make_step(model, F.cross_entropy, optim.adam(rate), nonfinite=None)
    state = step.init(params, key)
    batches = training.minibatches(known, min(BATCH, len(known[1])), drop_last=True)
    window = len(batches(key))
    losses: list[float] = []
    took = None
    for turn in training.turns(batches, state.key):
        state, metrics = step(state, turn.batch)
        losses.append(float(metrics["loss"]))
        recent = losses[-window:]
        if len(recent) == window and sum(recent) / window < NEAR_ZERO:
            took = len(losses)
        if took is not None or len(losses) == limit or not math.isfinite(losses[-1]):
            break
    some = known[0][:BATCH], known[1][:BATCH]
    last = training.parameters(state)
    return Stage(name, losses, took, relative(model, params, some), relative(model, last, some))


def relative(model: Model, params: Any, batch: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Norm of the gradient over that of the parameters, by layer; infinite where they are zero."""
    trainable, buffers = tree.partition(params)

    def loss(trainable: Any) -> Tensor:
        outputs, _ = model.apply(
            tree.merge(trainable, buffers), batch[0], train=True, key=random.key(0)
        )
        return F.cross_entropy(outputs, batch[1])

    gradients, _ = grad_and_value(loss)(trainable)
    layers: dict[str, list[tuple[Tensor, Tensor]]] = {}
    values = dict(tree.leaves_with_path(trainable))
    for path, gradient in tree.leaves_with_path(gradients):
        layers.setdefault(tree.join(path[:-1]), []).append((gradient, values[path]))
    found = {}
    for layer, pairs in layers.items():
        slope, size = (tree.global_norm(list(column)) for column in zip(*pairs, strict=True))
        found[layer] = float(slope / size) if slope > 0 else 0.0
    return found


def findings(stages: list[Stage]) -> list[str]:
    """What the stages mean, in sentences."""
    said = []
    last = stages[-1]
    if not math.isfinite(last.losses[-1]):
        said.append(
            f"{last.name}: the loss is not finite in step {len(last.losses)}: a smaller rate."
        )
    elif last.steps is None:
        said.append(ADVICE[last.name])
    else:
        said.append("All three are learned: the network, its loss and its gradients are sound.")
    stage = stages[min(1, len(stages) - 1)]  # one batch, where it got there
    before = stage.before
    # At the end, too: below a head that begins with zeros there is no gradient at first.
    none = [layer for layer, norm in before.items() if norm == stage.after[layer] == 0]
    if none:
        said.append(f"No gradient reaches {', '.join(none)}: cut off, dead, or of no use.")
    norms = [norm for norm in before.values() if 0 < norm < math.inf]
    if norms and max(norms) > 1e4 * min(norms):
        least = min((norm, layer) for layer, norm in before.items() if norm > 0)[1]
        said.append(
            f"The gradients differ by {max(norms) / min(norms):.0e}, least at {least}: they vanish "
            "or explode on the way; norms, skip connections or another initialisation help."
        )
    return said


def show(console: Console, title: str, stages: list[Stage]) -> None:
    """The stages, the gradients by layer, and what they mean."""
    table = Table(title=title)
    for column in ("", "first loss", "last loss", f"steps to {NEAR_ZERO}"):
        table.add_column(column, justify="right" if column else "left")
    for stage in stages:
        steps = "not reached" if stage.steps is None else str(stage.steps)
        table.add_row(stage.name, f"{stage.losses[0]:.3g}", f"{stage.losses[-1]:.2g}", steps)
    console.print(table)
    table = Table(title="gradient / parameters, by layer: first and last of each stage")
    table.add_column("layer", overflow="fold")
    for stage in stages:
        table.add_column(stage.name, justify="right")
    for layer in stages[0].before:
        cells = (f"{stage.before[layer]:.1e}, {stage.after[layer]:.1e}" for stage in stages)
        table.add_row(layer, *cells)
    console.print(table)
    for sentence in findings(stages):
        console.print(sentence, style="bold")


def draw(path: Path, stages: list[Stage]) -> None:
    """The losses of the stages."""
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained", sharey=True)
    for axes, name in zip(panels, ADVICE, strict=True):
        axes.set(title=name, xlabel="step")
        axes.axhline(NEAR_ZERO, color="black", lw=0.8, ls="--")
        for stage in stages:
            if stage.name == name:
                losses = torch.tensor(stage.losses)
                width = max(1, len(losses) // 50)
                means = losses.unfold(0, width, 1).mean(1)
                axes.plot(range(1, len(losses) + 1), losses, color="tab:blue", alpha=0.3, lw=0.8)
                axes.plot(range(width, len(losses) + 1), means, color="tab:blue")
    panels[0].set(ylabel="loss", yscale="log")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Overfits a network of a family on scikit-learn's digits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=FAMILIES, default="cnn")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--steps", type=int, default=300, help="at most, for a sample or a batch")
    parser.add_argument("--epochs", type=int, default=30, help="at most, for the training set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/overfit_one"))
    flags = parser.parse_args()
    make, pattern = FAMILIES[flags.model]
    digits = load_digits()
    inputs = rearrange(torch.from_numpy(digits.images / 16).float(), "b h w -> b 1 h w")
    labels = torch.from_numpy(digits.target)
    stages = overfit(
        make(),
        rearrange(inputs, pattern),
        labels,
        random.key(flags.seed),
        rate=flags.rate,
        steps=flags.steps,
        epochs=flags.epochs,
    )
    console = Console()
    show(console, f"{flags.model} on scikit-learn's digits", stages)
    flags.output.mkdir(parents=True, exist_ok=True)
    draw(flags.output / f"{flags.model}.png", stages)
    console.print(f"figure in {flags.output}")


if __name__ == "__main__":
    main()

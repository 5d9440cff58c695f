"""An ensemble of small convolutional networks on scikit-learn's digits, from data to figure.

Eight networks are made by one vmap, trained together by one vmapped step, and compared with a
support vector machine on the same split. Run it with ``uv run scripts/quickstart.py``; ``--help``
lists the flags.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from tensordict import TensorDict
from torch import Tensor
from torch.func import vmap

import funcnets
from funcnets import losses, models, optim, random, training

model = models.cnn(in_channels=1, num_classes=10, widths=(32, 64), dropout=0.1)


def shift(key: random.Key, images: Tensor) -> Tensor:
    """Images [batch, 1, 8, 8], each moved by up to one pixel in either direction."""
    down, right = random.randint(key, (2, len(images), 1), 0, 3)
    rows, columns = down + torch.arange(8), right + torch.arange(8)
    sample = torch.arange(len(images))[:, None, None, None]
    padded = F.pad(images, (1, 1, 1, 1))
    return padded[sample, 0, rows[:, None, :, None], columns[:, None, None, :]]


def loss(
    params: TensorDict, batch: tuple[Tensor, Tensor], key: random.Key
) -> tuple[Tensor, dict[str, Tensor], TensorDict]:
    """Cross-entropy of a batch, no further metrics, and the new running statistics."""
    images, labels = batch
    shift_key, dropout_key = random.split(key)
    logits, buffers = model.apply(params, shift(shift_key, images), train=True, key=dropout_key)
    return F.cross_entropy(logits, labels), {}, buffers


def train(
    images: Tensor, labels: Tensor, *, members: int, epochs: int, seed: int, compiled: bool
) -> tuple[TensorDict, np.ndarray]:
    """The parameters of all members, batch size [members], and their losses [epochs, members]."""
    batches = training.minibatches((images, labels), 64, drop_last=True)
    rate = optim.schedules.one_cycle(5e-3, steps=epochs * (len(images) // 64))
    one = training.make_step(None, loss, optim.adamw(rate, weight_decay=0.05))

    # Each member has a key of its own, and so goes through the data in an order of its own.
    init_key, run_key = random.split(random.key(seed))
    params = vmap(model.init)(random.split(init_key, members))
    state = vmap(one.init)(params, random.split(run_key, members))
    step = vmap(one)
    if compiled:
        step = funcnets.compile(step, donate="state")
    state, history = training.fit(step, state, batches, epochs=epochs)
    return training.parameters(state), np.array([r["training"]["loss"] for r in history])


class Scores(NamedTuple):
    """How good the predictions of a classifier are, and what they took."""

    accuracy: float
    nll: float
    calibration_error: float
    seconds: float
    samples_per_second: float


def score(log_probabilities: Tensor, labels: Tensor, seconds: float, samples: int) -> Scores:
    """The scores of log-probabilities [batch, classes] of a classifier that saw ``samples``."""
    return Scores(
        (log_probabilities.argmax(-1) == labels).double().mean().item(),
        F.nll_loss(log_probabilities, labels).item(),
        losses.expected_calibration_error(log_probabilities.exp(), labels).item(),
        seconds,
        samples / seconds,
    )


def fit_svc(split: list[Any]) -> Scores:
    """A support vector machine on the same split, its scores made probabilities (Platt)."""
    train_x, test_x, train_y, test_y = split
    begin = time.perf_counter()
    svc = SVC(gamma=0.001).fit(train_x.reshape(len(train_x), -1), train_y)
    seconds = time.perf_counter() - begin
    calibrated = CalibratedClassifierCV(SVC(gamma=0.001), ensemble=False)
    calibrated.fit(train_x.reshape(len(train_x), -1), train_y)
    flat = test_x.reshape(len(test_x), -1)
    log_probabilities = torch.from_numpy(calibrated.predict_proba(flat)).log()
    scores = score(log_probabilities, torch.from_numpy(test_y), seconds, len(train_x))
    return scores._replace(accuracy=float(svc.score(flat, test_y)))


def show(console: Console, rows: dict[str, Scores]) -> None:
    """The table of scores."""
    table = Table(title="scikit-learn digits, 20 % held out")
    for column in ("", "accuracy %", "NLL", "calibration error", "seconds", "samples / s"):
        table.add_column(column, justify="left" if not column else "right")
    for name, row in rows.items():
        cells = f"{100 * row.accuracy:.2f}", f"{row.nll:.4f}", f"{row.calibration_error:.4f}"
        times = (
            ("", "")
            if np.isnan(row.seconds)
            else (f"{row.seconds:.1f}", f"{row.samples_per_second:,.0f}")
        )
        table.add_row(name, *cells, *times, style="bold" if name == "ensemble" else None)
    console.print(table)


def draw(path: Path, curves: np.ndarray, logits: Tensor, images: Tensor, labels: Tensor) -> None:
    """Learning curves, a reliability diagram, and what the members disagree on most."""
    figure = plt.figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subfigures(1, 3)

    axes = left.subplots()
    axes.semilogy(np.arange(1, len(curves) + 1), curves, color="tab:blue", alpha=0.4, lw=1)
    axes.set(xlabel="epoch", ylabel="training loss", title="each member")

    axes = middle.subplots()
    probabilities = losses.ensemble_log_probabilities(logits).exp()
    confidence, predicted = probabilities.max(-1)
    bins = torch.linspace(0, 1, 11)
    which = torch.bucketize(confidence, bins[1:-1])
    filled = [i for i in range(10) if (which == i).any()]
    correct = (predicted == labels).double()
    accuracy = [correct[which == i].mean() for i in filled]
    axes.bar(bins[filled] + 0.05, accuracy, width=0.09, color="tab:blue")
    for i, height in zip(filled, accuracy, strict=True):
        axes.text(bins[i] + 0.05, height, int((which == i).sum()), ha="center", va="bottom")
    axes.plot([0, 1], [0, 1], color="black", lw=1, ls="--")
    axes.set(xlabel="confidence", ylabel="accuracy", title="reliability (with counts)")
    axes.set(xlim=(0, 1), ylim=(0, 1.08))

    # Mutual information of prediction and member: what they know apart and not together.
    members = logits.softmax(-1)
    entropy = torch.special.entr(probabilities).sum(-1)
    disagreement = entropy - torch.special.entr(members).sum(-1).mean(0)
    right.suptitle("disagreed on most: label, and the votes")
    for i, axes in zip(
        disagreement.argsort(descending=True), right.subplots(3, 4).flat, strict=False
    ):
        axes.imshow(images[i, 0], cmap="gray_r")
        votes = torch.bincount(logits[:, i].argmax(-1), minlength=10)
        said = ", ".join(f"{votes[digit]} say {digit}" for digit in votes.nonzero().flatten())
        axes.set_title(f"{labels[i]}: {said}", fontsize=7)
        axes.axis("off")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Trains, compares, draws and saves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the networks")
    parser.add_argument("--compile", action="store_true", help="compile the training step")
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart"))
    flags = parser.parse_args()
    console = Console()

    digits = load_digits()
    split = train_test_split(
        digits.images,
        digits.target,
        test_size=0.2,
        stratify=digits.target,
        random_state=flags.seed,
    )
    train_x, test_x = (torch.from_numpy(x / 16).float()[:, None] for x in split[:2])
    train_y, test_y = (torch.from_numpy(y) for y in split[2:])

    begin = time.perf_counter()
    params, curves = train(
        train_x,
        train_y,
        members=flags.members,
        epochs=flags.epochs,
        seed=flags.seed,
        compiled=flags.compile,
    )
    seconds = time.perf_counter() - begin

    logits = vmap(model.apply, in_dims=(0, None))(params, test_x)
    seen = flags.epochs * len(train_x)
    rows = {
        f"member {i}": score(member.log_softmax(-1), test_y, float("nan"), seen)
        for i, member in enumerate(logits)
    }
    together = losses.ensemble_log_probabilities(logits)
    rows["ensemble"] = score(together, test_y, seconds, flags.members * seen)
    rows["SVC"] = fit_svc(split)
    show(console, rows)

    flags.output.mkdir(parents=True, exist_ok=True)
    draw(flags.output / "digits.png", curves, logits, test_x, test_y)
    funcnets.save(flags.output / "ensemble.safetensors", params, model)
    loaded_model, loaded = funcnets.load(flags.output / "ensemble.safetensors")
    assert loaded_model is not None  # the file names the family and the config
    again = vmap(loaded_model.apply, in_dims=(0, None))(loaded, test_x)
    if not torch.equal(again, logits):
        raise RuntimeError("the loaded ensemble predicts something else than the saved one")
    console.print(f"figure and ensemble (loaded again: same predictions) in {flags.output}")


if __name__ == "__main__":
    main()

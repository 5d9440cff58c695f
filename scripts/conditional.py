"""Conditional paths: what it saves to think hard about hard inputs alone, on real digits.

Half of the images are clean digits (scikit-learn's); the others lie under noise and pieces of other
digits. A network with two exits learns both. Then it is measured: the time of a batch as the share
of hard samples goes from none to all, each sample going the way of its flag (`funcnets.route`),
beside the shallow and the deep path for everybody; and the accuracy that a given time buys, as the
threshold of confidence of the early exit goes from 0 to 1, and by gates that learn before either
path is taken whether the deep one is worth its price. Run it with
``uv run scripts/conditional.py``; it takes about two minutes.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tensordict import TensorDict
from torch import Tensor

from funcnets import Model, layers, models, optim, random, training

SIDE = 16
GATES: tuple[Literal["straight_through", "gumbel"], ...] = ("straight_through", "gumbel")


class Width(NamedTuple):
    """How many features the trunk gives, for the gate that reads them."""

    out_features: int


def trunk(params: TensorDict, x: Tensor, *, train: bool = False, key: Any = None) -> Any:
    """What both paths begin with: [batch, 1, 16, 16] to [batch, 16, 16, 16]."""
    return layers.conv_norm(params, x, train=train)


def unchanged(params: TensorDict, h: Tensor, *, train: bool = False, key: Any = None) -> Any:
    """The second stage adds nothing: the deep exit is a network of its own."""
    return layers.finish(h, {}, train)


def log_probabilities(model: Model) -> Model:
    """The same network, whose outputs are the logarithms of probabilities.

    A negative log-likelihood is linear in them, and so the gradient that a gate gets for the path
    not taken (the straight-through one) is the difference that the path would have made.
    """

    def apply(params: TensorDict, h: Tensor, *, train: bool = False, key: Any = None) -> Any:
        found = model.apply(params, h, train=train, key=key)
        return (found[0].log_softmax(-1), found[1]) if train else found.log_softmax(-1)

    return Model(init=model.init, apply=apply)


BASE = Model(lambda key: layers.init_conv_norm(key, 1, 16), trunk, config=Width(16))
SHALLOW = models.cnn(in_channels=16, num_classes=10, widths=(24, 48))
DEEP = models.resnet("basic", (2, 2), 10, in_channels=16, width=32, stem="small")
EXITS = models.early_exit(
    [BASE, Model(init=lambda key: TensorDict({}), apply=unchanged)], [SHALLOW, DEEP]
)
FLAGGED = models.gated(BASE, SHALLOW, DEEP)
GATED = {
    kind: models.gated(BASE, log_probabilities(SHALLOW), log_probabilities(DEEP), gate=kind)
    for kind in GATES
}


def make_images(key: random.Key, digits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Digits [n, 8, 8] enlarged to [n, 1, 16, 16], half of them cluttered; labels, and which."""
    noise_key, other_key, roll_key, hard_key = random.split(key, 4).unbind()
    n = len(digits)
    images = F.interpolate(digits[:, None], size=(SIDE, SIDE), mode="bilinear")
    other = images[random.randint(other_key, (n,), 0, n)]
    shift = random.randint(roll_key, (2,), 5, 12).tolist()
    other = other.roll(shift, (2, 3)) * (torch.arange(SIDE) % 16 < 8)  # half a digit, elsewhere
    cluttered = torch.maximum(images, 0.8 * other) + 0.35 * random.normal(noise_key, images.shape)
    hard = random.bernoulli(hard_key, (n,), 0.5)
    return torch.where(hard[:, None, None, None], cluttered, images), labels, hard


def loss(logits: list[Tensor], labels: Tensor) -> Tensor:
    """The cross-entropies of both exits, summed."""
    shallow, deep = logits
    return F.cross_entropy(shallow, labels) + F.cross_entropy(deep, labels)


def epochs_of(digits: Tensor, labels: Tensor, batch: int) -> Callable[[random.Key], training.Epoch]:
    """``epoch(key)``: batches of images that are made anew."""

    def epoch(key: random.Key) -> training.Epoch:
        image_key, order_key = random.split(key).unbind()
        images, same, _ = make_images(image_key, digits, labels)
        return training.minibatches((images, same), batch, drop_last=True)(order_key)

    return epoch


def train(digits: Tensor, labels: Tensor, epochs: int, seed: int) -> TensorDict:
    """The parameters of the network with two exits."""
    init_key, run_key = random.split(random.key(seed)).unbind()
    batch = 64
    rate = optim.schedules.one_cycle(3e-3, steps=epochs * (len(digits) // batch))
    step = training.make_step(EXITS, loss, optim.adamw(rate, weight_decay=0.05), nonfinite=None)
    state = step.init(EXITS.init(init_key), run_key)
    state, _ = training.fit(step, state, epochs_of(digits, labels, batch), epochs=epochs)
    return training.parameters(state)


def entropy(chance: Tensor) -> Tensor:
    """The mean entropy of two choices, in nats; chances [batch]."""
    return (torch.special.entr(chance) + torch.special.entr(1 - chance)).mean()


def train_gate(
    model: Model,
    params: TensorDict,
    price: float,
    digits: Tensor,
    labels: Tensor,
    epochs: int,
    key: random.Key,
) -> TensorDict:
    """Parameters whose gate has learned, between paths that stay as they are.

    The deep path costs as much as ``price`` in the cross-entropy. A gate that is sure of itself
    learns no more; some reward for entropy keeps it from that until it can tell samples apart.
    """

    def loss(
        params: TensorDict, batch: tuple[Tensor, Tensor], key: random.Key
    ) -> tuple[Tensor, dict[str, Tensor], TensorDict]:
        x, y = batch
        found, _ = model.apply(params, x, train=True, key=key)
        share = found["gate"].mean()
        value = F.nll_loss(found["outputs"], y) + price * share - 0.1 * entropy(found["gate"])
        return value, {"deep": share}, TensorDict({})  # the statistics stay as they are, too

    adam = optim.adamw(optim.schedules.one_cycle(0.1, steps=epochs * (len(digits) // 64)))
    step = training.make_step(None, loss, adam, trainable="gate", nonfinite=None)
    init_key, run_key = random.split(key).unbind()
    begin = params.clone().set("gate", layers.init_linear(init_key, 16, 1))
    state = step.init(begin, run_key)
    state, _ = training.fit(step, state, epochs_of(digits, labels, 64), epochs=epochs)
    return training.parameters(state)


def seconds(runs: dict[Any, Callable[[], Any]], rounds: int) -> dict[Any, float]:
    """The median time of each, run in turn."""
    times: dict[Any, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def flagged(params: TensorDict) -> TensorDict:
    """The same parameters by the names of the network whose paths are told by a flag."""
    shallow, deep = params["exits", "0"], params["exits", "1"]
    return TensorDict({"base": params["stages", "0"], "shallow": shallow, "deep": deep})


def main() -> None:
    """Trains, measures and draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--gate-epochs", type=int, default=10, help="of each learned gate")
    parser.add_argument("--prices", type=float, nargs="+", default=[0.1, 0.3, 0.5], help="of depth")
    parser.add_argument("--batch", type=int, default=256, help="of the measured times")
    parser.add_argument("--rounds", type=int, default=9, help="of each measurement")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/conditional"))
    flags = parser.parse_args()
    console = Console()

    loaded = load_digits()
    split = train_test_split(
        loaded.images, loaded.target, test_size=0.3, stratify=loaded.target, random_state=0
    )
    train_x, test_x = (torch.from_numpy(x / 16).float() for x in split[:2])
    train_y, test_y = (torch.from_numpy(y) for y in split[2:])
    params = train(train_x, train_y, flags.epochs, flags.seed)
    x, y, hard = make_images(random.key(1), test_x, test_y)

    batch, paths = x.repeat(3, 1, 1, 1)[: flags.batch], flagged(params)
    shares = [i / 10 for i in range(11)]
    runs: dict[Any, Callable[[], Any]] = {}
    for share in shares:
        way = torch.arange(len(batch)) < share * len(batch)
        way = way[random.permutation(random.key(2), len(batch))]
        runs[share] = functools.partial(FLAGGED.apply, paths, batch, way)
    taken = seconds(runs, flags.rounds)
    ideal = {share: (1 - share) * taken[0.0] + share * taken[1.0] for share in shares}

    table = Table(title=f"a batch of {len(batch)}, each sample by its flag")
    for column in ("hard samples %", "ms", "ideal ms", "ratio"):
        table.add_column(column, justify="right")
    for share in shares:
        row = 100 * share, 1e3 * taken[share], 1e3 * ideal[share], taken[share] / ideal[share]
        table.add_row(
            *(f"{cell:.{digits}f}" for cell, digits in zip(row, (0, 1, 1, 2), strict=True))
        )
    console.print(table)

    gates: dict[Any, Any] = {}
    runs = {}  # exits and gates in turn, so that all meet the same machine
    for kind, model in GATED.items():
        for i, price in enumerate(flags.prices):
            own = train_gate(
                *(model, paths, price, train_x, train_y, flags.gate_epochs),
                random.fold_in(random.key(flags.seed), i),
            )
            gates[kind, price] = model.apply(own, x)
            runs[kind, price] = functools.partial(model.apply, own, x)
    thresholds = [0.0, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 1.0]
    found = {limit: EXITS.apply(params, x, limit) for limit in thresholds}
    runs |= {limit: functools.partial(EXITS.apply, params, x, limit) for limit in thresholds}
    spent = seconds(runs, flags.rounds)
    table = Table(title="early exits: accuracy by what is spent")
    for column in ("threshold", "deep %", "of the hard %", "accuracy %", "us a sample"):
        table.add_column(column, justify="right")
    accuracy = {}
    for limit, outputs in found.items():
        deep = (outputs["exit"] == 1).float()
        accuracy[limit] = 100 * (outputs["logits"].argmax(1) == y).float().mean().item()
        cells = 100 * deep.mean(), 100 * deep[hard].mean(), accuracy[limit]
        table.add_row(
            f"{limit:g}", *(f"{cell:.1f}" for cell in cells), f"{1e6 * spent[limit] / len(x):.0f}"
        )
    console.print(table)

    table = Table(title="learned gates: accuracy by what is spent")
    for column in ("gate", "price", "deep %", "of the hard %", "accuracy %", "us a sample"):
        table.add_column(column, justify="left" if column == "gate" else "right")
    learned = {}
    for (kind, price), outputs in gates.items():
        deep = (outputs["gate"] > 0.5).float()
        learned[kind, price] = 100 * (outputs["outputs"].argmax(1) == y).float().mean().item()
        cells = 100 * deep.mean(), 100 * deep[hard].mean(), learned[kind, price]
        each = f"{1e6 * spent[kind, price] / len(x):.0f}"
        table.add_row(kind, f"{price:g}", *(f"{cell:.1f}" for cell in cells), each)
    console.print(table)

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot(shares, [1e3 * taken[s] for s in shares], "o-", label="each its own way (route)")
    left.plot(shares, [1e3 * ideal[s] for s in shares], "k--", lw=1, label="ideal")
    left.axhline(1e3 * taken[1.0], color="tab:red", lw=1, label="deep for all")
    left.axhline(1e3 * taken[0.0], color="tab:green", lw=1, label="shallow for all")
    left.set(xlabel="share of hard samples", ylabel="time of a batch / ms", ylim=(0, None))
    left.legend()
    times = [1e6 * spent[limit] / len(x) for limit in thresholds]
    right.plot(times, [accuracy[limit] for limit in thresholds], "o-", label="early exit")
    for kind, marker in zip(GATED, ("s", "^"), strict=True):
        times = [1e6 * spent[kind, price] / len(x) for price in flags.prices]
        values = [learned[kind, price] for price in flags.prices]
        right.plot(times, values, marker, label=f"learned gate ({kind.replace('_', '-')})")
    for limit in thresholds[::2]:
        place = 1e6 * spent[limit] / len(x), accuracy[limit]
        right.annotate(f"{limit:g}", place, textcoords="offset points", xytext=(4, -10), fontsize=8)
    right.set(xlabel="time of a sample / us", ylabel="accuracy / %")
    right.legend()
    flags.output.mkdir(parents=True, exist_ok=True)
    figure.savefig(flags.output / "conditional.png", dpi=110)
    console.print(f"figure in {flags.output}")


if __name__ == "__main__":
    main()

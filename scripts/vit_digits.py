"""A small Vision Transformer on scikit-learn's digits: plain, and taught by a conv net.

The network of ``quickstart.py`` learns the digits first. Then two Vision Transformers of the same
beginning see the same images in the same order: one learns from the labels, the other also from the
probabilities of the first network (Hinton et al. 2015). A table compares the three, and a figure
shows where the transformers' class token looks. Run it with ``uv run scripts/vit_digits.py``; it
takes a minute and a half.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tensordict import TensorDict
from torch import Tensor

import funcnets
from funcnets import models, optim, random, training, tree

cnn = models.cnn(in_channels=1, num_classes=10, widths=(32, 64), dropout=0.1)
transformer = models.vit(8, 2, 4, 4, 64, 10, in_channels=1, mlp_width=128)
WEIGHTS = [f"encoder.layers.encoder_layer_{i}.self_attention.weights" for i in range(4)]


def init(key: random.Key) -> TensorDict:
    """Parameters whose positions say as much as the patches from the first step on.

    Where an image has more pixels than a few dozen, the 0.02 of the usual beginning will do.
    """
    params = transformer.init(key)
    params["encoder", "pos_embedding"] *= 25
    return params


vit = funcnets.Model(init, transformer.apply)


class Trained(NamedTuple):
    """A network, its parameters, and how long they took."""

    model: funcnets.Model
    params: TensorDict
    seconds: float


def shift(key: random.Key, images: Tensor) -> Tensor:
    """Images [batch, 1, 8, 8], each moved by up to one pixel in either direction."""
    down, right = random.randint(key, (2, len(images), 1), 0, 3)
    rows, columns = down + torch.arange(8), right + torch.arange(8)
    sample = torch.arange(len(images))[:, None, None, None]
    padded = F.pad(images, (1, 1, 1, 1))
    return padded[sample, 0, rows[:, None, :, None], columns[:, None, None, :]]


def distillation(logits: Tensor, taught: Tensor, temperature: float = 3.0) -> Tensor:
    """How far the softened probabilities are from the teacher's: T^2 times the divergence."""
    ours, theirs = ((x / temperature).log_softmax(-1) for x in (logits, taught))
    return temperature**2 * F.kl_div(ours, theirs, log_target=True, reduction="batchmean")


def train(
    key: random.Key,
    model: funcnets.Model,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    rate: float,
    teacher: Trained | None = None,
) -> Trained:
    """A network that learns labels [n] of images [n, 1, 8, 8], and from a teacher if there is one.

    With a teacher its loss is half the cross-entropy and half the `distillation`.
    """
    begin = time.perf_counter()
    init_key, run_key = random.split(key)
    batches = training.minibatches((images, labels), 64, drop_last=True)
    schedule = optim.schedules.one_cycle(rate, steps=epochs * (len(images) // 64))

    def loss(
        params: TensorDict, batch: tuple[Tensor, Tensor], key: random.Key
    ) -> tuple[Tensor, dict[str, Tensor], TensorDict]:
        shift_key, dropout_key = random.split(key)
        x, y = shift(shift_key, batch[0]), batch[1]
        logits, buffers = model.apply(params, x, train=True, key=dropout_key)
        value = F.cross_entropy(logits, y)
        if teacher is not None:
            taught = teacher.model.apply(teacher.params, x)
            value = (value + distillation(logits, taught)) / 2
        return value, {}, buffers

    step = training.make_step(None, loss, optim.adamw(schedule, weight_decay=0.05), nonfinite=None)
    state, _ = training.fit(step, step.init(model.init(init_key), run_key), batches, epochs=epochs)
    return Trained(model, training.parameters(state), time.perf_counter() - begin)


def show(console: Console, networks: dict[str, Trained], images: Tensor, labels: Tensor) -> None:
    """The table of how good each network is, and what it took."""
    table = Table(title=f"scikit-learn digits, {len(images)} held out")
    for column in ("", "accuracy %", "errors", "NLL", "seconds", "parameters"):
        table.add_column(column, justify="left" if not column else "right")
    for name, (model, params, seconds) in networks.items():
        logits = model.apply(params, images)
        errors = int((logits.argmax(-1) != labels).sum())
        size = sum(leaf.numel() for leaf in tree.leaves(tree.partition(params)[0]))
        table.add_row(
            name,
            f"{100 * (1 - errors / len(labels)):.2f}",
            str(errors),
            f"{F.cross_entropy(logits, labels):.4f}",
            f"{seconds:.1f}",
            f"{size:,}",
        )
    console.print(table)


def attention_maps(params: TensorDict, images: Tensor) -> Tensor:
    """Where the class token looks: [images, blocks, 4, 4], means over the heads, of sum 1."""
    _, found = vit.apply(params, images, taps=WEIGHTS)
    weights = torch.stack([found[name] for name in WEIGHTS], 1)
    patches = reduce(weights[..., 0, 1:], "n block head patch -> n block patch", "mean")
    patches = patches / reduce(patches, "n block patch -> n block 1", "sum")
    return rearrange(patches, "n block (height width) -> n block height width", height=4)


def draw(path: Path, images: Tensor, maps: dict[str, Tensor]) -> None:
    """A row for each image [n, 1, 8, 8]: itself, then what each block of each network looks at."""
    columns = 1 + sum(each.shape[1] for each in maps.values())
    figure, axes = plt.subplots(
        len(images), columns, figsize=(1.2 * columns, 1.25 * len(images)), layout="constrained"
    )
    for i, (row, image) in enumerate(zip(axes, images, strict=True)):
        row[0].imshow(image[0], cmap="gray_r")
        places = iter(row[1:])
        for name, each in maps.items():
            for block, heat in enumerate(each[i]):
                place = next(places)
                place.imshow(image[0], cmap="gray_r", extent=(0, 4, 4, 0))
                place.imshow(heat, cmap="inferno", alpha=0.6, extent=(0, 4, 4, 0))
                if i == 0:
                    place.set_title(f"{name}\nblock {block + 1}", fontsize=8)
        for place in row:
            place.axis("off")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Trains, compares and draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=40, help="of each Vision Transformer")
    parser.add_argument("--teacher-epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the networks")
    parser.add_argument("--output", type=Path, default=Path("outputs/vit_digits"))
    flags = parser.parse_args(arguments)

    data = load_digits()
    digits, labels = torch.from_numpy(data.images / 16).float(), torch.from_numpy(data.target)
    train_x, test_x, train_y, test_y = train_test_split(
        digits[:, None], labels, test_size=0.2, stratify=labels, random_state=flags.seed
    )
    teacher_key, key = random.split(random.key(flags.seed))
    teacher = train(teacher_key, cnn, train_x, train_y, epochs=flags.teacher_epochs, rate=5e-3)
    own = {"epochs": flags.epochs, "rate": 2e-3}
    plain = train(key, vit, train_x, train_y, **own)
    taught = train(key, vit, train_x, train_y, teacher=teacher, **own)

    console = Console()
    networks = {"conv net": teacher, "ViT": plain, "ViT, distilled": taught}
    show(console, networks, test_x, test_y)
    flags.output.mkdir(parents=True, exist_ok=True)
    first = torch.stack([(test_y == digit).nonzero()[0, 0] for digit in range(6)])
    maps = {
        name: attention_maps(networks[name].params, test_x[first])
        for name in ("ViT", "ViT, distilled")
    }
    draw(flags.output / "attention.png", test_x[first], maps)
    console.print(f"figure in {flags.output}")


if __name__ == "__main__":
    main()

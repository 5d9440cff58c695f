"""Grad-CAM: where a network sees what it says, on scenes of scikit-learn's digits.

A small residual network learns which two digits a scene holds, and is never told where they are.
Grad-CAM (Selvaraju et al. 2017) then draws a heat map for each digit from one intermediate output
and its gradient, both found with ``taps``. How often the peak of the map lies on the right digit is
counted (the pointing game of Zhang et al. 2016), and once more for a network that was not trained.
Run it with ``uv run scripts/grad_cam.py``; it takes about a minute.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tensordict import TensorDict
from torch import Tensor
from torch.func import grad, vmap

from funcnets import models, optim, random, tree

SIDE = 24  # of a scene
model = models.resnet("basic", (2, 2, 2), 10, in_channels=1, width=16, stem="small")


class Scenes(NamedTuple):
    """Images [n, 1, 24, 24] of two digits, their labels [n, 2] and top left corners [n, 2, 2]."""

    images: Tensor
    labels: Tensor
    corners: Tensor


def make_scenes(key: random.Key, digits: Tensor, labels: Tensor, n: int) -> Scenes:
    """Two of the digits [m, 8, 8] in each scene: one somewhere on the left, one on the right."""
    chosen_key, row_key, column_key = random.split(key, 3)
    chosen = random.randint(chosen_key, (n, 2), 0, len(digits))
    rows = random.randint(row_key, (n, 2), 0, SIDE - 7)
    columns = random.randint(column_key, (n, 2), 0, SIDE // 2 - 7) + torch.tensor([0, SIDE // 2])
    images, scene, within = torch.zeros(n, SIDE, SIDE), torch.arange(n), torch.arange(8)
    images[
        rearrange(scene, "n -> n 1 1 1"),
        rearrange(rows[..., None] + within, "n two height -> n two height 1"),
        rearrange(columns[..., None] + within, "n two width -> n two 1 width"),
    ] = digits[chosen]
    return Scenes(images[:, None], labels[chosen], torch.stack([rows, columns], -1))


def train(key: random.Key, digits: Tensor, labels: Tensor, steps: int) -> TensorDict:
    """The parameters of a network that tells which digits there are in a scene."""
    init_key, data_key = random.split(key)
    params, buffers = tree.partition(model.init(init_key))
    optimizer = optim.adamw(optim.schedules.one_cycle(1e-2, steps=steps), weight_decay=0.01)
    state = optimizer.init(params)

    def loss(params: TensorDict, buffers: TensorDict, scenes: Scenes) -> tuple[Tensor, TensorDict]:
        logits, buffers = model.apply(tree.merge(params, buffers), scenes.images, train=True)
        present = F.one_hot(scenes.labels, 10).amax(1).float()
        return F.binary_cross_entropy_with_logits(logits, present), buffers

    for step in track(range(steps), description="training"):
        scenes = make_scenes(random.fold_in(data_key, step), digits, labels, 64)
        grads, buffers = grad(loss, has_aux=True)(params, buffers, scenes)
        updates, state = optimizer.update(grads, state, params)
        params = optim.apply_updates(params, updates)
    return tree.merge(params, buffers)


def grad_cam(params: TensorDict, image: Tensor, label: Tensor, layer: str) -> Tensor:
    """The heat map [24, 24] of one label in one image [1, 24, 24]."""

    def score(change: Tensor) -> tuple[Tensor, Tensor]:
        taps = {layer: lambda h: h + change}
        logits, found = model.apply(params, image[None], taps=taps)
        return logits[0].gather(0, label), found[layer]

    _, found = model.apply(params, image[None], taps=[layer])
    # The gradient of what is added to a layer is the gradient at that layer.
    gradient, features = grad(score, has_aux=True)(torch.zeros_like(found[layer]))
    weights = reduce(gradient, "1 channels height width -> channels", "mean")
    heat = einsum(weights, features, "channels, one channels height width -> one height width")
    return F.interpolate(heat.relu()[None], (SIDE, SIDE), mode="bilinear")[0, 0]


def hits(heat: Tensor, corners: Tensor) -> Tensor:
    """Whether the peak of each heat map [n, 24, 24] lies on the digit at a corner [n, 2]."""
    peak = rearrange(heat, "n height width -> n (height width)").argmax(-1)
    offset = torch.stack([peak // SIDE, peak % SIDE], -1) - corners
    flat = reduce(heat, "n height width -> n", "max") <= 0  # a map without a peak points nowhere
    return ((offset >= 0) & (offset < 8)).all(-1) & ~flat


def score(params: TensorDict, scenes: Scenes, layer: str) -> tuple[Tensor, Tensor]:
    """What holds of each digit of each scene, [3, n, 2], and the heat maps [n, 2, 24, 24].

    The first is whether the digit is among the two that the network thinks likeliest; the second,
    whether its heat map has its peak on it; the third, whether on the other digit.
    """
    likeliest = model.apply(params, scenes.images).topk(2).indices
    named = (scenes.labels[:, :, None] == likeliest[:, None, :]).any(-1)
    each_label = vmap(grad_cam, in_dims=(None, None, 0, None))
    each_scene = vmap(each_label, in_dims=(None, 0, 0, None), chunk_size=64)
    heat = each_scene(params, scenes.images, scenes.labels, layer)
    right, other = (
        torch.stack([hits(heat[:, i], scenes.corners[:, j]) for i, j in pairs], -1)
        for pairs in (((0, 0), (1, 1)), ((0, 1), (1, 0)))
    )
    return torch.stack([named, right, other]), heat


def show(console: Console, scenes: Scenes, trained: Tensor, untrained: Tensor) -> None:
    """The table of how often digits are named, and pointed at."""
    table = Table(title=f"{len(scenes.images)} scenes of digits never seen, in %")
    for column in ("digit", "named", "map points at it", "at the other", "elsewhere"):
        table.add_column(column, justify="right")

    def add(name: str, found: Tensor, style: str | None = None) -> None:
        named, right, other = (100 * found.float().mean(1)).tolist()
        table.add_row(
            name, *(f"{x:.1f}" for x in (named, right, other, 100 - right - other)), style=style
        )

    for digit in range(10):
        add(str(digit), trained[:, scenes.labels == digit])
    add("all", trained.flatten(1), style="bold")
    add("untrained", untrained.flatten(1))
    console.print(table)
    share = 100 * 64 / SIDE**2
    console.print(f"a point at random lies on a given digit in {share:.1f} % of all cases")


def draw(path: Path, scenes: Scenes, heat: Tensor) -> None:
    """A row for each scene: the image, then for each of its digits heat map and overlay."""
    rows = len(scenes.images)
    figure, axes = plt.subplots(rows, 5, figsize=(9, 1.9 * rows), layout="constrained")
    for row, image, labels, maps in zip(axes, scenes.images, scenes.labels, heat, strict=True):
        row[0].imshow(image[0], cmap="gray")
        row[0].set_title(f"{labels[0]} and {labels[1]}", fontsize=9)
        for i in range(2):
            warm, over = row[1 + 2 * i], row[2 + 2 * i]
            warm.imshow(maps[i], cmap="inferno")
            warm.set_title(f"heat of {labels[i]}", fontsize=9)
            over.imshow(image[0], cmap="gray")
            over.imshow(maps[i], cmap="inferno", alpha=0.55)
            over.set_title(f"over the scene: {labels[i]}", fontsize=9)
        for place in row:
            place.axis("off")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Trains, points, counts and draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200, help="of training, 64 scenes each")
    parser.add_argument("--scenes", type=int, default=500, help="to count on")
    parser.add_argument("--layer", default="layer3", help="whose output the maps are made of")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/grad_cam"))
    flags = parser.parse_args(arguments)

    data = load_digits()
    digits, labels = torch.from_numpy(data.images / 16).float(), torch.from_numpy(data.target)
    train_x, test_x, train_y, test_y = train_test_split(
        digits, labels, test_size=0.2, stratify=labels, random_state=flags.seed
    )
    train_key, test_key, other_key = random.split(random.key(flags.seed), 3)
    params = train(train_key, train_x, train_y, flags.steps)
    scenes = make_scenes(test_key, test_x, test_y, flags.scenes)
    two = scenes.labels[:, 0] != scenes.labels[:, 1]  # with one digit twice there is no wrong one
    scenes = Scenes(*(part[two] for part in scenes))

    trained, heat = score(params, scenes, flags.layer)
    untrained, _ = score(model.init(other_key), scenes, flags.layer)
    console = Console()
    show(console, scenes, trained, untrained)
    flags.output.mkdir(parents=True, exist_ok=True)
    draw(flags.output / "grad_cam.png", Scenes(*(part[:4] for part in scenes)), heat[:4])
    console.print(f"figure in {flags.output}")


if __name__ == "__main__":
    main()

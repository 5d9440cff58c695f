"""What the skip connection does: the gradient by depth, in networks of 20 to 110 layers.

Three kinds of network read a batch of scikit-learn's digits: residual (He et al. 2016), plain,
which is the same stack of the same parameters without the addition, and dense (Huang et al. 2017).
For each convolution the figure shows the norm of the gradient times that of the weight, that is,
how much the loss answers to a relative change of the layer; it does not depend on the scale of the
weight, which the norm after it takes away. Each curve is the (geometric) mean over several
networks, made, differentiated and trained as one by vmap, with the range between them. Run it with
``uv run scripts/gradient_flow.py``.
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
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from tensordict import TensorDict
from torch import Tensor
from torch.func import grad_and_value, vmap

from funcnets import Model, layers, models, optim, random, tree

KINDS = {"plain": "tab:red", "residual": "tab:blue", "dense": "tab:green"}


class Flow(NamedTuple):
    """Of one kind and depth.

    Attributes:
        layers: with weights, the linear one among them.
        before: gradient by layer, [members, convolutions], at initialisation.
        after: the same after training.
        losses: [steps, members].
    """

    layers: int
    before: Tensor
    after: Tensor
    losses: Tensor


def make(kind: str, depth: int) -> Model:
    """The network of a kind with about so many layers."""
    if kind == "dense":
        n = round((depth - 4) / 6)
        return models.densenet((n, n, n), 10, in_channels=1, growth_rate=12, width=24, stem="small")
    n = round((depth - 2) / 6)
    residual = models.resnet("basic", (n, n, n), 10, in_channels=1, width=16, stem="small")
    return residual if kind == "residual" else Model(residual.init, apply_plain)


def apply_plain(params: TensorDict, x: Tensor, train: bool = True) -> tuple[Tensor, TensorDict]:
    """Reads the parameters of a residual network, and adds nothing."""

    def conv_norm(conv: TensorDict, norm: TensorDict, x: Tensor, stride: int = 1) -> Tensor:
        x = layers.conv(conv, x, stride=stride, padding=1)
        return layers.batch_norm(norm, x, train=True)[0].relu()

    x = conv_norm(params["conv1"], params["bn1"], x)
    for stage in ("layer1", "layer2", "layer3"):
        for i, block in params[stage].items():
            stride = 2 if stage != "layer1" and i == "0" else 1
            x = conv_norm(block["conv1"], block["bn1"], x, stride)
            x = conv_norm(block["conv2"], block["bn2"], x)
    return layers.linear(params["fc"], layers.global_avg_pool(x)), TensorDict({})


def convolutions(params: TensorDict) -> list[Tensor]:
    """The weights [members, out, in, height, width] from the first to the last, no shortcuts."""
    return [
        leaf
        for path, leaf in tree.leaves_with_path(params)
        if leaf.ndim == 5 and "downsample" not in path
    ]


def measure(
    key: random.Key, model: Model, images: Tensor, labels: Tensor, members: int, steps: int
) -> Flow:
    """The gradient by layer before and after some steps of training, on one batch."""
    params, buffers = tree.partition(vmap(model.init)(random.split(key, members)))
    optimizer = optim.sgd(0.02, momentum=0.9)
    state = vmap(optimizer.init)(params)

    def loss(params: TensorDict, buffers: TensorDict) -> Tensor:
        logits, _ = model.apply(tree.merge(params, buffers), images, train=True)
        return F.cross_entropy(logits, labels)

    def answer(params: TensorDict, grads: TensorDict) -> Tensor:
        weights, gradients = (
            torch.stack([leaf.flatten(1).norm(dim=1) for leaf in convolutions(each)], 1)
            for each in (params, grads)
        )
        return weights * gradients

    differentiate, losses, found = vmap(grad_and_value(loss)), [], []
    for step in range(steps + 1):
        grads, value = differentiate(params, buffers)
        losses.append(value)
        if step in (0, steps):
            found.append(answer(params, grads))
        updates, state = vmap(optimizer.update)(grads, state, params)
        params = optim.apply_updates(params, updates)
    return Flow(found[0].shape[1] + 1, found[0], found[-1], torch.stack(losses))


def show(console: Console, flows: dict[tuple[str, int], Flow], steps: int) -> None:
    """The table: how much larger the gradient is at the first layer than at the last."""
    table = Table(title="gradient at the first convolution over that at the last")
    for column in ("network", "layers", "at the start", f"after {steps} steps", "loss"):
        table.add_column(column, justify="right")

    def ratio(gradients: Tensor) -> str:
        log = (gradients[:, 0] / gradients[:, -1]).log()
        return f"{log.mean().exp():.1e} x/ {log.std(correction=0).exp():.1f}"

    for (kind, _), flow in flows.items():
        first, last = flow.losses[0].mean(), flow.losses[-1].mean()
        ends = f"{first:.2f} to {last:.2f}"
        table.add_row(kind, str(flow.layers), ratio(flow.before), ratio(flow.after), ends)
    console.print(table)
    console.print("geometric mean over the networks, times or divided by their deviation")


def draw(path: Path, flows: dict[tuple[str, int], Flow], steps: int) -> None:
    """A column for each depth; above at the start, below after training."""
    depths = sorted({depth for _, depth in flows})
    figure, axes = plt.subplots(
        2,
        len(depths),
        figsize=(3.4 * len(depths), 6),
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for (kind, depth), flow in flows.items():
        for row, (each, when) in enumerate(
            [(flow.before, "at the start"), (flow.after, f"after {steps} steps")]
        ):
            place = axes[row, depths.index(depth)]
            layer = torch.arange(1, each.shape[1] + 1)
            place.semilogy(layer, each.log().mean(0).exp(), color=KINDS[kind], label=kind)
            place.fill_between(
                layer, each.amin(0), each.amax(0), color=KINDS[kind], alpha=0.2, lw=0
            )
            place.set(title=f"about {depth} layers, {when}", xlabel="convolution, from the input")
            place.grid(alpha=0.3)
    for place in axes[:, 0]:
        place.set_ylabel("|gradient| |weight|")
    axes[0, 0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=[20, 56, 110])
    parser.add_argument("--members", type=int, default=4, help="networks of each kind and depth")
    parser.add_argument("--steps", type=int, default=8, help="of training on the batch")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/gradient_flow"))
    flags = parser.parse_args(arguments)

    data = load_digits()
    chosen = random.permutation(random.key(flags.seed), len(data.images))[: flags.batch]
    images = torch.from_numpy(data.images / 16).float()[chosen, None]
    labels = torch.from_numpy(data.target)[chosen]
    flows = {}
    for kind, depth in track([(kind, depth) for kind in KINDS for depth in flags.depths]):
        model, key = make(kind, depth), random.key(flags.seed + 1)
        flows[kind, depth] = measure(key, model, images, labels, flags.members, flags.steps)
    console = Console()
    show(console, flows, flags.steps)
    flags.output.mkdir(parents=True, exist_ok=True)
    draw(flags.output / "gradient_flow.png", flows, flags.steps)
    console.print(f"figure in {flags.output}")


if __name__ == "__main__":
    main()

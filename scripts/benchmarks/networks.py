"""The networks as people write them with torch.nn, and one training step of each kind."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import funcnets
from benchmarks import machine
from benchmarks.race import Contender
from funcnets import Model, grad, optim, tree

RATE = 1e-3

Loss = Callable[[Tensor, Tensor], Tensor]


def mlp(*widths: int) -> nn.Module:
    """Linear layers with ReLU between them, named as those of `funcnets.models.mlp`."""
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        # Of three, as torchvision has it: the third is where dropout would be.
        layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Identity()]
        if i == len(widths) - 2:
            del layers[-2:]
    return nn.Sequential(*layers)


class Conv(nn.Module):
    """Two blocks of convolution, ReLU and pooling, and a linear layer."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()),
                    nn.MaxPool2d(2),
                )
                for inputs, outputs in pairwise(widths)
            )
        )
        self.classifier = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images."""
        return self.classifier(self.features(x).mean((2, 3)))


class ResidualBlock(nn.Module):
    """What a block of `funcnets.models.residual_mlp` adds to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The sum."""
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


class ResidualMLP(nn.Module):
    """`funcnets.models.residual_mlp` with one head."""

    def __init__(self, inputs: int, outputs: int, depth: int, width: int = 128) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(inputs, width), nn.LayerNorm(width)
        self.blocks = nn.Sequential(*[ResidualBlock(width) for _ in range(depth)])
        self.heads = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """The outputs."""
        return self.heads(self.norm(self.blocks(self.stem(x))))


class Attention(nn.Module):
    """Causal attention over all tokens so far."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, time, width] to the same."""
        projected = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = rearrange(projected, "b t (three h w) -> three b h t w", three=3, h=self.heads)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(rearrange(mixed, "b h t w -> b t (h w)"))


class Block(nn.Module):
    """Attention and a feed-forward part, each after a norm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads)
        self.linear1, self.linear2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, time, width] to the same."""
        x = x + self.self_attn(self.norm1(x))
        return x + self.linear2(F.gelu(self.linear1(self.norm2(x))))


class GPT(nn.Module):
    """A language model whose output projection is its embedding."""

    def __init__(self, vocabulary: int, context: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embedding, self.positions = (
            nn.Embedding(vocabulary, width),
            nn.Embedding(context, width),
        )
        self.layers = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token, everywhere."""
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return F.linear(self.norm(x), self.embedding.weight)


class GRU(nn.Module):
    """nn.GRU and a linear layer over its last output."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(inputs, hidden, batch_first=True), nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        """One number for each series [batch, time, inputs]."""
        return self.head(self.rnn(x)[0][:, -1])


def tokens_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of every token."""
    return F.cross_entropy(logits.flatten(0, -2), y.flatten())


def named(params: Any) -> dict[str, Tensor]:
    """The leaves by their dotted names."""
    return {".".join(path): leaf for path, leaf in tree.leaves_with_path(params)}


def count(params: Any) -> int:
    """How many numbers are trained."""
    return tree.count(tree.partition(params)[0])


def copied(params: Any) -> Any:
    """A copy on the device, for each contender its own."""
    return tree.map(lambda leaf: machine.place(leaf.clone()), params)


def gradients_of(model: Model, loss: Loss) -> Callable[..., Any]:
    """``(gradients, buffers)`` of ``(trained, buffers, x, y)``, by funcnets."""

    def objective(trained: Any, buffers: Any, x: Tensor, y: Tensor) -> Any:
        outputs, new = model.apply(tree.merge(trained, buffers), x, train=True)
        return loss(outputs, y), new

    return grad(objective, has_aux=True)


def pure_step(model: Model, loss: Loss) -> tuple[Callable[[Any], Any], Callable[..., Any]]:
    """What funcnets' users write: the first ``(trained, buffers, state)``, and the next one."""
    optimizer, gradients_at = optim.adam(RATE), gradients_of(model, loss)

    def start(params: Any) -> Any:
        trained, buffers = tree.partition(params)
        return trained, buffers, optimizer.init(trained)

    def step(held: Any, x: Tensor, y: Tensor) -> Any:
        trained, buffers, state = held
        gradients, buffers = gradients_at(trained, buffers, x, y)
        updates, state = optimizer.update(gradients, state, trained)
        return optim.apply_updates(trained, updates), buffers, state

    return start, step


def pure(step: Callable[..., Any], held: Any, *batch: Tensor) -> Contender:
    """A contender that holds what its pure step returns, for the next."""

    def run() -> None:
        nonlocal held
        held = step(held, *batch)

    return Contender(run, lambda: named(tree.merge(held[0], held[1])))


def donated(step: Callable[..., Any], held: Any, *batch: Tensor) -> Contender:
    """The same, compiled and in place."""
    return pure(funcnets.compile(step, donate=0), held, *batch)


def graphed(step: Callable[..., Any], held: Any, *batch: Tensor) -> Contender:
    """The same, compiled and recorded as one CUDA graph that writes over what it was given."""
    compiled = funcnets.compile(step)

    def once() -> None:
        tree.map(torch.Tensor.copy_, held, compiled(held, *batch))

    graph = torch.cuda.CUDAGraph()
    before = tree.map(torch.clone, held)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            once()
    torch.cuda.current_stream().wait_stream(stream)
    with machine.precision(), torch.cuda.graph(graph):
        once()
    tree.map(torch.Tensor.copy_, held, before)
    return Contender(graph.replay, lambda: named(tree.merge(held[0], held[1])))


def torch_optim(
    model: Model,
    loss: Loss,
    params: Any,
    *batch: Tensor,
    members: bool = False,
    compiled: bool = False,
) -> Contender:
    """Our gradients, of one network or of all members, and torch.optim's fused Adam."""
    trained, buffers = tree.partition(params)
    leaves = tree.leaves(trained)
    adam = torch.optim.Adam(leaves, lr=RATE, fused=True)
    gradients_at = gradients_of(model, loss)
    if members:
        gradients_at = torch.func.vmap(gradients_at, (0, 0, None, None))
    if compiled:
        gradients_at = funcnets.compile(gradients_at)

    def run() -> None:
        nonlocal buffers
        adam.zero_grad()  # as for a module: what is let go of serves the new gradients
        gradients, buffers = gradients_at(trained, buffers, *batch)
        for leaf, gradient in zip(leaves, tree.leaves(gradients), strict=True):
            leaf.grad = gradient
        adam.step()

    return Contender(run, lambda: named(tree.merge(trained, buffers)))


def backward(model: Model, loss: Loss, params: Any, x: Tensor, y: Tensor) -> Contender:
    """Our model as a module is trained: leaves that require grad, backward() and fused Adam."""
    trained, buffers = tree.partition(params)
    leaves = [leaf.requires_grad_() for leaf in tree.leaves(trained)]
    adam = torch.optim.Adam(leaves, lr=RATE, fused=True)

    def run() -> None:
        nonlocal buffers
        adam.zero_grad()
        outputs, buffers = model.apply(tree.merge(trained, buffers), x, train=True)
        loss(outputs, y).backward()
        adam.step()

    return Contender(run, lambda: named(tree.merge(trained, buffers)))


def module(
    network: nn.Module, loss: Loss, params: Any, x: Tensor, y: Tensor, mode: str | None = None
) -> Contender:
    """What people write: a module, backward() and fused Adam; torch.compile in a mode."""
    tree.to_module(params, network.train())
    machine.place_module(network)
    adam = torch.optim.Adam(network.parameters(), lr=RATE, fused=True)
    forward = network if mode is None else torch.compile(network, mode=mode)

    def run() -> None:
        adam.zero_grad()
        loss(forward(x), y).backward()
        adam.step()

    return Contender(run, lambda: named(tree.from_module(network)))


def torch_func(
    network: nn.Module, loss: Loss, params: Any, x: Tensor, y: Tensor, compiled: bool
) -> Contender:
    """What people write with torch.func: functional_call, grad and fused Adam over the weights."""
    tree.to_module(params, network.train().to(machine.DEVICE))
    weights = {name: machine.place(p.detach()) for name, p in network.named_parameters()}
    return functional(network, loss, weights, dict(network.named_buffers()), x, y, compiled)


def functional(
    network: nn.Module,
    loss: Loss,
    weights: dict[str, Tensor],
    buffers: dict[str, Tensor],
    x: Tensor,
    y: Tensor,
    compiled: bool,
    members: bool = False,
) -> Contender:
    """functional_call and grad, of one network or vmapped over stacked ones, and fused Adam."""
    adam = torch.optim.Adam(weights.values(), lr=RATE, fused=True)

    def objective(weights: Any, buffers: Any, x: Tensor, y: Tensor) -> Any:
        # Copies, for the module writes over its running statistics.
        buffers = {name: buffer.clone() for name, buffer in buffers.items()}
        outputs = torch.func.functional_call(network, (weights, buffers), (x,))
        return loss(outputs, y), buffers

    gradients_at = torch.func.grad(objective, has_aux=True)
    if members:
        gradients_at = torch.func.vmap(gradients_at, (0, 0, None, None))
    if compiled:
        gradients_at = torch.compile(gradients_at)

    def run() -> None:
        nonlocal buffers
        adam.zero_grad()
        gradients, buffers = gradients_at(weights, buffers, x, y)
        for name, gradient in gradients.items():
            weights[name].grad = gradient
        adam.step()

    return Contender(run, lambda: weights | without_counters(buffers))


def without_counters(buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    """The statistics alone: no numbers of batches."""
    return {name: value for name, value in buffers.items() if value.is_floating_point()}

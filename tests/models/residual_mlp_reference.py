"""residual_mlp as a module of torch.nn, written apart from the library."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

ACTIVATIONS = {"gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


class Block(nn.Module):
    """One residual block."""

    def __init__(self, width: int, expansion: int, kind: str, activation: str) -> None:
        super().__init__()
        inner = width * expansion
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * inner if kind == "glu" else inner)
        self.fc2 = nn.Linear(inner, width)
        self.kind, self.activation = kind, ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """The input, and what the block adds."""
        h = self.fc1(self.norm(x))
        if self.kind == "glu":
            value, gate = h.chunk(2, -1)
            return x + self.fc2(value * self.activation(gate))
        return x + self.fc2(self.activation(h))


class Stacked(Block):
    """Many blocks, whose parameters lie along a new first axis."""

    def __init__(self, depth: int, *args: object) -> None:
        super().__init__(*args)
        self.depth = depth
        self.__dict__["one"] = Block(*args)  # no part of it: only its code is used
        blocks = [Block(*args) for _ in range(depth)]
        for name, part in self.named_modules():
            for leaf, _ in list(part.named_parameters(recurse=False)):
                each = [getattr(block.get_submodule(name), leaf) for block in blocks]
                setattr(part, leaf, nn.Parameter(torch.stack(each).detach()))

    def forward(self, x: Tensor) -> Tensor:
        """Through all of them."""
        named = dict(self.named_parameters())
        for i in range(self.depth):
            x = functional_call(self.one, {name: leaf[i] for name, leaf in named.items()}, (x,))
        return x


class ResidualMLP(nn.Module):
    """Stem, blocks, norm and heads."""

    def __init__(self, config: object) -> None:
        super().__init__()
        width, depth, share = config.width, config.depth, config.share
        shape = width, config.expansion
        kinds = [config.block] * depth if isinstance(config.block, str) else list(config.block)
        self.stem = nn.Linear(config.in_features, width)
        if depth and share == "none":
            made = [Block(*shape, kind, config.activation) for kind in kinds]
            self.blocks = nn.Sequential(*made)
        elif depth and share == "stacked":
            self.blocks = Stacked(depth, *shape, kinds[0], config.activation)
        elif depth:
            self.blocks = Block(*shape, kinds[0], config.activation)
        self.norm = nn.LayerNorm(width)
        if isinstance(config.heads, int):
            self.heads = nn.Linear(width, config.heads)
        else:
            self.heads = nn.ModuleDict({n: nn.Linear(width, size) for n, size in config.heads})
        self.times = depth if share == "all" else min(depth, 1)

    def forward(self, x: Tensor) -> object:
        """One output, or all by name."""
        x = self.stem(x)
        for _ in range(self.times):
            x = self.blocks(x)
        x = self.norm(x)
        if isinstance(self.heads, nn.Linear):
            return self.heads(x)
        return {name: head(x) for name, head in self.heads.items()}

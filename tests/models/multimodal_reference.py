"""The module that `funcnets.models.multimodal` is held against."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Gate(nn.Module):
    def __init__(self, parts: int, size: int) -> None:
        super().__init__()
        self.gate = nn.Linear(parts * size, parts * size)

    def forward(self, parts: list[Tensor]) -> Tensor:
        gates = torch.sigmoid(self.gate(torch.cat(parts, -1))).chunk(len(parts), -1)
        total = torch.zeros_like(parts[0])
        for gate, part in zip(gates, parts, strict=True):
            total = total + gate * part
        return total


class Attention(nn.Module):
    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.randn(size))
        self.key, self.value, self.out = (nn.Linear(size, size) for _ in range(3))

    def forward(self, parts: list[Tensor]) -> Tensor:
        query, key, value = self.query, torch.stack(parts, 1), torch.stack(parts, 1)
        key, value = self.key(key), self.value(value)
        size = len(query) // self.heads
        results = []
        for head in range(self.heads):
            part = slice(head * size, (head + 1) * size)
            attended = F.scaled_dot_product_attention(
                query[part].expand(len(key), 1, size), key[..., part], value[..., part]
            )
            results.append(attended[:, 0])
        return self.out(torch.cat(results, -1))


class Multimodal(nn.Module):
    """Modules by name; the encoder of an input may be the name of another input."""

    def __init__(
        self,
        encoders: dict[str, nn.Module | str],
        heads: dict[str, nn.Module],
        fusion: nn.Module | str,
        activation: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.sources = {n: e if isinstance(e, str) else n for n, e in encoders.items()}
        self.encoders = nn.ModuleDict(
            {n: e for n, e in encoders.items() if isinstance(e, nn.Module)}
        )
        self.heads = nn.ModuleDict(heads)
        if isinstance(fusion, nn.Module):
            self.fusion = fusion
        self.kind, self.activation = fusion, activation

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        parts = [self.encoders[source](inputs[n]) for n, source in self.sources.items()]
        if self.kind == "concat":
            fused = torch.cat(parts, -1)
        else:
            fused = torch.stack(parts).sum(0) if self.kind == "sum" else self.fusion(parts)
        return {name: head(self.activation(fused)) for name, head in self.heads.items()}

"""recurrent and seq2seq as modules of torch.nn, written apart from the library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CELLS = {"rnn_tanh": nn.RNN, "rnn_relu": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


def make(cell: str, *sizes: int, **options: Any) -> nn.Module:
    """A module of torch.nn, the batch first."""
    if cell.startswith("rnn_"):
        options["nonlinearity"] = cell.removeprefix("rnn_")
    return CELLS[cell](*sizes, batch_first=True, **options)


class Pool(nn.Module):
    """A mean with learned weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width)
        self.score = nn.Linear(width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, time, width] to [batch, width]."""
        return (self.score(self.proj(x).tanh()).softmax(1) * x).sum(1)


class Recurrent(nn.Module):
    """Layers, pooling and head."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        if config.num_embeddings is not None:
            self.embedding = nn.Embedding(config.num_embeddings, config.in_features)
        sizes = config.in_features, config.hidden_size, config.num_layers
        self.rnn = make(config.cell, *sizes, bidirectional=config.bidirectional)
        doubled = config.bidirectional and config.merge == "concat"
        width = config.hidden_size * (2 if doubled else 1)
        if config.output == "attention":
            self.pool = Pool(width)
        self.head = nn.Linear(width, config.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Sequences of full length."""
        if self.config.num_embeddings is not None:
            x = self.embedding(x)
        outputs, _ = self.rnn(x)
        ahead, back = outputs, outputs
        if self.config.bidirectional:
            ahead, back = outputs.chunk(2, -1)
        if self.config.output == "last":
            ahead, back = ahead[:, -1], back[:, 0]
        if self.config.bidirectional:
            both = torch.cat([ahead, back], -1)
            ahead = both if self.config.merge == "concat" else ahead + back
        if self.config.output == "mean":
            ahead = ahead.mean(1)
        if self.config.output == "attention":
            ahead = self.pool(ahead)
        return self.head(ahead)


class Seq2Seq(nn.Module):
    """Encoder and decoder, one step after the other."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        depth, width = config.num_layers, config.width
        inner = config.hidden_size if config.tokens else config.out_features
        if config.num_embeddings is not None:
            self.embedding = nn.Embedding(config.num_embeddings, config.in_features)
        if config.encoder:
            sizes = config.in_features, config.hidden_size, depth
            self.encoder = make(config.cell, *sizes, bidirectional=config.bidirectional)
        else:
            parts = 2 if config.cell == "lstm" else 1
            self.state = nn.Linear(config.in_features, parts * depth * width)
        if config.tokens:
            self.targets_embedding = nn.Embedding(config.out_features, inner)
        self.start = nn.Parameter(torch.zeros(inner))
        self.decoder = make(config.cell, inner, width, depth)
        self.head = nn.Linear(width, config.out_features)

    def first(self, x: Tensor) -> Any:
        """The state that the decoder begins with."""
        config = self.config
        if not config.encoder:
            made = self.state(x).tanh().unflatten(1, (-1, config.num_layers, config.width))
            parts = [part.contiguous() for part in made.permute(1, 2, 0, 3)]
            return tuple(parts) if config.cell == "lstm" else parts[0]
        if config.num_embeddings is not None:
            x = self.embedding(x)
        state = self.encoder(x)[1]

        def merge(part: Tensor) -> Tensor:
            if not config.bidirectional:
                return part
            if config.merge == "add":
                return part[0::2] + part[1::2]
            return torch.cat([part[0::2], part[1::2]], -1)

        return tuple(map(merge, state)) if isinstance(state, tuple) else merge(state)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """With the targets, or without."""
        state, outputs = self.first(x), []
        steps = self.config.steps if targets is None else targets.shape[1]
        given = self.start.expand(len(x), 1, -1)
        for step in range(steps):
            hidden, state = self.decoder(given, state)
            outputs.append(self.head(hidden))
            element = outputs[-1] if targets is None else targets[:, step : step + 1]
            if self.config.tokens:
                element = element.argmax(-1) if targets is None else element
                element = self.targets_embedding(element)
            given = element
        return torch.cat(outputs, 1)

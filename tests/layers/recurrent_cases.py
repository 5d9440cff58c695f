"""Recurrent layers with drawn options, each with the torch.nn module that it equals."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from funcnets import layers, random, tree

DTYPE = torch.float64
MODULES = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
INITS = {"rnn": layers.init_rnn, "lstm": layers.init_lstm, "gru": layers.init_gru}
LAYERS = {"rnn": layers.rnn, "lstm": layers.lstm, "gru": layers.gru}


@dataclass(frozen=True)
class Case:
    """One layer, and the shapes of what goes in.

    Attributes:
        kind: rnn, lstm or gru.
        sizes: of the inputs, of the state.
        batch: None for one sequence without a batch.
        lengths: of the sequences, or None.
        stateful: whether a first state is given.
        build: options of torch's module that `init_x` has too.
        nonlinearity: options of `rnn` alone.
    """

    kind: str
    sizes: tuple[int, int] = (3, 4)
    time: int = 3
    batch: int | None = 2
    lengths: tuple[int, ...] | None = None
    stateful: bool = True
    batch_first: bool = True
    build: dict[str, Any] = field(default_factory=dict)
    nonlinearity: dict[str, Any] = field(default_factory=dict)

    def init(self, key: Tensor, **options: Any) -> Any:
        return INITS[self.kind](key, *self.sizes, **self.build, **options)

    def module(self) -> nn.Module:
        options = {**self.build, **self.nonlinearity, "batch_first": self.batch_first}
        with torch.random.fork_rng():
            return MODULES[self.kind](*self.sizes, **options).to(DTYPE)

    def draw(self, key: Tensor, dtype: torch.dtype = DTYPE) -> tuple[Any, Tensor, Any]:
        """Parameters, a sequence, and the first state or ()."""
        params_key, x_key, *state_keys = random.split(key, 4).unbind()
        params = tree.map(lambda leaf: 2 * leaf, self.init(params_key, dtype=dtype))
        batch = () if self.batch is None else (self.batch,)
        shape = (*batch, self.time) if self.batch_first else (self.time, *batch)
        x = random.normal(x_key, (*shape, self.sizes[0]), dtype=dtype)
        if not self.stateful:
            return params, x, ()
        states = self.build.get("num_layers", 1) * (1 + self.build.get("bidirectional", False))
        hidden = self.sizes[1]
        widths = [self.build.get("proj_size", 0) or hidden, hidden]
        state = tuple(
            random.normal(k, (states, *batch, width), dtype=dtype)
            for k, width in zip(state_keys, widths, strict=True)
        )
        return params, x, state if self.kind == "lstm" else state[0]

    def apply(self, params: Any, x: Tensor, state: Any, **options: Any) -> Any:
        """Outputs and the last state."""
        lengths = None if self.lengths is None else torch.tensor(self.lengths)
        options = {"batch_first": self.batch_first, **self.nonlinearity, **options}
        # Transforms take no None, but an empty tuple.
        state = None if isinstance(state, tuple) and not state else state
        return LAYERS[self.kind](params, x, state, lengths, **options)

    def expected(self, module: nn.Module, x: Tensor, state: Any) -> Any:
        """What torch's module makes of it."""
        state = None if isinstance(state, tuple) and not state else state
        if self.lengths is None:
            return module(x, state)
        packed = pack_padded_sequence(
            x, torch.tensor(self.lengths), self.batch_first, enforce_sorted=False
        )
        outputs, last = module(packed, state)
        padded, _ = pad_packed_sequence(outputs, self.batch_first, total_length=self.time)
        return padded, last


@st.composite
def cases(draw: Any) -> Case:
    kind, time = draw(st.sampled_from(list(MODULES))), draw(st.integers(1, 4))
    hidden = draw(st.integers(2, 4))
    build = {
        "num_layers": draw(st.integers(1, 3)),
        "bidirectional": draw(st.booleans()),
        "bias": draw(st.booleans()),
    }
    if kind == "lstm":
        build["proj_size"] = draw(st.integers(0, hidden - 1))
    batch = draw(st.none() | st.integers(1, 3))
    lengths = None
    if batch is not None and draw(st.booleans()):
        each = st.integers(1, time)
        lengths = draw(st.lists(each, min_size=batch, max_size=batch).map(tuple))
    nonlinearity = {"nonlinearity": draw(st.sampled_from(["tanh", "relu"]))}
    return Case(
        kind,
        (draw(st.integers(1, 3)), hidden),
        time,
        batch,
        lengths,
        draw(st.booleans()),
        batch is None or draw(st.booleans()),
        build,
        nonlinearity if kind == "rnn" else {},
    )


# One of each kind, all that takes a way of its own among them.
FIXED = {
    "rnn": Case("rnn", stateful=False),
    "lstm": Case("lstm", lengths=(3, 1), build={"num_layers": 2, "bidirectional": True}),
    "lstm_projected": Case("lstm", batch=None, build={"proj_size": 2, "bias": False}),
    "gru": Case("gru", lengths=(1, 3), batch_first=False, build={"bidirectional": True}),
}

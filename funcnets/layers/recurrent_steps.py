"""One step of each recurrent cell, from inputs that have gone through their weights already.

The arithmetic that the cells and the layers share. A state is a tuple of tensors, the first of
which is the output: (h,), and for an LSTM (h, c).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

State = tuple[Tensor, ...]


class Weights(NamedTuple):
    """The parameters of one layer in one direction, those that are absent None.

    Attributes:
        weight_ih: [gates * hidden_size, input_size].
        weight_hh: [gates * hidden_size, hidden_size or proj_size].
        bias_ih: [gates * hidden_size].
        bias_hh: [gates * hidden_size].
        weight_hr: [proj_size, hidden_size], of an LSTM whose outputs are projected.
    """

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None = None
    bias_hh: Tensor | None = None
    weight_hr: Tensor | None = None


@dataclass(frozen=True)
class Cell:
    """A kind of cell.

    Attributes:
        name: in messages.
        gates: how many times the weights are as long as the hidden state.
        states: how many tensors a state has.
        adds: whether the bias of the state may be added to the inputs beforehand.
        step: ``step(projected inputs, state, weights)``, the new state.
        kernel: torch's kernel of whole layers.
    """

    name: str
    gates: int
    states: int
    adds: bool
    step: Callable[[Tensor, State, Weights], State]
    kernel: Callable[..., tuple[Tensor, ...]]

    def project(self, x: Tensor, weights: Weights) -> Tensor:
        """What `step` takes: inputs [..., input_size] to [..., gates * hidden_size]."""
        bias = weights.bias_ih
        if self.adds and bias is not None and weights.bias_hh is not None:
            bias = bias + weights.bias_hh
        return F.linear(x, weights.weight_ih, bias)


def _rnn(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor, State, Weights], State]:
    def step(inputs: Tensor, state: State, weights: Weights) -> State:
        return (activation(inputs + F.linear(state[0], weights.weight_hh)),)

    return step


def _lstm(inputs: Tensor, state: State, weights: Weights) -> State:
    h, c = state
    take, forget, new, show = (inputs + F.linear(h, weights.weight_hh)).chunk(4, -1)
    c = forget.sigmoid() * c + take.sigmoid() * new.tanh()
    h = show.sigmoid() * c.tanh()
    return (h if weights.weight_hr is None else F.linear(h, weights.weight_hr)), c


def _gru(inputs: Tensor, state: State, weights: Weights) -> State:
    (h,) = state
    recurrent = F.linear(h, weights.weight_hh, weights.bias_hh)
    size = h.shape[-1]
    gates, new = inputs.split((2 * size, size), -1)
    recurrent_gates, recurrent_new = recurrent.split((2 * size, size), -1)
    reset, update = (gates + recurrent_gates).sigmoid().chunk(2, -1)
    new = (new + reset * recurrent_new).tanh()
    return (new + update * (h - new),)


RNN = {
    "tanh": Cell("rnn", 1, 1, True, _rnn(torch.tanh), torch.rnn_tanh),
    "relu": Cell("rnn", 1, 1, True, _rnn(torch.relu), torch.rnn_relu),
}
LSTM = Cell("lstm", 4, 2, True, _lstm, torch.lstm)
GRU = Cell("gru", 3, 1, False, _gru, torch.gru)

"""Recurrent cells: one step of `rnn_cell`, `lstm_cell`, `gru_cell`, for loops of one's own.

Parameters are named as in torch.nn: ``weight_ih``, ``weight_hh``, ``bias_ih``, ``bias_hh``. Inputs
are [..., input_size], states [..., hidden_size]. The layers of `rnn`, `lstm` and `gru` do the same
along a whole sequence, faster.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from tensordict import TensorDict
from torch import Tensor

from funcnets.layers.initializers import Initializer
from funcnets.layers.params import check_dtype, check_positive, entries, fail, shape
from funcnets.layers.recurrent_layers import zeros
from funcnets.layers.recurrent_steps import GRU, LSTM, RNN, Cell, State, Weights
from funcnets.layers.recurrent_weights import check_weights, init_weights
from funcnets.random import Key

Inputs = Float[Tensor, "*batch input_size"]
Hidden = Float[Tensor, "*batch hidden_size"]


def init_rnn_cell(
    key: Key,
    input_size: int,
    hidden_size: int,
    *,
    bias: bool = True,
    weight_init: Initializer | None = None,
    recurrent_init: Initializer | None = None,
    bias_init: Initializer | None = None,
    dtype: torch.dtype = torch.float32,
) -> TensorDict:
    """Parameters of `rnn_cell`, as ``torch.nn.RNNCell``; the arguments are those of `init_rnn`."""
    inits = (weight_init, recurrent_init, bias_init)
    return _init("init_rnn_cell", key, 1, input_size, hidden_size, bias, inits, None, dtype)


def rnn_cell(
    params: TensorDict,
    x: Inputs,
    state: Hidden | None = None,
    *,
    nonlinearity: Literal["tanh", "relu"] = "tanh",
) -> Hidden:
    """The next h, ``tanh(W_ih x + b_ih + W_hh h + b_hh)``, as ``torch.nn.RNNCell``.

    >>> from funcnets import random
    >>> rnn_cell(init_rnn_cell(random.key(0), 3, 4), torch.ones(5, 3)).shape
    torch.Size([5, 4])
    """
    if nonlinearity not in RNN:
        raise ValueError(f"rnn_cell: nonlinearity: expected tanh or relu, got {nonlinearity}")
    return _step(RNN[nonlinearity], params, x, None if state is None else (state,))[0]


def init_lstm_cell(
    key: Key,
    input_size: int,
    hidden_size: int,
    *,
    bias: bool = True,
    weight_init: Initializer | None = None,
    recurrent_init: Initializer | None = None,
    bias_init: Initializer | None = None,
    forget_bias: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> TensorDict:
    """Parameters of `lstm_cell`, as ``torch.nn.LSTMCell``; the arguments are as in `init_lstm`."""
    if forget_bias is not None and not bias:
        raise ValueError("init_lstm_cell: forget_bias: expected with bias=True only")
    inits = (weight_init, recurrent_init, bias_init)
    return _init("init_lstm_cell", key, 4, input_size, hidden_size, bias, inits, forget_bias, dtype)


def lstm_cell(
    params: TensorDict, x: Inputs, state: tuple[Hidden, Hidden] | None = None
) -> tuple[Hidden, Hidden]:
    """The next (h, c), as ``torch.nn.LSTMCell``.

    >>> from funcnets import random
    >>> h, c = lstm_cell(init_lstm_cell(random.key(0), 3, 4), torch.ones(5, 3))
    >>> h.shape, c.shape
    (torch.Size([5, 4]), torch.Size([5, 4]))
    """
    h, c = _step(LSTM, params, x, state)
    return h, c


def init_gru_cell(
    key: Key,
    input_size: int,
    hidden_size: int,
    *,
    bias: bool = True,
    weight_init: Initializer | None = None,
    recurrent_init: Initializer | None = None,
    bias_init: Initializer | None = None,
    dtype: torch.dtype = torch.float32,
) -> TensorDict:
    """Parameters of `gru_cell`, as ``torch.nn.GRUCell``; the arguments are those of `init_gru`."""
    inits = (weight_init, recurrent_init, bias_init)
    return _init("init_gru_cell", key, 3, input_size, hidden_size, bias, inits, None, dtype)


def gru_cell(params: TensorDict, x: Inputs, state: Hidden | None = None) -> Hidden:
    """The next h, as ``torch.nn.GRUCell``.

    >>> from funcnets import random
    >>> gru_cell(init_gru_cell(random.key(0), 3, 4), torch.ones(5, 3)).shape
    torch.Size([5, 4])
    """
    return _step(GRU, params, x, None if state is None else (state,))[0]


def _init(
    layer: str,
    key: Key,
    gates: int,
    input_size: int,
    hidden_size: int,
    bias: bool,
    inits: tuple[Initializer | None, ...],
    forget_bias: float | None,
    dtype: torch.dtype,
) -> TensorDict:
    check_positive(layer, input_size=input_size, hidden_size=hidden_size)
    made = init_weights(key, gates, input_size, hidden_size, 0, bias, inits, forget_bias, dtype)
    return TensorDict(made)


def _step(cell: Cell, params: TensorDict, x: Tensor, state: State | None) -> State:
    layer, found = f"{cell.name}_cell", entries(params)
    for name in ("weight_ih", "weight_hh"):
        if name not in found:
            known = ", ".join(found) or "none"
            raise KeyError(f"{layer}: params: expected an entry {name}, got {known}")
    weights = Weights(
        found["weight_ih"],
        found["weight_hh"],
        found.get("bias_ih", None),
        found.get("bias_hh", None),
    )
    check_weights(cell, weights, "", None)
    features, hidden = weights.weight_ih.shape[1], weights.weight_hh.shape[1]
    if not x.ndim or x.shape[-1] != features:
        fail(layer, "x", shape("...", features), x.shape)
    check_dtype(layer, x, weights.weight_ih, "weight")
    for name, part in zip(("h", "c"), state or (), strict=False):
        label = "state" if cell.states == 1 else f"state: {name}"
        if part.shape != (*x.shape[:-1], hidden):
            fail(layer, label, str([*x.shape[:-1], hidden]), part.shape)
        check_dtype(layer, part, weights.weight_ih, "weight")
    projected = cell.project(x, weights)
    if state is None:
        state = zeros(cell, weights, projected, tuple(x.shape[:-1]))
    return cell.step(projected, state, weights)

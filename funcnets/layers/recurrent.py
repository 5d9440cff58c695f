"""Recurrent layers over sequences: `rnn`, `lstm`, `gru`, of any depth, in one or both directions.

Parameters are named as in torch.nn (``weight_ih_l0``, ``weight_hh_l0_reverse``, ``bias_ih_l1``,
...), and the parameters tell the depth and the directions. Unlike there, a batch comes first by
default. All three take sequences [batch, time, input_size] (or with ``batch_first=False``
[time, batch, input_size], or one sequence [time, input_size]) and give the outputs of the last
layer at every time, [batch, time, output_size], and the last state of every layer: states are
[num_layers * directions, batch, hidden_size], without batch for one sequence, ordered as in torch.

A state that goes in as it came out continues a sequence: in chunks, the outputs are those of one
pass, and a state that is detached in between cuts the gradient (truncated backpropagation).

torch's own kernel computes where it can. It cannot under vmap, forward mode and second derivatives
of torch.func, nor where a compiler records what runs; there the inputs go through their weights at
all times at once, and `funcnets.scan` runs over what remains. Take first derivatives of an LSTM by
`funcnets.grad`: ``torch.func.grad`` always asks for a backward pass that can be differentiated
again, which torch's kernel of an LSTM on the CPU has step by step alone, several times as slow.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from tensordict import TensorDict
from torch import Tensor

from funcnets.layers.dropout import Rate
from funcnets.layers.initializers import Initializer
from funcnets.layers.recurrent_layers import run
from funcnets.layers.recurrent_steps import GRU, LSTM, RNN
from funcnets.layers.recurrent_weights import init_stack
from funcnets.random import Key

Sequences = Float[Tensor, "*sequence input_size"]
Outputs = Float[Tensor, "*sequence output_size"]
Hidden = Float[Tensor, "states *batch hidden_size"]
Lengths = Int[Tensor, "*batch"]


def init_rnn(
    key: Key,
    input_size: int,
    hidden_size: int,
    num_layers: int = 1,
    *,
    bidirectional: bool = False,
    bias: bool = True,
    weight_init: Initializer | None = None,
    recurrent_init: Initializer | None = None,
    bias_init: Initializer | None = None,
    dtype: torch.dtype = torch.float32,
) -> TensorDict:
    """Parameters of `rnn`, named and by default distributed as those of ``torch.nn.RNN``.

    All are uniform within ``1 / sqrt(hidden_size)``.

    Args:
        weight_init: of the weights of the inputs.
        recurrent_init: of the weights of the state; ``initializers.orthogonal()`` keeps the length
            of the state at first (Saxe et al. 2014).
        bias_init: of both biases.

    >>> from funcnets import random
    >>> params = init_rnn(random.key(0), 3, 4, bidirectional=True, bias=False)
    >>> sorted(params.keys())
    ['weight_hh_l0', 'weight_hh_l0_reverse', 'weight_ih_l0', 'weight_ih_l0_reverse']
    """
    inits = (weight_init, recurrent_init, bias_init)
    sizes = (input_size, hidden_size, num_layers, 0)
    return init_stack("init_rnn", key, 1, sizes, bidirectional, bias, inits, None, dtype)


def rnn(
    params: TensorDict,
    x: Sequences,
    state: Hidden | None = None,
    lengths: Lengths | None = None,
    *,
    nonlinearity: Literal["tanh", "relu"] = "tanh",
    batch_first: bool = True,
    dropout: Rate = 0.0,
    key: Key | None = None,
    unroll: bool = True,
    fused: bool = True,
) -> tuple[Outputs, Hidden]:
    """``h = tanh(W_ih x + b_ih + W_hh h + b_hh)`` along a sequence (Elman 1990).

    As ``torch.nn.RNN``; shapes are at the top of this module.

    Args:
        state: the first h of every layer; zeros by default.
        lengths: of each sequence of the batch. Outputs beyond are zeros, last states are those at
            the length, and the reverse direction begins there: what packed sequences give.
        nonlinearity: what h goes through.
        dropout: the rate between layers; draws where ``key`` is given too.
        unroll: whether `funcnets.compile` lays the steps out one after the other: fast to run, slow
            to compile for long sequences. See `funcnets.scan`.
        fused: whether torch's kernel may be used. On CUDA it has no second derivative, of which
            plain autograd (unlike torch.func) gives no notice beforehand.

    Returns:
        The outputs, and the last h.

    Raises:
        ValueError: where shapes or dtypes do not fit, a length is not within 1 and the time, or a
            sequence has no element.

    >>> from funcnets import random
    >>> params = init_rnn(random.key(0), 3, 4, num_layers=2)
    >>> outputs, state = rnn(params, torch.ones(5, 7, 3))
    >>> outputs.shape, state.shape
    (torch.Size([5, 7, 4]), torch.Size([2, 5, 4]))
    """
    if nonlinearity not in RNN:
        raise ValueError(f"rnn: nonlinearity: expected tanh or relu, got {nonlinearity}")
    outputs, (h,) = run(
        RNN[nonlinearity],
        params,
        x,
        None if state is None else (state,),
        lengths,
        batch_first=batch_first,
        dropout=dropout,
        key=key,
        unroll=unroll,
        fused=fused,
    )
    return outputs, h


def init_lstm(
    key: Key,
    input_size: int,
    hidden_size: int,
    num_layers: int = 1,
    *,
    bidirectional: bool = False,
    bias: bool = True,
    proj_size: int = 0,
    weight_init: Initializer | None = None,
    recurrent_init: Initializer | None = None,
    bias_init: Initializer | None = None,
    forget_bias: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> TensorDict:
    """Parameters of `lstm`, named and by default distributed as those of ``torch.nn.LSTM``.

    All are uniform within ``1 / sqrt(hidden_size)``. An initializer makes the part of each gate on
    its own, so that ``recurrent_init=initializers.orthogonal()`` gives an orthogonal matrix for
    each.

    Args:
        proj_size: the size of h where it is projected (Sak et al. 2014); 0 for no projection.
        forget_bias: where the bias of the forget gate begins, the sum of its two; 1 lets gradients
            pass through time from the start (Jozefowicz et al. 2015).

    >>> from funcnets import random
    >>> init_lstm(random.key(0), 3, 2, forget_bias=1.0)["bias_ih_l0"][2:4]
    tensor([1., 1.])
    """
    if proj_size and not 0 < proj_size < hidden_size:
        raise ValueError(
            f"init_lstm: proj_size: expected less than hidden_size {hidden_size}, got {proj_size}"
        )
    if forget_bias is not None and not bias:
        raise ValueError("init_lstm: forget_bias: expected with bias=True only")
    inits = (weight_init, recurrent_init, bias_init)
    sizes = (input_size, hidden_size, num_layers, proj_size)
    return init_stack("init_lstm", key, 4, sizes, bidirectional, bias, inits, forget_bias, dtype)


def lstm(
    params: TensorDict,
    x: Sequences,
    state: tuple[Hidden, Float[Tensor, "states *batch cell_size"]] | None = None,
    lengths: Lengths | None = None,
    *,
    batch_first: bool = True,
    dropout: Rate = 0.0,
    key: Key | None = None,
    unroll: bool = True,
    fused: bool = True,
) -> tuple[Outputs, tuple[Hidden, Float[Tensor, "states *batch cell_size"]]]:
    """Long short-term memory along a sequence (Hochreiter and Schmidhuber 1997).

    As ``torch.nn.LSTM``; shapes are at the top of this module, and the arguments those of `rnn`,
    except that a state is a pair (h, c).

    >>> from funcnets import random
    >>> params = init_lstm(random.key(0), 3, 4, bidirectional=True)
    >>> outputs, (h, c) = lstm(params, torch.ones(5, 7, 3))
    >>> outputs.shape, c.shape
    (torch.Size([5, 7, 8]), torch.Size([2, 5, 4]))
    """
    outputs, (h, c) = run(
        LSTM,
        params,
        x,
        state,
        lengths,
        batch_first=batch_first,
        dropout=dropout,
        key=key,
        unroll=unroll,
        fused=fused,
    )
    return outputs, (h, c)


def init_gru(
    key: Key,
    input_size: int,
    hidden_size: int,
    num_layers: int = 1,
    *,
    bidirectional: bool = False,
    bias: bool = True,
    weight_init: Initializer | None = None,
    recurrent_init: Initializer | None = None,
    bias_init: Initializer | None = None,
    dtype: torch.dtype = torch.float32,
) -> TensorDict:
    """Parameters of `gru`, named and by default distributed as those of ``torch.nn.GRU``.

    All are uniform within ``1 / sqrt(hidden_size)``. An initializer makes the part of each gate on
    its own.

    >>> from funcnets import random
    >>> init_gru(random.key(0), 3, 4, num_layers=2)["weight_ih_l1"].shape
    torch.Size([12, 4])
    """
    inits = (weight_init, recurrent_init, bias_init)
    sizes = (input_size, hidden_size, num_layers, 0)
    return init_stack("init_gru", key, 3, sizes, bidirectional, bias, inits, None, dtype)


def gru(
    params: TensorDict,
    x: Sequences,
    state: Hidden | None = None,
    lengths: Lengths | None = None,
    *,
    batch_first: bool = True,
    dropout: Rate = 0.0,
    key: Key | None = None,
    unroll: bool = True,
    fused: bool = True,
) -> tuple[Outputs, Hidden]:
    """Gated recurrent units along a sequence (Cho et al. 2014, with the reset gate after the sum).

    As ``torch.nn.GRU``; shapes are at the top of this module, and the arguments those of `rnn`.

    >>> from funcnets import random
    >>> params = init_gru(random.key(0), 3, 4)
    >>> outputs, state = gru(params, torch.ones(5, 7, 3), lengths=torch.tensor([7, 1, 2, 3, 4]))
    >>> outputs[1, 1:].count_nonzero()
    tensor(0)
    """
    outputs, (h,) = run(
        GRU,
        params,
        x,
        None if state is None else (state,),
        lengths,
        batch_first=batch_first,
        dropout=dropout,
        key=key,
        unroll=unroll,
        fused=fused,
    )
    return outputs, h

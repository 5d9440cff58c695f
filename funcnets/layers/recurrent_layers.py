"""A stack of recurrent layers over a sequence: what `rnn`, `lstm` and `gru` have in common."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from tensordict import TensorDict
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from funcnets import _torch, random
from funcnets.control import scan
from funcnets.layers.dropout import Rate, draws, dropout
from funcnets.layers.params import check_dtype, fail
from funcnets.layers.recurrent_steps import Cell, State, Weights
from funcnets.layers.recurrent_weights import Stack, read


def run(
    cell: Cell,
    params: TensorDict,
    x: Tensor,
    state: State | None,
    lengths: Tensor | None,
    *,
    batch_first: bool,
    dropout: Rate,
    key: random.Key | None,
    unroll: bool,
    fused: bool,
) -> tuple[Tensor, State]:
    """The outputs of the last layer, and the last states [layers * directions, batch, ...]."""
    stack = read(cell, params)
    _check_input(cell, stack, x, batch_first)
    alone = x.ndim == 2
    if alone:
        batch_first = True
    if state is not None:
        _check_state(cell, stack, state, x, batch_first)
    if lengths is not None:
        _check_lengths(cell, lengths, x, batch_first)
    if alone:
        x = x.unsqueeze(0)
        state = None if state is None else tuple(part.unsqueeze(1) for part in state)
        lengths = None if lengths is None else lengths.unsqueeze(0)
    way = _fused if fused and _plain(lengths) else _scanned
    options: dict[str, Any] = {"batch_first": batch_first, "unroll": unroll}
    if key is None or not draws(key, dropout) or len(stack) == 1:
        outputs, last = way(cell, stack, x, state, lengths, **options)
    else:
        outputs, last = _dropping(way, cell, stack, x, state, lengths, dropout, key, options)
    if alone:
        return outputs.squeeze(0), tuple(part.squeeze(1) for part in last)
    return outputs, last


def _plain(lengths: Tensor | None) -> bool:
    """Whether torch's kernel serves: not under vmap or twice differentiated, nor recorded."""
    if _torch.vmapping() or _torch.abstract():
        return False
    # Of packed sequences the kernel reads memory that torch.func hides.
    return _torch.first_order() if lengths is None else not _torch.transforming()


def _dropping(
    way: Any,
    cell: Cell,
    stack: Stack,
    x: Tensor,
    state: State | None,
    lengths: Tensor | None,
    rate: Rate,
    key: random.Key,
    options: dict[str, Any],
) -> tuple[Tensor, State]:
    """Layer by layer, with dropout between them."""
    keys = random.split(key, len(stack)).unbind()
    size, finals = len(stack[0]), []
    for i, layer in enumerate(stack):
        if i:
            x = dropout(keys[i], x, rate)
        own = None if state is None else tuple(part[i * size : (i + 1) * size] for part in state)
        x, final = way(cell, [layer], x, own, lengths, **options)
        finals.append(final)
    return x, tuple(torch.cat(parts) for parts in zip(*finals, strict=True))


def zeros(cell: Cell, weights: Weights, x: Tensor, sizes: tuple[int, ...]) -> State:
    """A state [*sizes, hidden_size] of zeros, of the kind of x."""
    widths = weights.weight_hh.shape[1], weights.weight_hh.shape[0] // cell.gates
    return tuple(x.new_zeros(*sizes, width) for width in widths[: cell.states])


def _fused(
    cell: Cell,
    stack: Stack,
    x: Tensor,
    state: State | None,
    lengths: Tensor | None,
    *,
    batch_first: bool,
    unroll: bool,
) -> tuple[Tensor, State]:
    """By torch's kernel, which has no vmap rule, and on some devices no second derivative."""
    flat = [entry for layer in stack for each in layer for entry in each if entry is not None]
    batch = x.shape[0 if batch_first else 1]
    if state is None:
        state = zeros(cell, stack[0][0], x, (len(stack) * len(stack[0]), batch))
    tail = (flat, stack[0][0].bias_ih is not None, len(stack), 0.0)
    # Between training and inference the kernels differ in what they keep for the backward.
    modes = (torch.is_grad_enabled(), len(stack[0]) == 2)
    if lengths is None:
        outputs, *last = cell.kernel(x, _packed(state), *tail, *modes, batch_first)
        return outputs, tuple(last)
    packed = pack_padded_sequence(x, lengths.cpu(), batch_first, enforce_sorted=False)
    assert packed.sorted_indices is not None  # as enforce_sorted is False
    assert packed.unsorted_indices is not None
    state = tuple(part.index_select(1, packed.sorted_indices) for part in state)
    data, *last = cell.kernel(packed.data, packed.batch_sizes, _packed(state), *tail, *modes)
    outputs, _ = pad_packed_sequence(
        packed._replace(data=data), batch_first, total_length=x.shape[1 if batch_first else 0]
    )
    return outputs, tuple(part.index_select(1, packed.unsorted_indices) for part in last)


def _packed(state: State) -> Tensor | State:
    return state if len(state) > 1 else state[0]


def _scanned(
    cell: Cell,
    stack: Stack,
    x: Tensor,
    state: State | None,
    lengths: Tensor | None,
    *,
    batch_first: bool,
    unroll: bool,
) -> tuple[Tensor, State]:
    """By `scan`: plain arithmetic, on which every transform works."""
    if batch_first:
        x = rearrange(x, "batch time features -> time batch features")
    valid = None
    if lengths is not None:
        steps = rearrange(torch.arange(x.shape[0], device=x.device), "time -> time 1 1")
        valid = steps < rearrange(lengths, "batch -> batch 1")
    finals: list[State] = []
    for layer in stack:
        outputs = []
        for direction, weights in enumerate(layer):
            projected = cell.project(x, weights)
            if state is None:
                begin = zeros(cell, weights, projected, (x.shape[1],))
            else:
                # Under autocast the inputs are of its dtype from here on.
                begin = tuple(part[len(finals)].to(projected.dtype) for part in state)
            one, final = _direction(cell, weights, projected, begin, valid, direction == 1, unroll)
            outputs.append(one)
            finals.append(final)
        x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
    last = tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
    if batch_first:
        x = rearrange(x, "time batch features -> batch time features")
    return x, last


def _direction(
    cell: Cell,
    weights: Weights,
    projected: Tensor,
    begin: State,
    valid: Tensor | None,
    reverse: bool,
    unroll: bool,
) -> tuple[Tensor, State]:
    """One layer in one direction, from projected inputs [time, batch, gates * hidden_size].

    Where an element is not valid the state stays as it is; so the reverse direction begins at the
    last valid one.
    """

    def turn(state: State, now: tuple[Tensor, ...]) -> tuple[State, Tensor]:
        new = cell.step(now[0], state, weights)
        if valid is None:
            return new, new[0]
        kept = tuple(torch.where(now[1], n, o) for n, o in zip(new, state, strict=True))
        return kept, torch.where(now[1], new[0], 0.0)

    xs = (projected,) if valid is None else (projected, valid)
    final, outputs = scan(turn, begin, xs, reverse=reverse, unroll=unroll)
    return outputs, final


def _check_input(cell: Cell, stack: Stack, x: Tensor, batch_first: bool) -> None:
    weight = stack[0][0].weight_ih
    features, rank = weight.shape[1], x.ndim
    axes = "batch, time" if batch_first else "time, batch"
    if rank not in (2, 3) or x.shape[-1] != features:
        fail(cell.name, "x", f"[{axes}, {features}] or [time, {features}]", x.shape)
    if not x.shape[1 if rank == 3 and batch_first else 0]:
        fail(cell.name, "x", "a sequence of at least one element", x.shape)
    if x.dtype != weight.dtype:
        check_dtype(cell.name, x, weight, "weight")


def _check_state(cell: Cell, stack: Stack, state: State, x: Tensor, batch_first: bool) -> None:
    batch = x.shape[0 if batch_first else 1 : 1 if batch_first else 2] if x.ndim == 3 else ()
    hidden = stack[0][0].weight_hh
    widths = hidden.shape[1], hidden.shape[0] // cell.gates
    for name, part, width in zip(("h", "c"), state, widths, strict=False):
        expected = [len(stack) * len(stack[0]), *batch, width]
        label = "state" if cell.states == 1 else f"state: {name}"
        if list(part.shape) != expected:
            fail(cell.name, label, str(expected), part.shape)
        if part.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"{cell.name}: {label}: expected {x.dtype} (as x), got {part.dtype}")


def _check_lengths(cell: Cell, lengths: Tensor, x: Tensor, batch_first: bool) -> None:
    alone = x.ndim == 2
    time = x.shape[0 if alone or not batch_first else 1]
    batch = () if alone else (x.shape[0 if batch_first else 1],)
    if lengths.shape != batch:
        fail(cell.name, "lengths", str(list(batch)), lengths.shape)
    if lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(f"{cell.name}: lengths: expected integers, got {lengths.dtype}")
    if torch.compiler.is_dynamo_compiling() or _torch.abstract():
        return  # there are no values to look at
    for length in _torch.physical(lengths).flatten().tolist():
        if not 1 <= length <= time:
            raise ValueError(f"{cell.name}: lengths: expected 1 to {time}, got {length}")

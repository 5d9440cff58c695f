"""The weights of recurrent layers by name: how they begin, and what their shapes tell."""

from __future__ import annotations

import math
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from funcnets import random
from funcnets.layers.initializers import Initializer, uniform
from funcnets.layers.params import check_positive, entries, fail
from funcnets.layers.recurrent_steps import Cell, Weights
from funcnets.random import Key

_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
# The weights of each layer, of each of which one for each direction.
Stack = list[list[Weights]]


def init_stack(
    layer: str,
    key: Key,
    gates: int,
    sizes: tuple[int, int, int, int],
    bidirectional: bool,
    bias: bool,
    inits: tuple[Initializer | None, ...],
    forget_bias: float | None,
    dtype: torch.dtype,
) -> TensorDict:
    """The parameters of a stack of layers."""
    input_size, hidden_size, num_layers, proj_size = sizes
    check_positive(layer, input_size=input_size, hidden_size=hidden_size, num_layers=num_layers)
    directions = ("", "_reverse") if bidirectional else ("",)
    output_size = proj_size or hidden_size
    keys = iter(random.split(key, num_layers * len(directions)).unbind())
    params: dict[str, Tensor] = {}
    for i in range(num_layers):
        inputs = input_size if i == 0 else output_size * len(directions)
        for direction in directions:
            made = init_weights(
                next(keys), gates, inputs, hidden_size, proj_size, bias, inits, forget_bias, dtype
            )
            params |= {f"{name}_l{i}{direction}": entry for name, entry in made.items()}
    return TensorDict(params)


def init_weights(
    key: Key,
    gates: int,
    input_size: int,
    hidden_size: int,
    proj_size: int,
    bias: bool,
    inits: tuple[Initializer | None, ...],
    forget_bias: float | None,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The weights of one layer in one direction, or of a cell."""
    bound = 1 / math.sqrt(hidden_size)
    weight_init, recurrent_init, bias_init = (
        uniform(-bound, bound) if init is None else init for init in inits
    )
    output_size = proj_size or hidden_size
    plan: dict[str, tuple[Initializer, int, tuple[int, ...]]] = {
        "weight_ih": (weight_init, gates, (hidden_size, input_size)),
        "weight_hh": (recurrent_init, gates, (hidden_size, output_size)),
    }
    if bias:
        plan |= dict.fromkeys(("bias_ih", "bias_hh"), (bias_init, gates, (hidden_size,)))
    if proj_size:
        plan["weight_hr"] = recurrent_init, 1, (proj_size, hidden_size)
    made = {}
    for (name, (init, parts, size)), own in zip(
        plan.items(), random.split(key, len(plan)).unbind(), strict=True
    ):
        each = [init(one, size, dtype) for one in random.split(own, parts).unbind()]
        if forget_bias is not None and name in ("bias_ih", "bias_hh"):
            begin = forget_bias if name == "bias_ih" else 0.0
            each[1] = torch.full_like(each[1], begin)  # the gates are input, forget, cell, output
        made[name] = torch.cat(each)
    return made


def read(cell: Cell, params: TensorDict) -> Stack:
    """The weights by layer and direction, whose shapes have been compared with each other.

    Raises:
        KeyError: where a weight is missing.
        ValueError: where a shape does not fit those of the others.
    """
    found = entries(params)
    directions = ("", "_reverse") if "weight_ih_l0_reverse" in found else ("",)
    stack: Stack = []
    inputs: int | None = None
    while not stack or f"weight_ih_l{len(stack)}" in found:
        each = []
        for direction in directions:
            suffix = f"_l{len(stack)}{direction}"
            held = [found.get(name + suffix, None) for name in _NAMES]
            for name, entry in zip(_NAMES[:2], held[:2], strict=True):
                if entry is None:
                    known = ", ".join(found) or "none"
                    raise KeyError(
                        f"{cell.name}: params: expected an entry {name}{suffix}, got {known}"
                    )
            each.append(Weights(*held))
            check_weights(cell, each[-1], suffix, inputs)
        stack.append(each)
        first = stack[0][0]
        if each[0].weight_hh.shape != first.weight_hh.shape:
            expected = str(list(first.weight_hh.shape))
            fail(cell.name, f"weight_hh_l{len(stack) - 1}", expected, each[0].weight_hh.shape)
        inputs = first.weight_hh.shape[1] * len(directions)
    return stack


def check_weights(cell: Cell, weights: Weights, suffix: str, inputs: int | None) -> None:
    """Raises where shapes of the weights of a layer in one direction do not fit each other."""
    recurrent = weights.weight_hh
    outputs = recurrent.shape[-1] if recurrent.ndim == 2 else 0
    rows = recurrent.shape[0]
    hidden = rows // cell.gates
    if weights.weight_hr is not None:
        expected: Any = outputs, hidden
        if weights.weight_hr.shape != expected:
            fail(cell.name, f"weight_hr{suffix}", str(list(expected)), weights.weight_hr.shape)
    elif rows != cell.gates * outputs or not rows:
        times = f"{cell.gates} * hidden_size" if cell.gates > 1 else "hidden_size"
        fail(cell.name, f"weight_hh{suffix}", f"[{times}, hidden_size]", recurrent.shape)
    shape = weights.weight_ih.shape
    if len(shape) != 2 or shape[0] != rows or (inputs is not None and shape[1] != inputs):
        width = "input_size" if inputs is None else inputs
        fail(cell.name, f"weight_ih{suffix}", f"[{rows}, {width}]", shape)
    for name, bias in (("bias_ih", weights.bias_ih), ("bias_hh", weights.bias_hh)):
        if (bias is None) != (weights.bias_ih is None):
            raise ValueError(f"{cell.name}: expected both bias_ih{suffix} and bias_hh{suffix}")
        if bias is not None and bias.shape != (rows,):
            fail(cell.name, f"{name}{suffix}", f"[{rows}]", bias.shape)

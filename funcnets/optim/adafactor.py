"""Adafactor."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from einops import reduce
from jaxtyping import Float, Int64
from torch import Size, Tensor

from funcnets.optim.base import Optimizer
from funcnets.optim.decay import decayed
from funcnets.optim.leafwise import (
    Hyperparameter,
    Moment,
    Number,
    check_hyperparameter,
    check_params,
    check_state,
    leafwise,
    new_step,
    resolve,
)
from funcnets.tree.flatten import Tree, map
from funcnets.tree.select import Where


class AdafactorState(NamedTuple):
    """The number of updates made, and the running means of the squared gradient.

    Of a leaf [..., m, n] only those over each row [..., m, 1] and each column [..., 1, n]; of one
    with fewer axes the whole, in ``row``, with an empty ``column``.
    """

    step: Int64[Tensor, ""]
    row: Tree
    column: Tree


def adafactor(
    learning_rate: Hyperparameter = 1e-2,
    decay_exponent: float = -0.8,
    eps: tuple[float | None, float] = (None, 1e-3),
    threshold: float = 1.0,
    weight_decay: Hyperparameter = 0.0,
    where: Where | None = None,
) -> Optimizer:
    """Adafactor (Shazeer and Stern 2018), as `torch.optim.Adafactor`.

    Its state is smaller than the parameters. The steps are relative to the size of the parameters,
    and the weight decay is decoupled.

    Args:
        learning_rate: an upper bound on the relative step, which is ``1 / sqrt(n)`` at update n.
        decay_exponent: torch's ``beta2_decay``: update n enters the means with weight
            ``n ** decay_exponent``.
        eps: added under the root (by default the eps of the dtype), and the least size that a
            parameter is taken to have.
        threshold: torch's ``d``: updates whose root mean square is larger are scaled down to it.
        where: which leaves decay, by path, as in `funcnets.tree.matcher`; by default all.

    >>> optimizer = adafactor(1e-2)
    """
    eps1, eps2 = eps
    check_hyperparameter("adafactor: learning_rate", learning_rate)
    check_hyperparameter("adafactor: eps[0]", 0.0 if eps1 is None else eps1)
    check_hyperparameter("adafactor: eps[1]", eps2)
    check_hyperparameter("adafactor: threshold", threshold, least=1.0)
    if not decay_exponent <= 0:
        raise ValueError(f"adafactor: decay_exponent: expected at most 0, got {decay_exponent}")

    def init(params: Tree) -> AdafactorState:
        check_params("adafactor", params)
        rows, columns = (
            map(lambda leaf, axis=axis: leaf.new_zeros(_shapes(leaf)[axis]), params)
            for axis in (0, 1)
        )
        return AdafactorState(new_step(params), rows, columns)

    def update(
        grads: Tree, state: Any, params: Tree, value: Float[Tensor, ""] | None = None
    ) -> tuple[Tree, AdafactorState]:
        check_state("adafactor", AdafactorState, state)
        time = (state.step + 1).to(torch.float64)
        relative = torch.minimum(
            resolve(learning_rate, state.step) * torch.ones_like(time), time**-0.5
        )
        updates, row, column = leafwise(
            "adafactor",
            rule,
            (-relative, time**decay_exponent),
            grads,
            params,
            state.row,
            state.column,
            shapes=_shapes,
        )
        return updates, AdafactorState(state.step + 1, row, column)

    def rule(
        scalars: list[Number], grad: Tensor, param: Tensor, row: Tensor, column: Tensor
    ) -> tuple[Moment, ...]:
        relative, share = scalars
        least = torch.finfo(param.dtype).eps if eps1 is None else eps1
        if grad.ndim > 1:
            squares = grad * grad
            row = torch.lerp(row, reduce(squares, "... m n -> ... m 1", "mean"), share)
            column = torch.lerp(column, reduce(squares, "... m n -> ... 1 n", "mean"), share)
            scale = reduce(row, "... m 1 -> ... 1 1", "mean").clamp(min=least)
            square = row @ column / scale
        else:
            square = row = torch.lerp(row, grad * grad, share)
        change = grad * square.clamp(min=least * least).rsqrt()
        excess = (_rms(change) / threshold).clamp(min=1.0)
        size = _rms(param).clamp(min=eps2)
        return change * (relative * size / excess), row, column

    return decayed("adafactor", Optimizer(init, update), learning_rate, weight_decay, where)


def _rms(x: Tensor) -> Float[Tensor, ""]:
    return torch.linalg.vector_norm(x) / math.sqrt(max(x.numel(), 1))


def _shapes(leaf: Tensor) -> tuple[Size, Size]:
    if leaf.ndim < 2:
        return leaf.shape, Size([0])
    *batch, m, n = leaf.shape
    return Size([*batch, m, 1]), Size([*batch, 1, n])

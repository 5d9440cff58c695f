"""Gradient accumulation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from funcnets.optim.base import Optimizer
from funcnets.optim.leafwise import (
    Moment,
    Number,
    check_params,
    check_state,
    leafwise,
    like,
    new_step,
)
from funcnets.tree.flatten import Tree, map


class AccumulateState(NamedTuple):
    """The number of gradients held, their sum, and the state of the optimizer."""

    held: Int64[Tensor, ""]
    total: Tree
    state: Any


def accumulate(optimizer: Optimizer, every: int) -> Optimizer:
    """Gives an optimizer the mean of ``every`` gradients in a row, and zero updates in between.

    So ``every`` micro-batches of one size make one update on a batch as large as all together,
    with any loss that is a mean over the batch. To clip their mean, ``accumulate(chain(clip,
    optimizer), every)``. The optimizer is computed with every gradient, and its result kept with
    every so manyth: there is no branch to read a number from the device for.

    >>> from funcnets import optim
    >>> optimizer, params = optim.accumulate(optim.sgd(1.0), 2), {"w": torch.zeros(1)}
    >>> state = optimizer.init(params)
    >>> updates, state = optimizer.update({"w": torch.tensor([2.0])}, state, params)
    >>> updates, state = optimizer.update({"w": torch.tensor([4.0])}, state, params)
    >>> updates
    {'w': tensor([-3.])}
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"accumulate: every: expected an int of at least 1, got {every!r}")

    def init(params: Tree) -> AccumulateState:
        check_params("accumulate", params)
        return AccumulateState(new_step(params), like(params), optimizer.init(params))

    def update(
        grads: Tree, state: Any, params: Tree, value: Float[Tensor, ""] | None = None
    ) -> tuple[Tree, AccumulateState]:
        check_state("accumulate", AccumulateState, state)
        full = state.held + 1 >= every
        mean, total = leafwise("accumulate", rule, (), grads, params, state.total)
        updates, inner = optimizer.update(mean, state.state, params, value)

        def keep(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(full, new, old)

        updates = map(lambda leaf: keep(leaf, torch.zeros_like(leaf)), updates)
        total = map(lambda leaf: keep(torch.zeros_like(leaf), leaf), total)
        held = keep(torch.zeros_like(state.held), state.held + 1)
        return updates, AccumulateState(held, total, map(keep, inner, state.state))

    def rule(
        scalars: list[Number], grad: Tensor, param: Tensor, total: Tensor
    ) -> tuple[Moment, ...]:
        total = total + grad
        return total / every, total

    return Optimizer(init, update)

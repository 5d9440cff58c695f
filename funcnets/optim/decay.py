"""Decoupled weight decay."""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxtyping import Float, Int64
from torch import Tensor

from funcnets.optim.base import Optimizer
from funcnets.optim.leafwise import (
    Hyperparameter,
    Number,
    add_scaled,
    aligned,
    as_leaf,
    check_hyperparameter,
    check_state,
    is_zero,
    leafwise,
    new_step,
    resolve,
)
from funcnets.tree.flatten import Tree, leaves_with_path, unflatten_like
from funcnets.tree.select import Where, matcher


class DecayState(NamedTuple):
    """The number of updates made."""

    step: Int64[Tensor, ""]


def decoupled_weight_decay(
    weight_decay: Hyperparameter,
    learning_rate: Hyperparameter,
    where: Where | None = None,
) -> Optimizer:
    """Adds ``-learning_rate * weight_decay * params`` to the updates (Loshchilov and Hutter 2019).

    It goes after the optimizer in a `chain`, and takes its learning rate once more.

    Args:
        where: which leaves decay, by path, as in `funcnets.tree.matcher`; by default all.

    >>> import torch
    >>> from funcnets import optim
    >>> optimizer = optim.chain(
    ...     optim.sgd(0.1), optim.decoupled_weight_decay(0.01, 0.1, where="*.weight")
    ... )
    """
    name = "decoupled_weight_decay"
    check_hyperparameter(f"{name}: learning_rate", learning_rate)

    def init(params: Tree) -> DecayState:
        return DecayState(new_step(params))

    def update(
        grads: Tree, state: Any, params: Tree, value: Float[Tensor, ""] | None = None
    ) -> tuple[Tree, DecayState]:
        check_state(name, DecayState, state)
        return grads, DecayState(state.step + 1)

    return decayed(name, Optimizer(init, update), learning_rate, weight_decay, where)


def decayed(
    name: str,
    optimizer: Optimizer,
    learning_rate: Hyperparameter,
    weight_decay: Hyperparameter,
    where: Where | None,
) -> Optimizer:
    """An optimizer (whose state has a ``step``) with decoupled weight decay."""
    check_hyperparameter(f"{name}: weight_decay", weight_decay)
    matches = None if where is None else matcher(where)
    if is_zero(weight_decay):
        return optimizer

    def update(
        grads: Tree, state: Any, params: Tree, value: Float[Tensor, ""] | None = None
    ) -> tuple[Tree, Any]:
        updates, new = optimizer.update(grads, state, params, value)
        rate = -resolve(learning_rate, state.step) * resolve(weight_decay, state.step)
        if matches is None:
            return leafwise(name, rule, (rate,), updates, params)[0], new
        changes = [
            add_scaled(change, as_leaf(rate, leaf), leaf) if matches(path, leaf) else change
            for (path, leaf), change in zip(
                leaves_with_path(params), aligned(name, updates, params), strict=True
            )
        ]
        return unflatten_like(params, changes), new

    def rule(scalars: list[Number], change: Tensor, param: Tensor) -> tuple[Tensor]:
        return (add_scaled(change, scalars[0], param),)

    return Optimizer(optimizer.init, update)

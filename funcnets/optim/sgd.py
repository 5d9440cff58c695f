"""Stochastic gradient descent."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from funcnets.optim.base import Optimizer
from funcnets.optim.leafwise import (
    Hyperparameter,
    Moment,
    Number,
    add_scaled,
    check_hyperparameter,
    check_params,
    check_state,
    is_absent,
    is_zero,
    leafwise,
    like,
    new_step,
    resolve,
    scaled,
)
from funcnets.tree.flatten import Tree


class SgdState(NamedTuple):
    """The number of updates made, and the momentum buffers (empty without momentum)."""

    step: Int64[Tensor, ""]
    momentum: Tree


def sgd(
    learning_rate: Hyperparameter = 1e-3,
    momentum: Hyperparameter = 0.0,
    dampening: Hyperparameter = 0.0,
    weight_decay: Hyperparameter = 0.0,
    nesterov: bool = False,
) -> Optimizer:
    """Stochastic gradient descent, as `torch.optim.SGD`.

    Every hyperparameter is a number, a tensor of shape [] or a schedule. ``weight_decay`` is added
    to the gradient; for the decoupled kind, chain `decoupled_weight_decay` after.

    >>> params = {"weight": torch.tensor([1.0])}
    >>> optimizer = sgd(0.1)
    >>> optimizer.update({"weight": torch.tensor([2.0])}, optimizer.init(params), params)[0]
    {'weight': tensor([-0.2000])}
    """
    check_hyperparameter("sgd: learning_rate", learning_rate)
    check_hyperparameter("sgd: momentum", momentum)
    check_hyperparameter("sgd: dampening", dampening)
    check_hyperparameter("sgd: weight_decay", weight_decay)
    with_momentum = not is_zero(momentum)
    if nesterov and (not with_momentum or not is_zero(dampening)):
        raise ValueError("sgd: nesterov: expected a momentum above 0 and a dampening of 0")

    def init(params: Tree) -> SgdState:
        check_params("sgd", params)
        return SgdState(new_step(params), like(params) if with_momentum else ())

    def update(
        grads: Tree, state: Any, params: Tree, value: Float[Tensor, ""] | None = None
    ) -> tuple[Tree, SgdState]:
        check_state("sgd", SgdState, state)
        if with_momentum == is_absent(state.momentum):
            raise ValueError(
                f"sgd: state: expected momentum={with_momentum}, got {not with_momentum}"
            )
        rate, inertia, damping, decay = (
            resolve(value, state.step)
            for value in (learning_rate, momentum, dampening, weight_decay)
        )
        # The first gradient enters the buffer undamped.
        share = 1.0 if is_zero(damping) else 1.0 - damping * (state.step > 0).to(torch.float64)
        updates, buffers = leafwise(
            "sgd", rule, (-rate, inertia, share, decay), grads, params, state.momentum
        )
        return updates, SgdState(state.step + 1, buffers)

    def rule(
        scalars: list[Number], grad: Tensor, param: Tensor, buffer: Moment
    ) -> tuple[Moment, ...]:
        step, inertia, share, decay = scalars
        grad = add_scaled(grad, decay, param)
        if buffer is not None:
            buffer = add_scaled(scaled(share, grad), inertia, buffer)
            grad = add_scaled(grad, inertia, buffer) if nesterov else buffer
        return grad * step, buffer

    return Optimizer(init, update)

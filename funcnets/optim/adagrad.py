"""Adagrad."""

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
    leafwise,
    like,
    new_step,
    resolve,
    safe_sqrt,
)
from funcnets.tree.flatten import Tree


class AdagradState(NamedTuple):
    """The number of updates made, and the sums of the squared gradients."""

    step: Int64[Tensor, ""]
    total: Tree


def adagrad(
    learning_rate: Hyperparameter = 1e-2,
    learning_rate_decay: Hyperparameter = 0.0,
    weight_decay: Hyperparameter = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-10,
) -> Optimizer:
    """Adagrad (Duchi et al. 2011), as `torch.optim.Adagrad`.

    The rate of update n is ``learning_rate / (1 + n * learning_rate_decay)``, n counted from 0.
    ``weight_decay`` is added to the gradient.

    >>> optimizer = adagrad(1e-2)
    """
    check_hyperparameter("adagrad: learning_rate", learning_rate)
    check_hyperparameter("adagrad: learning_rate_decay", learning_rate_decay)
    check_hyperparameter("adagrad: weight_decay", weight_decay)
    check_hyperparameter("adagrad: initial_accumulator_value", initial_accumulator_value)
    check_hyperparameter("adagrad: eps", eps)

    def init(params: Tree) -> AdagradState:
        check_params("adagrad", params)
        return AdagradState(new_step(params), like(params, initial_accumulator_value))

    def update(
        grads: Tree, state: Any, params: Tree, value: Float[Tensor, ""] | None = None
    ) -> tuple[Tree, AdagradState]:
        check_state("adagrad", AdagradState, state)
        rate, slowing, decay = (
            resolve(value, state.step)
            for value in (learning_rate, learning_rate_decay, weight_decay)
        )
        rate = rate / (1.0 + state.step.to(torch.float64) * slowing)
        updates, total = leafwise("adagrad", rule, (-rate, decay), grads, params, state.total)
        return updates, AdagradState(state.step + 1, total)

    def rule(
        scalars: list[Number], grad: Tensor, param: Tensor, total: Tensor
    ) -> tuple[Moment, ...]:
        step, decay = scalars
        grad = add_scaled(grad, decay, param)
        total = torch.addcmul(total, grad, grad)
        return grad * step / (safe_sqrt(total) + eps), total

    return Optimizer(init, update)

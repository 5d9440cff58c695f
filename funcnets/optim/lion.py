"""Lion."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from funcnets.optim.adam import Betas
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
    like,
    new_step,
    resolve,
)
from funcnets.tree.flatten import Tree
from funcnets.tree.select import Where


class LionState(NamedTuple):
    """The number of updates made, and the running means of the gradient."""

    step: Int64[Tensor, ""]
    mean: Tree


def lion(
    learning_rate: Hyperparameter = 1e-4,
    betas: Betas = (0.9, 0.99),
    weight_decay: Hyperparameter = 0.0,
    where: Where | None = None,
) -> Optimizer:
    """Lion (Chen et al. 2023, "Symbolic discovery of optimization algorithms").

    Steps of one size: the sign of a mean of the running mean and the gradient. The weight decay is
    decoupled.

    Args:
        where: which leaves decay, by path, as in `funcnets.tree.matcher`; by default all.

    >>> params = {"weight": torch.tensor([1.0, 1.0])}
    >>> optimizer = lion(0.1)
    >>> optimizer.update({"weight": torch.tensor([2.0, -3.0])}, optimizer.init(params), params)[0]
    {'weight': tensor([-0.1000,  0.1000])}
    """
    check_hyperparameter("lion: learning_rate", learning_rate)
    check_hyperparameter("lion: betas[0]", betas[0], below=1.0)
    check_hyperparameter("lion: betas[1]", betas[1], below=1.0)

    def init(params: Tree) -> LionState:
        check_params("lion", params)
        return LionState(new_step(params), like(params))

    def update(
        grads: Tree, state: Any, params: Tree, value: Float[Tensor, ""] | None = None
    ) -> tuple[Tree, LionState]:
        check_state("lion", LionState, state)
        rate, beta1, beta2 = (resolve(value, state.step) for value in (learning_rate, *betas))
        scalars = (-rate, 1.0 - beta1, 1.0 - beta2)
        updates, mean = leafwise("lion", rule, scalars, grads, params, state.mean)
        return updates, LionState(state.step + 1, mean)

    def rule(
        scalars: list[Number], grad: Tensor, param: Tensor, mean: Tensor
    ) -> tuple[Moment, ...]:
        step, share1, share2 = scalars
        return torch.lerp(mean, grad, share1).sign() * step, torch.lerp(mean, grad, share2)

    return decayed("lion", Optimizer(init, update), learning_rate, weight_decay, where)

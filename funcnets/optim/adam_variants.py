"""NAdam and RAdam: Adam with Nesterov's momentum, and with its warm-up worked out."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from funcnets.optim.adam import AdamState, Betas, check_adam
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


class NadamState(NamedTuple):
    """The number of updates made, the running means, and the product of the momenta so far."""

    step: Int64[Tensor, ""]
    mean: Tree
    square: Tree
    product: Float64[Tensor, ""]


def nadam(
    learning_rate: Hyperparameter = 2e-3,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: Hyperparameter = 0.0,
    momentum_decay: Hyperparameter = 4e-3,
) -> Optimizer:
    """Adam with Nesterov's momentum (Dozat 2016), as `torch.optim.NAdam`.

    Every hyperparameter but ``eps`` is a number, a tensor of shape [] or a schedule.
    ``weight_decay`` is added to the gradient.

    >>> optimizer = nadam(1e-3)
    """
    check_adam("nadam", learning_rate, betas, eps, weight_decay)
    check_hyperparameter("nadam: momentum_decay", momentum_decay)

    def init(params: Tree) -> NadamState:
        check_params("nadam", params)
        step = new_step(params)
        return NadamState(step, like(params), like(params), step.to(torch.float64) + 1.0)

    def update(
        grads: Tree, state: Any, params: Tree, value: Float[Tensor, ""] | None = None
    ) -> tuple[Tree, NadamState]:
        check_state("nadam", NadamState, state)
        rate, beta1, beta2, decay, slowness = (
            resolve(value, state.step)
            for value in (learning_rate, *betas, weight_decay, momentum_decay)
        )
        time = (state.step + 1).to(torch.float64)
        now, after = (beta1 * (1.0 - 0.5 * 0.96 ** (t * slowness)) for t in (time, time + 1.0))
        product = state.product * now
        root = (1.0 - beta2**time).sqrt()
        scalars = (
            -rate * root * (1.0 - now) / (1.0 - product),
            -rate * root * after / (1.0 - product * after),
            root * eps,
            1.0 - beta1,
            1.0 - beta2,
            decay,
        )
        updates, mean, square = leafwise(
            "nadam", rule, scalars, grads, params, state.mean, state.square
        )
        return updates, NadamState(state.step + 1, mean, square, product)

    def rule(
        scalars: list[Number], grad: Tensor, param: Tensor, mean: Tensor, square: Tensor
    ) -> tuple[Moment, ...]:
        step, step_mean, least, share1, share2, decay = scalars
        grad = add_scaled(grad, decay, param)
        mean = torch.lerp(mean, grad, share1)
        square = torch.lerp(square, grad * grad, share2)
        change = add_scaled(grad * step, step_mean, mean) / (safe_sqrt(square) + least)
        return change, mean, square

    return Optimizer(init, update)


def radam(
    learning_rate: Hyperparameter = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: Hyperparameter = 0.0,
) -> Optimizer:
    """Rectified Adam (Liu et al. 2020), as `torch.optim.RAdam`.

    Every hyperparameter but ``eps`` is a number, a tensor of shape [] or a schedule.
    ``weight_decay`` is added to the gradient.

    >>> optimizer = radam(1e-3)
    """
    check_adam("radam", learning_rate, betas, eps, weight_decay)

    def init(params: Tree) -> AdamState:
        check_params("radam", params)
        return AdamState(new_step(params), like(params), like(params))

    def update(
        grads: Tree, state: Any, params: Tree, value: Float[Tensor, ""] | None = None
    ) -> tuple[Tree, AdamState]:
        check_state("radam", AdamState, state)
        rate, beta1, beta2, decay = (
            resolve(value, state.step) for value in (learning_rate, *betas, weight_decay)
        )
        time = (state.step + 1).to(torch.float64)
        correction2 = 1.0 - beta2**time
        longest = torch.zeros_like(time) + 2.0 / (1.0 - beta2) - 1.0
        length = longest - 2.0 * time * beta2**time / correction2
        rectified = length > 5.0
        # Where the variance is not yet tractable the formula has no root: it is given another
        # length, so that neither the number nor its derivative is one that where cannot hide.
        held = torch.where(rectified, length, 6.0)
        limit = torch.where(rectified, longest, 6.0)
        ratio = (held - 4.0) * (held - 2.0) * limit / ((limit - 4.0) * (limit - 2.0) * held)
        factor = torch.where(rectified, (ratio * correction2).sqrt(), 1.0)
        scalars = (
            -rate / (1.0 - beta1**time) * factor,
            rectified.to(torch.float64),
            1.0 - beta1,
            1.0 - beta2,
            decay,
        )
        updates, mean, square = leafwise(
            "radam", rule, scalars, grads, params, state.mean, state.square
        )
        return updates, AdamState(state.step + 1, mean, square)

    def rule(
        scalars: list[Number], grad: Tensor, param: Tensor, mean: Tensor, square: Tensor
    ) -> tuple[Moment, ...]:
        step, rectified, share1, share2, decay = scalars
        grad = add_scaled(grad, decay, param)
        mean = torch.lerp(mean, grad, share1)
        square = torch.lerp(square, grad * grad, share2)
        size = torch.where(rectified == 1, safe_sqrt(square) + eps, 1.0)  # type: ignore[arg-type]
        return mean * step / size, mean, square

    return Optimizer(init, update)

"""RMSprop."""

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
    safe_sqrt,
)
from funcnets.tree.flatten import Tree


class RmspropState(NamedTuple):
    """The number of updates made, and the running means.

    Of the squared gradient, of the gradient (empty unless ``centered``), and the momentum buffers
    (empty without momentum).
    """

    step: Int64[Tensor, ""]
    square: Tree
    mean: Tree
    momentum: Tree


def rmsprop(
    learning_rate: Hyperparameter = 1e-2,
    smoothing: Hyperparameter = 0.99,
    eps: float = 1e-8,
    weight_decay: Hyperparameter = 0.0,
    momentum: Hyperparameter = 0.0,
    centered: bool = False,
) -> Optimizer:
    """RMSprop (Tieleman and Hinton 2012), as `torch.optim.RMSprop`.

    Every hyperparameter but ``eps`` is a number, a tensor of shape [] or a schedule.
    ``smoothing`` is torch's alpha; ``weight_decay`` is added to the gradient. With ``centered`` a
    variance that rounding has made negative counts as zero (and gives not a number in torch).

    >>> optimizer = rmsprop(1e-3, momentum=0.9)
    """
    check_hyperparameter("rmsprop: learning_rate", learning_rate)
    check_hyperparameter("rmsprop: smoothing", smoothing, below=1.0)
    check_hyperparameter("rmsprop: eps", eps)
    check_hyperparameter("rmsprop: weight_decay", weight_decay)
    check_hyperparameter("rmsprop: momentum", momentum)
    with_momentum = not is_zero(momentum)

    def init(params: Tree) -> RmspropState:
        check_params("rmsprop", params)
        return RmspropState(
            new_step(params),
            like(params),
            like(params) if centered else (),
            like(params) if with_momentum else (),
        )

    def update(
        grads: Tree, state: Any, params: Tree, value: Float[Tensor, ""] | None = None
    ) -> tuple[Tree, RmspropState]:
        check_state("rmsprop", RmspropState, state)
        for what, wanted, held in (
            ("centered", centered, state.mean),
            ("momentum", with_momentum, state.momentum),
        ):
            if wanted == is_absent(held):
                raise ValueError(f"rmsprop: state: expected {what}={wanted}, got {not wanted}")
        rate, smooth, decay, inertia = (
            resolve(value, state.step)
            for value in (learning_rate, smoothing, weight_decay, momentum)
        )
        scalars = (-rate, 1.0 - smooth, decay, inertia)
        updates, *moments = leafwise(
            "rmsprop", rule, scalars, grads, params, state.square, state.mean, state.momentum
        )
        return updates, RmspropState(state.step + 1, *moments)

    def rule(
        scalars: list[Number],
        grad: Tensor,
        param: Tensor,
        square: Tensor,
        mean: Moment,
        buffer: Moment,
    ) -> tuple[Moment, ...]:
        step, share, decay, inertia = scalars
        grad = add_scaled(grad, decay, param)
        square = torch.lerp(square, grad * grad, share)
        spread = square
        if mean is not None:
            mean = torch.lerp(mean, grad, share)
            spread = torch.addcmul(square, mean, mean, value=-1)
        change = grad / (safe_sqrt(spread) + eps)
        if buffer is not None:
            change = buffer = add_scaled(change, inertia, buffer)
        return change * step, square, mean, buffer

    return Optimizer(init, update)

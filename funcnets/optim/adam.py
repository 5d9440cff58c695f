"""Adam and its kin: the gradient's running mean over the root of its running square."""

from __future__ import annotations

from itertools import chain
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from funcnets.optim import fused
from funcnets.optim.base import Optimizer
from funcnets.optim.decay import decayed
from funcnets.optim.leafwise import (
    Hyperparameter,
    Leaves,
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
from funcnets.tree.select import Where

Betas = tuple[Hyperparameter, Hyperparameter]


class AdamState(NamedTuple):
    """The state of `adam`, `adamw` and `radam`.

    The number of updates made, the running means of the gradient and of its square, and the
    largest of the latter so far (empty without ``amsgrad``).
    """

    step: Int64[Tensor, ""]
    mean: Tree
    square: Tree
    largest: Tree = ()


def adam(
    learning_rate: Hyperparameter = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: Hyperparameter = 0.0,
    amsgrad: bool = False,
) -> Optimizer:
    """Adam (Kingma and Ba 2015), as `torch.optim.Adam`.

    Every hyperparameter but ``eps`` is a number, a tensor of shape [] or a schedule.
    ``weight_decay`` is added to the gradient; see `adamw` for the decoupled kind. Eager code on a
    CPU runs torch's fused kernel, under vmap too; elsewhere the same is done in plain operations,
    whose numbers are the same to rounding.

    >>> params = {"weight": torch.tensor([1.0])}
    >>> optimizer = adam(0.1)
    >>> optimizer.update({"weight": torch.tensor([2.0])}, optimizer.init(params), params)[0]
    {'weight': tensor([-0.1000])}
    """
    return _adam("adam", learning_rate, betas, eps, weight_decay, amsgrad)


def adamw(
    learning_rate: Hyperparameter = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: Hyperparameter = 1e-2,
    amsgrad: bool = False,
    where: Where | None = None,
) -> Optimizer:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), as `torch.optim.AdamW`.

    Args:
        where: which leaves decay, by path, as in `funcnets.tree.matcher`; by default all.

    >>> optimizer = adamw(1e-3, where=lambda path, leaf: leaf.ndim > 1)  # neither biases nor norms
    """
    return decayed(
        "adamw",
        _adam("adamw", learning_rate, betas, eps, 0.0, amsgrad),
        learning_rate,
        weight_decay,
        where,
    )


def _adam(
    name: str,
    learning_rate: Hyperparameter,
    betas: Betas,
    eps: float,
    weight_decay: Hyperparameter,
    amsgrad: bool,
) -> Optimizer:
    check_adam(name, learning_rate, betas, eps, weight_decay)

    def init(params: Tree) -> AdamState:
        check_params(name, params)
        largest = like(params) if amsgrad else ()
        return AdamState(new_step(params), like(params), like(params), largest)

    def update(
        grads: Tree, state: Any, params: Tree, value: Float[Tensor, ""] | None = None
    ) -> tuple[Tree, AdamState]:
        check_state(name, AdamState, state)
        if amsgrad and is_absent(state.largest):
            raise ValueError(f"{name}: state: expected that of amsgrad, got one without")
        rate, beta1, beta2, decay = (
            resolve(value, state.step) for value in (learning_rate, *betas, weight_decay)
        )

        def scalars() -> tuple[Number, ...]:
            correction1, correction2 = (
                1.0 - beta ** (state.step + 1).to(torch.float64) for beta in (beta1, beta2)
            )
            # Both corrections, and eps to match, as factors of the leaf save two passes over it.
            root = correction2.sqrt()
            return -rate * root / correction1, root * eps, 1.0 - beta1, 1.0 - beta2, decay

        largest = state.largest if amsgrad else ()
        plain = is_zero(decay) and not is_zero(eps)

        def at_once(grads: Leaves, *moments: Any) -> tuple[Leaves, ...] | None:
            moments = moments[: 3 if amsgrad else 2]
            if not (plain and fused.serves(rate, (beta1, beta2), [*grads, *chain(*moments)])):
                return None
            return fused.adam(rate, (beta1, beta2), eps, state.step, grads, moments)

        updates, *moments = leafwise(
            name, rule, scalars, grads, params, state.mean, state.square, largest, at_once=at_once
        )
        return updates, AdamState(state.step + 1, *moments)

    def rule(
        scalars: list[Number],
        grad: Tensor,
        param: Tensor,
        mean: Tensor,
        square: Tensor,
        largest: Moment,
    ) -> tuple[Moment, ...]:
        step, least, share1, share2, decay = scalars
        grad = add_scaled(grad, decay, param)
        mean = torch.lerp(mean, grad, share1)
        square = torch.lerp(square, grad * grad, share2)
        if largest is not None:
            largest = torch.maximum(largest, square)
        size = safe_sqrt(square if largest is None else largest)
        return mean * step / (size + least), mean, square, largest

    return Optimizer(init, update)


def check_adam(
    name: str,
    learning_rate: Hyperparameter,
    betas: Betas,
    eps: float,
    weight_decay: Hyperparameter,
) -> None:
    """Raises for hyperparameters that Adam and its kin cannot have."""
    check_hyperparameter(f"{name}: learning_rate", learning_rate)
    check_hyperparameter(f"{name}: betas[0]", betas[0], below=1.0)
    check_hyperparameter(f"{name}: betas[1]", betas[1], below=1.0)
    check_hyperparameter(f"{name}: eps", eps)
    check_hyperparameter(f"{name}: weight_decay", weight_decay)

"""Smaller steps once the loss has stopped falling."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from funcnets.optim.base import Optimizer
from funcnets.optim.leafwise import Number, check_state, leafwise, new_step
from funcnets.tree.flatten import Tree


class PlateauState(NamedTuple):
    """The factor of the updates, and what the next one is found from."""

    scale: Float64[Tensor, ""]
    best: Float64[Tensor, ""]
    bad: Int64[Tensor, ""]
    """Observations since the best."""
    resting: Int64[Tensor, ""]
    """Observations left of the cooldown."""
    total: Float64[Tensor, ""]
    seen: Int64[Tensor, ""]
    """The values since the last observation: their sum and number."""


def reduce_on_plateau(
    factor: float = 0.1,
    patience: int = 10,
    threshold: float = 1e-4,
    cooldown: int = 0,
    min_scale: float = 0.0,
    every: int = 1,
) -> Optimizer:
    """Multiplies the updates by a scale, times ``factor`` whenever the loss has stopped falling.

    As `torch.optim.lr_scheduler.ReduceLROnPlateau` (of a loss, to be minimised, with a relative
    threshold). It goes after the optimizer in a `chain`, whose ``update`` then wants ``value``, the
    loss. The scale is ``state.scale``, and an observation acts from its own update on.

    Args:
        patience: after how many observations without improvement to act with the next one.
        threshold: the relative improvement that counts as one.
        cooldown: how many observations after a reduction do not count.
        min_scale: the least scale.
        every: how many values, their mean taken, make one observation: with the batches of an
            epoch this looks once an epoch at the mean loss, or at a validation loss that is given
            with each of them.

    >>> from funcnets import optim
    >>> optimizer = optim.chain(optim.sgd(0.1), optim.reduce_on_plateau(0.5, patience=0))
    >>> params = grads = {"w": torch.ones(1)}
    >>> state = optimizer.init(params)
    >>> for loss in (1.0, 1.0):
    ...     updates, state = optimizer.update(grads, state, params, value=torch.tensor(loss))
    >>> updates
    {'w': tensor([-0.0500])}
    """
    if not 0 < factor < 1:
        raise ValueError(f"reduce_on_plateau: factor: expected between 0 and 1, got {factor}")
    for name, number, least in (
        ("patience", patience, 0),
        ("threshold", threshold, 0),
        ("cooldown", cooldown, 0),
        ("min_scale", min_scale, 0),
        ("every", every, 1),
    ):
        if not number >= least:
            raise ValueError(f"reduce_on_plateau: {name}: expected at least {least}, got {number}")

    def init(params: Tree) -> PlateauState:
        zero = new_step(params)
        real = zero.to(torch.float64)
        return PlateauState(real + 1.0, real + torch.inf, zero, zero.clone(), real, zero.clone())

    def update(
        grads: Tree, state: Any, params: Tree, value: Float[Tensor, ""] | None = None
    ) -> tuple[Tree, PlateauState]:
        check_state("reduce_on_plateau", PlateauState, state)
        if value is None:
            raise TypeError("reduce_on_plateau: expected update(..., value=loss), got no value")
        new = observed(state, value.to(state.scale.device, torch.float64))
        return leafwise("reduce_on_plateau", rule, (new.scale,), grads, params)[0], new

    def observed(state: PlateauState, value: Float64[Tensor, ""]) -> PlateauState:
        total, seen = state.total + value, state.seen + 1
        due = seen >= every
        mean = total / seen
        better = mean < state.best * (1.0 - threshold)
        resting = state.resting > 0
        zero = torch.zeros_like(seen)
        bad = torch.where(better | resting, zero, state.bad + 1)
        reduced = bad > patience
        after = PlateauState(
            scale=torch.where(reduced, (state.scale * factor).clamp(min=min_scale), state.scale),
            best=torch.where(better, mean, state.best),
            bad=torch.where(reduced, zero, bad),
            resting=torch.where(reduced, cooldown, (state.resting - 1).clamp(min=0)),
            total=torch.zeros_like(total),
            seen=zero,
        )
        waiting = state._replace(total=total, seen=seen)
        return PlateauState(
            *(torch.where(due, new, old) for new, old in zip(after, waiting, strict=True))
        )

    def rule(scalars: list[Number], grad: Tensor, param: Tensor) -> tuple[Tensor]:
        return (grad * scalars[0],)

    return Optimizer(init, update)

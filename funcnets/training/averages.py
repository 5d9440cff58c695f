"""Averages of the parameters over the training: exponential, and uniform from a step on."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from funcnets import tree
from funcnets.optim.leafwise import check_hyperparameter, new_step
from funcnets.tree.flatten import Tree


class AverageState(NamedTuple):
    """The averages of the parameters and of the buffers, and how many were averaged."""

    params: Tree
    buffers: Tree
    number: Tensor


class Average(NamedTuple):
    """An average: ``weight(count)`` is what the newest of so many parameters counts for.

    Attributes:
        weight: from the number of parameters averaged, the newest with them, to a weight in [0, 1].
        start: the step after which averaging begins; until then the average is the last parameters.
        every: averages the parameters of every so manyth step.
    """

    weight: Callable[[Tensor], Tensor]
    start: int
    every: int

    def init(self, params: Tree, buffers: Tree) -> AverageState:
        """The average before the first step: the parameters themselves."""
        params, buffers = tree.map(torch.clone, (params, buffers))
        return AverageState(params, buffers, new_step(params))

    def update(
        self, state: AverageState, params: Tree, buffers: Tree, step: Tensor
    ) -> AverageState:
        """The average after step number ``step`` (the first is 1)."""
        begun = step > self.start
        due = begun & ((step - self.start - 1) % self.every == 0)
        number = state.number + due.to(torch.int64)
        # Before the start, and for the first: the parameters themselves, so that nothing is biased
        # towards zero or towards the initial values.
        weight = torch.where(due, self.weight(number.clamp(min=1)), torch.where(begun, 0.0, 1.0))
        averaged, statistics = tree.lerp(
            (state.params, state.buffers), (params, buffers), weight.to(torch.float64)
        )
        return AverageState(averaged, statistics, number)


def ema(decay: float | Tensor, start: int = 0) -> Average:
    """The exponential moving average of the parameters, without a bias towards the first.

    Its weights are ``decay**age``, divided by their sum as Adam (Kingma and Ba 2015) does, so that
    after two steps it is nearly their mean, and never holds a share of the initial parameters.

    Args:
        decay: in [0, 1), a number or a tensor of shape [] (of each member, under vmap).
        start: the step after which it begins.

    >>> average = ema(0.9)
    >>> state = average.init({"w": torch.tensor(7.0)}, {})
    >>> for number, value in enumerate((1.0, 2.0)):
    ...     state = average.update(state, {"w": torch.tensor(value)}, {}, torch.tensor(number + 1))
    >>> state.params  # (0.9 * 1 + 1 * 2) / 1.9
    {'w': tensor(1.5263)}
    """
    check_hyperparameter("ema: decay", decay, below=1.0)
    if not isinstance(decay, Tensor) and callable(decay):
        raise TypeError("ema: decay: expected a number or a tensor, got a schedule")

    def weight(count: Tensor) -> Tensor:
        kept = decay.to(torch.float64) if isinstance(decay, Tensor) else decay
        return (1 - kept) / (1 - kept ** count.to(torch.float64))

    return _average("ema", weight, start, 1)


def swa(start: int, every: int = 1) -> Average:
    """Stochastic weight averaging (Izmailov et al. 2018): the plain mean from a step on.

    Running statistics of batch norm are averaged with the parameters.

    >>> average = swa(start=1)
    >>> state = average.init({"w": torch.tensor(7.0)}, {})
    >>> for number, value in enumerate((5.0, 1.0, 2.0)):
    ...     state = average.update(state, {"w": torch.tensor(value)}, {}, torch.tensor(number + 1))
    >>> state.params
    {'w': tensor(1.5000)}
    """
    return _average("swa", lambda count: 1 / count.to(torch.float64), start, every)


def _average(name: str, weight: Callable[[Tensor], Tensor], start: int, every: int) -> Average:
    for label, number, least in (("start", start, 0), ("every", every, 1)):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise ValueError(
                f"{name}: {label}: expected an int of at least {least}, got {number!r}"
            )
    return Average(weight, start, every)

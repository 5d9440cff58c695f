"""An end to training once a score has stopped improving, and the best parameters then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnets import tree
from funcnets.training.state import State


class StoppingState(NamedTuple):
    """The best so far.

    Attributes:
        value: the best score.
        bad: how many evaluations there were since.
        step: the step of the best.
        params, buffers, average: of that step.
    """

    value: Tensor
    bad: Tensor
    step: Tensor
    params: Any
    buffers: Any
    average: Any


@dataclass(frozen=True)
class EarlyStopping:
    """Ends training after ``patience`` evaluations in a row that were no better than the best.

    `fit` does what is needed. All methods are pure and work under vmap, one score per member. A
    score that is not a number is no improvement.

    Attributes:
        metric: the score's name in what ``evaluate`` returns.
        patience: how many evaluations.
        minimum_change: by how much a score has to be better to count.
        mode: ``"min"`` or ``"max"``.

    >>> EarlyStopping("accuracy", patience=5, mode="max")
    EarlyStopping(metric='accuracy', patience=5, minimum_change=0.0, mode='max')
    """

    metric: str = "loss"
    patience: int = 10
    minimum_change: float = 0.0
    mode: str = "min"

    def __post_init__(self) -> None:
        if self.mode not in ("min", "max"):
            raise ValueError(f"EarlyStopping: mode: expected 'min' or 'max', got {self.mode!r}")
        if self.patience < 1 or not self.minimum_change >= 0:
            raise ValueError(
                "EarlyStopping: expected a patience of at least 1 and a minimum_change of at least "
                f"0, got {self.patience} and {self.minimum_change}"
            )

    def init(self, state: State) -> State:
        """The state with the present parameters as the best so far, at a score worse than any."""
        zero = torch.zeros_like(state.step)
        worst = torch.inf if self.mode == "min" else -torch.inf
        best = tree.map(torch.clone, (state.params, state.buffers, state.average))
        value = zero.to(torch.float64) + worst
        return state._replace(stopping=StoppingState(value, zero, state.step.clone(), *best))

    def update(self, state: State, value: Tensor) -> State:
        """The state after an evaluation, a tensor of shape []."""
        last = state.stopping
        value = value.to(torch.float64)
        gain = last.value - value if self.mode == "min" else value - last.value
        # From the first score, whatever it is, to minus infinity's infinite gain: an improvement.
        better = gain > self.minimum_change
        best = tree.map(
            lambda new, old: torch.where(better, new, old),
            (value, state.step, state.params, state.buffers, state.average),
            (last.value, last.step, last.params, last.buffers, last.average),
        )
        bad = torch.where(better, 0, last.bad + 1)
        return state._replace(stopping=StoppingState(best[0], bad, *best[1:]))

    def done(self, state: State) -> Tensor:
        """Whether patience has run out."""
        return state.stopping.bad >= self.patience

    def restore(self, state: State) -> State:
        """The state with the best parameters, buffers and average."""
        best = state.stopping
        params, buffers, average = tree.map(torch.clone, (best.params, best.buffers, best.average))
        return state._replace(params=params, buffers=buffers, average=average)

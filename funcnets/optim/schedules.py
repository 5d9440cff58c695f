"""Schedules: pure functions from the number of updates made so far to a learning rate.

The first update sees a count of 0. A schedule takes the count as an integer tensor of shape [] (or
as an int, to plot it) and returns a float64 tensor of shape []. Its parameters are numbers, or
tensors of shape [] where they may be one per member of an ensemble; the lengths are ints.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Float, Int64
from torch import Tensor

Rate: TypeAlias = float | int | Tensor
Count: TypeAlias = int | Int64[Tensor, ""]
Schedule: TypeAlias = Callable[[Count], Float[Tensor, ""]]


def constant(value: Rate) -> Schedule:
    """The same value for ever; what a `warmup` may lead to.

    >>> constant(0.1)(7)
    tensor(0.1000, dtype=torch.float64)
    """
    return lambda count: _double(value, _time(count))


def step(initial: Rate, every: int, factor: Rate = 0.1) -> Schedule:
    """Multiplied by ``factor`` every so many updates, as `torch.optim.lr_scheduler.StepLR`.

    >>> [round(float(step(1.0, every=2)(count)), 4) for count in range(5)]
    [1.0, 1.0, 0.1, 0.1, 0.01]
    """
    _check_length("step: every", every)
    return lambda count: initial * _power(factor, _time(count).div(every, rounding_mode="floor"))


def multi_step(initial: Rate, milestones: Sequence[int], factor: Rate = 0.1) -> Schedule:
    """Multiplied by ``factor`` at each milestone, as `torch.optim.lr_scheduler.MultiStepLR`.

    >>> [round(float(multi_step(1.0, [1, 3])(count)), 4) for count in range(4)]
    [1.0, 0.1, 0.1, 0.01]
    """
    if any(b < a for a, b in itertools.pairwise(milestones)):
        raise ValueError(f"multi_step: milestones: expected increasing, got {list(milestones)}")

    def schedule(count: Count) -> Float[Tensor, ""]:
        time = _time(count)
        passed = torch.zeros_like(time)
        for milestone in milestones:
            passed = passed + (time >= milestone)
        return initial * _power(factor, passed)

    return schedule


def exponential(initial: Rate, factor: Rate) -> Schedule:
    """Multiplied by ``factor`` each update, as `torch.optim.lr_scheduler.ExponentialLR`.

    >>> exponential(1.0, 0.5)(3)
    tensor(0.1250, dtype=torch.float64)
    """
    return lambda count: initial * _power(factor, _time(count))


def cosine(initial: Rate, steps: int, final: Rate = 0.0) -> Schedule:
    """Half a cosine from ``initial`` to ``final`` (Loshchilov and Hutter 2017), then ``final``.

    As `torch.optim.lr_scheduler.CosineAnnealingLR` for its ``steps`` updates (that one would then
    rise again).

    >>> [round(float(cosine(1.0, 2)(count)), 4) for count in range(4)]
    [1.0, 0.5, 0.0, 0.0]
    """
    _check_length("cosine: steps", steps)
    return lambda count: _half_cosine(initial, final, (_time(count) / steps).clamp(max=1.0))


def cosine_restarts(initial: Rate, period: int, multiplier: int = 1, final: Rate = 0.0) -> Schedule:
    """`cosine` over and over, each period ``multiplier`` times as long as the one before.

    As `torch.optim.lr_scheduler.CosineAnnealingWarmRestarts` (Loshchilov and Hutter 2017).

    >>> [round(float(cosine_restarts(1.0, 2)(count)), 4) for count in range(4)]
    [1.0, 0.5, 1.0, 0.5]
    """
    _check_length("cosine_restarts: period", period)
    _check_length("cosine_restarts: multiplier", multiplier)

    def schedule(count: Count) -> Float[Tensor, ""]:
        time = _time(count)
        if multiplier == 1:
            return _half_cosine(initial, final, time.remainder(period) / period)
        # Cycle n begins at period * (multiplier**n - 1) / (multiplier - 1). The small number keeps
        # a logarithm that should be an integer from falling below it.
        ratio = time * (multiplier - 1) / period + 1
        cycle = (ratio.log() / math.log(multiplier) + 1e-9).floor()
        length = _power(multiplier, cycle)
        start = period * (length - 1) / (multiplier - 1)
        return _half_cosine(initial, final, (time - start) / (period * length))

    return schedule


def polynomial(initial: Rate, steps: int, power: float = 1.0, final: Rate = 0.0) -> Schedule:
    """``(1 - count / steps) ** power`` of the way from ``final`` to ``initial``, then ``final``.

    As `torch.optim.lr_scheduler.PolynomialLR`; a power of one is linear decay.

    >>> [round(float(polynomial(1.0, 4)(count)), 4) for count in range(6)]
    [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """
    _check_length("polynomial: steps", steps)

    def schedule(count: Count) -> Float[Tensor, ""]:
        left = (1.0 - _time(count) / steps).clamp(min=0.0)
        return final + (initial - final) * left**power

    return schedule


def one_cycle(
    peak: Rate,
    steps: int,
    warmup_fraction: float = 0.3,
    initial_divisor: float = 25.0,
    final_divisor: float = 1e4,
    shape: str = "cosine",
) -> Schedule:
    """Up to the peak, then far down (Smith and Topin 2018).

    As `torch.optim.lr_scheduler.OneCycleLR` in two phases, without its cycle of the momentum: from
    ``peak / initial_divisor`` to ``peak`` within ``warmup_fraction`` of the updates, then to the
    initial rate over ``final_divisor``, where it stays.

    Args:
        shape: of both phases, ``"cosine"`` or ``"linear"``.

    >>> schedule = one_cycle(1.0, steps=11, warmup_fraction=0.5)
    >>> [round(float(schedule(count)), 4) for count in (0, 10)]
    [0.04, 0.0]
    """
    _check_length("one_cycle: steps", steps)
    if not 0 <= warmup_fraction <= 1:
        raise ValueError(f"one_cycle: warmup_fraction: expected 0 to 1, got {warmup_fraction}")
    if shape not in ("cosine", "linear"):
        raise ValueError(f"one_cycle: shape: expected 'cosine' or 'linear', got {shape!r}")
    top = warmup_fraction * steps - 1  # the count at which the peak is reached, as torch has it
    between = _half_cosine if shape == "cosine" else _line

    def schedule(count: Count) -> Float[Tensor, ""]:
        time = _time(count)
        initial = peak / initial_divisor
        down = between(peak, initial / final_divisor, _part(time, max(top, 0.0), steps - 1.0))
        return torch.where(time <= top, between(initial, peak, _part(time, 0.0, top)), down)

    return schedule


def warmup(after: Schedule, steps: int, initial: Rate = 0.0) -> Schedule:
    """A line from ``initial`` to the first value of another schedule, which then begins.

    >>> schedule = warmup(cosine(1.0, 2), steps=4)
    >>> [round(float(schedule(count)), 4) for count in range(8)]
    [0.0, 0.25, 0.5, 0.75, 1.0, 0.5, 0.0, 0.0]
    """
    _check_length("warmup: steps", steps)

    def schedule(count: Count) -> Float[Tensor, ""]:
        count = torch.as_tensor(count)
        rising = _line(initial, after(torch.zeros_like(count)), _time(count) / steps)
        return torch.where(count < steps, rising, after((count - steps).clamp(min=0)))

    return schedule


def _time(count: Count) -> Float[Tensor, ""]:
    return torch.as_tensor(count).to(torch.float64)


def _double(value: Rate, time: Float[Tensor, ""]) -> Float[Tensor, ""]:
    return value.to(torch.float64) if isinstance(value, Tensor) else torch.full_like(time, value)


def _power(base: Rate, exponent: Float[Tensor, ""]) -> Float[Tensor, ""]:
    return torch.pow(base.to(torch.float64) if isinstance(base, Tensor) else float(base), exponent)


def _line(start: Rate, end: Rate, part: Float[Tensor, ""]) -> Float[Tensor, ""]:
    return start + (end - start) * part


def _half_cosine(start: Rate, end: Rate, part: Float[Tensor, ""]) -> Float[Tensor, ""]:
    return end + (start - end) * ((math.pi * part).cos() + 1) / 2


def _part(time: Float[Tensor, ""], start: float, end: float) -> Float[Tensor, ""]:
    """How much of the way from ``start`` to ``end`` is done, 0 to 1."""
    return ((time - start) / (end - start)).clamp(0.0, 1.0) if end > start else time.new_ones(())


def _check_length(place: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{place}: expected an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{place}: expected at least 1, got {value}")

"""Contenders that do the same work, compared, and then timed in turn, round by round."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from benchmarks import machine

TOLERANCE = 0.2 if machine.GPU else 0.05  # of the change; Adam makes much of rounding errors
OURS = "funcnets"
COUNTED = 3  # steps of a turn


class MissingError(Exception):
    """A contender that cannot be had here, and why."""


class Contender(NamedTuple):
    """Who does the work.

    Attributes:
        step: does it once; what runs elsewhere returns its own seconds.
        result: what has come out so far, by name: the parameters after the steps made.
    """

    step: Callable[[], float | None]
    result: Callable[[], dict[str, Tensor]]


class Case(NamedTuple):
    """A workload ready to be run.

    Attributes:
        start: where the parameters begin, by the names of the results; empty for other results.
        contenders: what makes each, by name, ours (whose names begin with "funcnets") first. The
            names of what is compiled end with "compiled" or "jit".
        updated: how many numbers Adam updates.
        against: how the names of the rivals begin to whom the ratio is taken.
    """

    start: dict[str, Tensor]
    contenders: dict[str, Callable[[], Contender]]
    updated: int = 0
    against: str = ""


class Settings(NamedTuple):
    """How long to measure, and of what size; quick is small, and leaves the compiled out."""

    rounds: int = 15
    quick: bool = False


@dataclass
class Row:
    """A line of the table: what was found, and what was to be reached."""

    workload: str
    target: float
    value: float | None  # None where there is nothing to compare
    unit: str = "ratio"
    low: float | None = None
    high: float | None = None
    ours: str = ""
    rival: str = ""
    floor: dict[str, float] | None = None
    contenders: dict[str, dict[str, float]] = field(default_factory=dict)
    reported: dict[str, str] = field(default_factory=dict)  # who was not timed, and why
    notes: dict[str, str] = field(default_factory=dict)  # what else was found

    @property
    def share(self) -> float | None:
        """Of the rate of a product of matrices, what the best of ours reaches."""
        if self.floor is None or self.ours not in self.contenders:
            return None
        taken = self.contenders[self.ours]["median"]
        return self.floor["operations"] / taken / machine.rates()[0]

    @property
    def holds(self) -> bool:
        """Whether the target is reached, by us and with our numbers right."""
        wrong = any(name.startswith(OURS) for name in self.reported)
        return not wrong and self.value is not None and self.value <= self.target


def is_compiled(name: str) -> bool:
    """Whether a contender of this name is compiled."""
    return name.endswith(("compiled", "jit", "CUDA graph"))


def race(
    workload: str, targets: dict[str, float], make: Callable[[bool], Case], settings: Settings
) -> list[Row]:
    """The rows of a workload: for each target, "eager", "compiled" or "" (the best)."""
    case = make(settings.quick)
    reported: dict[str, str] = {}
    held: dict[str, Contender] = {}
    for name, build in case.contenders.items():
        if settings.quick and is_compiled(name):
            continue
        try:
            held[name] = build()
            with machine.precision():
                for _ in range(2):
                    held[name].step()
        except MissingError as error:
            reported[name] = f"not here: {error}"
            held.pop(name, None)
        except Exception as error:  # a rival that fails is a finding, and ours one to be mended
            said = str(error).strip().partition("\n")[0]
            reported[name] = f"fails: {type(error).__name__}: {said}"
            held.pop(name, None)
    reported |= compare(held, case.start)
    held = {name: contender for name, contender in held.items() if name not in reported}
    with machine.precision():
        times = timed(held, settings.rounds)
        # Those that are not compiled, for the counter sees nothing of compiled code; and the least
        # of them, for it takes grouped convolutions, which vmap makes, for more than they are.
        floors = []
        for name, contender in held.items():
            if not is_compiled(name):
                with contextlib.suppress(
                    RuntimeError
                ):  # its hooks stumble over tensordict's modules
                    floors.append(machine.floor(contender.step, case.updated))
        floor = min(floors, key=lambda found: found["seconds"], default=None)
    rows = []
    for kind, target in targets.items():
        if settings.quick and kind == "compiled":
            continue
        chosen = {
            name: values
            for name, values in times.items()
            if not kind or is_compiled(name) == (kind == "compiled")
        }
        row = Row(f"{workload}, {kind}" if kind else workload, target, None, floor=floor)
        row.contenders = {name: spread(values) for name, values in chosen.items()}
        row.reported = {
            name: why
            for name, why in reported.items()
            if not kind or is_compiled(name) == (kind == "compiled")
        }
        rate(row, chosen, case.against)
        rows.append(row)
    return rows


def rate(row: Row, times: dict[str, list[float]], against: str = "") -> None:
    """Fills in the ratio of the best of ours to the best rival, taken within each round."""
    ours = [name for name in times if name.startswith(OURS)]
    rivals = [name for name in times if name not in ours and name.startswith(against)]
    if not ours or not rivals:
        return
    row.ours, row.rival = (
        min(names, key=lambda name: statistics.median(times[name])) for names in (ours, rivals)
    )
    ratios = [a / b for a, b in zip(times[row.ours], times[row.rival], strict=True)]
    found = spread(ratios)
    row.value, row.low, row.high = found["median"], found["low"], found["high"]


def compare(held: dict[str, Contender], start: dict[str, Tensor]) -> dict[str, str]:
    """Who has other results than the first, and how far off: of all changes, as one vector."""
    reported: dict[str, str] = {}
    if not held:
        return reported
    first = next(iter(held))
    expected = changes(held[first].result(), start)
    scale = norm(expected)
    for name, contender in held.items():
        found = changes(contender.result(), start)
        if unlike := sorted(set(found) ^ set(expected)):
            reported[name] = f"other results than {first}: {', '.join(unlike[:4])}"
        elif any(found[place].shape != expected[place].shape for place in found):
            reported[name] = f"other results than {first}: other shapes"
        else:
            distance = norm({place: found[place] - expected[place] for place in found}) / scale
            if not distance <= TOLERANCE:
                reported[name] = f"other results than {first}: {distance:.3g} of the change off"
    return reported


def changes(result: dict[str, Tensor], start: dict[str, Tensor]) -> dict[str, Tensor]:
    """How far the results are from where they began, at double precision."""
    moved = {name: value.detach().double().cpu() for name, value in result.items()}
    return {
        name: value - start[name].double().cpu() if name in start else value
        for name, value in moved.items()
    }


def norm(values: dict[str, Tensor]) -> float:
    """Of all of them as one vector."""
    return sum(float(value.square().sum()) for value in values.values()) ** 0.5


def timed(held: dict[str, Contender], rounds: int) -> dict[str, list[float]]:
    """Seconds of a step of each in every round; who begins changes from round to round.

    In its turn each makes steps as in a loop of training: one that is not counted, which finds the
    memory and the caches as another left them, and then some of which the least counts, for what
    else the machine does only ever adds to them.
    """
    times: dict[str, list[float]] = {name: [] for name in held}
    names = list(held)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            held[name].step()
            times[name].append(min(machine.seconds(held[name].step) for _ in range(COUNTED)))
    return times


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) < 2:
        return {"median": values[0], "low": values[0], "high": values[0]}
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


Measure = Callable[[Settings], list[Row]]
Workloads = dict[str, Measure]


def races(rows: dict[str, tuple[dict[str, float], Callable[[bool], Case]]]) -> Workloads:
    """Workloads by name, of their targets and what makes their case."""

    def measure(name: str, targets: Any, make: Any) -> Measure:
        return lambda settings: race(name, targets, make, settings)

    return {name: measure(name, targets, make) for name, (targets, make) in rows.items()}

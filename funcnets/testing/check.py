"""All invariants of a model: in one call with a report, or as one test each."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from funcnets.testing.engine import EXAMPLES, Invariant
from funcnets.testing.invariants import INVARIANTS
from funcnets.testing.subject import Sample, Subject, Violation


@dataclass(frozen=True)
class Result:
    """What came of one invariant: "held", "failed" or "skipped", and why."""

    name: str
    outcome: str
    reason: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Report:
    """What came of all of them; printed, a line for each."""

    results: tuple[Result, ...]

    def of(self, outcome: str) -> tuple[Result, ...]:
        """Those that "held", "failed" or were "skipped"."""
        return tuple(result for result in self.results if result.outcome == outcome)

    def __str__(self) -> str:
        counts = ", ".join(f"{len(self.of(o))} {o}" for o in ("held", "failed", "skipped"))
        width = max((len(result.name) for result in self.results), default=0)
        lines = [f"{counts} ({sum(r.seconds for r in self.results):.1f} s)"]
        for result in self.results:
            line = f"  {result.outcome:<8}{result.name:<{width}}"
            if result.outcome == "skipped":
                line += f"  {result.reason}"
            lines.append(line.rstrip())
        for result in self.of("failed"):
            lines += ["", result.reason]
        return "\n".join(lines)


def check_model(
    model: Any,
    inputs: Any,
    *,
    only: Iterable[str] | None = None,
    skip: Iterable[str] = (),
    also: Iterable[str] = (),
    tolerances: Mapping[str, float] | None = None,
    examples: int = EXAMPLES,
    seed: int = 0,
    **options: Any,
) -> Report:
    """Tries all invariants that apply to a model, and reports.

    Args:
        model: a `funcnets.Model`, a pair ``(init, apply)``, a torch module, or ``apply`` with
            ``params=``. A model with a mode of training is called with ``train=True`` and returns
            ``(outputs, buffers)`` then; one that draws takes a ``key``.
        inputs: one input or a tuple: a tensor as an example, or a declaration by named axes
            (`floats`, `integers`, `booleans`, `lengths`); dicts and other nests of these.
        only: names of the invariants to try; by default all but the optional ones.
        skip: names of those to leave out.
        also: names of optional ones to try as well.
        tolerances: by name, in units of the largest value.
        examples: the most cases that are drawn for one invariant.
        seed: where drawing begins.
        options: those of `Subject`: ``outputs``, ``axes``, ``params``, ``reference``, ``shared``,
            ``symmetries``, ``draws``, ``trainable``, ``perturb``, ``momentum``, ``checks_shapes``.

    Raises:
        AssertionError: where an invariant fails; its message is the report.
        ValueError: for an unknown name, or where the model does not run on the declared inputs.

    >>> from funcnets import models
    >>> from funcnets.testing import floats
    >>> report = check_model(models.mlp(3, 2), floats("batch 3"), only=["repeats_itself"])
    >>> [result.name for result in report.of("held")]
    ['repeats_itself']
    """
    tolerances = tolerances or {}
    chosen = _chosen(only, skip, also, tolerances)
    subject = Subject(model, inputs, **options)
    results = []
    for invariant in INVARIANTS:
        if invariant in chosen:
            tolerance = tolerances.get(invariant.name)
            results.append(_result(invariant, subject, examples, seed, tolerance))
        elif invariant.name in skip:
            results.append(Result(invariant.name, "skipped", "asked for"))
        elif invariant.optional and only is None:
            results.append(Result(invariant.name, "skipped", "optional (also=)"))
    report = Report(tuple(results))
    if report.of("failed"):
        raise AssertionError(str(report))
    return report


def model_properties(
    model: Any, inputs: Any, **options: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes one pytest test of each invariant: arguments as those of `check_model`.

    The decorated function takes the property and calls it; a property that says nothing of the
    model is a skipped test.

        @model_properties(models.mlp(3, 2), floats("batch 3"))
        def test_mlp(check):
            check()

    Raises:
        ValueError: for an unknown name.
    """
    import pytest

    each = properties(model, inputs, **options)

    def decorate(test: Callable[..., Any]) -> Callable[..., Any]:
        if "check" not in inspect.signature(test).parameters:
            raise TypeError(f"{test.__name__}: expected an argument named check, to be called")
        checks = [pytest.param(check, id=name) for name, check in each.items()]
        return pytest.mark.parametrize("check", checks)(test)

    return decorate


def properties(
    model: Any,
    inputs: Any,
    *,
    only: Iterable[str] | None = None,
    skip: Iterable[str] = (),
    also: Iterable[str] = (),
    tolerances: Mapping[str, float] | None = None,
    examples: int = EXAMPLES,
    seed: int = 0,
    **options: Any,
) -> dict[str, Callable[[], None]]:
    """What `model_properties` makes tests of: a function for each invariant, by its name.

    A function raises an AssertionError where its invariant fails, and skips the pytest test that
    calls it where it says nothing of the model. The model is first looked at when one is called.
    Invariants of what is not given (``symmetries``, ``shared``, ``reference``) are left out.
    """
    tolerances = tolerances or {}
    chosen = [
        each
        for each in _chosen(only, skip, also, tolerances)
        if each.needs is None or options.get(each.needs)
    ]
    made: list[Subject] = []

    def check(invariant: Invariant) -> None:
        import pytest

        __tracebackhide__ = True
        if not made:
            made.append(Subject(model, inputs, **options))
        tolerance = tolerances.get(invariant.name)
        result = _result(invariant, made[0], examples, seed, tolerance)
        if result.outcome == "skipped":
            pytest.skip(result.reason)
        if result.outcome == "failed":
            raise AssertionError(result.reason)

    return {each.name: functools.partial(check, each) for each in chosen}


def sample(
    model: Any, inputs: Any, *, seed: int = 0, values: str = "normal", **named: Any
) -> Sample:
    """The case that a report names: its ``params``, ``inputs`` and ``key``.

    Args:
        model: as for `check_model`.
        inputs: as there.
        seed: of the case.
        values: "normal", "zeros", "equal", "large" or "shifted".
        named: sizes of named axes, and options as for `check_model`.

    >>> from funcnets import models
    >>> from funcnets.testing import floats
    >>> sample(models.mlp(3, 2), floats("batch 3"), batch=2).inputs[0].shape
    torch.Size([2, 3])
    """
    known = set(inspect.signature(Subject.__init__).parameters)
    options = {name: value for name, value in named.items() if name in known}
    sizes = {name: value for name, value in named.items() if name not in known}
    return Subject(model, inputs, **options).sample(seed, values, sizes)


def _result(
    invariant: Invariant, subject: Subject, examples: int, seed: int, tolerance: float | None
) -> Result:
    reason = invariant.applies(subject)
    if reason is not None:
        return Result(invariant.name, "skipped", reason)
    begin = time.perf_counter()
    try:
        reason = invariant.run(subject, examples, seed, tolerance)
    except Violation as violation:
        seconds = time.perf_counter() - begin
        return Result(invariant.name, "failed", str(violation), seconds)
    seconds = time.perf_counter() - begin
    return Result(invariant.name, "held" if reason is None else "skipped", reason or "", seconds)


def _chosen(
    only: Iterable[str] | None,
    skip: Iterable[str],
    also: Iterable[str],
    tolerances: Mapping[str, float],
) -> list[Invariant]:
    by_name = {invariant.name: invariant for invariant in INVARIANTS}
    for name in [*(only or ()), *skip, *also, *tolerances]:
        if name not in by_name:
            raise ValueError(f"expected names of invariants ({', '.join(by_name)}), got {name!r}")
    if only is not None:
        names = set(only)
    else:
        names = {name for name, invariant in by_name.items() if not invariant.optional} | set(also)
    return [by_name[name] for name in by_name if name in names - set(skip)]

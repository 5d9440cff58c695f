"""How an invariant is tried: cases drawn, the first that fails made small, and the tale told."""

from __future__ import annotations

import functools
import inspect
import itertools
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from funcnets import tree
from funcnets.testing.subject import Sample, Skipped, Subject, Violation

try:
    import hypothesis
    from hypothesis import strategies as st
except ImportError as error:
    raise ImportError(
        "funcnets.testing draws its cases with Hypothesis: python -m pip install hypothesis"
    ) from error

EXAMPLES = 10
SECONDS = 10.0  # that making a failing case small may take

# What torch says of an operator that has no such derivative, or none for a dtype.
_NOT_IN_TORCH = re.compile(
    r"derivative for .* is not implemented|does not support it because it has not been implemented"
    r"|Trying to use forward AD|not implemented for '"
)


@dataclass(frozen=True)
class Try:
    """One case, and what an invariant needs to look at it."""

    subject: Subject
    sample: Sample
    tolerance: float

    @property
    def parts(self) -> tuple[Any, tuple[Any, ...], Any]:
        """Parameters, inputs and key."""
        return self.sample.params, self.sample.inputs, self.sample.key

    def close(self, actual: Any, expected: Any, meaning: str = "", factor: float = 1.0) -> None:
        """Raises a `Violation` where two trees are not equal within the tolerance."""
        compare(actual, expected, factor * self.tolerance, meaning)


class Invariant:
    """A property that a model has or has not. Called with a model, it raises where it has it not.

    Attributes:
        name: of the property.
        about: what it says, in a line.
        when: why it does not apply to a subject, or None.
        check: looks at one case, or, where ``whole`` is true, at one after the other.
        tolerance: how far apart equal numbers may be, in units of the largest, in double and in
            single precision.
        examples: the most cases that are tried; fewer for what takes long.
        values: the kinds of inputs that are drawn.
        optional: whether `check_model` leaves it out where it is not asked for.
        needs: the option without which it has nothing to say.
    """

    def __init__(
        self,
        check: Callable[..., None],
        when: Callable[[Subject], str | None] | None = None,
        tolerance: tuple[float, float] = (1e-10, 1e-3),
        examples: int = EXAMPLES,
        values: tuple[str, ...] = ("normal",),
        whole: bool = False,
        optional: bool = False,
        needs: str | None = None,
    ) -> None:
        functools.update_wrapper(self, check)
        self.check, self.when, self.tolerance = check, when, tolerance
        self.examples, self.values, self.whole, self.optional = examples, values, whole, optional
        self.needs = needs
        self.name = check.__name__
        self.about = inspect.getdoc(check).partition("\n")[0]  # type: ignore[union-attr]

    def __repr__(self) -> str:
        return f"<invariant {self.name}>"

    def __call__(
        self,
        model: Any,
        inputs: Any = None,
        *,
        examples: int = EXAMPLES,
        seed: int = 0,
        tolerance: float | None = None,
        **options: Any,
    ) -> None:
        """Tries the invariant on a model; arguments as those of `check_model`.

        Raises:
            AssertionError: with the smallest case that was found to fail.
        """
        subject = model if isinstance(model, Subject) else Subject(model, inputs, **options)
        reason = self.applies(subject)
        if reason is not None:
            raise ValueError(f"{self.name} does not apply: {reason}")
        self.run(subject, examples, seed, tolerance)

    def applies(self, subject: Subject) -> str | None:
        """Why it says nothing of the model, or None."""
        if self.needs is not None and not getattr(subject, self.needs):
            return f"nothing is given for it ({self.needs}=)"
        if self.name in subject.not_meant:
            return f"not meant to hold: {subject.not_meant[self.name]}"
        return None if self.when is None else self.when(subject)

    def run(
        self, subject: Subject, examples: int, seed: int, tolerance: float | None = None
    ) -> str | None:
        """Tries some cases: None where all hold, or why none could be looked at."""
        double = subject.dtype == torch.float64
        tolerance = self.tolerance[0 if double else 1] if tolerance is None else tolerance
        examples = min(examples, self.examples)
        with torch.random.fork_rng(devices=[]):  # which a wrong model may draw from
            nested = hypothesis.currently_in_test_context()
            if not self.whole and not nested:
                return self._search(subject, examples, seed, tolerance)
            # Large ones, that no part stays without use.
            sizes = {name: high for name, (_, high) in subject.axes.items()}
            numbers = range(seed * self.examples, (seed + 1) * self.examples)
            samples = (subject.sample(number, sizes=sizes) for number in numbers)
            trials = (Try(subject, sample, tolerance) for sample in samples)
            if self.whole:  # as many as it takes: most stop at the first
                return self._one(trials, Sample(sizes, numbers[0]))
            # Within a test of Hypothesis, that test draws, and makes small what fails.
            found = [self._one(trial, trial.sample) for trial in itertools.islice(trials, examples)]
            return found[0]

    def _search(self, subject: Subject, examples: int, seed: int, tolerance: float) -> str | None:
        skipped: list[str | None] = []
        failed: dict[str, Violation] = {}
        begin: list[float] = []

        def attempt(sizes: dict[str, int], number: int, values: str) -> None:
            place = str(Sample(sizes, number, values))
            if begin and time.monotonic() - begin[0] > SECONDS:
                if place in failed:  # Time is up: what was found small is the smallest.
                    raise failed[place]
                return
            try:
                sample = subject.sample(number, values, sizes)
                skipped.append(self._one(Try(subject, sample, tolerance), sample))
            except Violation as violation:
                if not begin:
                    begin.append(time.monotonic())
                failed[place] = violation
                raise

        numbers = st.integers(0, 999)
        sizes = st.fixed_dictionaries(
            {name: st.integers(low, high) for name, (low, high) in subject.axes.items()}
        )
        test = hypothesis.given(sizes, numbers, st.sampled_from(self.values))(attempt)
        if len(self.values) > 1:  # each kind at least once, in the smallest case
            least = {name: low for name, (low, _) in subject.axes.items()}
            for kind in self.values:
                test = hypothesis.example(least, seed % 1000, kind)(test)
        test = hypothesis.seed(seed)(test)
        test = hypothesis.settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=False,
            print_blob=False,
            report_multiple_bugs=False,
            verbosity=hypothesis.Verbosity.quiet,
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=(
                hypothesis.Phase.explicit,
                hypothesis.Phase.generate,
                hypothesis.Phase.shrink,
            ),
        )(test)
        try:
            test()
        except Violation as violation:
            raise violation.with_traceback(None) from violation.__cause__
        reasons = [reason for reason in skipped if reason is not None]
        return reasons[0] if reasons and len(reasons) == len(skipped) else None

    def _one(self, trial: Any, sample: Sample) -> str | None:
        """Looks at one case (or at all): the reason where it can say nothing."""
        try:
            self.check(trial)
        except Skipped as reason:
            return str(reason)
        except Violation as violation:
            raise self._told(violation, sample) from violation.__cause__
        except Exception as error:
            if isinstance(error, RuntimeError) and _NOT_IN_TORCH.search(str(error)):
                return f"torch: {str(error).splitlines()[0]}"
            kind = type(error).__name__
            found = Violation("the model", "a result", f"{kind}: {error}", self.about)
            raise self._told(found, sample) from error
        return None

    def _told(self, found: Violation, sample: Sample) -> Violation:
        told = Violation(found.path, found.expected, found.got, found.meaning)
        meaning = f" ({found.meaning})" if found.meaning else ""
        told.args = (
            f"{self.name}: {self.about}\n"
            f"  where:    {found.path}{meaning}\n"
            f"  expected: {found.expected}\n"
            f"  got:      {found.got}\n"
            f"  again:    funcnets.testing.sample(model, inputs, {sample})",
        )
        return told


def invariant(**options: Any) -> Callable[[Callable[..., None]], Invariant]:
    """Makes an invariant of a function that looks at one `Try`."""
    return lambda check: Invariant(check, **options)


def compare(actual: Any, expected: Any, tolerance: float, meaning: str = "") -> None:
    """Raises a `Violation` at the first leaf that differs in name, shape, dtype or value."""
    mine, wanted = dict(tree.leaves_with_path(actual)), dict(tree.leaves_with_path(expected))
    for path in [*wanted, *mine]:
        place = tree.join(path)
        if path not in mine or path not in wanted:
            side = "nothing" if path not in wanted else tree.describe(wanted[path])
            came = "nothing" if path not in mine else tree.describe(mine[path])
            raise Violation(place, side, came, meaning)
        _compare(place, mine[path], wanted[path], tolerance, meaning)


def finite(leaves: Iterable[tuple[Any, Tensor]], meaning: str) -> None:
    """Raises a `Violation` at the first leaf with a value that is not finite."""
    for path, leaf in leaves:
        if not leaf.isfinite().all():
            bad = (~leaf.isfinite()).nonzero()[0].tolist()
            raise Violation(
                tree.join(path),
                "finite values",
                f"{leaf[tuple(bad)].item()} at {bad}",
                meaning,
            )


def _compare(place: str, a: Any, b: Any, tolerance: float, meaning: str) -> None:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        if a != b:
            raise Violation(place, repr(b), repr(a), meaning)
        return
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        raise Violation(place, tree.describe(b), tree.describe(a), meaning)
    if not a.numel() or torch.equal(a, b):
        return
    if not a.is_floating_point():
        bad = (a != b).nonzero()[0].tolist()
        wanted, came = (f"{x[tuple(bad)].item()} at {bad}" for x in (b, a))
        raise Violation(place, wanted, came, meaning)
    a, b = a.detach().double(), b.detach().double()
    same = (a == b) | (a.isnan() & b.isnan())
    error = torch.where(same, 0.0, (a - b).abs()).nan_to_num(nan=torch.inf)
    largest = torch.where(b.isfinite(), b.abs(), 0.0).max()
    if error.max() > tolerance * (1 + largest):
        worst = [int(i) for i in torch.unravel_index(error.argmax(), error.shape)]
        raise Violation(
            place,
            f"{b[tuple(worst)].item():.8g} at {worst}, within {tolerance:g}",
            f"{a[tuple(worst)].item():.8g}",
            meaning,
        )

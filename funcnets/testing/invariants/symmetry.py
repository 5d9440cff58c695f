"""Equivariance, invariance and causality: a change of the inputs, and what it does to outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from funcnets import random, tree
from funcnets.testing.declared import Declared, declare
from funcnets.testing.engine import Try, invariant
from funcnets.testing.subject import Sample, Subject

Change = Callable[[Subject, Sample, Any], Any]


def _same(subject: Subject, sample: Sample, outputs: Any) -> Any:
    return outputs


@dataclass(frozen=True)
class Symmetry:
    """A pair of transformations: outputs for changed inputs equal the changed outputs.

    Attributes:
        inputs: the change of the inputs (a tuple), as a function of the subject, the sample (whose
            ``key`` is there to draw from) and the inputs.
        outputs: that of the outputs; none, where the model is invariant.
        seen: what of the outputs for changed inputs is compared; by default all.
    """

    inputs: Change
    outputs: Change = _same
    seen: Change = _same


def equivariant(
    inputs: Callable[..., Any], outputs: Callable[[Any], Any] = lambda y: y
) -> Symmetry:
    """Of two plain functions: ``f(inputs(x)) == outputs(f(x))``.

    Args:
        inputs: of all inputs by position, to one of them or a tuple.
        outputs: of the outputs; without it, the model is invariant.

    >>> equivariant(lambda x: -x, lambda y: -y).outputs(None, None, 1.0)
    -1.0
    """

    def change(subject: Subject, sample: Sample, held: Any) -> Any:
        changed = inputs(*held)
        return changed if isinstance(changed, tuple) else (changed,)

    return Symmetry(change, lambda subject, sample, held: outputs(held))


def permutation(axis: str) -> Symmetry:
    """The order along a named axis: inputs and outputs that have it are permuted alike."""

    def order(subject: Subject, sample: Sample) -> Tensor:
        return random.permutation(random.fold_in(sample.key, 61), sample.sizes[axis])

    return _along(
        axis, lambda x, place, subject, sample: x.index_select(place, order(subject, sample))
    )


def translation(*axes: str) -> Symmetry:
    """Shifts along named axes, around the end: for convolutions with circular padding."""

    def shift(x: Tensor, place: int, subject: Subject, sample: Sample) -> Tensor:
        step = int(random.randint(random.fold_in(sample.key, place + 71), (), 0, 1000))
        return x.roll(step % max(x.shape[place], 1), place)

    parts = [_along(axis, shift) for axis in axes]
    return Symmetry(_chain([p.inputs for p in parts]), _chain([p.outputs for p in parts]))


def rotation(first: str, second: str) -> Symmetry:
    """A quarter turn in the plane of two named axes of one size."""

    def turn(x: Tensor, place: int, subject: Subject, sample: Sample) -> Tensor:
        return x.rot90(1, (place, place + 1))

    return _along(first, turn, second)


def causal(axis: str) -> Symmetry:
    """No output depends on an input that is later along a named axis."""

    def until(sample: Sample) -> int:
        key = random.fold_in(sample.key, 81)
        return int(random.randint(key, (), 0, max(sample.sizes[axis] - 1, 1))) + 1

    def change(subject: Subject, sample: Sample, inputs: Any) -> Any:
        key, end = random.fold_in(sample.key, 82), until(sample)
        others = subject.draw_inputs(key, sample.sizes, "normal", subject.dtype)

        def one(x: Tensor, other: Tensor, declared: Declared) -> Tensor:
            if axis not in declared.axes:
                return x
            place = declared.axes.index(axis)
            later = x.shape[place] - end
            return torch.cat([x.narrow(place, 0, end), other.narrow(place, end, later)], place)

        return tree.map(one, inputs, others, subject.inputs)

    def earlier(subject: Subject, sample: Sample, outputs: Any) -> Any:
        return _map_outputs(
            subject, outputs, axis, lambda y, place: y.narrow(place, 0, until(sample))
        )

    return Symmetry(change, earlier, earlier)


def padding(axis: str, lengths: int) -> Symmetry:
    """What lies beyond the lengths of the samples changes no output.

    Args:
        axis: the named axis along which samples have lengths.
        lengths: which of the inputs holds them.
    """

    def real(subject: Subject, sample: Sample, held: Any, place: int, x: Tensor) -> Tensor:
        steps = torch.arange(x.shape[place])
        inside = steps < held[lengths].unsqueeze(-1)  # [batch, time]
        shape = [1] * x.ndim
        shape[0], shape[place] = inside.shape
        return inside.reshape(shape)

    def change(subject: Subject, sample: Sample, inputs: Any) -> Any:
        key = random.fold_in(sample.key, 91)
        others = subject.draw_inputs(key, sample.sizes, "normal", subject.dtype)

        def one(x: Tensor, other: Tensor, declared: Declared) -> Tensor:
            if axis not in declared.axes:
                return x
            inside = real(subject, sample, inputs, declared.axes.index(axis), x)
            return torch.where(inside, x, other)

        return tree.map(one, inputs, others, subject.inputs)

    def kept(subject: Subject, sample: Sample, outputs: Any) -> Any:
        def one(y: Tensor, place: int) -> Tensor:
            return torch.where(
                real(subject, sample, sample.inputs, place, y), y, torch.zeros_like(y)
            )

        return _map_outputs(subject, outputs, axis, one)

    return Symmetry(change, kept, kept)


@invariant(needs="symmetries")
def has_its_symmetries(trial: Try) -> None:
    """Outputs for changed inputs are the changed outputs, for every symmetry that was given."""
    subject, sample = trial.subject, trial.sample
    params, inputs, key = trial.parts
    plain = subject.infer(params, inputs, key)
    for name, symmetry in subject.symmetries.items():
        changed = subject.infer(params, symmetry.inputs(subject, sample, inputs), key)
        found = symmetry.seen(subject, sample, changed)
        trial.close(found, symmetry.outputs(subject, sample, plain), name)


def _along(axis: str, f: Callable[..., Tensor], other: str | None = None) -> Symmetry:
    """The same change of all inputs and outputs that have the axis."""

    def inputs(subject: Subject, sample: Sample, held: Any) -> Any:
        def one(x: Tensor, declared: Declared) -> Tensor:
            if axis not in declared.axes:
                return x
            return f(x, declared.axes.index(axis), subject, sample)

        return tree.map(one, held, subject.inputs)

    def outputs(subject: Subject, sample: Sample, held: Any) -> Any:
        return _map_outputs(subject, held, axis, lambda y, place: f(y, place, subject, sample))

    return Symmetry(inputs, outputs)


def _map_outputs(subject: Subject, outputs: Any, axis: str, f: Callable[..., Tensor]) -> Any:
    if subject.outputs is None:
        raise TypeError(f"symmetry along {axis}: expected a declaration of the outputs (outputs=)")
    declared = declare(subject.outputs)
    return tree.map(
        lambda y, d: f(y, d.axes.index(axis)) if axis in d.axes else y, outputs, declared
    )


def _chain(changes: list[Change]) -> Change:
    def all_of_them(subject: Subject, sample: Sample, held: Any) -> Any:
        for change in changes:
            held = change(subject, sample, held)
        return held

    return all_of_them

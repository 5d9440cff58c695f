"""What a model returns is what was declared, and the same in both modes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from funcnets import tree
from funcnets.testing.declared import declare
from funcnets.testing.engine import Try, invariant
from funcnets.testing.subject import Violation

_KINDS = {"floats": "floating", "booleans": "boolean", "integers": "whole", "lengths": "whole"}


@invariant()
def returns_what_is_declared(trial: Try) -> None:
    """Names, shapes and dtypes of the outputs are as declared, and the same in training."""
    subject, (params, inputs, key) = trial.subject, trial.parts
    inferred = subject.infer(params, inputs, key)
    trained, _ = subject.train(params, inputs, key)
    for mode, outputs in (("inference", inferred), ("training", trained)):
        for path, y in tree.leaves_with_path(outputs):
            if isinstance(y, Tensor) and y.is_floating_point() and y.dtype != subject.dtype:
                place, got = tree.join(path) or "outputs", tree.describe(y)
                raise Violation(place, f"{_name(subject.dtype)}, as parameters", got, mode)
        if subject.outputs is not None:
            _as_declared(outputs, subject.outputs, trial.sample.sizes, mode)
    mine, theirs = (
        [(path, tree.describe(y)) for path, y in tree.leaves_with_path(outputs)]
        for outputs in (trained, inferred)
    )
    if mine != theirs:
        raise Violation("outputs", f"{theirs}, as at inference", str(mine), "training")


def _as_declared(outputs: Any, declared: Any, sizes: Any, mode: str) -> None:
    wanted = dict(tree.leaves_with_path(declare(declared)))
    found = dict(tree.leaves_with_path(outputs))
    if wanted.keys() != found.keys():
        expected, got = (", ".join(map(tree.join, held)) for held in (wanted, found))
        raise Violation("outputs", expected, got, mode)
    for path, spec in wanted.items():
        y, place = found[path], tree.join(path) or "outputs"
        kind = "floating" if y.is_floating_point() else "boolean" if y.dtype.itemsize == 1 else ""
        if tuple(y.shape) != spec.shape(sizes) or (kind or "whole") != _KINDS[spec.kind]:
            axes = " ".join(map(str, spec.axes))
            expected = f"{spec.kind} {list(spec.shape(sizes))} ({axes})"
            raise Violation(place, expected, tree.describe(y), mode)


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")

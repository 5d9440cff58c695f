"""What a model returns is what was declared, and the same in both modes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from funcnets import tree
from funcnets.testing.declared import declare
from funcnets.testing.engine import Try, invariant
from funcnets.testing.subject import Violation

_KINDS = {"floats": "floating", "booleans": "boolean", "integers": "whole", "lengths": "whole"}


@invariant()
def keeps_the_dtype(trial: Try) -> None:
    """In single and in double precision, outputs have the dtype of parameters and inputs."""
    subject = trial.subject
    if subject.why_not_double is not None:
        raise Violation("the model", "a result in double precision", subject.why_not_double)
    for dtype in (torch.float64, torch.float32):
        sample = subject.sample(trial.sample.seed, sizes=trial.sample.sizes, dtype=dtype)
        for mode, outputs in (
            ("inference", subject.infer(sample.params, sample.inputs, sample.key)),
            ("training", subject.train(sample.params, sample.inputs, sample.key)),
        ):
            for path, y in tree.leaves_with_path(outputs):
                if isinstance(y, Tensor) and y.is_floating_point() and y.dtype != dtype:
                    place, name = tree.join(path), str(dtype).removeprefix("torch.")
                    raise Violation(place, name, tree.describe(y), mode)


@invariant()
def returns_what_is_declared(trial: Try) -> None:
    """Names, shapes and dtypes of the outputs are as declared, and the same in training."""
    subject, (params, inputs, key) = trial.subject, trial.parts
    inferred = subject.infer(params, inputs, key)
    trained, _ = subject.train(params, inputs, key)
    if subject.outputs is not None:
        for mode, outputs in (("inference", inferred), ("training", trained)):
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
        y, place = found[path], tree.join(path)
        kind = "floating" if y.is_floating_point() else "boolean" if y.dtype.itemsize == 1 else ""
        if tuple(y.shape) != spec.shape(sizes) or (kind or "whole") != _KINDS[spec.kind]:
            axes = " ".join(map(str, spec.axes))
            expected = f"{spec.kind} {list(spec.shape(sizes))} ({axes})"
            raise Violation(place, expected, tree.describe(y), mode)

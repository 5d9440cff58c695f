"""Lower precision gives what rounding explains, and no more."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from funcnets import random, tree
from funcnets.testing.engine import Try, invariant
from funcnets.testing.subject import Subject, Violation, smooth


def _not_double(subject: Subject) -> str | None:
    why = subject.why_not_double
    return None if why is None else f"the model does not run in double precision: {why}"


@invariant(when=_not_double, tolerance=(100.0, 100.0), values=("normal", "shifted"))
def single_precision_is_close(trial: Try) -> None:
    """float32 differs from float64 by what rounding of parameters and inputs explains."""
    _close_in(trial, torch.float32)


@invariant(when=_not_double, tolerance=(30.0, 30.0), examples=5)
def bfloat16_is_close(trial: Try) -> None:
    """bfloat16 differs from float64 by what rounding of parameters and inputs explains."""
    _close_in(trial, torch.bfloat16)


def _close_in(trial: Try, dtype: torch.dtype) -> None:
    """Compares with how far outputs move when everything is changed by one unit of rounding."""
    subject, (params, inputs, key) = trial.subject, trial.parts
    exact = smooth(subject.infer(params, inputs, key))
    unit = torch.finfo(dtype).eps

    moves = [torch.zeros_like(y) for y in exact]
    for i in range(3):
        place = random.fold_in(key, 40 + i)

        def moved(path: tuple[str, ...], x: Tensor, place: Tensor = place) -> Tensor:
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return x
            number = sum(map(ord, ".".join(path)))
            noise = random.normal(random.fold_in(place, number), x.shape, dtype=torch.float64)
            return x * (1 + unit * noise)

        near = subject.infer(
            tree.map_with_path(moved, params), tree.map_with_path(moved, inputs), key
        )
        for move, y, z in zip(moves, exact, smooth(near), strict=True):
            move.copy_(torch.maximum(move, (y - z).abs().nan_to_num()))

    low = subject.infer(_rounded(params, dtype), _rounded(inputs, dtype), key)
    for (path, y), z, move in zip(
        [(p, y) for p, y in tree.leaves_with_path(low) if y.is_floating_point()],
        exact,
        moves,
        strict=True,
    ):
        allowed = trial.tolerance * (move.max() + unit * z.abs().max()) + torch.finfo(dtype).tiny
        error = (y.double() - z).abs().max()
        if not error <= allowed:
            name = str(dtype).removeprefix("torch.")
            raise Violation(
                tree.join(path),
                f"at most {allowed:.2g} from float64 (rounding moves it by {move.max():.2g})",
                f"{error:.2g}",
                name,
            )


def _rounded(held: Any, dtype: torch.dtype) -> Any:
    return tree.map(
        lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, held
    )

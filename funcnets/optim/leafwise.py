"""What the optimizers share: hyperparameters, checks, and a rule applied leaf by leaf."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int64
from torch import Size, Tensor

from funcnets import _torch
from funcnets.tree.flatten import (
    Tree,
    describe,
    join,
    leaves,
    leaves_like,
    leaves_with_path,
    map,
    unflatten_like,
)

Schedule: TypeAlias = Callable[[Int64[Tensor, ""]], Float[Tensor, ""]]
"""From the number of updates made so far to the value of a hyperparameter."""

Hyperparameter: TypeAlias = float | int | Tensor | Schedule
"""A number, a tensor of shape [] (of several under vmap), or a schedule."""

Number: TypeAlias = float | Tensor

Moment: TypeAlias = Tensor | None
"""A leaf of a state tree; None where the algorithm does without that tree, which is then ``()``.

(An empty tuple has no leaves; None would be one to vmap.)
"""

Leaves: TypeAlias = list[Tensor]

Rule: TypeAlias = Callable[..., tuple[Moment, ...]]


def check_hyperparameter(
    place: str, value: Hyperparameter, least: float = 0.0, below: float = math.inf
) -> None:
    """Raises for a number outside of [least, below), and for what is no hyperparameter.

    The value of a tensor is not looked at: that would wait for the device, and fail under vmap.
    """
    if isinstance(value, Tensor):
        if value.ndim or not value.dtype.is_floating_point:
            hint = "; map over several with vmap" if value.ndim else ""
            raise ValueError(
                f"{place}: expected a number or a floating-point tensor of shape [], "
                f"got {describe(value)}{hint}"
            )
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        if not least <= value < below:
            bound = f" and below {below:g}" if below < math.inf else ""
            raise ValueError(f"{place}: expected at least {least:g}{bound}, got {value}")
    elif not callable(value):
        raise TypeError(f"{place}: expected a number, a tensor or a schedule, got {value!r}")


def resolve(value: Hyperparameter, step: Int64[Tensor, ""]) -> Number:
    """The value after ``step`` updates: a float, or a float64 tensor of shape []."""
    if not isinstance(value, Tensor) and callable(value):
        value = _torch.computed_once(value(step))
    return value.to(torch.float64) if isinstance(value, Tensor) else float(value)


def is_zero(value: Hyperparameter) -> bool:
    """Whether a hyperparameter is the number zero, so that its term can be left out."""
    return isinstance(value, (int, float)) and value == 0


def is_absent(moment: Tree) -> bool:
    """Whether a state does without this tree."""
    return isinstance(moment, tuple) and not moment


def new_step(params: Tree) -> Int64[Tensor, ""]:
    """Zero, as a tensor of shape [] on the device of the parameters."""
    for leaf in leaves(params):
        return leaf.new_zeros((), dtype=torch.int64)  # under vmap: one for each member
    return torch.zeros((), dtype=torch.int64)


def like(params: Tree, fill: float = 0.0) -> Tree:
    """A tree of tensors shaped as the parameters."""
    return map(lambda leaf: torch.full_like(leaf, fill), params)


def check_params(name: str, params: Tree) -> None:
    """Raises for leaves that no gradient reaches."""
    if all(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves(params)):
        return
    for path, leaf in leaves_with_path(params):
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            raise ValueError(
                f"{name}: {join(path)}: expected a floating-point tensor, got {describe(leaf)}; "
                "an optimizer is given the trainable part, tree.partition(params)[0]"
            )


def check_state(name: str, kind: type, state: Any) -> None:
    """Raises for the state of another optimizer."""
    if not isinstance(state, kind):
        raise TypeError(f"{name}: state: expected {kind.__name__}, got {type(state).__name__}")


def aligned(label: str, tree: Tree, params: Tree) -> list[Any]:
    """The leaves of a tree in the order of those of the parameters.

    Raises:
        ValueError: where their structures differ; it names the place.
    """
    try:
        return leaves_like(tree, params)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from None


def check_like(
    name: str, expected: str, tensors: list[Any], leaves: list[Any], params: Tree
) -> None:
    """Raises for what has not the shape and dtype of the leaf of the parameters at its place."""
    for index, (tensor, leaf) in enumerate(zip(tensors, leaves, strict=True)):
        if (
            not isinstance(tensor, Tensor)
            or tensor.shape != leaf.shape
            or tensor.dtype != leaf.dtype
        ):
            place = join(leaves_with_path(params)[index][0])
            raise ValueError(
                f"{name}: {place}: {expected} {describe(leaf)}, got {describe(tensor)}"
            )


def leafwise(
    name: str,
    rule: Rule,
    scalars: Sequence[Number] | Callable[[], Sequence[Number]],
    grads: Tree,
    params: Tree,
    *moments: Tree,
    shapes: Callable[[Tensor], tuple[Size, ...]] | None = None,
    at_once: Callable[..., tuple[Leaves, ...] | None] | None = None,
) -> tuple[Any, ...]:
    """Applies ``rule(scalars, grad, param, *moments) -> (update, *moments)`` to each leaf.

    Args:
        name: of the optimizer, for errors.
        scalars: numbers, of which tensors arrive at the rule in the dtype of the leaf: so that a
            float64 learning rate leaves a float32 parameter of shape [] what it is; or a function
            that computes them, called where the rule is applied.
        moments: state trees like ``params``, or ``()`` for one that the rule does without.
        shapes: those of the moments of a leaf, where they are not its own.
        at_once: ``(grads, *moments)``, as lists of leaves, to the lists of results; or to None,
            where it cannot do what the rule does.

    Returns:
        ``(updates, *moments)``, the trees of the results.
    """
    own = leaves(params)
    columns = [aligned(f"{name}: grads", grads, params)]
    check_like(name, "expected gradient", columns[0], own, params)
    for moment in moments:
        if is_absent(moment):
            columns.append([None] * len(own))
            continue
        columns.append(aligned(f"{name}: state", moment, params))
    _check_moments(name, columns[1:], own, params, shapes)

    if at_once is None or (found := at_once(*columns)) is None:
        numbers = scalars() if callable(scalars) else scalars
        found = _one_by_one(rule, numbers, own, columns)
    updates, *results = found
    return unflatten_like(params, updates), *(
        () if is_absent(moment) else unflatten_like(params, result)
        for moment, result in zip(moments, results, strict=True)
    )


def _one_by_one(
    rule: Rule, scalars: Sequence[Number], leaves: Leaves, columns: list[Any]
) -> tuple[Any, ...]:
    rows = []
    last: Tensor | None = None
    for leaf, grad, *rest in zip(leaves, *columns, strict=True):
        if last is None or leaf.dtype is not last.dtype or leaf.device != last.device:
            last, cast = leaf, [_once_as_leaf(scalar, leaf) for scalar in scalars]
        rows.append(rule(cast, grad, leaf, *rest))
    return tuple(list(column) for column in zip(*rows, strict=True)) or tuple(columns)


def as_leaf(scalar: Number, leaf: Tensor) -> Number:
    """A scalar in the dtype of a leaf, which it then does not promote, and on its device."""
    return scalar.to(leaf.device, leaf.dtype) if isinstance(scalar, Tensor) else scalar


def _once_as_leaf(scalar: Number, leaf: Tensor) -> Number:
    cast = as_leaf(scalar, leaf)
    return _torch.computed_once(cast) if isinstance(cast, Tensor) else cast


def scaled(factor: Number, x: Tensor) -> Tensor:
    """``factor * x``, without a pass for a factor of one."""
    return x if isinstance(factor, float) and factor == 1 else x * factor


def add_scaled(x: Tensor, factor: Number, y: Tensor) -> Tensor:
    """``x + factor * y`` in one pass, and none for a factor of zero."""
    if isinstance(factor, Tensor):
        return torch.addcmul(x, y, factor)
    return torch.add(x, y, alpha=factor) if factor else x


def safe_sqrt(x: Tensor) -> Tensor:
    """The square root of numbers of at least zero, with a finite derivative at zero.

    A second moment is zero where every gradient so far was zero, and the derivative of the root
    there would be infinite, times the zero derivative of the square: not a number.
    """
    return x.clamp_min(_least(x.dtype)).sqrt()


def _least(dtype: torch.dtype) -> float:
    """A positive number whose root vanishes beside any eps in use."""
    info = torch.finfo(dtype)
    # The normal numbers of float16 begin at 6e-5, where a second moment may well lie.
    return info.tiny * info.eps if dtype == torch.float16 else info.tiny


def _check_moments(
    name: str,
    columns: list[list[Any]],
    leaves: list[Any],
    params: Tree,
    shapes: Callable[[Tensor], tuple[Size, ...]] | None,
) -> None:
    for number, column in enumerate(columns):
        if not column or column[0] is None:
            continue
        expected = [leaf.shape if shapes is None else shapes(leaf)[number] for leaf in leaves]
        found = [moment.shape for moment in column]
        for index, (one, other) in enumerate(zip(expected, found, strict=True)):
            if one != other:
                place = join(leaves_with_path(params)[index][0])
                raise ValueError(
                    f"{name}: state: {place}: expected {list(one)}, got {list(other)}; "
                    "it belongs to other parameters"
                )

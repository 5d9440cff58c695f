"""Functions over trees as functions over lists of tensors, closed-over tensors included."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor

from funcnets import tree

# Builds an object again around other tensors.
Build = Callable[[tuple[Tensor, ...]], Any]


def lift(f: Callable[..., Any]) -> tuple[list[Tensor], Callable[[tuple[Tensor, ...]], Any]]:
    """The tensors that f closes over, and f as a function of them.

    A derivative is taken of the inputs of an operation, and a tensor in a closure is none; lifted,
    it is. Looked through are closures, defaults, functools.partial, methods' functions, and trees
    of tensors and functions inside them. Tensors reached through a global or an attribute of an
    object stay where they are: they are constants.

    >>> import torch
    >>> def times(w):
    ...     return lambda x: w * x
    >>> tensors, build = lift(times(torch.tensor(3.0)))
    >>> tensors, build((torch.tensor(5.0),))(2)
    ([tensor(3.)], tensor(10.))
    """
    tensors: list[Tensor] = []
    build = _lift(f, tensors, set())
    return tensors, build if build is not None else lambda _: f


class Opaque:
    """A function that closes over tensors that `lift` has taken out already, and must not see."""

    def __init__(self, f: Callable[..., Any]) -> None:
        self._f = f

    def __call__(self, *args: Any) -> Any:
        """The function's result."""
        return self._f(*args)


def _lift(value: Any, tensors: list[Tensor], inside: set[int]) -> Build | None:
    """How to build ``value`` around other tensors; None where it holds none."""
    if isinstance(value, Tensor):
        known = [id(tensor) for tensor in tensors]
        if id(value) not in known:
            known.append(id(value))
            tensors.append(value)
        place = known.index(id(value))
        return lambda new: new[place]
    if id(value) in inside:  # a function that refers to itself
        return None
    inside = inside | {id(value)}
    if isinstance(value, types.FunctionType):
        return _lift_function(value, tensors, inside)
    if isinstance(value, functools.partial):
        parts = _lift_all([value.func, *value.args, *value.keywords.values()], tensors, inside)
        if parts is None:
            return None
        return _partial(parts, len(value.args), list(value.keywords))
    if isinstance(value, types.MethodType):
        method = _lift(value.__func__, tensors, inside)
        return None if method is None else lambda new: types.MethodType(method(new), value.__self__)
    leaves, structure = tree.flatten(value)
    if structure is None:
        return None
    parts = _lift_all(leaves, tensors, inside)
    return None if parts is None else lambda new: tree.unflatten(structure, parts(new))


def _lift_function(f: types.FunctionType, tensors: list[Tensor], inside: set[int]) -> Build | None:
    cells = [_contents(cell) for cell in f.__closure__ or ()]
    keywords = f.__kwdefaults__ or {}
    parts = _lift_all([*cells, *(f.__defaults__ or ()), *keywords.values()], tensors, inside)
    if parts is None:
        return None

    def build(new: tuple[Tensor, ...]) -> Any:
        made = iter(parts(new))
        closure = tuple(types.CellType(next(made)) for _ in cells)
        defaults = tuple(next(made) for _ in f.__defaults__ or ())
        copy = types.FunctionType(f.__code__, f.__globals__, f.__name__, defaults, closure)
        copy.__kwdefaults__ = {name: next(made) for name in keywords}
        return copy

    return build


def _partial(
    parts: Callable[[tuple[Tensor, ...]], list[Any]], count: int, names: list[str]
) -> Build:
    def build(new: tuple[Tensor, ...]) -> Any:
        f, *made = parts(new)
        return functools.partial(f, *made[:count], **dict(zip(names, made[count:], strict=True)))

    return build


def _lift_all(
    values: list[Any], tensors: list[Tensor], inside: set[int]
) -> Callable[[tuple[Tensor, ...]], list[Any]] | None:
    builds = [_lift(value, tensors, inside) for value in values]
    if all(build is None for build in builds):
        return None
    return lambda new: [
        value if build is None else build(new) for value, build in zip(values, builds, strict=True)
    ]


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None

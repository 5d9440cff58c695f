"""Functions as functions of the tensors that they close over, too."""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from funcnets import tree

# Builds an object again around other tensors, which are found by the id of those they replace. The
# functions made on the way are noted in the same place, so that each is made once.
Build = Callable[[dict[int, Any]], Any]


def lift(value: Any) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
    """The tensors in a tree of functions and tensors, and the tree as a function of them.

    A derivative is taken of the inputs of an operation, and a tensor in a closure is none; lifted,
    it is. Looked through are closures, defaults, functools.partial, methods' functions, and trees
    of tensors and functions inside them. Tensors reached through a global or an attribute of an
    object stay where they are: they are constants.

    >>> import torch
    >>> def times(w):
    ...     return lambda x: w * x
    >>> tensors, build = lift(times(torch.tensor(3.0)))
    >>> tensors, build([torch.tensor(5.0)])(2)
    ([tensor(3.)], tensor(10.))
    """
    tensors: dict[int, Tensor] = {}
    build = _lift(value, tensors, {})
    if build is None or not tensors:
        return [], lambda _: value
    return list(tensors.values()), lambda new: build(dict(zip(tensors, new, strict=True)))


class Opaque:
    """A function that closes over tensors that `lift` has taken out already, and must not see."""

    def __init__(self, f: Callable[..., Any]) -> None:
        self._f = f

    def __call__(self, *args: Any) -> Any:
        """The function's result."""
        return self._f(*args)


def _lift(value: Any, tensors: dict[int, Tensor], known: dict[int, Build | None]) -> Build | None:
    """How to build ``value`` around other tensors; None where it holds none."""
    if isinstance(value, Tensor):
        tensors.setdefault(id(value), value)
        return lambda new: new[id(value)]
    if isinstance(value, types.FunctionType):
        if id(value) not in known:
            # Until it is known: what a function that refers to itself finds.
            known[id(value)] = lambda new: new[id(value)]
            known[id(value)] = _lift_function(value, tensors, known)
        return known[id(value)]
    if isinstance(value, functools.partial):
        parts = _lift_all([value.func, *value.args, *value.keywords.values()], tensors, known)
        return None if parts is None else _partial(parts, len(value.args), list(value.keywords))
    if isinstance(value, types.MethodType):
        method = _lift(value.__func__, tensors, known)
        return None if method is None else lambda new: types.MethodType(method(new), value.__self__)
    leaves, structure = tree.flatten(value)
    if structure is None:
        return None
    parts = _lift_all(leaves, tensors, known)
    return None if parts is None else lambda new: tree.unflatten(structure, parts(new))


def _lift_function(
    f: types.FunctionType, tensors: dict[int, Tensor], known: dict[int, Build | None]
) -> Build | None:
    held = [contents(cell) for cell in f.__closure__ or ()]
    defaults, keywords = f.__defaults__ or (), f.__kwdefaults__ or {}
    parts = _lift_all([*held, *defaults, *keywords.values()], tensors, known)
    if parts is None:
        return None

    def build(new: dict[int, Any]) -> Any:
        if id(f) not in new:
            cells = [types.CellType() for _ in held]
            copy = types.FunctionType(f.__code__, f.__globals__, f.__name__, None, tuple(cells))
            new[id(f)] = copy  # before its cells are filled, for one of them may hold it
            made = iter(parts(new))
            for cell, value in zip(cells, itertools.islice(made, len(cells)), strict=True):
                if value is not _EMPTY:
                    cell.cell_contents = value
            copy.__defaults__ = tuple(itertools.islice(made, len(defaults)))
            copy.__kwdefaults__ = dict(zip(keywords, made, strict=True))
        return new[id(f)]

    return build


def _partial(parts: Callable[[dict[int, Any]], list[Any]], count: int, names: list[str]) -> Build:
    def build(new: dict[int, Any]) -> Any:
        f, *made = parts(new)
        return functools.partial(f, *made[:count], **dict(zip(names, made[count:], strict=True)))

    return build


def _lift_all(
    values: list[Any], tensors: dict[int, Tensor], known: dict[int, Build | None]
) -> Callable[[dict[int, Any]], list[Any]] | None:
    builds = [_lift(value, tensors, known) for value in values]
    if all(build is None for build in builds):
        return None
    return lambda new: [
        value if build is None else build(new) for value, build in zip(values, builds, strict=True)
    ]


def contents(cell: types.CellType) -> Any:
    """What a variable of a closure holds."""
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return _EMPTY


_EMPTY = object()

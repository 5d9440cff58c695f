"""What the branches of a conditional, or the turns of a loop, return: and that it agrees."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnets import _torch, tree

# Which branches were compared for which operands. Nothing but the time of a call depends on it.
_compared: set[Any] = set()


class Described(NamedTuple):
    """A tree without its numbers."""

    structure: Any
    kinds: dict[str, str]  # the path of each leaf, and its dtype and shape

    def ordered(self, output: Any) -> Any:
        """An output of the same structure with its names in the order of this one."""
        if tree.flatten(output)[1] == self.structure:
            return output
        places = tree.unflatten(self.structure, [0] * len(self.kinds))
        return tree.unflatten(
            self.structure, tree.leaves(tree.map(lambda _, leaf: leaf, places, output))
        )

    def __str__(self) -> str:
        return ", ".join(f"{path} {kind}" for path, kind in self.kinds.items()) or "nothing"


def describe(output: Any) -> Described:
    """The structure, shapes and dtypes of an output."""
    kinds = {tree.join(path): tree.describe(leaf) for path, leaf in tree.leaves_with_path(output)}
    return Described(tree.flatten(output)[1], kinds)


def check_tensors(name: str, label: str, output: Any) -> None:
    """Every leaf of a branch's output must be a tensor."""
    if all(isinstance(leaf, Tensor) for leaf in tree.leaves(output)):
        return
    for path, leaf in tree.leaves_with_path(output):
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"{name}: {label}: {tree.join(path)}: expected a tensor, got {tree.describe(leaf)}"
            )


def check_agreement(name: str, first: tuple[str, Described], second: tuple[str, Described]) -> None:
    """Two labelled outputs must have equal structures, shapes and dtypes."""
    (label, output), (other, against) = first, second
    if output.kinds == against.kinds and _unordered(output.structure) == _unordered(
        against.structure
    ):
        return
    differing = [
        place
        for place in {**output.kinds, **against.kinds}
        if output.kinds.get(place) != against.kinds.get(place)
    ]
    where = f" at {differing[0]}" if differing and differing[0] != "(root)" else ""
    kinds = "" if differing else f" ({_kind(output)} and {_kind(against)})"
    raise ValueError(
        f"{name}: expected outputs of equal structure, shapes and dtypes{where}{kinds}; "
        f"{label} returns {output}; {other} returns {against}"
    )


def check_untaken(
    name: str, taken: tuple[str, Any], other: tuple[str, Callable[..., Any]], operands: Any
) -> None:
    """Compares an output with that of a branch that is not run, by its shapes alone.

    Once for the same code and kinds of operands; a branch that has no shapes without numbers (it
    reads a value, say) is left alone.
    """
    leaves, structure = tree.flatten(operands)
    label, f = other
    code = _code(f)
    kinds = tuple((leaf.shape, leaf.dtype) for leaf in leaves if isinstance(leaf, Tensor))
    outputs = tuple((leaf.shape, leaf.dtype) for leaf in tree.leaves(taken[1]))
    key = (code, structure, kinds, outputs)
    if code is not None and key in _compared:
        return
    try:
        with _torch.shapes_only():
            output = f(*tree.unflatten(structure, [_hollow(leaf) for leaf in leaves]))
    except Exception:
        return
    check_tensors(name, label, output)
    check_agreement(name, (taken[0], describe(taken[1])), (label, describe(output)))
    if code is not None:
        _compared.add(key)


def _code(f: Any) -> Any:
    """What tells one branch from another from call to call; None where nothing does."""
    if isinstance(f, types.BuiltinFunctionType):
        return f
    if isinstance(f, functools.partial):
        code = _code(f.func)
        return None if code is None else (code, len(f.args), *f.keywords)
    if not isinstance(f, types.FunctionType):
        return None
    inner = []
    for cell in f.__closure__ or ():
        try:
            value = cell.cell_contents
        except ValueError:
            continue
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, Tensor):
                inner.append((item.shape, item.dtype))
            elif isinstance(item, (types.FunctionType, functools.partial)):
                inner.append(_code(item))
    return f.__code__, tuple(inner)


def _hollow(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return torch.empty(leaf.shape, dtype=leaf.dtype, device=leaf.device)


def _unordered(node: Any) -> Any:
    """A structure in which the order of names does not count."""
    if node is None:
        return None
    if all(isinstance(key, int) for key in node.keys):
        children: Any = tuple(map(_unordered, node.children))
    else:
        children = frozenset(zip(node.keys, map(_unordered, node.children), strict=True))
    return node.kind, children


def _kind(output: Described) -> str:
    return output.structure.kind.__name__ if output.structure is not None else "a tensor"

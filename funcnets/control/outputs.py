"""What the branches of a conditional, or the turns of a loop, return: and that it agrees."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnets import _torch, tree
from funcnets.control.closure import contents, lift

# Which branches were compared for which operands. Nothing but the time of a call depends on it.
_compared: set[Any] = set()
_MOST = 4096


class DisagreementError(ValueError):
    """Outputs that ought to be alike are not."""


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
    raise DisagreementError(
        f"{name}: expected outputs of equal structure, shapes and dtypes{where}{kinds}; "
        f"{label} returns {output}; {other} returns {against}"
    )


def check_untaken(
    name: str, taken: tuple[str, Any], other: tuple[str, Callable[..., Any]], operands: Any
) -> None:
    """Compares an output with that of a branch that is not run, by its shapes alone.

    Once for the same code and kinds of tensors; a branch that has no shapes without numbers (it
    reads a value, say) is left alone.
    """
    label, f = other
    key = _key((f, operands, taken[1]), set())
    if key in _compared:
        return
    tensors, build = lift((f, operands))
    try:
        with _torch.shapes_only():
            f, operands = build([_hollow(tensor) for tensor in tensors])
            output = f(*operands)
    except DisagreementError:  # of a conditional inside
        raise
    except Exception:
        return
    check_tensors(name, label, output)
    check_agreement(name, (taken[0], describe(taken[1])), (label, describe(output)))
    if len(_compared) == _MOST:
        _compared.clear()
    _compared.add(key)


def _key(value: Any, seen: set[int]) -> Any:
    """What tells the shapes that a function returns, or a tree has, from call to call."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    if isinstance(value, types.FunctionType):
        if id(value) in seen:
            return None
        seen.add(id(value))
        cells = tuple(_key(contents(cell), seen) for cell in value.__closure__ or ())
        return value.__code__, cells, _key((value.__defaults__, value.__kwdefaults__), seen)
    if isinstance(value, functools.partial):
        return _key((value.func, value.args, value.keywords), seen)
    if isinstance(value, types.MethodType):
        return _key((value.__func__, value.__self__), seen)
    if value is None or isinstance(value, (bool, int, str, types.BuiltinFunctionType)):
        return type(value), value
    leaves, structure = tree.flatten(value)
    if structure is not None:
        return structure, tuple(_key(leaf, seen) for leaf in leaves)
    return type(value), id(value) if callable(value) else None


def _hollow(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _unordered(node: Any) -> Any:
    """A structure in which the order of names does not count."""
    if node is None:
        return None
    children = frozenset(zip(node.keys, map(_unordered, node.children), strict=True))
    # The batch size of a TensorDict follows from its tensors, or does not count.
    meta = None if isinstance(node.meta, torch.Size) else node.meta
    return node.kind, meta, children


def _kind(output: Described) -> str:
    return output.structure.kind.__name__ if output.structure is not None else "a tensor"

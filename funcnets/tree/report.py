"""What a tree holds, in words: a table of it, and how it differs from what was expected."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase

from funcnets.tree.flatten import Path, Tree, describe, entries, join, leaves_with_path, map
from funcnets.tree.select import is_trainable

_MOST_LINES = 20
_MOST_NAMES = 4


@dataclass(frozen=True, slots=True)
class Spec:
    """The shape and dtype of a tensor, without its values."""

    shape: torch.Size
    dtype: torch.dtype


@dataclass(frozen=True)
class Differences:
    """How a tree differs from another; empty, hence false, where names and shapes agree.

    Attributes:
        missing: the names (``fc.weight``) of the leaves that were expected and are not there.
        unexpected: the names of the leaves that are there and were not expected.
        mismatched: the names of the leaves with another shape (or dtype, where that was asked).
        lines: the same for people to read, a subtree that is wholly absent or new in one line.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]
    lines: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.lines)

    def __str__(self) -> str:
        shown = self.lines[:_MOST_LINES]
        more = len(self.lines) - len(shown)
        return "\n".join([*shown, *([f"... and {more} more"] if more else [])])


def specs(tree: Tree) -> Tree:
    """The tree with a `Spec` in the place of each tensor."""
    return map(lambda leaf: Spec(leaf.shape, leaf.dtype), tree)


def compare(params: Tree, like: Tree, dtype: bool = False) -> Differences:
    """How the names and shapes of ``params`` differ from those of ``like``.

    Args:
        params: nested TensorDicts or dicts.
        like: the same, of tensors or of anything else with a shape and a dtype.
        dtype: whether dtypes have to agree too.

    >>> from tensordict import TensorDict
    >>> params = TensorDict({"fc": {"weight": torch.ones(2, 3)}})
    >>> print(compare(params, TensorDict({"fc": {"weight": torch.ones(2, 4)}, "b": torch.ones(2)})))
    fc.weight: expected [2, 4], got [2, 3]
    b: missing; expected [2]
    """
    found: dict[str, list[str]] = {"missing": [], "unexpected": [], "mismatched": []}
    lines: list[str] = []

    def note(kind: str, path: Path, tree: Any) -> None:
        held = list(_below(tree))
        found[kind].extend(join((*path, *names)) for names, _ in held)
        word = "expected" if kind == "missing" else "got"
        lines.append(f"{join(path)}: {kind}; {word} {_names(held, dtype)}")

    def walk(path: Path, got: Any, expected: Any) -> None:
        ours, theirs = entries(got, path), entries(expected, path)
        if ours is None or theirs is None:
            same = ours is theirs and getattr(got, "shape", None) == expected.shape
            if not same or (dtype and got.dtype != expected.dtype):
                found["mismatched"].append(join(path))
                both = (_names(list(_below(tree)), dtype) for tree in (expected, got))
                lines.append("{}: expected {}, got {}".format(join(path), *both))
            return
        for name, child in theirs.items():
            if name in ours:
                walk((*path, name), ours[name], child)
            elif not _is_hollow(child):
                note("missing", (*path, name), child)
        for name, child in ours.items():
            if name not in theirs and not _is_hollow(child):
                note("unexpected", (*path, name), child)

    walk((), params, like)
    return Differences(**{kind: tuple(names) for kind, names in found.items()}, lines=tuple(lines))


def check(params: Tree, like: Tree, dtype: bool = False) -> None:
    """Raises unless ``params`` has the names and shapes of ``like``.

    Args:
        params: nested TensorDicts or dicts.
        like: the same, of tensors or of anything else with a shape and a dtype.
        dtype: whether dtypes have to agree too.

    Raises:
        ValueError: naming each place that differs, what was expected and what came.
    """
    if differences := compare(params, like, dtype):
        raise ValueError(str(differences))


def summary(params: Tree) -> str:
    """A table of the leaves, their shapes, dtypes and sizes, and the totals.

    The shapes and counts of an ensemble (batch size ``[n]``) are those of one member.

    >>> from tensordict import TensorDict
    >>> print(summary(TensorDict({"fc": {"weight": torch.ones(2, 300), "bias": torch.ones(2)}})))
    name       shape     dtype    count
    fc.weight  [2, 300]  float32    600
    fc.bias    [2]       float32      2
    trainable 602, buffers 0, 2.41 kB
    """
    batch = params.batch_size if isinstance(params, TensorDictBase) else torch.Size([])
    rows = [("name", "shape", "dtype", "count")]
    counts = {True: 0, False: 0}
    size = 0
    for path, leaf in leaves_with_path(params):
        shape = leaf.shape[len(batch) :]
        counts[is_trainable(path, leaf)] += shape.numel()
        size += leaf.numel() * leaf.element_size()
        dtype = str(leaf.dtype).removeprefix("torch.")
        rows.append((join(path), str(list(shape)), dtype, f"{shape.numel():,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        f"{name:{widths[0]}}  {shape:{widths[1]}}  {dtype:{widths[2]}}  {count:>{widths[3]}}"
        for name, shape, dtype, count in rows
    ]
    total = f"trainable {counts[True]:,}, buffers {counts[False]:,}"
    if batch:
        total += f" in each member of an ensemble of {list(batch)}"
    return "\n".join([*lines, f"{total}, {_bytes(float(size))}"])


def _below(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    held = entries(tree, path)
    if held is None:
        yield path, tree
        return
    for name, child in held.items():
        yield from _below(child, (*path, name))


def _is_hollow(tree: Any) -> bool:
    """Whether it is a subtree without leaves: nothing to miss."""
    return next(_below(tree), None) is None


def _names(held: list[tuple[Path, Any]], dtype: bool) -> str:
    """``[10]`` for a leaf, ``weight [10, 128], bias [10]`` for the leaves of a subtree."""
    if len(held) == 1 and not held[0][0]:
        return _shape(held[0][1], dtype)
    shown = [f"{join(path)} {_shape(leaf, dtype)}" for path, leaf in held[:_MOST_NAMES]]
    more = len(held) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "") or "a subtree without leaves"


def _shape(leaf: Any, dtype: bool) -> str:
    if not hasattr(leaf, "shape"):
        return describe(leaf)
    name = str(leaf.dtype).removeprefix("torch.") if dtype else ""
    return f"{name}{list(leaf.shape)}"


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"

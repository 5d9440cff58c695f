"""Choosing leaves by name: patterns, and a tree parted in two and put together again."""

from __future__ import annotations

import fnmatch
import functools
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from tensordict import TensorDict, TensorDictBase

from funcnets.tree.flatten import Path, Tree, describe, entries, join, tensordict

Where: TypeAlias = str | Sequence[str] | re.Pattern[str] | Callable[[Path, Any], bool]

BUFFERS = frozenset({"running_mean", "running_var", "num_batches_tracked"})


def is_trainable(path: Path, leaf: Any) -> bool:
    """Whether a leaf is a parameter, and not a buffer.

    Buffers are the leaves named as torch.nn names running statistics, and those whose dtype is
    neither floating nor complex.
    """
    if path and path[-1] in BUFFERS:
        return False
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and (dtype.is_floating_point or dtype.is_complex)


def matcher(where: Where) -> Callable[[Path, Any], bool]:
    """The predicate ``(path, leaf) -> bool`` that a pattern stands for.

    Args:
        where: one of

            - a glob on the dotted path, as in ``fnmatch.fnmatchcase``: ``"layer1.*"`` or
              ``"*.bias"``; ``*`` crosses dots. A glob that matches the path of a subtree takes all
              its leaves, so ``"layer1"`` says the same as ``"layer1.*"``;
            - several globs, of which any may match;
            - a compiled regular expression, which must match the whole dotted path;
            - a predicate of the path (a tuple of names) and the leaf.

    >>> matcher(["*.bias", "head"])(("head", "weight"), None)
    True
    """
    if isinstance(where, str):
        return _glob_matcher((where,))
    if isinstance(where, re.Pattern):
        return _pattern_matcher(where)
    if callable(where):
        return where
    if isinstance(where, Sequence) and all(isinstance(glob, str) for glob in where):
        return _glob_matcher(tuple(where))
    raise TypeError(
        "where: expected a glob, several globs, a compiled regular expression or a predicate, "
        f"got {where!r}"
    )


def partition(params: Tree, where: Where = is_trainable) -> tuple[Tree, Tree]:
    """Parts a tree in two: ``(the leaves that match, the rest)``, each at its old place.

    Without a pattern these are ``(trainable, buffers)``. `merge` puts them together again, so that
    freezing a part of a network is

        trained, frozen = partition(trainable, "head")
        params = merge(trained, frozen, buffers)

    with the gradient taken with respect to ``trained`` alone. Neither tree holds a subtree without
    leaves, except that those of ``params`` itself stay in the first.

    Args:
        params: nested TensorDicts or dicts.
        where: see `matcher`.

    >>> params = TensorDict({"norm": {"weight": torch.ones(2), "running_var": torch.ones(2)}})
    >>> trainable, buffers = partition(params)
    >>> list(buffers.keys(include_nested=True, leaves_only=True))
    [('norm', 'running_var')]
    """
    held = entries(params)
    if held is None:
        raise TypeError(f"partition: expected a TensorDict, got {describe(params)}")
    matching, rest = _partition(held, (), matcher(where))
    return _like(params, matching), _like(params, rest)


def merge(*trees: Tree) -> Tree:
    """The tree of all the leaves of several trees, which share none.

    A TensorDict of the result has the batch size that those of the given trees have in common.

    Raises:
        ValueError: naming the path, where two trees have a leaf at one place, or one has a leaf
            where another has a subtree.

    >>> first = TensorDict({"fc": {"weight": torch.ones(2)}})
    >>> sorted(merge(first, TensorDict({"fc": {"bias": torch.ones(1)}}))["fc"].keys())
    ['bias', 'weight']
    """
    if not trees:
        raise TypeError("merge: expected at least one tree")
    for tree in trees:
        if entries(tree) is None:
            raise TypeError(f"merge: expected TensorDicts, got {describe(tree)}")
    return functools.reduce(lambda first, second: _merge(first, second, ()), trees)


def _partition(
    held: dict[str, Any], path: Path, matches: Callable[[Path, Any], bool]
) -> tuple[dict[str, Any], dict[str, Any]]:
    matching: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for name, child in held.items():
        below = (*path, name)
        # The first test saves a call for nearly every leaf: this runs in each training step.
        if type(child) is torch.Tensor or (inner := entries(child, below)) is None:
            if matches(below, child):
                matching[name] = child
            else:
                rest[name] = child
            continue
        first, second = _partition(inner, below, matches)
        if first or not inner:
            matching[name] = _like(child, first)
        if second:
            rest[name] = _like(child, second)
    return matching, rest


def _like(tree: Any, held: dict[str, Any]) -> Any:
    """The same kind of node with other entries."""
    if type(tree) is TensorDict or isinstance(tree, TensorDictBase):
        return tensordict(held, tree.batch_size)
    return held


def _merge(first: Any, second: Any, path: Path) -> Any:
    a, b = entries(first, path), entries(second, path)
    if a is None or b is None:
        both = f"{describe(first)} and {describe(second)}"
        raise ValueError(f"{join(path)}: expected it in one of the merged trees, got {both}")
    merged = dict(a)
    for name, child in b.items():
        merged[name] = _merge(a[name], child, (*path, name)) if name in a else child
    if not isinstance(first, TensorDictBase) or not isinstance(second, TensorDictBase):
        return _like(first, merged)
    size = first.batch_size
    if size != second.batch_size:  # a tree without entries has no say
        size = _common((first if a else second).batch_size, (second if b else first).batch_size)
    return tensordict(merged, size)


def _common(first: torch.Size, second: torch.Size) -> torch.Size:
    pairs = zip(first, second, strict=False)
    return torch.Size([a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)])


@functools.lru_cache(maxsize=256)
def _glob_matcher(globs: tuple[str, ...]) -> Callable[[Path, Any], bool]:
    both = [pattern for glob in globs for pattern in (glob, f"{glob}.*")]
    return _pattern_matcher(re.compile("|".join(map(fnmatch.translate, both)) or "(?!)"))


def _pattern_matcher(pattern: re.Pattern[str]) -> Callable[[Path, Any], bool]:
    return lambda path, _: pattern.fullmatch(".".join(path)) is not None

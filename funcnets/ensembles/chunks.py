"""vmap over a few members at a time, where memory is short or a few at a time are faster."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.func import vmap

from funcnets import _torch, tree
from funcnets.tree.flatten import Structure, Tree

Chunk: TypeAlias = int | Literal["auto"] | None


def chunked(
    f: Callable[..., Any], chunk: Chunk, in_dims: int | tuple[int | None, ...] = 0
) -> Callable[..., Any]:
    """``torch.func.vmap(f, in_dims)``, of at most ``chunk`` members at a time.

    The numbers are those of the whole, to rounding. (``vmap(f, chunk_size=chunk)`` is the same for
    tensors, but of a TensorDict it returns one with the batch size of a chunk.)

    Args:
        f: a function of trees, such as a training step.
        chunk: None for all members at once. "auto" measures: the first call with arguments of new
            shapes tries all, a quarter, ... and one at a time, a few times each, and what was
            fastest is kept; compiled, and under a transform, it is all. How many there are in a
            chunk changes the rounding, so "auto" is for runs that need not be the same to the bit.
        in_dims: 0, or for each argument 0 where it is mapped over and None where it is not.

    >>> from tensordict import TensorDict
    >>> params = TensorDict({"w": torch.arange(5)}, [5])
    >>> found = chunked(lambda params, x: params * x, 2, (0, None))(params, 3)
    >>> found["w"].tolist(), found.batch_size
    ([0, 3, 6, 9, 12], torch.Size([5]))
    """
    if chunk not in (None, "auto") and (not isinstance(chunk, int) or chunk < 1):
        raise ValueError(f"chunk: expected None, 'auto' or at least 1, got {chunk!r}")
    if any(dim not in (0, None) for dim in (in_dims if isinstance(in_dims, tuple) else (in_dims,))):
        raise ValueError(f"chunked: in_dims: expected 0 or None for each, got {in_dims}")
    whole = vmap(f, in_dims)
    if chunk is None:
        return whole
    if chunk == "auto":
        return _measured(f, in_dims)

    def run(*arguments: Any) -> Any:
        dims = in_dims if isinstance(in_dims, tuple) else (in_dims,) * len(arguments)
        size = _members(dims, arguments)
        if size is None or size <= chunk:
            return whole(*arguments)  # vmap says what is wrong
        parts = []
        for start in range(0, size, chunk):
            place = slice(start, start + chunk)
            part = [
                members(one, place) if dim == 0 else one
                for one, dim in zip(arguments, dims, strict=True)
            ]
            parts.append(whole(*part))
        columns = zip(*(tree.leaves(part) for part in parts), strict=True)
        return _built(tree.flatten(parts[0])[1], [torch.cat(column) for column in columns])

    return run


def _measured(f: Callable[..., Any], in_dims: int | tuple[int | None, ...]) -> Callable[..., Any]:
    """`chunked` with the chunk that was fastest for the shapes of the arguments."""
    chosen: dict[Any, int | None] = {}

    def run(*arguments: Any) -> Any:
        dims = in_dims if isinstance(in_dims, tuple) else (in_dims,) * len(arguments)
        if _torch.inlining() or (size := _members(dims, arguments)) is None:
            return chunked(f, None, in_dims)(*arguments)
        leaves, structure = tree.flatten(arguments)
        shapes = tuple(
            (leaf.shape, leaf.dtype, leaf.device) for leaf in leaves if isinstance(leaf, Tensor)
        )
        if (structure, shapes) not in chosen:
            tried: list[int | None] = [None]
            while size > 1:
                size = max(size // 4, 1)
                tried.append(size)
            taken = {chunk: _seconds(chunked(f, chunk, in_dims), arguments) for chunk in tried}
            chosen[structure, shapes] = min(taken, key=taken.__getitem__)
        return chunked(f, chosen[structure, shapes], in_dims)(*arguments)

    return run


def _members(dims: tuple[int | None, ...], arguments: tuple[Any, ...]) -> int | None:
    """How many members the arguments have; None where they do not agree, or do not fit."""
    if len(dims) != len(arguments):
        return None
    mapped = [one for one, dim in zip(arguments, dims, strict=True) if dim == 0]
    sizes = {leaf.shape[0] if getattr(leaf, "ndim", 0) else 0 for leaf in tree.leaves(mapped)}
    return None if len(sizes) > 1 else max(sizes, default=0)


def _seconds(f: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    """The less of two calls, after one that warms up."""
    taken = []
    for _ in range(3):
        _wait()
        begin = time.perf_counter()
        f(*arguments)
        _wait()
        taken.append(time.perf_counter() - begin)
    return min(taken[1:])


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def members(ensemble: Tree, places: slice | Sequence[int] | Tensor) -> Tree:
    """Those members of an ensemble, in that order: an ensemble again.

    Args:
        ensemble: a tree of tensors [members, ...], parameters or a whole state.

    >>> from tensordict import TensorDict
    >>> members(TensorDict({"w": torch.arange(5)}, [5]), [3, 1])["w"]
    tensor([3, 1])
    """
    places = list(places) if isinstance(places, Sequence) else places
    leaves, structure = tree.flatten(ensemble)
    return _built(structure, [leaf[places] for leaf in leaves])


def _built(structure: Structure | None, leaves: list[Tensor]) -> Tree:
    """The tree of these leaves, with their number of members for a batch size."""
    return tree.unflatten(_sized(structure, len(leaves[0])), leaves)


def _sized(structure: Structure | None, size: int) -> Structure | None:
    if structure is None:
        return None
    meta = structure.meta
    if isinstance(structure.kind, type) and issubclass(structure.kind, TensorDictBase):
        meta = torch.Size([size, *meta[1:]])
    children = tuple(_sized(child, size) for child in structure.children)
    return structure._replace(meta=meta, children=children)

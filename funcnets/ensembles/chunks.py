"""vmap over a few members at a time, where memory is short."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.func import vmap

from funcnets import tree
from funcnets.tree.flatten import Structure, Tree


def chunked(
    f: Callable[..., Any], chunk: int | None, in_dims: int | tuple[int | None, ...] = 0
) -> Callable[..., Any]:
    """``torch.func.vmap(f, in_dims)``, of at most ``chunk`` members at a time.

    The numbers are those of the whole, to rounding. (``vmap(f, chunk_size=chunk)`` is the same for
    tensors, but of a TensorDict it returns one with the batch size of a chunk.)

    Args:
        f: a function of trees, such as a training step.
        chunk: None for all members at once.
        in_dims: 0, or for each argument 0 where it is mapped over and None where it is not.

    >>> from tensordict import TensorDict
    >>> params = TensorDict({"w": torch.arange(5)}, [5])
    >>> found = chunked(lambda params, x: params * x, 2, (0, None))(params, 3)
    >>> found["w"].tolist(), found.batch_size
    ([0, 3, 6, 9, 12], torch.Size([5]))
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk: expected at least 1, got {chunk}")
    if any(dim not in (0, None) for dim in (in_dims if isinstance(in_dims, tuple) else (in_dims,))):
        raise ValueError(f"chunked: in_dims: expected 0 or None for each, got {in_dims}")
    whole = vmap(f, in_dims)
    if chunk is None:
        return whole

    def run(*arguments: Any) -> Any:
        dims = in_dims if isinstance(in_dims, tuple) else (in_dims,) * len(arguments)
        mapped = [one for one, dim in zip(arguments, dims, strict=True) if dim == 0]
        sizes = [leaf.shape[0] for leaf in tree.leaves(mapped) if leaf.ndim]
        if not sizes or min(sizes) <= chunk:
            return whole(*arguments)
        parts = []
        for start in range(0, sizes[0], chunk):
            place = slice(start, start + chunk)
            part = [
                members(one, place) if dim == 0 else one
                for one, dim in zip(arguments, dims, strict=True)
            ]
            parts.append(whole(*part))
        columns = zip(*(tree.leaves(part) for part in parts), strict=True)
        return _built(tree.flatten(parts[0])[1], [torch.cat(column) for column in columns])

    return run


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

"""Trees as vectors and as batches: norms, averages, dtypes, and stacking members to an ensemble."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from tensordict import TensorDictBase
from torch import Tensor

from funcnets.tree.flatten import (
    Structure,
    Tree,
    describe,
    flatten,
    join,
    leaves,
    leaves_with_path,
    map,
    map_with_path,
    unflatten,
)


def count(tree: Tree) -> int:
    """The number of elements of all tensors of a tree.

    >>> count({"weight": torch.ones(2, 3), "bias": torch.ones(2)})
    8
    """
    return sum(leaf.numel() for leaf in leaves(tree))


def global_norm(tree: Tree) -> Float[Tensor, ""]:
    """The Euclidean norm of all floating-point leaves taken as one vector.

    Computed in float32, or in float64 where a leaf is of that dtype; 0 for a tree without leaves.
    The norm of each member of an ensemble is ``vmap(global_norm)(params)``.

    >>> global_norm({"weight": torch.tensor([3.0]), "bias": torch.tensor(4.0)})
    tensor(5.)
    """
    floating = [leaf for leaf in leaves(tree) if leaf.dtype.is_floating_point]
    if not floating:
        return torch.zeros(())
    wide = any(leaf.dtype == torch.float64 for leaf in floating)
    dtype = torch.float64 if wide else torch.float32
    norms = [torch.linalg.vector_norm(leaf, dtype=dtype) for leaf in floating]
    return torch.linalg.vector_norm(torch.stack(norms))


def lerp(start: Tree, end: Tree, weight: float | Float[Tensor, ""]) -> Tree:
    """``start + weight * (end - start)``, leaf by leaf; leaves that are not floating are the end's.

    Raises:
        ValueError: naming the place, where the trees differ in their names, shapes or dtypes.

    >>> lerp({"a": torch.tensor(1.0)}, {"a": torch.tensor(3.0)}, 0.5)
    {'a': tensor(2.)}
    """

    def between(path: tuple[str, ...], a: Tensor, b: Tensor) -> Tensor:
        if a.shape != b.shape or a.dtype != b.dtype:
            raise ValueError(f"{join(path)}: expected {describe(a)}, got {describe(b)}")
        if not (a.dtype.is_floating_point or a.dtype.is_complex):
            return b
        return torch.lerp(a, b, weight.to(a.dtype) if isinstance(weight, Tensor) else weight)

    return map_with_path(between, start, end)


def ema(average: Tree, params: Tree, decay: float | Float[Tensor, ""]) -> Tree:
    """The next exponential moving average, ``decay * average + (1 - decay) * params``.

    Leaves that are not floating-point, such as counters, are those of ``params``.

    >>> ema({"a": torch.tensor(1.0)}, {"a": torch.tensor(2.0)}, 0.75)
    {'a': tensor(1.2500)}
    """
    return lerp(average, params, 1 - decay)


def cast(
    tree: Tree, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Tree:
    """The tree with its floating-point leaves in another dtype, or all leaves on another device.

    Integers, booleans and keys keep their dtype. Leaves that have the dtype and device already are
    taken over as they are, not copied.

    >>> cast({"weight": torch.ones(1), "steps": torch.tensor(3)}, torch.float16)
    {'weight': tensor([1.], dtype=torch.float16), 'steps': tensor(3)}
    """
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"cast: expected a floating-point dtype, got {dtype}")
    return map(
        lambda leaf: leaf.to(
            device=device, dtype=dtype if leaf.dtype.is_floating_point else leaf.dtype
        ),
        tree,
    )


def stack(trees: Sequence[Tree]) -> Tree:
    """One tree of batch size ``[n]`` of n trees with the same names, shapes and dtypes.

    ``vmap(model.apply, in_dims=(0, None))`` then runs the networks side by side.

    Raises:
        ValueError: naming the place where two trees differ.

    >>> from tensordict import TensorDict
    >>> member = TensorDict({"weight": torch.ones(3)})
    >>> stack([member, member, member]).batch_size
    torch.Size([3])
    """
    if not trees:
        raise ValueError("stack: expected at least one tree")

    def together(path: tuple[str, ...], *members: Any) -> Tensor:
        for member in members:
            if not isinstance(member, Tensor):
                raise TypeError(f"{join(path)}: expected a tensor, got {describe(member)}")
            if member.shape != members[0].shape or member.dtype != members[0].dtype:
                raise ValueError(
                    f"{join(path)}: expected {describe(members[0])}, got {describe(member)}"
                )
        return torch.stack(members)

    stacked, _ = flatten(map_with_path(together, *trees))
    return unflatten(_batched(flatten(trees[0])[1], len(trees)), stacked)


def unstack(tree: Tree) -> list[Tree]:
    """The members of an ensemble, one tree each: the inverse of `stack`.

    The members are copies, so that no member keeps the memory of the others.

    Raises:
        ValueError: where a leaf has no leading axis, or one of another length.

    >>> from tensordict import TensorDict
    >>> [int(member["a"]) for member in unstack(TensorDict({"a": torch.arange(3)}))]
    [0, 1, 2]
    """
    found = leaves_with_path(tree)
    if not found:
        raise ValueError("unstack: expected a tree with at least one leaf")
    size = found[0][1].shape[:1]
    for path, leaf in found:
        if leaf.shape[:1] != size or not size:
            expected = f"[{size[0]}, ...]" if size else "[n, ...]"
            raise ValueError(f"{join(path)}: expected {expected}, got {list(leaf.shape)}")
    structure = _batched(flatten(tree)[1], None)
    columns = [leaf.unbind(0) for _, leaf in found]
    return [unflatten(structure, [column[i].clone() for column in columns]) for i in range(size[0])]


def _batched(structure: Structure | None, size: int | None) -> Structure | None:
    """The structure with one more leading batch size in every TensorDict; with None one less."""
    if structure is None:
        return None
    children = tuple([_batched(child, size) for child in structure.children])
    meta = structure.meta
    if isinstance(structure.kind, type) and issubclass(structure.kind, TensorDictBase):
        meta = torch.Size([size, *meta]) if size is not None else meta[1:]
    return structure._replace(children=children, meta=meta)

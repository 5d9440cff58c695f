"""Parameter trees from and to nn.Modules and state_dicts.

The names of a tree are those of a state_dict, split at the dots. Two things are not the same:

- Tied weights. A module that reads one tensor under two names has both in its state_dict. A tree
  holds a shared tensor once, under the first of the names, and the functions read it twice: else it
  would be counted, optimised and, after the first step, different twice. On the way out the tied
  names are filled in again, for the module (or its state_dict) tells which they are.
- Counters and constants. Integers of shape [], such as ``num_batches_tracked``, play no part in
  what a network computes, and some modules keep tables that follow from their sizes. They are
  dropped on the way in, and on the way out are what the target has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from funcnets.tree.flatten import Tree, describe, entries, leaves_with_path, map_with_path
from funcnets.tree.report import Differences, check, compare
from funcnets.tree.select import partition

# Of torchvision's Swin Transformers.
CONSTANTS = frozenset({"relative_position_index", "relative_coords_table"})


def from_module(module: nn.Module) -> TensorDict:
    """The parameters and buffers of a module, as copies.

    >>> list(from_module(nn.BatchNorm1d(3)).keys())
    ['weight', 'bias', 'running_mean', 'running_var']
    """
    return from_state_dict(module.state_dict(keep_vars=True))


def from_state_dict(state_dict: Mapping[str, Any]) -> TensorDict:
    """The tree of a state_dict, of copies of its tensors.

    Of names that hold the same memory, as those of tied weights do, the first is kept; integers of
    shape [] and torchvision's constant tables are dropped.

    Raises:
        TypeError: for an entry that is no tensor.
        ValueError: for an entry that is not initialised (of a lazy module), or whose name is also
            the beginning of another.

    >>> from_state_dict({"0.weight": torch.ones(2)})["0", "weight"]
    tensor([1., 1.])
    """
    tied = _tied(state_dict)
    return TensorDict(
        nest(
            {
                name: tensor.detach().clone()
                for name, tensor in state_dict.items()
                if name not in tied and not _is_aside(name, tensor)
            }
        )
    )


def to_state_dict(
    params: Tree, like: nn.Module | Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The leaves of a tree by their dotted names; the tensors are the tree's own, not copies.

    Args:
        params: a parameter tree of batch size [].
        like: the module, or a state_dict of it, that the result is for: then all its names are
            there, tied names, counters and constants (with the values of ``like``) included.

    Raises:
        ValueError: where ``params`` does not have the names and shapes of ``like``.

    >>> to_state_dict(TensorDict({"0": {"weight": torch.ones(2)}}))
    {'0.weight': tensor([1., 1.])}
    """
    held: dict[str, Tensor] = {}
    for path, leaf in leaves_with_path(params):
        name = ".".join(path)
        if name in held:
            raise ValueError(f"{name}: expected one leaf of this name, got two")
        held[name] = leaf
    if like is None:
        return held
    target = like.state_dict(keep_vars=True) if isinstance(like, nn.Module) else like
    tied = _tied(target)
    aside = {n for n, tensor in target.items() if _is_aside(n, tensor) and n not in held}
    expected = {n: t for n, t in target.items() if n not in tied and n not in aside}
    check(params, nest(expected))
    return {
        name: target[name].detach().clone() if name in aside else held[tied.get(name, name)]
        for name in target
    }


def to_module(params: Tree, module: nn.Module) -> None:
    """Copies a tree into the parameters and buffers of a module, in place.

    The values take the dtypes and devices of the module; counters and constants keep their values.

    Raises:
        ValueError: where ``params`` does not have the names and shapes of the module, which is then
            left as it was.

    >>> module = nn.Linear(2, 1)
    >>> to_module(TensorDict({"weight": torch.ones(1, 2), "bias": torch.zeros(1)}), module)
    >>> module(torch.tensor([1.0, 2.0])).item()
    3.0
    """
    values = to_state_dict(params, module)
    target = module.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(values[name])


def transfer(source: Tree, into: Tree) -> tuple[Tree, Differences]:
    """The tree ``into`` with those leaves of ``source`` that fit it, and a report of the others.

    What a pretrained backbone under a new head wants: a leaf is taken over where ``source`` has one
    of the same name and shape, in the dtype and on the device of the leaf that it replaces.

    Returns:
        The new tree, and how ``source`` differs from ``into``: its ``missing`` and ``mismatched``
        names are the leaves that kept their values.

    >>> into = TensorDict({"stem": torch.zeros(2), "head": torch.zeros(5)})
    >>> params, report = transfer(TensorDict({"stem": torch.ones(2), "head": torch.ones(9)}), into)
    >>> params["stem"], report.mismatched
    (tensor([1., 1.]), ('head',))
    """
    report = compare(source, into)
    kept = {*report.missing, *report.mismatched}

    def choose(path: tuple[str, ...], leaf: Tensor) -> Tensor:
        if ".".join(path) in kept:
            return leaf
        found = source
        for name in path:
            held = entries(found)
            if held is None or name not in held:
                return leaf  # below a place where source has a leaf instead of a subtree
            found = held[name]
        return found.to(device=leaf.device, dtype=leaf.dtype)

    return map_with_path(choose, into), report


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names to nested dicts."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *above, last = name.split(".")
        place: Any = nested
        for step in above:
            place = place.setdefault(step, {})
            if not isinstance(place, dict):
                raise ValueError(f"{name}: expected no entry named as a part of this name")
        if last in place:
            raise ValueError(f"{name}: expected no entry whose name begins with this name")
        place[last] = value
    return nested


def without_counters(params: Tree) -> Tree:
    """The tree without counters and constants, which a state_dict has and no function reads.

    >>> state = nn.BatchNorm1d(3, affine=False).state_dict()
    >>> list(without_counters(TensorDict(state)).keys())
    ['running_mean', 'running_var']
    """
    if entries(params) is None or not any(
        _is_aside(path[-1], leaf) for path, leaf in leaves_with_path(params)
    ):
        return params
    return partition(params, lambda path, leaf: _is_aside(path[-1], leaf))[1]


def _is_aside(name: str, tensor: Any) -> bool:
    if name.rpartition(".")[2] in CONSTANTS:
        return True
    if not isinstance(tensor, Tensor) or tensor.ndim:
        return False
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _tied(state_dict: Mapping[str, Any]) -> dict[str, str]:
    """The names whose tensor is that of an earlier name, each with that name."""
    first: dict[Any, str] = {}
    tied = {}
    for name, tensor in state_dict.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {describe(tensor)}")
        if is_lazy(tensor):
            raise ValueError(f"{name}: not initialised; call the lazy module once before")
        memory = tensor.untyped_storage()._cdata  # data_ptr would be 0 for every meta tensor
        place = memory, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
        if first.setdefault(place, name) != name:
            tied[name] = first[place]
    return tied

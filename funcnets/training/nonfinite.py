"""What is to be done about a loss or gradient that is not finite, and where it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor

from funcnets import tree
from funcnets.optim.leafwise import new_step
from funcnets.training.state import State
from funcnets.tree.flatten import Tree

POLICIES = ("stop", "skip", "restore")

FINITE = -1
LOSS = -2
BATCH = -3
"""The places of ``metrics["nonfinite"]``: -1 for none, a leaf of the gradient from 0 on, -2 for the
loss, and from -3 downwards a leaf of the batch."""


class NonFinite(NamedTuple):
    """What a run has met so far.

    Attributes:
        times: how many steps had a loss or gradient that was not finite.
        step: the number of the first of them, -1 for none.
        place: where in it, as ``metrics["nonfinite"]``.
        stopped: whether the parameters are left alone since.
    """

    times: Tensor
    step: Tensor
    place: Tensor
    stopped: Tensor


class NonFiniteError(ArithmeticError):
    """A training run has stopped because of numbers that are not finite.

    Attributes:
        state: the last state, whose parameters are those before the bad step.
        history: the records so far.
    """

    def __init__(self, message: str, state: State, history: list[dict[str, Any]]) -> None:
        super().__init__(message)
        self.state = state
        self.history = history


def init_nonfinite(params: Tree) -> NonFinite:
    """Nothing met so far."""
    zero = new_step(params)
    return NonFinite(zero, zero - 1, zero - 1, zero > 0)


def first_nonfinite(leaves: Sequence[Tensor]) -> Int64[Tensor, ""]:
    """The index of the first tensor with a number that is not finite, -1 where all are.

    >>> first_nonfinite([torch.ones(2), torch.tensor([1.0, torch.nan])])
    tensor(1)
    """
    if not leaves:
        return torch.tensor(-1)
    largest = [_largest(leaf) for leaf in leaves]
    dtype = largest[0].dtype
    if any(one.dtype != dtype for one in largest):
        largest = [one.to(torch.float64) for one in largest]
    bad = torch.stack(largest).isfinite().logical_not()
    index = torch.arange(len(leaves), device=bad.device)
    first = torch.where(bad, index, len(leaves)).amin()
    return torch.where(first < len(leaves), first, -1)


def place_of(loss: Tensor, gradients: Tree, batch: Any) -> Int64[Tensor, ""]:
    """Where it began: in the batch, in the loss or in the gradient; -1 where all is finite.

    A batch with numbers that are not finite is not at fault as long as the gradients are finite.
    """
    gradient = first_nonfinite(tree.leaves(gradients))
    given = first_nonfinite([leaf for leaf in tree.leaves(batch) if isinstance(leaf, Tensor)])
    lost = loss.isfinite().logical_not()
    place = torch.where(given >= 0, BATCH - given, torch.where(lost, LOSS, gradient))
    return torch.where(lost | (gradient >= 0), place, FINITE)


def place_name(place: int, params: Tree, batch: Any = None) -> str:
    """The name of a place of ``metrics["nonfinite"]``.

    Args:
        place: an int, of one member.
        params: ``state.params``.
        batch: any batch of the same structure.

    >>> place_name(0, {"fc": {"weight": torch.ones(2)}})
    'the gradient of fc.weight'
    >>> place_name(-3, {}, (torch.ones(2), torch.ones(2)))
    'batch.0'
    """
    if place == FINITE:
        return "nothing"
    if place >= 0:
        return f"the gradient of {tree.join(tree.leaves_with_path(params)[place][0])}"
    if place == LOSS:
        for path, leaf in tree.leaves_with_path(params):
            if not bool(leaf.isfinite().all()):
                return f"the loss, after params.{tree.join(path)}"
        return "the loss"
    tensors = [path for path, leaf in tree.leaves_with_path(batch) if isinstance(leaf, Tensor)]
    index = BATCH - place
    return tree.join(("batch", *tensors[index])) if index < len(tensors) else "the batch"


def _largest(leaf: Tensor) -> Tensor:
    """The largest magnitude, which is finite where all are, in one pass."""
    if not leaf.numel() or not (leaf.dtype.is_floating_point or leaf.dtype.is_complex):
        return torch.zeros((), dtype=torch.float32, device=leaf.device)
    return torch.linalg.vector_norm(leaf, torch.inf)

"""Adam's rule by torch's fused kernel: one pass over memory for ten."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from funcnets import _torch
from funcnets.optim.leafwise import Leaves, Number


def serves(rate: Number, betas: tuple[Number, Number], leaves: Leaves) -> bool:
    """Whether the kernel may be used for these gradients and moments.

    It has no derivative and no place in a graph, knows no wrappers but those of a vmap, and takes
    one pair of betas for all members.
    """
    numbers = all(isinstance(beta, float) for beta in betas)
    if not leaves or not numbers or not _torch.at_most_one_vmap():
        return False
    tensors = [*leaves, rate] if isinstance(rate, Tensor) else leaves
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    kind = leaves[0].dtype
    return kind in (torch.float32, torch.float64) and all(
        type(leaf) is Tensor and leaf.dtype == kind and leaf.device.type == "cpu" for leaf in leaves
    )


def adam(
    rate: Number,
    betas: tuple[Number, Number],
    eps: float,
    step: Tensor,
    grads: Leaves,
    moments: Sequence[Leaves],
) -> tuple[Leaves, ...]:
    """Updates, means, squares, and the largest squares (none without amsgrad).

    Args:
        step: how many updates there were before.
        moments: means, squares, and for amsgrad the largest squares before.
    """
    count, old = len(grads), [leaf for column in (grads, *moments) for leaf in column]

    def of_members(members: int, given: Leaves) -> Leaves:
        steps, *old = given
        rates: Any = old.pop() if isinstance(rate, Tensor) else [rate] * members
        new = _results(old, count)
        # Every member's part of a leaf is a tensor of its own to the kernel, with its own count.
        own_grads = list(zip(*(leaf.unbind() for leaf in old[:count]), strict=True))
        own_new = list(zip(*(leaf.unbind() for leaf in new), strict=True))
        for i in range(members):
            scalars = (rates[i], *betas, eps)
            _run(scalars, count, steps[i], list(own_grads[i]), list(own_new[i]))
        return new

    if _torch.transforming():
        rates = [rate] if isinstance(rate, Tensor) else []
        new = _torch.of_all_members(of_members, [step, *old, *rates])
    else:
        new = _results(old, count)
        _run((rate, *betas, eps), count, step, list(grads), new)
    return tuple(new[i * count : (i + 1) * count] for i in range(4))


def _results(old: Any, count: int) -> Leaves:
    """Zeros, of which the kernel makes the updates, and copies of the moments."""
    moments = [leaf.clone(memory_format=torch.preserve_format) for leaf in old[count:]]
    return [torch.zeros_like(mean) for mean in moments[:count]] + moments


def _run(scalars: Any, count: int, step: Tensor, grads: Leaves, new: Leaves) -> None:
    rate, beta1, beta2, eps = scalars
    updates, means, squares, largest = (new[i * count : (i + 1) * count] for i in range(4))
    grads = [_torch.laid_out(grad, mean) for grad, mean in zip(grads, means, strict=True)]
    torch._fused_adam_(
        updates,
        grads,
        means,
        squares,
        largest,
        [(step + 1).to(torch.float32)] * count,
        lr=float(rate),
        beta1=beta1,
        beta2=beta2,
        weight_decay=0.0,
        eps=eps,
        amsgrad=bool(largest),
        maximize=False,
    )

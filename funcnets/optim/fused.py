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
    count, leaves = len(grads), [leaf for column in (grads, *moments) for leaf in column]
    found = _Adam.apply(rate, *betas, eps, count, step, *leaves)
    return tuple(list(found[i * count : (i + 1) * count]) for i in range(4))


class _Adam(torch.autograd.Function):
    """Of the results, the updates come first, and then the new moments."""

    @staticmethod
    def forward(
        rate: Number, beta1: float, beta2: float, eps: float, count: int, step: Tensor, *old: Tensor
    ) -> tuple[Tensor, ...]:
        new = _results(old, count)
        _run((rate, beta1, beta2, eps), count, step, list(old[:count]), new)
        return tuple(new)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any,
        in_dims: Any,
        rate: Number,
        beta1: float,
        beta2: float,
        eps: float,
        count: int,
        step: Tensor,
        *old: Tensor,
    ) -> Any:
        members = info.batch_size

        def of_members(x: Any, dim: int | None) -> Any:
            if not isinstance(x, Tensor):
                return x
            return x.expand(members, *x.shape) if dim is None else x.movedim(dim, 0)

        rate, step = of_members(rate, in_dims[0]), of_members(step, in_dims[5])
        leaves = [of_members(x, dim) for x, dim in zip(old, in_dims[6:], strict=True)]
        new = _results(leaves, count)
        # Every member's part of a leaf is a tensor of its own to the kernel, with its own count.
        grads = list(zip(*(leaf.unbind() for leaf in leaves[:count]), strict=True))
        parts = list(zip(*(leaf.unbind() for leaf in new), strict=True))
        for i in range(members):
            own = rate[i] if isinstance(rate, Tensor) else rate
            _run((own, beta1, beta2, eps), count, step[i], list(grads[i]), list(parts[i]))
        return tuple(new), (0,) * len(new)


def _results(old: Any, count: int) -> Leaves:
    """Zeros, of which the kernel makes the updates, and copies of the moments."""
    moments = [leaf.clone(memory_format=torch.preserve_format) for leaf in old[count:]]
    return [torch.zeros_like(mean) for mean in moments[:count]] + moments


def _run(scalars: Any, count: int, step: Tensor, grads: Leaves, new: Leaves) -> None:
    rate, beta1, beta2, eps = scalars
    updates, means, squares, largest = (new[i * count : (i + 1) * count] for i in range(4))
    # The kernel goes through memory as it lies.
    grads = [
        grad if grad.stride() == mean.stride() else torch.empty_like(mean).copy_(grad)
        for grad, mean in zip(grads, means, strict=True)
    ]
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

"""What those run a branch on that do not take it, and which of the results is kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funcnets import _torch
from funcnets.control.closure import lift
from funcnets.control.node import differentiable


def borrow(mine: Tensor, f: Callable[..., Any], operands: Any) -> Any:
    """``f(*operands)`` where ``mine`` is true; elsewhere something of the same shape.

    Under vmap with a predicate per member every member runs every branch. Evaluated where it was
    never meant to be, a branch may be infinite, index out of range, or have a gradient that is not
    a number, and zero times that is not zero. So a member that does not take the branch runs it on
    the operands, and the closed-over tensors, of one that does, and throws the result away.
    """
    tensors, build = lift((f, operands))
    f, operands = build([_lend(mine, tensor) for tensor in tensors])
    return f(*operands)


def signed(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """f of a mask and tensors, for random keys, too.

    They are of uint64, for which torch (2.11) has neither `where` nor `gather`.
    """

    @functools.wraps(f)
    def g(mine: Tensor, *tensors: Tensor) -> Tensor:
        dtype = tensors[0].dtype
        if dtype not in (torch.uint16, torch.uint32, torch.uint64):
            return f(mine, *tensors)
        return f(mine, *(tensor.to(torch.int64) for tensor in tensors)).to(dtype)

    return g


@signed
def choose(mine: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """``yes`` where ``mine``, which has the first dimensions of both, is true; else ``no``."""
    return torch.where(mine.reshape([*mine.shape, *[1] * (yes.ndim - mine.ndim)]), yes, no)


@signed
def _lend(mine: Tensor, operand: Tensor) -> Tensor:
    # What all members share need not be lent. But in a recording it may be that no member takes the
    # branch, and then the gradient that comes back from it must not count.
    if _torch.batched(operand) or _torch.abstract():
        return _Borrow.apply(mine, operand)
    return operand


class _Borrow(torch.autograd.Function):
    """The identity for members whose ``mine`` is true; vmap does the work."""

    @staticmethod
    def forward(mine: Tensor, operand: Tensor) -> Tensor:
        return operand.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])
        if not differentiable(output):
            ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[None, Tensor]:
        (mine,) = ctx.saved_tensors
        return None, cotangent.masked_fill(~mine, 0)

    @staticmethod
    def jvp(ctx: Any, _: Any, tangent: Tensor) -> Tensor:
        (mine,) = ctx.saved_tensors
        return tangent.masked_fill(~mine, 0)

    @staticmethod
    def vmap(info: Any, in_dims: Any, mine: Tensor, operand: Tensor) -> tuple[Tensor, int | None]:
        if in_dims[1] is not None:
            operand = operand.movedim(in_dims[1], 0)
        if in_dims[0] is None:
            return _Borrow.apply(mine, operand), None if in_dims[1] is None else 0
        mine = mine.movedim(in_dims[0], 0)
        if in_dims[1] is None:
            return _Borrow.apply(mine.any(0), operand), None
        lender = mine.to(torch.int8).argmax(0, keepdim=True)
        lent = choose(mine, operand, operand.index_select(0, lender))
        # Where no member of this group takes the branch, borrow from another group.
        return _Borrow.apply(mine.any(0), lent), 0

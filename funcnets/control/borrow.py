"""Operands that are safe for the members of a vmap that must run a branch they do not take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from funcnets import _torch


def borrow(mine: Tensor, operand: Any) -> Any:
    """An operand with, for members where ``mine`` is false, the value of a member where it is true.

    Under vmap with a predicate per member every member runs every branch. Evaluated where it was
    never meant to be, a branch may be infinite, index out of range, or have a gradient that is not
    a number, and zero times that is not zero. So a member that does not take the branch runs it on
    the operand of one that does, and throws the result away.
    """
    if not isinstance(operand, Tensor) or not _torch.batched(operand):
        return operand
    return _Borrow.apply(mine, operand)


class _Borrow(torch.autograd.Function):
    """The identity for members whose ``mine`` is true; vmap does the work."""

    @staticmethod
    def forward(mine: Tensor, operand: Tensor) -> Tensor:
        return operand.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])
        if not output.is_floating_point():
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
        own = mine.reshape(-1, *[1] * (operand.ndim - 1))
        lent = torch.where(own, operand, operand.index_select(0, lender))
        # Where no member of this group takes the branch, borrow from another group.
        return _Borrow.apply(mine.any(0), lent), 0

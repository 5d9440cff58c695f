"""Batch normalization of all members of an ensemble at once.

Under vmap torch normalises without weight and bias, multiplies and adds in passes of their own, and
normalises again for their gradients. Here members are so many more channels to the kernel that
serves a single network, and so are they in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from funcnets import _torch

# From how many numbers on a derivative gains more than an autograd Function takes, a millisecond.
_MANY_NUMBERS = 2**20


def serves_inference(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether `at_inference` may be used: for members on a CPU, where no derivative is taken.

    Images that are the same for all are not of members: what is computed of them once stays so.
    """
    return _fit(x, weight, bias) and _torch.at_most_one_vmap() and _torch.batched(x)


def serves_training(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether `in_training` may be used and gains: for members on a CPU, under one derivative."""
    return (
        _fit(x, weight, bias)
        and not _torch.abstract()
        and _torch.first_order()
        and _torch.batched(x)
        and _torch.physical(x).numel() >= _MANY_NUMBERS
    )


def at_inference(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    """`torch.nn.functional.batch_norm` by given statistics."""

    def of_members(members: int, given: list[Tensor]) -> list[Tensor]:
        x, *channels = given
        weight, bias, mean, var = (each.flatten() for each in channels)
        outputs = torch.batch_norm(
            x.movedim(0, 1).flatten(1, 2), weight, bias, mean, var, False, 0.0, eps, False
        )
        return [outputs.unflatten(1, (members, -1)).movedim(1, 0)]

    return _torch.of_all_members(of_members, [x, weight, bias, mean, var])[0]


def in_training(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, means and inverse deviations of the batch, as of `normalize`."""
    found: tuple[Tensor, Tensor, Tensor] = _Normalize.apply(x, weight, bias, eps)
    return found


def normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, means and inverse deviations of the batch, in one pass over it."""
    # What F.batch_norm itself calls; it keeps the statistics to itself. Checked with torch 2.11
    # and 2.15.
    found: tuple[Tensor, Tensor, Tensor] = torch._native_batch_norm_legit(
        x, weight, bias, True, 0.0, eps
    )
    return found


def _fit(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    return (
        not torch.compiler.is_dynamo_compiling()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == bias.dtype
        and x.dtype in (torch.float32, torch.float64)
    )


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(*operands: Any) -> tuple[Tensor, Tensor, Tensor]:
        return normalize(*operands)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, _, ctx.eps = inputs
        _, mean, inverse_std = output
        ctx.save_for_backward(x, weight, mean, inverse_std)
        ctx.mark_non_differentiable(mean, inverse_std)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return *_Gradients.apply(cotangents[0], *ctx.saved_tensors, ctx.eps), None

    @staticmethod
    def vmap(info: Any, axes: Any, *operands: Any) -> Any:
        return _of_channels(_Normalize, info.batch_size, axes, operands, images=1)


class _Gradients(torch.autograd.Function):
    """Those of x, weight and bias."""

    @staticmethod
    def forward(
        cotangent: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse_std: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_batch_norm_backward(
            cotangent, x, weight, None, None, mean, inverse_std, True, eps, [True, True, True]
        )
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        cotangent, x, weight, *_, ctx.eps = inputs
        ctx.save_for_backward(cotangent, x, weight)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        def gradients(cotangent: Tensor, x: Tensor, weight: Tensor) -> Any:
            bias = torch.zeros_like(weight)  # it matters to no gradient

            def outputs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
                return normalize(x, weight, bias, ctx.eps)[0]

            return torch.func.vjp(outputs, x, weight, bias)[1](cotangent)

        return *torch.func.vjp(gradients, *ctx.saved_tensors)[1](cotangents), None, None, None

    @staticmethod
    def vmap(info: Any, axes: Any, *operands: Any) -> Any:
        return _of_channels(_Gradients, info.batch_size, axes, operands, images=2)


def _of_channels(function: Any, members: int, axes: Any, operands: Any, images: int) -> Any:
    """The function of members as further channels, and the axes where those of its results lie.

    Args:
        images: how many of the operands, the first, are [batch, channels, ...]; the others have
            [channels], and the last is a number.
    """

    def joined(tensor: Tensor, axis: int | None, at: int) -> Tensor:
        if axis is None:
            tensor, axis = tensor.expand(members, *tensor.shape), 0
        return tensor.movedim(axis, at).flatten(at, at + 1)

    places = [1] * images + [0] * (len(operands) - images - 1)
    triples = zip(operands, axes, places, strict=False)
    found = function.apply(*(joined(*triple) for triple in triples), operands[-1])
    places = [1, 0, 0]
    apart = (each.unflatten(at, (members, -1)) for each, at in zip(found, places, strict=True))
    return tuple(apart), tuple(places)

"""Operations that take functions, with derivatives and vmap rules: what compiled control flow is.

While a compiled function is recorded, a conditional or a loop must become one node of the graph,
and torch's own nodes have no rules for torch.func. A `Node` has: it is applied through an
autograd.Function, so the transforms under way are taken off one by one, each by the rule of the
node (the vmap of a conditional is the conditional of the vmapped branches; its derivative is
another conditional), and what is left at the bottom is recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

Tensors = tuple[Tensor, ...]


def differentiable(tensor: Tensor) -> bool:
    """Whether a tensor of this dtype can have a derivative."""
    return tensor.is_floating_point() or tensor.is_complex()


class Node:
    """An operation on tensors, known by functions from tensors to tensors that it may call.

    Args:
        run: carries the operation out on plain tensors: ``run(functions, fixed, tensors)``.
        functions: each takes all of ``tensors`` and returns a tuple of tensors.
        fixed: how many of the first tensors (a predicate) the operation reads itself; they are
            passed on unchanged to every derived node, and are not given to the functions.
    """

    def __init__(
        self,
        run: Callable[[tuple[Callable[..., Tensors], ...], Tensors, Tensors], Tensors],
        functions: tuple[Callable[..., Tensors], ...],
        fixed: int,
    ) -> None:
        self.run, self.functions, self.fixed = run, functions, fixed

    def __call__(self, *tensors: Tensor) -> Tensors:
        """The outputs, through whatever transforms are under way."""
        return _Apply.apply(self, *tensors)

    def derive(self, rule: Callable[[Callable[..., Tensors]], Callable[..., Tensors]]) -> Node:
        """The node whose functions are made from those of this one."""
        return Node(self.run, tuple(rule(f) for f in self.functions), self.fixed)


class _Apply(torch.autograd.Function):
    """Gives a Node the rules that torch.func asks for."""

    @staticmethod
    def forward(node: Node, *tensors: Tensor) -> Tensors:
        return node.run(node.functions, tensors[: node.fixed], tensors[node.fixed :])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensors) -> None:
        ctx.node, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.count = len(output)
        ctx.given = [i for i, o in enumerate(output) if differentiable(o)]
        ctx.mark_non_differentiable(*(o for o in output if not differentiable(o)))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        node, tensors = ctx.node, ctx.saved_tensors
        operands = tensors[node.fixed :]
        wanted = [
            i
            for i, operand in enumerate(operands)
            if differentiable(operand) and ctx.needs_input_grad[1 + node.fixed + i]
        ]
        given = ctx.given
        count = len(operands)

        def rule(f: Callable[..., Tensors]) -> Callable[..., Tensors]:
            def gradients(*both: Tensor) -> Tensors:
                primals = list(both[:count])

                def partially(*varied: Tensor) -> Tensors:
                    for i, value in zip(wanted, varied, strict=True):
                        primals[i] = value
                    outputs = f(*primals)
                    return tuple(outputs[i] for i in given)

                pull = vjp(partially, *(both[i] for i in wanted))[1]
                return pull(both[count:])

            return gradients

        # That of a sum is one number in many places, which forward mode would write its tangent to.
        passed = (cotangents[i].contiguous() for i in given)
        found = iter(node.derive(rule)(*tensors, *passed) if wanted else ())
        gradients = [next(found) if i in wanted else None for i in range(count)]
        return (None, *(None for _ in range(node.fixed)), *gradients)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        node, tensors = ctx.node, ctx.saved_tensors
        if not ctx.given:
            return tuple(None for _ in range(ctx.count))
        moved = [i for i, t in enumerate(tangents[1 + node.fixed :]) if t is not None]
        count = len(tensors) - node.fixed

        def rule(f: Callable[..., Tensors]) -> Callable[..., Tensors]:
            def push(*both: Tensor) -> Tensors:
                primals = list(both[:count])

                def partially(*varied: Tensor) -> Tensors:
                    for i, value in zip(moved, varied, strict=True):
                        primals[i] = value
                    outputs = f(*primals)
                    return tuple(outputs[i] for i in ctx.given)

                found: Any = jvp(partially, tuple(both[i] for i in moved), both[count:])
                # torch's (2.15) tangent of a float32 number times a Python number is float64.
                return tuple(t.to(o.dtype) for o, t in zip(*found, strict=True))

            return push

        pushed = iter(node.derive(rule)(*tensors, *(tangents[1 + node.fixed + i] for i in moved)))
        return tuple(next(pushed) if i in ctx.given else None for i in range(ctx.count))

    @staticmethod
    def vmap(info: Any, in_dims: Any, node: Node, *tensors: Tensor) -> Any:
        dims = tuple(in_dims[1 + node.fixed :])
        outputs = node.derive(lambda f: lambda *operands: vmap(f, in_dims=dims)(*operands))(
            *tensors
        )
        return outputs, tuple(0 for _ in outputs)

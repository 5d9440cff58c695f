"""A recorded scan as one node of the graph, whatever its length, with rules for torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from funcnets import _torch, tree
from funcnets.control.closure import Opaque, lift
from funcnets.control.node import Tensors, differentiable


class _Scan(NamedTuple):
    """A scan of flat tensors.

    Attributes:
        body: ``body(*carry, *slices, *constants) -> (*new carry, *outputs)``.
        carried: how many tensors are carried.
        scanned: how many tensors are taken slice by slice, along their axis 0.
        reverse: from the last slice to the first.
    """

    body: Callable[..., Tensors]
    carried: int
    scanned: int
    reverse: bool

    def __call__(self, *tensors: Tensor) -> Tensors:
        """``(*last carry, *stacked outputs, *the carry before each turn, stacked)``."""
        return _Apply.apply(self, *tensors)

    def split(self, values: Any) -> tuple[list[Any], list[Any], list[Any]]:
        """What belongs to the carry, to the slices and to the constants."""
        middle = self.carried + self.scanned
        return [*values[: self.carried]], [*values[self.carried : middle]], [*values[middle:]]


def rolled(combine_fn: Callable[..., Any], init: Any, xs: Any, turns: int, reverse: bool) -> Any:
    """`scan` along axis 0 of xs as one node; the caller checks what combine_fn returns."""
    carry, carry_structure = tree.flatten(init)
    slices, slice_structure = tree.flatten(xs)
    constants, build = lift(combine_fn)
    carried, scanned = len(carry), len(slices)
    structure: Any = None

    def body(*tensors: Tensor) -> Tensors:
        nonlocal structure
        f = build(tensors[carried + len(taken) :])
        new, y = f(
            tree.unflatten(carry_structure, list(tensors[:carried])),
            tree.unflatten(slice_structure, list(tensors[carried : carried + scanned])),
        )
        outputs, structure = tree.flatten(y)
        return (*tree.leaves(new), *outputs)

    # torch's node learns the number of turns from something that is scanned.
    taken = slices or [torch.zeros(turns, dtype=torch.bool, device=_device(carry, constants))]
    node = _Scan(Opaque(body), carried, len(taken), reverse)
    outputs = node(*carry, *taken, *constants)
    last, ys = outputs[:carried], outputs[carried : len(outputs) - carried]
    return tree.unflatten(carry_structure, list(last)), tree.unflatten(structure, list(ys))


class _Apply(torch.autograd.Function):
    """Gives a _Scan the rules that torch.func asks for."""

    @staticmethod
    def forward(scan: _Scan, *tensors: Tensor) -> Tensors:
        carry, slices, constants = scan.split(tensors)
        operands, places = _torch.distinct(constants)

        def turn(*now: Tensor) -> list[Tensor]:
            given = now[: scan.carried + scan.scanned]
            rest = now[len(given) :]
            outputs = scan.body(*given, *(rest[place] for place in places))
            # The node wants outputs of equal strides that share no memory with the operands.
            return [_fresh(output) for output in (*outputs, *now[: scan.carried])]

        if scan.reverse:
            slices = [part.flip(0) for part in slices]
        outputs = _torch.scan_node(turn, [_fresh(part) for part in carry], slices, tuple(operands))
        last, stacked = outputs[: scan.carried], outputs[scan.carried :]
        return (*last, *(part.flip(0) for part in stacked)) if scan.reverse else tuple(outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensors) -> None:
        ctx.scan, *tensors = inputs
        before = output[len(output) - ctx.scan.carried :]
        ctx.save_for_backward(*tensors, *before)
        ctx.save_for_forward(*tensors)
        ctx.count = len(output)
        # Of the new carry and the outputs, those that have a derivative.
        outputs = output[: len(output) - ctx.scan.carried]
        ctx.given = [i for i, o in enumerate(outputs) if differentiable(o)]
        ctx.mark_non_differentiable(*(o for o in output if not differentiable(o)))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        """A scan the other way: it carries the cotangents of the carry and of the constants."""
        scan: _Scan = ctx.scan
        count = len(ctx.saved_tensors) - scan.carried
        tensors, before = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        _, slices, constants = scan.split(tensors)
        moving = [i for i in range(scan.carried) if differentiable(tensors[i])]
        needed = [
            i
            for i in range(scan.carried, count)
            if differentiable(tensors[i]) and ctx.needs_input_grad[1 + i]
        ]
        of_slices = [i for i in needed if i < scan.carried + scan.scanned]
        of_constants = [i for i in needed if i >= scan.carried + scan.scanned]
        outputs = ctx.count - scan.carried
        of_outputs = [i for i in ctx.given if i >= scan.carried]

        def body(*now: Tensor) -> Tensors:
            rest = iter(now)
            along = [next(rest) for _ in moving]
            sums = [next(rest) for _ in of_constants]
            primals = [next(rest) for _ in range(scan.carried + scan.scanned)]
            here = [next(rest) for _ in of_outputs]
            passing = [next(rest) for _ in moving]
            primals += rest

            def partially(*varied: Tensor) -> Tensors:
                inputs = list(primals)
                for i, value in zip([*moving, *needed], varied, strict=True):
                    inputs[i] = value
                found = scan.body(*inputs)
                return tuple(found[i] for i in ctx.given)

            pull = vjp(partially, *(primals[i] for i in [*moving, *needed]))[1]
            found = iter(pull((*along, *here)))
            carry = [next(found) + other for other in passing]
            inputs = dict(zip(needed, found, strict=True))
            sums = [total + inputs[i] for total, i in zip(sums, of_constants, strict=True)]
            return (*carry, *sums, *(inputs[i] for i in of_slices))

        derived = _Scan(
            Opaque(body),
            len(moving) + len(of_constants),
            scan.carried + scan.scanned + len(of_outputs) + len(moving),
            not scan.reverse,
        )
        found = derived(
            *(cotangents[i] for i in moving),
            *(torch.zeros_like(tensors[i]) for i in of_constants),
            *before,
            *slices,
            *(cotangents[i] for i in of_outputs),
            *(cotangents[outputs + i] for i in moving),
            *constants,
        )
        gradients = dict(zip([*moving, *of_constants, *of_slices], found, strict=False))
        return (None, *(gradients.get(i) for i in range(count)))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """A scan of the numbers and, beside them, of the tangents of those that have any."""
        scan: _Scan = ctx.scan
        tensors = ctx.saved_tensors
        moving = [i for i in range(scan.carried) if differentiable(tensors[i])]
        moved = [i for i in range(scan.carried, len(tensors)) if tangents[1 + i] is not None]
        of_slices = [i for i in moved if i < scan.carried + scan.scanned]
        of_constants = [i for i in moved if i >= scan.carried + scan.scanned]
        carry, slices, constants = scan.split(tensors)
        first = [
            torch.zeros_like(tensors[i]) if tangents[1 + i] is None else tangents[1 + i]
            for i in moving
        ]

        def body(*now: Tensor) -> Tensors:
            rest = iter(now)
            primals = [next(rest) for _ in range(scan.carried)]
            directions = [next(rest) for _ in moving]
            primals += [next(rest) for _ in range(scan.scanned)]
            directions += [next(rest) for _ in of_slices]
            primals += [next(rest) for _ in constants]
            directions += rest
            varied = [*moving, *moved]

            def partially(*values: Tensor) -> tuple[Tensors, Tensors]:
                inputs = list(primals)
                for i, value in zip(varied, values, strict=True):
                    inputs[i] = value
                outputs = scan.body(*inputs)
                return tuple(outputs[i] for i in ctx.given), outputs

            result: Any = jvp(
                partially, tuple(primals[i] for i in varied), tuple(directions), has_aux=True
            )
            # Of the dtype of what they belong to, as in Node.
            pushed = [t.to(o.dtype) for o, t in zip(*result[:2], strict=True)]
            outputs = result[2]
            carried = len(moving)
            return (
                *outputs[: scan.carried],
                *pushed[:carried],
                *outputs[scan.carried :],
                *pushed[carried:],
            )

        derived = _Scan(
            Opaque(body),
            scan.carried + len(moving),
            scan.scanned + len(of_slices),
            scan.reverse,
        )
        found = derived(
            *carry,
            *first,
            *slices,
            *(tangents[1 + i] for i in of_slices),
            *constants,
            *(tangents[1 + i] for i in of_constants),
        )
        width = scan.carried + len(moving)
        outputs = ctx.count - scan.carried  # the new carry and the outputs
        of_outputs = [i for i in ctx.given if i >= scan.carried]
        last = iter(found[scan.carried : width])
        stacked = iter(found[width + outputs - scan.carried : len(found) - width])
        before = iter(found[len(found) - len(moving) :])
        return (
            *(next(last) if i in moving else None for i in range(scan.carried)),
            *(next(stacked) if i in of_outputs else None for i in range(scan.carried, outputs)),
            *(next(before) if i in moving else None for i in range(scan.carried)),
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, scan: _Scan, *tensors: Tensor) -> Any:
        carry, slices, constants = scan.split(tensors)
        carry_dims, slice_dims, constant_dims = scan.split(in_dims[1:])
        # The carry may become one per member, so it begins as that.
        carry = [
            part.expand(info.batch_size, *part.shape) if dim is None else part.movedim(dim, 0)
            for part, dim in zip(carry, carry_dims, strict=True)
        ]
        slices = [
            part if dim is None else part.movedim(dim, 1)
            for part, dim in zip(slices, slice_dims, strict=True)
        ]
        inner = (
            *(0 for _ in carry),
            *(None if dim is None else 0 for dim in slice_dims),
            *constant_dims,
        )
        batched = scan._replace(body=lambda *now: vmap(scan.body, in_dims=inner)(*now))
        outputs = batched(*carry, *slices, *constants)
        return outputs, tuple(0 if i < scan.carried else 1 for i in range(len(outputs)))


def _fresh(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _device(*groups: list[Tensor]) -> torch.device:
    return next((tensor.device for group in groups for tensor in group), torch.device("cpu"))

"""Loops: `scan` over a sequence with a carry, `while_loop` as long as a predicate holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vmap

from funcnets import _torch, tree
from funcnets.control.borrow import borrow
from funcnets.control.closure import Opaque, lift
from funcnets.control.cond import cond
from funcnets.control.node import Tensors
from funcnets.control.outputs import check_agreement, check_tensors, describe


def scan(
    combine_fn: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    xs: Any = None,
    *,
    dim: int = 0,
    reverse: bool = False,
    length: int | None = None,
) -> tuple[Any, Any]:
    """Runs ``carry, y = combine_fn(carry, x)`` along ``dim`` of xs.

    The signature of torch's scan (and, but for ``dim``, of ``jax.lax.scan``), for any trees.
    Compiled, the turns are laid out one after the other: fast to run, slow to compile for long
    sequences.

    Args:
        combine_fn: takes the carry and a slice of xs without ``dim``; returns the new carry, equal
            to the old one in structure, shapes and dtypes, and an output (or None).
        init: the first carry.
        xs: a tree of tensors of one length along ``dim``, or None if ``length`` is given.
        reverse: from the last slice to the first; outputs stay at the place of their slice.
        length: the number of turns where there is no xs.

    Returns:
        The last carry, and the outputs stacked along ``dim``.

    Raises:
        ValueError: lengths disagree, nothing gives the length, or the carry changes its structure,
            a shape or a dtype.

    >>> scan(lambda total, x: (total + x, total + x), torch.tensor(0), torch.tensor([1, 2, 3]))
    (tensor(6), tensor([1, 3, 6]))
    """
    slices, turns = _slices(xs, dim, length)
    carry, ys = init, []
    kind = describe(init)
    check_tensors("scan", "init", init)
    for turn in reversed(range(turns)) if reverse else range(turns):
        returned = combine_fn(carry, slices(turn))
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise TypeError(
                f"scan: combine_fn: expected (carry, output), got {tree.describe(returned)}"
            )
        carry, y = returned
        _check_carry("scan", "combine_fn", kind, carry)
        ys.append(y)
    if not ys:
        raise ValueError("scan: expected at least one turn, got a sequence of length 0")
    if reverse:
        ys.reverse()
    return carry, tree.map(lambda *parts: torch.stack(parts, dim), *ys)


def _slices(xs: Any, dim: int, length: int | None) -> tuple[Callable[[int], Any], int]:
    leaves, structure = tree.flatten(xs)
    lengths = {} if length is None else {"length": length}
    for path, leaf in tree.leaves_with_path(xs):
        if not isinstance(leaf, Tensor) or not -leaf.ndim <= dim < leaf.ndim:
            raise ValueError(
                f"scan: xs: {tree.join(path)}: expected a tensor with a dimension {dim}, "
                f"got {tree.describe(leaf)}"
            )
        lengths[tree.join(path)] = leaf.shape[dim]
    if not lengths:
        raise ValueError("scan: expected xs or a length, got neither")
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{path} {n}" for path, n in lengths.items())
        raise ValueError(f"scan: xs: expected equal lengths along dimension {dim}, got {found}")
    parts = [leaf.unbind(dim) for leaf in leaves]
    return (
        lambda turn: tree.unflatten(structure, [part[turn] for part in parts]),
        next(iter(lengths.values())),
    )


def while_loop(
    cond_fn: Callable[..., Any],
    body_fn: Callable[..., Any],
    carried_inputs: Sequence[Any],
    *,
    max_steps: int | None = None,
) -> Any:
    """Runs ``carried = body_fn(*carried)`` as long as ``cond_fn(*carried)`` is true.

    The signature of torch's while_loop, for any trees. Under vmap each member stops when its own
    predicate says so and keeps its carry from then on.

    In eager every transform works. Compiled, the number of turns is not known, and a reverse-mode
    derivative (grad, vjp, hessian) would have to keep the carry of every turn: it raises a
    RuntimeError that says so. Give ``max_steps``, and the turns are laid out as that many
    conditionals, which every transform can take.

    Args:
        cond_fn: takes the carry, returns a bool tensor of one element.
        body_fn: takes the carry, returns the new carry, equal in structure, shapes and dtypes.
        carried_inputs: a sequence of trees of tensors.
        max_steps: stop after this many turns, whatever the predicate says.

    Returns:
        The last carry, a tuple.

    >>> while_loop(lambda n: n < 100, lambda n: (n * 2,), (torch.tensor(3),))
    (tensor(192),)
    """
    carried = tuple(carried_inputs)
    check_tensors("while_loop", "carried_inputs", carried)
    kind = describe(carried)

    def predicate(*carried: Any) -> Tensor:
        pred = cond_fn(*carried)
        pred = torch.as_tensor(pred) if isinstance(pred, bool) else pred
        if not isinstance(pred, Tensor) or pred.dtype != torch.bool or pred.numel() != 1:
            raise TypeError(
                f"while_loop: cond_fn: expected a bool tensor of one element, "
                f"got {tree.describe(pred)}"
            )
        return pred.reshape(())

    def body(*carried: Any) -> Any:
        new = body_fn(*carried)
        new = tuple(new) if isinstance(new, (tuple, list)) else (new,)
        _check_carry("while_loop", "body_fn", kind, new)
        return kind.ordered(new)

    if _torch.abstract() and max_steps is None:
        return _record(predicate, body, carried)
    turns = 0
    while max_steps is None or turns < max_steps:
        pred = predicate(*carried)
        if _torch.abstract():
            carried = cond(pred, body, lambda *same: tree.map(torch.clone, same), carried)
        elif not _torch.physical(pred).any():
            break
        elif _torch.batched(pred):
            new = body(*tree.map(lambda leaf, pred=pred: borrow(pred, leaf), carried))
            carried = tree.map(lambda a, b, pred=pred: torch.where(pred, a, b), new, carried)
        else:
            carried = body(*carried)
        turns += 1
    return carried


def _check_carry(name: str, label: str, kind: Any, carry: Any) -> None:
    check_tensors(name, label, carry)
    check_agreement(name, ("the carry so far", kind), (label, describe(carry)))


def _record(predicate: Any, body: Any, carried: tuple[Any, ...]) -> Any:
    """The loop as one node of the graph that is being recorded."""
    leaves, structure = tree.flatten(carried)
    lifted = [lift(predicate), lift(body)]
    captured = [*lifted[0][0], *lifted[1][0]]
    count, split = len(leaves), len(leaves) + len(lifted[0][0])

    def flat_predicate(*tensors: Tensor) -> Tensor:
        f = lifted[0][1](tensors[count:split])
        return f(*tree.unflatten(structure, list(tensors[:count])))

    def flat_body(*tensors: Tensor) -> Tensors:
        f = lifted[1][1](tensors[split:])
        return tuple(tree.leaves(f(*tree.unflatten(structure, list(tensors[:count])))))

    outputs = _While.apply(Opaque(flat_predicate), Opaque(flat_body), count, *leaves, *captured)
    return tree.unflatten(structure, list(outputs))


class _While(torch.autograd.Function):
    """A recorded while loop, with the rules that torch.func asks for."""

    @staticmethod
    def forward(predicate: Any, body: Any, count: int, *tensors: Tensor) -> Any:
        carried = [t.clone(memory_format=torch.contiguous_format) for t in tensors[:count]]
        constants, places = _torch.distinct(tensors[count:])

        def given(now: Tensors) -> list[Tensor]:
            return [*now[:count], *(now[count + place] for place in places)]

        def turn(*now: Tensor) -> Tensors:
            new = body(*given(now))
            return tuple(t.clone(memory_format=torch.contiguous_format) for t in new)

        return tuple(
            _torch.while_node(
                lambda *now: predicate(*given(now)).clone(), turn, tuple(carried), tuple(constants)
            )
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.predicate, ctx.body, ctx.count, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.mark_non_differentiable(*(o for o in output if not o.is_floating_point()))

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        raise RuntimeError(
            "while_loop: a compiled loop whose number of turns is unknown has no reverse-mode "
            "derivative; give max_steps, use scan, or run it eager"
        )

    @staticmethod
    def jvp(ctx: Any, _predicate: Any, _body: Any, _count: Any, *tangents: Any) -> Any:
        tensors, count = ctx.saved_tensors, ctx.count
        # Carried: the numbers, and a tangent for each that has one. Constant: the same of the rest.
        moving = [i for i in range(count) if tensors[i].is_floating_point()]
        moved = [i for i in range(count, len(tensors)) if tangents[i] is not None]
        first = [
            torch.zeros_like(tensors[i]) if tangents[i] is None else tangents[i] for i in moving
        ]
        width = count + len(moving)

        def numbers(now: Tensors) -> list[Tensor]:
            return [*now[:count], *now[width : width + len(tensors) - count]]

        def body(*now: Tensor) -> Tensors:
            primals = numbers(now)
            varied = [*moving, *moved]
            directions = [*now[count:width], *now[width + len(tensors) - count :]]

            def partially(*values: Tensor) -> tuple[Tensors, Tensors]:
                inputs = list(primals)
                for i, value in zip(varied, values, strict=True):
                    inputs[i] = value
                outputs = ctx.body(*inputs)
                return tuple(outputs[i] for i in moving), outputs

            along = tuple(primals[i] for i in varied)
            result: Any = jvp(partially, along, tuple(directions), has_aux=True)
            return (*result[2], *result[1])

        outputs = _While.apply(
            Opaque(lambda *now: ctx.predicate(*numbers(now))),
            Opaque(body),
            width,
            *tensors[:count],
            *first,
            *tensors[count:],
            *(tangents[i] for i in moved),
        )
        pushed = iter(outputs[count:])
        return tuple(next(pushed) if i in moving else None for i in range(count))

    @staticmethod
    def vmap(info: Any, in_dims: Any, predicate: Any, body: Any, count: int, *tensors: Any) -> Any:
        dims = in_dims[3:]
        carried = [
            t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
            for t, d in zip(tensors[:count], dims[:count], strict=True)
        ]
        inner = (*[0] * count, *dims[count:])

        def turn(*now: Tensor) -> Tensors:
            return cond(
                predicate(*now),
                lambda *now: body(*now),
                lambda *now: tuple(t.clone() for t in now[:count]),
                now,
            )

        outputs = _While.apply(
            lambda *now: vmap(predicate, in_dims=inner)(*now).any(),
            lambda *now: vmap(turn, in_dims=inner)(*now),
            count,
            *carried,
            *tensors[count:],
        )
        return outputs, tuple(0 for _ in outputs)

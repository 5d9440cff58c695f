"""Loops: `scan` over a sequence with a carry, `while_loop` as long as a predicate holds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vmap

from funcnets import _torch, tree
from funcnets.control.borrow import borrow, choose
from funcnets.control.closure import Opaque, lift
from funcnets.control.cond import cond, sequence
from funcnets.control.node import Tensors, differentiable
from funcnets.control.outputs import check_agreement, check_tensors, describe
from funcnets.control.rolled import rolled

_NO_REVERSE = (
    "while_loop: a compiled loop whose number of turns is unknown has no reverse-mode derivative; "
    "give max_steps, use scan, or run it eager"
)


def scan(
    combine_fn: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    xs: Any = None,
    *,
    dim: int = 0,
    reverse: bool = False,
    length: int | None = None,
    unroll: bool = True,
) -> tuple[Any, Any]:
    """Runs ``carry, y = combine_fn(carry, x)`` along ``dim`` of xs.

    The signature of torch's scan (and, but for ``dim``, of ``jax.lax.scan``), for any trees.
    Compiled, the turns are laid out one after the other: fast to run, slow to compile for long
    sequences. With ``unroll=False``, `funcnets.compile` records one turn, so that the time to
    compile does not depend on the length; derivatives then compute each turn again from its carry,
    as `remat` would. Plain torch.compile always lays the turns out. Before torch 2.15 such a scan
    over turns with a `cond` in them has no backward() from outside the compiled function (a
    RuntimeError says so); ``torch.func.grad`` inside it is right.

    Args:
        combine_fn: takes the carry and a slice of xs without ``dim``; returns the new carry, equal
            to the old one in structure, shapes and dtypes, and an output (or None).
        init: the first carry.
        xs: a tree of tensors of one length along ``dim``, or None if ``length`` is given.
        dim: the dimension of xs that is scanned over.
        reverse: from the last slice to the first; outputs stay at the place of their slice.
        length: the number of turns where there is no xs.
        unroll: whether a compiled scan is laid out turn by turn.

    Returns:
        The last carry, and the outputs stacked along ``dim`` (an output with fewer dimensions than
        that: along its first). Where the length is 0, ``init`` and outputs of length 0, whose
        shapes come from a call of combine_fn on zeros.

    Raises:
        TypeError: combine_fn does not return a pair of trees of tensors.
        ValueError: lengths disagree, nothing gives the length, or the carry or the output changes
            its structure, a shape or a dtype from turn to turn.

    >>> scan(lambda total, x: (total + x, total + x), torch.tensor(0), torch.tensor([1, 2, 3]))
    (tensor(6), tensor([1, 3, 6]))
    """
    slices, turns = _slices(xs, dim, length)
    check_tensors("scan", "init", init)
    kind = describe(init)

    def step(carry: Any, x: Any) -> tuple[Any, Any]:
        returned = combine_fn(carry, x)
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise TypeError(
                f"scan: combine_fn: expected (carry, output), got {tree.describe(returned)}"
            )
        _check_carry("scan", "combine_fn", kind, returned[0])
        check_tensors("scan", "combine_fn: output", returned[1])
        return kind.ordered(returned[0]), returned[1]

    if not (unroll or turns < 2 or torch.compiler.is_dynamo_compiling()) and _torch.tracing():
        carry, stacked = rolled(step, init, _first(xs, dim), turns, reverse)
        return carry, tree.map(lambda part: part.movedim(0, _along(part[0], dim)), stacked)
    carry, ys = init, []
    # No turns are one turn on zeros, for the shapes of its output, of which nothing is kept.
    for turn in reversed(range(turns or 1)) if reverse else range(turns or 1):
        carry, y = step(carry, slices(turn))
        ys.append(y)
        check_agreement("scan", ("the first turn", describe(ys[0])), ("a later one", describe(y)))
    if reverse:
        ys.reverse()

    def stack(*parts: Tensor) -> Tensor:
        along = _along(parts[0], dim)
        return torch.stack(parts, along).narrow(along, 0, turns)

    return carry if turns else init, tree.map(stack, *ys)


def _along(y: Tensor, dim: int) -> int:
    """Where outputs are stacked: as in torch's scan, along the first where dim is too large."""
    return dim if -y.ndim - 1 <= dim <= y.ndim else 0


def _first(xs: Any, dim: int) -> Any:
    return tree.map(lambda leaf: leaf.movedim(dim, 0), xs)


def _slices(xs: Any, dim: int, length: int | None) -> tuple[Callable[[int], Any], int]:
    """The slice of each turn, and how many turns there are."""
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
    turns = next(iter(lengths.values()))
    if not isinstance(turns, (int, torch.SymInt)):
        raise ValueError(f"scan: length: expected an int, got {turns!r}")
    if turns < 0:
        raise ValueError(f"scan: length: expected at least 0, got {turns}")
    parts = [leaf.unbind(dim) if turns else (leaf.sum(dim, dtype=leaf.dtype),) for leaf in leaves]
    return lambda turn: tree.unflatten(structure, [part[turn] for part in parts]), turns


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
    conditionals, which every transform can take. All this holds for `funcnets.compile`; plain
    torch.compile takes both kinds of loop forward, and those of ``max_steps`` backward if no
    integer is carried.

    Args:
        cond_fn: takes the carry, returns a bool tensor of one element.
        body_fn: takes the carry, returns the new carry, equal in structure, shapes and dtypes.
        carried_inputs: a sequence of trees of tensors.
        max_steps: stop after this many turns, whatever the predicate says.

    Returns:
        The last carry, a tuple.

    Raises:
        TypeError: cond_fn does not return a bool, or something carried is no tensor.
        ValueError: the carry changes its structure, a shape or a dtype, or ``max_steps`` is no int
            of at least 0.

    >>> while_loop(lambda n: n < 100, lambda n: (n * 2,), (torch.tensor(3),))
    (tensor(192),)
    """
    if max_steps is not None and (not isinstance(max_steps, int) or max_steps < 0):
        raise ValueError(f"while_loop: max_steps: expected an int of at least 0, got {max_steps!r}")
    carried = sequence("while_loop", "carried_inputs", carried_inputs)
    check_tensors("while_loop", "carried_inputs", carried)
    kind, sequences = describe(carried), (tuple, list, type(carried_inputs))

    def predicate(*carried: Any) -> Tensor:
        pred = cond_fn(*carried)
        pred = torch.tensor(pred) if isinstance(pred, bool) else pred
        if not isinstance(pred, Tensor) or pred.dtype != torch.bool or pred.numel() != 1:
            raise TypeError(
                f"while_loop: cond_fn: expected a bool tensor of one element, "
                f"got {tree.describe(pred)}"
            )
        return pred.reshape(())

    def body(*carried: Any) -> Any:
        new = body_fn(*carried)
        new = tuple(new) if type(new) in sequences else (new,)
        _check_carry("while_loop", "body_fn", kind, new)
        return kind.ordered(new)

    recording = torch.compiler.is_dynamo_compiling() or _torch.abstract()
    if recording and max_steps is None:
        return _record(predicate, body, carried)
    turns = 0
    while max_steps is None or turns < max_steps:
        pred = predicate(*carried)
        if recording:
            carried = cond(pred, body, lambda *same: same, carried)
        elif _torch.physical(pred).all():
            carried = body(*carried)
        elif _torch.physical(pred).any():
            new = borrow(pred, body, carried)
            carried = tree.map(functools.partial(choose, pred), new, carried)
        else:
            break
        turns += 1
    return carried


def _check_carry(name: str, label: str, kind: Any, carry: Any) -> None:
    check_tensors(name, label, carry)
    check_agreement(name, ("the carry so far", kind), (label, describe(carry)))


def _record(predicate: Any, body: Any, carried: tuple[Any, ...]) -> Any:
    """The loop as one node of the graph that is being recorded."""
    leaves, structure = tree.flatten(carried)
    if torch.compiler.is_dynamo_compiling():
        return _through_dynamo(predicate, body, leaves, structure)
    if not _torch.tracing():  # only the shapes are asked for
        predicate(*carried)
        return body(*carried)
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


def _through_dynamo(predicate: Any, body: Any, leaves: list[Tensor], structure: Any) -> Any:
    """torch's own loop: it carries tensors alone, and returns none of them as it is."""

    def flat_body(*tensors: Tensor) -> Tensors:
        new = body(*tree.unflatten(structure, list(tensors)))
        return tuple(leaf.clone() for leaf in tree.leaves(new))

    outputs = _torch.while_node(
        lambda *tensors: predicate(*tree.unflatten(structure, list(tensors))),
        flat_body,
        tuple(leaves),
        (),
    )
    if any(output.requires_grad for output in outputs):
        raise RuntimeError(_NO_REVERSE)  # torch's own (2.15) is wrong for a loop of no turns
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
        ctx.mark_non_differentiable(*(o for o in output if not differentiable(o)))

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        raise RuntimeError(_NO_REVERSE)

    @staticmethod
    def jvp(ctx: Any, _predicate: Any, _body: Any, _count: Any, *tangents: Any) -> Any:
        tensors, count = ctx.saved_tensors, ctx.count
        # Carried: the numbers, and a tangent for each that has one. Constant: the same of the rest.
        moving = [i for i in range(count) if differentiable(tensors[i])]
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
            # Of the dtype of what they belong to, as in Node.
            return (*result[2], *(t.to(o.dtype) for o, t in zip(*result[:2], strict=True)))

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

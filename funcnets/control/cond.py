"""Conditional execution: `cond` of two branches, `switch` of any number."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from funcnets import _torch, tree
from funcnets.control.borrow import borrow, choose
from funcnets.control.closure import lift
from funcnets.control.node import Node, Tensors, differentiable
from funcnets.control.outputs import (
    Described,
    check_agreement,
    check_tensors,
    check_untaken,
    describe,
)


def cond(
    pred: bool | Bool[Tensor, ""] | Bool[Tensor, 1],
    true_fn: Callable[..., Any],
    false_fn: Callable[..., Any],
    operands: Sequence[Any] = (),
) -> Any:
    """``true_fn(*operands)`` where pred is true, ``false_fn(*operands)`` where it is false.

    The signature of `torch.cond`, for any tree of operands and outputs, differentiable by every
    transform of torch.func, eager and in `funcnets.compile`. Only the branch taken runs: in eager
    as a Python ``if``, compiled as a conditional in the graph. Where the predicate differs from
    member to member of a vmap, both branches run and each member keeps its own; a member never
    sees the other branch evaluated at its own operands, so what is infinite or undefined there
    cannot reach its result or its gradient (`route` pays only for the branches taken).

    Where plain torch.compile reads it, this is `torch.cond` over trees: it can be differentiated
    with backward() but not with torch.func.grad, outputs are dicts, lists and tuples with names in
    one order, and gradients fail that are expanded views (that of a sum) or nested.

    Args:
        pred: a bool, or a bool tensor of one element. With a bool of Python this is an ``if``: of
            the outputs nothing is asked.
        true_fn, false_fn: pure functions of the operands, with outputs of equal structure, shapes
            and dtypes. They may close over tensors; those are differentiated, too, unless they are
            reached through a global or an attribute.
        operands: a sequence of trees.

    Raises:
        TypeError: pred is no bool, operands are no sequence, or an output is no tensor.
        ValueError: pred has several elements, or the branches' outputs disagree: both are shown.
            The branch that does not run is compared by its shapes, so its Python code is called
            once, on tensors without numbers; one that reads a number is not compared.

    >>> x = torch.tensor([1.0, -2.0])
    >>> cond(x.sum() > 0, torch.sin, torch.neg, (x,))
    tensor([-1.,  2.])
    >>> torch.func.vmap(lambda x: cond(x > 0, torch.log, torch.neg, (x,)))(x)
    tensor([0., 2.])
    """
    operands = sequence("cond", "operands", operands)
    labels = ("true_fn", "false_fn")
    return _cond("cond", _scalar("cond", pred), (true_fn, false_fn), labels, operands)


def switch(
    index: int | Int[Tensor, ""] | Int[Tensor, 1],
    branches: Sequence[Callable[..., Any]],
    operands: Sequence[Any] = (),
) -> Any:
    """``branches[index](*operands)``; `cond` for any number of branches.

    Args:
        index: an integer tensor of one element, or an int, with which nothing is asked of the
            outputs. As in ``jax.lax.switch`` it is clamped to the branches there are.
        branches, operands: as in `cond`.

    >>> switch(torch.tensor(1), [torch.sin, torch.neg, torch.exp], (torch.tensor(3.0),))
    tensor(-3.)
    """
    operands, branches = sequence("switch", "operands", operands), list(branches)
    if not branches:
        raise ValueError("switch: expected at least one branch, got none")
    if isinstance(index, Tensor):
        integer = not differentiable(index) and index.dtype != torch.bool
    else:
        integer = isinstance(index, int) and not isinstance(index, bool)
    if not integer:
        raise TypeError(f"switch: index: expected an integer, got {tree.describe(index)}")
    index = _one("switch", "index", index)
    if isinstance(index, int):
        return branches[min(max(index, 0), len(branches) - 1)](*operands)
    if len(branches) == 1:
        return branches[0](*operands)
    return _switch(index, branches, 0, operands)


def _switch(index: Tensor, branches: list[Any], start: int, operands: tuple[Any, ...]) -> Any:
    """Halves the branches until one is left, so that n branches are log2(n) conditionals deep."""
    half = len(branches) // 2
    groups = (branches[:half], start), (branches[half:], start + half)
    labels = tuple(
        f"branch {first}" if len(side) == 1 else f"branches {first} to {first + len(side) - 1}"
        for side, first in groups
    )
    sides = tuple(_side(side, first) for side, first in groups)
    return _cond("switch", index < start + half, sides, labels, (index, *operands))


def _side(branches: list[Any], start: int) -> Callable[..., Any]:
    if len(branches) == 1:
        return lambda _, *operands: branches[0](*operands)
    return lambda index, *operands: _switch(index, branches, start, operands)


def _cond(name: str, pred: Any, branches: Any, labels: Any, operands: tuple[Any, ...]) -> Any:
    if not isinstance(pred, Tensor):
        return branches[0 if pred else 1](*operands)
    if torch.compiler.is_dynamo_compiling():
        return _through_dynamo(pred, branches, operands)
    if _torch.batched(pred):
        return _both(name, pred, branches, labels, operands)
    if _torch.tracing():
        return _record(name, pred, branches, labels, operands)
    if _torch.abstract():
        outputs = [f(*operands) for f in branches]
        _check(name, labels, outputs)
        return outputs[0]
    return _taken(name, bool(pred), branches, labels, operands)


def _taken(name: str, pred: bool, branches: Any, labels: Any, operands: Any) -> Any:
    taken, other = (0, 1) if pred else (1, 0)
    output = branches[taken](*operands)
    check_tensors(name, labels[taken], output)
    check_untaken(name, (labels[taken], output), (labels[other], branches[other]), operands)
    return output


def _both(name: str, pred: Tensor, branches: Any, labels: Any, operands: Any) -> Any:
    """Both branches and, member by member, the output of the one taken."""
    if not _torch.abstract():
        values = _torch.physical(pred)
        if (agreed := bool(values.all())) or not values.any():
            return _taken(name, agreed, branches, labels, operands)
    outputs = [borrow(pred, branches[0], operands), borrow(~pred, branches[1], operands)]
    _check(name, labels, outputs)
    return tree.map(functools.partial(choose, pred), *outputs)


def _check(name: str, labels: Any, outputs: Any) -> None:
    for label, output in zip(labels, outputs, strict=True):
        check_tensors(name, label, output)
    check_agreement(name, *zip(labels, map(describe, outputs), strict=True))


def _record(name: str, pred: Tensor, branches: Any, labels: Any, operands: tuple[Any, ...]) -> Any:
    """The conditional as one node of the graph that is being recorded."""
    tensors, build = lift((branches, operands))
    returned: dict[int, Described] = {}

    def flat(i: int) -> Callable[..., Tensors]:
        def branch(*tensors: Tensor) -> Tensors:
            built, given = build(tensors)
            output = built[i](*given)
            check_tensors(name, labels[i], output)
            returned[i] = describe(output)
            if len(returned) == 2:
                check_agreement(name, *((labels[j], returned[j]) for j in (0, 1)))
            return tuple(tree.leaves(returned[min(returned)].ordered(output)))

        return branch

    outputs = Node(_run, (flat(0), flat(1)), fixed=1)(pred, *tensors)
    return tree.unflatten(returned[0].structure, list(outputs))


def _through_dynamo(pred: Tensor, branches: Any, operands: tuple[Any, ...]) -> Any:
    """torch's own conditional: it takes tensors alone, and returns none of them as it is."""
    leaves, structure = tree.flatten(operands)

    def flat(f: Callable[..., Any]) -> Callable[..., Any]:
        def branch(*tensors: Tensor) -> Any:
            rest = iter(tensors)
            given = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            return tree.map(torch.clone, f(*tree.unflatten(structure, given)))

        return branch

    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
    return torch.cond(pred, flat(branches[0]), flat(branches[1]), tensors)


def _run(functions: Any, fixed: Tensors, tensors: Tensors) -> Tensors:
    operands, places = _torch.distinct(tensors)

    def apart(f: Callable[..., Tensors]) -> Callable[..., Tensors]:
        # torch's conditional wants outputs of equal strides that share no memory with the operands.
        return lambda *operands: tuple(
            output.clone(memory_format=torch.contiguous_format)
            for output in f(*(operands[place] for place in places))
        )

    return tuple(_torch.cond_node(fixed[0], *map(apart, functions), tuple(operands)))


def sequence(name: str, what: str, values: Any) -> tuple[Any, ...]:
    """Values as a tuple; one tree in place of a sequence of trees is an error."""
    if not isinstance(values, (tuple, list)):
        raise TypeError(
            f"{name}: {what}: expected a sequence of trees, such as (x,), "
            f"got {tree.describe(values)}"
        )
    return tuple(values)


def _scalar(name: str, pred: Any) -> Any:
    if isinstance(pred, bool):
        return pred
    if not isinstance(pred, Tensor) or pred.dtype != torch.bool:
        raise TypeError(
            f"{name}: pred: expected a bool or a bool tensor, got {tree.describe(pred)}"
        )
    return _one(name, "pred", pred)


def _one(name: str, what: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name}: {what}: expected one element, got {tree.describe(value)}")
        return value.reshape(())
    return value

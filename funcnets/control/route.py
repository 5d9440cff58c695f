"""Each sample of a batch down its own path."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Integer
from torch import Tensor

from funcnets import _torch, tree
from funcnets.control.borrow import borrow, choose, signed
from funcnets.control.cond import cond
from funcnets.control.node import differentiable
from funcnets.control.outputs import check_agreement, check_tensors, describe


def route(
    index: Bool[Tensor, " batch"] | Integer[Tensor, " batch"],
    branches: Sequence[Callable[..., Any]],
    params: Any,
    *inputs: Any,
) -> Any:
    """Sends each sample of a batch through one of several branches.

    Sample i of the result is sample i of ``branches[index[i]](params, *inputs)``, and each branch
    is run once, on its own samples alone: what a branch costs is paid for the samples that take
    it. Order is kept, a branch that no sample takes does not run, and gradients flow to the
    parameters and inputs through the branches taken.

    In `funcnets.compile`, too, how many samples a branch has is counted when it runs. Where one of
    them cannot be compiled for a batch of any size, as one that makes a Python number of it or
    holds another route, all branches of all routes in the function get whole batches, if some
    sample takes them, and their results are selected. So they do where the index differs between
    the members of a vmap, and under plain torch.compile (within the limits of `cond`). A sample's
    result must therefore not depend on the other samples of the batch.

    Args:
        index: integers from 0 to ``len(branches) - 1``, or booleans (False takes branch 0).
        branches: each takes ``params`` whole and the samples of ``inputs`` that are its own, with
            the batch in front, and returns a tree of tensors with that batch in front.
        params: a tree shared by all samples.
        inputs: trees of tensors ``[batch, ...]``.

    Raises:
        TypeError: the index is no vector of integers or booleans; an output is no tensor.
        ValueError: an input has another batch, the index is out of range (compiled: clamped), or
            the outputs disagree in structure, shape or dtype.

    >>> x = torch.tensor([1.0, 2.0, 3.0])
    >>> route(x > 1.5, [lambda w, x: x, lambda w, x: w * x], torch.tensor(10.0), x)
    tensor([ 1., 20., 30.])
    """
    branches = list(branches)
    _check(index, branches, inputs)
    if index.dtype == torch.bool:
        index = index.to(torch.int64)
    if torch.compiler.is_dynamo_compiling():
        return _record(index, branches, params, inputs)
    if _torch.batched(index):
        return _select(index, branches, params, inputs)
    if _torch.abstract():
        return _record(index, branches, params, inputs)
    return _gather(index, branches, params, inputs)


def _gather(index: Tensor, branches: list[Any], params: Any, inputs: tuple[Any, ...]) -> Any:
    sizes = _sizes(index, len(branches))
    taken = list(sizes)
    if len(taken) == 1:
        output = branches[taken[0]](params, *inputs)
        _check_output(taken[0], output, index.shape[0])
        return output
    order = index.argsort(stable=True)
    outputs = []
    for place, rows in zip(taken, order.split(list(sizes.values())), strict=True):
        own = tree.map(lambda x, rows=rows: x.index_select(0, rows), inputs)
        output = branches[place](params, *own)
        _check_output(place, output, len(rows))
        outputs.append(output)
    _check_agreement(taken, outputs)
    back = order.argsort()
    return tree.map(lambda *parts: torch.cat(parts).index_select(0, back), *outputs)


def _sizes(index: Tensor, count: int) -> dict[int, int]:
    """The branches taken, and by how many samples; for none the first, to tell the shapes."""
    index = _torch.physical(index).flatten()
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < count:
        raise ValueError(
            f"route: index: expected values from 0 to {count - 1}, "
            f"got values from {int(index.min())} to {int(index.max())}"
        )
    sizes = torch.bincount(index, minlength=count).tolist()
    return {place: size for place, size in enumerate(sizes) if size} or {0: 0}


def _select(index: Tensor, branches: list[Any], params: Any, inputs: tuple[Any, ...]) -> Any:
    """Every branch that some member takes on the whole batch; then sample by sample, its own."""
    if _torch.abstract():
        index, taken = index.clamp(0, len(branches) - 1), list(range(len(branches)))
    else:
        taken = list(_sizes(index, len(branches)))
    outputs = []
    for place in taken:
        mine = index == place
        own = tree.map(lambda x, mine=mine: _own(mine, x), inputs)
        # A member none of whose samples comes here has nothing to run the branch on.
        outputs.append(borrow(mine.any(), branches[place], (params, *own)))
        _check_output(place, outputs[-1], index.shape[0])
    _check_agreement(taken, outputs)
    output = outputs[0]
    for place, other in zip(taken[1:], outputs[1:], strict=True):
        output = tree.map(functools.partial(choose, index == place), other, output)
    return output


def _record(index: Tensor, branches: list[Any], params: Any, inputs: tuple[Any, ...]) -> Any:
    """A conditional for each branch: whether some sample takes it."""
    # Inside a branch of another, torch's conditional would forget how large the batch is, and
    # without one a branch would run on no samples, at which some of torch's kernels crash.
    _torch.not_ragged(index.shape[0])
    index = index.clamp(0, len(branches) - 1)
    # For its shapes only; nothing of it is used, so it is dropped from the record.
    output = branches[0](params, *inputs)
    _check_output(0, output, index.shape[0])
    output = tree.map(lambda x: torch.zeros(x.shape, dtype=x.dtype, device=x.device), output)

    for place, branch in enumerate(branches):
        mine = index == place
        run = functools.partial(_put, place, branch)
        operands = (output, mine, params, *inputs)
        output = cond(mine.any(), run, lambda before, *_: tree.map(torch.clone, before), operands)
    return output


def _put(
    place: int, branch: Callable[..., Any], before: Any, mine: Tensor, params: Any, *inputs: Any
) -> Any:
    """The results before, and for the samples that are mine those of the branch."""
    size, take, give = _rows(mine) if _torch.may_be_ragged(mine) else _lent(mine)
    own = tree.map(take, inputs)
    after = branch(params, *own)
    _check_output(place, after, size)
    _check_agreement([0, place], [before, after])
    return tree.map(give, after, before)


def _rows(mine: Tensor) -> tuple[Any, Callable[..., Tensor], Callable[..., Tensor]]:
    """How many samples are mine, how to take them out of a batch, and to put them back into one."""
    rows = mine.nonzero().squeeze(1)
    size = rows.shape[0]
    _torch.positive(size)

    @signed
    def take(_: Tensor, x: Tensor) -> Tensor:
        return x.index_select(0, rows)

    @signed
    def give(_: Tensor, own: Tensor, x: Tensor) -> Tensor:
        return x.index_put((rows,), own)

    return size, functools.partial(take, mine), functools.partial(give, mine)


def _lent(mine: Tensor) -> tuple[Any, Callable[..., Tensor], Callable[..., Tensor]]:
    """The same where a batch must remain whole."""
    return mine.shape[0], functools.partial(_own, mine), functools.partial(choose, mine)


@signed
def _own(mine: Tensor, x: Tensor) -> Tensor:
    """x with, for samples that go elsewhere, a sample that comes here (see `borrow`)."""
    if not len(x):
        return x
    lent = x.index_select(0, mine.to(torch.int8).argmax(0, keepdim=True))
    return choose(mine, x, lent)


def _check(index: Any, branches: list[Any], inputs: tuple[Any, ...]) -> None:
    if not isinstance(index, Tensor) or differentiable(index) or index.ndim != 1:
        raise TypeError(
            f"route: index: expected integers or booleans of shape [batch], "
            f"got {tree.describe(index)}"
        )
    if not branches:
        raise ValueError("route: expected at least one branch, got none")
    if index.dtype == torch.bool and len(branches) > 2:
        raise ValueError(f"route: expected 2 branches for a boolean index, got {len(branches)}")
    for path, leaf in tree.leaves_with_path(inputs):
        if not isinstance(leaf, Tensor) or not leaf.ndim or leaf.shape[0] != index.shape[0]:
            raise ValueError(
                f"route: inputs: {tree.join(path)}: expected a batch of {index.shape[0]} "
                f"(the length of the index), got {tree.describe(leaf)}"
            )


def _check_output(place: int, output: Any, batch: int | torch.SymInt) -> None:
    check_tensors("route", f"branch {place}", output)
    for path, leaf in tree.leaves_with_path(output):
        if not leaf.ndim or leaf.shape[0] != batch:
            raise ValueError(
                f"route: branch {place}: {tree.join(path)}: expected a batch of {batch}, "
                f"got {tree.describe(leaf)}"
            )


def _check_agreement(places: list[int], outputs: list[Any]) -> None:
    """Equal outputs but for the batch, which is each branch's own."""
    samples = [describe(tree.map(lambda x: x[:0], output)) for output in outputs]
    for place, sample in zip(places[1:], samples[1:], strict=True):
        check_agreement("route", (f"branch {places[0]}", samples[0]), (f"branch {place}", sample))

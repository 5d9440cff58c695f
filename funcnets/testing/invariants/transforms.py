"""vmap, vmap of gradients and compiling give what the plain calls give."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap

import funcnets
from funcnets import random, tree
from funcnets.testing.declared import Declared
from funcnets.testing.engine import Try, invariant
from funcnets.testing.subject import Subject

MEMBERS = 2


@invariant(examples=5)
def vmap_equals_the_loop(trial: Try) -> None:
    """`vmap` over parameters, over inputs and over both equals one call after the other."""
    subject, singles = trial.subject, _members(trial)
    params, inputs, _ = _stacked(singles)
    first_params, first_inputs, first_key = singles[0]
    over = {
        "parameters": (params, first_inputs, (0, None)),
        "inputs": (first_params, inputs, (None, 0)),
        "both": (params, inputs, (0, 0)),
    }
    for name, (held, seen, dims) in over.items():
        if not tree.leaves([x for x, dim in zip((held, seen), dims, strict=True) if dim == 0]):
            continue  # no parameters, or no inputs
        outputs = vmap(lambda p, x: subject.infer(p, x, first_key), dims)(held, seen)
        for i, (p, x, _) in enumerate(singles):
            p, x = (p if dims[0] == 0 else first_params), (x if dims[1] == 0 else first_inputs)
            found = tree.map(lambda y, i=i: y[i], outputs)
            trial.close(found, subject.infer(p, x, first_key), f"vmap over {name}, member {i}")


@invariant(examples=5)
def an_ensemble_trains_as_its_members(trial: Try) -> None:
    """`vmap` of the gradient and new buffers, over parameters, inputs and keys, equals the loop."""
    subject, singles = trial.subject, _members(trial)

    step = functools.partial(_train, subject)
    gradients, (outputs, buffers) = vmap(step)(*_stacked(singles))
    for i, single in enumerate(singles):
        expected, (outputs_alone, buffers_alone) = step(*single)
        found = tree.map(lambda y, i=i: y[i], (_named(gradients), outputs, buffers))
        names = ("gradient", "output", "buffers")
        wanted = _named(expected), outputs_alone, buffers_alone
        for name, mine, theirs in zip(names, found, wanted, strict=True):
            trial.close(mine, theirs, f"{name} of member {i} of a vmapped training step")


def no_batch(subject: Subject) -> str | None:
    """Why nothing can be said of the samples of a batch, or None."""
    if "batch" not in subject.axes:
        return "no axis of the inputs is named batch"
    return None if subject.batched else "not all outputs have the batch as their first axis"


@invariant(when=no_batch, examples=5)
def per_sample_gradients_equal_the_loop(trial: Try) -> None:
    """`vmap(grad)` over the samples of a batch equals the gradient of each."""
    subject, (params, inputs, key) = trial.subject, trial.parts
    held, rebuild = subject.points(params)
    parted, structure = tree.flatten(
        along_batch(subject, lambda x, axis: x.movedim(axis, 0), inputs)
    )
    dims = [0 if "batch" in declared.axes else None for declared in tree.leaves(subject.inputs)]

    def loss(held: Any, sample: list[Tensor]) -> Tensor:
        one = along_batch(
            subject, lambda x, axis: x.unsqueeze(axis), tree.unflatten(structure, sample)
        )
        return subject.loss(subject.infer(rebuild(held), one, key))

    gradients = vmap(grad(loss), (None, dims))(held, parted)
    for i in range(trial.sample.sizes["batch"]):
        sample = [x if dim is None else x[i] for x, dim in zip(parted, dims, strict=True)]
        found = {path: g[i] for path, g in gradients.items()}
        trial.close(_named(found), _named(grad(loss)(held, sample)), f"gradient of sample {i}")


@invariant(examples=1)
def compiled_equals_eager(trial: Try) -> None:
    """`funcnets.compile` of inference and of a training step with its gradient equals eager."""
    subject, (params, inputs, key) = trial.subject, trial.parts
    infer = funcnets.compile(lambda p, x, k: subject.infer(p, x, k), backend="aot_eager")
    trial.close(infer(params, inputs, key), subject.infer(params, inputs, key), "inference")

    def step(params: Any, inputs: Any, key: Any) -> Any:
        gradient, aux = _train(subject, params, inputs, key)
        return _named(gradient), aux

    compiled = funcnets.compile(step, backend="aot_eager")
    trial.close(compiled(params, inputs, key), step(params, inputs, key), "training")
    # Other values, another key: none of them has become a constant.
    other = subject.sample(trial.sample.seed + 1, sizes=trial.sample.sizes)
    parts = other.params, other.inputs, other.key
    trial.close(compiled(*parts), step(*parts), "training, another call")


def along_batch(subject: Subject, f: Callable[..., Tensor], inputs: Any, *rest: Any) -> Any:
    """The inputs with ``f(x, axis, *others)`` for those that have a batch, at that axis."""

    def one(x: Tensor, declared: Declared, *others: Tensor) -> Tensor:
        return f(x, declared.axes.index("batch"), *others) if "batch" in declared.axes else x

    return tree.map(one, inputs, subject.inputs, *rest)


def _train(subject: Subject, params: Any, inputs: Any, key: Any) -> Any:
    """The gradient of a training step by path, and the outputs with the new buffers."""
    held, rebuild = subject.points(params)

    def loss(held: Any) -> tuple[Tensor, Any]:
        outputs, buffers = subject.train(rebuild(held), inputs, key)
        return subject.loss(outputs), (outputs, buffers)

    return grad(loss, has_aux=True)(held)


def _members(trial: Try) -> list[tuple[Any, Any, Any]]:
    subject, sample = trial.subject, trial.sample
    singles = []
    for i, key in enumerate(random.split(sample.key, MEMBERS).unbind()):
        inputs = subject.draw_inputs(random.fold_in(key, 1), sample.sizes, "normal", subject.dtype)
        params = sample.params if i == 0 else subject.params(key)
        singles.append((params, inputs, random.fold_in(key, 2)))
    return singles


def _stacked(singles: list[tuple[Any, Any, Any]]) -> tuple[Any, Any, Any]:
    params, inputs, keys = zip(*singles, strict=True)
    return (
        tree.stack(params) if tree.entries(params[0]) is not None else tree.map(_stack, *params),
        tree.map(_stack, *inputs),
        torch.stack(keys),
    )


def _stack(*leaves: Tensor) -> Tensor:
    return torch.stack(leaves)


def _named(gradients: dict[Any, Tensor]) -> dict[str, Tensor]:
    return {tree.join(path): g for path, g in gradients.items()}

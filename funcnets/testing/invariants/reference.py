"""The model equals another one that is trusted."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vjp

from funcnets import random, tree
from funcnets.testing.engine import Try, invariant
from funcnets.testing.invariants.places import At, everything
from funcnets.testing.subject import Subject, smooth


@invariant(needs="reference")
def equals_the_reference(trial: Try) -> None:
    """Outputs, gradients and, in training, buffers are those of the reference.

    A module gets the parameters of the model; where the model draws, inference alone is compared.
    """
    modes = [False, True] if trial.subject.trains and not trial.subject.draws else [False]
    for train in modes:
        _compare(trial, train)


def _compare(trial: Try, train: bool) -> None:
    subject, (params, inputs, key) = trial.subject, trial.parts
    mode = "training" if train else "inference"
    at, arguments = everything(trial)

    def outputs_of(at: At) -> Any:
        called = arguments(at)
        outputs = subject.train(*called, key)[0] if train else subject.infer(*called)
        return smooth(outputs), outputs

    mine, pull_back, outputs = vjp(outputs_of, at, has_aux=True)  # type: ignore[misc]
    leaves = {path: x.clone().requires_grad_() for path, x in at.items()}
    expected, module = _reference(subject, *arguments(leaves), leaves, train)
    trial.close(outputs, tree.map(lambda y: y.detach(), expected), mode)
    cotangent = [
        random.normal(random.fold_in(key, i), y.shape, dtype=torch.float64).to(y)
        for i, y in enumerate(mine)
    ]
    (gradients,) = pull_back(cotangent)
    wanted = torch.autograd.grad(
        smooth(expected),
        list(leaves.values()),
        cotangent,
        materialize_grads=True,
        allow_unused=True,
    )
    for (path, gradient), theirs in zip(gradients.items(), wanted, strict=True):
        trial.close({path: gradient}, {path: theirs}, f"gradient, {mode}")
    if train and module is not None:
        state = module.state_dict()
        for path, buffer in tree.leaves_with_path(subject.train(params, inputs, key)[1]):
            name = tree.join(path)
            trial.close({name: buffer}, {name: state[name].to(buffer)}, "new buffer")


def _reference(
    subject: Subject, params: Any, inputs: Any, leaves: dict[Any, Tensor], train: bool
) -> tuple[Any, nn.Module | None]:
    if not isinstance(subject.reference, nn.Module):
        return subject.reference(params, *inputs), None
    module = copy.deepcopy(subject.reference).to(subject.dtype).train(train)
    state = tree.to_state_dict(params, module)
    module.load_state_dict({name: x.detach().clone() for name, x in state.items()}, strict=True)
    own = {("params", *name.split(".")): p for name, p in module.named_parameters()}
    result = module(*inputs)
    # What the module trains takes the places of the leaves that it was given.
    for path, parameter in own.items():
        if path in leaves:
            leaves[path] = parameter
    return result, module

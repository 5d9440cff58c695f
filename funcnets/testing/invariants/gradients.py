"""Gradients: finite, right, and one for every parameter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, grad_and_value
from torch.overrides import TorchFunctionMode

from funcnets import tree
from funcnets.testing.engine import Try, finite, invariant
from funcnets.testing.invariants.places import (
    DIFFERENCES,
    At,
    closest_difference,
    direction,
    dot,
    in_training,
    size,
)
from funcnets.testing.invariants.purity import differentiate
from funcnets.testing.subject import Violation, points, smooth
from funcnets.tree.flatten import Path


@invariant(values=("normal", "zeros", "equal", "large"))
def gradients_are_finite(trial: Try) -> None:
    """Outputs and gradients are finite, for inputs that are zero, equal or large as well."""
    at, outputs_of = in_training(trial)

    def loss(at: At) -> tuple[Tensor, Any]:
        outputs = outputs_of(at)
        return trial.subject.loss(outputs), outputs

    gradients, outputs = grad(loss, has_aux=True)(at)
    floating = [(p, y) for p, y in tree.leaves_with_path(outputs) if y.is_floating_point()]
    finite(floating, "output")
    finite(gradients.items(), "gradient")


@invariant(whole=True)
def gradients_reach_every_parameter(trials: Iterator[Try]) -> None:
    """Each trainable parameter has a gradient that is not zero for some input."""
    dead: set[Path] | None = None
    for trial in trials:
        gradients = differentiate(trial.subject, *trial.parts)
        zero = {path for path, g in gradients.items() if g.numel() and not g.any()}
        dead = zero if dead is None else dead & zero
        if not dead:
            return
    names = ", ".join(sorted(tree.join(path) for path in dead or ()))
    raise Violation(names, "a gradient", "zero, for every input that was tried")


@invariant(tolerance=tuple(DIFFERENCES.values()))
def gradients_match_finite_differences(trial: Try) -> None:
    """The gradient at parameters and inputs is the slope of the loss, in a random direction."""
    at, outputs_of = in_training(trial)
    along = direction(trial, 1, at)

    def loss(at: At) -> Tensor:
        return trial.subject.loss(outputs_of(at))

    gradient, value = grad_and_value(loss)(at)
    slope = dot(gradient, along).item()
    found = closest_difference(
        lambda h: loss({path: x + h * along[path] for path, x in at.items()}), slope, at
    )
    scale = 1 + size(gradient, along) + abs(value.item())
    if not abs(found - slope) <= trial.tolerance * scale:
        raise Violation("gradient", f"{found:.8g}, by differences", f"{slope:.8g}")


@invariant(needs="shared", tolerance=(1e-10, 1e-4))
def shared_gradients_add_up(trial: Try) -> None:
    """A shared subtree is read as often as said; its gradient is the sum over these uses."""
    subject, (params, inputs, key) = trial.subject, trial.parts
    for name, uses in subject.shared.items():
        held, rebuild = points(params, tree.matcher(name))
        if not held:
            raise Violation(name, "a subtree with parameters", "none", "shared")
        leaves = {path: x.clone().requires_grad_() for path, x in held.items()}

        def loss(held: Any, rebuild: Any = rebuild) -> Tensor:
            return subject.loss(subject.train(rebuild(held), inputs, key)[0])

        with torch.enable_grad(), _Uses(leaves) as reading:
            total = loss(leaves)
        for path, copies in reading.copies.items():
            if len(copies) != uses:
                raise Violation(tree.join(path), f"{uses} uses", str(len(copies)))
        flat = [copy for copies in reading.copies.values() for copy in copies]
        each = iter(torch.autograd.grad(total, flat, materialize_grads=True))
        whole = grad(loss)(held)
        for path, copies in reading.copies.items():
            added = torch.stack([next(each) for _ in copies]).sum(0)
            trial.close({path[-1]: whole[path]}, {path[-1]: added}, tree.join(path))


class _Uses(TorchFunctionMode):
    """Gives every use of some tensors a copy of its own."""

    def __init__(self, leaves: dict[Path, Tensor]) -> None:
        super().__init__()
        self.places = {id(leaf): path for path, leaf in leaves.items()}
        self.copies: dict[Path, list[Tensor]] = {path: [] for path in leaves}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made: list[tuple[Path, Tensor]] = []

        def swap(leaf: Any) -> Any:
            path = self.places.get(id(leaf))
            if path is None:
                return leaf
            copy = leaf.detach().clone().requires_grad_()
            made.append((path, copy))
            return copy

        args, kwargs = tree.map(swap, tuple(args)), tree.map(swap, kwargs or {})
        result = func(*args, **kwargs)
        if any(y.grad_fn is not None for y in smooth(result)):  # and not a size or a dtype
            for path, copy in made:
                self.copies[path].append(copy)
        return result

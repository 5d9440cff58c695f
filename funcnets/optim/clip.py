"""Clipping of gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from funcnets.optim.base import Optimizer
from funcnets.optim.leafwise import Hyperparameter, Number, check_hyperparameter, leafwise
from funcnets.tree.flatten import Tree, leaves


class ClipState(NamedTuple):
    """Nothing: clipping remembers nothing."""


def global_norm(tree: Tree) -> Float[Tensor, ""]:
    """The Euclidean norm of all the numbers of a tree together, in float64.

    >>> global_norm({"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])})
    tensor(5., dtype=torch.float64)
    """
    norms = [torch.linalg.vector_norm(leaf, dtype=_wide(leaf.dtype)) for leaf in leaves(tree)]
    if not norms:
        return torch.zeros((), dtype=torch.float64)
    return torch.linalg.vector_norm(torch.stack([norm.to(torch.float64) for norm in norms]))


def clip_by_global_norm(max_norm: float | int | Tensor) -> Optimizer:
    """Scales the gradients down to a `global_norm` of ``max_norm`` where it is larger.

    As `torch.nn.utils.clip_grad_norm_`. It goes before the optimizer in a `chain`.

    >>> clip, grads = clip_by_global_norm(1.0), {"a": torch.tensor([3.0, 4.0])}
    >>> clip.update(grads, clip.init(grads), grads)[0]
    {'a': tensor([0.6000, 0.8000])}
    """
    _check("clip_by_global_norm: max_norm", max_norm)

    def update(
        grads: Tree, state: Any, params: Tree, value: Float[Tensor, ""] | None = None
    ) -> tuple[Tree, ClipState]:
        bound = max_norm.to(torch.float64) if isinstance(max_norm, Tensor) else max_norm
        factor = (bound / (global_norm(grads) + 1e-6)).clamp(max=1.0)
        return leafwise("clip_by_global_norm", rule, (factor,), grads, params)[0], state

    def rule(scalars: list[Number], grad: Tensor, param: Tensor) -> tuple[Tensor]:
        return (grad * scalars[0],)

    return Optimizer(_no_state, update)


def clip_by_value(limit: float | int | Tensor) -> Optimizer:
    """Clips each number of the gradients to [-limit, limit].

    As `torch.nn.utils.clip_grad_value_`. It goes before the optimizer in a `chain`.

    >>> clip, grads = clip_by_value(1.0), {"a": torch.tensor([0.5, -4.0])}
    >>> clip.update(grads, clip.init(grads), grads)[0]
    {'a': tensor([ 0.5000, -1.0000])}
    """
    _check("clip_by_value: limit", limit)

    def update(
        grads: Tree, state: Any, params: Tree, value: Float[Tensor, ""] | None = None
    ) -> tuple[Tree, ClipState]:
        return leafwise("clip_by_value", rule, (-limit, limit), grads, params)[0], state

    def rule(scalars: list[Number], grad: Tensor, param: Tensor) -> tuple[Tensor]:
        low, high = scalars
        return (torch.clamp(grad, low, high),)  # type: ignore[arg-type]  # both are of one kind

    return Optimizer(_no_state, update)


def _no_state(params: Tree) -> ClipState:
    return ClipState()


def _check(place: str, value: Hyperparameter) -> None:
    if not isinstance(value, Tensor) and callable(value):
        raise TypeError(f"{place}: expected a number or a tensor, got a schedule")
    check_hyperparameter(place, value)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Norms of half precision are taken in float32: the squares would overflow."""
    return torch.float64 if dtype == torch.float64 else torch.float32

"""Muon."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from funcnets.optim.base import Optimizer
from funcnets.optim.decay import decayed
from funcnets.optim.leafwise import (
    Hyperparameter,
    Moment,
    Number,
    check_hyperparameter,
    check_params,
    check_state,
    leafwise,
    like,
    new_step,
    resolve,
)
from funcnets.tree.flatten import Tree, describe, join, leaves_with_path
from funcnets.tree.select import Where

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration; chosen by Jordan et al. for a steep slope at zero."""


class MuonState(NamedTuple):
    """The number of updates made, and the running means of the gradient."""

    step: Int64[Tensor, ""]
    mean: Tree


def muon(
    learning_rate: Hyperparameter = 1e-3,
    momentum: Hyperparameter = 0.95,
    weight_decay: Hyperparameter = 0.1,
    nesterov: bool = True,
    iterations: int = 5,
    eps: float = 1e-7,
    adjust: str = "original",
    dtype: torch.dtype = torch.bfloat16,
    where: Where | None = None,
) -> Optimizer:
    """Muon (Jordan et al. 2024), as `torch.optim.Muon`: momentum, made nearly orthogonal.

    For the matrices of hidden layers only; `by_path` gives the other leaves to another optimizer.
    The weight decay is decoupled.

    Args:
        iterations: of Newton and Schulz.
        adjust: of the step to a matrix of m rows and n columns: ``"original"`` multiplies it by
            ``sqrt(max(1, m / n))``, ``"match_rms_adamw"`` by ``0.2 * sqrt(max(m, n))`` (Liu et al.
            2025), with which the learning rate is that of AdamW.
        dtype: in which the iteration is computed.
        where: which leaves decay, by path, as in `funcnets.tree.matcher`; by default all.

    Raises:
        ValueError: naming the path, where a leaf is no matrix.

    >>> from funcnets import optim
    >>> def hidden(path, leaf):
    ...     return leaf.ndim == 2 and path[0] not in ("embedding", "head")
    >>> optimizer = optim.by_path({hidden: muon(0.02)}, default=optim.adamw(3e-4))
    """
    check_hyperparameter("muon: learning_rate", learning_rate)
    check_hyperparameter("muon: momentum", momentum)
    check_hyperparameter("muon: eps", eps)
    if adjust not in ("original", "match_rms_adamw"):
        raise ValueError(f"muon: adjust: expected 'original' or 'match_rms_adamw', got {adjust!r}")

    def init(params: Tree) -> MuonState:
        check_params("muon", params)
        for path, leaf in leaves_with_path(params):
            if leaf.ndim != 2:
                raise ValueError(
                    f"muon: {join(path)}: expected a matrix, got {describe(leaf)}; give what is "
                    "none to another optimizer, as by_path({...: muon()}, default=adamw()) does"
                )
        return MuonState(new_step(params), like(params))

    def update(
        grads: Tree, state: Any, params: Tree, value: Float[Tensor, ""] | None = None
    ) -> tuple[Tree, MuonState]:
        check_state("muon", MuonState, state)
        rate, inertia = (resolve(value, state.step) for value in (learning_rate, momentum))
        scalars = (-rate, inertia, 1.0 - inertia)
        updates, mean = leafwise("muon", rule, scalars, grads, params, state.mean)
        return updates, MuonState(state.step + 1, mean)

    def rule(
        scalars: list[Number], grad: Tensor, param: Tensor, mean: Tensor
    ) -> tuple[Moment, ...]:
        step, inertia, share = scalars
        mean = torch.lerp(mean, grad, share)
        change = torch.lerp(grad, mean, inertia) if nesterov else mean
        change = orthogonalized(change.to(dtype), iterations, eps).to(param.dtype)
        rows, columns = param.shape
        factor = (
            math.sqrt(max(1.0, rows / columns))
            if adjust == "original"
            else 0.2 * math.sqrt(max(rows, columns))
        )
        return change * (step * factor), mean

    return decayed("muon", Optimizer(init, update), learning_rate, weight_decay, where)


def orthogonalized(
    matrix: Float[Tensor, "rows columns"], iterations: int, eps: float
) -> Float[Tensor, "rows columns"]:
    """The matrix with its singular values driven to about one, by Newton and Schulz's iteration.

    They end between 0.5 and 1.5, or so; its singular vectors stay.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix  # the smaller of the two Gram matrices
    x = x / x.norm().clamp(min=eps)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x

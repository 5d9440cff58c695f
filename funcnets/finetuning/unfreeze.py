"""Progressive unfreezing: parts of a network that begin to be trained at steps of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from funcnets.optim.base import Optimizer
from funcnets.optim.leafwise import aligned, check_state, new_step
from funcnets.tree.flatten import Tree, leaves_with_path, unflatten_like
from funcnets.tree.select import Where, matcher


class UnfreezingState(NamedTuple):
    """The number of updates made, and the state of the optimizer."""

    step: Int64[Tensor, ""]
    inner: Any


def unfreezing(optimizer: Optimizer, starts: Mapping[Where, int | Int64[Tensor, ""]]) -> Optimizer:
    """The optimizer, with updates of zero for each part until the step that it begins at.

    As in Howard and Ruder 2018, say ``{"layer3": 100, "layer2": 200, "*": 300}`` under a head that
    is to come first, ``{"fc": 0, ...}``. The steps are data, so one compiled training step serves
    throughout. Until its step a part stays as it is, weight decay included, but the optimizer sees
    its gradients: so its moments are there when they are needed, and a clipping of the global norm
    counts them.

    Args:
        starts: from what `funcnets.tree.matcher` takes to the number of updates before the first
            one that counts. A leaf goes by the first that it matches, and without one from 0.

    Raises:
        ValueError: for a step below 0; by ``init``, for a part that is the first for no leaf.

    >>> from funcnets import optim
    >>> optimizer = unfreezing(optim.sgd(1.0), {"stem": 1})
    >>> params = grads = {"stem": torch.ones(1), "head": torch.ones(1)}
    >>> state = optimizer.init(params)
    >>> first, state = optimizer.update(grads, state, params)
    >>> second, state = optimizer.update(grads, state, params)
    >>> first["stem"], first["head"], second["stem"]
    (tensor([0.]), tensor([-1.]), tensor([-1.]))
    """
    for where, start in starts.items():
        if isinstance(start, Tensor):
            wrong = start.ndim or start.dtype.is_floating_point
        else:
            wrong = isinstance(start, bool) or not isinstance(start, int) or start < 0
        if wrong:
            raise ValueError(
                f"unfreezing: {where!r}: expected a step of at least 0, an int or an integer "
                f"tensor of shape [], got {start!r}"
            )
    rules = [(matcher(where), start) for where, start in starts.items()]

    def places(params: Tree) -> list[int | None]:
        """For each leaf the rule that it goes by."""
        return [
            next((i for i, (matches, _) in enumerate(rules) if matches(path, leaf)), None)
            for path, leaf in leaves_with_path(params)
        ]

    def init(params: Tree) -> UnfreezingState:
        used = places(params)
        for i, where in enumerate(starts):
            if i not in used:
                raise ValueError(f"unfreezing: {where!r}: expected leaves that match, got none")
        return UnfreezingState(new_step(params), optimizer.init(params))

    def update(
        grads: Tree, state: Any, params: Tree, value: Float[Tensor, ""] | None = None
    ) -> tuple[Tree, UnfreezingState]:
        check_state("unfreezing", UnfreezingState, state)
        updates, inner = optimizer.update(grads, state.inner, params, value)
        changes = aligned("unfreezing: updates", updates, params)
        begun = [state.step >= start for _, start in rules]
        changes = [
            change if i is None else torch.where(begun[i], change, 0.0)
            for change, i in zip(changes, places(params), strict=True)
        ]
        return unflatten_like(params, changes), UnfreezingState(state.step + 1, inner)

    return Optimizer(init, update)

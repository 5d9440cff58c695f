"""What an optimizer is, how its updates are applied, and how several are chained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from jaxtyping import Float
from torch import Tensor

from funcnets.optim.leafwise import aligned, check_like, check_state
from funcnets.tree.flatten import Tree, leaves, unflatten_like


class Update(Protocol):
    """``update(grads, state, params, value=None) -> (updates, state)``."""

    def __call__(
        self, grads: Tree, state: Any, params: Tree, value: Float[Tensor, ""] | None = None
    ) -> tuple[Tree, Any]:
        """The updates, to be added to the parameters, and the new state.

        Args:
            grads: what `torch.func.grad` returns, or the updates of the one before in a chain.
            state: from ``init`` or from the last update; it stays as it is.
            params: the trainable parameters that the gradient was taken at.
            value: the loss, for those that look at it (`reduce_on_plateau`).
        """


class Optimizer(NamedTuple):
    """An algorithm: ``init(params) -> state`` and ``update``, both pure.

    Updates are *added* to the parameters, as `apply_updates` does. States are named tuples of
    trees and of tensors, so an optimizer works under vmap (one per member of an ensemble), under
    grad (to differentiate through the training) and compiled. Any pair of such functions makes one.

    >>> import torch
    >>> from funcnets import optim
    >>> optimizer = optim.chain(optim.clip_by_global_norm(1.0), optim.sgd(0.5))
    >>> params, grads = {"weight": torch.tensor([1.0])}, {"weight": torch.tensor([4.0])}
    >>> updates, state = optimizer.update(grads, optimizer.init(params), params)
    >>> optim.apply_updates(params, updates)
    {'weight': tensor([0.5000])}
    """

    init: Callable[[Tree], Any]
    update: Update


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """The parameters with the updates added, as new tensors.

    Raises:
        ValueError: where the two trees differ in structure, or leaves in shape or dtype; it names
            the place.

    >>> import torch
    >>> apply_updates({"a": torch.ones(2)}, {"a": -torch.ones(2)})
    {'a': tensor([0., 0.])}
    """
    own, changes = leaves(params), aligned("updates", updates, params)
    check_like("updates", "expected", changes, own, params)
    return unflatten_like(
        params, [leaf + change for leaf, change in zip(own, changes, strict=True)]
    )


class ChainState(NamedTuple):
    """The states of the optimizers of a `chain`, in their order."""

    states: tuple[Any, ...]


def chain(*optimizers: Optimizer) -> Optimizer:
    """One optimizer after another: each takes the updates of the one before as its gradients.

    Clipping goes before the algorithm; what changes its steps (`scale_by_path`,
    `reduce_on_plateau`, `decoupled_weight_decay`) goes after it.
    """
    if not optimizers:
        raise ValueError("chain: expected at least one optimizer")
    for index, optimizer in enumerate(optimizers):
        if not (isinstance(optimizer, Optimizer)):
            raise TypeError(
                f"chain: argument {index}: expected an Optimizer, got {type(optimizer).__name__}"
            )

    def init(params: Tree) -> ChainState:
        return ChainState(tuple(init(params) for init, _ in optimizers))

    def update(
        grads: Tree, state: Any, params: Tree, value: Float[Tensor, ""] | None = None
    ) -> tuple[Tree, ChainState]:
        check_state("chain", ChainState, state)
        if len(state.states) != len(optimizers):
            raise ValueError(
                f"chain: state: expected that of {len(optimizers)} optimizers, "
                f"got that of {len(state.states)}"
            )
        states = []
        for (_, change), inner in zip(optimizers, state.states, strict=True):
            grads, inner = change(grads, inner, params, value)
            states.append(inner)
        return grads, ChainState(tuple(states))

    return Optimizer(init, update)

"""What differs by path: the optimizer of a leaf, or the size of its steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxtyping import Float, Int64
from torch import Tensor

from funcnets.optim.base import Optimizer
from funcnets.optim.leafwise import (
    Hyperparameter,
    aligned,
    as_leaf,
    check_hyperparameter,
    check_state,
    new_step,
    resolve,
    scaled,
)
from funcnets.tree.flatten import Path, Tree, join, leaves, leaves_with_path, unflatten_like
from funcnets.tree.select import Where, matcher


class ByPathState(NamedTuple):
    """The states of the optimizers of `by_path`, in their order, the default last."""

    states: tuple[Any, ...]


class ScaleByPathState(NamedTuple):
    """The number of updates made."""

    step: Int64[Tensor, ""]


def by_path(rules: Mapping[Where, Optimizer], default: Optimizer | None = None) -> Optimizer:
    """Each leaf to the optimizer of the first rule that it matches, or to the default.

    Each optimizer sees its own leaves alone, at their paths, in nested dicts: a global norm within
    it is that of these leaves.

    Args:
        rules: from what `funcnets.tree.matcher` takes (a glob on the dotted path, several in a
            tuple, a regular expression, or a predicate of path and leaf) to optimizers.

    Raises:
        ValueError: by ``init``, for a rule that gets no leaf, and for a leaf that gets no rule
            where there is no default.

    >>> from funcnets import optim
    >>> optimizer = optim.by_path(
    ...     {"head": optim.adam(1e-3), "*.bias": optim.sgd(0.1)}, default=optim.adam(1e-5)
    ... )
    """
    matchers = [matcher(where) for where in rules]
    optimizers = [*rules.values(), *([default] if default is not None else [])]

    def place(path: Path, leaf: Any) -> int:
        for index, matches in enumerate(matchers):
            if matches(path, leaf):
                return index
        if default is None:
            raise ValueError(f"by_path: {join(path)}: expected a rule for it, or a default")
        return len(matchers)

    def init(params: Tree) -> ByPathState:
        found = leaves_with_path(params)
        places = [place(path, leaf) for path, leaf in found]
        for index, where in enumerate(rules):
            if index not in places:
                raise ValueError(f"by_path: {where!r}: expected leaves that match, got none")
        parts = _parted([path for path, _ in found], places, leaves(params), len(optimizers))
        return ByPathState(
            tuple(init(part) for (init, _), part in zip(optimizers, parts, strict=True))
        )

    def update(
        grads: Tree, state: Any, params: Tree, value: Float[Tensor, ""] | None = None
    ) -> tuple[Tree, ByPathState]:
        check_state("by_path", ByPathState, state)
        if len(state.states) != len(optimizers):
            raise ValueError(
                f"by_path: state: expected that of {len(optimizers)} optimizers, "
                f"got that of {len(state.states)}"
            )
        found = leaves_with_path(params)
        paths = [path for path, _ in found]
        places = [place(path, leaf) for path, leaf in found]
        gradients = aligned("by_path: grads", grads, params)
        changes: list[Any] = [None] * len(found)
        states = []
        parts = zip(
            optimizers,
            _parted(paths, places, gradients, len(optimizers)),
            state.states,
            _parted(paths, places, leaves(params), len(optimizers)),
            strict=True,
        )
        for index, ((_, change), some_grads, inner, some_params) in enumerate(parts):
            updates, inner = change(some_grads, inner, some_params, value)
            states.append(inner)
            mine = [at for at, place in enumerate(places) if place == index]
            some_changes = aligned("by_path: updates", updates, some_params)
            for at, leaf in zip(mine, some_changes, strict=True):
                changes[at] = leaf
        return unflatten_like(params, changes), ByPathState(tuple(states))

    return Optimizer(init, update)


def scale_by_path(factors: Mapping[Where, Hyperparameter]) -> Optimizer:
    """Multiplies the updates of a leaf by the factor of the first rule that it matches, or by one.

    After an optimizer in a `chain`, these are learning rates by path.

    >>> from funcnets import optim
    >>> optimizer = optim.chain(
    ...     optim.adamw(1e-3), optim.scale_by_path({"layer1": 0.01, "layer2": 0.1})
    ... )
    """
    for where, factor in factors.items():
        check_hyperparameter(f"scale_by_path: {where!r}", factor)
    rules = [(matcher(where), factor) for where, factor in factors.items()]

    def init(params: Tree) -> ScaleByPathState:
        return ScaleByPathState(new_step(params))

    def update(
        grads: Tree, state: Any, params: Tree, value: Float[Tensor, ""] | None = None
    ) -> tuple[Tree, ScaleByPathState]:
        check_state("scale_by_path", ScaleByPathState, state)
        resolved = [(matches, resolve(factor, state.step)) for matches, factor in rules]
        changes = []
        gradients = aligned("scale_by_path: grads", grads, params)
        for (path, leaf), change in zip(leaves_with_path(params), gradients, strict=True):
            factor = next((factor for matches, factor in resolved if matches(path, leaf)), 1.0)
            changes.append(scaled(as_leaf(factor, change), change))
        return unflatten_like(params, changes), ScaleByPathState(state.step + 1)

    return Optimizer(init, update)


def _parted(paths: list[Path], places: list[int], leaves: list[Any], number: int) -> list[Tree]:
    """The leaves of each place, as nested dicts."""
    parts: list[dict[str, Any]] = [{} for _ in range(number)]
    for path, place, leaf in zip(paths, places, leaves, strict=True):
        node = parts[place]
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node["".join(path[-1:])] = leaf
    return parts

"""Population search: many settings trained at once, of which fewer and fewer go on."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from funcnets import random
from funcnets.ensembles.chunks import Chunk, chunked, members
from funcnets.training.batches import Batches, turns
from funcnets.tree.flatten import Tree, describe


class Found(NamedTuple):
    """What a search found.

    Attributes:
        records: one for each member, the best first: its number, its hyperparameters, the rounds
            and steps that it was trained for, and its scores after each round. Those that went
            further come first.
        hyper: the hyperparameters of the members that were trained to the end, the best first.
        states: theirs.
        scores: theirs.
    """

    records: list[dict[str, Any]]
    hyper: dict[str, Shaped[Tensor, " kept"]]
    states: Tree
    scores: Float[Tensor, " kept"]


def search(
    key: random.Key,
    step_of: Callable[[dict[str, Any]], Any],
    hyper: Mapping[str, Shaped[Tensor, " members"]],
    init: Callable[[random.Key], Tree],
    batches: Batches,
    score: Callable[[Any], Tensor],
    *,
    rounds: Sequence[int],
    halve: float = 2.0,
    own_order: bool = False,
    chunk: Chunk = None,
    advance: Callable[[int], None] | None = None,
) -> Found:
    """Trains a member for each setting, all in one vmap, and drops the worst after every round.

    With several rounds this is successive halving (Jamieson and Talwalkar 2016); with one round it
    is plain random or grid search. A member is trained as it would be alone, whatever becomes of
    the others.

    Args:
        key: of the run. Member i has the key ``random.split(key, members)[i]``.
        step_of: from a dict of hyperparameters, tensors of shape [], to a training step:
            ``lambda hyper: make_step(model, loss, optim.adamw(hyper["learning_rate"]))``. It must
            not be costly to call, and its structure the same for all.
        hyper: from `draw` or `grid`, tensors [members] by name.
        init: from a key to parameters, as of a model.
        batches: as `funcnets.training.fit` takes them: a function from a key to the batches of an
            epoch, `funcnets.training.minibatches` say.
        score: of a state on samples that are not trained on, a tensor of shape [], higher where
            better; called under vmap. A member whose score is not a number comes last.
        rounds: how many steps each round has.
        halve: after a round but the last, one in so many members goes on.
        own_order: whether each member has the batches in an order of its own. ``batches`` then is
            called with keys [members, 2].
        chunk: how many members are computed at once, where memory is short; by default all. The
            numbers are the same, to rounding. "auto" finds what is fastest; see `chunked`.
        advance: called after each step with the number of members that took it, for a progress bar.

    Raises:
        ValueError: where there are no members, or the hyperparameters are not of one length.

    >>> import torch.nn.functional as F
    >>> from funcnets import models, optim, training
    >>> from funcnets.ensembles import LogUniform, draw
    >>> model = models.mlp(2, 2, (4,))
    >>> data = random.normal(random.key(2), (32, 2)), torch.arange(32) % 2
    >>> found = search(
    ...     random.key(0),
    ...     lambda h: training.make_step(model, F.cross_entropy, optim.adamw(h["learning_rate"])),
    ...     draw(random.key(1), {"learning_rate": LogUniform(1e-4, 1e-1)}, 8),
    ...     model.init,
    ...     training.minibatches(data, 16),
    ...     lambda s: -F.cross_entropy(model.apply(training.parameters(s), data[0]), data[1]),
    ...     rounds=(2, 4),
    ... )
    >>> len(found.records), found.scores.shape, found.states.step.tolist()
    (8, torch.Size([4]), [6, 6, 6, 6])
    """
    count = _count(hyper)
    if not rounds or min(rounds) < 1:
        raise ValueError(f"search: rounds: expected numbers of steps, got {list(rounds)}")
    if not halve > 1 and len(rounds) > 1:
        raise ValueError(f"search: halve: expected more than 1, got {halve}")
    settings = {name: values.to(key.device) for name, values in hyper.items()}
    keys = random.split(key, count)
    order = random.fold_in(key, count)  # that of no member

    def begin(setting: dict[str, Any], own: Tensor) -> Any:
        init_key, run_key = random.split(own).unbind()
        return step_of(setting).init(init(init_key), run_key)

    def train(setting: dict[str, Any], state: Any, batch: Any) -> Any:
        return step_of(setting)(state, batch)[0]

    over = chunked(train, chunk, (0, 0, 0 if own_order else None))
    judge = chunked(functools.partial(_scored, score), chunk)
    states = chunked(begin, chunk)(settings, keys)
    number = torch.arange(count, device=key.device)
    history: list[list[float]] = [[] for _ in range(count)]
    done, scores = 0, torch.zeros(count)
    for index, steps in enumerate(rounds):
        source = turns(batches, keys if own_order else order, start=done)
        for _ in range(steps):
            states = over(settings, states, next(source).batch)
            if advance is not None:
                advance(len(number))
        done += steps
        scores = judge(states)
        scores = torch.where(scores.isnan(), -torch.inf, scores)
        for member, reached in zip(number.tolist(), scores.tolist(), strict=True):
            history[member].append(reached)
        last = index + 1 == len(rounds)
        kept = len(number) if last else max(1, math.ceil(len(number) / halve))
        best = scores.argsort(descending=True, stable=True)[:kept]
        settings, keys, number, scores, states = members(
            (settings, keys, number, scores, states), best
        )
    return Found(_records(dict(hyper), history, rounds), settings, states, scores)


def _count(hyper: Mapping[str, Tensor]) -> int:
    sizes = {value.shape for value in hyper.values()}
    if len(sizes) != 1 or any(len(size) != 1 or not size[0] for size in sizes):
        found = ", ".join(f"{name} {describe(value)}" for name, value in hyper.items())
        raise ValueError(
            f"search: hyper: expected tensors [members] of one length, got {found or 'none'}"
        )
    return next(iter(sizes))[0]


def _scored(score: Callable[[Any], Tensor], state: Any) -> Tensor:
    value = score(state)
    if not isinstance(value, Tensor) or value.ndim:
        raise ValueError(f"search: score: expected a tensor of shape [], got {describe(value)}")
    return value


def _records(
    hyper: dict[str, Tensor], history: list[list[float]], rounds: Sequence[int]
) -> list[dict[str, Any]]:
    columns = {name: values.tolist() for name, values in hyper.items()}
    order = sorted(
        range(len(history)), key=lambda member: (-len(history[member]), -history[member][-1])
    )
    return [
        {
            "member": member,
            **{name: values[member] for name, values in columns.items()},
            "rounds": len(history[member]),
            "steps": sum(rounds[: len(history[member])]),
            "score": history[member][-1],
            "scores": tuple(history[member]),
        }
        for member in order
    ]

"""What is drawn is drawn by the key."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from funcnets import random, tree
from funcnets.testing.engine import Try, compare, invariant
from funcnets.testing.subject import Subject, Violation


def _no_key(subject: Subject) -> str | None:
    return None if subject.keyed else "the model takes no key"


def _no_init(subject: Subject) -> str | None:
    return "the parameters are given" if subject.given else None


@invariant(when=_no_key, whole=True)
def draws_by_the_key(trials: Iterator[Try]) -> None:
    """In training another key gives other results; where nothing is drawn, every key the same."""
    for trial in trials:
        subject, (params, inputs, key) = trial.subject, trial.parts
        first = subject.train(params, inputs, key)
        compare(subject.train(params, inputs, key.clone()), first, 0.0, "the same key")
        others = [subject.train(params, inputs, random.fold_in(key, i)) for i in range(3)]
        if not subject.draws:
            for other in others:
                compare(other, first, 0.0, "another key, where nothing is said to be drawn")
            return
        if any(_differ(other[0], first[0]) for other in others):
            return
    raise Violation("outputs in training", "other values for another key", "the same for all keys")


def _differ(first: Any, second: Any) -> bool:
    return not all(map(torch.equal, tree.leaves(first), tree.leaves(second)))


@invariant(when=lambda s: _no_key(s) or (None if s.trains else "the model has no training mode"))
def inference_ignores_the_key(trial: Try) -> None:
    """Inference is the same with a key, with another and with none."""
    subject, (params, inputs, key) = trial.subject, trial.parts
    plain = subject.apply(params, *inputs)
    compare(subject.apply(params, *inputs, key=key), plain, 0.0, "with a key")


@invariant(when=_no_init, whole=True)
def initializes_by_the_key(trials: Iterator[Try]) -> None:
    """Parameters are a function of the key alone, and other keys give others."""
    first = None
    for trial in trials:
        subject, key = trial.subject, trial.sample.key
        params = subject.init(key)
        compare(subject.init(key.clone()), params, 0.0, "init with the same key")
        if first is None:
            first = params
        moved = [
            not torch.equal(a, b)
            for a, b in zip(tree.leaves(params), tree.leaves(first), strict=True)
            if isinstance(a, Tensor)
        ]
        if any(moved):
            return
    raise Violation("init", "other parameters for another key", "the same for all keys")


@invariant(when=_no_init, examples=2)
def initializes_an_ensemble(trial: Try) -> None:
    """`vmap(init)` over keys gives what each key gives alone."""
    keys = random.split(trial.sample.key, 3)
    members = torch.func.vmap(trial.subject.init)(keys)
    for i, key in enumerate(keys.unbind()):
        member = tree.map(lambda leaf, i=i: leaf[i], members)
        compare(member, trial.subject.init(key), 0.0, f"member {i} of vmap(init)")

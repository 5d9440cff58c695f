"""A function and nothing else: no argument changed, nothing kept, no generator of the process."""

from __future__ import annotations

import random as python_random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from funcnets import tree
from funcnets.testing.engine import Try, compare, invariant
from funcnets.testing.subject import Subject, Violation


@invariant()
def leaves_its_arguments_as_they_were(trial: Try) -> None:
    """Parameters, inputs and key are the same after a call and after a gradient as before."""
    subject, arguments = trial.subject, trial.parts
    named = dict(zip(NAMES, arguments, strict=True))
    structure = tree.flatten(named)[1]
    before = [
        (path, leaf, leaf._version, leaf.clone())
        for path, leaf in tree.leaves_with_path(named)
        if isinstance(leaf, Tensor)
    ]

    def check(meaning: str) -> None:
        if tree.flatten(named)[1] != structure:
            raise Violation("arguments", "the names they had", "others", meaning)
        now = dict(tree.leaves_with_path(named))
        for path, leaf, version, value in before:
            if now[path] is not leaf:
                raise Violation(tree.join(path), "the tensor it was", "another one", meaning)
            if not torch.equal(leaf.nan_to_num(), value.nan_to_num()):
                raise Violation(tree.join(path), "the value it had", "another", meaning)
            if leaf._version != version:
                raise Violation(tree.join(path), "no write to it", "a write in place", meaning)

    params, inputs, key = arguments
    subject.infer(params, inputs, key)
    check("after inference")
    subject.train(params, inputs, key)
    check("after a call in training")
    differentiate(subject, *arguments)
    check("after a gradient")


@invariant()
def repeats_itself(trial: Try) -> None:
    """The same arguments give the same results, bit for bit."""
    subject, (params, inputs, key) = trial.subject, trial.parts
    for mode, call in (("inference", subject.infer), ("training", subject.train)):
        first, again = call(params, inputs, key), call(params, inputs, key)
        compare(again, first, 0.0, f"the second call, {mode}")


@invariant()
def uses_no_global_generator(trial: Try) -> None:
    """No generator of the process (of torch, Python, numpy) decides anything."""
    subject, (params, inputs, key) = trial.subject, trial.parts
    calls: dict[str, Callable[[], Any]] = {
        "init": lambda: subject.init(key),
        "inference": lambda: subject.infer(params, inputs, key),
        "training": lambda: subject.train(params, inputs, key),
    }
    for name, call in calls.items():
        results = []
        for seed in (1, 2):
            with _seeded(seed):
                before = torch.get_rng_state()
                results.append(call())
                if not torch.equal(torch.get_rng_state(), before):
                    raise Violation(name, "torch's global generator untouched", "a draw from it")
        # Others move Python's, such as checkers of types; so only what comes is compared.
        compare(results[1], results[0], 0.0, f"{name}, with the global generators seeded anew")


@invariant(optional=True)
def shares_no_memory(trial: Try) -> None:
    """What is returned lies in memory of its own, and not in that of an argument."""
    arguments = [leaf for leaf in tree.leaves(trial.parts) if isinstance(leaf, Tensor)]
    given = {leaf.untyped_storage().data_ptr() for leaf in arguments}
    for call in (trial.subject.infer, trial.subject.train):
        for path, leaf in tree.leaves_with_path(call(*trial.parts)):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() in given:
                raise Violation(tree.join(path), "memory of its own", "that of an argument")


NAMES = ("params", "inputs", "key")


def differentiate(subject: Subject, params: Any, inputs: Any, key: Any) -> Any:
    """The gradient of the training loss at the trainable parameters, by path."""
    held, rebuild = subject.points(params)

    def loss(held: dict[Any, Tensor]) -> Tensor:
        return subject.loss(subject.train(rebuild(held), inputs, key)[0])

    return torch.func.grad(loss)(held)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """All global generators seeded, and as they were afterwards."""
    kept = python_random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        python_random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            python_random.setstate(kept[0])
            np.random.set_state(kept[1])

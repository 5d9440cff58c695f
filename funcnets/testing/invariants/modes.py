"""Training against inference: the same where nothing is drawn, and what becomes of buffers."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from funcnets import random, tree
from funcnets.testing.engine import Try, compare, invariant
from funcnets.testing.invariants.transforms import along_batch
from funcnets.testing.subject import Subject, Violation
from funcnets.tree.flatten import Path


def _random_or_buffered(subject: Subject) -> str | None:
    if not subject.trains:
        return "the model has no training mode"
    if subject.draws:
        return "the model draws in training"
    return "the model has running statistics" if subject.buffered else None


def _unbuffered(subject: Subject) -> str | None:
    if not subject.trains:
        return "the model has no training mode"
    return None if subject.buffered else "the model has no running statistics"


@invariant(when=_random_or_buffered)
def training_equals_inference(trial: Try) -> None:
    """Where nothing is drawn and there are no running statistics, both modes are the same."""
    subject, (params, inputs, key) = trial.subject, trial.parts
    outputs, buffers = subject.train(params, inputs, key)
    trial.close(outputs, subject.infer(params, inputs, key))
    if tree.leaves(buffers):
        names = ", ".join(tree.join(path) for path, _ in tree.leaves_with_path(buffers))
        raise Violation("buffers", "none", names, "returned in training")


@invariant(when=_unbuffered)
def buffers_follow_their_rule(trial: Try) -> None:
    """New buffers are the old ones and the batch's, mixed by the momentum, as in torch.nn.

    Their names and shapes are those of the old. A change of the old ones changes the new ones by
    (1 - momentum) of it, once for every use, and no output. The variance counts n - 1 of n values:
    in a batch that holds every sample twice, outputs and means are the same, and the variances of
    both batches give one whole n.
    """
    subject, (params, inputs, key) = trial.subject, trial.parts
    outputs, new = subject.train(params, inputs, key)
    old = {
        path: leaf
        for path, leaf in tree.leaves_with_path(params)
        if path[-1] in ("running_mean", "running_var")
    }
    held = {p: leaf for p, leaf in tree.leaves_with_path(new) if leaf.is_floating_point()}
    mine, theirs = ({tree.join(p): x.shape for p, x in side.items()} for side in (held, old))
    compare(mine, theirs, 0.0)
    moved = tree.map_with_path(lambda path, x: x + 1 if path in old else x, params)
    same, shifted = subject.train(moved, inputs, key)
    trial.close(same, outputs, "outputs in training, for other running statistics")
    used = {}
    for path, leaf in tree.leaves_with_path(shifted):
        if path in held:
            left = (leaf - held[path]).mean().clamp(min=1e-9).item()
            momentum, uses = used[path] = _uses(left, subject.momenta)
            kept = torch.full_like(leaf, (1 - momentum) ** uses)
            name = tree.join(path)
            trial.close({name: leaf - held[path]}, {name: kept}, "what is left of a change of one")
    if subject.batched and not subject.draws:
        once = {path: momentum for path, (momentum, uses) in used.items() if uses == 1}
        _counts(trial, old, {path: held[path] for path in once}, once)


def _uses(left: float, momenta: tuple[float, ...]) -> tuple[float, int]:
    """The momentum, and how often a norm was used with it, that leave the most like ``left``."""
    found = [(m, max(1, round(math.log(left) / math.log(1 - m)))) for m in momenta if 0 < m < 1]
    off = lambda each: abs((1 - each[0]) ** each[1] - left)  # noqa: E731
    return min(found, key=off, default=(momenta[0], 1))


def _counts(
    trial: Try, old: dict[Path, Tensor], new: dict[Path, Tensor], momenta: dict[Path, float]
) -> None:
    subject, (params, inputs, key) = trial.subject, trial.parts
    twice = along_batch(subject, lambda x, axis: torch.cat([x, x], axis), inputs)
    again = dict(tree.leaves_with_path(subject.train(params, twice, key)[1]))
    batch = trial.sample.sizes["batch"]
    for path, leaf in new.items():
        name, momentum = tree.join(path), momenta[path]
        if path[-1] == "running_mean":
            trial.close({name: again[path]}, {name: leaf}, "for every sample twice")
            continue
        if not momentum:  # nothing of the batch is kept
            continue
        of_batch, of_both = (
            (x - (1 - momentum) * old[path]) / momentum for x in (leaf, again[path])
        )
        sure = of_batch > 1e-3
        if not sure.any():
            continue
        ratio = (of_both[sure] / of_batch[sure]).median().item()  # 2 (n - 1) / (2 n - 1)
        n = (2 - ratio) / (2 - 2 * ratio) if ratio < 1 - 1e-9 else math.inf
        whole = n < 1e6 and abs(n - round(n)) < 1e-3 * n and round(n) % batch == 0
        if not whole:
            expected = f"a variance that counts n - 1 of n values, n a multiple of {batch}"
            raise Violation(name, expected, f"one that does so for n = {n:.4g}")


@invariant(when=lambda s: None if s.draws else "the model draws nothing", whole=True, optional=True)
def dropout_keeps_the_mean(trials: Iterator[Try]) -> None:
    """The mean of the outputs over keys in training is the output at inference.

    That holds of dropout before a linear map alone, so it has to be asked for.
    """
    trial = next(trials)
    subject, (params, inputs, key) = trial.subject, trial.parts
    expected = subject.infer(params, inputs)
    n = 2000
    drawn = torch.func.vmap(lambda k: subject.train(params, inputs, k)[0])(random.split(key, n))
    means = tree.map(lambda y: y.mean(0), drawn)
    errors = tree.map(lambda y: y.std(0) / n**0.5, drawn)
    for (path, mean), y, error in zip(
        tree.leaves_with_path(means), tree.leaves(expected), tree.leaves(errors), strict=True
    ):
        far = (mean - y).abs() > 6 * error + 1e-9
        if far.any():
            place = far.nonzero()[0].tolist()
            got = f"{mean[tuple(place)]:.4g} +- {error[tuple(place)]:.1g}"
            wanted = f"{y[tuple(place)]:.4g} at {place}"
            raise Violation(tree.join(path), wanted, got, "the mean over keys")

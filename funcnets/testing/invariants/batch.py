"""Samples of a batch have nothing to do with each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from funcnets import random, tree
from funcnets.testing.engine import Try, invariant
from funcnets.testing.invariants.transforms import along_batch, no_batch
from funcnets.testing.subject import Subject


@invariant(when=no_batch)
def samples_are_independent(trial: Try) -> None:
    """At inference a sample gives the same alone, in its batch, and beside other samples."""
    subject, (params, inputs, key) = trial.subject, trial.parts
    together = subject.infer(params, inputs, key)
    n = trial.sample.sizes["batch"]
    for i in range(n):
        alone = _chosen(subject, inputs, torch.tensor([i]))
        wanted = tree.map(lambda y, i=i: y[i : i + 1], together)
        trial.close(subject.infer(params, alone, key), wanted, f"sample {i} alone")
    others = subject.draw_inputs(
        random.fold_in(key, 5), trial.sample.sizes, "normal", subject.dtype
    )
    mixed = along_batch(
        subject,
        lambda x, axis, other: torch.cat(
            [x.narrow(axis, 0, 1), other.narrow(axis, 1, n - 1)], axis
        ),
        inputs,
        others,
    )
    found = tree.map(lambda y: y[:1], subject.infer(params, mixed, key))
    trial.close(found, tree.map(lambda y: y[:1], together), "sample 0 beside others")


@invariant(when=no_batch)
def the_order_of_a_batch_is_kept(trial: Try) -> None:
    """A batch in another order gives the outputs in that order; in training, the same buffers."""
    subject, (params, inputs, key) = trial.subject, trial.parts
    order = random.permutation(random.fold_in(key, 5), trial.sample.sizes["batch"])
    mixed = _chosen(subject, inputs, order)
    plain = tree.map(lambda y: y[order], subject.infer(params, inputs, key))
    trial.close(subject.infer(params, mixed, key), plain, "inference")
    if not subject.draws:
        outputs, buffers = subject.train(params, inputs, key)
        if not all(y.shape[:1] == order.shape for y in tree.leaves(outputs)):
            return  # as of several exits
        mixed_outputs, mixed_buffers = subject.train(params, mixed, key)
        trial.close(mixed_outputs, tree.map(lambda y: y[order], outputs), "training")
        trial.close(mixed_buffers, buffers, "new buffers")


def _chosen(subject: Subject, inputs: Any, places: Tensor) -> Any:
    return along_batch(subject, lambda x, axis: x.index_select(axis, places), inputs)

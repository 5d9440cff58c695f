"""All that changes in training, as one tree."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from funcnets import random, tree
from funcnets.random import Key
from funcnets.tree.flatten import Tree


class State(NamedTuple):
    """What a step takes and returns, and what a checkpoint holds. ``()`` stands for "not in use".

    Attributes:
        params: what is trained.
        buffers: running statistics and other leaves that no gradient reaches.
        frozen: the parameters that are not trained; empty unless ``make_step(trainable=...)``.
        optimizer: the state of the optimizer.
        step: how many steps were taken, int64 of shape [].
        key: of the run; the orders of the epochs and the keys of the steps are derived from it.
        average: the running average of the parameters, an `AverageState`.
        scaler: the loss scale of float16, a `ScaleState`.
        nonfinite: what was found that is not finite, a `NonFinite`.
        good: what ``nonfinite="restore"`` goes back to.
        stopping: of `EarlyStopping`, with the best so far.
    """

    params: Tree
    buffers: Tree
    frozen: Tree
    optimizer: Any
    step: Tensor
    key: Tensor
    average: Any = ()
    scaler: Any = ()
    nonfinite: Any = ()
    good: Any = ()
    stopping: Any = ()


def parameters(state: State, average: bool = False) -> Tree:
    """The whole tree for ``model.apply``: what is trained, the buffers and what is frozen.

    Args:
        average: whether to take the running average instead of the last parameters.

    >>> import torch
    >>> from funcnets import models, optim, training
    >>> model = models.mlp(in_features=4, out_features=2)
    >>> step = training.make_step(model, torch.nn.functional.cross_entropy, optim.sgd(0.1))
    >>> params = model.init(random.key(0))
    >>> tree.check(training.parameters(step.init(params, random.key(1))), params)
    """
    if not average:
        return tree.merge(state.params, state.buffers, state.frozen)
    if isinstance(state.average, tuple) and not state.average:
        raise ValueError("parameters: no average is kept; use make_step(..., average=ema(0.999))")
    return tree.merge(state.average.params, state.average.buffers, state.frozen)


def step_key(key: Key, step: Tensor) -> Key:
    """The key of a step, from that of the run."""
    return random.fold_in(random.fold_in(key, 1), step)


def order_key(key: Key, epoch: int) -> Key:
    """The key of the order of an epoch, from that of the run."""
    return random.fold_in(random.fold_in(key, 0), epoch)

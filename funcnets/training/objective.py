"""The one form of every loss: ``(params, batch, key) -> (value, metrics, buffers)``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from tensordict import TensorDict
from torch import Tensor

from funcnets import tree
from funcnets.model import Model
from funcnets.random import Key
from funcnets.training.precision import Precision, computing_in
from funcnets.tree.flatten import Tree

Objective: TypeAlias = Callable[[Tree, Any, Key], tuple[Tensor, dict[str, Tensor], Tree]]


def make_objective(
    model: Model | None, loss: Callable[..., Any], precision: Precision | None
) -> Objective:
    """The objective of a model and a loss of its outputs, or of a loss that does it all."""
    if model is None:

        def whole(params: Tree, batch: Any, key: Key) -> tuple[Tensor, dict[str, Tensor], Tree]:
            with computing_in(precision, _device(params)):
                returned = loss(params, batch, key)
            if not isinstance(returned, tuple) or len(returned) != 3:
                raise TypeError(
                    "loss: without a model, expected (value, metrics, buffers), "
                    f"got {tree.describe(returned)}"
                )
            return _checked(*returned)

        return whole

    apply, trains = model.apply, _knows_train(model.apply)

    def composed(params: Tree, batch: Any, key: Key) -> tuple[Tensor, dict[str, Tensor], Tree]:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise TypeError(
                f"batch: expected (inputs, targets), got {tree.describe(batch)}; "
                "for anything else, make_step(None, loss, ...) with loss(params, batch, key)"
            )
        inputs, targets = batch
        given = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
        with computing_in(precision, _device(params)):
            if trains:
                outputs, buffers = apply(params, *given, train=True, key=key)
            else:
                outputs, buffers = apply(params, *given), TensorDict({})
        if precision is not None:  # the loss, and with it the softmax, in float32
            outputs = tree.map(_single, outputs)
        returned = loss(outputs, targets)
        value, metrics = returned if isinstance(returned, tuple) else (returned, {})
        return _checked(value, metrics, buffers)

    return composed


def _checked(value: Any, metrics: Any, buffers: Any) -> tuple[Tensor, dict[str, Tensor], Tree]:
    if not isinstance(value, Tensor) or value.ndim:
        raise ValueError(f"loss: expected a tensor of shape [], got {tree.describe(value)}")
    for name, metric in metrics.items():
        if name in ("loss", "nonfinite", "scale"):
            raise ValueError(f"loss: metrics: the name {name} is taken")
        if isinstance(metric, Tensor) and metric.ndim:
            raise ValueError(
                f"loss: metrics: {name}: expected a tensor of shape [], got {tree.describe(metric)}"
            )
    told = {name: torch.as_tensor(metric, device=value.device) for name, metric in metrics.items()}
    return value, told, buffers


def _knows_train(apply: Callable[..., Any]) -> bool:
    """Whether a function of one's own has training apart; if not, it is called plainly."""
    try:
        found = inspect.signature(apply).parameters
    except (TypeError, ValueError):
        return True
    return "train" in found or any(p.kind is p.VAR_KEYWORD for p in found.values())


def _single(leaf: Any) -> Any:
    half = isinstance(leaf, Tensor) and leaf.dtype in (torch.float16, torch.bfloat16)
    return leaf.to(torch.float32) if half else leaf


def _device(params: Tree) -> str:
    return next((leaf.device.type for leaf in tree.leaves(params)), "cpu")

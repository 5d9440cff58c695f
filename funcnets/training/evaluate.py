"""What a network predicts over all batches, and how good that is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from funcnets import tree
from funcnets.tree.flatten import Tree


def evaluate(
    apply: Callable[..., Any],
    params: Tree,
    batches: Iterable[tuple[Any, Any]],
    metrics: Mapping[str, Any],
) -> dict[str, Any]:
    """The scores of a network over batches, each computed from all predictions together.

    Args:
        apply: as ``model.apply``, called without ``train``.
        params: a whole tree, as `parameters` gives it. The scores of an ensemble are
            ``vmap(lambda params: evaluate(model.apply, params, batches, metrics))(params)``.
        batches: of ``(inputs, targets)``, the samples along the first axis.
        metrics: by name functions ``(outputs, targets) -> tensor``, or objects with ``update`` and
            ``compute``, as those of torchmetrics, which are given each batch after the other (and
            begin anew if they have a ``reset``).

    Raises:
        ValueError: where there is no batch.

    >>> from funcnets import training
    >>> batches = [(torch.eye(2), torch.tensor([0, 1])), (torch.eye(2)[:1], torch.tensor([1]))]
    >>> evaluate(lambda params, x: x, {}, batches, {"accuracy": training.accuracy})
    {'accuracy': tensor(0.6667)}
    """
    streams = {name: metric for name, metric in metrics.items() if hasattr(metric, "compute")}
    for metric in streams.values():
        if hasattr(metric, "reset"):
            metric.reset()
    parts: list[Any] = []
    with torch.no_grad():
        for inputs, targets in batches:
            given = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
            outputs = apply(params, *given)
            for metric in streams.values():
                metric.update(outputs, targets)
            if len(streams) < len(metrics) or not parts:
                parts.append((outputs, targets))
        if not parts:
            raise ValueError("evaluate: batches: expected at least one, got none")
        outputs, targets = tree.map(lambda *found: torch.cat(found), *parts)
        return {
            name: metric.compute() if name in streams else metric(outputs, targets)
            for name, metric in metrics.items()
        }


def plain(value: Any) -> Any:
    """A score as JSON can say it: numbers, lists of numbers, and dicts for named tuples."""
    if isinstance(value, Tensor):
        return value.detach().cpu().tolist()
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: plain(one) for name, one in value._asdict().items()}
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(one) for one in value]
    return value.item() if hasattr(value, "item") else value

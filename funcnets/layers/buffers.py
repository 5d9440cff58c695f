"""New buffers on their way out: what lets one function serve inference and training.

A layer without running statistics returns its outputs. One that has them returns its outputs at
inference and ``(outputs, new buffers)`` with ``train=True``. A function made of several layers
calls them by `with_buffers`, which gives a pair in both modes, and ends with `finish`:

    def block(params, x, *, train=False):
        new = {}
        x = layers.conv(params["conv1"], x)
        x, new["bn1"] = layers.with_buffers(layers.batch_norm, params["bn1"], x, train=train)
        return layers.finish(x.relu(), new, train)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tensordict import TensorDict

from funcnets.tree.flatten import entries, tensordict


def with_buffers(
    f: Callable[..., Any], params: Any, *inputs: Any, train: bool, **options: Any
) -> tuple[Any, TensorDict | None]:
    """The outputs of ``f`` and its new buffers, which at inference are None.

    >>> from funcnets import random
    >>> from funcnets.layers import batch_norm, init_batch_norm
    >>> import torch
    >>> params = init_batch_norm(random.key(0), 1)
    >>> with_buffers(batch_norm, params, torch.zeros(2, 1), train=False)[1] is None
    True
    """
    if train:
        outputs, buffers = f(params, *inputs, train=True, **options)
        return outputs, buffers
    return f(params, *inputs, **options), None


def finish(outputs: Any, buffers: Mapping[str, Any], train: bool) -> Any:
    """The outputs at inference; in training the pair of them and the tree of the new buffers.

    Args:
        buffers: by name, in nested mappings; those that are None or empty are left out.

    >>> finish("outputs", {}, train=False)
    'outputs'
    >>> finish("outputs", {"bn1": None}, train=True)[1].is_empty()
    True
    """
    if not train:
        return outputs
    held = _without_empty(buffers)
    return outputs, TensorDict({}) if held is None else held


def _without_empty(buffers: Mapping[str, Any]) -> TensorDict | None:
    """The tree of what there is, None where there is nothing."""
    held = {}
    for name, value in buffers.items():
        if type(value) is dict:
            value = _without_empty(value)
        if value is not None and not _empty(value):
            held[name] = value
    return tensordict(held) if held else None


def _empty(value: Any) -> bool:
    """Whether there is no tensor anywhere in the tree."""
    held = entries(value)
    return held is not None and all(map(_empty, held.values()))

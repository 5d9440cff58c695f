"""Gradient checkpointing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from funcnets import tree
from funcnets.control.closure import lift
from funcnets.control.node import Node, Tensors


def remat(f: Callable[..., Any]) -> Callable[..., Any]:
    """f, with its intermediate results computed again when its derivative needs them.

    The gradient checkpointing of Chen et al. 2016 ("Training deep nets with sublinear memory
    cost"), as ``torch.utils.checkpoint`` and ``jax.checkpoint``: only the inputs of f are kept for
    the backward pass, at the cost of a second forward pass. Same numbers, under every transform.

    Args:
        f: a pure function of trees. Its tensors may also be closed over, but not be reached
            through a global or an attribute where they are to be differentiated.

    >>> import torch
    >>> torch.func.grad(remat(lambda x: x.sin().exp()))(torch.tensor(0.0))
    tensor(1.)
    """

    @functools.wraps(f)
    def rematerialised(*args: Any, **kwargs: Any) -> Any:
        captured, build = lift(f)
        leaves, structure = tree.flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        outputs: list[Any] = []

        def flat(*flattened: Tensor) -> Tensors:
            rest = iter(flattened)
            given = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            positional, named = tree.unflatten(structure, given)
            returned, shape = tree.flatten(build(tuple(rest))(*positional, **named))
            outputs[:] = [returned, shape]
            return tuple(leaf for leaf in returned if isinstance(leaf, Tensor))

        computed = iter(Node(_run, (flat,), fixed=0)(*tensors, *captured))
        returned, shape = outputs
        return tree.unflatten(
            shape, [next(computed) if isinstance(leaf, Tensor) else leaf for leaf in returned]
        )

    return rematerialised


def _run(functions: Any, fixed: Tensors, tensors: Tensors) -> Tensors:
    # An input returned as it is would be taken for a change in place.
    return tuple(
        output.clone() if any(output is tensor for tensor in tensors) else output
        for output in functions[0](*tensors)
    )

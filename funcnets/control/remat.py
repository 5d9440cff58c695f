"""Gradient checkpointing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

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

    >>> torch.func.grad(remat(lambda x: x.sin().exp()))(torch.tensor(0.0))
    tensor(1.)
    """

    @functools.wraps(f)
    def rematerialised(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return checkpoint(f, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        tensors, build = lift((f, args, kwargs))
        outputs: list[Any] = []

        def flat(*tensors: Tensor) -> Tensors:
            again, positional, named = build(tensors)
            leaves, structure = tree.flatten(again(*positional, **named))
            outputs[:] = [leaves, structure]
            return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

        computed = iter(Node(_run, (flat,), fixed=0)(*tensors))
        leaves, structure = outputs
        return tree.unflatten(
            structure, [next(computed) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        )

    return rematerialised


def _run(functions: Any, fixed: Tensors, tensors: Tensors) -> Tensors:
    # An input returned as it is would be taken for a change in place.
    return tuple(
        output.clone() if any(output is tensor for tensor in tensors) else output
        for output in functions[0](*tensors)
    )

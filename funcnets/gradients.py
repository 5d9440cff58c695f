"""Gradients as torch.func takes them, without what only further derivatives need.

``torch.func.grad`` always keeps the graph of the backward pass, for a derivative of the derivative,
and sends every operation through its wrappers. Where nothing around asks for either, the gradients
here come from ``torch.autograd.grad`` over copies that require grad, as fast as ``backward()``.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funcnets import _torch, tree


def grad(
    f: Callable[..., Any], argnums: int | tuple[int, ...] = 0, has_aux: bool = False
) -> Callable[..., Any]:
    """The function that computes the gradient of f, as ``torch.func.grad``, but faster eager.

    The same function everywhere. Under a transform, as in ``vmap(grad(f))`` and ``grad(grad(f))``,
    and compiled it is ``torch.func.grad``; so it is where other tensors require grad, those that f
    closes over too, to which the result then stays connected. Otherwise it takes the time of
    ``backward()``, and a gradient lies in memory as its parameter does, as torch.optim's fused
    kernels take for granted.

    Args:
        f: returns a scalar tensor, or with ``has_aux`` a pair of that and any tree.
        argnums: the arguments to differentiate with respect to: trees of floating tensors.
        has_aux: whether f returns a pair.

    Returns:
        A function of the same arguments that returns the gradient, shaped as the argument (a tuple
        where ``argnums`` is one), and with ``has_aux`` the pair of that and the second output.

    >>> grad(lambda params, x: (params["w"] * x).sum())({"w": torch.ones(2)}, torch.arange(2.0))
    {'w': tensor([0., 1.])}
    """

    @functools.wraps(f)
    def gradient(*args: Any, **kwargs: Any) -> Any:
        gradients, value = _gradient_and_value(f, argnums, has_aux, args, kwargs)
        return (gradients, value[1]) if has_aux else gradients

    return gradient


def grad_and_value(
    f: Callable[..., Any], argnums: int | tuple[int, ...] = 0, has_aux: bool = False
) -> Callable[..., Any]:
    """As `grad`, with the value of f: ``(gradient, value)``, or ``(gradient, (value, aux))``.

    The order is that of ``torch.func.grad_and_value``.

    >>> grad_and_value(torch.square)(torch.tensor(3.0))
    (tensor(6.), tensor(9.))
    """

    @functools.wraps(f)
    def gradient_and_value(*args: Any, **kwargs: Any) -> Any:
        return _gradient_and_value(f, argnums, has_aux, args, kwargs)

    return gradient_and_value


def _gradient_and_value(
    f: Callable[..., Any],
    argnums: int | tuple[int, ...],
    has_aux: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Any, Any]:
    chosen = (argnums,) if isinstance(argnums, int) else argnums
    if not isinstance(chosen, tuple) or not all(isinstance(place, int) for place in chosen):
        raise TypeError(f"grad: argnums: expected an int or a tuple of ints, got {argnums!r}")
    if (found := _plain(args, kwargs, chosen)) is None:
        return torch.func.grad_and_value(f, argnums, has_aux)(*args, **kwargs)
    given = list(args)
    leaves: list[Tensor] = []
    for place, held in zip(chosen, found, strict=True):
        tracked = [leaf.detach().requires_grad_() for leaf in held]
        given[place] = tree.unflatten_like(args[place], tracked)
        leaves += tracked
    try:
        with torch.enable_grad():
            result = f(*given, **kwargs)
    except RuntimeError as error:
        if "Inference tensors" not in str(error):  # which f has closed over
            raise
        return torch.func.grad_and_value(f, argnums, has_aux)(*args, **kwargs)
    pair = isinstance(result, tuple) and len(result) == 2
    value, aux = result if has_aux and pair else (result, None)
    connected = [x for x in tree.leaves(result) if isinstance(x, Tensor) and x.requires_grad]
    if (
        pair != has_aux
        or not isinstance(value, Tensor)
        or value.ndim
        or not value.requires_grad
        or _depend_on_others(connected, leaves)
    ):
        # torch says what is wrong with it, gives zeros where it depends on no argument, and keeps
        # the graph of what else it depends on.
        return torch.func.grad_and_value(f, argnums, has_aux)(*args, **kwargs)
    raw = torch.autograd.grad(value, leaves, materialize_grads=True)
    rest = map(_torch.laid_out, raw, leaves)
    gradients = tuple(
        tree.unflatten_like(args[place], [next(rest) for _ in held])
        for place, held in zip(chosen, found, strict=True)
    )
    value = value.detach()
    if len(connected) > 1:  # the value is one of them
        aux = tree.map(_detached, aux)
    return gradients[0] if isinstance(argnums, int) else gradients, (
        (value, aux) if has_aux else value
    )


def _plain(
    args: tuple[Any, ...], kwargs: dict[str, Any], chosen: tuple[int, ...]
) -> list[list[Any]] | None:
    """The leaves of the chosen arguments, where nothing asks for more than numbers; else None."""
    if _torch.inlining() or torch.is_inference_mode_enabled():
        return None
    if not all(0 <= place < len(args) for place in chosen):
        return None
    if len(set(chosen)) < len(chosen):
        return None
    found = [tree.leaves(args[place]) for place in chosen]
    for leaf in itertools.chain(*found):
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or _asks_more(leaf):
            return None
    rest = [argument for place, argument in enumerate(args) if place not in chosen]
    if any(isinstance(x, Tensor) and _asks_more(x) for x in tree.leaves((rest, kwargs))):
        return None
    return found


def _asks_more(leaf: Tensor) -> bool:
    """Whether it requires grad, or was made in inference mode, which autograd refuses."""
    return leaf.requires_grad or leaf.is_inference()


def _depend_on_others(results: list[Tensor], leaves: list[Tensor]) -> bool:
    """Whether the graph of results has tensors that require grad besides the leaves."""
    own = set(map(id, leaves))
    if any(tensor.is_leaf and id(tensor) not in own for tensor in results):
        return True
    nodes: list[Any] = [tensor.grad_fn for tensor in results if tensor.grad_fn is not None]
    seen: set[Any] = {None, *nodes}
    for node in nodes:  # which grow on the way
        if not (inputs := node.next_functions):
            leaf = getattr(node, "variable", None)
            if leaf is not None and id(leaf) not in own:
                return True
        for function, _ in inputs:
            if function not in seen:
                seen.add(function)
                nodes.append(function)
    return False


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf

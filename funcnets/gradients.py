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

    The same function everywhere: ``grad(grad(f))``, ``jvp`` of it and compiled it is
    ``torch.func.grad``; so it is where tensors require grad, those that f closes over too, to which
    the result then stays connected. Otherwise, plainly or under a vmap over the arguments that are
    differentiated, it takes the time of ``backward()``.

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
    if (found := _plain(args, kwargs, chosen)) is None:
        return torch.func.grad_and_value(f, argnums, has_aux)(*args, **kwargs)
    given = list(args)
    leaves: list[Tensor] = []
    for place, (held, axes, structure) in zip(chosen, found, strict=True):
        with _torch.outside():
            tracked = [leaf.detach().requires_grad_() for leaf in held]
        given[place] = tree.unflatten(structure, _torch.wrapped(tracked, axes))
        leaves += tracked
    with torch.enable_grad():
        result = f(*given, **kwargs)
    pair = isinstance(result, tuple) and len(result) == 2
    value, aux = result if has_aux and pair else (result, None)
    total = _total(value)
    if pair != has_aux or total is None or _depends_on_others([total, aux], leaves):
        # torch says what is wrong with it, gives zeros where it depends on no argument, and keeps
        # the graph of what else it depends on.
        return torch.func.grad_and_value(f, argnums, has_aux)(*args, **kwargs)
    with _torch.outside():
        rest = iter(torch.autograd.grad(total, leaves, materialize_grads=True))
    gradients = tuple(
        tree.unflatten(structure, _torch.wrapped(itertools.islice(rest, len(held)), axes))
        for held, axes, structure in found
    )
    value, aux = tree.map(_detached, (value, aux))
    return gradients[0] if isinstance(argnums, int) else gradients, (
        (value, aux) if has_aux else value
    )


def _plain(
    args: tuple[Any, ...], kwargs: dict[str, Any], chosen: tuple[int, ...]
) -> list[tuple[list[Tensor], list[int | None], Any]] | None:
    """The chosen arguments, where nothing asks for more than the numbers; else None.

    Their leaves (those of all members of a vmap, and where the members' axes are), and structures.
    """
    if not _torch.at_most_one_vmap() or not all(0 <= place < len(args) for place in chosen):
        return None
    if len(set(chosen)) < len(chosen):
        return None
    found = []
    for place in chosen:
        leaves, structure = tree.flatten(args[place])
        if not all(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves):
            return None
        leaves, axes = _torch.unwrapped(leaves)
        # What all members share has a gradient for each of them, which torch.func knows to find.
        if _torch.transforming() and None in axes:
            return None
        found.append((leaves, axes, structure))
    rest = [argument for place, argument in enumerate(args) if place not in chosen]
    others = [leaf for leaf in tree.leaves((rest, kwargs)) if isinstance(leaf, Tensor)]
    others, _ = _torch.unwrapped(others)
    if any(leaf.requires_grad for leaf in itertools.chain(others, *(held for held, *_ in found))):
        return None
    return found


def _total(value: Any) -> Tensor | None:
    """A scalar, or the sum of those of all members: each depends on its own leaves alone."""
    if not isinstance(value, Tensor) or value.ndim:
        return None
    (value,), (axis,) = _torch.unwrapped([value])
    if not value.requires_grad or (axis is None and _torch.transforming()):
        return None
    with _torch.outside(), torch.enable_grad():
        return value if axis is None else value.sum()


def _depends_on_others(results: Any, leaves: list[Tensor]) -> bool:
    """Whether the graph of results has tensors that require grad besides the leaves."""
    found, _ = _torch.unwrapped([x for x in tree.leaves(results) if isinstance(x, Tensor)])
    found = [tensor for tensor in found if tensor.requires_grad]
    own, seen = set(map(id, leaves)), set()
    if any(tensor.is_leaf and id(tensor) not in own for tensor in found):
        return True
    rest = [tensor.grad_fn for tensor in found]
    while rest:
        node = rest.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if inputs := node.next_functions:
            rest += [function for function, _ in inputs]
        elif (leaf := getattr(node, "variable", None)) is not None and id(leaf) not in own:
            return True
    return False


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf

"""Low-rank adaptation (Hu et al. 2021): a small tree laid over the parameters it changes."""

from __future__ import annotations

import math
from typing import Any

from einops import einsum
from jaxtyping import Float
from tensordict import TensorDict
from torch import Tensor

from funcnets import random, tree
from funcnets.layers.initializers import lecun_normal
from funcnets.model import Model
from funcnets.optim.leafwise import as_leaf, scaled
from funcnets.tree.flatten import Path, Tree
from funcnets.tree.select import Where

Pairs = dict[Path, tuple[Tensor, Tensor]]


def init_lora(key: random.Key, params: Tree, where: Where, rank: int) -> TensorDict:
    """An overlay that adapts some of the weights, and changes nothing yet.

    A weight at a path is adapted by ``a`` [rank, inputs] and ``b`` [outputs, rank], which the
    overlay holds below that path: `apply_lora` adds ``b @ a``. A convolution's weight [out,
    in / groups, *kernel] counts as a matrix [out, rest], the packed projections of attention as one
    matrix. ``a`` is drawn from a truncated normal of variance 1 / inputs, ``b`` is zero.

    Args:
        params: of the network, frozen or not.
        where: the weights to adapt, as `funcnets.tree.matcher` takes them.
        rank: at most the smaller side of each of these matrices.

    Raises:
        ValueError: where nothing matches, a leaf is no matrix, or the rank is too large for one.

    >>> from funcnets import models
    >>> params = models.mlp(in_features=8, out_features=4).init(random.key(0))
    >>> overlay = init_lora(random.key(1), params, "*.weight", rank=2)
    >>> overlay["0", "weight", "a"].shape, overlay["0", "weight", "b"].shape
    (torch.Size([2, 8]), torch.Size([256, 2]))
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"init_lora: rank: expected an int of at least 1, got {rank!r}")
    matches = tree.matcher(where)
    chosen = [(path, leaf) for path, leaf in tree.leaves_with_path(params) if matches(path, leaf)]
    if not chosen:
        raise ValueError(f"init_lora: where: {where!r}: expected leaves that match, got none")
    for path, leaf in chosen:
        place = f"init_lora: {tree.join(path)}"
        if not isinstance(leaf, Tensor) or leaf.ndim < 2 or not leaf.is_floating_point():
            raise ValueError(
                f"{place}: expected a floating-point weight of two or more axes, "
                f"got {tree.describe(leaf)}; choose with a narrower where"
            )
        sides = _sides(leaf)
        if rank > min(sides):
            raise ValueError(
                f"{place}: rank: expected at most {min(sides)}, the smaller side of the matrix "
                f"{list(sides)}, got {rank}"
            )
    overlay: dict[str, Any] = {}
    for i, (path, leaf) in enumerate(chosen):
        outputs, inputs = _sides(leaf)
        own = random.fold_in(key, i).to(leaf.device)
        node = overlay
        for name in path:
            node = node.setdefault(name, {})
        node["a"] = lecun_normal()(own, (rank, inputs), dtype=leaf.dtype)
        node["b"] = leaf.new_zeros((outputs, rank))
    return TensorDict(overlay)


def apply_lora(params: Tree, overlay: Tree, scale: float | int | Float[Tensor, ""] = 1.0) -> Tree:
    """The parameters with ``scale * b @ a`` added to each adapted weight; the others as they are.

    Pure, so that the gradient of the overlay alone is that of a function of it, and several
    overlays over one network are a vmap over them:

        vmap(lambda one: model.apply(apply_lora(params, one), x))(overlays)

    To merge an overlay for good, keep the result. As long as ``b`` is zero it equals ``params``
    bit for bit.

    Args:
        overlay: as `init_lora` gives it; parts of it may be missing.
        scale: the paper's alpha / rank.

    Raises:
        ValueError: naming the place, where the overlay does not fit the parameters.

    >>> import torch
    >>> params = TensorDict({"weight": torch.zeros(2, 3)})
    >>> overlay = TensorDict({"weight": {"a": torch.ones(1, 3), "b": torch.ones(2, 1)}})
    >>> apply_lora(params, overlay, scale=0.5)["weight"]
    tensor([[0.5000, 0.5000, 0.5000],
            [0.5000, 0.5000, 0.5000]])
    """
    pairs = _pairs("apply_lora", params, overlay)

    def merged(path: Path, leaf: Any) -> Any:
        return leaf + _change(*pairs[path], scale, leaf) if path in pairs else leaf

    return tree.map_with_path(merged, params)


def unmerge_lora(params: Tree, overlay: Tree, scale: float | int | Float[Tensor, ""] = 1.0) -> Tree:
    """What `apply_lora` was given, from what it returned, but for the rounding of one addition.

    For the very bits, keep the tree from before: `apply_lora` leaves it as it is.

    >>> import torch
    >>> params = TensorDict({"weight": torch.zeros(2, 3)})
    >>> overlay = TensorDict({"weight": {"a": torch.ones(1, 3), "b": torch.ones(2, 1)}})
    >>> unmerge_lora(apply_lora(params, overlay), overlay)["weight"].abs().max()
    tensor(0.)
    """
    pairs = _pairs("unmerge_lora", params, overlay)

    def base(path: Path, leaf: Any) -> Any:
        return leaf - _change(*pairs[path], scale, leaf) if path in pairs else leaf

    return tree.map_with_path(base, params)


def lora(
    model: Model, where: Where, rank: int, *, scale: float | int | Float[Tensor, ""] = 1.0
) -> Model:
    """The model under an overlay: its parameters are ``{"base": ..., "lora": ...}``.

    ``make_step(lora(model, ...), loss, optimizer, trainable=["lora", "base.fc"])`` trains the
    overlay and a new head. A trained network goes under one as

        TensorDict({"base": params, "lora": init_lora(key, params, where, rank)})

    and comes out as ``apply_lora(params["base"], params["lora"], scale)``, for the model itself.

    >>> from funcnets import models
    >>> model = lora(models.mlp(in_features=8, out_features=4), "*.weight", rank=2)
    >>> sorted(model.init(random.key(0)).keys())
    ['base', 'lora']
    """

    def init(key: random.Key) -> TensorDict:
        base_key, lora_key = random.split(key).unbind()
        base = model.init(base_key)
        return TensorDict({"base": base, "lora": init_lora(lora_key, base, where, rank)})

    def apply(params: Tree, *inputs: Any, train: bool = False, **options: Any) -> Any:
        whole = apply_lora(params["base"], params["lora"], scale)
        if not train:
            return model.apply(whole, *inputs, **options)
        outputs, buffers = model.apply(whole, *inputs, train=True, **options)
        return outputs, TensorDict({"base": buffers} if tree.leaves(buffers) else {})

    return Model(init, apply, check=model.check)


def _sides(leaf: Tensor) -> tuple[int, int]:
    """Outputs and inputs of a weight as a matrix."""
    return leaf.shape[0], math.prod(leaf.shape[1:])


def _change(a: Tensor, b: Tensor, scale: float | int | Float[Tensor, ""], leaf: Tensor) -> Tensor:
    b = scaled(as_leaf(scale if isinstance(scale, Tensor) else float(scale), b), b)
    return einsum(b, a, "outputs rank, rank inputs -> outputs inputs").reshape(leaf.shape)


def _pairs(name: str, params: Tree, overlay: Tree) -> Pairs:
    """The adapted weights' paths, each with its ``a`` and ``b``; raises where they do not fit."""
    found: dict[Path, dict[str, Tensor]] = {}
    for path, leaf in tree.leaves_with_path(overlay):
        found.setdefault(path[:-1], {})[path[-1]] = leaf
    leaves = dict(tree.leaves_with_path(params))
    pairs: Pairs = {}
    for path, pair in found.items():
        place = f"{name}: overlay: {tree.join(path)}"
        if pair.keys() != {"a", "b"}:
            raise ValueError(f"{place}: expected a and b, got {', '.join(sorted(pair))}")
        if path not in leaves:
            raise ValueError(f"{place}: expected a weight there to adapt, found none in the params")
        a, b, leaf = pair["a"], pair["b"], leaves[path]
        if (
            leaf.ndim < 2
            or a.ndim != 2
            or b.shape != (leaf.shape[0], a.shape[0])
            or (a.shape[1] != _sides(leaf)[1])
        ):
            raise ValueError(
                f"{place}: expected a [rank, inputs] and b [outputs, rank] for the weight "
                f"{list(leaf.shape)}, got a {list(a.shape)} and b {list(b.shape)}"
            )
        if a.dtype != leaf.dtype or b.dtype != leaf.dtype:
            raise ValueError(
                f"{place}: expected {tree.describe(leaf)} in its dtype, "
                f"got a {tree.describe(a)} and b {tree.describe(b)}"
            )
        pairs[path] = a, b
    return pairs

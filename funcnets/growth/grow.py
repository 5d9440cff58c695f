"""Networks grown wider and deeper without a change of what they compute (Net2Net).

What is learned is kept, and training goes on (Chen et al. 2016). A unit is doubled by giving both
copies its incoming weights, and dividing its outgoing weights between them; a layer is added that
begins as the identity.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from funcnets import random, tree
from funcnets.growth import cnn, mlp, resnet
from funcnets.growth.family import Axes, Family
from funcnets.model import Model, check_parameters, specs_of

FAMILIES: dict[str, Family] = {"mlp": mlp.FAMILY, "cnn": cnn.FAMILY, "resnet": resnet.FAMILY}


def grow(model: Model, params: Any, bigger: Model, key: random.Key) -> Any:
    """The parameters of a wider or deeper network that computes what this one does.

    At inference the outputs are the same but for rounding. In training they are, too, where no
    dropout draws and no batch norm was added (a batch norm that is the identity at inference
    normalises by its batch in training; residual networks have none).

    - ``mlp``: hidden layers may be wider, and more may follow the last one.
    - ``cnn``: blocks may be wider, and have more convolutions; their number stays.
    - ``resnet``: stages may have more blocks, the network may be wider (without groups).

    All else in the configurations must be the same. New units share the outgoing weights of the
    unit that they copy in random proportions, so that their gradients differ from the start.

    Args:
        model: made by one of the constructors above.
        params: its parameters, with their buffers.
        bigger: made by the same constructor.
        key: draws which units are copied, what the new residual blocks begin with, and how outgoing
            weights are divided.

    Raises:
        ValueError: where the parameters are not the model's, or the bigger network is no growth of
            it; it says why.

    >>> from funcnets import models
    >>> small, big = models.mlp(4, 2, (8,)), models.mlp(4, 2, (16, 32))
    >>> params = small.init(random.key(0))
    >>> grown = grow(small, params, big, random.key(1))
    >>> x = torch.ones(3, 4)
    >>> torch.allclose(big.apply(grown, x), small.apply(params, x), atol=1e-6)
    True
    """
    family = FAMILIES.get(model.family or "")
    if family is None or bigger.family != model.family:
        raise ValueError(
            f"grow: expected two models of one family among {', '.join(FAMILIES)}, "
            f"got {model.family} and {bigger.family}"
        )
    check_parameters(params, specs_of(model.init))
    old, new = model.config, bigger.config
    for field in dataclasses.fields(old):
        before, after = getattr(old, field.name), getattr(new, field.name)
        if field.name not in family.fields and before != after:
            raise ValueError(
                f"grow: {model.family}: {field.name}: expected {before!r} as before, got {after!r}"
            )
    deeper = family.deeper(old, new)
    before, after = family.sizes(deeper), family.sizes(new)
    for group, size in before.items():
        if after[group] < size:
            raise ValueError(
                f"grow: {model.family}: {group}: expected {size} units or more, got {after[group]}"
            )
    deep_key, wide_key = random.split(key)
    dtype = next(leaf.dtype for leaf in tree.leaves(params) if leaf.is_floating_point())
    params = family.add(params, tree.cast(family.init(deep_key, deeper), dtype))
    return _widen(params, family.axes(deeper), before, after, wide_key)


def _widen(
    params: Any,
    axes: dict[str, Axes],
    before: dict[str, int],
    after: dict[str, int],
    key: random.Key,
) -> Any:
    copies: dict[str, tuple[Tensor, Tensor]] = {}
    for place, (group, size) in enumerate(before.items()):
        copies[group] = _copies(random.fold_in(key, place), size, after[group])

    def widened(path: tuple[str, ...], leaf: Tensor) -> Tensor:
        for axis, group in enumerate(axes.get(".".join(path), ())):
            if group is None:
                continue
            origin, share = copies[group]
            leaf = leaf.index_select(axis, origin)
            if axis == 1:
                leaf = leaf * share.to(leaf.dtype).reshape(-1, *(1,) * (leaf.ndim - 2))
        return leaf

    return tree.map_with_path(widened, params)


def _copies(key: random.Key, before: int, after: int) -> tuple[Tensor, Tensor]:
    """The old unit that each new one copies, and its share of that unit's outgoing weights."""
    choice_key, share_key = random.split(key)
    added = random.randint(choice_key, (after - before,), 0, before)
    origin = torch.cat([torch.arange(before, device=key.device), added])
    part = random.uniform(share_key, (after,), 0.5, 1.5, dtype=torch.float64)
    zeros = torch.zeros(before, dtype=part.dtype, device=key.device)
    total = zeros.index_add(0, origin, part)
    # Exactly one where nothing was copied.
    count = zeros.index_add(0, origin, torch.ones_like(part))[origin]
    return origin, torch.where(count == 1, 1.0, part / total[origin])

"""Averages of weights: one network from many (model soups, Wortsman et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnets import tree
from funcnets.ensembles.chunks import chunked
from funcnets.tree.flatten import Tree


class Soup(NamedTuple):
    """A network of averaged weights, and whether that helped.

    Attributes:
        params: the averages.
        members: whose they are, the best first.
        score: of the averages.
        alone: of every member alone; the best of them is never above ``score``.
    """

    params: Tree
    members: tuple[int, ...]
    score: float
    alone: tuple[float, ...]


def uniform_soup(params: Tree) -> Tree:
    """The mean of the weights of all members.

    It is good where the members share most of their training (fine-tuned from the same weights,
    say); members trained from different initial values have little in common to average. Score it
    beside the members, or take `greedy_soup`, which never falls behind them.

    Args:
        params: of an ensemble; all leaves [members, ...]. Leaves that are not floating-point, such
            as counters, are those of the first.

    >>> uniform_soup({"weight": torch.tensor([[1.0], [3.0]])})
    {'weight': tensor([2.])}
    """
    return _average(tree.unstack(params))


def greedy_soup(
    params: Tree,
    score: Callable[[Tree], Tensor],
    refresh: Callable[[Tree], Tree] | None = None,
    chunk: int | None = None,
) -> Soup:
    """The mean of the weights of those members that, one by one from the best on, help.

    Args:
        params: of an ensemble; all leaves [members, ...].
        score: of a network on samples that it was not trained on, a tensor of shape [], higher
            where better; it is called under vmap, too. A member whose score is not a number is
            left out.
        refresh: from averaged parameters to such with new buffers; see `refresh_buffers`.
        chunk: how many members are scored at once, by default all.

    Raises:
        ValueError: where a leaf has no axis of members, or no member's score is a number.

    >>> soup = greedy_soup({"w": torch.tensor([0.0, 3.0, 9.0])}, lambda p: -(p["w"] - 2).abs())
    >>> soup.params, soup.members, soup.score, soup.alone
    ({'w': tensor(1.5000)}, (1, 0), -0.5, (-2.0, -1.0, -7.0))
    """
    each = tree.unstack(params)
    found = chunked(score, chunk)(params)
    found = torch.where(found.isnan(), -torch.inf, found)
    alone = tuple(found.tolist())
    ranked = found.argsort(descending=True, stable=True).tolist()
    order = [member for member in ranked if alone[member] > -math.inf]
    if not order:
        raise ValueError("greedy_soup: expected a score that is a number, got none")
    members, best = order[:1], alone[order[0]]
    soup = each[members[0]]
    for member in order[1:]:
        tried = _average([each[taken] for taken in (*members, member)])
        tried = tried if refresh is None else refresh(tried)
        reached = float(score(tried))
        if reached >= best:
            members, best, soup = [*members, member], reached, tried
    return Soup(soup, tuple(members), best, alone)


def refresh_buffers(
    apply: Callable[..., Any], params: Tree, batches: Iterable[Any], key: Tensor | None = None
) -> Tree:
    """The parameters with running statistics as the mean of those of batches: for averaged weights.

    As `torch.optim.swa_utils.update_bn`. Without buffers the parameters are returned as they are.

    Args:
        apply: of the model.
        batches: of inputs, or tuples of inputs.
        key: for the random draws of training; without them there is no need of one.

    Raises:
        ValueError: where there is no batch.

    >>> from funcnets import models, random
    >>> model = models.mlp(1, 1, (2,), norm="batch")
    >>> params = model.init(random.key(0))
    >>> params = refresh_buffers(model.apply, params, [torch.zeros(4, 1), torch.ones(4, 1)])
    >>> mean = params["0", "weight"][:, 0] / 2 + params["0", "bias"]
    >>> torch.allclose(params["1", "running_mean"], mean)
    True
    """
    trained, buffers = tree.partition(params)
    if not tree.leaves(buffers):
        return params
    zeros = tree.map(torch.zeros_like, buffers)
    ones = tree.map(torch.ones_like, buffers)
    total, weight, count = zeros, None, 0

    def after(batch: Any, before: Tree) -> Tree:
        inputs = batch if isinstance(batch, tuple) else (batch,)
        return apply(tree.merge(trained, before), *inputs, train=True, key=key)[1]

    for batch in batches:
        found = after(batch, zeros)
        if weight is None:  # that of a batch in the running mean: new = old + weight (batch - old)
            weight = tree.map(lambda one, zero: 1 - (one - zero), after(batch, ones), found)
        total = tree.map(torch.add, total, found)
        count += 1
    if weight is None:
        raise ValueError("refresh_buffers: batches: expected at least one, got none")
    fresh = tree.map(
        lambda new, share, old: torch.where(share != 0, new / (share * count), old),
        *(total, weight, buffers),
    )
    return tree.merge(trained, fresh)


def _average(members: list[Tree]) -> Tree:
    def mean(*leaves: Tensor) -> Tensor:
        return torch.stack(leaves).mean(0) if leaves[0].is_floating_point() else leaves[0]

    return tree.map(mean, *members)

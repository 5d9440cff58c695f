"""Soups of weights: means, those that help, and the running statistics that belong to them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import nn
from torch.func import vmap
from torch.optim.swa_utils import update_bn

from funcnets import ensembles, layers, models, random, tree


@given(st.integers(0, 99), st.integers(1, 5))
def test_uniform_soup_is_the_mean(seed, members):
    model = models.mlp(3, 2, (members,))  # as wide as there are members: axes not to be mixed up
    params = vmap(model.init)(random.split(random.key(seed), members))
    soup = ensembles.uniform_soup(params)
    assert soup.batch_size == ()
    tree.check(soup, model.init(random.key(0)))
    for path, leaf in tree.leaves_with_path(soup):
        torch.testing.assert_close(leaf, params[path].mean(0))


@given(st.integers(0, 99))
def test_greedy_soup_is_never_worse_than_its_best_member(seed):
    points = random.normal(random.key(seed), (5, 3), dtype=torch.float64)
    params = TensorDict({"w": points}, batch_size=[5])

    def score(params):
        return -params["w"].square().sum()

    soup = ensembles.greedy_soup(params, score, chunk=2)
    assert soup.score == float(score(soup.params))
    assert soup.score >= max(soup.alone)
    assert soup.alone[soup.members[0]] == max(soup.alone)
    torch.testing.assert_close(soup.params["w"], points[list(soup.members)].mean(0))
    # In order of their scores each member was tried, and taken where it helped.
    taken = []
    for member in sorted(range(5), key=lambda member: -soup.alone[member]):
        tried = points[[*taken, member]].mean(0)
        if not taken or -tried.square().sum() >= -points[taken].mean(0).square().sum():
            taken.append(member)
    assert tuple(taken) == soup.members


def test_members_that_diverged_stay_out():
    params = {"w": torch.tensor([torch.nan, 1.0, torch.nan, -1.0])}
    soup = ensembles.greedy_soup(params, lambda params: -params["w"].abs())
    assert soup.members == (1, 3)
    assert soup.params["w"] == 0
    with pytest.raises(ValueError, match="expected a score that is a number, got none"):
        ensembles.greedy_soup({"w": torch.full((2,), torch.nan)}, lambda params: params["w"])


def test_refreshed_statistics_are_those_of_update_bn():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(
            *(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Identity(), nn.Linear(3, 2))
        ).double()
    model = models.mlp(4, 2, (3,), norm="batch")
    params = tree.from_module(module)
    assert set(params.keys()) == {"0", "1", "4"}
    module[1].running_var.fill_(7.0)
    batches = list(random.normal(random.key(0), (3, 8, 4), dtype=torch.float64).unbind())
    update_bn(batches, module)
    found = ensembles.refresh_buffers(model.apply, params, batches)
    for one, other in zip(
        tree.leaves(found["1"]), tree.leaves(tree.from_module(module)["1"]), strict=True
    ):
        torch.testing.assert_close(one, other)
    assert torch.equal(found["0", "weight"], params["0", "weight"])
    with pytest.raises(ValueError, match="batches: expected at least one, got none"):
        ensembles.refresh_buffers(model.apply, params, [])
    plain = models.mlp(4, 2, (3,))
    params = plain.init(random.key(0))
    assert ensembles.refresh_buffers(plain.apply, params, []) is params


def test_a_soup_with_batch_norm_is_scored_with_its_own_statistics():
    model = models.mlp(4, 2, (3,), norm="batch")
    params = vmap(model.init)(random.split(random.key(1), 3))
    x = random.normal(random.key(0), (32, 4))
    calls = []

    def refresh(params):
        calls.append(params)
        return ensembles.refresh_buffers(model.apply, params, [x])

    def score(params):
        return layers.linear(params["0"], x).mean() * 0 - params["1", "running_var"].sum()

    soup = ensembles.greedy_soup(params, score, refresh)
    assert len(calls) == 2
    assert soup.score >= max(soup.alone)

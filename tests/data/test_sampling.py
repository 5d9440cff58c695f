"""Draws by weight, with replacement, and folds: their laws, and their errors."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap

from funcnets import data, random

SEEDS = st.integers(0, 999)
WEIGHTS = torch.tensor([0.0, 1.0, 4.0, 0.0, 5.0, 0.0])


def test_drawn_in_proportion_to_the_weights():
    drawn = torch.cat(data.weighted_batches(random.key(0), WEIGHTS, 20_000, 1000))
    share = drawn.bincount(minlength=6) / len(drawn)
    expected = WEIGHTS / WEIGHTS.sum()
    assert (share[WEIGHTS == 0] == 0).all()
    assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / 20_000).sqrt()).all()


def test_without_replacement_each_once_and_the_heavy_first():
    keys = random.split(random.key(0), 4000)
    draw = partial(data.weighted_batches, weights=WEIGHTS, num=3, batch_size=3, replacement=False)
    drawn = vmap(draw)(keys)[0]
    assert (drawn.sort(1).values == torch.tensor([1, 2, 4])).all()
    # The first by weight; the second by weight of those left, (1, 4 and 5 of 10).
    for number, weight in ((1, 0.1), (2, 0.4), (4, 0.5)):
        found = (drawn[:, 0] == number).double().mean()
        assert abs(found - weight) < 5 * (weight * (1 - weight) / 4000) ** 0.5
    after = drawn[drawn[:, 0] == 4]
    assert abs((after[:, 1] == 2).double().mean() - 0.8) < 5 * (0.16 / len(after)) ** 0.5


@given(st.integers(1, 30), SEEDS)
def test_bootstrap_and_what_it_leaves_out(n, seed):
    sample = data.bootstrap(random.key(seed), n)
    assert sample.shape == (n,)
    left = data.out_of_bag(sample)
    assert set(left.nonzero().flatten().tolist()) == set(range(n)) - set(sample.tolist())


def test_bootstrap_under_vmap():
    keys = random.split(random.key(1), 300)
    samples = vmap(lambda key: data.bootstrap(key, 50))(keys)
    assert torch.equal(samples[7], data.bootstrap(keys[7], 50))
    left = vmap(data.out_of_bag)(samples)
    assert torch.equal(left[7], data.out_of_bag(samples[7]))
    assert abs(left.double().mean() - 0.98**50) < 0.01
    share = samples.flatten().bincount() / samples.numel()
    assert (share - 0.02).abs().max() < 5 * (0.02 * 0.98 / samples.numel()) ** 0.5


@given(
    st.lists(st.integers(3, 9), min_size=1, max_size=4),
    st.integers(2, 3),
    SEEDS,
)
def test_folds_are_stratified(counts, num, seed):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[random.permutation(random.key(seed), len(labels))]
    fold = data.folds(random.key(seed), data.group(labels), num)
    sizes = fold.bincount(minlength=num)
    assert sizes.max() - sizes.min() <= 1
    for label, count in enumerate(counts):
        held = fold[labels == label].bincount(minlength=num)
        assert held.sum() == count
        assert held.max() - held.min() <= 1


def test_folds_by_key():
    groups = data.group(torch.arange(40) % 2)
    keys = random.split(random.key(0), 3)
    together = vmap(lambda key: data.folds(key, groups, 4))(keys)
    assert torch.equal(together[1], data.folds(keys[1], groups, 4))
    assert not torch.equal(together[0], together[1])


def test_errors(unchecked):
    key, groups = random.key(0), data.group(torch.tensor([0, 0, 0, 1, 1]))
    draw = data.weighted_batches
    for call, message in (
        (lambda: draw(key, torch.ones(2, 2), 3, 1), "weights: expected numbers [samples], got fl"),
        (lambda: draw(key, torch.zeros(2), 3, 1), "finite numbers of at least zero, 1 or more"),
        (lambda: draw(key, torch.tensor([1.0, -1.0, 3.0]), 3, 1), "finite numbers of at least ze"),
        (lambda: draw(key, torch.tensor([1.0, torch.nan]), 3, 1), "finite numbers of at least ze"),
        (lambda: draw(key, WEIGHTS, 4, 1, replacement=False), "4 or more of them positive, got 3"),
        (lambda: data.bootstrap(key, 0), "bootstrap: expected at least one sample, got 0"),
        (lambda: data.folds(key, groups, 1), "folds: num: expected at least 2, got 1"),
        (lambda: data.folds(key, groups, 3), "at least 3 samples of every class, one for each fo"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()

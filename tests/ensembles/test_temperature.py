"""Temperatures: where the likelihood is highest, found by scipy as well."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize
from torch.func import vmap

from funcnets import ensembles, losses, random


def sample(seed, count=60, classes=3, scale=1.0):
    first, second = random.split(random.key(seed))
    logits = random.normal(first, (count, classes), dtype=torch.float64)
    labels = random.categorical(second, (count,), logits)
    return logits * scale, labels


@given(st.integers(0, 99), st.sampled_from([0.2, 1.0, 5.0, 30.0]))
def test_the_best_there_is(seed, scale):
    logits, labels = sample(seed, scale=scale)

    def nll(log_t):
        return float(F.cross_entropy(logits / torch.as_tensor(log_t).exp(), labels))

    found = ensembles.fit_temperature(logits, labels)
    best = optimize.minimize_scalar(nll, bounds=(-4.6, 4.6), method="bounded")
    assert nll(found.log()) <= best.fun + 1e-9
    if abs(best.x) < 4:
        torch.testing.assert_close(found.log(), torch.tensor(best.x).double(), atol=1e-3, rtol=0)


def test_the_temperature_that_was_put_in():
    logits, labels = sample(0, count=20_000, scale=4.0)
    assert abs(ensembles.fit_temperature(logits, labels) - 4) < 0.15


def test_bounds_and_impossible_classes():
    logits = torch.tensor([[3.0, 0.0], [0.0, 3.0]])
    right, wrong = torch.tensor([0, 1]), torch.tensor([1, 0])
    assert 0.01 <= ensembles.fit_temperature(logits, right) < 0.1
    torch.testing.assert_close(ensembles.fit_temperature(logits, wrong), torch.tensor(100.0))
    logits = torch.tensor([[3.0, 0.0, -torch.inf], [1.0, 3.0, -torch.inf], [2.0, 0.0, -torch.inf]])
    found = ensembles.fit_temperature(logits, torch.tensor([0, 1, 1]))
    expected = ensembles.fit_temperature(logits[:, :2], torch.tensor([0, 1, 1]))
    torch.testing.assert_close(found, expected)
    assert ensembles.fit_temperature(logits, torch.tensor([0, 1, 2])).isfinite()


def test_for_each_member_and_for_the_ensemble():
    logits = torch.stack([sample(seed, scale=seed + 1.0)[0] for seed in range(3)])
    labels = sample(0)[1]
    each = vmap(ensembles.fit_temperature, (0, None))(logits, labels)
    for one, member in zip(each, logits, strict=True):
        torch.testing.assert_close(one, ensembles.fit_temperature(member, labels))
    together = losses.ensemble_log_probabilities(logits)
    scaled = together / ensembles.fit_temperature(together, labels)
    assert F.cross_entropy(scaled, labels) <= F.nll_loss(together, labels)


def test_errors(unchecked):
    for logits, labels, message in (
        (
            torch.zeros(3, 2),
            torch.zeros(2).long(),
            "expected logits [..., classes] and labels [...",
        ),
        (torch.zeros(0, 2), torch.zeros(0).long(), "at least one, got float32[0, 2]"),
        (torch.zeros(2, 2), torch.tensor([0, 2]), "labels: expected 0 to 1, got 0 to 2"),
        (torch.zeros(2, 2).long(), torch.tensor([0, 1]), "floats as logits and integers as labels"),
        (torch.zeros(2, 2), torch.zeros(2), "integers as labels, got float32[2, 2] and float32[2]"),
        (torch.full((2, 2), torch.nan), torch.tensor([0, 1]), "logits: expected numbers, got nan"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            ensembles.fit_temperature(logits, labels)

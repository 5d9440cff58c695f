"""Predictions of ensembles: as written down in a loop over members, samples and classes."""

from __future__ import annotations

import itertools
import math
import re
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap

from funcnets import ensembles, losses, random

SHAPES = st.tuples(st.integers(2, 4), st.integers(1, 3), st.integers(1, 4))


def draw(shape, seed):
    return 3 * random.normal(random.key(seed), shape, dtype=torch.float64)


def of(probabilities):
    return -sum(p * math.log(p) for p in probabilities if p)


@given(SHAPES, st.integers(0, 99))
def test_as_in_a_loop(shape, seed):
    logits = draw(shape, seed)
    members, batch, classes = shape
    p = logits.softmax(-1).tolist()
    for i in range(batch):
        each = [p[m][i] for m in range(members)]
        mean = [sum(one[c] for one in each) / members for c in range(classes)]
        expected = {
            "mean": mean,
            "variance": [
                sum((one[c] - mean[c]) ** 2 for one in each) / members for c in range(classes)
            ],
            "entropy": of(mean),
            "expected_entropy": sum(map(of, each)) / members,
            "mutual_information": of(mean) - sum(map(of, each)) / members,
        }
        pairs = list(itertools.combinations([one.index(max(one)) for one in each], 2))
        expected["disagreement"] = sum(a != b for a, b in pairs) / len(pairs)
        for name, value in expected.items():
            found = getattr(ensembles, name)(logits)[i]
            expected_value = torch.tensor(value, dtype=torch.float64)
            torch.testing.assert_close(found, expected_value, atol=1e-9, rtol=1e-6)
    log = losses.ensemble_log_probabilities(logits)
    torch.testing.assert_close(ensembles.mean(logits), log.exp())


NAMES = ["mean", "variance", "entropy", "expected_entropy", "mutual_information", "disagreement"]


@pytest.mark.parametrize("name", NAMES)
def test_impossible_classes_and_more_axes(name):
    f = getattr(ensembles, name)
    logits = draw((3, 2, 5, 4), 0)
    logits[:, :, :, 2] = -torch.inf
    logits[0, 0, 0] = torch.tensor([0, -torch.inf, -torch.inf, -torch.inf])
    found = f(logits)
    assert found.isfinite().all()
    assert found.shape[:2] == (2, 5)
    torch.testing.assert_close(vmap(f, in_dims=1)(logits), found)


def test_weights_of_members():
    logits = draw((3, 2, 4), 0)
    weights = torch.tensor([0.25, 0.0, 0.75])
    logits[1] = torch.nan  # a member that diverged, and is not taken
    expected = logits[0].softmax(-1) * 0.25 + logits[2].softmax(-1) * 0.75
    torch.testing.assert_close(ensembles.mean(logits, weights), expected)
    with warnings.catch_warnings(action="error"):  # learned by backward()
        learned = ensembles.mean(logits, weights.requires_grad_())
    torch.testing.assert_close(learned, expected)


@pytest.mark.parametrize("name", NAMES)
def test_errors(name, unchecked):
    message = f"{name}: logits: expected [members, ..., classes], got float32[3]"
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(ensembles, name)(torch.zeros(3))


def test_other_errors(unchecked):
    with pytest.raises(ValueError, match="expected 2 or more members, got 1"):
        ensembles.disagreement(torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match=re.escape("mean: weights: expected [3] (as the members)")):
        ensembles.mean(torch.zeros(3, 2, 2), torch.ones(2))
    for weights in ([1.0, 1.0], [1.5, -0.5], [torch.nan, 1.0]):
        with pytest.raises(ValueError, match="weights: expected none below 0 and a sum of 1, got"):
            ensembles.mean(torch.zeros(2, 2, 2), torch.tensor(weights))

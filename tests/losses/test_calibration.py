"""Losses against their definitions, written out in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, vmap

from funcnets import losses, random


def logits_of(seed, shape, scale=1.0):
    return scale * random.normal(random.key(seed), shape, dtype=torch.float64)


def labels_of(seed, shape, classes):
    return random.randint(random.fold_in(random.key(seed), 1), shape, 0, classes)


SEEDS = st.integers(0, 999)


@given(
    seed=SEEDS,
    members=st.integers(1, 5),
    batch=st.lists(st.integers(1, 4), max_size=2),
    classes=st.integers(1, 6),
)
def test_ensemble_is_the_mean_of_probabilities(seed, members, batch, classes):
    logits = logits_of(seed, [members, *batch, classes])
    exponentials = np.exp(logits.numpy())
    mean = (exponentials / exponentials.sum(-1, keepdims=True)).mean(0)
    found = losses.ensemble_log_probabilities(logits)
    np.testing.assert_allclose(found.numpy(), np.log(mean), rtol=1e-9, atol=1e-12)


@given(seed=SEEDS, members=st.integers(1, 5))
def test_ensemble_is_no_worse_than_its_members_on_average(seed, members):
    """Jensen's inequality; and equal members are as good as one."""
    logits = logits_of(seed, (members, 7, 4), 3.0)
    labels = labels_of(seed, (7,), 4)
    together = F.nll_loss(losses.ensemble_log_probabilities(logits), labels)
    alone = vmap(F.cross_entropy, in_dims=(0, None))(logits, labels)
    assert together <= alone.mean() + 1e-12
    same = losses.ensemble_log_probabilities(logits[:1].expand(members, -1, -1))
    torch.testing.assert_close(F.nll_loss(same, labels), alone[0])


def test_ensemble_of_very_small_probabilities():
    logits = torch.tensor([[[0.0, -1000.0]], [[0.0, -1000.0]]], dtype=torch.float64)
    found = losses.ensemble_log_probabilities(logits)
    torch.testing.assert_close(found, torch.tensor([[0.0, -1000.0]], dtype=torch.float64))
    slope = grad(lambda x: losses.ensemble_log_probabilities(x)[0, 1])(logits)
    torch.testing.assert_close(slope[:, 0, 1], torch.full((2,), 0.5, dtype=torch.float64))


def calibration_by_hand(probabilities, labels, bins):
    """Equation 3 of Guo et al. 2017, bin by bin."""
    confidence = probabilities.max(-1)
    correct = probabilities.argmax(-1) == labels
    error = 0.0
    for number in range(bins):
        inside = (confidence > number / bins) & (confidence <= (number + 1) / bins)
        if inside.any():
            gap = abs(correct[inside].mean() - confidence[inside].mean())
            error += inside.sum() / len(labels) * gap
    return error


@given(
    seed=SEEDS,
    samples=st.integers(1, 40),
    classes=st.integers(1, 5),
    bins=st.integers(1, 20),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
)
def test_calibration_by_hand(seed, samples, classes, bins, scale):
    probabilities = logits_of(seed, (samples, classes), scale).softmax(-1)
    labels = labels_of(seed, (samples,), classes)
    found = losses.expected_calibration_error(probabilities, labels, bins)
    expected = calibration_by_hand(probabilities.numpy(), labels.numpy(), bins)
    np.testing.assert_allclose(float(found), expected, rtol=1e-9, atol=1e-12)
    assert 0 <= found <= 1


def test_calibration_at_the_edges_of_the_bins():
    """Of four, the third holds 5/8 and its upper edge 3/4, and the fourth holds 7/8 and 1."""
    probabilities = torch.tensor([[0.375, 0.625], [0.25, 0.75], [0.125, 0.875], [0.0, 1.0]])
    labels = torch.tensor([1, 0, 1, 0])  # the first and the third are right
    found = losses.expected_calibration_error(probabilities, labels, bins=4)
    torch.testing.assert_close(found, torch.tensor((abs(0.625 + 0.75 - 1) + (0.875 + 1 - 1)) / 4))
    # In one bin all differences are taken together.
    found = losses.expected_calibration_error(probabilities, labels, bins=1)
    torch.testing.assert_close(found, torch.tensor((0.625 + 0.75 + 0.875 + 1 - 2) / 4))


def test_calibration_of_members_and_of_samples_in_any_shape():
    probabilities = logits_of(0, (3, 4, 5, 2)).softmax(-1)
    labels = labels_of(0, (4, 5), 2)
    found = vmap(losses.expected_calibration_error, in_dims=(0, None))(probabilities, labels)
    for member, error in zip(probabilities, found, strict=True):
        flat = losses.expected_calibration_error(member.reshape(20, 2), labels.reshape(20))
        torch.testing.assert_close(error, flat)
    slopes = vmap(grad(losses.expected_calibration_error), in_dims=(0, None))(probabilities, labels)
    assert slopes.shape == probabilities.shape
    assert slopes.isfinite().all()


@pytest.mark.dynamo
def test_compiled():
    probabilities, labels = logits_of(0, (6, 3)).softmax(-1), labels_of(0, (6,), 3)
    for function, arguments in (
        (losses.expected_calibration_error, (probabilities, labels)),
        (losses.ensemble_log_probabilities, (probabilities,)),
    ):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*arguments), function(*arguments))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: losses.expected_calibration_error(torch.ones(0), torch.zeros(0).long()),
            r"labels: expected \[\] \(as probabilities without the classes\), got \[0\]",
        ),
        (
            lambda: losses.expected_calibration_error(torch.ones(4, 2), torch.zeros(3).long()),
            r"labels: expected \[4\] .* got \[3\]",
        ),
        (
            lambda: losses.expected_calibration_error(torch.ones(0, 2), torch.zeros(0).long()),
            "expected at least one, got none",
        ),
        (
            lambda: losses.expected_calibration_error(torch.ones(1, 2), torch.zeros(1).long(), 0),
            "bins: expected at least 1, got 0",
        ),
        (
            lambda: losses.ensemble_log_probabilities(torch.ones(0, 3, 2)),
            r"logits: expected \[members, ..., classes\], got float32\[0, 3, 2\]",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()

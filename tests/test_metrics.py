"""Verification against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve
from torch.func import vmap

from funcnets import metrics, random


@st.composite
def pairs(draw):
    """Distances, with equal ones among them, and which pairs are similar: some of either kind."""
    n = draw(st.integers(2, 30))
    key = random.key(draw(st.integers(0, 999)))
    steps = draw(st.sampled_from([3, 10, 10**6]))
    distances = random.randint(key, (n,), 0, steps).to(torch.float64) / steps
    similar = random.bernoulli(random.fold_in(key, 1), (n,))
    similar[0], similar[-1] = True, False
    return distances, similar


@given(pairs())
def test_curve_is_scikit_learns(case):
    distances, similar = case
    curve = metrics.roc(distances, similar)
    fpr, tpr, thresholds = roc_curve(similar, -distances, drop_intermediate=False)
    assert len(curve.thresholds) == len(distances) + 1
    points = np.unique(torch.stack(curve[:3], 1).numpy(), axis=0)
    expected = np.stack([-thresholds, fpr, tpr], 1)
    np.testing.assert_allclose(points, expected, rtol=1e-12)
    for threshold, accuracy in zip(curve.thresholds, curve.accuracy, strict=True):
        accepted = distances <= threshold
        assert accuracy == pytest.approx((accepted == similar).double().mean())
    assert metrics.area_under(curve) == pytest.approx(roc_auc_score(similar, -distances))


@given(pairs())
def test_equal_error_rate(case):
    distances, similar = case
    rate, threshold = metrics.equal_error_rate(metrics.roc(distances, similar))
    fpr, tpr, _ = roc_curve(similar, -distances)
    # Where the line from (0, 1) to (1, 0) crosses the polygon, by fine steps along it.
    along = np.linspace(0, len(fpr) - 1, 200 * (len(fpr) - 1) + 1)
    false = np.interp(along, range(len(fpr)), fpr)
    missed = 1 - np.interp(along, range(len(fpr)), tpr)
    nearest = np.abs(false - missed).argmin()
    assert rate == pytest.approx((false[nearest] + missed[nearest]) / 2, abs=0.01)
    if abs(false[nearest] - missed[nearest]) < 1e-9:
        assert rate == pytest.approx(false[nearest])
    # The threshold lies between the points on either side.
    below = distances < threshold - 1e-12
    above = distances <= distances[distances > threshold - 1e-12].min()
    rates = [(accepted & ~similar).sum() / (~similar).sum() for accepted in (below, above)]
    assert rates[0] - 1e-6 <= rate <= rates[1] + 1e-6


def test_equal_error_rate_between_points():
    """Of similar pairs at 1, 2, 3 and others at 3, 4, 5: false accept 1/3 where none is missed."""
    distances = torch.tensor([1.0, 2.0, 3.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    similar = torch.tensor([1, 1, 1, 0, 0, 0])
    rate, threshold = metrics.equal_error_rate(metrics.roc(distances, similar))
    # From (0, 1/3 missed) at 2 to (1/3, none missed) at 3: half way.
    assert (float(rate), float(threshold)) == pytest.approx((1 / 6, 2.5))


def test_perfect_and_useless():
    distances, similar = torch.tensor([0.1, 0.2, 0.8, 0.9]), torch.tensor([1, 1, 0, 0])
    curve = metrics.roc(distances, similar)
    assert metrics.equal_error_rate(curve).rate == 0
    assert metrics.best_accuracy(curve) == (1.0, torch.tensor(0.2))
    assert metrics.area_under(curve) == 1
    wrong = metrics.roc(distances, 1 - similar)
    assert metrics.equal_error_rate(wrong).rate == 1
    assert metrics.area_under(wrong) == 0
    same = metrics.roc(torch.ones(4), similar)
    assert metrics.equal_error_rate(same) == (0.5, 1.0)
    assert torch.isnan(metrics.roc(distances, torch.ones(4)).false_accept).all()


@given(pairs(), st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_thresholds(case, allowed):
    distances, similar = case
    curve = metrics.roc(distances, similar)
    accuracies = [((distances <= t) == similar).double().mean() for t in curve.thresholds]
    rate, threshold = metrics.best_accuracy(curve)
    assert rate == pytest.approx(max(accuracies))
    assert ((distances <= threshold) == similar).double().mean() == pytest.approx(rate)
    rate, threshold = metrics.true_accept_at(curve, allowed)
    accepted = distances <= threshold
    assert accepted[~similar].double().mean() <= allowed
    assert accepted[similar].double().mean() == pytest.approx(rate)
    larger = distances[distances > threshold]
    if len(larger):
        assert (distances <= larger.min())[~similar].double().mean() > allowed


def every(distances, similar):
    curve = metrics.roc(distances, similar)
    return (
        *curve,
        *metrics.equal_error_rate(curve),
        *metrics.best_accuracy(curve),
        *metrics.true_accept_at(curve, 0.2),
        metrics.area_under(curve),
    )


def test_members_at_once_are_members_alone():
    distances = random.randint(random.key(0), (3, 20), 0, 15).to(torch.float64)
    similar = random.bernoulli(random.key(1), (3, 20))
    for labels, dims in ((similar, (0, 0)), (similar[0], (0, None))):
        together = vmap(every, dims)(distances, labels)
        for i in range(3):
            expected = every(distances[i], labels if labels.ndim == 1 else labels[i])
            for found, value in zip(together, expected, strict=True):
                torch.testing.assert_close(found[i], value)


@pytest.mark.dynamo
def test_compiled():
    distances = random.uniform(random.key(0), (20,))
    similar = random.bernoulli(random.key(1), (20,))
    compiled = torch.compile(every, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(distances, similar), every(distances, similar))


@pytest.mark.parametrize(
    ("distances", "similar"),
    [(torch.ones(3), torch.ones(2)), (torch.ones(0), torch.ones(0)), (torch.ones(2, 2),) * 2],
)
def test_shapes_that_do_not_fit(distances, similar, unchecked):
    with pytest.raises(ValueError, match=r"roc: expected distances \[pairs\] and similar \[pairs"):
        metrics.roc(distances, similar)


@pytest.mark.parametrize("rate", [-0.1, 1.1])
def test_rates_that_are_none(rate):
    curve = metrics.roc(torch.tensor([0.0, 1.0]), torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="false_accept: expected a rate between 0 and 1"):
        metrics.true_accept_at(curve, rate)

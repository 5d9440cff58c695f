"""Spaces of hyperparameters: where the draws lie, and all of a grid."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from funcnets import ensembles, random
from funcnets.ensembles import Choice, LogUniform, Uniform

SPACES = {
    "a": Uniform(-1.0, 3.0),
    "b": LogUniform(1e-4, 1e-1),
    "c": Choice(8, 16),
    "d": Choice(0.5),
}


def test_draws_follow_their_laws():
    found = ensembles.draw(random.key(0), SPACES, 4000)
    assert list(found) == list(SPACES)
    assert stats.kstest(found["a"].numpy(), stats.uniform(-1, 4).cdf).pvalue > 1e-4
    assert stats.kstest(found["b"].numpy(), stats.loguniform(1e-4, 1e-1).cdf).pvalue > 1e-4
    assert abs((found["c"] == 8).double().mean() - 0.5) < 0.04
    assert found["c"].dtype == torch.int64
    assert set(found["c"].tolist()) == {8, 16}
    assert (found["d"] == 0.5).all()
    assert abs(torch.corrcoef(torch.stack([found["a"], found["b"].log()]))[0, 1]) < 0.08


@given(st.integers(1, 4))
def test_a_grid_has_every_combination_once(points):
    found = ensembles.grid(SPACES, points)
    rows = list(zip(*(values.tolist() for values in found.values()), strict=True))
    axes = [space.points(points).tolist() for space in SPACES.values()]
    assert rows == list(itertools.product(*axes))
    assert len(axes[0]) == len(axes[1]) == points
    if points > 1:
        ends = torch.tensor([axes[0][0], axes[0][-1], axes[1][0], axes[1][-1]])
        torch.testing.assert_close(ends, torch.tensor([-1.0, 3.0, 1e-4, 1e-1]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Uniform(1.0, 0.0), "Uniform: expected low <= high, got 1.0 and 0.0"),
        (lambda: LogUniform(0.0, 1.0), "LogUniform: expected 0 < low <= high, got 0.0 and 1.0"),
        (lambda: Choice(), "Choice: expected numbers, at least one, got []"),
        (lambda: Choice("relu"), "Choice: expected numbers, at least one, got ['relu']"),
        (
            lambda: ensembles.draw(random.key(0), {}, 3),
            "draw: spaces: expected at least one, got n",
        ),
        (lambda: ensembles.draw(random.key(0), SPACES, 0), "draw: expected at least 1, got 0"),
        (lambda: ensembles.grid(SPACES, 0), "grid: expected at least 1, got 0"),
    ],
)
def test_errors(call, message, unchecked):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_a_space_that_is_none(unchecked):
    with pytest.raises(
        TypeError, match="spaces: rate: expected Uniform, LogUniform or Choice, got"
    ):
        ensembles.draw(random.key(0), {"rate": (1, 2)}, 3)

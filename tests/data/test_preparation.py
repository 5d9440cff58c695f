"""Imputation and standardisation: as scikit-learn's, and by the training rows alone."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.impute import SimpleImputer
from sklearn.preprocessing import StandardScaler
from torch.func import vmap

from funcnets import data, random

SEEDS = st.integers(0, 999)
STRATEGIES = st.sampled_from(["mean", "median"])


def table(seed, rows=12, gaps=0.3):
    draw, gap = random.split(random.key(seed))
    x = random.normal(draw, (rows, 3), dtype=torch.float64) * 5 + 2
    missing = random.bernoulli(gap, x.shape, gaps)
    missing[:2] = False  # for something to be known of every column
    return torch.where(missing, torch.nan, x)


@given(SEEDS, st.integers(2, 12), STRATEGIES)
def test_as_scikit_learn(seed, rows, strategy):
    x, new = table(seed, rows), table(seed + 1)
    fitted = data.fit_imputation(x, strategy)
    theirs = SimpleImputer(strategy=strategy).fit(x.numpy())
    torch.testing.assert_close(data.impute(fitted, new), torch.from_numpy(theirs.transform(new)))
    both = data.impute(fitted, new, indicator=True)
    assert torch.equal(both[:, 3:], new.isnan().double())
    fitted = data.fit_standardisation(x)
    theirs = StandardScaler().fit(x.numpy())
    expected = torch.from_numpy(theirs.transform(new.numpy()))
    torch.testing.assert_close(data.standardise(fitted, new), expected, equal_nan=True)
    again = data.unstandardise(fitted, data.standardise(fitted, new))
    torch.testing.assert_close(again, new, equal_nan=True)


@given(SEEDS, STRATEGIES)
def test_a_mask_of_rows_is_those_rows_alone_and_vmap_takes_the_folds(seed, strategy):
    x = table(seed)
    masks = torch.arange(12) % 3 != torch.arange(3)[:, None]
    masks[:, :2] = True
    for fit in (lambda x, m: data.fit_imputation(x, strategy, m), data.fit_standardisation):
        together = vmap(fit, (None, 0))(x, masks)
        for i, mask in enumerate(masks):
            # Nothing of the other rows is looked at.
            alone = fit(x[mask], None)
            spoiled = fit(torch.where(mask[:, None], x, 1e9), mask)
            for one, two, three in zip(together, alone, spoiled, strict=True):
                torch.testing.assert_close(one[i], two)
                torch.testing.assert_close(three, two)


def test_a_column_that_does_not_vary():
    fitted = data.fit_standardisation(torch.tensor([[3.0], [3.0]]))
    assert data.standardise(fitted, torch.tensor([[3.0], [5.0]])).tolist() == [[0.0], [2.0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: data.fit_imputation(x, "mode"), "strategy: expected mean or median, got 'mode'"),
        (
            lambda x: data.fit_imputation(x[0]),
            "fit_imputation: x: expected numbers [rows, columns]",
        ),
        (
            lambda x: data.fit_imputation(torch.cat([x, x * torch.nan], 1)),
            "fit_imputation: column 3: expected a known value, got gaps alone",
        ),
        (
            lambda x: data.fit_standardisation(x, torch.zeros(12, dtype=torch.bool)),
            "fit_standardisation: column 0: expected a known value",
        ),
        (
            lambda x: data.fit_standardisation(x, torch.ones(11, dtype=torch.bool)),
            "where: expected bool[12] (as the rows), got bool[11]",
        ),
        (lambda x: data.impute(data.fit_imputation(x), x[:, :2]), "impute: x: expected [rows, 3]"),
        (
            lambda x: data.standardise(data.fit_standardisation(x), x[:, :2]),
            "standardise: x: expected [rows, 3] (as it was fitted to), got float64[12, 2]",
        ),
    ],
)
def test_errors(call, message, unchecked):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(table(0))

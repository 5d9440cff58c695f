"""scripts/tabular.py runs on real data, flags to figure, and peeks at no test sample."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from funcnets import data, ensembles, random

SCRIPT = Path(__file__).parents[2] / "scripts" / "tabular.py"
DATA = os.environ.get("FUNCNETS_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="needs water_potability.csv in FUNCNETS_DATA")
script = runpy.run_path(str(SCRIPT))


@needs_data
def test_a_short_run(tmp_path, monkeypatch, capsys):
    arguments = ["--data", f"{DATA}/water_potability.csv", "--output", str(tmp_path), "--time"]
    arguments += ["--members", "4", "--steps", "8", "--folds", "2"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    # Of the rivals those that take no time.
    rivals = script["rivals"]
    quick = lambda seed: {name: rivals(seed)[name] for name in ("majority class", "SVC")}  # noqa: E731
    monkeypatch.setitem(script["main"].__globals__, "rivals", quick)
    script["main"]()
    printed = capsys.readouterr().out
    assert "3275 samples of 9 features, 1265 of them with gaps" in printed
    for row in ("majority class", "SVC", "best setting alone", "ensemble of MLPs"):
        assert row in printed
    assert "a ratio of" in " ".join(printed.split())
    figure = (tmp_path / "tabular.png").read_bytes()
    assert figure.startswith(b"\x89PNG")
    assert len(figure) > 10_000


def test_the_rivals_are_those_of_the_issue():
    names = ["majority class", "random forest", "gradient boosting", "MLP", "SVC"]
    assert list(script["rivals"](0)) == names


def test_no_test_sample_is_looked_at():
    """What the test rows hold changes neither the search nor what is said of other rows."""
    draws, gaps = random.split(random.key(0))
    values = random.normal(draws, (60, 3))
    values = torch.where(random.bernoulli(gaps, values.shape, 0.2), torch.nan, values)
    labels = (values.nan_to_num(0).sum(1) > 0).long()
    rows, test = torch.arange(50), torch.arange(50, 60)
    flags = SimpleNamespace(members=4, steps=4)

    def run(values, labels):
        return script["one_fold"](
            *(values, labels, rows, test, flags, random.key(1)), lambda _: None
        )

    script["one_fold"].__globals__["BATCH"] = 16
    expected = run(values, labels)
    others = values.clone()
    others[51:] = 1e3
    spoiled = run(others, torch.cat([labels[:50], 1 - labels[50:]]))
    assert spoiled.found.records == expected.found.records
    assert torch.equal(spoiled.logits[:, 0], expected.logits[:, 0])


def test_auc_is_that_of_scikit_learn():
    from sklearn.metrics import roc_auc_score

    logits = random.normal(random.key(0), (40, 2))
    labels = torch.arange(40) % 3 == 0
    found = script["auc"](logits, labels.long())
    expected = roc_auc_score(labels, logits[:, 1] - logits[:, 0])
    torch.testing.assert_close(found, torch.tensor(expected).float())


def test_members_together_take_less_time_than_one_after_another():
    """A fifth is asked of 64; here of 32, with room for a machine that is busy."""
    values = random.normal(random.key(0), (256, 9))
    known = script["Samples"](values, (values[:, 0] > 0).long())
    hyper = ensembles.draw(random.key(1), script["SPACES"], 32)
    together, apart = script["time_ratio"](known, hyper, 3, random.key(2))
    assert together < 0.5 * apart


def test_preparing_looks_at_the_given_rows_alone():
    values = random.normal(random.key(0), (20, 2))
    values[3, 0] = torch.nan
    rows = torch.arange(10)
    found = script["prepare"](values, rows)
    others = values.clone()
    others[10:] *= 50
    assert torch.equal(script["prepare"](others, rows)[:10], found[:10])
    fitted = data.fit_imputation(values[rows])
    filled = data.impute(fitted, values[rows])
    torch.testing.assert_close(found[:10].mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        found[3, 1], ((filled - filled.mean(0)) / filled.std(0, correction=0))[3, 1]
    )

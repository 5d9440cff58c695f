"""scripts/forecast.py runs on real data, from its flags to its figure, and looks at no future."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torch.func import vmap

from funcnets import Model, random
from funcnets.data import Windows, windows

SCRIPT = Path(__file__).parents[2] / "scripts" / "forecast.py"
DATA = os.environ.get("FUNCNETS_DATA")
script = runpy.run_path(str(SCRIPT))


@pytest.mark.skipif(DATA is None, reason="needs ETTh1.csv in FUNCNETS_DATA")
def test_a_short_run(tmp_path, monkeypatch, capsys):
    arguments = ["--data", f"{DATA}/ETTh1.csv", "--output", str(tmp_path), "--epochs", "1"]
    arguments += ["--days", "2", "--members", "2", "--horizon", "20"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    # Batches of half the windows, or there would be many.
    monkeypatch.setitem(script["main"].__globals__, "BATCH", 4000)
    script["main"]()
    printed = capsys.readouterr().out
    assert "8573 windows of 48 hours" in printed.replace("\n", "")
    for row in ("persistence", "ridge", "GRU", "LSTM", "Transformer", "all networks"):
        assert row in printed
    assert "in its 90 % interval" in " ".join(printed.split())
    figure = (tmp_path / "forecast_20.png").read_bytes()
    assert figure.startswith(b"\x89PNG")
    assert len(figure) > 10_000


@pytest.mark.skipif(DATA is None, reason="needs ETTh1.csv in FUNCNETS_DATA")
def test_the_numbers_that_it_is_compared_with():
    """Those of the file, by a window of 96 hours."""
    series = script["read"](Path(f"{DATA}/ETTh1.csv"))
    ends = script["ENDS"]
    starts = (96, *ends[:2])
    assert abs(series[: ends[0]].mean()) < 1e-5
    known, _, test = (
        windows(series, 96, 24, start=start, end=end)
        for start, end in zip(starts, ends, strict=True)
    )
    persistence = (test.past[:, -1:] - test.future).square().mean()
    ridge = (script["ridge"](known, 1.0)(test.past) - test.future).square().mean()
    torch.testing.assert_close(persistence, torch.tensor(0.0343), atol=5e-5, rtol=0)
    torch.testing.assert_close(ridge, torch.tensor(0.0264), atol=5e-5, rtol=0)


def test_the_better_half_of_the_members_is_kept(monkeypatch):
    def init(key):
        return TensorDict({"linear": {"weight": random.normal(key, (1, 1))}})

    def apply(params, past, rate=0.0, key=None):
        return params["linear", "weight"] + torch.zeros(len(past), 3)

    known = Windows(torch.ones(4, 5), torch.zeros(4, 3))
    monkeypatch.setitem(script["train"].__globals__, "BATCH", 4)
    arguments = {"members": 5, "epochs": 1, "key": random.key(0)}
    found = script["train"](Model(init, apply), known, known, **arguments)["linear", "weight"]
    first = random.split(random.key(0), 4)[0]
    begun = vmap(init)(random.split(first, 5))["linear", "weight"]
    expected = begun[begun.flatten().abs().argsort()[:3]]
    torch.testing.assert_close(found, expected, atol=0.01, rtol=0.01)  # after a step of training


def test_every_member_draws_settings_of_its_own():
    settings = vmap(script["draw_settings"])(random.split(random.key(0), 500))
    assert 0.1 < settings.dropout.min() < 0.12
    assert 0.68 < settings.dropout.max() < 0.7
    logarithms = settings.penalty.log10()
    assert -3.5 < logarithms.min() < -3.4
    assert -1.6 < logarithms.max() < -1.5


def test_the_interval_holds_nine_tenths_of_what_it_was_made_from():
    keys = random.split(random.key(0), 3)
    past, future = (random.normal(key, (400, n)) for key, n in zip(keys[:2], (9, 2), strict=True))
    spread = random.normal(keys[2], (400, 1)).exp()
    forecast = torch.tensor([0.0, 1.0]).expand(400, 2)
    known = Windows(spread * past + 7, spread * future + forecast)
    half = script["calibrate"](forecast, known)
    width = half * script["deviation"](known.past)
    inside = ((known.future - forecast).abs() <= width).float().mean(0)
    assert ((inside >= 0.9) & (inside < 0.91)).all()
    assert (half > 1.4).all()  # the deviations are of few hours
    assert (half < 2.2).all()

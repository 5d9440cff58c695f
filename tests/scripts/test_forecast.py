"""scripts/forecast.py runs on real data, from its flags to its figure, and looks at no future."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import pytest
import torch

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
        script["windows"](series, start, end, 96, 24)
        for start, end in zip(starts, ends, strict=True)
    )
    persistence = (test.past[:, -1:] - test.future).square().mean()
    ridge = (script["ridge"](known, 1.0)(test.past) - test.future).square().mean()
    torch.testing.assert_close(persistence, torch.tensor(0.0343), atol=5e-5, rtol=0)
    torch.testing.assert_close(ridge, torch.tensor(0.0264), atol=5e-5, rtol=0)


def test_windows_know_nothing_of_what_comes():
    series = torch.arange(100.0)
    past, future = script["windows"](series, 40, 60, 10, 4)
    assert past.shape == (17, 10)
    assert future.shape == (17, 4)
    assert future.min() == 40  # the first hour of the part
    assert future.max() == 59
    assert (past[:, -1] + 1 == future[:, 0]).all()

"""scripts/multitask.py runs on real data, from its flags to its figure."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "multitask.py"
DATA = os.environ.get("FUNCNETS_DATA")


@pytest.mark.skipif(DATA is None, reason="needs Omniglot in FUNCNETS_DATA")
def test_a_few_steps(tmp_path, monkeypatch, capsys):
    arguments = ["--data", f"{DATA}/omniglot", "--output", str(tmp_path), "--steps", "2"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    assert "3630 drawings to train on, 1210 by others to test with" in printed
    for row in ("a network for each", "learned uncertainty", "image alone", "attention"):
        assert row in printed
    figure = (tmp_path / "multitask.png").read_bytes()
    assert figure.startswith(b"\x89PNG")
    assert len(figure) > 10_000

"""scripts/depth.py: what growing leaves as it is, and a run from end to end."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from funcnets import random, tree

PATH = Path(__file__).parents[2] / "scripts" / "depth.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("depth", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_growing_changes_no_logit_and_training_goes_on(script):
    digits = script.read_digits(0)
    assert len(digits.train_y) + len(digits.test_y) == 1797
    few = script.Digits(*(part[:130] for part in digits))
    phases, change = script.grow_and_train(few, 1, random.key(0))
    assert change < 1e-5
    assert [len(phase.accuracy) for phase in phases.values()] == [1, 1, 2]
    small, grown, fresh = (tree.count(phase.params) for phase in phases.values())
    assert 4 * small < grown == fresh


def test_from_end_to_end(script, tmp_path, monkeypatch, capsys):
    options = ["--epochs=1", "--depths", "1", "2", "--backend=eager", f"--output={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["depth.py", *options])
    script.main()
    assert (tmp_path / "depth.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "growing changed no logit" in printed
    assert "scanned" in printed

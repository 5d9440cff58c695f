"""scripts/conditional.py: its images, the two networks of one tree, and a run from end to end."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sklearn.datasets import load_digits

from funcnets import random, tree

PATH = Path(__file__).parents[2] / "scripts" / "conditional.py"
KEY = random.key(3)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("conditional", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_half_of_the_images_are_cluttered_and_the_others_are_the_digits(script):
    digits, labels = random.uniform(KEY, (400, 8, 8)), torch.arange(400)
    images, same, hard = script.make_images(KEY, digits, labels)
    assert images.shape == (400, 1, 16, 16)
    assert torch.equal(same, labels)
    clean = torch.nn.functional.interpolate(digits[:, None], size=(16, 16), mode="bilinear")
    assert torch.equal((images == clean).flatten(1).all(1), ~hard)
    assert abs(hard.float().mean() - 0.5) < 5 * (0.25 / 400) ** 0.5


def test_the_flag_chooses_between_the_two_exits_of_the_same_parameters(script):
    params = script.EXITS.init(KEY)
    x, way = random.uniform(KEY, (6, 1, 16, 16)), torch.arange(6) < 2
    shallow = script.EXITS.apply(params, x, 0.0)["logits"]
    deep = script.EXITS.apply(params, x, 1.0)["logits"]
    outputs = script.FLAGGED.apply(script.flagged(params), x, way)
    torch.testing.assert_close(outputs, torch.where(way[:, None], deep, shallow))


def test_a_gate_learns_alone_and_heeds_its_price(script):
    digits, labels = random.uniform(KEY, (200, 8, 8)), torch.arange(200) % 10
    params = script.flagged(script.EXITS.init(KEY))
    x = random.uniform(KEY, (50, 1, 16, 16))
    for kind, model in script.GATED.items():
        dear = script.train_gate(model, params, 100.0, digits, labels, 3, KEY)
        assert model.apply(dear, x)["gate"].max() < 0.5
        free = script.train_gate(model, params, -100.0, digits, labels, 3, KEY)
        assert model.apply(free, x)["gate"].min() > 0.5, kind
        after = dict(tree.leaves_with_path(dear))
        assert all(torch.equal(after[path], leaf) for path, leaf in tree.leaves_with_path(params))


def test_from_end_to_end(script, tmp_path, monkeypatch, capsys):
    options = ["--epochs", "1", "--gate-epochs", "1", "--rounds", "1"]
    options += ["--batch", "16", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["conditional.py", *options])
    digits = load_digits()
    few = SimpleNamespace(images=digits.images[:300], target=digits.target[:300])
    monkeypatch.setattr(script, "load_digits", lambda: few)
    script.main()
    assert (tmp_path / "conditional.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "each sample by its flag" in printed
    assert "early exits: accuracy by what is spent" in printed
    assert printed.count("gumbel") == printed.count("straight_through") == 3

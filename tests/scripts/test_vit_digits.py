"""scripts/vit_digits.py: what is distilled, where the maps come from, a table and a figure."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.utils import Bunch
from tensordict import TensorDict

from funcnets import random

PATH = Path(__file__).parents[2] / "scripts" / "vit_digits.py"
KEY = random.key(4)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("vit_digits", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_distillation_is_the_divergence_of_softened_probabilities(script):
    ours, theirs = random.normal(KEY, (2, 5, 10), dtype=torch.float64)
    p, q = (theirs / 2).softmax(-1), (ours / 2).softmax(-1)
    expected = 4 * (p * (p / q).log()).sum() / 5
    torch.testing.assert_close(script.distillation(ours, theirs, 2.0), expected)
    torch.testing.assert_close(script.distillation(ours, ours), torch.zeros_like(expected))


def test_a_teacher_alone_can_teach(script):
    """Labels that say nothing, and a teacher that knows: the network goes with the teacher."""
    images = random.uniform(KEY, (128, 1, 8, 8))
    labels = random.randint(random.key(5), (128,), 0, 10)

    class Knows:
        def apply(self, params, x):
            return 20 * F.one_hot((x.mean((1, 2, 3)) * 0).long() + 7, 10).float()

    teacher = script.Trained(Knows(), TensorDict({}), 0.0)
    for given, says_seven in ((None, False), (teacher, True)):
        trained = script.train(KEY, script.cnn, images, labels, epochs=4, rate=5e-3, teacher=given)
        votes = trained.model.apply(trained.params, images).argmax(-1)
        assert ((votes == 7).float().mean() > 0.9) == says_seven


def test_the_maps_are_those_of_the_class_token(script):
    params = script.vit.init(KEY)
    images = random.uniform(KEY, (3, 1, 8, 8))
    maps = script.attention_maps(params, images)
    assert maps.shape == (3, 4, 4, 4)
    torch.testing.assert_close(maps.sum((2, 3)), torch.ones(3, 4))
    _, found = script.vit.apply(params, images, taps=script.WEIGHTS[1:2])
    heads = found[script.WEIGHTS[1]][2, :, 0]  # of the third image, [heads, 1 + 16]
    expected = heads.mean(0)[1:] / heads.mean(0)[1:].sum()
    torch.testing.assert_close(maps[2, 1].flatten(), expected)


def test_an_epoch(script, tmp_path, capsys, monkeypatch):
    data = load_digits()
    few = Bunch(images=data.images[:160], target=data.target[:160])
    monkeypatch.setattr(script, "load_digits", lambda: few)
    script.main(["--epochs", "1", "--teacher-epochs", "1", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    for row in ("conv net", "ViT, distilled", "accuracy %", "32 held out"):
        assert row in printed
    figure = (tmp_path / "attention.png").read_bytes()
    assert figure.startswith(b"\x89PNG")
    assert len(figure) > 10_000

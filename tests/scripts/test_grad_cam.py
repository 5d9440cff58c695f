"""scripts/grad_cam.py: scenes that hold what they say, heat maps as by autograd, and a figure."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from funcnets import random

PATH = Path(__file__).parents[2] / "scripts" / "grad_cam.py"
KEY = random.key(4)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("grad_cam", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_scene_holds_two_digits_where_it_says(script):
    digits, labels = random.uniform(KEY, (7, 8, 8), 0.1, 1.0), torch.arange(7)
    scenes = script.make_scenes(random.key(5), digits, labels, 40)
    assert scenes.images.shape == (40, 1, 24, 24)
    for image, pair, corners in zip(scenes.images[:, 0], *scenes[1:], strict=True):
        rest = image.clone()
        for label, (top, left) in zip(pair, corners.tolist(), strict=True):
            window = (slice(top, top + 8), slice(left, left + 8))
            assert torch.equal(image[window], digits[label])
            rest[window] = 0
        assert not rest.any()
    tops, lefts = scenes.corners[..., 0], scenes.corners[..., 1]
    assert (tops.min(), tops.max()) == (0, 16)
    assert [(left.min(), left.max()) for left in lefts.unbind(1)] == [(0, 4), (12, 16)]


@pytest.mark.parametrize("layer", ["layer1", "layer2.0", "layer3"])
def test_the_heat_map_is_that_of_autograd(script, layer):
    params = script.model.init(KEY)
    images = random.normal(KEY, (3, 1, 24, 24))
    labels = torch.tensor([[3, 8], [0, 0], [9, 1]])
    corners = torch.zeros(3, 2, 2, dtype=torch.int64)
    heat = script.score(params, script.Scenes(images, labels, corners), layer)[1]
    for n in range(3):
        for i in range(2):
            image = images[n : n + 1].clone().requires_grad_()  # so that the features have a graph
            logits, found = script.model.apply(params, image, taps=[layer])
            features = found[layer]
            gradient = torch.autograd.grad(logits[0, labels[n, i]], features)[0]
            small = (gradient.mean((2, 3), keepdim=True) * features).sum(1, keepdim=True)
            expected = F.interpolate(small.clamp(min=0), (24, 24), mode="bilinear")[0, 0]
            torch.testing.assert_close(heat[n, i], expected.detach(), rtol=1e-4, atol=1e-6)


def test_what_counts_as_a_hit(script):
    heat = torch.zeros(5, 24, 24)
    corners = torch.tensor([[3, 5]]).expand(5, 2)
    for n, (row, column) in enumerate([(3, 5), (10, 12), (2, 5), (10, 13)]):
        heat[n, row, column] = 1
    assert script.hits(heat, corners).tolist() == [True, True, False, False, False]
    # A map that is flat has its first pixel for a peak, which is none.
    assert not script.hits(torch.zeros(1, 24, 24), torch.zeros(1, 2, dtype=torch.int64)).any()


def test_a_few_steps(script, tmp_path, capsys):
    script.main(["--steps", "2", "--scenes", "12", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    for row in ("map points at it", "all", "untrained", "11.1 %"):
        assert row in printed
    figure = (tmp_path / "grad_cam.png").read_bytes()
    assert figure.startswith(b"\x89PNG")
    assert len(figure) > 10_000

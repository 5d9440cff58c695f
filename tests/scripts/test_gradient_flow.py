"""scripts/gradient_flow.py: the networks that it compares, the gradients, and a figure."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from funcnets import random, tree

PATH = Path(__file__).parents[2] / "scripts" / "gradient_flow.py"
KEY = random.key(4)
X = random.uniform(KEY, (6, 1, 8, 8))
LABELS = torch.arange(6)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("gradient_flow", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_plain_network_is_the_stack_of_the_residual_one(script):
    plain, residual = script.make("plain", 14), script.make("residual", 14)
    params = plain.init(KEY)
    assert torch.equal(params["fc", "weight"], residual.init(KEY)["fc", "weight"])
    stack, channels = nn.Sequential(), 1
    with torch.random.fork_rng():
        for i, width in enumerate([16] * 5 + [32] * 4 + [64] * 4):
            stride = 2 if i in (5, 9) else 1
            stack.append(nn.Conv2d(channels, width, 3, stride, 1, bias=False))
            stack.append(nn.BatchNorm2d(width)).append(nn.ReLU())
            channels = width
        stack.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)])
    state = tree.to_state_dict(params)
    names = ["conv1", *(f"layer{s}.{b}.conv{i}" for s in (1, 2, 3) for b in (0, 1) for i in (1, 2))]
    convs = [part for part in stack if isinstance(part, nn.Conv2d)]
    for conv, name in zip(convs, names, strict=True):
        conv.weight.data.copy_(state[f"{name}.weight"])
    stack[-1].load_state_dict({leaf: state[f"fc.{leaf}"] for leaf in ("weight", "bias")})
    outputs, _ = plain.apply(params, X, train=True)
    torch.testing.assert_close(outputs, stack(X).detach(), rtol=1e-4, atol=1e-5)

    # And what is measured of it is what backward finds, from the first convolution to the last.
    flow = script.measure(KEY, plain, X, LABELS, members=1, steps=0)
    params = plain.init(random.split(KEY, 1)[0])
    for conv, name in zip(convs, names, strict=True):
        conv.weight.data.copy_(tree.to_state_dict(params)[f"{name}.weight"])
    for leaf in ("weight", "bias"):
        getattr(stack[-1], leaf).data.copy_(params["fc", leaf])
    value = F.cross_entropy(stack(X), LABELS)
    value.backward()
    expected = [conv.weight.norm() * conv.weight.grad.norm() for conv in convs]
    torch.testing.assert_close(flow.before[0], torch.stack(expected).detach(), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(flow.losses[0, 0], value.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "residual", "dense"])
def test_the_networks_are_as_deep_as_asked(script, kind):
    for depth in (20, 32):
        network = script.make(kind, depth)
        flow = script.measure(KEY, network, X[:2], LABELS[:2], members=2, steps=1)
        assert abs(flow.layers - depth) <= 3
        assert flow.before.shape == flow.after.shape == (2, flow.layers - 1)
        assert flow.losses.shape == (2, 2)
        assert (flow.before > 0).all()
        assert not torch.equal(flow.before[0], flow.before[1])  # networks of their own
        assert not torch.equal(flow.before, flow.after)


def test_the_skip_connection_keeps_the_gradient_within_bounds(script):
    first_over_last = {}
    for kind in ("plain", "residual", "dense"):
        flow = script.measure(KEY, script.make(kind, 62), X, LABELS, members=2, steps=0)
        first_over_last[kind] = (flow.before[:, 0] / flow.before[:, -1]).max()
    assert first_over_last["plain"] > 20 * first_over_last["residual"]
    assert first_over_last["plain"] > 20 * first_over_last["dense"]


def test_a_small_run(script, tmp_path, capsys):
    arguments = ["--depths", "8", "14", "--members", "2", "--steps", "1", "--batch", "4"]
    script.main([*arguments, "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    for word in ("plain", "residual", "dense", "at the start", "after 1 steps"):
        assert word in printed
    figure = (tmp_path / "gradient_flow.png").read_bytes()
    assert figure.startswith(b"\x89PNG")
    assert len(figure) > 10_000

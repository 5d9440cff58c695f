"""What is the multilayer perceptron's own: its dropout, its depth, its errors."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from model_cases import NoArithmetic
from torch.func import vmap

from funcnets import random, tree
from funcnets.models import mlp
from funcnets.models.mlp import Config

KEY = random.key(3)


def identity_network(n, depth, dropout):
    """Hands its inputs on, but for what dropout does to them."""
    model = mlp(n, n, widths=(n,) * depth, activation="identity", dropout=dropout)
    params = tree.map(lambda leaf: torch.eye(n) * (leaf.ndim == 2), model.init(KEY))
    return model, tree.map(lambda p, leaf: p if leaf.ndim == 2 else p[0], params, model.init(KEY))


def test_dropout_follows_each_activation_with_a_key_of_its_own():
    model, params = identity_network(500, depth=2, dropout=0.5)
    x = torch.ones(4, 500)
    assert torch.equal(model.apply(params, x), x)
    outputs, buffers = model.apply(params, x, train=True, key=KEY)
    assert buffers.is_empty()
    assert outputs.unique().tolist() == [0, 4]
    # Equal masks would keep a half.
    assert abs((outputs > 0).float().mean() - 0.25) < 5 * (0.25 * 0.75 / 2000) ** 0.5


def test_the_rate_of_dropout():
    model, params = identity_network(500, depth=1, dropout=0.3)
    outputs, _ = model.apply(params, torch.ones(4, 500), train=True, key=KEY)
    assert abs((outputs == 0).float().mean() - 0.3) < 5 * (0.3 * 0.7 / 2000) ** 0.5
    torch.testing.assert_close(outputs.max(), torch.tensor(1 / 0.7))
    model, params = identity_network(5, depth=2, dropout=1.0)
    outputs, _ = model.apply(params, torch.ones(4, 5), train=True, key=KEY)
    assert not outputs.any()


def test_each_option_arrives_in_its_field():
    model = mlp(3, 2, [8, 7], activation="tanh", norm="layer", dropout=0.25, bias=False)
    assert model.config == Config(
        in_features=3,
        out_features=2,
        widths=(8, 7),
        activation="tanh",
        norm="layer",
        dropout=0.25,
        bias=False,
    )
    assert mlp(3, 2).config == Config(3, 2)


def test_a_deeper_model_is_another_config():
    config = mlp(3, 2, widths=(8,), norm="batch").config
    deeper = mlp(**dataclasses.asdict(dataclasses.replace(config, widths=(8,) * 6)))
    params = deeper.init(KEY)
    assert sum(leaf.shape == (8, 8) for leaf in tree.leaves(params)) == 5
    assert deeper.apply(params, torch.ones(4, 3)).shape == (4, 2)


@pytest.mark.parametrize("norm", [None, "layer", "rms"])
@pytest.mark.parametrize("batch", [(), (0,), (2, 1, 3)])
def test_any_batch(norm, batch):
    model = mlp(3, 2, widths=(4,), norm=norm)
    params, x = model.init(KEY), random.normal(KEY, (*batch, 3))
    outputs = model.apply(params, x)
    assert outputs.shape == (*batch, 2)
    alone = [model.apply(params, row) for row in x.reshape(-1, 3)]
    torch.testing.assert_close(
        outputs.reshape(-1, 2), torch.stack(alone) if alone else torch.ones(0, 2)
    )


def test_without_widths_it_is_a_linear_map():
    model = mlp(3, 2, widths=())
    params = vmap(model.init)(random.split(KEY, 4))
    x = random.normal(KEY, (5, 3))
    torch.testing.assert_close(
        vmap(model.apply, (0, None))(params, x),
        x @ params["0", "weight"].mT + params["0", "bias"][:, None],
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_features": 0}, "mlp: in_features: expected a positive integer, got 0"),
        ({"out_features": -1}, "mlp: out_features: expected a positive integer, got -1"),
        ({"in_features": 2.0}, "mlp: in_features: expected a positive integer, got 2.0"),
        ({"widths": (4, 0)}, "mlp: widths: expected positive integers, got (4, 0)"),
        ({"widths": (4, 2.0)}, "mlp: widths: expected positive integers, got (4, 2.0)"),
        ({"widths": 8}, "mlp: widths: expected positive integers, got 8"),
        ({"widths": "88"}, "mlp: widths: expected positive integers, got '88'"),
        ({"activation": "ReLU"}, "activation: expected one of celu, elu"),
        (
            {"norm": "group"},
            "mlp: norm: expected one of None, 'batch', 'layer', 'rms', got 'group'",
        ),
        ({"dropout": 1.5}, "mlp: dropout: expected a rate between 0 and 1, got 1.5"),
        ({"dropout": float("nan")}, "mlp: dropout: expected a rate between 0 and 1, got nan"),
        ({"dropout": "0.5"}, "mlp: dropout: expected a rate between 0 and 1, got '0.5'"),
    ],
)
def test_configs_that_cannot_be(change, message, unchecked):
    good = {"in_features": 3, "out_features": 2, "widths": (4,)}
    for make in (mlp, Config):
        make(**good)
        with pytest.raises(ValueError, match=re.escape(message)):
            make(**good | change)


@pytest.mark.parametrize(
    ("norm", "shape", "message"),
    [
        (None, (5, 4), r"mlp: x: expected \[..., 3\], got \[5, 4\]"),
        (None, (), r"mlp: x: expected \[..., 3\], got \[\]"),
        ("batch", (5, 4), r"mlp: x: expected \[batch, 3\], got \[5, 4\]"),
        # Of which batch norm would take the wrong axis for the four features.
        ("batch", (5, 4, 3), r"mlp: x: expected \[batch, 3\], got \[5, 4, 3\]"),
        ("batch", (3,), r"mlp: x: expected \[batch, 3\], got \[3\]"),
    ],
)
@pytest.mark.parametrize("train", [False, True])
def test_inputs_that_do_not_fit(norm, shape, message, train, unchecked):
    model = mlp(3, 2, widths=(4,), norm=norm)
    params, x = model.init(KEY), torch.ones(shape)
    with pytest.raises(ValueError, match=message), NoArithmetic():
        model.apply(params, x, train=train)

"""What is the convolutional network's own: its dropout, its depth, its errors."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from model_cases import NoArithmetic

from funcnets import random, tree
from funcnets.models import cnn
from funcnets.models.cnn import Config

KEY = random.key(3)


def identity_network(n, depth, dropout):
    """Hands the means of its channels on, but for what dropout does to them."""
    model = cnn(
        n,
        n,
        widths=(n,) * depth,
        kernel_size=1,
        activation="identity",
        norm=None,
        pool=None,
        dropout=dropout,
    )
    params = tree.map(
        lambda leaf: torch.eye(n).reshape(leaf.shape) if leaf.ndim > 1 else leaf * 0,
        model.init(KEY),
    )
    return model, params


def test_dropout_of_whole_channels_ends_each_block_with_a_key_of_its_own():
    model, params = identity_network(500, depth=2, dropout=0.5)
    x = random.normal(KEY, (4, 500, 2, 3))
    means = x.mean((2, 3))
    torch.testing.assert_close(model.apply(params, x), means)
    outputs, buffers = model.apply(params, x, train=True, key=KEY)
    assert buffers.is_empty()
    kept = outputs != 0
    torch.testing.assert_close(outputs, torch.where(kept, 4 * means, 0.0))
    # Equal masks would keep a half.
    assert abs(kept.float().mean() - 0.25) < 5 * (0.25 * 0.75 / 2000) ** 0.5


def test_the_rate_of_dropout():
    model, params = identity_network(500, depth=1, dropout=0.3)
    outputs, _ = model.apply(params, torch.ones(4, 500, 1, 1), train=True, key=KEY)
    assert abs((outputs == 0).float().mean() - 0.3) < 5 * (0.3 * 0.7 / 2000) ** 0.5
    torch.testing.assert_close(outputs.max(), torch.tensor(1 / 0.7))


def test_each_option_arrives_in_its_field():
    options = {
        "depth": 2,
        "kernel_size": 5,
        "dims": 1,
        "activation": "tanh",
        "norm": "group",
        "groups": 4,
        "pool": "avg",
        "dropout": 0.25,
    }
    model = cnn(3, 2, [8, 4], **options)
    assert model.config == Config(in_channels=3, num_classes=2, widths=(8, 4), **options)
    assert cnn(3, 2).config == Config(3, 2)


def test_a_deeper_model_is_another_config():
    config = cnn(1, 2, widths=(4,)).config
    deeper = cnn(**dataclasses.asdict(dataclasses.replace(config, depth=6)))
    params = deeper.init(KEY)
    assert sum(leaf.shape == (4, 4, 3, 3) for leaf in tree.leaves(params)) == 5
    assert deeper.apply(params, torch.ones(4, 1, 2, 2)).shape == (4, 2)


@pytest.mark.parametrize("pool", [None, "max"])
def test_any_size_of_image_and_batch(pool):
    model = cnn(2, 3, widths=(4, 4), pool=pool)
    params = model.init(KEY)
    for shape in [(0, 2, 4, 4), (1, 2, 4, 4), (2, 2, 5, 7), (2, 2, 16, 4)]:
        x = random.normal(KEY, shape)
        outputs = model.apply(params, x)
        assert outputs.shape == (shape[0], 3)
        for i in range(shape[0]):
            torch.testing.assert_close(outputs[i], model.apply(params, x[i : i + 1])[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": 0}, "cnn: in_channels: expected a positive integer, got 0"),
        ({"num_classes": 0}, "cnn: num_classes: expected a positive integer, got 0"),
        ({"depth": 0}, "cnn: depth: expected a positive integer, got 0"),
        ({"widths": (4, 0)}, "cnn: widths: expected positive integers, got (4, 0)"),
        ({"widths": 8}, "cnn: widths: expected positive integers, got 8"),
        ({"widths": ()}, "cnn: widths: expected at least one block, got none"),
        ({"kernel_size": 4}, "cnn: kernel_size: expected an odd size, got 4"),
        ({"kernel_size": -1}, "cnn: kernel_size: expected a positive integer, got -1"),
        ({"kernel_size": (3, 3)}, "cnn: kernel_size: expected a positive integer, got (3, 3)"),
        ({"dims": 4}, "cnn: dims: expected one of 1, 2, 3, got 4"),
        ({"activation": "ReLU"}, "activation: expected one of celu, elu"),
        ({"norm": "layer"}, "cnn: norm: expected one of None, 'batch', 'group', got 'layer'"),
        ({"norm": "group", "groups": 3}, "cnn: widths: expected multiples of groups=3, got (4,)"),
        ({"norm": "group", "groups": 0}, "cnn: groups: expected a positive integer, got 0"),
        ({"pool": "mean"}, "cnn: pool: expected one of None, 'max', 'avg', got 'mean'"),
        ({"dropout": -0.5}, "cnn: dropout: expected a rate between 0 and 1, got -0.5"),
    ],
)
def test_configs_that_cannot_be(change, message, unchecked):
    good = {"in_channels": 3, "num_classes": 2, "widths": (4,)}
    for make in (cnn, Config):
        make(**good)
        with pytest.raises(ValueError, match=re.escape(message)):
            make(**good | change)


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({}, (5, 1, 8, 8), "[batch, 3, 4 or more, 4 or more], got [5, 1, 8, 8]"),
        ({}, (5, 3, 8, 3), "[batch, 3, 4 or more, 4 or more], got [5, 3, 8, 3]"),
        ({}, (3, 8, 8), "[batch, 3, 4 or more, 4 or more], got [3, 8, 8]"),
        ({}, (), "[batch, 3, 4 or more, 4 or more], got []"),
        ({"dims": 1}, (5, 3, 8, 8), "[batch, 3, 4 or more], got [5, 3, 8, 8]"),
        ({"pool": None}, (5, 3, 8, 0), "[batch, 3, 1 or more, 1 or more], got [5, 3, 8, 0]"),
    ],
)
@pytest.mark.parametrize("train", [False, True])
def test_inputs_that_do_not_fit(options, shape, message, train, unchecked):
    model = cnn(3, 2, widths=(4, 4), **options)
    params, x = model.init(KEY), torch.ones(shape)
    with pytest.raises(ValueError, match=re.escape(f"cnn: x: expected {message}")), NoArithmetic():
        model.apply(params, x, train=train)

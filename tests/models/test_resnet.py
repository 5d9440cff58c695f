"""What is the residual network's own: blocks that begin as the identity, the depth, its errors."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from model_cases import NoArithmetic
from tensordict import TensorDict

from funcnets import layers, random, tree
from funcnets.models import blocks, resnet, resnet18, resnet50, resnext50_32x4d
from funcnets.models.resnet import Config

KEY = random.key(3)
X = random.normal(KEY, (2, 3, 8, 8))


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_blocks_that_begin_as_the_identity(block):
    model = resnet(block, (3,), 5, width=4, stem="small", zero_init_residual=True)
    params = model.init(KEY)
    x = layers.conv(params["conv1"], X, padding=1)
    taps = model.apply(params, X, taps=["relu", "layer1.0", "layer1.1", "layer1.2"])[1]
    torch.testing.assert_close(taps["relu"], layers.batch_norm(params["bn1"], x).relu())
    assert torch.equal(taps["layer1.1"], taps["layer1.0"])
    assert torch.equal(taps["layer1.2"], taps["layer1.0"])
    plain = resnet(block, (3,), 5, width=4, stem="small")
    taps = plain.apply(plain.init(KEY), X, taps=["layer1.0", "layer1.1"])[1]
    assert not torch.equal(taps["layer1.1"], taps["layer1.0"])


def test_the_last_rate_of_stochastic_depth_is_the_one_given():
    model = resnet("basic", (1, 1), 5, width=4, stem="small", stochastic_depth=1.0)
    params = model.init(KEY)
    x = random.normal(KEY, (200, 3, 4, 4))
    (_, taps), _ = model.apply(params, x, train=True, key=KEY, taps=["relu", "layer1", "layer2"])
    # The last branch is left out of every sample, the first of half of them.
    shortcut, _ = layers.conv_norm(
        params["layer2", "0", "downsample"], taps["layer1"], stride=2, activation=None, train=True
    )
    torch.testing.assert_close(taps["layer2"], shortcut.relu())
    untouched = (taps["layer1"] == taps["relu"]).flatten(1).all(1).float().mean()
    assert abs(untouched - 0.5) < 5 * (0.25 / 200) ** 0.5


def test_training_that_draws_asks_for_a_key():
    model = resnet("basic", (1,), 5, width=4, stochastic_depth=0.5)
    with pytest.raises(ValueError, match="resnet: key: expected a key"):
        model.apply(model.init(KEY), X, train=True)


def test_each_option_arrives_in_its_field():
    options = {
        "in_channels": 1,
        "width": 8,
        "groups": 2,
        "width_per_group": 32,
        "stem": "small",
        "zero_init_residual": True,
        "squeeze_excitation": True,
        "stochastic_depth": 0.25,
    }
    config = resnet("bottleneck", [1, 2], 7, **options).config
    assert config == Config("bottleneck", (1, 2), 7, **options)
    assert resnet18(7, stem="small").config == Config("basic", (2, 2, 2, 2), 7, stem="small")
    assert resnext50_32x4d(7).config == dataclasses.replace(
        resnet50(7).config, groups=32, width_per_group=4
    )


def test_a_config_of_another_depth_is_another_network():
    config = dataclasses.replace(resnet18(5, width=4).config, depths=(1, 1, 3))
    model = resnet(**dataclasses.asdict(config))
    params = model.init(KEY)
    assert list(params["layer3"].keys()) == ["0", "1", "2"]
    assert "layer4" not in params


def check(options):
    """The checks of a configuration without those of its annotations, which users do not have."""
    config = Config("basic", (1,))
    for name, value in options.items():
        object.__setattr__(config, name, value)
    config.__post_init__()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": "dense"}, "resnet: block: expected one of 'basic', 'bottleneck', got 'dense'"),
        ({"depths": ()}, "resnet: depths: expected at least one stage, got none"),
        ({"depths": (2, 0)}, "resnet: depths[1]: expected a positive integer, got 0"),
        ({"stem": "large"}, "resnet: stem: expected one of"),
        ({"stochastic_depth": 1.5}, "resnet: stochastic_depth: expected a rate"),
        ({"groups": 2}, "resnet: groups, width_per_group: expected 1 and 64 for basic blocks"),
        (
            {"block": "bottleneck", "width": 4, "width_per_group": 8},
            "resnet: width_per_group: expected 64 / width or more, got 8 with width=4",
        ),
        ({"num_classes": 0}, "resnet: num_classes: expected a positive integer, got 0"),
    ],
)
def test_configurations_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check(options)


def test_images_that_do_not_fit():
    model = resnet("basic", (1,), 5, width=4)
    params, x = model.init(KEY), torch.zeros(2, 1, 8, 8)
    message = "resnet: x: expected [batch, 3, height, width], got [2, 1, 8, 8]"
    with NoArithmetic(), pytest.raises(ValueError, match=re.escape(message)):
        model.apply(params, x)


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 3, 8), (3, 8, 8), (2, 3, 3, 8), (2, 3, 8, 3)])
def test_the_check_of_images(shape):
    message = f"name: x: expected [batch, 3, 4 or more, 4 or more], got {list(shape)}"
    with pytest.raises(ValueError, match=re.escape(message)):
        blocks.check_image("name", torch.zeros(shape), 3, smallest=4)
    blocks.check_image("name", torch.zeros(2, 3, 4, 5), 3, smallest=4)


def test_a_stride_asks_for_a_shortcut_that_has_one():
    params = layers.init_residual_block(KEY, 3, 3)
    with pytest.raises(ValueError, match=r"residual_block: params: expected an entry downsample"):
        layers.residual_block(params, X, stride=2)


@pytest.mark.parametrize("zero_init", [False, True])
def test_zero_init_is_that_of_the_last_norm(zero_init):
    found = {
        "conv2": layers.init_residual_block(KEY, 3, 4, zero_init=zero_init),
        "conv3": layers.init_bottleneck_block(KEY, 3, 4, 2, zero_init=zero_init),
    }
    for last, params in found.items():
        weights = {name: leaf["weight"] for name, leaf in params.items() if name.startswith("bn")}
        zero = {name for name, weight in weights.items() if not weight.any()}
        assert zero == ({last.replace("conv", "bn")} if zero_init else set())


def test_pruned_buffers():
    outputs = layers.finish(X, {"a": {"b": None, "c": TensorDict({})}, "d": {"e": X}}, train=True)
    assert outputs[0] is X
    assert [path for path, _ in tree.leaves_with_path(outputs[1])] == [("d", "e")]
    assert list(outputs[1].keys()) == ["d"]
    assert layers.finish(X, {"a": X}, train=False) is X

"""The inverted residual, held against the three blocks of torchvision that it can be."""

import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import vjp
from torchvision.models.efficientnet import FusedMBConv, MBConv, _MBConvConfig
from torchvision.models.mobilenetv3 import InvertedResidual, InvertedResidualConfig

from funcnets import grad, layers, random, tree

KEY = random.key(2)
DTYPE = torch.float64
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


@st.composite
def blocks(draw):
    """The arguments of init, those of the layer, and torchvision's module."""
    kind = draw(st.sampled_from(["v3", "mbconv", "fused"]))
    kernel_size, stride = draw(st.sampled_from([3, 5])), draw(st.sampled_from([1, 2]))
    inputs, outputs = draw(st.sampled_from([3, 8])), draw(st.sampled_from([3, 8]))
    options = {"stride": stride}
    if kind == "v3":
        inner, squeeze = draw(st.integers(2, 4)), draw(st.booleans())
        dilation = draw(st.sampled_from([1, 2]))
        row = InvertedResidualConfig(8, kernel_size, 8, 8, squeeze, "HS", stride, dilation, 1.0)
        row.input_channels, row.expanded_channels, row.out_channels = inputs, inner, outputs
        norm = {"eps": 0.1, "momentum": 0.3}
        module = InvertedResidual(row, partial(nn.BatchNorm2d, **norm))
        options |= {"activation": F.hardswish, "gate": F.hardsigmoid, "dilation": dilation, **norm}
        if dilation > 1:
            options |= {"stride": 1, "shortcut": stride == 1 and inputs == outputs}
        init = {"expanded_channels": inner, "squeeze": 8 if squeeze else None}
    else:
        expansion = draw(st.sampled_from([1, 2]))
        fused = kind == "fused"
        block = FusedMBConv if fused else MBConv
        row = _MBConvConfig(expansion, kernel_size, stride, inputs, outputs, 1, block)
        module = block(row, 0.0, nn.BatchNorm2d)
        options |= {"activation": F.silu, "squeeze_activation": F.silu}
        init = {
            "expanded_channels": row.adjust_channels(inputs, expansion),
            "squeeze": None if fused else max(1, inputs // 4),
            "fused": fused,
        }
    init |= {"in_channels": inputs, "out_channels": outputs, "kernel_size": kernel_size}
    return init, options, module.to(DTYPE)


@pytest.mark.parametrize("train", [False, True])
@given(data=st.data(), seed=st.integers(0, 2**16))
def test_equals_the_blocks_of_torchvision(train, data, seed):
    with torch.random.fork_rng():
        init, options, module = data.draw(blocks())
    key = random.key(seed)
    params = tree.map(
        lambda leaf: leaf + 0.3 * random.normal(key, leaf.shape, dtype=DTYPE).abs(),
        layers.init_inverted_residual(key, **init, dtype=DTYPE),
    )
    state = {name: leaf.clone() for name, leaf in tree.to_state_dict(params, module).items()}
    module.load_state_dict(state)
    module.train(train)
    x = random.normal(random.fold_in(key, 1), (3, init["in_channels"], 6, 5), dtype=DTYPE)
    tracked = x.clone().requires_grad_()
    expected = module(tracked)

    def apply(params, x):
        return layers.inverted_residual(params, x, train=train, **options)

    outputs, pull_back, *buffers = vjp(apply, params, x, has_aux=train)
    close(outputs, expected.detach())
    cotangent = random.normal(random.fold_in(key, 2), outputs.shape, dtype=DTYPE)
    gradients, gradient = pull_back(cotangent)
    expected.backward(cotangent)
    close(gradient, tracked.grad)
    for name, parameter in module.named_parameters():
        close(gradients[tuple(name.split("."))], parameter.grad)
    if train:
        tree.map(close, buffers[0], tree.partition(tree.from_module(module))[1])


def test_stochastic_depth_of_samples_where_there_is_a_shortcut():
    params = layers.init_inverted_residual(KEY, 4, 4, 8, dtype=DTYPE)
    x = random.normal(KEY, (200, 4, 3, 3), dtype=DTYPE)
    whole, _ = layers.inverted_residual(params, x, train=True)
    outputs, _ = layers.inverted_residual(params, x, train=True, drop_rate=0.4, key=KEY)
    gone = (outputs == x).flatten(1).all(1)
    assert abs(gone.sum() - 80) < 5 * (200 * 0.4 * 0.6) ** 0.5
    close(outputs[~gone], (x + (whole - x) / 0.6)[~gone])
    # At inference the key has no say, nor has it without a shortcut.
    close(
        layers.inverted_residual(params, x, drop_rate=0.4, key=KEY),
        layers.inverted_residual(params, x),
    )
    alone = partial(layers.inverted_residual, params, x, shortcut=False, train=True)
    close(alone(drop_rate=0.4, key=KEY)[0], alone()[0])


@given(
    fused=st.booleans(),
    expanded=st.sampled_from([4, 6]),
    activation=st.sampled_from([F.relu, F.relu6, F.silu, torch.sigmoid]),
    drop_rate=st.sampled_from([0.0, 0.4]),
    train=st.booleans(),
)
def test_what_is_written_over_leaves_the_gradients_as_they_are(
    fused, expanded, activation, drop_rate, train
):
    """Plain gradients, where memory is used again, beside those under a transform."""
    params = layers.init_inverted_residual(KEY, 4, 4, expanded, fused=fused, dtype=DTYPE)
    x = random.normal(KEY, (3, 4, 5, 5), dtype=DTYPE)
    before = x.clone()

    def loss(weights, x):
        whole = tree.merge(weights, tree.partition(params)[1])
        outputs = layers.inverted_residual(
            whole, x, activation=activation, drop_rate=drop_rate, train=train, key=KEY
        )
        return (outputs[0] if train else outputs).square().sum()

    weights = tree.partition(params)[0]
    found = grad(loss, (0, 1))(weights, x)
    tree.map(close, found, torch.func.grad(loss, (0, 1))(weights, x))
    assert torch.equal(x, before)


def test_a_fused_block_does_not_squeeze():
    message = "init_inverted_residual: squeeze: expected None in a fused block, got 2"
    with pytest.raises(ValueError, match=re.escape(message)):
        layers.init_inverted_residual(KEY, 4, 4, 8, squeeze=2, fused=True)
    with pytest.raises(ValueError, match="expanded_channels: expected at least 1, got 0"):
        layers.init_inverted_residual(KEY, 4, 4, 0)

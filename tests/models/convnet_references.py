"""Torchvision's own classes, made as small as a configuration of ours; none of them drops."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn
from torchvision.models import VGG, AlexNet, ConvNeXt, EfficientNet, MobileNetV2, MobileNetV3
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import FusedMBConv, MBConv, _MBConvConfig
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.vgg import make_layers
from torchvision.ops import Conv2dNormActivation

kaiming = partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu")
normal = partial(nn.init.normal_, std=0.01)


def begin(layer: nn.Module, weight_init: Any) -> nn.Module:
    """The layer with a weight drawn so, and a bias of zeros if any."""
    weight_init(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def lenet(config: Any) -> nn.Module:
    activations = {"relu": nn.ReLU, "tanh": nn.Tanh}
    pools = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}
    channels, features = config.in_channels, nn.Sequential()
    for i, width in enumerate(config.widths):
        padding = config.padding if i == 0 else 0
        features.append(nn.Conv2d(channels, width, config.kernel_size, padding=padding))
        features.append(activations[config.activation]())
        features.append(pools[config.pool](2))
        channels = width
    inputs, classifier = channels * config.left() ** 2, nn.Sequential()
    for outputs in config.hidden:
        classifier.append(nn.Linear(inputs, outputs))
        classifier.append(activations[config.activation]())
        inputs = outputs
    classifier.append(nn.Linear(inputs, config.num_classes))
    parts = {"features": features, "flatten": nn.Flatten(), "classifier": classifier}
    return nn.Sequential(OrderedDict(parts))


def alexnet(config: Any) -> nn.Module:
    # The full size is never allocated: every layer with parameters is put in anew.
    with torch.device("meta"):
        module = AlexNet(dropout=0.0)
    channels, hidden = config.in_channels, config.hidden
    for i, width in zip((0, 3, 6, 8, 10), config.widths, strict=True):
        old = module.features[i]
        module.features[i] = nn.Conv2d(channels, width, old.kernel_size, old.stride, old.padding)
        channels = width
    sizes = {1: (channels * 36, hidden), 4: (hidden, hidden), 6: (hidden, config.num_classes)}
    for i, size in sizes.items():
        module.classifier[i] = nn.Linear(*size)
    return module


def vgg(config: Any) -> nn.Module:
    layers: list[Any] = []
    for depth, width in zip(config.depths, config.widths, strict=True):
        layers += [*[width] * depth, "M"]
    features = make_layers(layers, config.batch_norm)
    features[0] = nn.Conv2d(config.in_channels, config.widths[0], 3, padding=1)
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            begin(layer, kaiming)
    with torch.device("meta"):
        module = VGG(features, init_weights=False, dropout=0.0)
    hidden = config.hidden
    sizes = {
        0: (config.widths[-1] * 49, hidden),
        3: (hidden, hidden),
        6: (hidden, config.num_classes),
    }
    for i, size in sizes.items():
        module.classifier[i] = begin(nn.Linear(*size), normal)
    return module


def stem(config: Any, weight_init: Any, width: int, kernel_size: int = 3) -> nn.Module:
    """The first convolution, for the channels of the configuration."""
    conv = nn.Conv2d(config.in_channels, width, kernel_size, 2, kernel_size // 2, bias=False)
    return begin(conv, weight_init)


def mobilenet_v2(config: Any) -> nn.Module:
    module = MobileNetV2(
        config.num_classes,
        config.width_mult,
        [[t, c, n, s] for t, c, n, s in config.stages],
        config.round_nearest,
        dropout=0.0,
    )
    # What torchvision does not let one choose: the widths of both ends.
    first, last = config.scaled(config.width), module.features[-1][0].in_channels
    norm_act = {"activation_layer": nn.ReLU6}
    module.features[0] = Conv2dNormActivation(config.in_channels, first, 3, 2, **norm_act)
    block = module.features[1].conv
    t, _, _, stride = config.stages[0]
    blocks = type(module.features[1])(first, block[-2].out_channels, stride, t)
    module.features[1] = blocks
    module.features[-1] = Conv2dNormActivation(last, config.last(), 1, **norm_act)
    module.classifier[1] = begin(nn.Linear(config.last(), config.num_classes), normal)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            begin(layer, kaiming)
    return module


def mobilenet_v3(config: Any) -> nn.Module:
    rows, channels = [], config.width
    for kernel_size, inner, width, squeeze, activation, stride, dilation in config.blocks:
        name = {"relu": "RE", "hardswish": "HS"}[activation]
        row = InvertedResidualConfig(8, kernel_size, 8, 8, squeeze, name, stride, dilation, 1.0)
        # Set here, for the constructor rounds them.
        row.input_channels, row.expanded_channels, row.out_channels = channels, inner, width
        rows.append(row)
        channels = width
    module = MobileNetV3(rows, config.hidden, config.num_classes, dropout=0.0)
    module.features[0][0] = stem(config, kaiming, config.width)
    return module


def efficientnet(config: Any) -> nn.Module:
    kinds, rows, channels = {"mbconv": MBConv, "fused": FusedMBConv}, [], config.width
    for block, expansion, kernel_size, stride, width, depth in config.stages:
        rows.append(
            _MBConvConfig(expansion, kernel_size, stride, channels, width, depth, kinds[block])
        )
        channels = width
    norm = partial(nn.BatchNorm2d, eps=config.eps, momentum=config.momentum)
    module = EfficientNet(rows, 0.0, 0.0, config.num_classes, norm, config.last_width)
    module.features[0][0] = stem(config, kaiming, config.width)
    return module


def convnext(config: Any) -> nn.Module:
    widths = [*config.widths, None]
    rows = [CNBlockConfig(widths[i], widths[i + 1], depth) for i, depth in enumerate(config.depths)]
    module = ConvNeXt(rows, 0.0, config.layer_scale, config.num_classes)
    first = nn.Conv2d(config.in_channels, config.widths[0], 4, 4)
    module.features[0][0] = begin(first, partial(nn.init.trunc_normal_, std=0.02))
    return module


sizes = st.integers(1, 4)
widths = st.integers(2, 4)
twice = st.lists(st.integers(1, 2), min_size=2, max_size=2).map(tuple)


def options(family: str, **drawn: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Arguments of ``model_cases.convnet``, without dropout."""
    return st.fixed_dictionaries({"family": st.just(family), "n": sizes, "m": sizes, **drawn})


STILL = st.just(0.0)
DRAWN: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "lenet": options(
        "lenet",
        size=st.integers(8, 10),
        widths=st.tuples(widths, widths),
        hidden=st.lists(widths, max_size=2).map(tuple),
        kernel_size=st.just(3),
        padding=st.sampled_from([1, 2]),
        activation=st.sampled_from(["relu", "tanh"]),
        pool=st.sampled_from(["max", "avg"]),
    ),
    "alexnet": options(
        "alexnet",
        size=st.integers(63, 66),
        widths=st.tuples(*[widths] * 5),
        hidden=widths,
        dropout=STILL,
    ),
    "vgg": options(
        "vgg",
        size=st.integers(4, 7),
        depths=twice,
        widths=st.tuples(widths, widths),
        batch_norm=st.booleans(),
        hidden=widths,
        dropout=STILL,
    ),
    "mobilenet_v2": options(
        "mobilenet_v2",
        size=st.integers(5, 8),
        width=widths,
        width_mult=st.sampled_from([0.5, 1.0, 1.5]),
        stages=st.lists(
            st.tuples(st.sampled_from([1, 2]), widths, sizes, st.sampled_from([1, 2])),
            min_size=1,
            max_size=2,
        ).map(tuple),
        last_width=widths,
        round_nearest=st.sampled_from([1, 2]),
        dropout=STILL,
    ),
    "mobilenet_v3": options(
        "mobilenet_v3",
        size=st.integers(5, 8),
        width=widths,
        blocks=st.lists(
            st.tuples(
                st.sampled_from([3, 5]),
                widths,
                widths,
                st.booleans(),
                st.sampled_from(["relu", "hardswish"]),
                st.sampled_from([1, 2]),
                st.sampled_from([1, 2]),
            ),
            min_size=1,
            max_size=3,
        ).map(tuple),
        hidden=widths,
        dropout=STILL,
    ),
    "efficientnet": options(
        "efficientnet",
        size=st.integers(5, 8),
        width=widths,
        stages=st.lists(
            st.tuples(
                st.sampled_from(["mbconv", "fused"]),
                st.sampled_from([1, 4]),
                st.sampled_from([3, 5]),
                st.sampled_from([1, 2]),
                st.sampled_from([3, 8]),
                st.integers(1, 2),
            ),
            min_size=1,
            max_size=2,
        ).map(tuple),
        last_width=st.sampled_from([None, 5]),
        dropout=STILL,
        stochastic_depth=STILL,
        momentum=st.sampled_from([0.1, 0.01]),
        eps=st.sampled_from([1e-5, 1e-3]),
    ),
    # Layer norms of two channels are signs: no derivative to compare there.
    "convnext": options(
        "convnext",
        size=st.integers(8, 11),
        depths=twice,
        widths=st.tuples(st.integers(3, 5), st.integers(3, 5)),
        layer_scale=st.sampled_from([1e-6, 0.5]),
    ),
}
SMALL: dict[str, dict[str, Any]] = {
    "lenet": {"size": 8, "widths": (2, 3), "hidden": (4,), "kernel_size": 3, "padding": 1},
    "alexnet": {"size": 63, "widths": (2, 3, 2, 2, 2), "hidden": 3, "dropout": 0.4},
    "vgg": {"size": 4, "depths": (1, 2), "widths": (2, 3), "hidden": 3, "dropout": 0.4},
    "vgg_batch": {
        "size": 4,
        "depths": (1, 1),
        "widths": (2, 3),
        "hidden": 3,
        "batch_norm": True,
        "dropout": 0.0,
    },
    "mobilenet_v2": {
        "size": 6,
        "width": 3,
        "stages": ((1, 4, 1, 1), (2, 4, 1, 1)),
        "last_width": 5,
        "round_nearest": 1,
        "dropout": 0.4,
    },
    "mobilenet_v3": {
        "size": 6,
        "width": 3,
        "blocks": ((3, 4, 4, True, "relu", 1, 1), (5, 4, 4, False, "hardswish", 1, 2)),
        "hidden": 4,
        "dropout": 0.4,
    },
    "efficientnet": {
        "size": 6,
        "width": 3,
        "stages": (("fused", 2, 3, 2, 3, 1), ("mbconv", 1, 3, 1, 3, 1)),
        "last_width": 5,
        "dropout": 0.4,
        "stochastic_depth": 0.4,
    },
    "convnext": {"size": 8, "depths": (1, 1), "widths": (3, 4), "stochastic_depth": 0.4},
}

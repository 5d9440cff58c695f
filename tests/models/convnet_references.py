"""Convolutional networks of torch's and torchvision's classes, of a configuration of ours.

None of them drops.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from references import RESIDUAL_BLOCKS
from torch import nn
from torchvision.models import VGG, AlexNet, ConvNeXt, EfficientNet, MobileNetV2, MobileNetV3
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.densenet import _DenseBlock, _Transition
from torchvision.models.efficientnet import FusedMBConv, MBConv, _MBConvConfig
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.vgg import make_layers
from torchvision.ops import Conv2dNormActivation, Conv3dNormActivation
from torchvision.ops.misc import ConvNormActivation
from unet_reference import UNet

kaiming = partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu")
normal = partial(nn.init.normal_, std=0.01)


def begin(layer: nn.Module, weight_init: Any) -> nn.Module:
    """The layer with a weight drawn so, and a bias of zeros if any."""
    weight_init(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class Conv1dNormActivation(ConvNormActivation):
    """What torchvision has for two and three dimensions."""


CONVS: dict[int, tuple[Callable[..., nn.Module], type[nn.Module]]] = {
    1: (partial(Conv1dNormActivation, conv_layer=nn.Conv1d), nn.BatchNorm1d),
    2: (Conv2dNormActivation, nn.BatchNorm2d),
    3: (Conv3dNormActivation, nn.BatchNorm3d),
}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}
STEMS = {"imagenet": (7, 2, 3), "small": (3, 1, 1)}


def cnn(config: Any) -> nn.Module:
    dims, channels, features = config.dims, config.in_channels, nn.Sequential()
    conv, batch_norm = CONVS[dims]
    norm = {None: None, "batch": batch_norm, "group": partial(nn.GroupNorm, config.groups)}
    pools = {"max": getattr(nn, f"MaxPool{dims}d"), "avg": getattr(nn, f"AvgPool{dims}d")}
    for width in config.widths:
        block = nn.Sequential()
        for _ in range(config.depth):
            block.append(
                conv(
                    channels,
                    width,
                    config.kernel_size,
                    norm_layer=norm[config.norm],
                    activation_layer=ACTIVATIONS[config.activation],
                    inplace=None,
                )
            )
            channels = width
        if config.pool is not None:
            block.append(pools[config.pool](2))
        features.append(block)
    return nn.Sequential(
        OrderedDict(
            features=features,
            pool=getattr(nn, f"AdaptiveAvgPool{dims}d")(1),
            flatten=nn.Flatten(),
            classifier=nn.Linear(channels, config.num_classes),
        )
    )


def unet(config: Any) -> nn.Module:
    group_norm = partial(nn.GroupNorm, config.groups)
    return UNet(
        config.in_channels,
        config.num_classes,
        config.widths,
        config.convolutions,
        {None: None, "batch": nn.BatchNorm2d, "group": group_norm}[config.norm],
        ACTIVATIONS[config.activation],
        config.upsample,
    )


def resnet(config: Any) -> nn.Module:
    block = RESIDUAL_BLOCKS[config.block, config.squeeze_excitation]
    first = nn.Conv2d(config.in_channels, config.width, *STEMS[config.stem], bias=False)
    parts: dict[str, nn.Module] = {
        "conv1": first,
        "bn1": nn.BatchNorm2d(config.width),
        "relu": nn.ReLU(),
    }
    if config.stem == "imagenet":
        parts["maxpool"] = nn.MaxPool2d(3, 2, 1)
    channels = config.width
    for stage, depth in enumerate(config.depths):
        layer = nn.Sequential()
        planes = config.width * 2**stage
        for i in range(depth):
            stride = 2 if stage > 0 and i == 0 else 1
            shortcut = None
            if stride > 1 or channels != planes * block.expansion:
                shortcut = nn.Sequential(
                    nn.Conv2d(channels, planes * block.expansion, 1, stride, bias=False),
                    nn.BatchNorm2d(planes * block.expansion),
                )
            layer.append(
                block(channels, planes, stride, shortcut, config.groups, config.width_per_group)
            )
            channels = planes * block.expansion
        parts[f"layer{stage + 1}"] = layer
    parts |= {"avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    for conv in nn.ModuleList(parts.values()).modules():
        if isinstance(conv, nn.Conv2d) and conv.bias is None:
            kaiming(conv.weight)
    return nn.Sequential(OrderedDict(parts, fc=nn.Linear(channels, config.num_classes)))


def densenet(config: Any) -> nn.Module:
    channels, growth = config.width, config.growth_rate
    parts: dict[str, nn.Module] = {
        "conv0": nn.Conv2d(config.in_channels, channels, *STEMS[config.stem], bias=False),
        "norm0": nn.BatchNorm2d(channels),
        "relu0": nn.ReLU(),
    }
    if config.stem == "imagenet":
        parts["pool0"] = nn.MaxPool2d(3, 2, 1)
    for i, depth in enumerate(config.depths):
        if i:
            left = math.floor(config.compression * channels)
            parts[f"transition{i}"] = _Transition(channels, left)
            channels = left
        parts[f"denseblock{i + 1}"] = _DenseBlock(
            depth, channels, config.bottleneck, growth, drop_rate=0.0
        )
        channels += depth * growth
    parts["norm5"] = nn.BatchNorm2d(channels)
    for conv in nn.ModuleList(parts.values()).modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.kaiming_normal_(conv.weight)
    return nn.Sequential(
        OrderedDict(
            features=nn.Sequential(OrderedDict(parts)),
            relu=nn.ReLU(),
            avgpool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classifier=begin(nn.Linear(channels, config.num_classes), lambda weight: None),
        )
    )


def lenet(config: Any) -> nn.Module:
    pools = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}
    channels, features = config.in_channels, nn.Sequential()
    for i, width in enumerate(config.widths):
        padding = config.padding if i == 0 else 0
        features.append(nn.Conv2d(channels, width, config.kernel_size, padding=padding))
        features.append(ACTIVATIONS[config.activation]())
        features.append(pools[config.pool](2))
        channels = width
    inputs, classifier = channels * config.left() ** 2, nn.Sequential()
    for outputs in config.hidden:
        classifier.append(nn.Linear(inputs, outputs))
        classifier.append(ACTIVATIONS[config.activation]())
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

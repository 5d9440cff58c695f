"""The layers made of several: the strategies of their cases, as in layer_cases."""

from __future__ import annotations

from functools import partial
from typing import Any

from hypothesis import strategies as st
from layer_cases import Case, sizes, space_of
from references import RESIDUAL_BLOCKS
from torch import nn
from torchvision.ops import Conv2dNormActivation, Conv3dNormActivation, SqueezeExcitation

from funcnets import layers


def outputs(layer: Any, train: bool, **options: Any) -> Any:
    """The outputs alone, in either mode."""
    if train:
        return lambda params, x: layer(params, x, train=True, **options)[0]
    return partial(layer, **options)


@st.composite
def conv_norm(draw: Any, train: bool) -> Case:
    dims, groups = draw(st.integers(2, 3)), draw(st.integers(1, 2))
    n, m, kernel_size = groups * draw(sizes), groups * draw(sizes), draw(st.sampled_from([1, 3]))
    options = {"stride": draw(st.integers(1, 2)), "dilation": draw(st.integers(1, 2))}
    activation = draw(st.sampled_from([None, "relu", "silu"]))
    eps = draw(st.sampled_from([1e-5, 1e-3]))
    kinds = {None: None, "relu": nn.ReLU, "silu": nn.SiLU}
    module = {2: Conv2dNormActivation, 3: Conv3dNormActivation}[dims]
    norm = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims]
    return Case(
        partial(
            layers.init_conv_norm,
            in_channels=n,
            out_channels=m,
            kernel_size=kernel_size,
            dims=dims,
            groups=groups,
        ),
        outputs(
            layers.conv_norm,
            train,
            groups=groups,
            eps=eps,
            activation=None if activation is None else layers.activation(activation),
            **options,
        ),
        ((draw(st.integers(2, 3)), n, *space_of(draw, dims, 3)),),
        lambda: module(
            n,
            m,
            kernel_size,
            groups=groups,
            norm_layer=partial(norm, eps=eps),
            activation_layer=kinds[activation],
            inplace=None,
            **options,
        ),
        lambda module, x: module.train(train)(x),
    )


@st.composite
def squeeze_excitation(draw: Any) -> Case:
    n, m = draw(sizes), draw(sizes)
    activation = draw(st.sampled_from([nn.ReLU, nn.SiLU]))
    gate = draw(st.sampled_from([nn.Sigmoid, nn.Tanh]))
    return Case(
        partial(layers.init_squeeze_excitation, channels=n, squeezed=m),
        partial(layers.squeeze_excitation, activation=activation(), gate=gate()),
        ((draw(sizes), n, *space_of(draw, 2)),),
        lambda: SqueezeExcitation(n, m, activation, gate),
    )


@st.composite
def residual_block(draw: Any, kind: str, train: bool) -> Case:
    squeeze, stride = draw(st.booleans()), draw(st.integers(1, 2))
    block = RESIDUAL_BLOCKS[kind, squeeze]
    n, planes = draw(sizes), draw(st.integers(1, 3))
    m = planes * block.expansion
    groups = draw(st.sampled_from([1, planes])) if kind == "bottleneck" else 1
    shortcut = stride > 1 or n != m or draw(st.booleans())
    options: dict[str, Any] = {
        "downsample": shortcut,
        "squeeze": max(1, m // 16) if squeeze else None,
    }
    if kind == "bottleneck":
        init = partial(
            layers.init_bottleneck_block, width=planes * groups, groups=groups, **options
        )
    else:
        init = partial(layers.init_residual_block, **options)

    def module() -> nn.Module:
        downsample = nn.Sequential(nn.Conv2d(n, m, 1, stride, bias=False), nn.BatchNorm2d(m))
        return block(n, planes, stride, downsample if shortcut else None, groups)

    return Case(
        partial(init, in_channels=n, out_channels=m),
        outputs(layers.residual_block, train, stride=stride),
        ((draw(st.integers(2, 3)), n, *space_of(draw, 2, 3)),),
        module,
        lambda module, x: module.train(train)(x),
    )


@st.composite
def inverted_residual(draw: Any, train: bool) -> Case:
    """Its modules are in test_inverted_residual: one of three kinds."""
    n, m, fused = draw(sizes), draw(sizes), draw(st.booleans())
    squeeze = None if fused else draw(st.sampled_from([None, 2]))
    inner = draw(st.integers(1, 4)) if squeeze is None else draw(st.integers(2, 4))
    return Case(
        partial(
            layers.init_inverted_residual,
            in_channels=n,
            out_channels=m,
            expanded_channels=inner,
            squeeze=squeeze,
            fused=fused,
        ),
        outputs(layers.inverted_residual, train, stride=draw(st.integers(1, 2))),
        ((draw(st.integers(2, 3)), n, *space_of(draw, 2, 3)),),
    )


CASES: dict[str, st.SearchStrategy[Case]] = {
    "conv_norm": conv_norm(train=False),
    "conv_norm_train": conv_norm(train=True),
    "squeeze_excitation": squeeze_excitation(),
    "residual_block": residual_block("basic", train=False),
    "residual_block_train": residual_block("basic", train=True),
    "bottleneck_block": residual_block("bottleneck", train=False),
    "bottleneck_block_train": residual_block("bottleneck", train=True),
    "inverted_residual": inverted_residual(train=False),
    "inverted_residual_train": inverted_residual(train=True),
}
WITH_MODULE = [name for name in CASES if not name.startswith("inverted_residual")]

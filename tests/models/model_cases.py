"""The model families as one table: small networks, each with the module that it equals."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import MLP, Conv2dNormActivation, Conv3dNormActivation, SqueezeExcitation
from torchvision.ops.misc import ConvNormActivation

from funcnets import models, random, tree
from funcnets.model import Model

DTYPE = torch.float64


@dataclass(frozen=True)
class Case:
    """One network.

    Attributes:
        model: with any rate of dropout.
        shapes: of its inputs, the first axis the batch.
        module: makes the torch module of the same parameter names, without dropout.
        draws: whether training draws, so that it needs a key.
    """

    model: Model
    shapes: tuple[tuple[int, ...], ...]
    module: Callable[[], nn.Module]
    draws: bool = False

    def params(self, key: Tensor, dtype: torch.dtype = DTYPE) -> Any:
        """Parameters with no two values alike, and positive variances."""

        def perturb(path: tuple[str, ...], leaf: Tensor) -> Tensor:
            place = random.fold_in(key, sum(map(ord, ".".join(path))))
            noise = random.normal(place, leaf.shape, dtype=dtype)
            return noise.square() + 0.5 if path[-1] == "running_var" else leaf + 0.3 * noise

        return tree.map_with_path(perturb, tree.cast(self.model.init(key), dtype))

    def inputs(self, key: Tensor, dtype: torch.dtype = DTYPE) -> tuple[Tensor, ...]:
        keys = random.split(key, len(self.shapes)).unbind()
        return tuple(
            random.normal(k, shape, dtype=dtype) for k, shape in zip(keys, self.shapes, strict=True)
        )

    def reference(self, params: Any) -> nn.Module:
        """The module with these parameters, which have all its names and no others."""
        with torch.random.fork_rng():
            module = self.module().to(DTYPE)
        state = {name: leaf.clone() for name, leaf in tree.to_state_dict(params, module).items()}
        module.load_state_dict(state, strict=True)
        return module


class NoArithmetic(TorchDispatchMode):
    """Within it no operator of torch may run: an error has to come before the first."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} ran before the error")


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}
MLP_NORMS = {None: None, "batch": nn.BatchNorm1d, "layer": nn.LayerNorm, "rms": nn.RMSNorm}


def mlp(n: int = 3, m: int = 2, batch: tuple[int, ...] = (4,), **options: Any) -> Case:
    model = models.mlp(n, m, **options)
    config = model.config

    def module() -> nn.Module:
        return MLP(
            n,
            [*config.widths, m],
            norm_layer=MLP_NORMS[config.norm],
            activation_layer=ACTIVATIONS[config.activation],
            bias=config.bias,
        )

    return Case(model, ((*batch, n),), module, config.dropout > 0 and len(config.widths) > 0)


class Conv1dNormActivation(ConvNormActivation):
    """What torchvision has for two and three dimensions."""


CONVS: dict[int, tuple[Callable[..., nn.Module], type[nn.Module]]] = {
    1: (partial(Conv1dNormActivation, conv_layer=nn.Conv1d), nn.BatchNorm1d),
    2: (Conv2dNormActivation, nn.BatchNorm2d),
    3: (Conv3dNormActivation, nn.BatchNorm3d),
}


def cnn(n: int = 2, m: int = 3, space: tuple[int, ...] = (5, 4), **options: Any) -> Case:
    model = models.cnn(n, m, dims=len(space), **options)
    config, dims = model.config, len(space)
    conv, batch_norm = CONVS[dims]
    norm = {None: None, "batch": batch_norm, "group": partial(nn.GroupNorm, config.groups)}
    pools = {"max": getattr(nn, f"MaxPool{dims}d"), "avg": getattr(nn, f"AvgPool{dims}d")}

    def module() -> nn.Module:
        channels, features = n, nn.Sequential()
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
                classifier=nn.Linear(channels, m),
            )
        )

    return Case(model, ((3, n, *space),), module, config.dropout > 0)


class Squeezed(nn.Module):
    """Mixed into a block of torchvision: squeeze-and-excitation after the last norm."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        last = max(name for name, _ in self.named_children() if name.startswith("bn"))
        channels = getattr(self, last).num_features
        self.se = SqueezeExcitation(channels, max(1, channels // 16))
        getattr(self, last).register_forward_hook(lambda norm, inputs, output: self.se(output))


class SqueezedBasicBlock(Squeezed, BasicBlock):
    """As the library's block with ``squeeze``."""


class SqueezedBottleneck(Squeezed, Bottleneck):
    """As the library's block with ``squeeze``."""


RESIDUAL_BLOCKS = {
    ("basic", False): BasicBlock,
    ("bottleneck", False): Bottleneck,
    ("basic", True): SqueezedBasicBlock,
    ("bottleneck", True): SqueezedBottleneck,
}


def resnet(n: int = 2, m: int = 3, size: int = 6, **options: Any) -> Case:
    model = models.resnet(num_classes=m, in_channels=n, **options)
    config = model.config
    block = RESIDUAL_BLOCKS[config.block, config.squeeze_excitation]

    def module() -> nn.Module:
        kernel_size, stride, padding = {"imagenet": (7, 2, 3), "small": (3, 1, 1)}[config.stem]
        parts: dict[str, nn.Module] = {
            "conv1": nn.Conv2d(n, config.width, kernel_size, stride, padding, bias=False),
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
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        return nn.Sequential(OrderedDict(parts, fc=nn.Linear(channels, m)))

    return Case(model, ((3, n, size, size),), module, config.stochastic_depth > 0)


class Normalize(nn.Module):
    """Rows of length one."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=-1)


def siamese(encoder: Case, **options: Any) -> Case:
    """Of one input; what several share is in test_siamese.py."""
    model = models.siamese(encoder.model, **options)

    def module() -> nn.Module:
        parts: dict[str, nn.Module] = {"encoder": encoder.module()}
        if model.config.normalize:
            parts["normalize"] = Normalize()
        return nn.Sequential(OrderedDict(parts))

    return Case(model, encoder.shapes, module, encoder.draws)


sizes = st.integers(1, 4)


@st.composite
def mlps(draw: Any) -> Case:
    norm = draw(st.sampled_from(list(MLP_NORMS)))
    batches = st.integers(2, 4).map(lambda size: (size,))
    if norm != "batch":
        batches = st.lists(sizes, max_size=2).map(tuple)
    return mlp(
        draw(sizes),
        draw(sizes),
        draw(batches),
        # An RMS norm of one feature is its sign: no derivative to compare there.
        widths=draw(st.lists(st.integers(2, 4), max_size=3).map(tuple)),
        activation=draw(st.sampled_from(list(ACTIVATIONS))),
        norm=norm,
        bias=draw(st.booleans()),
    )


@st.composite
def cnns(draw: Any) -> Case:
    widths = draw(st.lists(st.sampled_from([2, 4]), min_size=1, max_size=2).map(tuple))
    pool = draw(st.sampled_from([None, "max", "avg"]))
    least = 2 ** len(widths) if pool else 1
    dims = draw(st.integers(1, 3))
    return cnn(
        draw(sizes),
        draw(sizes),
        tuple(draw(st.integers(least, least + 2)) for _ in range(dims)),
        widths=widths,
        depth=draw(st.integers(1, 2)),
        kernel_size=draw(st.sampled_from([1, 3, 5])),
        activation=draw(st.sampled_from(list(ACTIVATIONS))),
        norm=draw(st.sampled_from([None, "batch", "group"])),
        groups=2,
        pool=pool,
    )


@st.composite
def resnets(draw: Any) -> Case:
    block = draw(st.sampled_from(["basic", "bottleneck"]))
    groups = draw(st.sampled_from([1, 2])) if block == "bottleneck" else 1
    return resnet(
        draw(sizes),
        draw(sizes),
        draw(st.integers(4, 8)),
        block=block,
        depths=draw(st.lists(st.integers(1, 2), min_size=1, max_size=2).map(tuple)),
        width=4,
        groups=groups,
        width_per_group=draw(st.sampled_from([32, 64])) if block == "bottleneck" else 64,
        stem=draw(st.sampled_from(["imagenet", "small"])),
        squeeze_excitation=draw(st.booleans()),
    )


def siameses() -> st.SearchStrategy[Case]:
    return st.builds(siamese, st.one_of(mlps(), cnns()), normalize=st.booleans())


# Every norm, and what else takes a way of its own through the code.
CASES: dict[str, Case] = {
    "mlp": mlp(widths=(5, 4), dropout=0.4),
    "mlp_linear": mlp(widths=(), dropout=0.4),
    "mlp_batch": mlp(widths=(5, 4), norm="batch", dropout=0.4),
    "mlp_layer": mlp(widths=(5,), norm="layer", activation="tanh", bias=False),
    "mlp_rms": mlp(widths=(5,), norm="rms", activation="silu"),
    "cnn": cnn(widths=(2, 4), norm=None, pool="avg", dropout=0.4),
    "cnn_batch": cnn(widths=(2, 4), depth=2, dropout=0.4),
    "cnn_group": cnn(space=(6,), widths=(4,), norm="group", groups=2, kernel_size=5, pool=None),
    "cnn_3d": cnn(space=(2, 3, 2), widths=(2,), activation="silu"),
    "resnet": resnet(block="basic", depths=(1, 1), width=4, stem="small", stochastic_depth=0.4),
    "resnet_bottleneck": resnet(
        block="bottleneck", depths=(2,), width=2, groups=2, squeeze_excitation=True
    ),
    "siamese": siamese(mlp(widths=(5, 4), norm="batch", dropout=0.4), normalize=True),
}
FAMILIES: dict[str, st.SearchStrategy[Case]] = {
    "mlp": mlps(),
    "cnn": cnns(),
    "resnet": resnets(),
    "siamese": siameses(),
}

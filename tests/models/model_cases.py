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
from torchvision.ops import MLP, Conv2dNormActivation, Conv3dNormActivation
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
}
FAMILIES: dict[str, st.SearchStrategy[Case]] = {"mlp": mlps(), "cnn": cnns()}

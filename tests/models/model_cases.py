"""The model families as one table: small networks, each with the module that it equals."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import convnet_references
import torch
import transformer_references
import vision_references
from conditional_references import EarlyExit, Gated
from hypothesis import strategies as st
from multimodal_reference import Attention, Gate, Multimodal
from recurrent_reference import Recurrent, Seq2Seq
from references import RESIDUAL_BLOCKS
from residual_mlp_reference import ResidualMLP
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.densenet import _DenseBlock, _Transition
from torchvision.ops import MLP, Conv2dNormActivation, Conv3dNormActivation
from torchvision.ops.misc import ConvNormActivation
from unet_reference import UNet

from funcnets import models, random, testing, tree
from funcnets.model import Model

DTYPE = torch.float64


SEQUENCES = {"recurrent", "seq2seq", "transformer"}


class Indices(NamedTuple):
    """An input of integers below ``high``."""

    shape: tuple[int, ...]
    high: int


@dataclass(frozen=True)
class Case:
    """One network.

    Attributes:
        model: with any rate of dropout.
        shapes: of its inputs, the first axis the batch; `Indices` for integers, dicts for inputs by
            name.
        module: makes the torch module of the same parameter names, without dropout.
        draws: whether training draws, so that it needs a key.
    """

    model: Model
    shapes: tuple[Any, ...]
    module: Callable[[], nn.Module]
    draws: bool = False

    @property
    def declared(self) -> tuple[Any, ...]:
        """The inputs as funcnets.testing has them; of floats, the second axis alone is fixed."""

        def declare(shape: Any) -> Any:
            if isinstance(shape, dict):
                return {name: declare(each) for name, each in shape.items()}
            sizes = shape.shape if isinstance(shape, Indices) else shape
            # Axes whose size may be another: those of space, and of time where features are last.
            last = self.model.family in SEQUENCES and len(sizes) == 3
            fixed = {len(sizes) - 1} if last else {1}
            names = [n if i in fixed else f"size_{n}" for i, n in enumerate(sizes)]
            axes = " ".join(map(str, ["batch", *names[1:]]))
            if isinstance(shape, Indices):
                return testing.integers(axes, shape.high)
            return testing.floats(axes)

        return tuple(map(declare, self.shapes))

    @property
    def axes(self) -> dict[str, int]:
        """The sizes of the named axes but the batch."""
        found = {axis for leaf in tree.leaves(self.declared) for axis in leaf.axes}
        names = [axis for axis in found if isinstance(axis, str) and axis != "batch"]
        return {name: int(name.removeprefix("size_")) for name in names}

    def params(self, key: Tensor, dtype: torch.dtype = DTYPE) -> Any:
        """Parameters with no two values alike, and positive variances."""

        def perturb(path: tuple[str, ...], leaf: Tensor) -> Tensor:
            place = random.fold_in(key, sum(map(ord, ".".join(path))))
            noise = random.normal(place, leaf.shape, dtype=dtype)
            return noise.square() + 0.5 if path[-1] == "running_var" else leaf + 0.3 * noise

        return tree.map_with_path(perturb, tree.cast(self.model.init(key), dtype))

    def inputs(self, key: Tensor, dtype: torch.dtype = DTYPE) -> tuple[Any, ...]:
        def draw(key: Tensor, shape: Any) -> Any:
            if isinstance(shape, dict):
                keys = random.split(key, len(shape)).unbind()
                return {name: draw(k, shape[name]) for k, name in zip(keys, shape, strict=True)}
            if isinstance(shape, Indices):
                return random.randint(key, shape.shape, 0, shape.high)
            return random.normal(key, shape, dtype=dtype)

        keys = random.split(key, len(self.shapes)).unbind()
        return tuple(map(draw, keys, self.shapes))

    def reference(self, params: Any) -> nn.Module:
        """The module with these parameters, which have all its names and no others."""
        with torch.random.fork_rng():
            module = self.module().to(DTYPE)
        state = {name: leaf.clone() for name, leaf in tree.to_state_dict(params, module).items()}
        module.load_state_dict(state, strict=True)
        return module


def differentiable(inputs: Any) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]]:
    """The inputs that have a gradient, and the function that puts others into their places."""
    leaves, structure = tree.flatten(inputs)

    def rebuild(points: list[Tensor]) -> Any:
        rest = iter(points)
        filled = [next(rest) if leaf.is_floating_point() else leaf for leaf in leaves]
        return tree.unflatten(structure, filled)

    return [leaf for leaf in leaves if leaf.is_floating_point()], rebuild


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


def densenet(n: int = 2, m: int = 3, size: int = 6, **options: Any) -> Case:
    model = models.densenet(num_classes=m, in_channels=n, **options)
    config = model.config

    def module() -> nn.Module:
        kernel_size, stride, padding = {"imagenet": (7, 2, 3), "small": (3, 1, 1)}[config.stem]
        channels, growth = config.width, config.growth_rate
        parts: dict[str, nn.Module] = {
            "conv0": nn.Conv2d(n, channels, kernel_size, stride, padding, bias=False),
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
        classifier = nn.Linear(channels, m)
        nn.init.zeros_(classifier.bias)
        return nn.Sequential(
            OrderedDict(
                features=nn.Sequential(OrderedDict(parts)),
                relu=nn.ReLU(),
                avgpool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                classifier=classifier,
            )
        )

    return Case(model, ((3, n, size, size),), module, config.dropout > 0)


def unet(n: int = 2, m: int = 3, space: tuple[int, int] = (5, 4), **options: Any) -> Case:
    model = models.unet(n, m, **options)
    config = model.config
    norm = {
        None: None,
        "batch": nn.BatchNorm2d,
        "group": partial(nn.GroupNorm, config.groups),
    }[config.norm]

    def module() -> nn.Module:
        return UNet(
            n,
            m,
            config.widths,
            config.convolutions,
            norm,
            ACTIVATIONS[config.activation],
            config.upsample,
        )

    return Case(model, ((3, n, *space),), module, config.dropout > 0)


def convnet(family: str, n: int = 2, m: int = 3, size: int = 6, **options: Any) -> Case:
    """A network of torchvision's kind, from images to logits."""
    # Options of its own are called size in lenet, whose images have it.
    own = {"size": size} if family == "lenet" else {}
    model = getattr(models, family)(num_classes=m, in_channels=n, **own, **options)
    config = model.config
    draws = any(getattr(config, rate, 0) > 0 for rate in ("dropout", "stochastic_depth"))
    module = partial(getattr(convnet_references, family), config)
    return Case(model, ((3, n, size, size),), module, draws)


def vision(family: str, n: int = 2, m: int = 3, size: int = 4, **options: Any) -> Case:
    """A transformer of torchvision's kind, from images to logits."""
    model = getattr(models, family)(num_classes=m, in_channels=n, **options)
    rates = ("dropout", "attention_dropout", "stochastic_depth")
    draws = any(getattr(model.config, rate, 0) > 0 for rate in rates)
    module = partial(getattr(vision_references, family), model.config)
    return Case(model, ((3, n, size, size),), module, draws)


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


def embedding(n: int = 5, m: int = 2, batch: int = 3, padding_idx: int | None = None) -> Case:
    model = models.embedding(n, m, padding_idx=padding_idx)
    module = partial(nn.Embedding, n, m, padding_idx=padding_idx)
    return Case(model, (Indices((batch,), n),), module)


def multimodal(
    encoders: dict[str, Case | str], heads: dict[str, Case | int], **options: Any
) -> Case:
    model = models.multimodal(
        {n: e if isinstance(e, str) else e.model for n, e in encoders.items()},
        {n: head if isinstance(head, int) else head.model for n, head in heads.items()},
        **options,
    )
    config = model.config
    shapes = {}
    for name, encoder in encoders.items():
        case = encoders[encoder] if isinstance(encoder, str) else encoder
        shapes[name] = case.shapes[0]

    def module() -> nn.Module:
        fusion: nn.Module | str = config.fusion
        if fusion == "gated":
            fusion = Gate(len(encoders), config.fused)
        if fusion == "attention":
            fusion = Attention(config.fused, config.attention_heads)
        return Multimodal(
            {n: e if isinstance(e, str) else e.module() for n, e in encoders.items()},
            {
                n: nn.Linear(config.fused, head) if isinstance(head, int) else head.module()
                for n, head in heads.items()
            },
            fusion,
            nn.Identity() if config.activation == "identity" else ACTIVATIONS[config.activation](),
        )

    parts = [part for part in (*encoders.values(), *heads.values()) if isinstance(part, Case)]
    return Case(model, (shapes,), module, any(part.draws for part in parts))


sizes = st.integers(1, 4)
mlp_norms = st.sampled_from([None, "batch"])


def residual_mlp(n: int = 3, m: Any = 2, batch: tuple[int, ...] = (4,), **options: Any) -> Case:
    model = models.residual_mlp(n, m, **options)
    config = model.config
    draws = config.depth > 0 and (config.dropout > 0 or config.stochastic_depth > 0)
    return Case(model, ((*batch, n),), partial(ResidualMLP, config), draws)


def gated(base: Case, shallow: Case, deep: Case, size: int, **options: Any) -> Case:
    """Of cases of one input, without dropout; the gate reads ``size`` features."""
    model = models.gated(base.model, shallow.model, deep.model, **options)

    def module() -> nn.Module:
        return Gated(base.module(), shallow.module(), deep.module(), size)

    return Case(model, base.shapes, module, draws=options["gate"] == "gumbel")


def early_exit(stages: list[Case], exits: list[Case], threshold: float) -> Case:
    """Of cases of one input."""
    parts = [[case.model for case in cases] for cases in (stages, exits)]

    def module() -> nn.Module:
        made = ([case.module() for case in cases] for cases in (stages, exits))
        return EarlyExit(*made, threshold)

    draws = any(case.draws for case in [*stages, *exits])
    return Case(models.early_exit(*parts, threshold), stages[0].shapes, module, draws)


def gpt(n: int = 5, batch: int = 3, time: int = 4, **options: Any) -> Case:
    model = models.gpt(n, **{"context": time + 1, "init_std": 0.2} | options)
    module = partial(transformer_references.GPT, model.config)
    return Case(model, (Indices((batch, time), n),), module, model.config.dropout > 0)


def bert(n: int = 5, batch: int = 3, time: int = 4, **options: Any) -> Case:
    model = models.bert(n, **{"context": time + 1, "init_std": 0.2, "dropout": 0.0} | options)
    module = partial(transformer_references.BERT, model.config)
    return Case(model, (Indices((batch, time), n),), module, model.config.dropout > 0)


def transformer(batch: int = 3, times: tuple[int, int] = (4, 3), **options: Any) -> Case:
    model = models.transformer(**{"dropout": 0.0} | options)
    config = model.config

    def shape(time: int, vocabulary: int | None) -> Any:
        if vocabulary is None:
            return batch, time, config.width
        return Indices((batch, time), vocabulary)

    shapes = [shape(times[0], config.vocabulary if config.encoder_depth else None)]
    if config.decoder_depth:
        shapes.append(shape(times[1], config.target_vocabulary or config.vocabulary))
    module = partial(transformer_references.Transformer, config)
    return Case(model, tuple(shapes), module, config.dropout > 0)


def recurrent(
    n: int = 3, m: int = 2, batch: int = 3, time: int = 3, hidden: int = 3, **options: Any
) -> Case:
    model = models.recurrent(n, m, hidden, **options)
    config = model.config
    shape: Any = (batch, time, n)
    if config.num_embeddings is not None:
        shape = Indices((batch, time), config.num_embeddings)
    return Case(model, (shape,), partial(Recurrent, config), config.dropout > 0)


def seq2seq(
    n: int = 3, m: int = 2, steps: int = 2, targets: bool = True, batch: int = 3, **options: Any
) -> Case:
    model = models.seq2seq(n, m, steps, **{"hidden_size": 3} | options)
    config = model.config
    shape: Any = (batch, 3, n) if config.encoder else (batch, n)
    if config.num_embeddings is not None:
        shape = Indices((batch, 3), config.num_embeddings)
    target = Indices((batch, steps), m) if config.tokens else (batch, steps, m)
    shapes = (shape, target) if targets else (shape,)
    draws = config.dropout > 0 or (targets and config.sampling > 0)
    return Case(model, shapes, partial(Seq2Seq, config), draws)


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
def gateds(draw: Any) -> Case:
    size, m, options = draw(st.integers(2, 4)), draw(sizes), {"norm": draw(mlp_norms)}
    return gated(
        mlp(3, size, (4,), widths=(2,), **options),
        mlp(size, m, (4,), widths=()),
        mlp(size, m, (4,), widths=(3, 2), **options),
        size,
        gate="straight_through",
    )


@st.composite
def early_exits(draw: Any) -> Case:
    sizes = draw(st.lists(st.integers(2, 3), min_size=2, max_size=4))
    options = {"norm": draw(mlp_norms)}
    return early_exit(
        [mlp(n, m, (4,), widths=(2,), **options) for n, m in pairwise(sizes)],
        [mlp(m, 3, (4,), widths=()) for m in sizes[1:]],
        draw(st.sampled_from([0.0, 0.4, 0.6, 1.0])),
    )


@st.composite
def residual_mlps(draw: Any) -> Case:
    depth = draw(st.integers(0, 3))
    share = draw(st.sampled_from(["none", "stacked", "all"]))
    kinds = st.sampled_from(["mlp", "glu"])
    each = st.lists(kinds, min_size=depth, max_size=depth).map(tuple)
    return residual_mlp(
        draw(sizes),
        draw(sizes | st.just({"first": 2, "second": 1})),
        draw(st.lists(sizes, max_size=2).map(tuple)),
        width=draw(st.integers(2, 4)),
        depth=depth,
        expansion=draw(st.integers(1, 2)),
        block=draw(kinds | each if share == "none" else kinds),
        share=share,
        activation=draw(st.sampled_from(["silu", "tanh"])),
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


@st.composite
def densenets(draw: Any) -> Case:
    depths = draw(st.lists(st.integers(1, 2), min_size=1, max_size=2).map(tuple))
    return densenet(
        draw(sizes),
        draw(sizes),
        draw(st.integers(5, 8)),
        depths=depths,
        growth_rate=draw(st.integers(1, 3)),
        width=draw(st.integers(2, 4)),
        bottleneck=draw(st.integers(1, 3)),
        compression=draw(st.sampled_from([0.4, 0.5, 1.0])),
        stem=draw(st.sampled_from(["imagenet", "small"])),
        remat=draw(st.booleans()),
    )


@st.composite
def unets(draw: Any) -> Case:
    widths = draw(st.lists(st.sampled_from([2, 4]), min_size=2, max_size=3).map(tuple))
    least = 2 ** (len(widths) - 1)
    space = st.integers(least, 2 * least + 1)
    return unet(
        draw(sizes),
        draw(sizes),
        (draw(space), draw(space)),
        widths=widths,
        convolutions=draw(st.integers(1, 2)),
        norm=draw(st.sampled_from([None, "batch", "group"])),
        groups=2,
        upsample=draw(st.sampled_from(["transposed", "bilinear", "nearest"])),
        activation=draw(st.sampled_from(list(ACTIVATIONS))),
    )


def siameses() -> st.SearchStrategy[Case]:
    return st.builds(siamese, st.one_of(mlps(), cnns()), normalize=st.booleans())


def embeddings() -> st.SearchStrategy[Case]:
    return st.builds(embedding, sizes, sizes, sizes, st.sampled_from([None, 0, -1]))


@st.composite
def multimodals(draw: Any) -> Case:
    fusion = draw(st.sampled_from(["concat", "sum", "gated", "attention"]))
    size = draw(st.sampled_from([2, 4]))
    make = {
        "mlp": lambda: mlp(3, size, (3,), widths=(4,)),
        "mlp_batch": lambda: mlp(2, size, (3,), widths=(4,), norm="batch"),
        "cnn": lambda: cnn(1, size, widths=(2,), activation="tanh"),
        "embedding": lambda: embedding(4, size, 3),
    }
    kinds = draw(st.lists(st.sampled_from(list(make)), min_size=1, max_size=3))
    encoders: dict[str, Case | str] = {f"{kind}{i}": make[kind]() for i, kind in enumerate(kinds)}
    if draw(st.booleans()):
        encoders["again"] = draw(st.sampled_from(list(encoders)))
    fused = size * (len(encoders) if fusion == "concat" else 1)
    heads: dict[str, Case | int] = {"linear": draw(sizes)}
    if draw(st.booleans()):
        heads["mlp"] = mlp(fused, draw(sizes), (3,), widths=(4,), norm="batch")
    return multimodal(
        encoders,
        heads,
        fusion=fusion,
        attention_heads=draw(st.sampled_from([1, 2])),
        activation=draw(st.sampled_from(["identity", "tanh", "relu"])),
    )


FEED_FORWARDS = ["relu", "gelu", "swiglu", "geglu", "squared_relu"]
POSITIONS = ["learned", "sinusoidal", "rotary", "alibi", "none"]
shares = st.sampled_from(["none", "stacked", "all"])


@st.composite
def gpts(draw: Any) -> Case:
    heads, groups = draw(st.sampled_from([(1, None), (2, None), (2, 1), (4, 2)]))
    options = {
        "heads": heads,
        "key_value_heads": groups,
        "width": heads * draw(st.sampled_from([2, 4])),
        "depth": draw(st.integers(1, 3)),
        "hidden": draw(st.sampled_from([None, 3])),
        "positions": draw(st.sampled_from(POSITIONS)),
        "norm": draw(st.sampled_from(["layer", "rms"])),
        "activation": draw(st.sampled_from(FEED_FORWARDS)),
        "normalize": draw(st.booleans()),
        "window": draw(st.sampled_from([None, 2])),
        "bias": draw(st.booleans()),
        "tied": draw(st.booleans()),
        "share": draw(shares),
        "soft_cap": draw(st.sampled_from([None, 3.0])),
    }
    return gpt(draw(sizes), draw(sizes), draw(st.integers(1, 5)), **options)


@st.composite
def berts(draw: Any) -> Case:
    heads = draw(st.sampled_from([1, 2]))
    options = {
        "heads": heads,
        "width": heads * draw(st.sampled_from([2, 4])),
        "depth": draw(st.integers(1, 3)),
        "positions": draw(st.sampled_from(POSITIONS)),
        "norm": draw(st.sampled_from(["layer", "rms"])),
        "norm_first": draw(st.booleans()),
        "activation": draw(st.sampled_from(FEED_FORWARDS)),
        "head": draw(st.booleans()),
        "share": draw(shares),
    }
    return bert(draw(sizes), draw(sizes), draw(st.integers(1, 5)), **options)


@st.composite
def transformers(draw: Any) -> Case:
    heads, vocabulary = draw(st.sampled_from([1, 2])), draw(st.sampled_from([None, 5]))
    depths = draw(st.sampled_from([(1, 1), (2, 1), (0, 2), (2, 0)]))
    whole = vocabulary is not None and all(depths)
    options = {
        "vocabulary": vocabulary,
        "target_vocabulary": draw(st.sampled_from([None, 3])) if whole else None,
        "context": 5,
        "heads": heads,
        "width": heads * draw(st.sampled_from([2, 4])),
        "encoder_depth": depths[0],
        "decoder_depth": depths[1],
        "hidden": draw(st.sampled_from([None, 3])),
        "positions": draw(st.sampled_from(["learned", "sinusoidal", "none"])),
        "norm_first": draw(st.booleans()),
        "activation": draw(st.sampled_from(["relu", "gelu"])),
        "bias": draw(st.booleans()),
        "tied": draw(st.booleans()),
        "share": draw(shares),
    }
    return transformer(draw(sizes), (draw(st.integers(1, 5)), draw(st.integers(1, 5))), **options)


CELLS = st.sampled_from(["rnn_tanh", "lstm", "gru"])


@st.composite
def recurrents(draw: Any) -> Case:
    return recurrent(
        draw(sizes),
        draw(sizes),
        draw(sizes),
        draw(sizes),
        draw(st.integers(2, 4)),
        num_layers=draw(st.integers(1, 2)),
        cell=draw(CELLS),
        bidirectional=draw(st.booleans()),
        merge=draw(st.sampled_from(["concat", "add"])),
        output=draw(st.sampled_from(["last", "mean", "attention", "each"])),
        num_embeddings=draw(st.sampled_from([None, 3])),
    )


@st.composite
def seq2seqs(draw: Any) -> Case:
    encoder = draw(st.booleans())
    return seq2seq(
        draw(sizes),
        draw(st.integers(2, 4)),
        draw(st.integers(1, 3)),
        draw(st.booleans()),
        draw(sizes),
        num_layers=draw(st.integers(1, 2)),
        cell=draw(CELLS),
        encoder=encoder,
        bidirectional=encoder and draw(st.booleans()),
        merge=draw(st.sampled_from(["concat", "add"])),
        tokens=draw(st.booleans()),
        num_embeddings=draw(st.sampled_from([None, 3])) if encoder else None,
    )


# Every norm, and what else takes a way of its own through the code.
CASES: dict[str, Case] = {
    "mlp": mlp(widths=(5, 4), dropout=0.4),
    "mlp_linear": mlp(widths=(), dropout=0.4),
    "mlp_batch": mlp(widths=(5, 4), norm="batch", dropout=0.4),
    "mlp_layer": mlp(widths=(5,), norm="layer", activation="tanh", bias=False),
    "mlp_rms": mlp(widths=(5,), norm="rms", activation="silu"),
    "residual_mlp": residual_mlp(width=4, depth=2, dropout=0.4, stochastic_depth=0.4),
    "residual_mlp_stacked": residual_mlp(
        m={"a": 2, "b": 1}, width=4, depth=3, block="glu", share="stacked", dropout=0.4
    ),
    "residual_mlp_shared": residual_mlp(width=4, depth=3, share="all", activation="tanh"),
    "cnn": cnn(widths=(2, 4), norm=None, pool="avg", dropout=0.4),
    "cnn_batch": cnn(widths=(2, 4), depth=2, dropout=0.4),
    "cnn_group": cnn(space=(6,), widths=(4,), norm="group", groups=2, kernel_size=5, pool=None),
    "cnn_3d": cnn(space=(2, 3, 2), widths=(2,), activation="silu"),
    "resnet": resnet(block="basic", depths=(1, 1), width=4, stem="small", stochastic_depth=0.4),
    "resnet_bottleneck": resnet(
        block="bottleneck", depths=(2,), width=2, groups=2, squeeze_excitation=True
    ),
    "densenet": densenet(
        depths=(2, 1), growth_rate=2, width=3, bottleneck=2, stem="small", dropout=0.4
    ),
    "densenet_remat": densenet(depths=(2,), growth_rate=2, width=2, bottleneck=1, remat=True),
    "unet": unet(widths=(2, 4, 2), dropout=0.4),
    "unet_bilinear": unet(
        widths=(2, 4), convolutions=1, norm="group", groups=2, upsample="bilinear"
    ),
    "unet_nearest": unet(
        widths=(2, 3), convolutions=1, norm=None, upsample="nearest", activation="silu"
    ),
    **{
        name: convnet(name.removesuffix("_batch"), **options)
        for name, options in convnet_references.SMALL.items()
    },
    **{
        name: vision(name.partition("_")[0], **options)
        for name, options in vision_references.SMALL.items()
    },
    "recurrent": recurrent(
        cell="lstm", num_layers=2, bidirectional=True, output="attention", dropout=0.4
    ),
    "recurrent_each": recurrent(num_embeddings=5, output="each"),
    "seq2seq": seq2seq(bidirectional=True, merge="add", sampling=0.5, dropout=0.4),
    "seq2seq_tokens": seq2seq(m=4, targets=False, encoder=False, cell="lstm", tokens=True),
    "siamese": siamese(mlp(widths=(5, 4), norm="batch", dropout=0.4), normalize=True),
    "gated": gated(
        mlp(3, 4, widths=(2,), norm="batch"),
        mlp(4, 2, widths=()),
        mlp(4, 2, widths=(3,), norm="batch"),
        4,
        gate="straight_through",
    ),
    "gated_gumbel": gated(
        mlp(3, 4, widths=()), mlp(4, 2, widths=()), residual_mlp(4, depth=1), 4, gate="gumbel"
    ),
    "early_exit": early_exit(
        [cnn(1, 4, (4, 4), widths=(2,), dropout=0.4), residual_mlp(4, 4, width=3, depth=1)],
        [mlp(4, 3, widths=()), mlp(4, 3, widths=(4,), dropout=0.4)],
        0.6,
    ),
    "gpt": gpt(width=4, depth=1, heads=2, dropout=0.4),
    "gpt_rotary": gpt(
        width=8,
        depth=1,
        heads=4,
        key_value_heads=2,
        hidden=4,
        positions="rotary",
        norm="rms",
        activation="swiglu",
        normalize=True,
        tied=False,
        share="stacked",
        dropout=0.4,
    ),
    "bert": bert(width=4, depth=1, heads=2, share="all", dropout=0.4),
    "transformer": transformer(
        vocabulary=5, width=4, heads=2, encoder_depth=1, decoder_depth=1, hidden=6, dropout=0.4
    ),
    "embedding": embedding(),
    "embedding_padding": embedding(padding_idx=1),
    "multimodal": multimodal(
        {"table": mlp(3, 2, (3,), widths=(4,), norm="batch", dropout=0.4), "kind": embedding()},
        {"class": 3, "value": mlp(4, 1, (3,), widths=(4,), norm="batch", dropout=0.4)},
    ),
    "multimodal_shared": multimodal(
        {"left": cnn(1, 2, widths=(2,)), "right": "left"}, {"same": 1}, fusion="gated"
    ),
    "multimodal_attention": multimodal(
        {"x": mlp(3, 4, (3,), widths=()), "y": mlp(2, 4, (3,), widths=()), "kind": embedding(5, 4)},
        {"class": 3},
        fusion="attention",
        attention_heads=2,
        activation="tanh",
    ),
}
FAMILIES: dict[str, st.SearchStrategy[Case]] = {
    "mlp": mlps(),
    "residual_mlp": residual_mlps(),
    "cnn": cnns(),
    "resnet": resnets(),
    "densenet": densenets(),
    "unet": unets(),
    **{
        family: drawn.map(lambda options: convnet(**options))
        for family, drawn in convnet_references.DRAWN.items()
    },
    "vit": vision_references.VIT.map(lambda options: vision(**options)),
    "swin": vision_references.SWIN.map(lambda options: vision(**options)),
    "recurrent": recurrents(),
    "seq2seq": seq2seqs(),
    "siamese": siameses(),
    "gated": gateds(),
    "early_exit": early_exits(),
    "gpt": gpts(),
    "bert": berts(),
    "transformer": transformers(),
    "embedding": embeddings(),
    "multimodal": multimodals(),
}

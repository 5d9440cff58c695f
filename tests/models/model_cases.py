"""The model families as one table: small networks, each with the module that it equals."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import convnet_references
import torch
import transformer_references
import vision_references
from conditional_references import EarlyExit, Gated
from convnet_references import ACTIVATIONS
from hypothesis import strategies as st
from multimodal_reference import Attention, Gate, Multimodal
from recurrent_reference import Recurrent, Seq2Seq
from residual_mlp_reference import ResidualMLP
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import MLP

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
        draws: whether training draws, so that it needs a key.
    """

    model: Model
    shapes: tuple[Any, ...]
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
            names = [n if i in fixed else f"size_{n}={n}" for i, n in enumerate(sizes)]
            axes = " ".join(map(str, ["batch", *names[1:]]))
            if isinstance(shape, Indices):
                return testing.integers(axes, shape.high)
            return testing.floats(axes)

        return tuple(map(declare, self.shapes))

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

    def module(self) -> nn.Module:
        """The torch module of the same parameter names, without dropout."""
        return module_of(self.model)

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


MLP_NORMS = {None: None, "batch": nn.BatchNorm1d, "layer": nn.LayerNorm, "rms": nn.RMSNorm}


class Normalize(nn.Module):
    """Rows of length one."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=-1)


# The module of each family's configuration: of the same parameter names, without dropout.


def mlp_module(config: Any) -> nn.Module:
    return MLP(
        config.in_features,
        [*config.widths, config.out_features],
        norm_layer=MLP_NORMS[config.norm],
        activation_layer=ACTIVATIONS[config.activation],
        bias=config.bias,
    )


def embedding_module(config: Any) -> nn.Module:
    sizes = config.num_embeddings, config.embedding_dim
    return nn.Embedding(*sizes, padding_idx=config.padding_idx)


def siamese_module(config: Any) -> nn.Module:
    parts: dict[str, nn.Module] = {"encoder": module_of(config.encoder)}
    if config.normalize:
        parts["normalize"] = Normalize()
    return nn.Sequential(OrderedDict(parts))


def gated_module(config: Any) -> nn.Module:
    paths = (module_of(path) for path in (config.base, config.shallow, config.deep))
    return Gated(*paths, config.base.config.out_features)


def early_exit_module(config: Any) -> nn.Module:
    stages, exits = ([module_of(part) for part in parts] for parts in (config.stages, config.exits))
    return EarlyExit(stages, exits, config.threshold)


def multimodal_module(config: Any) -> nn.Module:
    fusion: nn.Module | str = config.fusion
    if fusion == "gated":
        fusion = Gate(len(config.encoders), config.fused)
    if fusion == "attention":
        fusion = Attention(config.fused, config.attention_heads)
    return Multimodal(
        {name: e if isinstance(e, str) else module_of(e) for name, e in config.encoders},
        {
            name: nn.Linear(config.fused, head) if isinstance(head, int) else module_of(head)
            for name, head in config.heads
        },
        fusion,
        nn.Identity() if config.activation == "identity" else ACTIVATIONS[config.activation](),
    )


CONVNETS = ["lenet", "alexnet", "vgg", "mobilenet_v2", "mobilenet_v3", "efficientnet", "convnext"]
CONVNETS += ["cnn", "unet", "resnet", "densenet"]
MODULES: dict[str, Callable[[Any], nn.Module]] = {
    "mlp": mlp_module,
    "residual_mlp": ResidualMLP,
    "embedding": embedding_module,
    **{family: getattr(convnet_references, family) for family in CONVNETS},
    "vit": vision_references.vit,
    "swin": vision_references.swin,
    "recurrent": Recurrent,
    "seq2seq": Seq2Seq,
    "gpt": transformer_references.GPT,
    "bert": transformer_references.BERT,
    "transformer": transformer_references.Transformer,
    "siamese": siamese_module,
    "gated": gated_module,
    "early_exit": early_exit_module,
    "multimodal": multimodal_module,
}


def module_of(model: Model) -> nn.Module:
    """The module that a model equals, with values of its own."""
    return MODULES[str(model.family)](model.config)


# Cases of given options.


def mlp(n: int = 3, m: int = 2, batch: tuple[int, ...] = (4,), **options: Any) -> Case:
    model = models.mlp(n, m, **options)
    return Case(model, ((*batch, n),), bool(model.config.dropout and model.config.widths))


def residual_mlp(n: int = 3, m: Any = 2, batch: tuple[int, ...] = (4,), **options: Any) -> Case:
    model = models.residual_mlp(n, m, **options)
    config = model.config
    return Case(model, ((*batch, n),), bool(config.depth) and drops(config))


def embedding(n: int = 5, m: int = 2, batch: int = 3, padding_idx: int | None = None) -> Case:
    return Case(models.embedding(n, m, padding_idx=padding_idx), (Indices((batch,), n),))


def cnn(n: int = 2, m: int = 3, space: tuple[int, ...] = (5, 4), **options: Any) -> Case:
    model = models.cnn(n, m, dims=len(space), **options)
    return Case(model, ((3, n, *space),), drops(model.config))


def unet(n: int = 2, m: int = 3, space: tuple[int, int] = (5, 4), **options: Any) -> Case:
    model = models.unet(n, m, **options)
    return Case(model, ((3, n, *space),), drops(model.config))


def convnet(family: str, n: int = 2, m: int = 3, size: int = 6, **options: Any) -> Case:
    """A network from square images to logits."""
    # Options of its own are called size in lenet, whose images have it.
    own = {"size": size} if family == "lenet" else {}
    model = getattr(models, family)(num_classes=m, in_channels=n, **own, **options)
    return Case(model, ((3, n, size, size),), drops(model.config))


def vision(family: str, n: int = 2, m: int = 3, size: int = 4, **options: Any) -> Case:
    """A transformer from images to logits."""
    return convnet(family, n, m, size, **options)


def recurrent(
    n: int = 3, m: int = 2, batch: int = 3, time: int = 3, hidden: int = 3, **options: Any
) -> Case:
    model = models.recurrent(n, m, hidden, **options)
    config = model.config
    shape: Any = (batch, time, n)
    if config.num_embeddings is not None:
        shape = Indices((batch, time), config.num_embeddings)
    return Case(model, (shape,), drops(config))


def seq2seq(
    n: int = 3, m: int = 2, steps: int = 2, targets: bool = True, batch: int = 3, **options: Any
) -> Case:
    model = models.seq2seq(n, m, steps, **{"hidden_size": 3} | options)
    config = model.config
    shape: Any = (batch, 3, n) if config.encoder else (batch, n)
    if config.num_embeddings is not None:
        shape = Indices((batch, 3), config.num_embeddings)
    target = Indices((batch, steps), m) if config.tokens else (batch, steps, m)
    draws = config.dropout > 0 or (targets and config.sampling > 0)
    return Case(model, (shape, target) if targets else (shape,), draws)


def gpt(n: int = 5, batch: int = 3, time: int = 4, **options: Any) -> Case:
    model = models.gpt(n, **{"context": time + 1, "init_std": 0.2} | options)
    return Case(model, (Indices((batch, time), n),), drops(model.config))


def bert(n: int = 5, batch: int = 3, time: int = 4, **options: Any) -> Case:
    model = models.bert(n, **{"context": time + 1, "init_std": 0.2, "dropout": 0.0} | options)
    return Case(model, (Indices((batch, time), n),), drops(model.config))


def transformer(batch: int = 3, times: tuple[int, int] = (4, 3), **options: Any) -> Case:
    """Of tokens."""
    model = models.transformer(**options)
    shapes = tuple(Indices((batch, time), model.config.vocabulary) for time in times)
    return Case(model, shapes, drops(model.config))


def siamese(encoder: Case, **options: Any) -> Case:
    """Of one input; what several share is in test_siamese.py."""
    return Case(models.siamese(encoder.model, **options), encoder.shapes, encoder.draws)


def gated(base: Case, shallow: Case, deep: Case, **options: Any) -> Case:
    """Of cases of one input, without dropout."""
    model = models.gated(base.model, shallow.model, deep.model, **options)
    return Case(model, base.shapes, options["gate"] == "gumbel")


def early_exit(stages: list[Case], exits: list[Case], threshold: float) -> Case:
    """Of cases of one input."""
    parts = [[case.model for case in cases] for cases in (stages, exits)]
    draws = any(case.draws for case in [*stages, *exits])
    return Case(models.early_exit(*parts, threshold), stages[0].shapes, draws)


def multimodal(
    encoders: dict[str, Case | str], heads: dict[str, Case | int], **options: Any
) -> Case:
    model = models.multimodal(
        {n: e if isinstance(e, str) else e.model for n, e in encoders.items()},
        {n: head if isinstance(head, int) else head.model for n, head in heads.items()},
        **options,
    )
    shapes = {}
    for name, encoder in encoders.items():
        case = encoders[encoder] if isinstance(encoder, str) else encoder
        shapes[name] = case.shapes[0]
    parts = [part for part in (*encoders.values(), *heads.values()) if isinstance(part, Case)]
    return Case(model, (shapes,), any(part.draws for part in parts))


def drops(config: Any) -> bool:
    """Whether a rate is above zero."""
    rates = ("dropout", "attention_dropout", "stochastic_depth")
    return any(getattr(config, rate, 0) > 0 for rate in rates)


# Cases that Hypothesis draws, without dropout: of any batch where the family takes any.
ANY_BATCH = ["mlp", "residual_mlp", "embedding"]


@st.composite
def drawn(draw: Any, family: str) -> Case:
    model, inputs = draw(testing.strategies.models(family, draws=False))
    leaves = tree.leaves_with_path(model.init(random.key(0)))
    statistics = any(path[-1] == "running_mean" for path, _ in leaves)
    batch = (draw(st.integers(2 if statistics else 1, 4)),)
    if family in ANY_BATCH and getattr(model.config, "norm", None) != "batch":
        batch = draw(st.lists(st.integers(1, 4), max_size=2).map(tuple))

    def shape(declared: Any) -> Any:
        sizes = (*batch, *declared.shape({"batch": 0, **dict(declared.given)})[1:])
        return Indices(sizes, declared.high) if declared.kind == "integers" else sizes

    return Case(model, tree.map(shape, inputs))


FAMILIES = {family: drawn(family) for family in MODULES}
mlps, cnns, gpts, berts, recurrents = (
    partial(drawn, family) for family in ("mlp", "cnn", "gpt", "bert", "recurrent")
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
    "resnet": convnet(
        "resnet", block="basic", depths=(1, 1), width=4, stem="small", stochastic_depth=0.4
    ),
    "resnet_bottleneck": convnet(
        "resnet", block="bottleneck", depths=(2,), width=2, groups=2, squeeze_excitation=True
    ),
    "densenet": convnet(
        "densenet", depths=(2, 1), growth_rate=2, width=3, bottleneck=2, stem="small", dropout=0.4
    ),
    "densenet_remat": convnet(
        "densenet", depths=(2,), growth_rate=2, width=2, bottleneck=1, remat=True
    ),
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
        gate="straight_through",
    ),
    "gated_gumbel": gated(
        mlp(3, 4, widths=()), mlp(4, 2, widths=()), residual_mlp(4, depth=1), gate="gumbel"
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

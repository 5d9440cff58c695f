"""The layers as one table: each a strategy of cases, over which the tests of all layers run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor, nn

from funcnets import layers, random, tree
from funcnets.layers.activations import ACTIVATIONS

DTYPE = torch.float64


@dataclass(frozen=True)
class Case:
    """One layer with drawn options.

    Attributes:
        init: from a key to parameters, of any dtype.
        apply: ``apply(params, *inputs)``, differentiable in all of them.
        module: makes the torch.nn module of the same options, or None.
        inputs: shapes of the floating inputs.
        call: how the module is called with the inputs, where not plainly.
    """

    init: Callable[..., TensorDict]
    apply: Callable[..., Tensor]
    inputs: tuple[tuple[int, ...], ...]
    module: Callable[[], nn.Module] | None = None
    call: Callable[..., Tensor] = lambda module, *inputs: module(*inputs)

    def params(self, key: Tensor) -> TensorDict:
        """Parameters in float64 with no two values alike, and positive variances."""

        def perturb(path: tuple[str, ...], leaf: Tensor) -> Tensor:
            place = random.fold_in(key, sum(map(ord, ".".join(path))))
            noise = random.normal(place, leaf.shape, dtype=DTYPE)
            return noise.square() + 0.5 if path[-1] == "running_var" else leaf + 0.3 * noise

        return tree.map_with_path(perturb, self.init(key, dtype=DTYPE))

    def draw_inputs(self, key: Tensor) -> tuple[Tensor, ...]:
        keys = random.split(key, len(self.inputs) + 1)
        return tuple(
            random.normal(keys[i], size, dtype=DTYPE) for i, size in enumerate(self.inputs)
        )


def reference(case: Case, params: TensorDict) -> nn.Module:
    """The torch.nn module with these parameters, loaded by their names."""
    assert case.module is not None
    with torch.random.fork_rng():
        module = case.module().to(DTYPE)
    state = {name: value.clone() for name, value in params.flatten_keys(".").items()}
    expected = {
        name: value
        for name, value in module.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in expected.items()}
    module.load_state_dict(state, strict=False)
    return module.eval()


def no_params(key: Tensor, dtype: torch.dtype = DTYPE) -> TensorDict:
    return TensorDict({})


sizes = st.integers(1, 4)
with_or_without = st.sampled_from([True, False])  # simplest, and so drawn first, is with
batches = st.lists(st.integers(1, 3), max_size=2).map(tuple)


@st.composite
def linear(draw: Any) -> Case:
    n, m, bias = draw(sizes), draw(sizes), draw(with_or_without)
    return Case(
        partial(layers.init_linear, in_features=n, out_features=m, bias=bias),
        layers.linear,
        ((*draw(batches), n),),
        lambda: nn.Linear(n, m, bias=bias),
    )


@st.composite
def bilinear(draw: Any) -> Case:
    a, b, m, bias, batch = (
        draw(sizes),
        draw(sizes),
        draw(sizes),
        draw(with_or_without),
        draw(batches),
    )
    return Case(
        partial(layers.init_bilinear, in1_features=a, in2_features=b, out_features=m, bias=bias),
        layers.bilinear,
        ((*batch, a), (*batch, b)),
        lambda: nn.Bilinear(a, b, m, bias=bias),
    )


def index_tensor(draw: Any, size: tuple[int, ...], limit: int) -> Tensor:
    return random.randint(random.key(draw(st.integers(0, 99))), size, 0, limit)


@st.composite
def embedding(draw: Any) -> Case:
    n, m = draw(st.integers(2, 5)), draw(sizes)
    padding = draw(st.none() | st.integers(-n, n - 1))
    indices = index_tensor(draw, draw(batches), n)
    return Case(
        partial(layers.init_embedding, num_embeddings=n, embedding_dim=m, padding_idx=padding),
        lambda params: layers.embedding(params, indices, padding_idx=padding),
        (),
        lambda: nn.Embedding(n, m, padding_idx=padding),
        lambda module: module(indices),
    )


@st.composite
def unembed(draw: Any) -> Case:
    n, m = draw(sizes), draw(sizes)
    return Case(
        partial(layers.init_embedding, num_embeddings=n, embedding_dim=m),
        layers.unembed,
        ((*draw(batches), m),),
        lambda: nn.Linear(m, n, bias=False),
    )


@st.composite
def embedding_bag(draw: Any) -> Case:
    n, m = draw(st.integers(2, 5)), draw(sizes)
    mode = draw(st.sampled_from(["sum", "mean", "max"]))
    padding = draw(st.none() | st.integers(-n, n - 1))
    last = False
    if draw(with_or_without):
        offsets = None
        indices = index_tensor(draw, (draw(sizes), draw(sizes)), n)
    else:
        # Not empty altogether: torch's F.embedding of no index has no second derivative.
        bags = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any))
        last = draw(with_or_without)
        starts = [sum(bags[:i]) for i in range(len(bags) + last)]
        offsets = torch.tensor(starts)
        indices = index_tensor(draw, (sum(bags),), n)
    weighted = mode == "sum" and draw(with_or_without)

    def apply(params: TensorDict, weights: Tensor | None = None) -> Tensor:
        return layers.embedding_bag(
            params,
            indices,
            offsets,
            mode=mode,
            padding_idx=padding,
            include_last_offset=last,
            per_sample_weights=weights,
        )

    return Case(
        partial(layers.init_embedding, num_embeddings=n, embedding_dim=m, padding_idx=padding),
        apply,
        (tuple(indices.shape),) if weighted else (),
        lambda: nn.EmbeddingBag(n, m, mode=mode, padding_idx=padding, include_last_offset=last),
        lambda module, *weights: module(indices, offsets, *weights),
    )


def one_or_many(draw: Any, values: st.SearchStrategy[int], dims: int) -> Any:
    return draw(values | st.lists(values, min_size=dims, max_size=dims).map(tuple))


CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CONV_TRANSPOSE = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@st.composite
def conv(draw: Any, dims: int, separable: bool = False) -> Case:
    groups = draw(st.integers(1, 2))
    n, m = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    kernel = one_or_many(draw, st.integers(1, 3), dims)
    padding_mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    padding = draw(st.sampled_from(["same", "valid", None]))
    if padding is None:
        padding = one_or_many(draw, st.integers(0, 2), dims)
    stride = 1 if padding == "same" else one_or_many(draw, st.integers(1, 2), dims)
    options = {
        "stride": stride,
        "padding": padding,
        "dilation": one_or_many(draw, st.integers(1, 2), dims),
        "padding_mode": padding_mode,
    }
    bias = draw(with_or_without)
    space = tuple(draw(st.integers(5, 6)) for _ in range(dims))
    batch = draw(st.sampled_from([(), (1,), (2,)]))

    if separable:

        class Separable(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.depthwise = CONV[dims](n, n, kernel, groups=n, bias=bias, **options)
                self.pointwise = CONV[dims](n, m, 1, bias=bias)

            def forward(self, x: Tensor) -> Tensor:
                return self.pointwise(self.depthwise(x))

        return Case(
            partial(
                layers.init_separable_conv,
                in_channels=n,
                out_channels=m,
                kernel_size=kernel,
                dims=dims,
                bias=bias,
            ),
            partial(layers.separable_conv, **options),
            ((*batch, n, *space),),
            Separable,
        )
    return Case(
        partial(
            layers.init_conv,
            in_channels=n,
            out_channels=m,
            kernel_size=kernel,
            dims=dims,
            groups=groups,
            bias=bias,
        ),
        partial(layers.conv, groups=groups, **options),
        ((*batch, n, *space),),
        lambda: CONV[dims](n, m, kernel, groups=groups, bias=bias, **options),
    )


@st.composite
def conv_transpose(draw: Any, dims: int) -> Case:
    groups = draw(st.integers(1, 2))
    n, m = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    kernel = one_or_many(draw, st.integers(2, 3), dims)
    stride = one_or_many(draw, st.integers(1, 3), dims)
    least_stride = stride if isinstance(stride, int) else min(stride)
    options = {
        "stride": stride,
        "padding": one_or_many(draw, st.integers(0, 1), dims),
        "output_padding": draw(st.integers(0, least_stride - 1)),
        "dilation": one_or_many(draw, st.integers(1, 2), dims),
        "groups": groups,
    }
    bias = draw(with_or_without)
    space = tuple(draw(st.integers(3, 4)) for _ in range(dims))
    batch = draw(st.sampled_from([(), (1,), (2,)]))
    return Case(
        partial(
            layers.init_conv_transpose,
            in_channels=n,
            out_channels=m,
            kernel_size=kernel,
            dims=dims,
            groups=groups,
            bias=bias,
        ),
        partial(layers.conv_transpose, **options),
        ((*batch, n, *space),),
        lambda: CONV_TRANSPOSE[dims](n, m, kernel, bias=bias, **options),
    )


BATCH_NORM = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORM = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
epsilons = st.sampled_from([1e-5, 1e-2])


def space_of(draw: Any, dims: int, least: int = 2) -> tuple[int, ...]:
    return tuple(draw(st.integers(least, 3)) for _ in range(dims))


@st.composite
def batch_norm(draw: Any, train: bool = False, instance: bool = False) -> Case:
    dims = draw(st.integers(1 if instance else 0, 3))
    n = draw(sizes)
    options = {"affine": draw(with_or_without), "track_running_stats": draw(with_or_without)}
    eps = draw(epsilons)
    init = layers.init_instance_norm if instance else layers.init_batch_norm
    apply = layers.instance_norm if instance else layers.batch_norm
    module = (INSTANCE_NORM if instance else BATCH_NORM)[dims]
    return Case(
        partial(init, num_features=n, **options),
        (lambda params, x: apply(params, x, eps=eps, train=True)[0])
        if train
        else partial(apply, eps=eps),
        ((draw(st.integers(2, 4)), n, *space_of(draw, dims)),),
        lambda: module(n, eps=eps, **options),
        lambda module, x: module.train(train)(x),
    )


@st.composite
def layer_norm(draw: Any, rms: bool = False) -> Case:
    shape = draw(st.lists(st.integers(2, 3), min_size=1, max_size=3).map(tuple))
    affine = draw(with_or_without)
    size = shape[0] if len(shape) == 1 else shape
    eps = draw(st.none() | epsilons if rms else epsilons)
    rest = {} if affine else {"normalized_shape": shape}
    inputs = ((*draw(batches), *shape),)
    if rms:
        return Case(
            partial(layers.init_rms_norm, normalized_shape=size, elementwise_affine=affine),
            partial(layers.rms_norm, eps=eps, **rest),
            inputs,
            lambda: nn.RMSNorm(size, eps=eps, elementwise_affine=affine),
        )
    bias = draw(with_or_without)
    return Case(
        partial(
            layers.init_layer_norm, normalized_shape=size, elementwise_affine=affine, bias=bias
        ),
        partial(layers.layer_norm, eps=eps, **rest),
        inputs,
        lambda: nn.LayerNorm(size, eps=eps, elementwise_affine=affine, bias=bias),
    )


@st.composite
def group_norm(draw: Any) -> Case:
    groups, affine, eps = draw(sizes), draw(with_or_without), draw(epsilons)
    n = groups * draw(st.integers(1, 2))
    dims = draw(st.integers(1, 3))
    return Case(
        partial(layers.init_group_norm, num_channels=n, affine=affine),
        partial(layers.group_norm, num_groups=groups, eps=eps),
        ((draw(sizes), n, *space_of(draw, dims)),),
        lambda: nn.GroupNorm(groups, n, eps=eps, affine=affine),
    )


rates = st.sampled_from([0.0, 0.3, 1.0])


@st.composite
def dropout(draw: Any, layer: Callable[..., Tensor], **options: Any) -> Case:
    key, p = random.key(draw(st.integers(0, 99))), draw(rates)
    p = torch.tensor(p) if draw(with_or_without) else p
    return Case(
        no_params,
        lambda params, x: layer(key, x, p, **options),
        ((draw(sizes), draw(sizes), *space_of(draw, draw(st.integers(0, 2)))),),
    )


MODULES = {"avg": "AvgPool", "max": "MaxPool"}


@st.composite
def pool(draw: Any, kind: str, adaptive: bool) -> Case:
    dims = draw(st.integers(1, 3))
    batch = draw(st.sampled_from([(), (1,), (2,)]))
    space = space_of(draw, dims, 3)
    if adaptive:
        name, arguments, options = f"adaptive_{kind}_pool{dims}d", (draw(st.integers(1, 3)),), {}
        module = f"Adaptive{MODULES[kind]}{dims}d"
    else:
        name, arguments = f"{kind}_pool{dims}d", (draw(st.integers(2, 3)),)
        module = f"{MODULES[kind]}{dims}d"
        options = {
            "stride": draw(st.integers(1, 2)),
            "padding": draw(st.integers(0, 1)),
            "ceil_mode": draw(with_or_without),
        }
    return Case(
        no_params,
        lambda params, x: getattr(layers, name)(x, *arguments, **options),
        ((*batch, 2, *space),),
        lambda: getattr(nn, module)(*arguments, **options),
    )


@st.composite
def global_pool(draw: Any, kind: str) -> Case:
    dims = draw(st.integers(1, 3))
    module = getattr(nn, f"Adaptive{MODULES[kind]}{dims}d")
    layer = getattr(layers, f"global_{kind}_pool")
    return Case(
        no_params,
        lambda params, x: layer(x),
        ((draw(sizes), draw(sizes), *space_of(draw, dims)),),
        lambda: nn.Sequential(module(1), nn.Flatten()),
    )


@st.composite
def activate_and_pool(draw: Any) -> Case:
    dims, kind = draw(st.integers(1, 3)), draw(st.sampled_from(sorted(MODULES)))
    name, module = draw(st.sampled_from([("relu", nn.ReLU), ("gelu", nn.GELU), ("tanh", nn.Tanh)]))
    pool, pooling = getattr(layers, f"{kind}_pool{dims}d"), getattr(nn, f"{MODULES[kind]}{dims}d")
    window = draw(st.integers(2, 3)), draw(st.integers(1, 2)), draw(st.integers(0, 1))
    return Case(
        no_params,
        lambda params, x: layers.activate_and_pool(layers.activation(name), pool, x, *window),
        ((draw(sizes), 2, *space_of(draw, dims, 3)),),
        lambda: nn.Sequential(module(), pooling(*window)),
    )


@st.composite
def activation(draw: Any) -> Case:
    name = draw(st.sampled_from(sorted(ACTIVATIONS)))
    return Case(no_params, lambda params, x: layers.activation(name)(x), ((*draw(batches), 2),))


@st.composite
def gated(draw: Any, layer: Callable[..., Tensor], module: Callable[[], nn.Module] | None) -> Case:
    return Case(no_params, lambda params, x: layer(x), ((*draw(batches), 2 * draw(sizes)),), module)


CASES: dict[str, st.SearchStrategy[Case]] = {
    "linear": linear(),
    "bilinear": bilinear(),
    "embedding": embedding(),
    "unembed": unembed(),
    "embedding_bag": embedding_bag(),
    **{f"conv{dims}d": conv(dims) for dims in (1, 2, 3)},
    **{f"conv_transpose{dims}d": conv_transpose(dims) for dims in (1, 2, 3)},
    "separable_conv": st.integers(1, 3).flatmap(partial(conv, separable=True)),
    "batch_norm": batch_norm(),
    "batch_norm_train": batch_norm(train=True),
    "instance_norm": batch_norm(instance=True),
    "instance_norm_train": batch_norm(instance=True, train=True),
    "layer_norm": layer_norm(),
    "rms_norm": layer_norm(rms=True),
    "group_norm": group_norm(),
    "dropout": dropout(layers.dropout),
    "channel_dropout": dropout(layers.channel_dropout),
    "alpha_dropout": dropout(layers.alpha_dropout),
    "feature_alpha_dropout": dropout(layers.feature_alpha_dropout),
    "stochastic_depth": dropout(layers.stochastic_depth, mode="row"),
    "max_pool": pool("max", adaptive=False),
    "avg_pool": pool("avg", adaptive=False),
    "adaptive_max_pool": pool("max", adaptive=True),
    "adaptive_avg_pool": pool("avg", adaptive=True),
    "global_max_pool": global_pool("max"),
    "global_avg_pool": global_pool("avg"),
    "activate_and_pool": activate_and_pool(),
    "activation": activation(),
    "glu": gated(layers.glu, nn.GLU),
    "geglu": gated(layers.geglu, None),
    "swiglu": gated(layers.swiglu, None),
    "elu_features": gated(layers.elu_features, None),
    "normalize": gated(layers.normalize, None),
}
NO_MODULE = ["stochastic_depth", "activation", "geglu", "swiglu", "elu_features", "normalize"]
WITH_MODULE = [name for name in CASES if "dropout" not in name and name not in NO_MODULE]
WITH_PARAMS = [name for name in WITH_MODULE if "pool" not in name and name != "glu"]

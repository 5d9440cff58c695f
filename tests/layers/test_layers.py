"""What holds of every layer: it equals torch.nn's, and torch's transforms all work on it."""

import inspect
import warnings

import block_cases
import layer_cases
import pytest
import sequence_cases
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import DTYPE, reference
from torch.func import grad, vjp
from torch.fx.experimental.proxy_tensor import make_fx

from funcnets import layers, random, testing, tree

keys = st.integers(0, 2**16).map(random.key)
few = settings(max_examples=4)
CASES = layer_cases.CASES | block_cases.CASES | sequence_cases.CASES
WITH_MODULE = [*layer_cases.WITH_MODULE, *block_cases.WITH_MODULE]
WITH_PARAMS = [*layer_cases.WITH_PARAMS, *block_cases.CASES, *sequence_cases.WITH_PARAMS]
POOLS = ["max", "avg", "adaptive_max", "adaptive_avg"]
PROPERTIES = [
    "keeps_the_dtype",
    "leaves_its_arguments_as_they_were",
    "repeats_itself",
    "uses_no_global_generator",
    "gradients_match_finite_differences",
    "jvp_and_vjp_agree",
    "hessian_products_are_right",
    "vmap_equals_the_loop",
    "an_ensemble_trains_as_its_members",
    "single_precision_is_close",
    "bfloat16_is_close",
]
OF_PARAMS = ["initializes_an_ensemble", "a_file_changes_nothing", "a_state_dict_changes_nothing"]
NOT_MEANT = {
    # As in torch, the row of padding is read and not trained.
    "embedding": ["gradients_match_finite_differences", "hessian_products_are_right"],
    # Other noise is drawn in another precision, and other experts may come first.
    "mixture": ["single_precision_is_close", "bfloat16_is_close"],
}
# What is no layer by itself: parts of those above, losses, and ways to call them.
PARTS = {"attention_inputs", "attention_outputs", "attention_queries", "band_mask", "finish"}
PARTS |= {"balance_loss", "importance_loss", "router_z_loss", "with_buffers", "memory_attention"}
PARTS |= {"cached_attention", "cached_encoder_layer", "cached_decoder_layer", "relative_bucket"}
WITHIN = {
    "positions": "alibi_bias learned_positions relative_bias rotary sincos_2d sinusoidal",
    "attention": "rotary_positions",
    "activation": "identity quick_gelu squared_relu",
    **{f"{kind}_pool": " ".join(f"{kind}_pool{d}d" for d in (1, 2, 3)) for kind in POOLS},
    **{f"{kind}{d}d": kind for kind in ("conv", "conv_transpose") for d in (1, 2, 3)},
}
every_layer = pytest.mark.parametrize("name", CASES)


def close(actual, expected, **options):
    options = {"rtol": 1e-9, "atol": 1e-9} | options
    tree.map(lambda a, b: torch.testing.assert_close(a, b, **options), actual, expected)


def draw(data, name, key):
    """A case, its parameters and inputs, and a weighted sum of its outputs."""
    case = data.draw(CASES[name])
    params, inputs = case.params(random.fold_in(key, 0)), case.draw_inputs(random.fold_in(key, 1))

    def weigh(outputs):
        total = 0.0
        for i, y in enumerate(tree.leaves(outputs)):
            weights = random.normal(random.fold_in(key, 2 + i), y.shape, dtype=DTYPE)
            total = total + (weights * (y + 0.1 * y.square())).sum()
        return total

    return case, params, inputs, weigh


def noise_like(structure, key):
    return tree.map_with_path(
        lambda path, leaf: random.normal(
            random.fold_in(key, sum(map(ord, "".join(path)))), leaf.shape, dtype=leaf.dtype
        ),
        structure,
    )


def test_no_layer_is_missing():
    public = {
        name
        for name in layers.__all__
        if inspect.isroutine(getattr(layers, name)) and not name.startswith("init_")
    }
    within = {name for names in WITHIN.values() for name in names.split()}
    assert set(WITHIN) <= set(CASES)
    assert public - PARTS - within <= set(CASES)


@pytest.mark.parametrize("name", WITH_MODULE)
@settings(max_examples=25)
@given(data=st.data(), key=keys)
def test_equals_the_torch_module(name, data, key):
    case, params, inputs, _ = draw(data, name, key)
    module = reference(case, params)
    outputs = case.apply(params, *inputs)
    tracked = tuple(x.clone().requires_grad_() for x in inputs)
    expected = case.call(module, *tracked)
    close(outputs, expected.detach())

    cotangent = random.normal(random.fold_in(key, 5), outputs.shape, dtype=DTYPE)
    param_grads, *input_grads = vjp(case.apply, params, *inputs)[1](cotangent)
    if expected.requires_grad:
        expected.backward(cotangent)
    named = dict(module.named_parameters())
    for entry, gradient in param_grads.flatten_keys(".").items():
        wanted = named[entry].grad if entry in named else None  # a buffer has none
        close(gradient, torch.zeros_like(gradient) if wanted is None else wanted)
    for gradient, x in zip(input_grads, tracked, strict=True):
        close(gradient, x.grad)


@every_layer
@few
@given(data=st.data(), seed=st.integers(0, 2**16))
def test_properties(name, data, seed):
    case = data.draw(CASES[name])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "There is a performance drop")  # a loop for a vmap
        testing.check_model(
            (case.init, case.apply),
            tuple(testing.floats(" ".join(map(str, size))) for size in case.inputs),
            only=[*PROPERTIES, *(OF_PARAMS if name in WITH_PARAMS else ())],
            skip=NOT_MEANT.get(name, ()),
            examples=1,
            seed=seed,
        )


@every_layer
@settings(max_examples=2)
@given(data=st.data(), key=keys)
def test_traced_equals_eager(name, data, key):
    case, params, inputs, weigh = draw(data, name, key)
    point = (params, *inputs)
    leaves, structure = tree.flatten(point)

    def step(*leaves):
        arguments = tree.unflatten(structure, list(leaves))
        gradient = grad(lambda a: weigh(case.apply(*a)))(arguments)
        return case.apply(*arguments), tree.leaves(gradient)

    def members(*leaves):
        return torch.func.vmap(step)(*(torch.stack([leaf, leaf + 0.1]) for leaf in leaves))

    other = tree.leaves(noise_like(point, key))
    other = [x.abs() + 0.5 for x in other]  # a running variance is positive
    for f in (step, members):
        traced = make_fx(f, tracing_mode="fake", _allow_non_fake_inputs=True)(*leaves)
        close(traced(*other), f(*other))


@pytest.mark.dynamo
@every_layer
@settings(max_examples=1)
@given(data=st.data(), key=keys)
def test_compiled_equals_eager(name, data, key):
    case, params, inputs, weigh = draw(data, name, key)
    torch._dynamo.reset()
    compiled = torch.compile(case.apply, fullgraph=True, backend="aot_eager")
    trained, buffers = tree.partition(params)
    point = tree.map(lambda leaf: leaf.clone().requires_grad_(), (trained, *inputs))
    outputs = compiled(tree.merge(point[0], buffers), *point[1:])
    close(tree.map(torch.detach, outputs), case.apply(params, *inputs))
    expected = grad(lambda a: weigh(case.apply(tree.merge(a[0], buffers), *a[1:])))(
        (trained, *inputs)
    )
    leaves = tree.leaves(point)
    found = torch.autograd.grad(weigh(outputs), leaves, materialize_grads=True)
    close(list(found), tree.leaves(expected))

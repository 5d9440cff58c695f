"""What holds of every layer: it equals torch.nn's, and torch's transforms all work on it."""

import block_cases
import layer_cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import DTYPE, reference
from torch.func import grad, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from funcnets import random, tree

keys = st.integers(0, 2**16).map(random.key)
few = settings(max_examples=4)
CASES = layer_cases.CASES | block_cases.CASES
WITH_MODULE = [*layer_cases.WITH_MODULE, *block_cases.CASES]
WITH_PARAMS = [*layer_cases.WITH_PARAMS, *block_cases.CASES]
every_layer = pytest.mark.parametrize("name", CASES)


def close(actual, expected, **options):
    options = {"rtol": 1e-9, "atol": 1e-9} | options
    tree.map(lambda a, b: torch.testing.assert_close(a, b, **options), actual, expected)


def draw(data, name, key):
    """A case, its parameters and inputs, and a function to the sum of its weighted outputs."""
    case = data.draw(CASES[name])
    params, inputs = case.params(random.fold_in(key, 0)), case.draw_inputs(random.fold_in(key, 1))

    def loss(params, *inputs):
        outputs = case.apply(params, *inputs)
        weights = random.normal(random.fold_in(key, 2), outputs.shape, dtype=DTYPE)
        return (weights * (outputs + 0.1 * outputs.square())).sum()

    return case, params, inputs, loss


def stack(singles):
    """Tuples of trees and tensors to one; torch.stack gives trees the batch size vmap asks for."""
    return tuple(torch.stack(parts) for parts in zip(*singles, strict=True))


def members(case, key, n=3):
    """An ensemble: n trees and inputs, and the same stacked."""
    singles = [
        (case.params(k), *case.draw_inputs(random.fold_in(k, 1))) for k in random.split(key, n)
    ]
    return singles, stack(singles)


def noise_like(structure, key):
    return tree.map_with_path(
        lambda path, leaf: random.normal(
            random.fold_in(key, sum(map(ord, "".join(path)))), leaf.shape, dtype=leaf.dtype
        ),
        structure,
    )


def dot(a, b):
    products = tree.leaves(tree.map(lambda x, y: (x * y).sum(), a, b))
    return sum(products, torch.zeros((), dtype=DTYPE))


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
@given(data=st.data(), key=keys)
def test_vmap_equals_the_loop(name, data, key):
    case, *_ = draw(data, name, key)
    singles, stacked = members(case, key)
    expected = torch.stack([case.apply(*single) for single in singles])
    close(vmap(case.apply, randomness="error")(*stacked), expected)


@pytest.mark.parametrize("name", WITH_PARAMS)
@few
@given(data=st.data(), key=keys)
def test_vmap_of_parameters_alone_equals_the_loop(name, data, key):
    case, _, inputs, _ = draw(data, name, key)
    singles, stacked = members(case, key)
    expected = torch.stack([case.apply(single[0], *inputs) for single in singles])
    close(vmap(lambda params: case.apply(params, *inputs))(stacked[0]), expected)


@every_layer
@few
@given(data=st.data(), key=keys)
def test_vmap_of_grad_equals_the_loop(name, data, key):
    case, _, _, loss = draw(data, name, key)
    singles, stacked = members(case, key)
    gradient = grad(lambda arguments: loss(*arguments))
    expected = stack([gradient(single) for single in singles])
    close(vmap(gradient)(stacked), expected)


@every_layer
@few
@given(data=st.data(), key=keys)
def test_forward_and_reverse_mode_agree(name, data, key):
    case, params, inputs, _ = draw(data, name, key)
    point = (params, *inputs)
    direction = noise_like(point, random.fold_in(key, 3))
    outputs, tangent = jvp(case.apply, point, direction)
    cotangent = random.normal(random.fold_in(key, 4), outputs.shape, dtype=DTYPE)
    close(dot(vjp(case.apply, *point)[1](cotangent), direction), dot(cotangent, tangent))


@every_layer
@few
@given(data=st.data(), key=keys)
def test_second_derivatives_agree_in_both_modes(name, data, key):
    _, params, inputs, loss = draw(data, name, key)
    point = (params, *inputs)
    direction = noise_like(point, random.fold_in(key, 3))
    gradient = grad(lambda arguments: loss(*arguments))
    _, forward = jvp(gradient, (point,), (direction,))
    reverse = grad(lambda arguments: dot(gradient(arguments), direction))(point)
    close(forward, reverse, rtol=1e-7, atol=1e-7)


@every_layer
@settings(max_examples=2)
@given(data=st.data(), key=keys)
def test_traced_equals_eager(name, data, key):
    case, params, inputs, loss = draw(data, name, key)
    point = (params, *inputs)
    leaves, structure = tree.flatten(point)

    def step(*leaves):
        arguments = tree.unflatten(structure, list(leaves))
        return case.apply(*arguments), tree.leaves(grad(lambda a: loss(*a))(arguments))

    traced = make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(*leaves)
    other = tree.leaves(noise_like(point, key))
    other = [x.abs() + 0.5 for x in other]  # a running variance is positive
    close(traced(*other), step(*other))


@pytest.mark.parametrize("name", WITH_PARAMS)
@few
@given(data=st.data(), key=keys)
def test_init_of_an_ensemble_is_the_init_of_its_members(name, data, key):
    case = data.draw(CASES[name])
    ensemble = vmap(case.init)(random.split(key, 4))
    alone = [case.init(member_key) for member_key in random.split(key, 4)]
    close(ensemble, torch.stack(alone), rtol=0, atol=0)


@pytest.mark.dynamo
@every_layer
@settings(max_examples=1)
@given(data=st.data(), key=keys)
def test_compiled_equals_eager(name, data, key):
    case, params, inputs, loss = draw(data, name, key)

    def step(params, *inputs):
        return case.apply(params, *inputs), grad(lambda a: loss(*a))((params, *inputs))

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    close(compiled(params, *inputs), step(params, *inputs))
    compiled = torch.compile(case.apply, fullgraph=True, backend="aot_eager")
    tracked = tree.map(lambda leaf: leaf.clone().requires_grad_(), params)
    close(compiled(tracked, *inputs).detach(), case.apply(params, *inputs))

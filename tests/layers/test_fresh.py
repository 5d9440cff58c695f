"""Steps in the memory of their argument: the numbers of those that take new memory."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, jvp, vmap

from funcnets import compile, random
from funcnets.layers.activations import ACTIVATIONS
from funcnets.layers.fresh import activate_fresh, add_fresh

# hardsigmoid has no second derivative in torch.
NAMES = st.sampled_from(sorted(set(ACTIVATIONS) - {"hardsigmoid"}))
SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)


def draw(seed, shape=(4, 3)):
    return random.normal(random.key(seed), shape, 0.0, 4.0, torch.float64)


def step(activate, add, x, weight):
    """All tensors but x and the weight are fresh."""
    return add(activate(x * weight), activate(x + weight)).square().sum()


@given(NAMES, SHAPES, st.integers(0, 99))
def test_numbers_and_derivatives_are_those_of_the_plain_step(name, shape, seed):
    activation = ACTIVATIONS[name]
    x, weight = draw(seed, shape), draw(seed + 100, shape)

    def fresh(x, weight):
        return step(lambda y: activate_fresh(activation, y), add_fresh, x, weight)

    def plain(x, weight):
        return step(activation, torch.add, x, weight)

    before = x.clone(), weight.clone()
    assert torch.equal(fresh(x, weight), plain(x, weight))
    tracked = [leaf.clone().requires_grad_() for leaf in (x, weight)]
    for f in (fresh, plain):
        value = f(*tracked)
        first = torch.autograd.grad(value, tracked, create_graph=True)
        norm = sum(g.square().sum() for g in first)
        second = (
            torch.autograd.grad(norm, tracked, materialize_grads=True) if norm.requires_grad else ()
        )
        if f is fresh:
            held = value, first, second
    torch.testing.assert_close(held, (value, first, second), rtol=0, atol=0)
    assert torch.equal(x, before[0])
    assert torch.equal(weight, before[1])


@given(NAMES, st.integers(0, 99))
def test_under_transforms(name, seed):
    activation = ACTIVATIONS[name]
    x, weight = draw(seed), draw(seed + 100, (3,))

    def both(transform):
        def fresh(x, weight):
            return step(lambda y: activate_fresh(activation, y), add_fresh, x, weight)

        def plain(x, weight):
            return step(activation, torch.add, x, weight)

        torch.testing.assert_close(transform(fresh)(x, weight), transform(plain)(x, weight))

    both(lambda f: vmap(f, in_dims=(0, None)))
    both(lambda f: vmap(grad(f, argnums=1), in_dims=(0, None)))
    both(lambda f: lambda x, w: jvp(lambda w: f(x, w), (w,), (w,)))


def test_what_the_vmap_does_not_map_is_no_place_for_members():
    x, weight = draw(0), draw(1, (3,))
    added = vmap(lambda row: add_fresh(weight + 1, row))(x)
    torch.testing.assert_close(added, weight + 1 + x)


IN_PLACE = ("celu", "elu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "mish", "selu")


@pytest.mark.parametrize("name", ["relu", "relu6", "silu", *IN_PLACE])
def test_no_second_piece_of_memory(name):
    x = draw(0)
    wanted = ACTIVATIONS[name](x)
    assert activate_fresh(ACTIVATIONS[name], x).data_ptr() == x.data_ptr()
    assert torch.equal(x, wanted)
    other = draw(1)
    assert add_fresh(x, other).data_ptr() == x.data_ptr() != other.data_ptr()


@pytest.mark.parametrize("name", ["silu", *IN_PLACE])
def test_new_memory_where_the_derivative_asks_for_the_input(name):
    x = draw(0).requires_grad_() * 1
    before = x.detach().clone()
    assert activate_fresh(ACTIVATIONS[name], x).data_ptr() != x.data_ptr()
    assert torch.equal(x, before)


def test_new_memory_where_the_sum_has_another_shape_or_dtype():
    assert add_fresh(draw(0, (1, 3)), draw(1)).shape == (4, 3)
    assert add_fresh(draw(0).float(), draw(1)).dtype == torch.float64


def test_a_compiled_function_leaves_its_argument():
    x = draw(0)
    before = x.clone()
    f = compile(lambda x: activate_fresh(F.relu, x), backend="aot_eager")
    assert torch.equal(f(x), F.relu(before))
    assert torch.equal(x, before)

"""Batch norm of all members at once, whatever the size, held against one member after another."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch.func import grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from funcnets import compile, layers, random, tree
from funcnets.layers import members_norm

aten = torch.ops.aten
OPERATORS = (
    aten.native_batch_norm,
    aten._native_batch_norm_legit,
    aten._native_batch_norm_legit_no_training,
    aten.native_batch_norm_backward,
)


class Kernels(TorchDispatchMode):
    """The channels of what torch's kernels are given together with a weight that is not of ones."""

    def __init__(self):
        super().__init__()
        self.channels = []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        if f._overloadpacket in OPERATORS:
            back = f._overloadpacket is aten.native_batch_norm_backward
            weight = args[1 + back]
            if weight is not None and (weight != 1).any():
                self.channels.append(args[0].shape[1])
        return f(*args, **(kwargs or {}))


def always():
    return mock.patch.object(members_norm, "_MANY_NUMBERS", 0)


def drawn(key, members, n, shape, dtype):
    """Parameters of the members, and images [members, *shape]."""
    first, second = random.split(key)
    values = random.normal(first, (4, members, n), dtype=dtype)
    names = ("weight", "bias", "running_mean", "running_var")
    entries = dict(zip(names, values.unbind(), strict=True))
    entries["running_var"] = entries["running_var"].exp()
    x = 2 + random.normal(second, (members, *shape), dtype=dtype)
    return TensorDict(entries, batch_size=[members]), x


def step(params, x, layer=layers.batch_norm):
    """Gradients of parameters and images, outputs and buffers."""

    def loss(params, x):
        outputs, buffers = layer(params, x, train=True)
        return (outputs * 1.3).sin().sum(), (outputs, buffers)

    gradients, found = grad(loss, (0, 1), has_aux=True)(params, x)
    return *gradients, *found


def stacked(f, *trees):
    """What ``vmap`` gives, by a loop."""
    results = [f(*each) for each in zip(*(tree.unbind(0) for tree in trees), strict=True)]
    return tuple(
        tree.stack(list(column)) if isinstance(column[0], TensorDict) else torch.stack(column)
        for column in zip(*results, strict=True)
    )


def assert_same(found, expected, **tolerance):
    for ours, theirs in zip(found, expected, strict=True):
        if isinstance(ours, TensorDict):
            assert set(ours.keys()) == set(theirs.keys())
            pairs = [(ours[name], theirs[name]) for name in ours.keys()]  # noqa: SIM118
        else:
            pairs = [(ours, theirs)]
        for pair in pairs:
            torch.testing.assert_close(*pair, **tolerance)


@pytest.mark.parametrize("layer", [layers.batch_norm, layers.instance_norm])
@given(
    key=st.integers(0, 99).map(random.key),
    sizes=st.tuples(st.integers(1, 4), st.integers(2, 4), st.integers(1, 3)),
    space=st.lists(st.integers(2, 4), max_size=3),
    axis=st.integers(0, 2),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_a_step_of_members_is_that_of_each(layer, key, sizes, space, axis, dtype):
    members, batch, n = sizes
    if layer is layers.instance_norm:
        space = space or [2]
    params, x = drawn(key, members, n, (batch, n, *space), dtype)
    before = params.clone(), x.clone()
    moved = x.movedim(0, axis).contiguous()
    with always(), Kernels() as kernels:
        found = vmap(lambda params, x: step(params, x, layer), (0, axis))(params, moved)
    count = members * n * (batch if layer is layers.instance_norm else 1)
    assert kernels.channels == [count, count]  # forward and backward
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {}
    assert_same(found, stacked(lambda params, x: step(params, x, layer), params, x), **tolerance)
    assert torch.equal(x, before[1])
    assert all(torch.equal(params[name], before[0][name]) for name in before[0].keys())  # noqa: SIM118


@given(key=st.integers(0, 99).map(random.key), which=st.sampled_from(["params", "x"]))
def test_members_may_share_their_parameters_or_their_images(key, which):
    params, x = drawn(key, 3, 2, (4, 2, 3), torch.float64)
    axes = (None, 0) if which == "params" else (0, None)
    given = (params[0], x) if which == "params" else (params, x[0])
    with always(), Kernels() as kernels:
        found = vmap(step, axes)(*given)
    # Of images that are the same for all, the statistics are computed once, by torch's way.
    assert kernels.channels == ([6, 6] if which == "params" else [])
    if which == "params":
        expected = stacked(step, torch.stack([params[0]] * 3), x)
    else:
        expected = stacked(step, params, torch.stack([x[0]] * 3))
    assert_same(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("train", [False, True])
def test_what_is_the_same_for_all_members_is_computed_once(train):
    params, x = drawn(random.key(0), 1, 2, (4, 2, 3), torch.float64)
    layer = lambda: layers.batch_norm(params[0], x[0], train=train)  # noqa: E731
    expected = layer()[0] if train else layer()
    scales = torch.arange(3.0, dtype=torch.float64)
    with always(), Kernels() as kernels:
        found = vmap(lambda scale: (layer()[0] if train else layer()) * scale)(scales)
    assert kernels.channels == [2]
    torch.testing.assert_close(found, torch.stack([expected * scale for scale in scales]))


@given(key=st.integers(0, 99).map(random.key))
def test_members_of_members(key):
    params, x = drawn(key, 6, 2, (4, 2, 3), torch.float64)
    with always(), Kernels() as kernels:
        found = vmap(vmap(step))(params.reshape(2, 3), x.unflatten(0, (2, 3)))
    assert kernels.channels == [12, 12]
    found = [each.flatten(0, 1) for each in found]
    assert_same(found, stacked(step, params, x), rtol=1e-9, atol=1e-9)


@given(key=st.integers(0, 99).map(random.key))
def test_derivatives_of_derivatives(key):
    """By plain autograd, which does not say beforehand that they will be taken; and by others."""
    params, x = drawn(key, 3, 2, (4, 2, 3), torch.float64)
    leaves = {name: params[name] for name in ("weight", "bias")}

    def loss(weight, bias, x):
        entries = params[0].update({"weight": weight, "bias": bias})
        return (layers.batch_norm(entries, x, train=True)[0] * 1.3).sin().sum()

    def second(weight, bias, x, transform):
        operands = [each.clone().requires_grad_() for each in (weight, bias, x)]
        total = transform(loss)(*operands).sum()
        first = torch.autograd.grad(total, operands, create_graph=True)
        squares = sum(each.square().sum() for each in first)
        return torch.autograd.grad(squares, operands, materialize_grads=True)

    with always(), Kernels() as kernels:
        found = second(**leaves, x=x, transform=vmap)
    assert 6 in kernels.channels
    expected = [second(*each, lambda f: f) for each in zip(*leaves.values(), x, strict=True)]
    for ours, theirs in zip(found, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.stack(theirs), rtol=1e-8, atol=1e-8)

    operands = (*leaves.values(), x)
    twice = grad(lambda *each: grad(loss, 2)(*each).square().sum(), 2)
    along = lambda *each: jvp(lambda x: loss(*each[:2], x), (each[2],), (each[2].cos(),))  # noqa: E731
    for f in (lambda *each: (twice(*each),), along):
        with always():
            found = vmap(f)(*operands)
        assert_same(found, stacked(f, *operands), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("layer", [layers.batch_norm, layers.instance_norm])
@given(
    key=st.integers(0, 99).map(random.key),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3)),
    space=st.lists(st.integers(1, 4), max_size=3),
    axis=st.integers(0, 2),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_inference_of_members_is_that_of_each(layer, key, sizes, space, axis, dtype):
    members, batch, n = sizes
    params, x = drawn(key, members, n, (batch, n, *space), dtype)
    with Kernels() as kernels:
        found = vmap(layer, (0, axis), axis)(params, x.movedim(0, axis).contiguous())
    assert kernels.channels == [members * n]
    (expected,) = stacked(lambda params, x: (layer(params, x),), params, x)
    torch.testing.assert_close(found.movedim(axis, 0), expected)


def test_gradients_at_inference():
    params, x = drawn(random.key(0), 3, 2, (4, 2, 3), torch.float64)

    def loss(params, x):
        return layers.batch_norm(params, x).sin().sum()

    (expected,) = stacked(lambda params, x: (grad(loss, 1)(params, x),), params, x)
    torch.testing.assert_close(vmap(grad(loss, 1))(params, x), expected)
    leaf = x.clone().requires_grad_()
    with Kernels() as kernels:  # plain autograd looks through
        vmap(loss)(params, leaf).sum().backward()
    assert kernels.channels == [6, 6]
    torch.testing.assert_close(leaf.grad, expected)


@pytest.mark.parametrize(
    ("shape", "dtype", "affine", "channels"),
    [
        ((8, 16, 16, 16), torch.float32, True, [512, 512]),
        ((8, 16, 16, 15), torch.float32, True, []),  # few numbers
        ((8, 16, 16, 16), torch.bfloat16, True, []),
        ((8, 16, 16, 16), torch.float32, False, []),
    ],
)
def test_members_are_channels_where_that_is_faster(shape, dtype, affine, channels):
    params, x = drawn(random.key(0), 32, 16, shape, dtype)
    if not affine:
        params = params.exclude("weight", "bias")
    gradient = grad(lambda x, params: layers.batch_norm(params, x, train=True)[0].sin().sum())
    with Kernels() as kernels:
        found = vmap(gradient)(x, params)
    assert kernels.channels == channels
    if dtype == torch.float32:
        (expected,) = stacked(lambda x, params: (gradient(x, params),), x, params)
        torch.testing.assert_close(found, expected)


def test_what_is_compiled_is_left_to_the_compiler():
    params, x = drawn(random.key(0), 3, 2, (4, 2, 3), torch.float64)
    ours = dict.fromkeys(["in_training", "at_inference"], mock.DEFAULT)
    with always(), mock.patch.multiple(members_norm, **ours) as spies:
        found = compile(vmap(step), backend="aot_eager")(params, x)
        outputs = compile(vmap(layers.batch_norm), backend="aot_eager")(params, x)
    assert not any(spy.called for spy in spies.values())
    assert_same(found, stacked(step, params, x))
    torch.testing.assert_close(outputs, vmap(layers.batch_norm)(params, x))

"""Pooling beyond torch's own functions."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from funcnets import compile, layers, random
from funcnets.layers import pooling


@given(dims=st.integers(0, 3), key=st.integers(0, 99).map(random.key))
def test_global_pooling_is_the_mean_and_maximum_over_space(dims, key):
    x = random.normal(key, (2, 3, *[4] * dims), dtype=torch.float64)
    flat = x.reshape(2, 3, -1)
    torch.testing.assert_close(layers.global_avg_pool(x), flat.mean(-1))
    assert torch.equal(layers.global_max_pool(x), flat.amax(-1))


POOLS = {
    1: (layers.max_pool1d, layers.avg_pool1d),
    2: (layers.max_pool2d, layers.avg_pool2d),
    3: (layers.max_pool3d, layers.avg_pool3d),
}


@given(
    dims=st.integers(1, 3),
    largest=st.booleans(),
    name=st.sampled_from(["relu", "relu6", "gelu", "tanh", "leaky_relu"]),
    window=st.sampled_from([(2,), (2, 1), (3, 2, 1)]),
    tapped=st.booleans(),
    ties=st.booleans(),
    seed=st.integers(0, 99),
)
def test_activation_and_pooling_have_the_numbers_and_gradients_of_one_after_the_other(
    dims, largest, name, window, tapped, ties, seed
):
    pool, activation = POOLS[dims][0 if largest else 1], layers.activation(name)
    x = random.normal(random.key(seed), (2, 3, *[5] * dims), 0.0, 4.0, torch.float64)
    if ties:  # zeros and saturated values among them, also within one window
        x = x.round()
    x[0, 0, 0] = torch.nan
    before, seen = x.clone(), []

    def tap(h):
        seen.append(h)
        return 2 * h

    def both(x):
        return layers.activate_and_pool(activation, pool, x, *window, tap=tap if tapped else None)

    def one_by_one(x):
        return pool(activation(x) * (2 if tapped else 1), *window)

    def loss(f):
        return lambda x: f(x).nan_to_num().sin().sum()

    expected = one_by_one(x)
    torch.testing.assert_close(both(x), expected, rtol=0, atol=0, equal_nan=True)
    found = (grad(loss(both))(x), vmap(grad(loss(both)))(x[:, None])[:, 0])
    for gradient in found:
        torch.testing.assert_close(gradient, grad(loss(one_by_one))(x), equal_nan=True)
    tangent = random.normal(random.key(seed + 100), x.shape, dtype=torch.float64)
    torch.testing.assert_close(
        jvp(both, (x,), (tangent,)), jvp(one_by_one, (x,), (tangent,)), equal_nan=True
    )
    assert torch.equal(x.nan_to_num(), before.nan_to_num())
    if tapped:
        torch.testing.assert_close(seen[0], activation(x), equal_nan=True)


class Rectified(TorchDispatchMode):
    """Counts the values that ReLU is computed of."""

    count = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        if f._overloadpacket in (torch.ops.aten.relu, torch.ops.aten.relu_):
            self.count += args[0].numel()
        return f(*args, **(kwargs or {}))


def test_of_relu_and_the_largest_the_largest_come_first():
    relu, x = layers.activation("relu"), torch.ones(1, 1, 8, 8)
    for tap, count in ((None, 16), (torch.clone, 64)):
        with Rectified() as rectified:
            layers.activate_and_pool(relu, layers.max_pool2d, x, 2, tap=tap)
        assert rectified.count == count


class Gathered(TorchDispatchMode):
    """Counts how often values are gathered by their places."""

    count = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        self.count += f._overloadpacket is torch.ops.aten.gather
        return f(*args, **(kwargs or {}))


WINDOWS = st.sampled_from(
    [(2,), (3, 2, 1), (2, 1), ((3, 2), (1, 2), (1, 0)), (2, 2, 0, 2), (3, 2, 0, 1, True), (5, 1, 2)]
)


@given(
    window=WINDOWS,
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(5, 9), st.integers(5, 9)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    values=st.sampled_from(["plain", "ties", "nan", "infinite"]),
    seed=st.integers(0, 99),
)
def test_the_largest_are_those_of_torch_to_the_bit(window, shape, dtype, values, seed):
    """Where they are found with channels last, whatever the size; derivatives included."""
    x, tangent = random.normal(random.key(seed), (2, *shape), 0.0, 2.0, dtype).unbind()
    if values != "plain":
        x = x.round()
    if values == "nan":
        x = torch.where(x == 1, torch.nan, x)
    if values == "infinite":
        x = torch.where(x == 0, -torch.inf, x)

    def results(pool):
        def loss(x):
            return (pool(x, *window).nan_to_num() * 0.7).sin().sum()

        members = torch.stack([x, x.flip(0)])
        twice = grad(lambda x: (grad(loss)(x) * tangent).sum())
        leaf = x.clone().requires_grad_()
        loss(leaf).backward()
        return (
            pool(x, *window),
            leaf.grad,
            grad(loss)(x),
            vmap(grad(loss))(members),
            vmap(lambda x: pool(x, *window), in_dims=1, out_dims=2)(members.movedim(0, 1)),
            twice(x),
            *jvp(lambda x: pool(x, *window), (x,), (tangent,)),
        )

    before, expected = x.clone(), results(F.max_pool2d)
    limits = {"_MANY_NUMBERS": 0, "_SEVERAL_CHANNELS": 0}
    with mock.patch.multiple(pooling, **limits), Gathered() as gathered:
        found = results(layers.max_pool2d)
    assert gathered.count
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(x.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize(
    ("shape", "options", "count"),
    [
        ((4, 16, 32, 32), {}, 1),
        ((4, 16, 31, 32), {}, 0),  # few numbers
        ((64, 2, 32, 32), {}, 0),  # few channels
        ((16, 64, 64), {}, 0),
        ((4, 16, 32, 32), {"dtype": torch.bfloat16}, 0),
        ((4, 16, 32, 32), {"memory_format": torch.channels_last}, 0),
    ],
)
def test_places_are_looked_for_where_that_is_faster(shape, options, count):
    x = random.normal(random.key(0), shape).to(**options)
    with Gathered() as gathered:
        found = layers.max_pool2d(x, 3, 2, 1)
    assert gathered.count == count
    assert torch.equal(found, F.max_pool2d(x, 3, 2, 1))
    both = layers.max_pool2d(x, 3, 2, 1, return_indices=True)
    assert all(map(torch.equal, both, F.max_pool2d(x, 3, 2, 1, return_indices=True)))


def test_members_and_images_may_lie_in_any_order():
    """As they come out of a batch norm under vmap."""
    x = random.normal(random.key(0), (4, 2, 16, 32, 32)).transpose(0, 1)
    with Gathered() as gathered:
        found = vmap(lambda x: layers.max_pool2d(x, 2))(x)
    assert gathered.count == 1
    assert torch.equal(found, vmap(lambda x: F.max_pool2d(x, 2))(x))


def test_a_compiled_pool_is_left_to_the_compiler():
    x, graphs = random.normal(random.key(0), (4, 16, 32, 32)), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    found = compile(lambda x: layers.max_pool2d(x, 2), backend=backend)(x)
    targets = [node.target for node in graphs[0].graph.nodes]
    assert torch.ops.aten.max_pool2d_with_indices.default in targets
    assert torch.ops.aten.gather.default not in targets
    assert torch.equal(found, F.max_pool2d(x, 2))

"""Pooling beyond torch's own functions."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from funcnets import layers, random


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

"""A mean over time with weights that are learned."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, jvp

from funcnets import layers, random, tree

DTYPE = torch.float64
keys = st.integers(0, 2**16).map(random.key)


def close(actual, expected, tolerance=1e-10):
    tree.map(
        lambda a, b: torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance),
        actual,
        expected,
    )


@given(key=keys, time=st.integers(1, 4), width=st.integers(1, 3), hidden=st.none() | st.just(2))
def test_it_is_a_weighted_mean(key, time, width, hidden):
    params = layers.init_attention_pooling(key, width, hidden, dtype=DTYPE)
    x = random.normal(key, (2, 3, time, width), dtype=DTYPE)
    pooled, shares = layers.attention_pooling(params, x, weights=True)
    close(pooled, layers.attention_pooling(params, x))
    hidden = (x @ params["proj", "weight"].T + params["proj", "bias"]).tanh()
    scores = (hidden @ params["score", "weight"].T)[..., 0].exp()
    close(shares, scores / scores.sum(-1, keepdim=True))
    close(pooled, (shares[..., None] * x).sum(-2))
    # The order of the elements is nothing to it.
    order = random.permutation(key, time)
    close(layers.attention_pooling(params, x[..., order, :]), pooled)


@given(key=keys)
def test_padding_changes_nothing(key):
    params = layers.init_attention_pooling(key, 3, dtype=DTYPE)
    x = random.normal(key, (4, 5, 3), dtype=DTYPE)
    lengths = torch.tensor([5, 1, 3, 0])
    padding = torch.arange(5) < lengths[:, None]
    spoiled = torch.where(padding[..., None], x, float("inf"))
    pooled, shares = layers.attention_pooling(params, spoiled, padding, weights=True)
    for i, length in enumerate(lengths.tolist()[:3]):
        close(pooled[i], layers.attention_pooling(params, x[i, :length]))
    assert (shares[~padding] == 0).all()
    assert (pooled[3] == 0).all()

    def loss(params, x):
        return layers.attention_pooling(params, x, padding).square().sum()

    gradients = grad(loss, (0, 1))(params, x)
    assert all(leaf.isfinite().all() for leaf in tree.leaves(gradients))
    assert (gradients[1][~padding] == 0).all()
    direction = tree.map(torch.cos, (params, x))
    _, forward = jvp(grad(lambda a: loss(*a)), ((params, x),), (direction,))
    assert all(leaf.isfinite().all() for leaf in tree.leaves(forward))


def test_errors(unchecked):
    params = layers.init_attention_pooling(random.key(0), 3)
    with pytest.raises(ValueError, match=r"x: expected \[..., time of at least 1, width\]"):
        layers.attention_pooling(params, torch.ones(2, 0, 3))
    with pytest.raises(ValueError, match=r"padding: expected \[2, 4\], got \[4\]"):
        layers.attention_pooling(params, torch.ones(2, 4, 3), torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"x: expected \[..., 3\], got \[2, 4, 5\]"):
        layers.attention_pooling(params, torch.ones(2, 4, 5))
    with pytest.raises(ValueError, match="width: expected at least 1, got 0"):
        layers.init_attention_pooling(random.key(0), 0)

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, vmap

from funcnets import layers, random

keys = st.integers(0, 2**16).map(random.key)
KEY = random.key(0)
ELEMENTWISE = [layers.dropout, layers.alpha_dropout]
CHANNELWISE = [layers.channel_dropout, layers.feature_alpha_dropout]
ALL = {
    "dropout": layers.dropout,
    "channel_dropout": layers.channel_dropout,
    "alpha_dropout": layers.alpha_dropout,
    "feature_alpha_dropout": layers.feature_alpha_dropout,
    "stochastic_depth": layers.stochastic_depth,
    "stochastic_depth_row": lambda *arguments: layers.stochastic_depth(*arguments, mode="row"),
}
every_kind = pytest.mark.parametrize("layer", ALL.values(), ids=ALL)
rates = st.floats(0, 1, width=32)


@every_kind
@given(key=keys, tensor=st.booleans())
def test_rates_zero_and_one_are_exact(layer, key, tensor):
    x = random.normal(key, (4, 3, 2))
    zero, one = (torch.tensor(p) if tensor else p for p in (0.0, 1.0))
    assert torch.equal(layer(key, x, zero), x)
    assert torch.equal(layer(key, x, one), torch.zeros_like(x))
    assert torch.equal(grad(lambda x: layer(key, x, zero).sum())(x), torch.ones_like(x))
    assert torch.equal(grad(lambda x: layer(key, x, one).sum())(x), torch.zeros_like(x))


@every_kind
@given(key=keys, p=rates)
def test_a_rate_may_be_a_tensor(layer, key, p):
    x = random.normal(key, (4, 3, 2))
    torch.testing.assert_close(layer(key, x, torch.tensor(p)), layer(key, x, p))
    ensemble = vmap(lambda p: layer(key, x, p))(torch.tensor([p, 0.0, 1.0]))
    torch.testing.assert_close(ensemble, torch.stack([layer(key, x, p), x, torch.zeros_like(x)]))
    assert ensemble.dtype == x.dtype


@every_kind
@given(key=keys, p=rates)
def test_one_key_per_member_equals_the_loop(layer, key, p):
    x = random.normal(key, (5, 4, 3, 2))
    members = random.split(key, 5)
    together = vmap(lambda key, x: layer(key, x, p))(members, x)
    torch.testing.assert_close(
        together, torch.stack([layer(k, x[i], p) for i, k in enumerate(members)])
    )


@every_kind
@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_mean_is_kept(layer, p):
    def one(key):
        return layer(key, torch.full((2, 3, 4), 2.0), p)

    drawn = vmap(one)(random.split(KEY, 20_000))
    if "alpha" in getattr(layer, "__name__", ""):
        return  # what those keep is tested below
    torch.testing.assert_close(drawn.mean(0), torch.full((2, 3, 4), 2.0), atol=0.15, rtol=0)
    dropped = (drawn == 0).float().mean(0)
    torch.testing.assert_close(dropped, torch.full((2, 3, 4), p), atol=0.015, rtol=0)
    kept = drawn[drawn != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 2 / (1 - p)))


@pytest.mark.parametrize("layer", [layers.alpha_dropout, layers.feature_alpha_dropout])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_alpha_dropout_keeps_mean_and_variance(layer, p):
    x = random.normal(KEY, (300, 300, 2), dtype=torch.float64)
    x = (x - x.mean()) / x.std()
    drawn = layer(random.key(1), x, p)
    assert drawn.mean().item() == pytest.approx(0, abs=0.02)
    assert drawn.std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (layers.dropout, F.dropout),
        (layers.channel_dropout, F.dropout2d),
        (layers.alpha_dropout, F.alpha_dropout),
        (layers.feature_alpha_dropout, F.feature_alpha_dropout),
        (layers.stochastic_depth, None),
    ],
)
@given(p=st.floats(0.1, 0.9), key=keys)
def test_values_are_torchs(ours, theirs, p, key):
    """Of an input of ones, torch makes two values: the dropped one and the kept one."""
    x = torch.ones(10, 20, 3, 4, dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if theirs is None:
            from torchvision.ops import stochastic_depth

            expected = torch.stack([stochastic_depth(x, p, "row"), *[x * 0, x / (1 - p)]])
            drawn = ours(key, x, p, mode="row")
        else:
            expected, drawn = theirs(x, p, training=True), ours(key, x, p)
    values = expected.unique()
    assert all(torch.isclose(values, value, rtol=1e-12).any() for value in drawn.unique())


@given(key=keys)
def test_what_is_dropped_together(key):
    x = torch.ones(5, 6, 7)
    channels = layers.channel_dropout(key, x)
    assert (channels == channels[:, :, :1]).all()
    assert len(channels[:, :, 0].unique()) == 2
    features = layers.feature_alpha_dropout(key, x)
    assert (features == features[:, :, :1]).all()
    rows = layers.stochastic_depth(key, x, 0.5, mode="row")
    assert (rows == rows[:, :1, :1]).all()
    batch = layers.stochastic_depth(key, x, 0.5)
    assert len(batch.unique()) == 1


def test_gradient_in_the_rate_is_finite():
    x = torch.ones(3, 4)
    for p in (0.0, 0.5, 1.0):
        assert grad(lambda p: layers.dropout(KEY, x, p).sum())(torch.tensor(p)).isfinite()


def test_infinite_inputs_are_dropped_to_zero():
    drawn = layers.dropout(KEY, torch.full((50,), math.inf))
    assert set(drawn.tolist()) == {0.0, math.inf}


@every_kind
def test_errors(layer):
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"p: expected a rate between 0 and 1, got 1\.5"):
        layer(KEY, x, 1.5)
    with pytest.raises(ValueError, match=r"p: expected .*shape \[\], got \[2\]"):
        layer(KEY, x, torch.zeros(2))


def test_errors_of_mode():
    with pytest.raises(ValueError, match=r"stochastic_depth: x: expected \[batch, \.\.\.\]"):
        layers.stochastic_depth(KEY, torch.ones(()), 0.5, mode="row")

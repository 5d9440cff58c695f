import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import vjp

from funcnets import layers, random, tree

KEY = random.key(0)
DTYPE = torch.float64
keys = st.integers(0, 2**16).map(random.key)
sizes = st.integers(1, 4)
FUNCTIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "squared_relu": lambda x: F.relu(x) ** 2,
    "swiglu": lambda x: x.chunk(2, -1)[0] * F.silu(x.chunk(2, -1)[1]),
    "geglu": lambda x: x.chunk(2, -1)[0] * F.gelu(x.chunk(2, -1)[1]),
}
every = pytest.mark.parametrize("activation", FUNCTIONS)


def close(actual, expected, tolerance=1e-10):
    tree.map(
        lambda a, b: torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance),
        actual,
        expected,
    )


@every
@given(data=st.data(), key=keys, bias=st.booleans())
def test_feed_forward_equals_its_modules(activation, data, key, bias):
    width, hidden = data.draw(sizes), data.draw(sizes)
    params = layers.init_feed_forward(
        key, width, hidden, activation=activation, bias=bias, dtype=DTYPE
    )
    inner = params["linear1", "weight"].shape[0]
    assert inner == (2 if activation in ("swiglu", "geglu") else 1) * hidden
    with torch.random.fork_rng():
        module = nn.ModuleDict(
            {
                "linear1": nn.Linear(width, inner, bias=bias, dtype=DTYPE),
                "linear2": nn.Linear(hidden, width, bias=bias, dtype=DTYPE),
            }
        )
    module.load_state_dict(params.flatten_keys(".").to_dict())
    x = random.normal(key, (*data.draw(st.lists(sizes, max_size=2)), width), dtype=DTYPE)
    expected = module["linear2"](FUNCTIONS[activation](module["linear1"](x)))
    outputs, pull = vjp(
        lambda params: layers.feed_forward(params, x, activation=activation), params
    )
    close(outputs, expected.detach())
    cotangent = random.normal(key, outputs.shape, dtype=DTYPE)
    expected.backward(cotangent)
    for name, gradient in pull(cotangent)[0].flatten_keys(".").items():
        close(gradient, module.get_parameter(name).grad)


def test_dropout_after_the_activation():
    params = layers.init_feed_forward(KEY, 3, 200)
    x = random.normal(KEY, (50, 3))
    hidden = layers.linear(params["linear1"], x).relu()
    expected = layers.linear(params["linear2"], layers.dropout(KEY, hidden, 0.3))
    assert torch.equal(layers.feed_forward(params, x, dropout=0.3, key=KEY), expected)
    for options in ({"dropout": 0.3}, {"key": KEY}):
        assert torch.equal(
            layers.feed_forward(params, x, **options), layers.feed_forward(params, x)
        )


def test_errors(unchecked):
    names = "relu, gelu, squared_relu, swiglu, geglu"
    message = f"activation: expected one of {names}, got silu"
    params = layers.init_feed_forward(KEY, 3, 4, activation="swiglu")
    for run in (
        lambda: layers.init_feed_forward(KEY, 3, 4, activation="silu"),
        lambda: layers.feed_forward(params, torch.zeros(2, 3), activation="silu"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            run()
    with pytest.raises(ValueError, match=re.escape("linear: x: expected [..., 4], got [2, 8]")):
        layers.feed_forward(params, torch.zeros(2, 3), activation="relu")
    with pytest.raises(ValueError, match="init_feed_forward: hidden: expected at least 1, got 0"):
        layers.init_feed_forward(KEY, 3, 0)

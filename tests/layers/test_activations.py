import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from funcnets import layers, random
from funcnets.layers.activations import ACTIVATIONS

MODULES = {
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
    "identity": nn.Identity(),
    "quick_gelu": lambda x: x / (1 + (-1.702 * x).exp()),
    "squared_relu": lambda x: torch.where(x > 0, x * x, 0.0),
    "sin": torch.sin,
    "leaky_relu": nn.LeakyReLU(),
    "logsigmoid": nn.LogSigmoid(),
}
BY_LOWER_NAME = {name.lower(): getattr(nn, name) for name in dir(nn)}


@pytest.mark.parametrize("name", ACTIVATIONS)
@given(key=st.integers(0, 99).map(random.key), scale=st.sampled_from([0.1, 1.0, 10.0]))
def test_activation_of_a_name_is_torchs_module_of_that_name(name, key, scale):
    x = scale * random.normal(key, (20,), dtype=torch.float64)
    module = MODULES[name] if name in MODULES else BY_LOWER_NAME[name]()
    torch.testing.assert_close(layers.activation(name)(x), module(x), rtol=1e-12, atol=1e-12)


@given(key=st.integers(0, 99).map(random.key))
def test_gated_units(key):
    x = random.normal(key, (3, 8), dtype=torch.float64)
    value, gate = x[:, :4], x[:, 4:]
    torch.testing.assert_close(layers.glu(x), F.glu(x, -1))
    torch.testing.assert_close(layers.geglu(x), value * F.gelu(gate))
    torch.testing.assert_close(layers.swiglu(x), value * F.silu(gate))
    torch.testing.assert_close(layers.glu(x, torch.relu), value * gate.relu())


def test_errors():
    with pytest.raises(ValueError, match=r"activation: expected one of .*relu.*, got rellu"):
        layers.activation("rellu")
    with pytest.raises(ValueError, match=r"glu: x: expected .*even.*got \[2, 3\]"):
        layers.glu(torch.zeros(2, 3))

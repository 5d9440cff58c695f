import pytest
import torch
from tensordict import TensorDict

from funcnets import layers, random

KEY = random.key(0)


def test_default_draws_are_within_torchs_bounds():
    params = layers.init_linear(KEY, 100, 50)
    for name in ("weight", "bias"):
        assert 0.09 < params[name].abs().max() <= 0.1
    params = layers.init_bilinear(KEY, 100, 4, 50)
    for name in ("weight", "bias"):
        assert 0.09 < params[name].abs().max() <= 0.1


def test_initializers_are_used():
    twos, threes = (layers.initializers.constant(value) for value in (2.0, 3.0))
    for params in (
        layers.init_linear(KEY, 3, 2, weight_init=twos, bias_init=threes, dtype=torch.float64),
        layers.init_bilinear(KEY, 3, 2, 4, weight_init=twos, bias_init=threes, dtype=torch.float64),
    ):
        assert (params["weight"] == 2).all()
        assert (params["bias"] == 3).all()
        assert params["weight"].dtype == torch.float64


def test_weight_and_bias_are_independent():
    params = layers.init_linear(KEY, 1, 4)
    assert not torch.isin(params["bias"], params["weight"]).any()


def test_errors():
    params = layers.init_linear(KEY, 784, 10)
    with pytest.raises(ValueError, match=r"linear: x: expected \[\.\.\., 784\], got \[32, 10\]"):
        layers.linear(params, torch.zeros(32, 10))
    with pytest.raises(ValueError, match=r"expected float32 \(as weight\), got float64\[784\]"):
        layers.linear(params, torch.zeros(784, dtype=torch.float64))
    ensemble = torch.stack([params, params])
    with pytest.raises(
        ValueError, match=r"weight: .*out_features, in_features\], got \[2, 10, 784"
    ):
        layers.linear(ensemble, torch.zeros(784))
    with pytest.raises(KeyError, match="linear: params: expected an entry weight, got kernel"):
        layers.linear(TensorDict({"kernel": torch.zeros(2, 2)}), torch.zeros(2))
    with pytest.raises(ValueError, match="in_features: expected at least 1, got 0"):
        layers.init_linear(KEY, 0, 2)
    params = layers.init_bilinear(KEY, 3, 4, 2)
    with pytest.raises(ValueError, match=r"bilinear: x2: expected \[\.\.\., 4\], got \[5, 3\]"):
        layers.bilinear(params, torch.zeros(5, 3), torch.zeros(5, 3))


def test_autocast_may_mix_dtypes():
    params = layers.init_linear(KEY, 4, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = layers.linear(params, torch.ones(2, 4))
        assert hidden.dtype == torch.bfloat16
        layers.linear(layers.init_linear(KEY, 3, 2), hidden)

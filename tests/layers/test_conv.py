import math

import pytest
import torch

from funcnets import layers, random

KEY = random.key(0)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_default_draws_are_within_torchs_bounds(dims):
    params = layers.init_conv(KEY, 8, 64, 3, dims=dims, groups=2)
    transposed = layers.init_conv_transpose(KEY, 64, 8, 3, dims=dims, groups=2)
    assert params["weight"].shape == transposed["weight"].shape == (64, 4, *[3] * dims)
    bound = 1 / math.sqrt(4 * 3**dims)
    assert 0.95 * bound < params["weight"].abs().max() <= bound
    assert 0.8 * bound < params["bias"].abs().max() <= bound
    assert 0.95 * bound < transposed["weight"].abs().max() <= bound
    assert transposed["bias"].abs().max() <= bound


def test_initializers_are_used():
    twos, threes = (layers.initializers.constant(value) for value in (2.0, 3.0))
    for init in (layers.init_conv, layers.init_conv_transpose, layers.init_separable_conv):
        params = init(KEY, 4, 6, 3, weight_init=twos, bias_init=threes, dtype=torch.float64)
        for name, value in params.flatten_keys(".").items():
            assert (value == (2 if name.endswith("weight") else 3)).all()
            assert value.dtype == torch.float64


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, (2, 5)])
@pytest.mark.parametrize("dilation", [1, 2])
def test_same_padding_keeps_the_size(kernel, dilation):
    params = layers.init_conv(KEY, 1, 1, kernel)
    x = torch.zeros(2, 1, 7, 9)
    assert layers.conv(params, x, padding="same", dilation=dilation).shape == x.shape


def test_errors():
    params = layers.init_conv(KEY, 3, 8, 3)
    with pytest.raises(
        ValueError, match=r"conv: x: expected \[\(batch\), 3, height, width\], got \[1, 4, 9, 9\]"
    ):
        layers.conv(params, torch.zeros(1, 4, 9, 9))
    with pytest.raises(ValueError, match=r"conv: x: expected .*got \[1, 1, 3, 9, 9\]"):
        layers.conv(params, torch.zeros(1, 1, 3, 9, 9))
    with pytest.raises(ValueError, match=r"conv: x: expected \[\(batch\), 6, height, width\]"):
        layers.conv(params, torch.zeros(1, 3, 9, 9), groups=2)
    with pytest.raises(ValueError, match="out_channels divisible by groups=3"):
        layers.conv(params, torch.zeros(1, 9, 9, 9), groups=3)
    with pytest.raises(ValueError, match="padding: same needs stride 1, got stride=2"):
        layers.conv(params, torch.zeros(1, 3, 9, 9), padding="same", stride=2)
    with pytest.raises(ValueError, match=r"expected float32 \(as weight\), got float64"):
        layers.conv(params, torch.zeros(1, 3, 9, 9, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"1 to 3 kernel sizes, got \[8, 3\]"):
        layers.conv(layers.init_linear(KEY, 3, 8), torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"conv_transpose: x: expected \[\(batch\), 3, height"):
        layers.conv_transpose(layers.init_conv_transpose(KEY, 3, 8, 3), torch.zeros(1, 8, 9, 9))
    with pytest.raises(ValueError, match=r"kernel_size: expected an int or 2 ints, got \[3\]"):
        layers.init_conv(KEY, 3, 8, (3,))
    with pytest.raises(ValueError, match="dims: expected 1, 2 or 3, got 4"):
        layers.init_conv(KEY, 3, 8, 3, dims=4)
    with pytest.raises(ValueError, match="in_channels: expected a multiple of groups=2, got 3"):
        layers.init_conv(KEY, 3, 8, 3, groups=2)
    with pytest.raises(ValueError, match="kernel_size: expected at least 1, got 0"):
        layers.init_conv(KEY, 3, 8, 0)

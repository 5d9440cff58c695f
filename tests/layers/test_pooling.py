import torch
from hypothesis import given
from hypothesis import strategies as st

from funcnets import layers, random


@given(dims=st.integers(0, 3), key=st.integers(0, 99).map(random.key))
def test_global_pooling_is_the_mean_and_maximum_over_space(dims, key):
    x = random.normal(key, (2, 3, *[4] * dims), dtype=torch.float64)
    flat = x.reshape(2, 3, -1)
    torch.testing.assert_close(layers.global_avg_pool(x), flat.mean(-1))
    assert torch.equal(layers.global_max_pool(x), flat.amax(-1))

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import vmap

from funcnets import random
from funcnets.layers import initializers

keys = st.integers(0, 2**32).map(random.key)
shapes = st.lists(st.integers(1, 5), min_size=2, max_size=4).map(tuple)
MANY = (200, 100, 5)  # 100_000 numbers: a standard deviation is known to about 0.3 %


def moments(initializer, shape=MANY):
    drawn = initializer(random.key(3), shape, torch.float64)
    return drawn.mean().item(), drawn.std().item(), drawn.min().item(), drawn.max().item()


@given(shape=st.lists(st.integers(0, 3)).map(tuple), value=st.floats(-1e3, 1e3))
def test_constants(shape, value):
    key = random.key(0)
    assert torch.equal(initializers.constant(value)(key, shape), torch.full(shape, value))
    assert torch.equal(initializers.zeros()(key, shape), torch.zeros(shape))
    assert torch.equal(initializers.ones()(key, shape), torch.ones(shape))


def test_uniform():
    mean, std, low, high = moments(initializers.uniform(-1.0, 3.0))
    assert mean == pytest.approx(1.0, abs=0.02)
    assert std == pytest.approx(4 / math.sqrt(12), rel=0.01)
    assert -1 <= low < -0.999
    assert 2.999 < high < 3


def test_normal():
    mean, std, low, high = moments(initializers.normal(2.0, 0.5))
    assert mean == pytest.approx(2.0, abs=0.01)
    assert std == pytest.approx(0.5, rel=0.01)
    assert low < 0.5
    assert high > 3.5


def test_truncated_normal_has_absolute_bounds():
    mean, _, low, high = moments(initializers.truncated_normal(0.5, 2.0, -1.0, 1.0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reference = nn.init.trunc_normal_(torch.empty(MANY), 0.5, 2.0, -1.0, 1.0)
    assert mean == pytest.approx(reference.mean().item(), abs=0.01)
    assert -1 <= low < -0.999
    assert 0.999 < high <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(std=st.floats(1e-3, 10), low=st.floats(-2, 0), width=st.floats(0.1, 3), key=keys)
def test_truncated_normal_never_leaves_its_bounds(dtype, std, low, width, key):
    drawn = initializers.truncated_normal(0.0, std, low, low + width)(key, (50,), dtype)
    bounds = torch.tensor([low, low + width]).to(dtype)
    assert bounds[0] <= drawn.min()
    assert drawn.max() <= bounds[1]


def fan_options():
    return {
        **{
            f"xavier_{kind}": (
                getattr(initializers, f"xavier_{kind}")(1.7),
                getattr(nn.init, f"xavier_{kind}_"),
                {"gain": 1.7},
            )
            for kind in ("uniform", "normal")
        },
        **{
            f"kaiming_{kind}-{nonlinearity}-{mode}": (
                getattr(initializers, f"kaiming_{kind}")(0.3, mode, nonlinearity),
                getattr(nn.init, f"kaiming_{kind}_"),
                {"a": 0.3, "mode": mode, "nonlinearity": nonlinearity},
            )
            for kind in ("uniform", "normal")
            for nonlinearity in ("leaky_relu", "relu", "tanh", "linear")
            for mode in ("fan_in", "fan_out")
        },
    }


@pytest.mark.parametrize("name", fan_options())
def test_fan_initializers_are_distributed_as_torchs(name):
    ours, theirs, options = fan_options()[name]
    mean, std, low, high = moments(ours)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reference = theirs(torch.empty(MANY, dtype=torch.float64), **options)
    assert mean == pytest.approx(0, abs=0.01 * std)
    assert std == pytest.approx(reference.std().item(), rel=0.01)
    extremes = 0.001 if "uniform" in name else 0.25
    assert low == pytest.approx(reference.min().item(), rel=extremes)
    assert high == pytest.approx(reference.max().item(), rel=extremes)


@pytest.mark.parametrize("distribution", ["truncated_normal", "normal", "uniform"])
@pytest.mark.parametrize(("mode", "fan"), [("fan_in", 500), ("fan_out", 1000), ("fan_avg", 750)])
def test_variance_scaling(mode, fan, distribution):
    initializer = initializers.variance_scaling(2.0, mode, distribution)
    mean, std, _, high = moments(initializer)
    target = math.sqrt(2 / fan)
    assert mean == pytest.approx(0, abs=0.01 * target)
    assert std == pytest.approx(target, rel=0.01)
    limit = {"truncated_normal": 2 / 0.8796256610342398, "uniform": math.sqrt(3)}
    if distribution in limit:
        assert high <= limit[distribution] * target
        assert high == pytest.approx(limit[distribution] * target, rel=1e-3)


def test_lecun():
    assert moments(initializers.lecun_normal())[1] == pytest.approx(500**-0.5, rel=0.01)
    assert moments(initializers.lecun_uniform())[3] == pytest.approx(math.sqrt(3 / 500), rel=1e-3)


@given(shape=shapes, gain=st.floats(0.1, 4), key=keys)
def test_orthogonal(shape, gain, key):
    matrix = initializers.orthogonal(gain)(key, shape, torch.float64).flatten(1)
    rows, columns = matrix.shape
    gram = matrix @ matrix.mT if rows <= columns else matrix.mT @ matrix
    torch.testing.assert_close(gram, gain**2 * torch.eye(len(gram), dtype=torch.float64))


def test_orthogonal_is_uniform_over_the_orthogonal_group():
    # Each entry has mean 0 and variance 1/3; without the signs of r the diagonal would not.
    drawn = vmap(lambda key: initializers.orthogonal()(key, (3, 3)))(
        random.split(random.key(0), 4000)
    )
    torch.testing.assert_close(drawn.mean(0), torch.zeros(3, 3), atol=0.04, rtol=0)
    torch.testing.assert_close(drawn.var(0), torch.full((3, 3), 1 / 3), atol=0.03, rtol=0)


ALL = {
    "constant": initializers.constant(1.0),
    "uniform": initializers.uniform(),
    "normal": initializers.normal(),
    "truncated_normal": initializers.truncated_normal(),
    "xavier_normal": initializers.xavier_normal(),
    "kaiming_uniform": initializers.kaiming_uniform(),
    "lecun_normal": initializers.lecun_normal(),
    "orthogonal": initializers.orthogonal(),
}
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])


@pytest.mark.parametrize("name", ALL)
@given(shape=shapes, dtype=dtypes, key=keys)
def test_ensemble_member_equals_the_lone_draw(name, shape, dtype, key):
    def draw(key):
        return ALL[name](key, shape, dtype)

    members = random.split(key, 5)
    ensemble = vmap(draw)(members)
    assert ensemble.dtype == dtype
    assert ensemble.shape == (5, *shape)
    assert torch.equal(ensemble, torch.stack([draw(member) for member in members]))
    nested = vmap(vmap(draw))(torch.stack([members, members]))
    assert torch.equal(nested, torch.stack([ensemble, ensemble]))


@pytest.mark.dynamo
@pytest.mark.parametrize("name", ALL)
def test_compiled_draws_are_the_eager_ones(name):
    def draw(key):
        return ALL[name](key, (4, 3))

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(random.key(1)), draw(random.key(1)))


def test_errors():
    key = random.key(0)
    with pytest.raises(ValueError, match=r"fans: shape: expected at least 2 sizes, got \[3\]"):
        initializers.xavier_normal()(key, (3,))
    with pytest.raises(ValueError, match=r"orthogonal: shape: .* got \[3\]"):
        initializers.orthogonal()(key, (3,))
    with pytest.raises(ValueError, match="std: expected more than 0, got 0"):
        initializers.truncated_normal(std=0.0)

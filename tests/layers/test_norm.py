import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import nn
from torch.func import grad, vjp, vmap

from funcnets import layers, random

keys = st.integers(0, 2**16).map(random.key)
KEY = random.key(0)
BATCH = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


def some_params(key, n, dtype=torch.float64, **options):
    weight, bias, mean, var = random.normal(key, (4, n), dtype=dtype)
    params = layers.init_batch_norm(key, n, dtype=dtype, **options)
    values = {"weight": weight, "bias": bias, "running_mean": mean, "running_var": var.exp()}
    return TensorDict({name: values[name] for name in params.keys()})  # noqa: SIM118


@pytest.mark.parametrize("instance", [False, True])
@given(
    dims=st.integers(0, 3),
    n=st.integers(1, 4),
    batch=st.integers(2, 4),
    affine=st.booleans(),
    momentum=st.sampled_from([0.1, 0.0, 1.0, 0.37]),
    steps=st.integers(1, 3),
    key=keys,
)
def test_buffers_over_several_steps_equal_torchs(
    instance, dims, n, batch, affine, momentum, steps, key
):
    dims = max(dims, 1) if instance else dims
    layer = layers.instance_norm if instance else layers.batch_norm
    params = some_params(key, n, affine=affine)
    before = params.clone()
    module = (INSTANCE if instance else BATCH)[dims](
        n, affine=affine, momentum=momentum, track_running_stats=True, dtype=torch.float64
    )
    module.load_state_dict(dict(params.clone().items()), strict=False)
    state = params
    for step in random.split(key, steps):
        x = 3 + random.normal(step, (batch, n, *[3] * dims), dtype=torch.float64)
        outputs, buffers = layer(state, x, train=True, momentum=momentum)
        torch.testing.assert_close(outputs, module(x).detach())
        assert set(buffers.keys()) == {"running_mean", "running_var"}
        for name, value in buffers.items():
            torch.testing.assert_close(value, getattr(module, name), rtol=1e-10, atol=1e-10)
        state = TensorDict({**dict(state.items()), **dict(buffers.items())})
    assert all(torch.equal(value, before[name]) for name, value in params.items())
    torch.testing.assert_close(layer(state, x), module.eval()(x).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e-3, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_running_variance_is_accurate_at_every_scale(dtype, scale, shift):
    x = scale * (shift + random.normal(KEY, (8, 3, 16), dtype=torch.float64)).to(dtype)
    module = nn.BatchNorm1d(3, momentum=1.0, dtype=dtype)
    expected = module(x).detach()
    params = layers.init_batch_norm(KEY, 3, dtype=dtype)
    outputs, buffers = layers.batch_norm(params, x, train=True, momentum=1.0)
    torch.testing.assert_close(outputs, expected)
    # Beside eps = 1e-5, to which it will be added; an epsilon of the dtype relative to that.
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    torch.testing.assert_close(
        buffers["running_var"], module.running_var, rtol=4 * tolerance, atol=1e-5 * tolerance
    )
    torch.testing.assert_close(buffers["running_mean"], module.running_mean)
    assert (buffers["running_var"] >= 0).all()


@pytest.mark.parametrize("eps", [1e-5, 3e-4, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_running_variance_of_a_constant_is_not_negative(dtype, eps):
    # It is computed from 1 / sqrt(var + eps), and 3e-4 would round to a negative one in float32.
    params = layers.init_batch_norm(KEY, 3, dtype=dtype)
    x = torch.full((4, 3), 2.0, dtype=dtype)
    buffers = layers.batch_norm(params, x, train=True, momentum=1.0, eps=eps)[1]
    assert (buffers["running_var"] >= 0).all()


@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
@given(key=keys, dims=st.integers(1, 3))
def test_ensemble_in_training_equals_the_loop(name, key, dims):
    layer = getattr(layers, name)
    members = [some_params(k, 3) for k in random.split(key, 4)]
    x = random.normal(key, (4, 5, 3, *[2] * dims), dtype=torch.float64)

    def step(params, x):
        def loss(params):
            outputs, buffers = layer(params, x, train=True)
            return outputs.cos().sum(), (outputs, buffers)

        return grad(loss, has_aux=True)(params)

    together = vmap(step)(torch.stack(members), x)
    alone = [step(member, x[i]) for i, member in enumerate(members)]
    for i, (gradient, (outputs, buffers)) in enumerate(alone):
        torch.testing.assert_close(together[1][0][i], outputs)
        for ours, lone in ((together[0], gradient), (together[1][1], buffers)):
            for entry, value in lone.items():
                torch.testing.assert_close(ours[entry][i], value)


@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
def test_no_gradient_passes_through_the_buffers(name):
    layer = getattr(layers, name)
    params = some_params(KEY, 3)
    x = random.normal(KEY, (5, 3, 4), dtype=torch.float64)

    def new_buffers(params, x):
        buffers = layer(params, x, train=True)[1]
        return buffers["running_mean"].sum() + buffers["running_var"].sum()

    for gradient in grad(new_buffers, (0, 1))(params, x):
        assert all(
            (leaf == 0).all()
            for leaf in (gradient.values() if isinstance(gradient, TensorDict) else [gradient])
        )
    gradient = grad(lambda params: layer(params, x).cos().sum())(params)
    assert (gradient["running_mean"] == 0).all()
    assert (gradient["running_var"] == 0).all()
    assert (gradient["weight"] != 0).all()

    def inner(scale):  # a statistic that an outer gradient depends on is a constant all the same
        scaled = params.apply(lambda leaf: leaf * scale)
        return grad(lambda x: layer(scaled, x).cos().sum())(x).sum()

    assert grad(inner)(torch.tensor(1.0, dtype=torch.float64)).isfinite()


def test_without_running_statistics_the_batch_serves_in_both_modes():
    params = some_params(KEY, 3, track_running_stats=False)
    x = random.normal(KEY, (5, 3, 4), dtype=torch.float64)
    outputs, buffers = layers.batch_norm(params, x, train=True)
    assert not list(buffers.keys())
    assert torch.equal(outputs, layers.batch_norm(params, x))


def test_defaults_are_torchs():
    assert set(layers.init_batch_norm(KEY, 3).keys()) == set(nn.BatchNorm1d(3).state_dict()) - {
        "num_batches_tracked"
    }
    assert set(layers.init_instance_norm(KEY, 3).keys()) == set(nn.InstanceNorm1d(3).state_dict())
    for params, module in (
        (layers.init_batch_norm(KEY, 3), nn.BatchNorm1d(3)),
        (layers.init_layer_norm(KEY, (3, 2)), nn.LayerNorm((3, 2))),
        (layers.init_rms_norm(KEY, 3), nn.RMSNorm(3)),
        (layers.init_group_norm(KEY, 4), nn.GroupNorm(2, 4)),
    ):
        state = module.state_dict()
        for name, value in params.items():
            assert torch.equal(value, state[name])


@pytest.mark.parametrize(
    "init",
    [
        layers.init_batch_norm,
        layers.init_group_norm,
        layers.init_layer_norm,
        lambda *arguments, **options: layers.init_instance_norm(*arguments, affine=True, **options),
    ],
)
def test_initializers_are_used(init):
    twos, threes = (layers.initializers.constant(value) for value in (2.0, 3.0))
    params = init(KEY, 4, weight_init=twos, bias_init=threes)
    assert (params["weight"] == 2).all()
    assert (params["bias"] == 3).all()


def test_autocast_may_mix_dtypes():
    params = layers.init_batch_norm(KEY, 3)
    x = random.normal(KEY, (4, 3, 5), dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, buffers = layers.batch_norm(params, x, train=True)
        assert outputs.dtype == layers.batch_norm(params, x).dtype == torch.bfloat16
    assert buffers["running_var"].dtype == torch.float32


def test_errors():
    params = layers.init_batch_norm(KEY, 3)
    for shape in ((1, 3), (1, 3, 1)):
        with pytest.raises(ValueError, match=r"more than one value per channel .*got \[1, 3"):
            layers.batch_norm(params, torch.zeros(shape), train=True)
        layers.batch_norm(params, torch.zeros(shape))
    with pytest.raises(ValueError, match="more than one value per channel"):
        layers.batch_norm(TensorDict({}), torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"per channel and sample, got \[2, 3, 1\]"):
        layers.instance_norm(TensorDict({}), torch.zeros(2, 3, 1))
    with pytest.raises(ValueError, match=r"x: expected \[batch, 3, \.\.\.\].*got \[2, 4, 5\]"):
        layers.batch_norm(params, torch.zeros(2, 4, 5))
    with pytest.raises(ValueError, match=r"expected float32 \(as weight\), got float64\[2, 3\]"):
        layers.batch_norm(params, torch.zeros(2, 3, dtype=torch.float64))
    plain = layers.init_batch_norm(KEY, 3, affine=False)
    with pytest.raises(ValueError, match=r"expected float32 \(as running_mean\), got float64"):
        layers.batch_norm(plain, torch.zeros(2, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"num_groups=2, got \[2, 3, 4\]"):
        layers.group_norm(TensorDict({}), torch.zeros(2, 3, 4), 2)
    with pytest.raises(ValueError, match=r"layer_norm: x: expected \[\.\.\., 3, 2\], got \[3\]"):
        layers.layer_norm(layers.init_layer_norm(KEY, (3, 2)), torch.zeros(3))
    with pytest.raises(ValueError, match="rms_norm: normalized_shape: needed"):
        layers.rms_norm(TensorDict({}), torch.zeros(3))
    with pytest.raises(ValueError, match=r"normalized_shape: expected \[3\] \(as weight\), got"):
        layers.layer_norm(layers.init_layer_norm(KEY, 3), torch.zeros(3), normalized_shape=2)


@given(
    key=keys,
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_normalize_is_torchs(key, shape, dtype):
    x = random.normal(key, shape, dtype=torch.float64).to(dtype)
    x[..., :1] *= 300  # whose square float16 does not hold
    expected = F.normalize(x.double(), dim=-1)
    tolerance = {} if dtype != torch.float64 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(layers.normalize(x), expected.to(dtype), **tolerance)
    if dtype == torch.float64:
        cotangent = random.normal(random.fold_in(key, 1), shape, dtype=dtype)
        ours, torchs = (
            vjp(f, x)[1](cotangent)[0] for f in (layers.normalize, lambda x: F.normalize(x, dim=-1))
        )
        torch.testing.assert_close(ours, torchs, rtol=1e-9, atol=1e-12)


def test_normalize_of_zeros_has_finite_derivatives():
    x = torch.zeros(2, 3, dtype=torch.float64)
    assert torch.equal(layers.normalize(x), x)
    of_one = lambda x: layers.normalize(x).sum()  # noqa: E731
    assert torch.equal(grad(of_one)(x), torch.full_like(x, 1e12))
    second = grad(lambda x: grad(of_one)(x).sum())(x)
    assert torch.equal(second, torch.zeros_like(x))


@pytest.mark.parametrize("batch", [1, 2])
def test_a_group_of_one_value_is_zero_in_a_batch_of_any_size(batch):
    params = layers.init_group_norm(KEY, 2)
    x = random.normal(KEY, (batch, 2, 1))
    found = layers.group_norm(params, x, 2)
    torch.testing.assert_close(found, torch.zeros(batch, 2, 1), atol=1e-3, rtol=0)

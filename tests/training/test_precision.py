import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from networks import assert_close, assert_equal, cnn, data, make, mlp, start
from torch.func import vmap

import funcnets
from funcnets import Model, layers, models, optim, random, training, tree

KINDS = ["bfloat16", "float16"]
KEYS = random.split(random.key(7), 2)


def images():
    return data(dtype=torch.float32, shape=(1, 8, 8))


@pytest.mark.parametrize("kind", KINDS)
def test_half_within_and_single_outside(kind):
    seen = {}

    def apply(params, x, train=False, key=None):
        h = layers.linear(params["0"], x)
        seen["hidden"] = h.dtype
        h, buffers = layers.batch_norm(params["1"], h, train=True)
        outputs = layers.linear(params["2"], h.relu())
        return outputs, {"1": buffers}

    def init(key):
        return {
            "0": layers.init_linear(key, 6, 8),
            "1": layers.init_batch_norm(key, 8),
            "2": layers.init_linear(key, 8, 3),
        }

    def loss(outputs, targets):
        seen["outputs"] = outputs.dtype
        return F.cross_entropy(outputs, targets)

    optimizer = optim.adamw(1e-2)
    step = training.make_step(Model(init, apply), loss, optimizer, precision=kind)
    state, metrics = step(step.init(init(KEYS[0]), KEYS[1]), data(dtype=torch.float32))
    assert seen == {"hidden": getattr(torch, kind), "outputs": torch.float32}
    assert {leaf.dtype for leaf in tree.leaves((state.params, state.buffers))} == {torch.float32}
    assert metrics["loss"].dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_an_ensemble_in_half_precision_is_near_single_and_compiled_the_same(kind):
    model, batch = cnn(), images()
    results = []
    for precision in (None, kind):
        step = make(model, precision=precision, optimizer=optim.sgd(0.1))
        states = vmap(step.init)(vmap(model.init)(KEYS), KEYS)
        given = tree.map(torch.clone, states)
        for _ in range(2):
            states, metrics = vmap(step, in_dims=(0, None))(states, batch)
        results.append((states.params, states.buffers, metrics["loss"]))
    assert_close(*results, rtol=0.03, atol=0.01)
    compiled = funcnets.compile(vmap(step, in_dims=(0, None)), donate="state", backend="aot_eager")
    for _ in range(2):
        given, _ = compiled(given, batch)
    assert_equal(given, states)
    alone = step.init(model.init(KEYS[1]), KEYS[1])
    for _ in range(2):
        alone, _ = step(alone, batch)
    own = tree.map(lambda leaf: leaf[1], states)
    assert_close(alone.params, own.params, rtol=0.03, atol=0.003)


def test_attention_and_recurrence_in_half_precision():
    for model in (
        models.gpt(11, 8, width=16, depth=1, heads=2),
        models.recurrent(16, 11, hidden_size=8, cell="lstm", output="each", num_embeddings=11),
    ):
        step = training.make_step(
            model,
            lambda logits, text: F.cross_entropy(logits.flatten(0, 1), text.flatten()),
            optim.sgd(0.1),
            precision="bfloat16",
        )
        text = random.randint(random.key(0), (4, 8), 0, 11)
        states = vmap(step.init)(vmap(model.init)(KEYS), KEYS)
        _, metrics = vmap(step, in_dims=(0, None))(states, (text, text))
        assert metrics["nonfinite"].tolist() == [-1, -1]


@given(
    overflows=st.lists(st.booleans(), min_size=1, max_size=12),
    every=st.integers(1, 3),
    scale=st.sampled_from([1.0, 2.0**14]),
)
def test_the_scale_halves_and_doubles(overflows, every, scale):
    precision = training.float16(scale, every)
    state = precision.init({"w": torch.ones(1)})
    expected, good = scale, 0
    for overflow in overflows:
        state = precision.update(state, torch.tensor(overflow))
        good = 0 if overflow else good + 1
        expected = expected / 2 if overflow else expected
        if good == every:
            expected, good = 2 * expected, 0
        assert float(state.scale) == expected


def overflowing(model):
    """A loss whose gradients overflow float16 at the largest scales, and not at lower ones."""
    return make(model, precision=training.float16(2.0**24, every=2), optimizer=optim.adamw(1e-2))


def test_an_overflow_skips_the_step_and_halves_the_scale():
    model, (x, y) = mlp(), data(dtype=torch.float32)
    step = overflowing(model)
    state = start(step, model, dtype=torch.float32)
    scales, taken = [], 0
    for _ in range(12):
        after, metrics = step(state, (x, y))
        scales.append(float(metrics["scale"]))
        if scales[-1] > float(after.scaler.scale):
            assert_equal(after.params, state.params)
            assert_equal(after.optimizer, state.optimizer)
        else:
            taken += 1
        assert int(metrics["nonfinite"]) == -1
        state = after
    assert scales[:2] == [2.0**24, 2.0**23]
    assert any(b == 2 * a for a, b in itertools.pairwise(scales))
    assert 0 < taken < 12
    assert int(state.step) == 12
    assert int(state.nonfinite.times) == 0


def test_each_member_has_its_own_scale():
    model, (x, y) = mlp(), data(dtype=torch.float32)
    step = overflowing(model)
    states = vmap(step.init)(vmap(model.init)(KEYS), KEYS)
    scale = torch.tensor([2.0**24, 2.0**10])
    states = states._replace(scaler=states.scaler._replace(scale=scale))
    for _ in range(2):
        after, _ = vmap(step, in_dims=(0, None))(states, (x, y))
        states = after
    assert states.scaler.scale.tolist() == [2.0**22, 2.0**11]
    assert states.scaler.good.tolist() == [0, 0]


def test_a_bad_batch_is_not_the_fault_of_the_scale():
    model, (x, y) = mlp(), data(dtype=torch.float32)
    step = make(model, precision="float16", nonfinite="skip")
    state = start(step, model, dtype=torch.float32)
    after, metrics = step(state, (x * torch.nan, y))
    assert int(metrics["nonfinite"]) == -3
    assert float(after.scaler.scale) == 2.0**16
    assert_equal(after.params, state.params)


def test_errors():
    with pytest.raises(ValueError, match="float16: expected a scale"):
        training.float16(0.0)
    with pytest.raises(ValueError, match="every of at least 1"):
        training.float16(every=0)

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from networks import (
    CLASSES,
    FEATURES,
    SAMPLES,
    assert_close,
    assert_equal,
    cnn,
    data,
    make,
    mlp,
    start,
)
from tensordict import TensorDict
from torch.func import grad, vmap

import funcnets
from funcnets import Model, optim, random, training, tree
from funcnets.optim import fused

KEYS = random.split(random.key(7), 3)


def test_a_step_is_forward_loss_gradient_and_update():
    model, optimizer = mlp(), optim.chain(optim.clip_by_global_norm(0.1), optim.adamw(1e-2))
    step = make(model, optimizer=optimizer)
    state, (x, y) = start(step, model), data()
    params, optimizer_state = state.params, state.optimizer
    for _ in range(3):
        state, metrics = step(state, (x, y))
        value = F.cross_entropy(model.apply(params, x), y)
        gradients = grad(lambda p: F.cross_entropy(model.apply(p, x), y))(params)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        params = optim.apply_updates(params, updates)
        assert_close(metrics["loss"], value)
    assert_close(state.params, params)
    assert int(state.step) == 3


@given(
    parts=st.sampled_from([1, 2, 3, 4, 6]),
    weights=st.booleans(),
    average=st.sampled_from([None, training.ema(0.9), training.swa(1)]),
)
def test_accumulation_equals_the_big_batch(parts, weights, average):
    model = mlp()
    loss = F.cross_entropy
    if weights:  # several metrics, and a batch with a nested tree

        def loss(outputs, targets):
            value = F.cross_entropy(outputs, targets["label"])
            return value, {"accuracy": (outputs.argmax(-1) == targets["label"]).double().mean()}

    x, y = data()
    batch = (x, {"label": y} if weights else y)
    results = []
    for accumulate in (1, parts):
        step = training.make_step(
            model, loss, optim.sgd(0.5, momentum=0.9), accumulate=accumulate, average=average
        )
        state = start(step, model)
        for _ in range(3):
            state, metrics = step(state, batch)
        results.append((state, metrics))
    assert_close(*results, rtol=1e-12, atol=1e-14)


def test_accumulation_hands_the_buffers_from_part_to_part():
    model = cnn()
    x, y = data(shape=(1, 8, 8))
    step = make(model, accumulate=2, optimizer=optim.sgd(0.0))
    state = start(step, model)
    params = tree.merge(state.params, state.buffers)
    for half in (x[:12], x[12:]):
        _, buffers = model.apply(params, half, train=True)
        params = tree.merge(state.params, buffers)
    assert_close(step(state, (x, y))[0].buffers, tree.partition(params)[1])


def test_accumulation_and_optim_accumulate_take_the_same_steps():
    model = mlp()
    x, y = data()
    whole, parts = make(accumulate=2), make(optimizer=optim.accumulate(optim.adamw(1e-2), 2))
    one, other = start(whole, model), start(parts, model)
    for _ in range(2):
        one, _ = whole(one, (x, y))
        for half in (slice(0, 12), slice(12, 24)):
            other, _ = parts(other, (x[half], y[half]))
    assert_close(one.params, other.params)


OPTIONS = [
    {},
    {"accumulate": 2, "nonfinite": "restore", "average": training.ema(0.9)},
    {"nonfinite": None, "average": training.swa(1), "trainable": "*.weight"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "parts", "average"])
def test_members_together_equal_members_alone_and_compiled(options):
    model = mlp(dropout=0.5)
    step = make(model, **options)
    batch = data()
    params = vmap(lambda key: tree.cast(model.init(key), torch.float64))(KEYS)
    states = vmap(step.init)(params, KEYS)
    compiled = funcnets.compile(vmap(step, in_dims=(0, None)), donate="state", backend="aot_eager")
    given, written_out = tree.map(torch.clone, states), states
    for _ in range(3):
        states, metrics = vmap(step, in_dims=(0, None))(states, batch)
        given, same = compiled(given, batch)
        with mock.patch.object(fused, "serves", return_value=False):
            written_out, expected = vmap(step, in_dims=(0, None))(written_out, batch)
    assert_equal((given, same), (written_out, expected))
    # Eager Adam is torch's kernel, and rounds otherwise than the rule that is written out.
    assert_close((given, same), (states, metrics), rtol=1e-12, atol=1e-12, equal_nan=True)
    for i, key in enumerate(KEYS):
        alone = step.init(tree.cast(model.init(key), torch.float64), key)
        for _ in range(3):
            alone, own = step(alone, batch)
        assert_close((alone, own), tree.map(lambda leaf, i=i: leaf[i], (states, metrics)))


def test_batch_norm_in_a_compiled_step():
    model = cnn()
    step = make(model)
    params = tree.cast(model.init(random.key(0)), torch.float64)
    key, batch = random.key(1), data(shape=(1, 8, 8))
    state = step.init(params, key)
    compiled = funcnets.compile(step, donate="state", backend="aot_eager")
    given = tree.map(torch.clone, state)
    for _ in range(2):
        state, _ = step(state, batch)
        given, _ = compiled(given, batch)
    assert_close(given, state)
    # What is given away is the state's own: the parameters and the key are as they were.
    compiled(step.init(params, key), batch)
    assert_equal(step.init(params, key).params, tree.partition(params)[0])
    assert not torch.equal(*[tree.leaves(s.buffers)[0] for s in (state, start(step, model))])


def test_hyperparameters_of_each_member():
    model, batch = mlp(), data()

    def step_of(hyper):
        optimizer = optim.chain(optim.clip_by_global_norm(hyper["clip"]), optim.sgd(hyper["rate"]))
        return make(model, optimizer=optimizer, average=training.ema(hyper["decay"]))

    hyper = {
        "rate": torch.tensor([0.1, 1.0], dtype=torch.float64),
        "clip": torch.tensor([0.1, 10.0], dtype=torch.float64),
        "decay": torch.tensor([0.5, 0.9], dtype=torch.float64),
    }
    params = vmap(lambda key: tree.cast(model.init(key), torch.float64))(KEYS[:2])
    states = vmap(lambda h, p, k: step_of(h).init(p, k))(hyper, params, KEYS[:2])
    for _ in range(3):
        states, _ = vmap(lambda h, s, b: step_of(h)(s, b), in_dims=(0, 0, None))(
            hyper, states, batch
        )
    for i in range(2):
        own = make(
            model,
            optimizer=optim.chain(
                optim.clip_by_global_norm(float(hyper["clip"][i])),
                optim.sgd(float(hyper["rate"][i])),
            ),
            average=training.ema(float(hyper["decay"][i])),
        )
        state = own.init(tree.map(lambda leaf, i=i: leaf[i], params), KEYS[i])
        for _ in range(3):
            state, _ = own(state, batch)
        assert_close(state, tree.map(lambda leaf, i=i: leaf[i], states))


def test_nothing_given_is_changed_and_a_key_decides():
    model = mlp(dropout=0.5)
    step = make(model, average=training.ema(0.9), nonfinite="restore")
    state, batch = start(step, model), data()
    before = tree.map(torch.clone, (state, batch))
    first, second = step(state, batch), step(state, batch)
    assert_equal(before, (state, batch))
    assert_equal(first, second)
    assert_equal(first, step(state, batch, training.step_key(state.key, state.step)))
    other = step(state, batch, random.key(9))
    assert not torch.equal(first[1]["loss"], other[1]["loss"])


def test_only_what_is_trainable_is_trained():
    model = mlp()
    params = tree.cast(model.init(random.key(0)), torch.float64)
    last = next(reversed(list(params.keys())))
    step = make(model, trainable=last)
    state, _ = step(step.init(params, random.key(1)), data())
    assert list(state.params.keys()) == [last]
    after = training.parameters(state)
    for path, leaf in tree.leaves_with_path(params):
        assert torch.equal(leaf, after[path]) == (path[0] != last)
    with pytest.raises(ValueError, match="matched none"):
        make(model, trainable="nowhere").init(params, random.key(1))


def test_a_loss_that_does_it_all():
    model = mlp(dropout=0.2)

    def loss(params, batch, key):
        outputs, buffers = model.apply(params, batch["x"], train=True, key=key)
        penalty = tree.global_norm(tree.partition(params)[0])
        return F.cross_entropy(outputs, batch["y"]) + 0.1 * penalty, {"norm": penalty}, buffers

    x, y = data()
    step = training.make_step(None, loss, optim.sgd(0.1), accumulate=3)
    state, metrics = step(start(step, model), {"x": x, "y": y})
    assert list(metrics) == ["loss", "norm", "nonfinite"]
    assert int(state.step) == 1


def test_inputs_by_position_by_name_and_an_apply_of_ones_own():
    def apply(params, x, scale):
        return params["w"] * x * scale

    model = Model(lambda key: TensorDict({"w": torch.tensor(2.0)}), apply)
    step = training.make_step(model, F.mse_loss, optim.sgd(0.1))
    state = step.init(model.init(KEYS[0]), KEYS[0])
    x = torch.ones(4)
    _, metrics = step(state, ((x, 3 * x), x))
    assert metrics["loss"] == 25
    named = Model(model.init, lambda params, inputs: params["w"] * inputs["x"])
    step = training.make_step(named, F.mse_loss, optim.sgd(0.1))
    assert step(state, ({"x": x}, x))[1]["loss"] == 1


def test_errors(unchecked):
    model = mlp()
    x, y = data()
    for options in ({"accumulate": 0}, {"nonfinite": "ignore"}, {"precision": "int8"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            make(model, **options)
    step = make(model, accumulate=5)
    with pytest.raises(ValueError, match=r"multiple of 5, got 0 \[24, 6\], 1 \[24\]"):
        step(start(step, model), (x, y))
    step = make(model)
    with pytest.raises(TypeError, match="key: expected a uint64 tensor"):
        step.init(model.init(random.key(0)), 0)
    state = start(step, model)
    with pytest.raises(TypeError, match=r"\(inputs, targets\)"):
        step(state, x)
    # torch itself names the label; nothing has been changed.
    with pytest.raises(IndexError, match=f"Target {CLASSES} is out of bounds"):
        step(state, (x, y + CLASSES))
    for loss, message in (
        (lambda outputs, targets: outputs, r"loss: expected a tensor of shape \[\]"),
        (lambda outputs, targets: (outputs.sum(), {"a": targets}), r"metrics: a: expected"),
        (lambda outputs, targets: (outputs.sum(), {"loss": 0.0}), "loss is taken"),
    ):
        with pytest.raises(ValueError, match=message):
            training.make_step(model, loss, optim.sgd(0.1))(state, (x, y))
    with pytest.raises(ValueError, match="no average is kept"):
        training.parameters(state, average=True)


@pytest.mark.usefixtures("unchecked")
def test_parts_that_are_none():
    model, good = mlp(), optim.sgd(0.1)
    with pytest.raises(TypeError, match="make_step: model: expected what has apply, got <function"):
        training.make_step(model.apply, F.mse_loss, good)
    for optimizer in (None, torch.optim.Adam, 1e-3):
        with pytest.raises(TypeError, match="make_step: optimizer: expected what has init and"):
            training.make_step(model, F.mse_loss, optimizer)
    with pytest.raises(TypeError, match=r"make_step: average: .* got 0\.9"):
        training.make_step(model, F.mse_loss, good, average=0.9)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("wrap", [lambda step: step, funcnets.compile], ids=["plain", "compiled"])
def test_parameters_are_no_state(wrap):
    model = mlp()
    with pytest.raises(TypeError, match=r"state: expected that of step\.init, got TensorDict"):
        wrap(make(model))(model.init(KEYS[0]), data())


def test_one_sample_and_batch_norm_is_a_clear_error():
    model = funcnets.models.mlp(FEATURES, CLASSES, (8,), norm="batch")
    step = make(model)
    x, y = data()
    state = start(step, model)
    with pytest.raises(ValueError, match="more than one value per channel"):
        step(state, (x[:1], y[:1]))
    batches = training.minibatches((x, y), SAMPLES - 1)
    with pytest.raises(ValueError, match="more than one value") as caught:
        training.fit(step, state, batches, epochs=1)
    assert caught.value.__notes__ == ["fit: in step 1, epoch 0"]
    batches = training.minibatches((x, y), SAMPLES - 1, drop_last=True)
    assert int(training.fit(step, state, batches, epochs=2)[0].step) == 2

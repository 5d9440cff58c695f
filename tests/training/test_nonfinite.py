import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from networks import assert_equal, data, make, mlp, start
from tensordict import TensorDict
from torch.func import vmap

import funcnets
from funcnets import Model, optim, random, training, tree

BAD = [torch.nan, torch.inf, -torch.inf]


def kept(state):
    return state.params, state.buffers, state.optimizer, state.average


@given(
    shapes=st.lists(st.sampled_from([(), (2,), (0,), (2, 3)]), min_size=1, max_size=4),
    place=st.integers(0, 5),
    bad=st.sampled_from(BAD),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
)
def test_the_first_leaf_that_is_not_finite(shapes, place, bad, dtype):
    leaves = [torch.full(shape, torch.finfo(dtype).max, dtype=dtype) for shape in shapes]
    for leaf in leaves[place:]:
        leaf.flatten()[-1:] = bad
    filled = [i for i, leaf in enumerate(leaves) if i >= place and leaf.numel()]
    assert int(training.first_nonfinite(leaves)) == (filled[0] if filled else -1)


def test_integers_and_nothing_are_finite():
    assert int(training.first_nonfinite([])) == -1
    assert int(training.first_nonfinite([torch.tensor([2**62])])) == -1


def make_root(**options):
    """A network whose loss, or one of whose gradients, is not finite for some inputs."""

    def init(key):
        leaves = {"a": torch.tensor(1.0), "b": torch.tensor(1.0)}
        return TensorDict({"outer": TensorDict(leaves)})

    def apply(params, x):  # the derivative of the square root at zero is infinite
        return params["outer", "a"] * x + (params["outer", "b"] * x).abs().sqrt()

    model = Model(init, apply)
    return model, training.make_step(
        model, lambda outputs, targets: (outputs * targets).mean(), optim.adamw(0.1), **options
    )


ONES = torch.ones(4)


def test_the_place_has_a_name():
    model, step = make_root(nonfinite="skip")
    state = step.init(model.init(None), random.key(0))
    for batch, expected in (
        ((ONES, ONES), "nothing"),
        ((0 * ONES, ONES), "the gradient of outer.b"),
        ((ONES, torch.nan * ONES), "batch.1"),
        ((torch.inf * ONES, ONES), "batch.0"),
        ((1e38 * ONES, 1e38 * ONES), "the loss"),
    ):
        after, metrics = step(state, batch)
        place = int(metrics["nonfinite"])
        assert training.place_name(place, state.params, batch) == expected
        assert torch.equal(after.params["outer", "a"], state.params["outer", "a"]) == (place != -1)
        assert int(after.nonfinite.times) == (place != -1)
    bad = state._replace(params=tree.map(lambda leaf: leaf * torch.nan, state.params))
    place = int(step(bad, (ONES, ONES))[1]["nonfinite"])
    assert training.place_name(place, bad.params) == "the loss, after params.outer.a"


def test_what_the_loss_does_not_see_may_be_anything():
    model, step = make_root()
    state = step.init(model.init(None), random.key(0))
    masked = Model(model.init, lambda params, x: model.apply(params, x.nan_to_num(1.0)))
    step = training.make_step(masked, lambda o, t: (o * t).mean(), optim.sgd(0.1))
    state = step.init(model.init(None), random.key(0))
    assert int(step(state, (torch.nan * ONES, ONES))[1]["nonfinite"]) == -1


def test_skip_leaves_all_but_the_number_of_the_step():
    step = make(nonfinite="skip", average=training.ema(0.9))
    (x, y), model = data(), mlp()
    state, _ = step(start(step, model), (x, y))
    after, metrics = step(state, (x * torch.nan, y))
    assert_equal(kept(after), kept(state))
    assert (int(after.step), int(after.nonfinite.times), int(after.nonfinite.step)) == (2, 1, 1)
    assert int(metrics["nonfinite"]) == training.nonfinite.BATCH
    again, _ = step(after, (x, y))
    other, _ = step(state._replace(step=state.step + 1), (x, y))
    assert_equal(kept(again), kept(other))


def test_stop_leaves_all_from_then_on():
    step = make(nonfinite="stop")
    (x, y), model = data(), mlp()
    state, _ = step(start(step, model), (x, y))
    after, _ = step(state, (x / 0, y))
    after, metrics = step(after, (x, y))
    assert_equal(kept(after), kept(state))
    assert int(metrics["nonfinite"]) == -1
    assert int(after.nonfinite.times) == 1


def test_restore_goes_back_to_the_last_good_state():
    (x, y), model = data(), mlp()
    step = make(model, nonfinite="restore", average=training.ema(0.9), optimizer=optim.adam(1e-2))
    states = [start(step, model)]
    for _ in range(3):
        states.append(step(states[-1], (x, y))[0])
    # An update that overflows: the parameters after it are no good, those before were.
    broken = states[3]._replace(
        params=tree.map(lambda leaf: leaf * torch.inf, states[3].params),
        average=tree.map(lambda leaf: leaf * 0, states[3].average),
    )
    after, metrics = step(broken, (x, y))
    assert int(metrics["nonfinite"]) == -2
    assert_equal(kept(after), kept(states[2]))
    assert_equal(after.good, broken.good)
    again, _ = step(after, (x, y))
    assert_equal(kept(again), kept(states[3]))


def test_restore_every_so_many_steps():
    (x, y), model = data(), mlp()
    step = make(model, nonfinite="restore", good_every=3)
    states = [start(step, model)]
    for _ in range(5):
        states.append(step(states[-1], (x, y))[0])
    after, _ = step(states[5], (x * torch.nan, y))
    assert_equal(kept(after), kept(states[3]))


def test_none_looks_at_nothing():
    (x, y), model = data(), mlp()
    step = make(model, nonfinite=None)
    state, metrics = step(start(step, model), (x * torch.nan, y))
    assert list(metrics) == ["loss"]
    assert not tree.leaves(state.params)[0].isfinite().all()


@pytest.mark.parametrize("policy", ["stop", "skip", "restore"])
def test_a_diverging_member_does_not_hurt_the_others(policy):
    (x, y), model = data(), mlp()
    keys = random.split(random.key(0), 3)

    def step_of(rate):
        return make(model, optimizer=optim.sgd(rate), nonfinite=policy)

    rates = torch.tensor([0.1, 1e200, 0.2], dtype=torch.float64)
    params = vmap(lambda key: tree.cast(model.init(key), torch.float64))(keys)
    states = vmap(lambda r, p, k: step_of(r).init(p, k))(rates, params, keys)
    together = vmap(lambda r, s, b: step_of(r)(s, b), in_dims=(0, 0, None))
    compiled = funcnets.compile(together, backend="aot_eager")
    for i in range(4):
        states, _ = (compiled if i == 3 else together)(rates, states, (x, y))
    assert (states.nonfinite.times > 0).tolist() == [False, True, False]
    for i in (0, 2):
        step = step_of(float(rates[i]))
        alone = step.init(tree.map(lambda leaf, i=i: leaf[i], params), keys[i])
        for _ in range(4):
            alone, _ = step(alone, (x, y))
        for a, b in zip(tree.leaves(alone.params), tree.leaves(states.params), strict=True):
            torch.testing.assert_close(a, b[i])
    if policy == "restore":
        assert all(leaf.isfinite().all() for leaf in tree.leaves(states.good))


def test_fit_stops_with_an_error_that_names_the_place():
    model, step = make_root()
    state = step.init(model.init(None), random.key(0))
    batches = [(ONES, ONES), (ONES, ONES), (0 * ONES, ONES), (ONES, ONES)]
    message = "step 2: the gradient of outer.b is not finite"
    with pytest.raises(training.NonFiniteError, match=message) as caught:
        training.fit(step, state, batches, epochs=1)
    expected, _ = step(step(state, batches[0])[0], batches[1])
    assert_equal(caught.value.state.params, expected.params)


def test_fit_warns_once_and_goes_on():
    (x, y), model = data(), mlp()
    step = make(model, nonfinite="skip")
    batches = [(x, y), (x * torch.nan, y), (x * torch.nan, y), (x, y)]
    with pytest.warns(RuntimeWarning, match="step 1: batch.0 is not finite") as caught:
        state, history = training.fit(step, start(step, model), batches, epochs=1)
    assert len(caught) == 1
    assert history[-1]["nonfinite"] == 2
    assert history[-1]["training"]["loss"] == history[-1]["training"]["loss"]
    assert int(state.step) == 4


def test_fit_of_an_ensemble_goes_on_until_the_last_has_stopped():
    (x, y), model = data(), mlp()
    keys = random.split(random.key(0), 2)
    step = vmap(make(model, nonfinite="stop"))
    states = vmap(make(model).init)(vmap(model.init)(keys), keys)
    x = x.to(torch.float32)
    worse = torch.stack([x, x * torch.nan])
    both = torch.stack([y, y])
    with pytest.warns(RuntimeWarning, match="step 0: member 1: batch.0 is not finite"):
        state, history = training.fit(step, states, [(worse, both)], steps=3)
    assert history[-1]["nonfinite"] == [0, 3]
    assert state.nonfinite.stopped.tolist() == [False, True]
    bad = torch.stack([x * torch.nan, x])
    with pytest.raises(training.NonFiniteError, match=r"step 3: member 0: batch\.0"):
        training.fit(step, state, [(bad, both)], steps=4)


def test_a_loss_that_needs_no_network():
    with pytest.raises(ValueError, match="expected stop, skip, restore or None"):
        training.make_step(None, F.mse_loss, optim.sgd(0.1), nonfinite="raise")

"""Chains, rules by path, and accumulation; and what the errors of all optimizers say."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optim_cases import OPTIMIZERS, draw
from tensordict import TensorDict

from funcnets import optim, tree

NESTED = {
    "layer1": {"weight": torch.ones(3, 4), "bias": torch.ones(4)},
    "head": {"weight": torch.ones(4, 2), "bias": torch.ones(2)},
}


def two_steps(optimizer, params, grads):
    state = optimizer.init(params)
    for _ in range(2):
        updates, state = optimizer.update(grads, state, params)
        params = optim.apply_updates(params, updates)
    return params


def assert_equal(found, expected):
    tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9), found, expected)


def test_a_chain_is_its_links_in_order():
    params, grads = draw(0), draw(1)
    clip, adam = optim.clip_by_value(0.1), optim.adam(0.1)
    chained = optim.chain(clip, adam)
    clipped, _ = clip.update(grads, clip.init(params), params)
    expected, _ = adam.update(clipped, adam.init(params), params)
    found, state = chained.update(grads, chained.init(params), params)
    assert_equal(found, expected)
    assert isinstance(state.states[1], optim.AdamState)


def test_a_chain_takes_any_pair():
    """Such as a transformation that a user writes."""

    def negate(grads, state, params, value=None):
        return tree.map(torch.neg, grads), state

    optimizer = optim.chain(optim.sgd(0.1), optim.Optimizer(lambda params: (), negate))
    params = {"w": torch.ones(2)}
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert torch.equal(updates["w"], torch.full((2,), 0.1))


@pytest.mark.parametrize("kind", [dict, TensorDict])
def test_by_path_is_each_optimizer_on_its_own_leaves(kind):
    params = NESTED if kind is dict else TensorDict(NESTED)
    grads = tree.map(lambda leaf: 0.5 * leaf, params)
    rules = {
        ("head.bias", "nothing"): optim.sgd(0.5),
        "head": optim.adam(0.1),
        re.compile(r".*\.bias"): optim.lion(0.01),
        (lambda path, leaf: path[0] == "layer1" and leaf.ndim == 2): optim.muon(0.02),
    }
    found = two_steps(optim.by_path(rules), params, grads)
    assert type(found) is (dict if kind is dict else TensorDict)
    for names, optimizer in (
        (("head", "bias"), optim.sgd(0.5)),
        (("head", "weight"), optim.adam(0.1)),
        (("layer1", "bias"), optim.lion(0.01)),
        (("layer1", "weight"), optim.muon(0.02)),
    ):
        outer, inner = names
        alone = two_steps(optimizer, params[outer][inner], grads[outer][inner])
        torch.testing.assert_close(found[outer][inner], alone)


def test_by_path_keeps_the_paths():
    """A mask within it is still one by path."""
    decayed = optim.by_path({"head": optim.adamw(0.1, where="head.weight")}, optim.sgd(0.1))
    found = two_steps(decayed, NESTED, tree.map(torch.zeros_like, NESTED))
    assert (found["head"]["weight"] < 1).all()
    assert (found["head"]["bias"] == 1).all()


def test_scale_by_path_is_a_learning_rate_by_path():
    grads = tree.map(lambda leaf: 0.5 * leaf, NESTED)
    factors = {"layer1": torch.tensor(0.1), "*.bias": optim.schedules.constant(3.0)}
    found = two_steps(optim.chain(optim.adamw(0.1), optim.scale_by_path(factors)), NESTED, grads)
    for names, rate in (
        (("layer1", "weight"), 0.01),
        (("layer1", "bias"), 0.01),
        (("head", "bias"), 0.3),
        (("head", "weight"), 0.1),
    ):
        outer, inner = names
        alone = two_steps(optim.adamw(rate), NESTED[outer][inner], grads[outer][inner])
        torch.testing.assert_close(found[outer][inner], alone)


@given(every=st.integers(1, 4), updates=st.integers(1, 3), seed=st.integers(0, 99))
def test_accumulated_micro_batches_are_one_batch(every, updates, seed):
    params = draw(seed)
    plain = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(0.1))
    accumulated = optim.accumulate(plain, every)
    one, two = params, params
    state, held = plain.init(params), accumulated.init(params)
    for update in range(updates):
        batches = [draw(100 * update + number) for number in range(every)]
        mean = tree.map(lambda *leaves: sum(leaves) / every, *batches)
        changes, state = plain.update(mean, state, one)
        one = optim.apply_updates(one, changes)
        for number, grads in enumerate(batches):
            changes, held = accumulated.update(grads, held, two)
            assert number == every - 1 or all(not leaf.any() for leaf in tree.leaves(changes))
            two = optim.apply_updates(two, changes)
        assert held.held == 0
        assert_equal(two, one)
        assert_equal(held.state, state)


@given(counts=st.lists(st.integers(0, 6), min_size=1, max_size=3))
def test_a_schedule_is_a_learning_rate_that_changes(counts):
    schedule = optim.schedules.step(0.5, 2, 0.1)
    params = draw(0)
    optimizer = optim.sgd(schedule, momentum=0.5)
    state = optimizer.init(params)
    for step in range(max(counts) + 1):
        by_hand = optim.sgd(float(schedule(step)), momentum=0.5)
        expected, _ = by_hand.update(draw(step), state, params)
        updates, state = optimizer.update(draw(step), state, params)
        assert_equal(updates, expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_errors_name_the_leaf(name):
    params = {"layer1": draw(0)}
    optimizer = OPTIMIZERS[name](0.1)
    if name in ("chain", "adamw"):  # their globs name leaves at the root
        params = draw(0)
    place = "kernel" if name in ("chain", "adamw") else r"layer1\.kernel"
    state = optimizer.init(params)
    value = torch.tensor(1.0)

    def with_kernel(leaf):
        return tree.map_with_path(lambda path, p: leaf if path[-1] == "kernel" else p, params)

    wrong = with_kernel(torch.zeros(2, 3, 1, 2, dtype=torch.float64))
    expected = rf"{place}: expected gradient float64\[2, 3, 2, 1\], got float64\[2, 3, 1, 2\]"
    with pytest.raises(ValueError, match=expected):
        optimizer.update(wrong, state, params, value)
    with pytest.raises(ValueError, match=rf"{place}: expected gradient .* got float32\[2, 3, 2, 1"):
        optimizer.update(with_kernel(torch.zeros(2, 3, 2, 1)), state, params, value)

    inner = params.get("layer1", params)
    missing = {key: leaf for key, leaf in inner.items() if key != "kernel"}
    missing = {"layer1": missing} if "layer1" in params else missing
    with pytest.raises(ValueError, match="missing kernel, unexpected nothing"):
        optimizer.update(missing, state, params, value)
    with pytest.raises(TypeError, match=r"state: expected \w+State, got tuple"):
        optimizer.update(params, (), params, value)


@pytest.mark.parametrize(
    "name", sorted(set(OPTIMIZERS) - {"chain", "muon", "scheduled", "adamw", "accumulate"})
)
def test_states_of_others_and_leaves_without_gradient(name):
    params = draw(0)
    optimizer = OPTIMIZERS[name](0.1)
    state = optimizer.init({**params, "kernel": torch.zeros(1, 1, 1, 1, dtype=torch.float64)})
    expected = r"state: kernel: expected \[2, 3, [12], 1\], got \[1, 1, 1, 1\]"
    with pytest.raises(ValueError, match=expected):
        optimizer.update(params, state, params)
    with pytest.raises(ValueError, match="batches: expected a floating-point tensor, got int64"):
        optimizer.init({**params, "batches": torch.tensor(3)})
    other = optim.lion(0.1) if name != "lion" else optim.sgd(0.1)
    with pytest.raises(TypeError, match=r"state: expected \w+State, got (Lion|Sgd)State"):
        optimizer.update(params, other.init(params), params)


PARAMS = {"layer1": {"bias": torch.ones(4)}}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optim.adam(-0.1), "adam: learning_rate: expected at least 0, got -0.1"),
        (
            lambda: optim.adam(betas=(0.9, 1.0)),
            r"adam: betas\[1\]: expected at least 0 and below 1",
        ),
        (
            lambda: optim.adamw(weight_decay=-1.0),
            "adamw: weight_decay: expected at least 0, got -1",
        ),
        (lambda: optim.adam(torch.ones(3)), r"shape \[\], got float32\[3\]; map over several with"),
        (
            lambda: optim.adam(torch.tensor(1)),
            r"floating-point tensor of shape \[\], got int64\[\]",
        ),
        (lambda: optim.sgd(float("nan")), "sgd: learning_rate: expected at least 0, got nan"),
        (lambda: optim.sgd(nesterov=True), "nesterov: expected a momentum above 0"),
        (
            lambda: optim.rmsprop(smoothing=1.5),
            "rmsprop: smoothing: expected at least 0 and below 1",
        ),
        (lambda: optim.adagrad(eps=-1.0), "adagrad: eps: expected at least 0, got -1.0"),
        (lambda: optim.nadam(momentum_decay=-1.0), "nadam: momentum_decay: expected at least 0"),
        (
            lambda: optim.lion(betas=(2.0, 0.9)),
            r"lion: betas\[0\]: expected at least 0 and below 1",
        ),
        (lambda: optim.adafactor(threshold=0.5), "adafactor: threshold: expected at least 1, got"),
        (
            lambda: optim.adafactor(decay_exponent=0.5),
            "decay_exponent: expected at most 0, got 0.5",
        ),
        (lambda: optim.muon(adjust="none"), "adjust: expected 'original' or 'match_rms_adamw'"),
        (lambda: optim.clip_by_global_norm(-1.0), "max_norm: expected at least 0, got -1.0"),
        (lambda: optim.clip_by_value(-1.0), "clip_by_value: limit: expected at least 0, got -1.0"),
        (lambda: optim.scale_by_path({"a.*": -1.0}), r"'a\.\*': expected at least 0, got -1.0"),
        (lambda: optim.accumulate(optim.sgd(), 0), "every: expected an int of at least 1, got 0"),
        (lambda: optim.chain(), "chain: expected at least one optimizer"),
        (lambda: optim.chain(optim.sgd), "Optimizer"),
        (
            lambda: optim.muon().init(PARAMS),
            r"muon: layer1\.bias: expected a matrix, got float32\[4\]; .*by_path",
        ),
        (
            lambda: optim.by_path({"layer9": optim.sgd()}, optim.sgd()).init(PARAMS),
            "by_path: 'layer9': expected leaves that match, got none",
        ),
        (
            lambda: optim.by_path({"layer9": optim.sgd()}).init(PARAMS),
            r"by_path: layer1\.bias: expected a rule for it, or a default",
        ),
        (
            lambda: optim.apply_updates(PARAMS, {"layer1": {}}),
            "updates: layer1: expected the same names in both trees; missing bias",
        ),
        (
            lambda: optim.apply_updates({"a": torch.ones(1)}, {"a": torch.ones(3)}),
            r"updates: a: expected float32\[1\], got float32\[3\]",
        ),
        (
            lambda: optim.apply_updates({"a": torch.ones(2).half()}, {"a": torch.ones(2)}),
            r"updates: a: expected float16\[2\], got float32\[2\]",
        ),
        (
            lambda: optim.reduce_on_plateau().update(
                PARAMS, optim.reduce_on_plateau().init(PARAMS), PARAMS
            ),
            r"expected update\(\.\.\., value=loss\), got no value",
        ),
        (
            lambda: optim.sgd(momentum=0.9).update(PARAMS, optim.sgd().init(PARAMS), PARAMS),
            "sgd: state: expected momentum=True, got False",
        ),
        (
            lambda: optim.adam(amsgrad=True).update(PARAMS, optim.adam().init(PARAMS), PARAMS),
            "adam: state: expected that of amsgrad, got one without",
        ),
        (
            lambda: optim.rmsprop(centered=True).update(
                PARAMS, optim.rmsprop().init(PARAMS), PARAMS
            ),
            "rmsprop: state: expected centered=True, got False",
        ),
        (
            lambda: optim.chain(optim.sgd()).update(
                PARAMS, optim.chain(optim.sgd(), optim.sgd()).init(PARAMS), PARAMS
            ),
            "chain: state: expected that of 1 optimizers, got that of 2",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()

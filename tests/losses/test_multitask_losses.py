"""Sums of named losses against their definitions, written out in numpy."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.func import grad, vmap

from funcnets import losses, optim, random

KEY = random.key(0)
NAMES = st.lists(st.sampled_from("abcde"), min_size=1, max_size=5, unique=True)
SEEDS = st.integers(0, 999)


def draw_losses(seed, names, shape=()):
    """Positive losses, each of another size."""
    keys = random.split(random.key(seed), len(names)).unbind()
    return {
        name: 10.0 ** (i - 1) * random.uniform(key, shape, 0.1, 1.0, dtype=torch.float64)
        for i, (name, key) in enumerate(zip(names, keys, strict=True))
    }


def draw_weights(seed, names):
    return {name: float(w) for name, w in draw_losses(seed + 1, names).items()}


@given(names=NAMES, seed=SEEDS, shape=st.sampled_from([(), (4,), (2, 3)]))
def test_sums(names, seed, shape):
    values, weights = draw_losses(seed, names, shape), draw_weights(seed, names)
    numbers = {name: value.numpy() for name, value in values.items()}
    total = sum(weights.values())
    for options, factors in (
        ({}, dict.fromkeys(names, 1.0)),
        ({"weights": weights}, weights),
        ({"weights": weights, "normalize": True}, {n: w / total for n, w in weights.items()}),
        ({"normalize": True}, dict.fromkeys(names, 1 / len(names))),
    ):
        expected = np.zeros(shape)
        for name in names:
            expected = expected + factors[name] * numbers[name]
        np.testing.assert_allclose(losses.weighted_sum(values, **options).numpy(), expected)
        # The gradient of the sum with respect to each loss is its weight.
        slopes = grad(lambda v, o=options: losses.weighted_sum(v, **o).sum())(values)
        for name in names:
            np.testing.assert_allclose(slopes[name].numpy(), np.full(shape, factors[name]))


@given(names=NAMES, seed=SEEDS, order=st.randoms())
def test_the_order_of_the_names_is_of_no_account(names, seed, order):
    values, weights = draw_losses(seed, names, (3,)), draw_weights(seed, names)
    shuffled = list(names)
    order.shuffle(shuffled)
    again = {name: values[name] for name in shuffled}
    params = losses.init_uncertainty(KEY, names, dtype=torch.float64)
    params["log_variance"].update({n: torch.tensor(w).double() for n, w in weights.items()})
    means = {name: value.mean() for name, value in values.items()}
    for first, second in (
        (losses.weighted_sum(values, weights), losses.weighted_sum(again, weights)),
        (
            losses.uncertainty(params, means),
            losses.uncertainty(params, {name: means[name] for name in shuffled}),
        ),
    ):
        torch.testing.assert_close(first, second)


def test_weights_may_be_tensors_one_for_each_member():
    values = draw_losses(0, ["a", "b"])
    weights = {"a": torch.tensor([1.0, 2.0]).double(), "b": torch.tensor([3.0, 2.0]).double()}
    for normalize in (False, True):
        found = vmap(lambda w, n=normalize: losses.weighted_sum(values, w, normalize=n))(weights)
        for i in range(2):
            each = {name: float(w[i]) for name, w in weights.items()}
            torch.testing.assert_close(
                found[i], losses.weighted_sum(values, each, normalize=normalize)
            )


@given(names=NAMES, seed=SEEDS, size=st.integers(1, 5), unit=st.sampled_from([1e-6, 1.0, 1e6]))
def test_scaled_by_the_largest(names, seed, size, unit):
    values = draw_losses(seed, names, (size,))
    found = losses.scale_by_largest(values)
    assert list(found) == names
    for name, value in values.items():
        expected = value.numpy().mean() / value.numpy().max()
        np.testing.assert_allclose(float(found[name]), expected)
        assert 0 < found[name] <= 1 + 1e-12
    # Whatever the unit of a loss, its share is the same.
    name = names[-1]
    other = losses.scale_by_largest({**values, name: unit * values[name]})
    np.testing.assert_allclose(float(other[name]), float(found[name]))


@given(seed=SEEDS, size=st.integers(1, 5))
def test_the_scale_is_a_constant_to_the_gradient(seed, size):
    value = draw_losses(seed, ["a"], (size,))["a"]
    slope = grad(lambda v: losses.scale_by_largest({"a": v})["a"])(value)
    np.testing.assert_allclose(slope.numpy(), np.full(size, 1 / (size * value.numpy().max())))
    # If it were none, no gradient would be left along the loss itself.
    assert torch.dot(slope, value) > 0


def test_the_largest_of_losses_that_are_zero_or_negative():
    def scaled(value):
        return losses.scale_by_largest({"a": value})["a"]

    zeros = torch.zeros(3, dtype=torch.float64)
    assert scaled(zeros) == 0
    torch.testing.assert_close(grad(scaled)(zeros), torch.full_like(zeros, 1 / 3))
    torch.testing.assert_close(scaled(torch.tensor([-4.0, 2.0])), torch.tensor(-0.25))


def test_one_weight_for_each_loss_and_one_network(unchecked):
    values = {"a": torch.tensor(3.0), "b": torch.tensor(1.0)}
    with pytest.raises(ValueError, match=r"weights.b: expected .* shape \[\], got float32\[2\]"):
        losses.weighted_sum(values, {"a": 1, "b": torch.ones(2)})
    params = losses.init_uncertainty(KEY, list(values))
    with pytest.raises(ValueError, match=r"uncertainty: losses.a: expected shape \[\], got \[3\]"):
        losses.uncertainty(params, {"a": torch.ones(3), "b": torch.ones(3)})
    members = vmap(lambda key: losses.init_uncertainty(key, list(values)))(random.split(KEY, 3))
    with pytest.raises(ValueError, match=r"params.log_variance.a: expected shape \[\], got \[3\]"):
        losses.uncertainty(members, values)
    assert vmap(losses.uncertainty, (0, None))(members, values).tolist() == [4.0] * 3


@given(names=NAMES, seed=SEEDS)
def test_uncertainty_by_hand(names, seed):
    values = draw_losses(seed, names)
    logs = {name: random.normal(random.fold_in(KEY, seed), ()).double() for name in names}
    params = losses.init_uncertainty(KEY, names, dtype=torch.float64)
    assert losses.uncertainty(params, values) == losses.weighted_sum(values)
    params["log_variance"].update(logs)
    # 1 / sigma ** 2 times each loss, plus log sigma.
    sigma = {name: np.exp(float(s) / 2) for name, s in logs.items()}
    expected = sum(float(values[n]) / sigma[n] ** 2 + np.log(sigma[n]) for n in names)
    np.testing.assert_allclose(float(losses.uncertainty(params, values)), expected)
    slopes, to_losses = grad(losses.uncertainty, (0, 1))(params, values)
    for name in names:
        slope = 0.5 - float(values[name]) / sigma[name] ** 2
        np.testing.assert_allclose(float(slopes["log_variance", name]), slope, atol=1e-12)
        np.testing.assert_allclose(float(to_losses[name]), sigma[name] ** -2)


@given(names=NAMES, seed=SEEDS)
def test_at_the_best_uncertainty_the_variance_is_twice_the_loss(names, seed):
    """Half a squared error is so divided by the variance of the errors."""
    values = draw_losses(seed, names)
    assume(all(value > 1e-2 for value in values.values()))
    params = losses.init_uncertainty(KEY, names, dtype=torch.float64)
    best = {name: (2 * value).log() for name, value in values.items()}
    params["log_variance"].update(best)
    slopes = grad(losses.uncertainty)(params, values)
    for name in names:
        np.testing.assert_allclose(float(slopes["log_variance", name]), 0, atol=1e-12)


def test_uncertainty_is_learned():
    """The loss that stays large comes to weigh less."""
    values = {"noisy": torch.tensor(5.0), "clear": torch.tensor(0.05)}
    params = losses.init_uncertainty(KEY, list(values))
    assert params["log_variance", "clear"].shape == ()
    optimizer = optim.adam(0.05)
    state = optimizer.init(params)
    for _ in range(400):
        updates, state = optimizer.update(grad(losses.uncertainty)(params, values), state, params)
        params = optim.apply_updates(params, updates)
    for name, value in values.items():
        torch.testing.assert_close(
            params["log_variance", name].exp(), 2 * value, rtol=1e-2, atol=1e-3
        )


def test_an_ensemble_of_uncertainties():
    values = draw_losses(1, ["a", "b"])
    keys = random.split(KEY, 3)
    params = vmap(lambda key: losses.init_uncertainty(key, ["a", "b"], dtype=torch.float64))(keys)
    assert params.batch_size == (3,)
    params["log_variance", "a"][1] = 1.0
    found = vmap(losses.uncertainty, (0, None))(params, values)
    for i in range(3):
        torch.testing.assert_close(found[i], losses.uncertainty(params[i], values))


@pytest.mark.dynamo
def test_compiled():
    values = draw_losses(0, ["a", "b"], (3,))
    params = losses.init_uncertainty(KEY, ["a", "b"], dtype=torch.float64)

    def total(params, values):
        means = {name: value.mean() for name, value in values.items()}
        return (
            losses.weighted_sum(losses.scale_by_largest(values), {"a": 1, "b": 2}, normalize=True)
            + losses.weighted_sum(means)
            + losses.uncertainty(params, means)
        )

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(params, values), total(params, values))


ONE = torch.tensor(1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.weighted_sum({}), "weighted_sum: losses: expected at least one, got none"),
        (
            lambda: losses.weighted_sum({"a": ONE, "b": ONE}, {"a": 1, "c": 2, "d": 1}),
            "weighted_sum: weights: expected a, b; missing b, unknown c, d",
        ),
        (
            lambda: losses.weighted_sum({"a": ONE}, {"a": 1, "c": 2}),
            "weighted_sum: weights: expected a; unknown c",
        ),
        (
            lambda: losses.weighted_sum({"a": ONE, "b": ONE}, {"a": 1}),
            "weighted_sum: weights: expected a, b; missing b",
        ),
        (
            lambda: losses.weighted_sum({"a": ONE, "b": torch.ones(3)}),
            "weighted_sum: losses.b: expected shape [] (as a), got [3]",
        ),
        (
            lambda: losses.weighted_sum({"a": ONE, "b": ONE}, {"a": 2, "b": -1}, normalize=True),
            "weighted_sum: weights: expected none below 0, got {'a': 2, 'b': -1}",
        ),
        (
            lambda: losses.weighted_sum({"a": ONE}, {"a": float("nan")}, normalize=True),
            "weighted_sum: weights: expected none below 0, got {'a': nan}",
        ),
        (
            lambda: losses.weighted_sum({"a": ONE}, {"a": 0}, normalize=True),
            "weighted_sum: weights: expected a positive sum, got 0",
        ),
        (lambda: losses.scale_by_largest({}), "scale_by_largest: losses: expected at least one"),
        (
            lambda: losses.scale_by_largest({"a": torch.ones(3), "b": ONE}),
            "scale_by_largest: losses.b: expected one value per sample, got float32[]",
        ),
        (
            lambda: losses.scale_by_largest({"a": torch.ones(0)}),
            "scale_by_largest: losses.a: expected one value per sample, got float32[0]",
        ),
        (
            lambda: losses.uncertainty(losses.init_uncertainty(KEY, ["a", "b"]), {"a": ONE}),
            "uncertainty: params.log_variance: expected a; unknown b",
        ),
        (
            lambda: losses.uncertainty(losses.init_uncertainty(KEY, ["a"]), {"b": ONE}),
            "uncertainty: params.log_variance: expected b; missing b, unknown a",
        ),
        (
            lambda: losses.init_uncertainty(KEY, ["a", "a"]),
            "init_uncertainty: names: expected each name once, got ['a', 'a']",
        ),
        (lambda: losses.init_uncertainty(KEY, "ab"), "expected each name once, got 'ab'"),
        (lambda: losses.init_uncertainty(KEY, []), "expected each name once, got []"),
    ],
)
def test_errors(call, message, unchecked):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_a_loss_that_is_no_tensor(unchecked):
    with pytest.raises(TypeError, match=r"losses.a: expected a tensor, got float"):
        losses.weighted_sum({"a": 1.0})
    value = torch.tensor(1.0)
    with pytest.raises(TypeError, match="weighted_sum: losses: expected a dict by name, got list"):
        losses.weighted_sum([value])
    with pytest.raises(TypeError, match="weighted_sum: weights: expected a dict by name, got list"):
        losses.weighted_sum({"a": value}, [1.0])

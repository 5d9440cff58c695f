"""Schedules over their whole course, against torch.optim.lr_scheduler."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim import lr_scheduler

from funcnets import optim
from funcnets.optim import schedules

STEPS = st.integers(2, 12)
RATE = st.floats(1e-4, 2.0)
FACTOR = st.floats(0.1, 0.95)


def course(make, rate, length):
    """The learning rates that a torch scheduler sets."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    scheduler = make(optimizer)
    rates = []
    for _ in range(length):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return torch.tensor(rates, dtype=torch.float64)


def ours(schedule, length):
    found = torch.stack([schedule(torch.tensor(count)) for count in range(length)])
    assert found.dtype == torch.float64
    assert torch.equal(found, torch.stack([schedule(count) for count in range(length)]))
    return found


def agree(schedule, make, rate, length):
    torch.testing.assert_close(
        ours(schedule, length), course(make, rate, length), rtol=1e-10, atol=1e-12
    )


@given(rate=RATE, every=STEPS, factor=FACTOR)
def test_step(rate, every, factor):
    agree(
        schedules.step(rate, every, factor),
        lambda optimizer: lr_scheduler.StepLR(optimizer, every, factor),
        rate,
        40,
    )


@given(rate=RATE, milestones=st.lists(st.integers(1, 30), max_size=4).map(sorted), factor=FACTOR)
def test_multi_step(rate, milestones, factor):
    agree(
        schedules.multi_step(rate, milestones, factor),
        lambda optimizer: lr_scheduler.MultiStepLR(optimizer, milestones, factor),
        rate,
        40,
    )


@given(rate=RATE, factor=FACTOR)
def test_exponential(rate, factor):
    agree(
        schedules.exponential(rate, factor),
        lambda optimizer: lr_scheduler.ExponentialLR(optimizer, factor),
        rate,
        40,
    )


@given(rate=RATE, steps=STEPS, final=st.floats(0.0, 0.1))
def test_cosine(rate, steps, final):
    schedule = schedules.cosine(rate, steps, final)
    agree(
        schedule,
        lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, steps, final),
        rate,
        steps + 1,
    )
    torch.testing.assert_close(
        ours(schedule, 20)[steps:], ours(schedules.constant(final), 20 - steps)
    )


@given(rate=RATE, period=st.integers(1, 9), multiplier=st.integers(1, 4), final=st.floats(0.0, 0.1))
@example(rate=1.0, period=1, multiplier=3, final=0.0)  # log(243) / log(3) rounds to below 5
def test_cosine_restarts(rate, period, multiplier, final):
    agree(
        schedules.cosine_restarts(rate, period, multiplier, final),
        lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(
            optimizer, period, multiplier, final
        ),
        rate,
        130,
    )


@given(rate=RATE, steps=STEPS, power=st.floats(0.5, 3.0))
def test_polynomial(rate, steps, power):
    agree(
        schedules.polynomial(rate, steps, power),
        lambda optimizer: lr_scheduler.PolynomialLR(optimizer, steps, power),
        rate,
        steps + 5,
    )


@given(
    rate=RATE,
    steps=st.integers(4, 40),
    fraction=st.floats(0.3, 0.9),
    shape=st.sampled_from(["cosine", "linear"]),
    divisors=st.tuples(st.floats(2.0, 50.0), st.floats(2.0, 1e4)),
)
def test_one_cycle(rate, steps, fraction, shape, divisors):
    agree(
        schedules.one_cycle(rate, steps, fraction, *divisors, shape),
        lambda optimizer: lr_scheduler.OneCycleLR(
            optimizer,
            rate,
            total_steps=steps,
            pct_start=fraction,
            anneal_strategy={"cosine": "cos", "linear": "linear"}[shape],
            div_factor=divisors[0],
            final_div_factor=divisors[1],
            cycle_momentum=False,
        ),
        rate,
        steps,
    )


@given(rate=RATE, steps=STEPS, initial=st.floats(0.0, 0.5), factor=FACTOR)
def test_warmup(rate, steps, initial, factor):
    after = schedules.exponential(rate, factor)
    found = ours(schedules.warmup(after, steps, initial), 30)
    expected = [initial + (rate - initial) * count / steps for count in range(steps)]
    torch.testing.assert_close(found[:steps], torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(found[steps:], ours(after, 30 - steps))


ALL = {
    "constant": schedules.constant,
    "step": lambda rate: schedules.step(rate, 3, factor=rate),
    "multi_step": lambda rate: schedules.multi_step(rate, [2, 5]),
    "exponential": lambda rate: schedules.exponential(rate, rate),
    "cosine": lambda rate: schedules.cosine(rate, 5, final=rate / 2),
    "cosine_restarts": lambda rate: schedules.cosine_restarts(rate, 2, 2),
    "polynomial": lambda rate: schedules.polynomial(rate, 5, 2.0, final=rate / 2),
    "one_cycle": lambda rate: schedules.one_cycle(rate, 8),
    "warmup": lambda rate: schedules.warmup(schedules.cosine(rate, 5), 3, initial=rate / 9),
}


@pytest.mark.parametrize("name", ALL)
def test_mapped_traced_and_differentiated(name):
    make = ALL[name]
    rates = torch.tensor([0.1, 0.5], dtype=torch.float32)
    counts = torch.arange(9)
    expected = torch.stack([torch.stack([make(rate)(n) for n in counts]) for rate in rates])
    over_counts = torch.func.vmap(lambda rate, n: make(rate)(n), in_dims=(None, 0))
    torch.testing.assert_close(
        torch.func.vmap(over_counts, in_dims=(0, None))(rates, counts), expected
    )

    traced = make_fx(lambda rate, n: make(rate)(n))(rates[0], counts[0])
    for n in counts:
        torch.testing.assert_close(traced(rates[1], n), make(rates[1])(n))

    rate, n = torch.tensor(0.3, dtype=torch.float64), torch.tensor(4)
    slope = torch.func.grad(lambda rate: make(rate)(n))(rate)
    numeric = (make(rate + 1e-6)(n) - make(rate - 1e-6)(n)) / 2e-6
    torch.testing.assert_close(slope, numeric, rtol=1e-6, atol=1e-9)


@given(
    losses=st.lists(st.floats(0.0, 10.0), min_size=1, max_size=40),
    factor=FACTOR,
    patience=st.integers(0, 3),
    cooldown=st.integers(0, 3),
    threshold=st.floats(0.0, 0.2),
    min_scale=st.sampled_from([0.0, 0.3]),
)
def test_reduce_on_plateau_as_torch(losses, factor, patience, cooldown, threshold, min_scale):
    parameter = torch.zeros(1, requires_grad=True)
    scheduler = lr_scheduler.ReduceLROnPlateau(
        (optimizer := torch.optim.SGD([parameter], lr=1.0)),
        factor=factor,
        patience=patience,
        cooldown=cooldown,
        threshold=threshold,
        min_lr=min_scale,
        eps=0.0,
    )
    plateau = optim.reduce_on_plateau(factor, patience, threshold, cooldown, min_scale)
    grads = {"w": torch.ones(2, dtype=torch.float64)}
    state = plateau.init(grads)
    for loss in losses:
        scheduler.step(loss)
        updates, state = plateau.update(
            grads, state, grads, value=torch.tensor(loss, dtype=torch.float64)
        )
        assert math.isclose(float(state.scale), optimizer.param_groups[0]["lr"], rel_tol=1e-12)
        assert torch.equal(updates["w"], grads["w"] * state.scale)


def test_reduce_on_plateau_looks_at_means():
    """Each pair of values is one observation, and in between nothing changes."""
    often = optim.reduce_on_plateau(0.5, patience=0)
    paired = optim.reduce_on_plateau(0.5, patience=0, every=2)
    grads = {"w": torch.ones(2)}
    one, two = often.init(grads), paired.init(grads)
    for mean, spread in ((3.0, 1.0), (4.0, -2.0), (2.0, 9.0), (2.5, -1.0)):
        _, one = often.update(grads, one, grads, value=torch.tensor(mean))
        before = two.scale
        _, two = paired.update(grads, two, grads, value=torch.tensor(mean - spread))
        assert two.scale == before
        _, two = paired.update(grads, two, grads, value=torch.tensor(mean + spread))
        assert two.scale == one.scale
    assert one.scale == 0.25


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.step(0.1, 0), "step: every: expected at least 1, got 0"),
        (lambda: schedules.cosine(0.1, -2), "cosine: steps: expected at least 1, got -2"),
        (
            lambda: schedules.multi_step(0.1, [3, 2]),
            r"milestones: expected increasing, got \[3, 2\]",
        ),
        (lambda: schedules.one_cycle(0.1, 9, 1.5), "warmup_fraction: expected 0 to 1, got 1.5"),
        (lambda: schedules.one_cycle(0.1, 9, shape="x"), "expected 'cosine' or 'linear', got 'x'"),
        (lambda: optim.reduce_on_plateau(1.5), "factor: expected between 0 and 1, got 1.5"),
        (lambda: optim.reduce_on_plateau(patience=-1), "patience: expected at least 0, got -1"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()

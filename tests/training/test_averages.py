import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import assert_close, assert_equal, data, make, mlp, start

from funcnets import training


def run(average, values):
    state = average.init({"w": torch.tensor(99.0, dtype=torch.float64)}, {})
    found = []
    for number, value in enumerate(values):
        params = {"w": torch.tensor(value, dtype=torch.float64)}
        state = average.update(state, params, {}, torch.tensor(number + 1))
        found.append(state.params["w"].item())
    return found


VALUES = st.lists(st.floats(-10, 10), min_size=1, max_size=12)


@given(values=VALUES, decay=st.floats(0, 0.999), start=st.integers(0, 5))
def test_ema_is_the_weighted_mean_of_what_was_seen(values, decay, start):
    for i, found in enumerate(run(training.ema(decay, start), values)):
        seen = values[start : i + 1]
        if not seen:
            assert found == values[i]
            continue
        weights = [decay ** (len(seen) - 1 - j) for j in range(len(seen))]
        expected = sum(w * v for w, v in zip(weights, seen, strict=True)) / sum(weights)
        assert found == pytest.approx(expected, abs=1e-9)


@given(values=VALUES, start=st.integers(0, 5), every=st.integers(1, 3))
def test_swa_is_the_plain_mean_from_a_step_on(values, start, every):
    for i, found in enumerate(run(training.swa(start, every), values)):
        seen = values[start : i + 1 : every]
        expected = sum(seen) / len(seen) if seen else values[i]
        assert found == pytest.approx(expected, abs=1e-9)


def test_a_step_keeps_the_average_of_its_parameters():
    step = make(average=training.swa(2))
    state = start(step, mlp())
    seen = []
    for _ in range(5):
        state, _ = step(state, data())
        seen.append(state.params)
    mean = sum(seen[2:], seen[0] * 0) / 3
    assert_close(training.parameters(state, average=True), mean)


def test_a_bad_step_is_not_averaged():
    step = make(average=training.ema(0.5), nonfinite="skip")
    state, _ = step(start(step, mlp()), data())
    x, y = data()
    after, _ = step(state, (x * torch.nan, y))
    assert_equal(after.average, state.average)


def test_errors():
    for wrong in (lambda: training.ema(1.0), lambda: training.ema(0.9, start=-1)):
        with pytest.raises(ValueError, match="ema"):
            wrong()
    with pytest.raises(ValueError, match="swa: every"):
        training.swa(0, every=0)


@pytest.mark.usefixtures("unchecked")
def test_a_decay_is_no_schedule():
    with pytest.raises(TypeError, match="schedule"):
        training.ema(lambda step: step)

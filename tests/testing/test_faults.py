"""Every planted fault is found by the property meant for it; right models raise no alarm."""

from __future__ import annotations

import pytest
from faults import FAULTS, RIGHT

from funcnets import testing

COMPILING = "compiled_equals_eager"  # takes seconds


def found(planted, seed, names):
    with pytest.raises(AssertionError) as caught:
        testing.check_model(
            (planted.init, planted.apply),
            planted.inputs,
            only=names,
            seed=seed,
            **{name: value for name, value in planted.options.items() if name != "also"},
        )
    return str(caught.value)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name, pytestconfig):
    planted = FAULTS[name]
    for seed in range(20 if pytestconfig.getoption("--full") else 1):
        message = found(planted, seed, [planted.finds])
        assert f"{planted.finds}: " in message
        assert "again:    funcnets.testing.sample(" in message


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_model_raises_no_alarm(name, pytestconfig):
    model, full = RIGHT[name], pytestconfig.getoption("--full")
    for seed in range(20 if full else 1):
        report = testing.check_model(
            (model.init, model.apply),
            model.inputs,
            seed=seed,
            skip=() if full and seed == 0 else (COMPILING,),
            **model.options,
        )
        assert len(report.of("held")) >= 15

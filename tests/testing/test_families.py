"""Models of every family as the strategies draw them, and the options that a family refuses."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import pkgutil
import re

import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

from funcnets import models, random, testing, tree
from funcnets.testing import strategies as own
from funcnets.testing.families import FAMILIES, wrong_options

every_family = pytest.mark.parametrize("family", FAMILIES)
unchecked_within = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
CHEAP = ["leaves_its_arguments_as_they_were", "repeats_itself", "inference_ignores_the_key"]
CHEAP += ["uses_no_global_generator", "keeps_the_dtype"]


def finds(strategy, wanted):
    """Without making it small, which takes long."""
    once = settings(max_examples=500, database=None, phases=[Phase.generate])
    return find(strategy, wanted, settings=once)


def test_no_family_is_missing():
    names = [module.name for module in pkgutil.iter_modules(models.__path__)]
    modules = {name: importlib.import_module(f"funcnets.models.{name}") for name in names}
    assert {name for name, module in modules.items() if hasattr(module, "Config")} == set(FAMILIES)


@every_family
@settings(max_examples=3)
@given(data=st.data())
def test_a_drawn_model_is_checked_as_it_comes(family, data):
    model, inputs = data.draw(own.models(family))
    assert model.family == family
    report = testing.check_model(model, inputs, only=CHEAP, examples=1)
    assert {result.name for result in report.of("held")} >= {*CHEAP[:2], "keeps_the_dtype"}


@every_family
def test_no_false_alarm(family, pytestconfig):
    """All invariants, of drawn models over 20 seeds: minutes, so by --full alone."""
    if not pytestconfig.getoption("--full"):
        pytest.skip("--full")
    found = []

    @settings(max_examples=20, database=None, phases=[Phase.generate])
    @given(drawn=own.models(family))
    def run(drawn):
        skip = () if len(found) < 3 else ("compiled_equals_eager",)  # which takes seconds
        options = {"also": ["shares_no_memory"], "skip": skip, "seed": len(found), "examples": 2}
        checks = testing.properties(*drawn, **options)
        for check in checks.values():
            with contextlib.suppress(pytest.skip.Exception):
                check()
        found.append(drawn)

    run()
    assert len(found) >= 10


def test_what_is_not_meant_is_not_tried():
    inner = models.early_exit([models.mlp(2, 3)], [models.mlp(3, 2)], 0.5)
    report = testing.check_model(
        models.siamese(inner), testing.floats("batch 2"), only=["returns_what_is_declared"]
    )
    assert [result.reason for result in report.results] == [
        "not meant to hold: in training all exits answer"
    ]
    with pytest.raises(ValueError, match="does not apply: not meant to hold"):
        testing.returns_what_is_declared(inner, testing.floats("batch 2"))


def test_momenta_come_from_the_configurations():
    own = models.efficientnet([("mbconv", 1, 3, 1, 3, 1)], 2, in_channels=1, width=2, momentum=0.3)
    plain = models.mlp(3, 2, (4,), norm="batch")
    both = models.multimodal({"own": own, "plain": plain}, {"out": 1})
    inputs = {"own": testing.floats("batch 1 5 5"), "plain": testing.floats("batch 3")}
    testing.buffers_follow_their_rule(both, inputs)
    with pytest.raises(AssertionError, match=r"encoders\.plain.*what is left of a change"):
        testing.buffers_follow_their_rule(both, inputs, momentum=0.3)


@every_family
@given(data=st.data())
def test_a_drawn_model_is_small_and_trains(family, data):
    model, inputs = data.draw(own.models(family))
    for x in tree.leaves(inputs):  # all but the batch have their sizes
        named = {axis for axis in x.axes if isinstance(axis, str)}
        assert named - {name for name, _ in x.given} == {"batch"}
    params, batch = model.init(random.key(0)), data.draw(own.batches(inputs))
    assert sum(leaf.numel() for leaf in tree.leaves(params)) < 20_000
    outputs, _ = model.apply(params, *batch, train=True, key=random.key(1))
    found = [y for y in tree.leaves(outputs) if y.is_floating_point()]
    assert found
    assert all(y.isfinite().all() for y in found)


@given(data=st.data())
def test_without_draws_training_needs_no_key(data):
    model, inputs = data.draw(own.models(draws=False))
    params, batch = model.init(random.key(0)), data.draw(own.batches(inputs))
    model.apply(params, *batch, train=True)


@pytest.mark.parametrize("family", ["mlp", "vit", "seq2seq", "gated", "early_exit", "multimodal"])
def test_draws_are_reached(family):
    """A model that asks for a key in training."""

    def asks(drawn):
        model, inputs = drawn
        params, batch = model.init(random.key(0)), testing.sample(model, inputs).inputs
        params = tree.cast(params, torch.float64)
        try:
            model.apply(params, *batch, train=True)
        except ValueError as error:
            return "key: expected a key" in str(error)
        return False

    finds(own.models(family), asks)


def test_any_family_is_drawn():
    for family in ("mlp", "alexnet", "multimodal"):
        finds(own.models(), lambda drawn, f=family: drawn[0].family == f)


@every_family
@unchecked_within
@given(data=st.data())
def test_wrong_options_are_refused_by_name(family, data, unchecked):
    options, name = data.draw(own.invalid_options(family))
    with pytest.raises((ValueError, TypeError), match=rf"\b{re.escape(name)}\b"):
        getattr(models, family)(**options)


@every_family
@unchecked_within
@given(data=st.data())
def test_all_wrong_options_of_a_model(family, data, unchecked):
    """Every option but the switches has wrong values; each differs from the right options."""
    model, _ = data.draw(own.models(family))
    right, changed = vars(model.config), set()
    for options, name in wrong_options(model):
        differing = {each for each in right if options[each] is not right[each]}
        assert differing, name
        changed |= differing
        with pytest.raises((ValueError, TypeError), match=rf"\b{re.escape(name)}\b"):
            getattr(models, family)(**options)
    switches = {field.name for field in dataclasses.fields(model.config) if "bool" in field.type}
    assert changed | switches == set(right)


@pytest.mark.parametrize("strategy", [own.models, own.invalid_options])
def test_unknown_families(strategy):
    with pytest.raises(ValueError, match=r"family: expected one of mlp, .*, got 'resnet18'"):
        strategy("resnet18")

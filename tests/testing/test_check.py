"""Checking a model: how it is given, what is reported, and what is said of wrong use."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from faults import FAULTS, RIGHT, two_layers
from torch import nn

from funcnets import layers, models, random, testing, tree

QUICK = ["repeats_itself", "samples_are_independent", "gradients_match_finite_differences"]
MODEL = models.mlp(3, 2, (4,))
X = testing.floats("batch 3")


def module():
    with torch.random.fork_rng():
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).eval()


@pytest.mark.parametrize(
    ("model", "inputs", "options"),
    [
        (MODEL, X, {}),
        ((MODEL.init, MODEL.apply), X, {}),
        (MODEL.apply, X, {"params": MODEL.init(random.key(0))}),
        (MODEL.apply, X, {"params": MODEL.init}),
        (module(), X, {}),
        (MODEL, random.normal(random.key(0), (5, 3)), {}),
        (MODEL, (X,), {"axes": {"batch": 3}}),
    ],
)
def test_ways_to_give_a_model(model, inputs, options):
    report = testing.check_model(model, inputs, only=QUICK, **options)
    assert [result.name for result in report.of("held")] == [
        i.name for i in testing.INVARIANTS if i.name in QUICK
    ]
    assert str(report).startswith("3 held, 0 failed, 0 skipped")


def test_a_module_whole():
    training = module().train()  # it is looked at as at inference, and left as it is
    testing.check_model(training, X, examples=2, skip=["compiled_equals_eager"])
    assert training.training


def test_all_names_are_told_with_why():
    report = testing.check_model(
        (RIGHT["max_and_relu"].init, RIGHT["max_and_relu"].apply),
        X,
        examples=1,
        skip=["compiled_equals_eager", "repeats_itself"],
    )
    assert [result.name for result in report.results] == [i.name for i in testing.INVARIANTS]
    reasons = {result.name: result.reason for result in report.of("skipped")}
    assert reasons["repeats_itself"] == "asked for"
    assert reasons["shares_no_memory"] == "optional (also=)"
    assert reasons["draws_by_the_key"] == "the model takes no key"
    assert reasons["has_its_symmetries"] == "nothing is given for it (symmetries=)"


def test_a_report_of_failures_names_them_all_and_shows_the_smallest_case():
    def wrong(params, x, size):
        y = two_layers(params, x)
        return y.detach() if size.shape[0] > 2 else y.softmax(0)

    with pytest.raises(AssertionError) as caught:
        testing.check_model(
            (FAULTS["softmax_over_the_batch"].init, wrong),
            (X, testing.integers("size", 9)),
            only=["gradients_match_finite_differences", "samples_are_independent"],
        )
    message = str(caught.value)
    assert message.startswith("0 held, 2 failed, 0 skipped")
    assert "batch=2, size=1)" in message  # the smallest of what fails for every size
    assert "batch=2, size=3)" in message  # the smallest of what fails from a size of 3 on


def test_a_case_is_drawn_again():
    first, again, other = (testing.sample(MODEL, X, seed=seed, batch=3) for seed in (4, 4, 5))
    assert first.inputs[0].shape == (3, 3)
    tree.map(torch.testing.assert_close, first.params, again.params)
    assert torch.equal(first.inputs[0], again.inputs[0])
    assert not torch.equal(first.inputs[0], other.inputs[0])
    assert not torch.equal(first.params["0", "bias"], other.params["0", "bias"])
    assert str(first) == "seed=4, values='normal', batch=3"


@pytest.mark.parametrize(
    ("values", "expected"), [("zeros", 0.0), ("equal", 1.0)], ids=["zeros", "equal"]
)
def test_kinds_of_values(values, expected):
    drawn = testing.sample(MODEL, X, values=values).inputs[0]
    assert torch.equal(drawn, torch.full_like(drawn, expected))


def test_declared_values():
    axes = {"batch": 50, "time": 4}
    inputs = {
        "bounded": testing.floats("batch time", -2.0, 3.0),
        "tokens": testing.integers("batch time", 6, low=2),
        "mask": testing.booleans("batch time"),
        "ends": testing.lengths("batch", of="time"),
    }
    subject = (lambda key: {"w": random.normal(key)}, lambda p, x: p["w"] * x["bounded"])
    (drawn,) = testing.sample(subject, inputs, axes=axes).inputs
    assert -2 <= drawn["bounded"].min() < drawn["bounded"].max() <= 3
    assert set(drawn["tokens"].flatten().tolist()) == {2, 3, 4, 5}
    assert drawn["mask"].any()
    assert not drawn["mask"].all()
    assert set(drawn["ends"].tolist()) == {1, 2, 3, 4}


def test_a_size_with_a_name_may_be_another():
    def init(key):
        return {"w": random.normal(key, (3,))}

    def apply(params, x):
        if x.shape[1] != 3:
            raise ValueError(f"x: expected 3 channels, got {list(x.shape)}")
        return x.sum(2) * params["w"]

    named = testing.floats("batch 3 height=4")
    assert testing.sample((init, apply), named).inputs[0].shape == (2, 3, 4)
    options = {"only": ["tells_a_wrong_input"], "checks_shapes": True}
    testing.check_model((init, apply), named, **options)
    with pytest.raises(AssertionError, match="axis 2 of input 0"):
        testing.check_model((init, apply), testing.floats("batch 3 4"), **options)


def test_an_invariant_alone():
    testing.repeats_itself(MODEL, X)
    wrong = FAULTS["softmax_over_the_batch"]
    with pytest.raises(AssertionError, match="sample 0 alone"):
        testing.samples_are_independent((wrong.init, wrong.apply), X)
    with pytest.raises(ValueError, match=r"nothing is given for it \(symmetries=\)"):
        testing.has_its_symmetries(MODEL, X)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: testing.check_model(MODEL, X, only=["purity"]), ValueError, "got 'purity'"),
        (lambda: testing.check_model(MODEL, X, axes={"time": 3}), ValueError, "got 'time'"),
        (lambda: testing.check_model(MODEL, 3.0), TypeError, "inputs: expected a tensor"),
        (lambda: testing.check_model("mlp", X), TypeError, "expected a funcnets.Model, a pair"),
        (
            lambda: testing.check_model(MODEL, testing.floats("batch 4")),
            ValueError,
            r"does not run on the declared inputs \(.*expected \[\.\.\., 3\], got \[2, 4\]",
        ),
        (
            lambda: testing.check_model((lambda key: 1 / 0, MODEL.apply), X),
            ValueError,
            r"does not run on the declared inputs \(init\): ZeroDivisionError",
        ),
        (lambda: testing.sample(MODEL, X, time=3), ValueError, "expected batch, got time"),
        (lambda: testing.floats("batch, 3"), ValueError, "expected names and sizes"),
        (lambda: testing.floats("batch 3=4"), ValueError, "expected names and sizes"),
        (lambda: testing.floats("batch", 1.0), ValueError, "both bounds or none"),
        (lambda: testing.integers("batch", 0), ValueError, "expected more than 0"),
        (
            lambda: testing.check_model(MODEL, X, symmetries={"o": testing.permutation("batch")}),
            AssertionError,
            r"expected a declaration of the outputs \(outputs=\)",
        ),
        (
            lambda: testing.model_properties(MODEL, X)(lambda: None),
            TypeError,
            "expected an argument named check",
        ),
    ],
)
def test_wrong_use(call, error, message):
    with pytest.raises(error, match=message):
        call()


@testing.model_properties(MODEL, X, only=QUICK)
def test_one_test_for_each_invariant(check):
    check()


def test_a_failing_invariant_is_one_failed_test(pytester):
    pytester.makepyfile(
        """
        from funcnets import layers, testing

        def softmax(params, x):
            return layers.linear(params, x).softmax(0)

        def init(key):
            return layers.init_linear(key, 3, 2)

        only = ["repeats_itself", "samples_are_independent", "draws_by_the_key"]

        @testing.model_properties((init, softmax), testing.floats("batch 3"), only=only)
        def test_softmax(check):
            check()
        """
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-v")
    result.assert_outcomes(passed=1, failed=1, skipped=1)
    result.stdout.fnmatch_lines(["*test_softmax?samples_are_independent? FAILED*"])


def test_without_hypothesis():
    code = (
        "import sys; sys.modules['hypothesis'] = None\n"
        "import funcnets\n"
        "try:\n    import funcnets.testing\n"
        "except ImportError as error:\n    print(error)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "python -m pip install hypothesis" in told.stdout


def test_symmetries_beyond_those_of_the_faults():
    def init(key):
        return layers.init_conv(key, 1, 2, 3)

    def circular(params, x):
        return layers.conv(params, torch.nn.functional.pad(x, (1, 1, 1, 1), mode="circular"))

    image = testing.floats("batch 1 height width")
    options = {
        "outputs": testing.floats("batch 2 height width"),
        "axes": {"height": (3, 5), "width": (3, 5)},
        "only": ["has_its_symmetries"],
    }
    shifted = {"shift": testing.translation("height", "width")}
    testing.check_model((init, circular), image, symmetries=shifted, **options)
    padded = (init, lambda params, x: layers.conv(params, x, padding=1))
    with pytest.raises(AssertionError, match="shift"):
        testing.check_model(padded, image, symmetries=shifted, **options)

    def isotropic(params, x):
        weight = params["weight"]
        turned = sum(weight.rot90(i, (2, 3)) for i in range(4))
        return torch.nn.functional.conv2d(x, turned, padding=1)

    turns = {"turn": testing.rotation("height", "width")}
    options["axes"] = {"height": 4, "width": 4}
    testing.check_model((init, isotropic), image, symmetries=turns, **options)
    with pytest.raises(AssertionError, match="turn"):
        testing.check_model((init, circular), image, symmetries=turns, **options)

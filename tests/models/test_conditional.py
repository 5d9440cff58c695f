"""What is the conditional networks' own: which path runs, what it costs, gates that learn."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_cases import NoArithmetic
from tensordict import TensorDict
from torch.func import grad, vmap

from funcnets import Model, compile, models, random, tree

KEY = random.key(9)
X = random.normal(KEY, (6, 3), dtype=torch.float64)


class Counting:
    """A model that notes the batch sizes it is run on."""

    def __init__(self, model):
        self.sizes = []

        def apply(params, x, **options):
            self.sizes.append(len(x))
            return model.apply(params, x, **options)

        self.model = Model(init=model.init, apply=apply, config=model.config)


def drawn(model, key=KEY):
    return tree.map(
        lambda leaf: leaf + 0.3 * random.normal(key, leaf.shape, dtype=leaf.dtype),
        tree.cast(model.init(key), torch.float64),
    )


def parts(**options):
    return (
        models.mlp(3, 4, (5,), **options),
        models.mlp(4, 2, ()),
        models.mlp(4, 2, (8, 8), **options),
    )


flags = st.lists(st.booleans(), min_size=6, max_size=6).map(torch.tensor)


@given(flags)
def test_each_sample_goes_the_way_of_its_flag_and_pays_for_no_other(flag):
    base, shallow, deep = parts()
    counted = Counting(shallow), Counting(deep)
    model = models.gated(base, *(one.model for one in counted))
    params = drawn(model)
    outputs = model.apply(params, X, flag)
    h = base.apply(params["base"], X)
    both = shallow.apply(params["shallow"], h), deep.apply(params["deep"], h)
    torch.testing.assert_close(outputs, torch.where(flag[:, None], both[1], both[0]))
    count = int(flag.sum())
    assert counted[0].sizes == ([6 - count] if count < 6 else [])
    assert counted[1].sizes == ([count] if count else [])


@pytest.mark.parametrize("way", [True, False])
@pytest.mark.parametrize("wrap", [bool, torch.tensor], ids=["bool", "tensor"])
def test_one_flag_for_the_batch(way, wrap):
    base, shallow, deep = parts()
    model = models.gated(base, shallow, deep)
    params = drawn(model)
    h = base.apply(params["base"], X)
    path = deep.apply(params["deep"], h) if way else shallow.apply(params["shallow"], h)
    torch.testing.assert_close(model.apply(params, X, wrap(way)), path)
    compiled = compile(model.apply, backend="eager")
    torch.testing.assert_close(compiled(params, X, wrap(way)), path)
    outputs, buffers = model.apply(params, X, wrap(way), train=True)
    torch.testing.assert_close(outputs, path)
    assert buffers.is_empty()


@pytest.mark.parametrize("way", [True, False, torch.tensor(True), torch.tensor(False)])
def test_training_down_one_path_leaves_the_buffers_of_the_other(way):
    base, _, deep = parts(norm="batch")
    model = models.gated(base, models.mlp(4, 2, (3,), norm="batch"), deep)
    params = model.init(KEY)
    x = X.float()
    for apply in (model.apply, compile(model.apply, backend="eager")):
        buffers = apply(params, x, way, train=True)[1]
        old = tree.partition(params)[1]
        assert not tree.compare(buffers, old)
        for name in ("base", "shallow", "deep"):
            same = all(
                torch.equal(a, b)
                for a, b in zip(tree.leaves(buffers[name]), tree.leaves(old[name]), strict=True)
            )
            assert same == (name == ("shallow" if way else "deep"))


def test_flags_per_member_of_an_ensemble():
    model = models.gated(*parts())
    keys = random.split(KEY, 3)
    params = tree.stack([drawn(model, key) for key in keys.unbind()])
    ways = torch.tensor([True, False, True])

    def loss(params, way):
        return model.apply(params, X, way).square().sum()

    found = vmap(grad(loss))(params, ways)
    expected = torch.stack([grad(loss)(params[i], way) for i, way in enumerate(ways)])
    tree.map(torch.testing.assert_close, found, expected)


def test_the_gate_learns_to_take_the_path_that_is_right():
    """The deep path is right where the first input is positive, the shallow one elsewhere."""
    model = models.gated(
        models.mlp(3, 3, ()), models.mlp(3, 1, ()), models.mlp(3, 1, ()), gate="straight_through"
    )
    params = tree.cast(model.init(KEY), torch.float64)
    identity = {"weight": torch.eye(3, dtype=torch.float64), "bias": X.new_zeros(3)}
    constant = {"weight": X.new_zeros(1, 3), "bias": X.new_zeros(1)}
    one = constant | {"bias": X.new_ones(1)}
    fixed = TensorDict({"base": {"0": identity}, "shallow": {"0": constant}, "deep": {"0": one}})
    gate = params["gate"]
    x = random.normal(KEY, (200, 3), dtype=torch.float64)
    target = (x[:, 0] > 0).double()[:, None]

    def loss(gate):
        outputs, _ = model.apply(TensorDict({**dict(fixed.items()), "gate": gate}), x, train=True)
        return (outputs["outputs"] - target).square().mean()

    for _ in range(200):
        gate = tree.map(lambda p, g: p - g, gate, grad(loss)(gate))
    assert loss(gate) < 0.05


def test_gumbel_gates_take_each_path_as_often_as_its_probability_says():
    model = models.gated(
        models.mlp(3, 3, ()), models.mlp(3, 1, ()), models.mlp(3, 1, ()), gate="gumbel"
    )
    params = tree.map(torch.zeros_like, model.init(KEY))
    params["deep", "0", "bias"] += 1
    params["gate", "bias"] += 0.8
    x = torch.zeros(4000, 3)
    outputs, _ = model.apply(params, x, train=True, key=KEY)
    chance = torch.sigmoid(torch.tensor(0.8))
    torch.testing.assert_close(outputs["gate"], chance.expand(4000))
    taken = outputs["outputs"].mean()
    assert abs(taken - chance) < 5 * (chance * (1 - chance) / 4000) ** 0.5
    assert model.apply(params, x)["outputs"].eq(1).all()  # at inference the likelier

    def slope(temperature):
        again = models.gated(
            models.mlp(3, 3, ()),
            models.mlp(3, 1, ()),
            models.mlp(3, 1, ()),
            gate="gumbel",
            temperature=temperature,
        )

        def deep(bias):
            gate = {**dict(params["gate"].items()), "bias": bias}
            moved = TensorDict({**dict(params.items()), "gate": gate})
            return again.apply(moved, x, train=True, key=KEY)[0]["outputs"].mean()

        return grad(deep)(params["gate", "bias"])

    # The mean of s (1 - s) / T, for s the logistic function of (0.8 + logistic noise) / T.
    noise = torch.linspace(0, 1, 100_001, dtype=torch.float64)[1:-1].logit()
    for temperature in (0.5, 1.0, 4.0):
        soft = torch.sigmoid((0.8 + noise) / temperature)
        expected = (soft * (1 - soft) / temperature).mean()
        torch.testing.assert_close(slope(temperature).double()[0], expected, rtol=0.05, atol=0)


@given(st.floats(0, 1))
def test_samples_leave_at_the_first_exit_that_is_sure(threshold):
    stages = [models.mlp(3, 4, (5,)), models.mlp(4, 4, (5,)), models.mlp(4, 4, (5,))]
    counted = [Counting(stage) for stage in stages]
    heads = [models.mlp(4, 3, ())] * 3
    model = models.early_exit([one.model for one in counted], heads, 0.5)
    params = drawn(model)
    every, _ = model.apply(params, X, train=True)
    sure = every.softmax(-1).amax(-1) >= threshold
    sure[-1] = True
    first = sure.int().argmax(0)
    for one in counted:
        one.sizes.clear()
    outputs = model.apply(params, X, threshold)
    assert torch.equal(outputs["exit"], first)
    torch.testing.assert_close(outputs["logits"], every[first, torch.arange(6)])
    for i, one in enumerate(counted):
        left = int((first >= i).sum())
        assert one.sizes == ([left] if left else [])
    again = model.apply(params, X, torch.tensor(threshold, dtype=torch.float64))
    assert torch.equal(again["exit"], first)


def test_the_threshold_of_the_configuration():
    stages, heads = [models.mlp(3, 4, ()), models.mlp(4, 4, ())], [models.mlp(4, 3, ())] * 2
    for threshold, place in ((0.0, 0), (1.0, 1)):
        model = models.early_exit(stages, heads, threshold)
        assert (model.apply(drawn(model), X)["exit"] == place).all()


A, B = models.mlp(3, 4, ()), models.mlp(4, 2, ())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: models.gated(A, B, "deep"), TypeError, "gated: deep: expected a Model, got str"),
        (lambda: models.gated(A, B, B, gate="soft"), ValueError, "gated: gate: expected one of"),
        (
            lambda: models.gated(A, B, B, gate="gumbel", temperature=0.0),
            ValueError,
            "gated: temperature: expected a positive number, got 0.0",
        ),
        (
            lambda: models.gated(Model(A.init, A.apply), B, B, gate="gumbel"),
            ValueError,
            "gated: base: expected a model whose config tells its out_features",
        ),
        (
            lambda: models.early_exit([A], [B, B]),
            ValueError,
            "early_exit: exits: expected one after each stage, got 2 for 1 stages",
        ),
        (lambda: models.early_exit([], []), ValueError, "early_exit: exits: expected one after"),
        (
            lambda: models.early_exit([A, A], [B, models.mlp(4, 9, ())]),
            ValueError,
            "early_exit: exits[1]: expected 2 (as exits[0]), got 9",
        ),
        (
            lambda: models.gated(A, B, models.mlp(4, 9, ())),
            ValueError,
            "gated: deep: expected 2 (as shallow), got 9",
        ),
        (
            lambda: models.early_exit([A], ["exit"]),
            TypeError,
            "early_exit: exits[0]: expected a Model, got str",
        ),
        (
            lambda: models.early_exit([A], [B], 1.5),
            ValueError,
            "early_exit: threshold: expected a probability, got 1.5",
        ),
    ],
)
def test_configurations_that_make_no_sense(make, error, message, unchecked):
    with pytest.raises(error, match=re.escape(message)):
        make()


def test_what_is_not_a_number_is_not_sure():
    model = models.early_exit([models.mlp(3, 3, ())] * 2, [models.mlp(3, 2, ())] * 2, 0.5)
    x = torch.tensor([[0.0, 0.0, 0.0], [torch.nan, 0.0, 0.0]])
    assert model.apply(model.init(KEY), x)["exit"].tolist() == [0, 1]


def test_calls_that_do_not_fit(unchecked):
    flagged, gate = models.gated(A, B, B), models.gated(A, B, B, gate="gumbel")
    exits = models.early_exit([A], [B])
    x, tensors = torch.zeros(2, 3), (torch.zeros(2), torch.zeros(2, 2, dtype=torch.bool))
    long = torch.zeros(3, dtype=torch.bool)
    params = {model: model.init(KEY) for model in (flagged, gate, exits)}
    with NoArithmetic():
        with pytest.raises(ValueError, match="gated: deep: expected a flag, as the model has no"):
            flagged.apply(params[flagged], x)
        for flag in (*tensors, 1, "yes"):
            with pytest.raises(ValueError, match="gated: deep: expected a bool, or a bool tensor"):
                flagged.apply(params[flagged], x, flag)
        for train in (False, True):
            with pytest.raises(ValueError, match=r"gated: deep: expected \[2\] .*, got \[3\]"):
                flagged.apply(params[flagged], x, long, train=train)
        with pytest.raises(ValueError, match="gated: key: expected a key"):
            gate.apply(params[gate], x, train=True)
        with pytest.raises(ValueError, match=r"early_exit: threshold: .* got 2"):
            exits.apply(params[exits], x, 2)


@pytest.mark.parametrize("train", [False, True])
def test_errors_of_later_parts_say_where(train, unchecked):
    wide = models.mlp(5, 2, ())  # takes five features, and gets four
    narrow, x = models.mlp(3, 4, ()), torch.zeros(2, 3)
    gated = models.gated(narrow, models.mlp(4, 2, ()), wide)
    params = gated.init(KEY)
    message = r"gated: deep: mlp: x: expected \[\.\.\., 5\], got \[[12], 4\]"  # of some, routed
    for deep in (True, torch.tensor(True), torch.tensor([True, False])):
        with pytest.raises(ValueError, match=message):
            gated.apply(params, x, deep, train=train)
    for stages, exits, place in (
        ([narrow, wide], [models.mlp(4, 2, ())] * 2, "stages.1"),
        ([narrow], [wide], "exits.0"),
    ):
        model = models.early_exit(stages, exits, 1.0)
        message = re.escape(f"early_exit: {place}: mlp: x: expected [..., 5], got [2, 4]")
        with pytest.raises(ValueError, match=message):
            model.apply(model.init(KEY), x, train=train)


def test_there_are_no_taps_where_samples_part_ways():
    model = models.early_exit([A], [B])
    with pytest.raises(ValueError, match=r"early_exit: taps: expected none here; got stages\.0"):
        model.apply(model.init(KEY), torch.zeros(2, 3), taps=["stages.0"])

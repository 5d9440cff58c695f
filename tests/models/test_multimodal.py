"""What is the network's of several inputs and outputs: names, fusions, sharing, absent inputs."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_cases import NoArithmetic
from tensordict import TensorDict
from torch.func import grad, vmap

from funcnets import Model, compile, layers, load, models, random, save, tree
from funcnets.models import multimodal
from funcnets.models.multimodal import Config

KEY = random.key(5)
FUSED = {"concat": 12, "sum": 4, "gated": 4, "attention": 4}  # the sizes of the example's fusions
FUSIONS = tuple(FUSED)
every_fusion = pytest.mark.parametrize("fusion", FUSIONS)


def close(actual, expected):
    tree.map(lambda a, b: torch.testing.assert_close(a, b), actual, expected)


def example(fusion="concat", names=("image", "table", "kind"), heads=None, **options):
    """A network of up to three kinds of input, and four samples, in float64."""
    encoders = {
        "image": models.cnn(1, 4, widths=(2,), norm=None),
        "table": models.mlp(3, 4, widths=(5,)),
        "kind": models.embedding(6, 4),
    }
    model = multimodal(
        {name: encoders[name] for name in names},
        heads or {"class": 3, "value": 1},
        fusion=fusion,
        activation="tanh",
        attention_heads=2,
        **options,
    )
    inputs = {
        "image": random.normal(KEY, (4, 1, 4, 4), dtype=torch.float64),
        "table": random.normal(KEY, (4, 3), dtype=torch.float64),
        "kind": torch.tensor([0, 5, 3, 3]),
    }
    params = tree.cast(model.init(KEY), torch.float64)
    return model, params, {name: inputs[name] for name in names}


def without(params, name):
    """The parameters of the same network without one input (for fusions whose size is the same)."""
    changed = params.clone()
    del changed["encoders", name]
    return changed


@every_fusion
@given(order=st.permutations(["image", "table", "kind"]))
def test_the_order_of_the_inputs_is_of_no_account(fusion, order):
    model, params, inputs = example(fusion)
    expected = model.apply(params, inputs)
    shuffled = {name: inputs[name] for name in order}
    close(model.apply(params, shuffled), expected)
    close(model.apply(params, TensorDict(shuffled)), expected)
    if fusion in ("sum", "attention"):  # nor is that of the encoders
        other, _, _ = example(fusion, names=order)
        close(other.apply(params, inputs), expected)


def test_the_order_of_the_heads_is_of_no_account():
    model, params, inputs = example()
    other, _, _ = example(heads={"value": 1, "class": 3})
    outputs, again = model.apply(params, inputs), other.apply(params, inputs)
    assert (list(outputs), list(again)) == (["class", "value"], ["value", "class"])
    close(again, outputs)


@every_fusion
def test_a_head_has_no_gradient_from_another(fusion):
    model, params, inputs = example(
        fusion, heads={"class": 3, "value": models.mlp(FUSED[fusion], 1)}
    )
    gradient = grad(lambda p: model.apply(p, inputs)["class"].square().sum())(params)
    for name, leaf in tree.to_state_dict(gradient).items():
        touched = not name.startswith("heads.value.") and not name.startswith("fusion.key.bias")
        if name == "encoders.kind.weight":  # rows that were not looked up
            leaf = leaf[[0, 3, 5]]
        assert bool((leaf.abs() > 1e-12).any()) == touched, name


@given(
    kind=st.sampled_from(["mlp", "cnn", "embedding"]),
    uses=st.integers(2, 4),
    fusion=st.sampled_from(FUSIONS),
    seed=st.integers(0, 999),
)
def test_the_gradient_of_a_shared_encoder_is_the_sum_over_its_uses(kind, uses, fusion, seed):
    encoder, shape = {
        "mlp": (models.mlp(3, 4, widths=(5,)), (2, 3)),
        "cnn": (models.cnn(1, 4, widths=(2,), norm="group", groups=2), (2, 1, 3, 3)),
        "embedding": (models.embedding(6, 4), (2,)),
    }[kind]
    names = [f"x{i}" for i in range(uses)]
    key = random.key(seed)
    inputs = {
        name: random.randint(k, shape, 0, 6) if kind == "embedding" else random.normal(k, shape)
        for name, k in zip(names, random.split(key, uses).unbind(), strict=True)
    }
    shared = multimodal({"x0": encoder} | dict.fromkeys(names[1:], "x0"), {"y": 2}, fusion=fusion)
    apart = multimodal(dict.fromkeys(names, encoder), {"y": 2}, fusion=fusion)
    params = shared.init(key)
    assert list(params["encoders"].keys()) == ["x0"]
    copies = params.clone()
    copies["encoders"] = TensorDict({name: params["encoders", "x0"].clone() for name in names})

    def loss(params, model):
        return model.apply(params, inputs)["y"].square().sum()

    torch.testing.assert_close(loss(params, shared), loss(copies, apart))
    gradient, of_copies = grad(loss)(params, shared), grad(loss)(copies, apart)
    uses_of = [of_copies["encoders", name] for name in names]
    expected = tree.map(lambda *leaves: sum(leaves), *uses_of)
    close(gradient["encoders", "x0"], expected)
    close(gradient["heads"], of_copies["heads"])


def test_a_shared_encoder_updates_its_statistics_once_for_each_use():
    model = multimodal(
        {"left": models.cnn(1, 2, widths=(2,)), "right": "left"}, {"same": 1}, fusion="sum"
    )
    params = model.init(KEY)
    inputs = {
        name: random.normal(random.key(i), (5, 1, 4, 4))
        for i, name in enumerate(model.config.inputs)
    }
    encoder = model.config.encoder("right")
    _, buffers = model.apply(params, inputs, train=True)
    trainable, _ = tree.partition(params["encoders", "left"])
    _, once = encoder.apply(params["encoders", "left"], inputs["left"], train=True)
    _, twice = encoder.apply(tree.merge(trainable, once), inputs["right"], train=True)
    assert list(buffers.keys()) == ["encoders"]
    assert list(buffers["encoders"].keys()) == ["left"]
    close(buffers["encoders", "left"], twice)
    # They are what a next step takes.
    model.apply(tree.merge(tree.partition(params)[0], buffers), inputs, train=True)


def test_every_part_draws_with_a_key_of_its_own():
    noisy = models.mlp(50, 50, widths=(50,), activation="identity", dropout=0.5)
    model = multimodal(
        {"x": noisy, "y": noisy, "again": "x"},
        {"out": models.mlp(150, 150, widths=(150,), activation="identity", dropout=0.5)},
        activation="identity",
    )
    params = model.init(KEY)

    def identity(path, leaf):
        return torch.eye(len(leaf)) if leaf.ndim == 2 else torch.zeros_like(leaf)

    params = tree.map_with_path(identity, params)
    inputs = dict.fromkeys(("x", "y", "again"), torch.ones(20, 50))
    outputs, found = model.apply(params, inputs, train=True, key=KEY, taps=["fusion", "heads.out"])[
        0
    ]
    parts = list(found["fusion"].chunk(3, -1))
    kept = [part != 0 for part in parts]
    for i in range(3):
        for j in range(i):
            assert abs((kept[i] == kept[j]).float().mean() - 0.5) < 0.1
    own = torch.cat(parts, -1) != 0
    survived = (outputs["out"] != 0)[own].float().mean()
    assert abs(survived - 0.5) < 0.1
    with pytest.raises(ValueError, match=r"multimodal: encoders.x: mlp: key: expected a key"):
        model.apply(params, inputs, train=True)


# Absent inputs.


@every_fusion
@pytest.mark.parametrize("train", [False, True])
def test_what_stands_in_the_place_of_an_absent_input_counts_for_nothing(fusion, train):
    model, params, inputs = example(fusion)
    there = torch.tensor([True, False, True, False])
    present = {"image": there, "kind": ~there}

    def run(params, inputs):
        outputs = model.apply(params, inputs, present, train=train)
        return outputs[0] if train else outputs

    def loss(params, inputs):
        return sum(y.square().sum() for y in run(params, inputs).values())

    garbage = dict(inputs)
    garbage["image"] = torch.where(there[:, None, None, None], inputs["image"], torch.nan)
    garbage["kind"] = torch.where(there, -7, inputs["kind"])
    close(run(params, garbage), run(params, inputs))
    close(grad(loss)(params, garbage), grad(loss)(params, inputs))
    # Each sample is as it would be alone.
    if not train:
        outputs = run(params, garbage)
        for i in range(4):
            alone = model.apply(
                params,
                {name: x[i : i + 1] for name, x in inputs.items()},
                {"image": bool(there[i]), "kind": not there[i]},
            )
            close(alone, {name: y[i : i + 1] for name, y in outputs.items()})


@every_fusion
def test_the_ways_of_saying_that_an_input_is_absent(fusion):
    model, params, inputs = example(fusion)
    fewer = {name: x for name, x in inputs.items() if name != "table"}
    expected = model.apply(params, fewer, {"table": False})
    for mask in (torch.zeros(4, dtype=torch.bool), torch.tensor(False)):
        close(model.apply(params, inputs, {"table": mask}), expected)
    close(model.apply(params, inputs, {"table": False}), expected)
    full = model.apply(params, inputs)
    assert not torch.allclose(full["class"], expected["class"])
    for mask in (torch.ones(4, dtype=torch.bool), torch.tensor(True), True):
        close(model.apply(params, inputs, {"table": mask, "kind": True}), full)
    close(model.apply(params, inputs, {}), full)


@pytest.mark.parametrize("fusion", ["sum", "attention"])
def test_without_an_input_it_is_the_network_that_never_had_it(fusion):
    model, params, _ = example(fusion)
    smaller, _, fewer = example(fusion, names=("image", "kind"))
    close(
        model.apply(params, fewer, {"table": False}),
        smaller.apply(without(params, "table"), fewer),
    )


@every_fusion
def test_nothing_present_gives_numbers_and_no_gradient_to_the_encoders(fusion):
    model, params, inputs = example(fusion)
    present = {name: torch.zeros(4, dtype=torch.bool) for name in inputs}
    gradient = grad(lambda p: model.apply(p, inputs, present)["class"].square().sum())(params)
    outputs = model.apply(params, inputs, present)
    assert outputs["class"].isfinite().all()
    for name, leaf in tree.to_state_dict(gradient).items():
        assert leaf.isfinite().all()
        assert not name.startswith("encoders") or not leaf.any()


def test_the_statistics_of_an_encoder_that_is_not_run_stay():
    model = multimodal(
        {"x": models.mlp(3, 2, norm="batch"), "y": models.mlp(2, 2, norm="batch")}, {"out": 1}
    )
    params = model.init(KEY)
    x = random.normal(KEY, (4, 3))
    _, buffers = model.apply(params, {"x": x}, {"y": False}, train=True)
    _, kept = tree.partition(params)
    assert tree.compare(buffers, kept).lines == ()
    close(buffers["encoders", "y"], kept["encoders", "y"])
    assert not torch.equal(
        buffers["encoders", "x", "1", "running_mean"], kept["encoders", "x", "1", "running_mean"]
    )


@every_fusion
def test_masks_under_vmap_and_compiled(fusion):
    model, params, inputs = example(fusion)
    masks = torch.tensor([[True, False, True, True], [False, False, True, False]])

    def run(mask):
        return model.apply(params, inputs, {"kind": mask})

    outputs = vmap(run)(masks)
    for i in range(2):
        close(tree.map(lambda y, i=i: y[i], outputs), run(masks[i]))
    compiled = compile(run, backend="aot_eager")
    close(compiled(masks[0]), run(masks[0]))
    close(compiled(masks[1]), run(masks[1]))


@pytest.mark.dynamo
@every_fusion
def test_masks_under_plain_torch_compile(fusion):
    model, params, inputs = example(fusion)
    mask = torch.tensor([True, False, True, True])
    compiled = torch.compile(model.apply, fullgraph=True, backend="aot_eager")
    for present in ({"kind": mask}, {"table": False}):
        close(compiled(params, inputs, present), model.apply(params, inputs, present))


# Taps, files, models of one's own.


def test_taps():
    model, params, inputs = example("gated")
    places = [
        "encoders.table",
        "encoders.image",
        "fusion.gates",
        "fusion",
        "heads.class",
    ]
    outputs, found = model.apply(params, inputs, taps=places)
    assert list(found) == [
        "encoders.image",
        "encoders.table",
        "fusion.gates",
        "fusion",
        "heads.class",
    ]
    table = models.mlp(3, 4, widths=(5,)).apply(params["encoders", "table"], inputs["table"])
    torch.testing.assert_close(found["encoders.table"], table)
    assert found["fusion.gates"].shape == (3, 4, 4)
    assert found["fusion.gates"].min() > 0
    assert found["fusion.gates"].max() < 1
    torch.testing.assert_close(found["heads.class"], outputs["class"])
    replaced, _ = model.apply(params, inputs, taps={"fusion": torch.zeros_like})
    bias = params["heads", "class", "bias"]
    torch.testing.assert_close(replaced["class"], bias.expand(4, 3))
    with pytest.raises(ValueError, match=r"multimodal: taps: expected names among .* got fusion.x"):
        model.apply(params, inputs, taps=["fusion.x"])


def test_the_tapped_weights_of_attention():
    model, params, inputs = example("attention")
    mask = torch.tensor([True, False, True, False])
    _, found = model.apply(params, inputs, {"table": mask}, taps=["fusion.weights"])
    weights = found["fusion.weights"]  # [samples, heads, parts]
    assert weights.shape == (4, 2, 3)
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, 2, dtype=torch.float64))
    assert (weights[:, :, 1] > 0).all(-1).tolist() == mask.tolist()
    assert (weights[~mask][:, :, 1] == 0).all()
    nothing = dict.fromkeys(inputs, torch.zeros(4, dtype=torch.bool))
    outputs, found = model.apply(params, inputs, nothing, taps=["fusion.weights"])
    assert not found["fusion.weights"].any()
    fused = params["fusion", "out", "bias"].tanh()
    head = layers.linear(params["heads", "class"], fused)
    torch.testing.assert_close(outputs["class"], head.expand(4, 3))


def test_the_taps_of_a_submodel_lie_below_its_name():
    encoder = models.resnet("basic", (1,), 4, in_channels=1, width=4, stem="small")
    model = multimodal({"image": encoder, "other": "image"}, {"out": 2})
    params = model.init(KEY)
    inputs = {"image": torch.ones(2, 1, 4, 4), "other": torch.zeros(2, 1, 4, 4)}
    _, found = model.apply(params, inputs, taps=["encoders.other.layer1", "encoders.image.avgpool"])
    _, expected = encoder.apply(params["encoders", "image"], inputs["other"], taps=["layer1"])
    torch.testing.assert_close(found["encoders.other.layer1"], expected["layer1"])
    assert found["encoders.image.avgpool"].shape == (2, 4)


@dataclass(frozen=True)
class Sizes:
    out_features: int


def scaled(train=False):
    """A model of one's own, with one parameter."""

    def apply(params, x, train=False, key=None):
        return layers.finish(params["scale"] * x, {}, train)

    init = lambda key: TensorDict({"scale": random.normal(key)})  # noqa: E731
    return Model(init, apply, config=Sizes(3))


def test_an_encoder_of_ones_own(tmp_path):
    model = multimodal({"x": scaled(), "kind": models.embedding(4, 3)}, {"y": 2}, fusion="sum")
    params = model.init(KEY)
    inputs = {"x": torch.ones(2, 3), "kind": torch.tensor([1, 2])}
    outputs, buffers = model.apply(params, inputs, train=True)
    assert buffers.is_empty()
    fused = params["encoders", "x", "scale"] + params["encoders", "kind", "weight"][1:3]
    torch.testing.assert_close(outputs["y"], layers.linear(params["heads", "y"], fused.relu()))
    save(tmp_path / "own", params)
    close(load(tmp_path / "own", model)[1], params)
    with pytest.raises(TypeError, match=r"expected models of .*, got one of your own"):
        save(tmp_path / "own", params, model)
    untold = Model(model.init, model.apply)
    with pytest.raises(
        ValueError, match=r"encoders.x: expected a model whose config tells its out_features"
    ):
        multimodal({"x": untold}, {"y": 2})


def test_one_network_within_another(tmp_path):
    """A head is any model, and so is what is saved."""
    model = multimodal(
        {"x": models.mlp(3, 4), "y": "x"},
        {"value": 1, "deep": models.mlp(8, 2, widths=(5,), norm="batch")},
    )
    params = model.init(KEY)
    save(tmp_path / "file", params, model)
    again, loaded = load(tmp_path / "file")
    assert again == model
    assert again.config.encoders[1] == ("y", "x")
    inputs = {"x": torch.ones(2, 3), "y": torch.zeros(2, 3)}
    close(again.apply(loaded, inputs), model.apply(params, inputs))


def test_any_shape_of_batch():
    model = multimodal(
        {"x": models.mlp(3, 4), "kind": models.embedding(5, 4)}, {"y": 2}, fusion="attention"
    )
    params = model.init(KEY)
    x, kind = random.normal(KEY, (2, 5, 3)), random.randint(KEY, (2, 5), 0, 5)
    outputs = model.apply(params, {"x": x, "kind": kind})["y"]
    assert outputs.shape == (2, 5, 2)
    torch.testing.assert_close(
        vmap(vmap(lambda x, kind: model.apply(params, {"x": x, "kind": kind})["y"]))(x, kind),
        outputs,
    )
    mask = torch.tensor([True, False])
    masked = model.apply(params, {"x": x, "kind": kind}, {"kind": mask})["y"]
    torch.testing.assert_close(masked[0], outputs[0])
    alone = model.apply(params, {"x": x[1]}, {"kind": False})["y"]
    torch.testing.assert_close(masked[1], alone)


def test_each_option_arrives_in_its_field():
    encoders = (("x", models.mlp(3, 4)), ("y", "x"))
    heads = (("out", 2),)
    options = {"fusion": "attention", "attention_heads": 2, "activation": "tanh"}
    config = Config(encoders=encoders, heads=heads, **options)
    assert multimodal(dict(encoders), dict(heads), **options).config == config
    assert multimodal(encoders, heads, **options).config == config
    assert multimodal(encoders, heads).config == Config(encoders, heads, "concat", 1, "relu")


# Errors.


@every_fusion
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {"image": x["image"], "kind": x["kind"]}, "missing table"),
        (lambda x: {"image": x["image"]}, "missing table, kind"),
        (lambda x: x | {"tables": x["table"]}, "unknown tables"),
        (
            lambda x: {"image": x["image"], "table": x["table"], "kinds": x["kind"]},
            "missing kind, unknown kinds",
        ),
        (lambda x: {}, "missing image, table, kind"),
    ],
)
def test_inputs_of_other_names(fusion, change, message):
    model, params, inputs = example(fusion)
    changed = change(inputs)
    for train in (False, True):
        with (
            pytest.raises(
                ValueError, match=re.escape("inputs: expected image, table, kind; " + message)
            ),
            NoArithmetic(),
        ):
            model.apply(params, changed, train=train)


@pytest.mark.parametrize(
    ("present", "message"),
    [
        ({"tables": False}, "present: expected image, table, kind; unknown tables"),
        ({"tables": True}, "present: expected image, table, kind; unknown tables"),
        (
            {"table": torch.ones(3, dtype=torch.bool)},
            "present.table: expected [4] or [], got [3]",
        ),
        (
            {"kind": torch.ones(4, 1, dtype=torch.bool)},
            "present.kind: expected [4] or [], got [4, 1]",
        ),
        ({"kind": torch.ones(4)}, "present.kind: expected a bool tensor, got float32[4]"),
        ({"kind": 0.5}, "present.kind: expected a bool tensor, got float"),
        (
            dict.fromkeys(("image", "table", "kind"), False),
            "present: expected at least one input, got none",
        ),
    ],
)
def test_masks_that_do_not_fit(present, message):
    model, params, inputs = example()
    with pytest.raises(ValueError, match=re.escape("multimodal: " + message)), NoArithmetic():
        model.apply(params, inputs, present)


def test_inputs_that_are_no_dict():
    model, params, inputs = example()
    with pytest.raises(
        TypeError, match=r"inputs: expected a dict of image, table, kind, got float"
    ):
        model.apply(params, inputs["table"])
    with pytest.raises(TypeError, match=r"present: expected a dict of masks, got int64\[4\]"):
        model.apply(params, inputs, inputs["kind"])
    for nothing in (None, [inputs]):
        with pytest.raises(TypeError, match=r"multimodal: inputs: expected a dict of image, table"):
            model.apply(params, nothing)
    with pytest.raises(TypeError, match=r"multimodal: present: expected a dict of masks, got list"):
        model.apply(params, inputs, ["kind"])


def test_inputs_that_do_not_fit_say_where(unchecked):
    model, params, inputs = example()
    wrong = inputs | {"table": torch.ones(4, 2, dtype=torch.float64)}
    message = r"multimodal: encoders.table: mlp: x: expected \[..., 3\], got \[4, 2\]"
    with pytest.raises(ValueError, match=message), NoArithmetic():  # nor that of the image, before
        model.apply(params, wrong)
    with pytest.raises(ValueError, match=message):
        model.check(wrong)
    model.check({"image": inputs["image"], "kind": inputs["kind"]}, {"table": False})
    shorter = inputs | {"kind": inputs["kind"][:3]}
    message = re.escape(
        "encoders.kind: expected outputs [4, 4] (the batch as that of image), got [3, 4]"
    )
    with pytest.raises(ValueError, match=message):
        model.apply(params, shorter)


def test_an_encoder_that_gives_other_features_than_it_says():
    lies = Model(scaled().init, scaled().apply, config=Sizes(5))
    model = multimodal({"x": lies}, {"y": 2})
    with pytest.raises(
        ValueError, match=re.escape("encoders.x: expected outputs [2, 5] (the batch as that of x)")
    ):
        model.apply(model.init(KEY), {"x": torch.ones(2, 3)})


FOUR, EIGHT = models.mlp(3, 4), models.mlp(3, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoders": {}}, "encoders: expected at least one, got none"),
        ({"heads": {}}, "heads: expected at least one, got none"),
        ({"encoders": {"a.b": FOUR}}, "encoders: expected names without dots, got 'a.b'"),
        ({"heads": {"": 2}}, "heads: expected names without dots, got ''"),
        ({"heads": (("y", 2), ("y", 3))}, "heads: expected each name once, got y twice"),
        (
            {"encoders": {"x": FOUR, "y": "z"}},
            "encoders.y: expected the name of an input with a model (x), got z",
        ),
        (
            {"encoders": {"x": FOUR, "y": "x", "z": "y"}},
            "encoders.z: expected the name of an input with a model (x), got y",
        ),
        ({"encoders": {"x": "x"}}, "encoders.x: expected the name of an input with a model (none)"),
        (
            {"encoders": {"x": FOUR, "y": EIGHT}, "fusion": "sum"},
            "encoders.y: expected 4 features (as x) for fusion 'sum', got 8",
        ),
        (
            {"encoders": {"x": EIGHT, "y": FOUR}, "fusion": "gated"},
            "encoders.y: expected 8 features (as x) for fusion 'gated', got 4",
        ),
        (
            {"encoders": {"x": EIGHT, "y": FOUR}, "fusion": "attention"},
            "encoders.y: expected 8 features (as x) for fusion 'attention', got 4",
        ),
        (
            {"fusion": "attention", "attention_heads": 3},
            "attention_heads: expected a divisor of the 4 features, got 3",
        ),
        ({"attention_heads": 0}, "attention_heads: expected a positive integer, got 0"),
        ({"fusion": "mean"}, "fusion: expected one of 'concat', 'sum', 'gated', 'attention', got"),
        ({"heads": {"y": 0}}, "heads.y: expected a positive integer, got 0"),
        ({"heads": {"y": "linear"}}, "heads.y: expected a positive integer, got 'linear'"),
        (
            {"heads": {"y": EIGHT}},
            "heads.y: expected in_features 4 (of the concat of x), got 3",
        ),
    ],
)
def test_configs_that_cannot_be(change, message, unchecked):
    good = {"encoders": {"x": FOUR}, "heads": {"y": 2}}
    multimodal(**good)
    with pytest.raises(ValueError, match=re.escape(f"multimodal: {message}")):
        multimodal(**good | change)


def test_what_is_no_encoder_and_no_activation(unchecked):
    with pytest.raises(TypeError, match=r"encoders.x: expected a Model or the name .*, got int"):
        multimodal({"x": 3}, {"y": 2})
    with pytest.raises(TypeError, match=r"encoders: expected a dict by name, got 3"):
        multimodal(3, {"y": 2})
    with pytest.raises(ValueError, match=r"activation: expected one of"):
        multimodal({"x": FOUR}, {"y": 2}, activation="Tanh")

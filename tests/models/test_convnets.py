"""What the networks of torchvision have of their own: where they draw, their taps, their errors."""

from __future__ import annotations

import re

import convnet_references
import pytest
import torch
import torch.nn.functional as F
import torchvision
from model_cases import CASES, DTYPE, NoArithmetic, convnet
from torchvision.models._utils import _make_divisible

from funcnets import layers, models, random, tree
from funcnets.models import stages
from funcnets.models.convnext import block as convnext_block

KEY = random.key(11)
SMALL = convnet_references.SMALL
every_small = pytest.mark.parametrize("name", SMALL)


def drew(count, number, rate):
    """Whether so many of a number of draws of this rate are what chance gives."""
    return abs(count - number * rate) < 5 * (number * rate * (1 - rate)) ** 0.5


# The widest networks whose linear layers can hand their inputs on; and for each dropout the tap
# before it, what comes between, and the tap after the linear layer that follows.
ALEXNET = {"family": "alexnet", "size": 63, "widths": (2, 2, 2, 2, 8), "hidden": 288, "m": 288}
VGG = {"family": "vgg", "size": 14, "depths": (1,), "widths": (4,), "hidden": 196, "m": 196}
V2 = {"family": "mobilenet_v2", "stages": ((1, 4, 1, 1),), "last_width": 200, "m": 200}
V3 = {
    "family": "mobilenet_v3",
    "blocks": ((3, 4, 32, False, "relu", 1, 1),),
    "hidden": 192,
    "m": 192,
}
EFFICIENTNET = {
    "family": "efficientnet",
    "stages": (("fused", 1, 3, 1, 4, 2),),
    "last_width": 200,
    "m": 200,
    "stochastic_depth": 0.0,
}
DROPOUTS = {
    "alexnet": (ALEXNET, {"1": ("avgpool", "classifier.1"), "4": ("classifier.2", "classifier.4")}),
    "vgg": (VGG, {"3": ("classifier.1", "classifier.3"), "6": ("classifier.4", None)}),
    "mobilenet_v2": (V2, {"1": ("avgpool", None)}),
    "mobilenet_v3": (V3, {"3": ("classifier.1", None)}),
    "efficientnet": (EFFICIENTNET, {"1": ("avgpool", None)}),
}


@pytest.mark.parametrize("name", DROPOUTS)
def test_where_dropout_is_and_its_rate(name):
    options, places = DROPOUTS[name]
    case, rate = convnet(n=3, **options, dropout=0.3), 0.3
    params, x = case.params(KEY), random.normal(KEY, (8, *case.shapes[0][1:]), dtype=DTYPE)
    for place in places:
        weight = params["classifier", place, "weight"]
        params["classifier", place, "weight"] = torch.eye(*weight.shape, dtype=DTYPE)
        params["classifier", place, "bias"] = torch.zeros(len(weight), dtype=DTYPE)
    taps = [tap for pair in places.values() for tap in pair if tap is not None]
    for train in (False, True):
        outputs = case.model.apply(params, x, train=train, key=KEY, taps=taps)
        outputs, found = outputs[0] if train else outputs
        for before, after in places.values():
            value = found[before].flatten(1)
            arrived = outputs if after is None else found[after]
            if not train:
                torch.testing.assert_close(arrived, value)
                continue
            alive = value != 0
            kept = alive & (arrived != 0)
            torch.testing.assert_close(arrived, torch.where(kept, value / (1 - rate), 0.0))
            assert drew((alive & ~kept).sum(), alive.sum(), rate)


def branch(family, params, x):
    """The outputs of one block whose branch is in place for every sample."""
    if family == "convnext":
        return convnext_block(params, x)
    silu = {"activation": F.silu, "squeeze_activation": F.silu}
    return layers.inverted_residual(params, x, train=True, **silu)[0]


@pytest.mark.parametrize(
    ("family", "options", "places", "rates"),
    [
        (
            "efficientnet",
            {"width": 4, "stages": (("fused", 1, 3, 1, 4, 2), ("mbconv", 2, 3, 1, 4, 2))},
            ["0", "1.0", "1.1", "2.0", "2.1"],
            [0.0, 0.15, 0.3, 0.45],
        ),
        (
            "convnext",
            {"depths": (2, 2), "widths": (4, 4)},
            ["0", "1.0", "1.1", "2", "3.0", "3.1"],
            [0.0, 0.2, 0.4, 0.6],
        ),
    ],
)
def test_stochastic_depth_drops_samples_at_rates_that_grow(family, options, places, rates):
    still = {"dropout": 0.0} if family == "efficientnet" else {}
    case, n = convnet(family, **options, **still, stochastic_depth=0.6), 400
    params, x = case.params(KEY), random.normal(KEY, (n, 2, 8, 8), dtype=DTYPE)
    taps = [f"features.{place}" for place in places]
    (_, found), _ = case.model.apply(params, x, train=True, key=KEY, taps=taps)
    fates = []
    for i, place in enumerate(places):
        if "." not in place:
            continue
        rate, before = rates[len(fates)], found[f"features.{places[i - 1]}"]
        after = found[f"features.{place}"]
        whole = branch(family, params[("features", *place.split("."))], before)
        gone = (after == before).flatten(1).all(1)
        kept = before + (whole - before) / (1 - rate)
        torch.testing.assert_close(after[~gone], kept[~gone])
        assert drew(gone.sum(), n, rate) if rate else not gone.any()
        fates.append(gone)
    # One draw for each block: those that agree do so by chance.
    alike = (fates[2] == fates[3]).sum()
    assert drew(alike, n, rates[2] * rates[3] + (1 - rates[2]) * (1 - rates[3]))


@every_small
def test_taps_have_the_names_and_the_values_of_the_modules_of_torchvision(name):
    case = CASES[name]
    params, (x,) = case.params(KEY), case.inputs(KEY)
    x = torch.cat([x, 20 * x])  # so large that some activations saturate
    with pytest.raises(ValueError, match="taps: expected names among") as error:
        case.model.apply(params, x, taps=["nowhere"])
    known = str(error.value).partition("among ")[2].partition(";")[0].split(", ")
    module, wanted = case.reference(params).eval(), {}

    def keep(place):
        def hook(module, inputs, output):
            # A copy, for what follows may be in place.
            wanted[place] = output.clone()

        return hook

    for place, part in module.named_modules():
        part.register_forward_hook(keep(place))
    with torch.no_grad():
        module(x)
    outputs, found = case.model.apply(params, x, taps=known)
    torch.testing.assert_close(outputs, wanted[""])
    assert list(found) == known
    assert "features.0" in known
    for place in known:
        if place == "avgpool" and place not in wanted:  # a function in mobilenet_v2
            continue
        torch.testing.assert_close(found[place], wanted[place].reshape(found[place].shape))


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize(
    "options",
    [
        {"width_mult": 0.5},
        {"width_mult": 1.3, "reduced_tail": True},
        {"dilated": True},
        {"reduced_tail": True, "dilated": True},
    ],
    ids=str,
)
def test_variants_of_mobilenet_v3(size, options):
    name, options = f"mobilenet_v3_{size}", {"num_classes": 3, "dropout": 0.0, **options}
    with torch.random.fork_rng():
        module = getattr(torchvision.models, name)(**options).to(DTYPE)
    model = getattr(models, name)(**options)
    params = model.from_torchvision(module)
    x = random.normal(KEY, (2, 3, 40, 40), dtype=DTYPE)
    # In training, where every norm keeps the parts that differ at the size of the others.
    with torch.no_grad():
        expected = module(x)
    torch.testing.assert_close(model.apply(params, x, train=True)[0], expected)


@pytest.mark.parametrize("divisor", [1, 2, 8, 16])
def test_channels_in_round_numbers(divisor):
    for channels in [*range(1, 300), *(0.35 * i for i in range(1, 300))]:
        assert stages.divisible(channels, divisor) == _make_divisible(channels, divisor)


def change_row(name, place, entry, value):
    """A small configuration of which one entry of one row is another."""
    options = SMALL[name]
    table = "blocks" if name == "mobilenet_v3" else "stages"
    rows = [list(row) for row in options[table]]
    rows[place][entry] = value
    return {table: tuple(map(tuple, rows))}


POSITIVE = "expected a positive integer, got 0"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        *[(name, {"num_classes": 0}, f"num_classes: {POSITIVE}") for name in SMALL],
        *[(name, {"in_channels": 0}, f"in_channels: {POSITIVE}") for name in SMALL],
        *[
            (name, {"dropout": 1.5}, "dropout: expected a rate between 0 and 1, got 1.5")
            for name in SMALL
            if name not in ("lenet", "convnext")
        ],
        *[
            (name, {"stochastic_depth": -1}, "stochastic_depth: expected a rate between 0 and 1")
            for name in ("efficientnet", "convnext")
        ],
        *[
            (name, {"widths": (2, 0)}, "widths: expected positive integers, got (2, 0)")
            for name in ("lenet", "alexnet", "vgg", "convnext")
        ],
        *[(name, {"depths": (1, 0)}, f"depths[1]: {POSITIVE}") for name in ("vgg", "convnext")],
        *[
            (name, {"depths": (1,)}, "depths, widths: expected one of each per stage, got (1,) and")
            for name in ("vgg", "convnext")
        ],
        *[
            (name, {"depths": (), "widths": ()}, "depths, widths: expected one of each per stage")
            for name in ("vgg", "convnext")
        ],
        ("lenet", {"widths": ()}, "widths: expected at least one convolution, got none"),
        ("lenet", {"size": 0}, f"size: {POSITIVE}"),
        ("lenet", {"size": 7}, "size: expected images of which 2 convolutions and poolings leave"),
        ("lenet", {"hidden": (3, 0)}, f"hidden[1]: {POSITIVE}"),
        ("lenet", {"kernel_size": 0}, f"kernel_size: {POSITIVE}"),
        ("lenet", {"padding": -1}, "padding: expected 0 or more, got -1"),
        ("lenet", {"pool": "mean"}, "pool: expected one of 'max', 'avg', got 'mean'"),
        ("alexnet", {"widths": (2, 2)}, "widths: expected five, got (2, 2)"),
        ("alexnet", {"hidden": 0}, f"hidden: {POSITIVE}"),
        ("vgg", {"hidden": 0}, f"hidden: {POSITIVE}"),
        ("mobilenet_v2", {"stages": ()}, "stages: expected at least one row, got none"),
        (
            "mobilenet_v2",
            {"stages": ((1, 2, 3),)},
            "stages[0]: expected expansion, width, depth, stride; got (1, 2, 3)",
        ),
        ("mobilenet_v2", change_row("mobilenet_v2", 1, 1, 0), f"stages[1].width: {POSITIVE}"),
        (
            "mobilenet_v2",
            change_row("mobilenet_v2", 1, 0, 0),
            "stages[1].expansion: expected a positive number, got 0",
        ),
        ("mobilenet_v2", {"width": 0}, f"width: {POSITIVE}"),
        ("mobilenet_v2", {"last_width": 0}, f"last_width: {POSITIVE}"),
        ("mobilenet_v2", {"round_nearest": 0}, f"round_nearest: {POSITIVE}"),
        ("mobilenet_v2", {"width_mult": 0}, "width_mult: expected a positive number, got 0"),
        ("mobilenet_v3", {"blocks": ()}, "blocks: expected at least one row, got none"),
        ("mobilenet_v3", {"blocks": (3,)}, "blocks[0]: expected kernel_size, inner, width,"),
        ("mobilenet_v3", change_row("mobilenet_v3", 1, 1, 0), f"blocks[1].inner: {POSITIVE}"),
        (
            "mobilenet_v3",
            change_row("mobilenet_v3", 1, 5, 3),
            "blocks[1].stride: expected one of 1, 2, got 3",
        ),
        (
            "mobilenet_v3",
            change_row("mobilenet_v3", 0, 0, 4),
            "blocks[0].kernel_size: expected an odd size, got 4",
        ),
        ("mobilenet_v3", {"width": 0}, f"width: {POSITIVE}"),
        ("mobilenet_v3", {"hidden": 0}, f"hidden: {POSITIVE}"),
        ("efficientnet", {"stages": ()}, "stages: expected at least one row, got none"),
        ("efficientnet", change_row("efficientnet", 1, 5, 0), f"stages[1].depth: {POSITIVE}"),
        (
            "efficientnet",
            change_row("efficientnet", 1, 0, "conv"),
            "stages[1].block: expected one of 'mbconv', 'fused', got 'conv'",
        ),
        (
            "efficientnet",
            change_row("efficientnet", 1, 1, 0),
            "stages[1].expansion: expected a positive number, got 0",
        ),
        (
            "efficientnet",
            change_row("efficientnet", 1, 2, 2),
            "stages[1].kernel_size: expected an odd size, got 2",
        ),
        ("efficientnet", {"width": 0}, f"width: {POSITIVE}"),
        ("efficientnet", {"last_width": 0}, f"last_width: {POSITIVE}"),
        ("efficientnet", {"momentum": 2.0}, "momentum: expected a rate between 0 and 1, got 2.0"),
        ("efficientnet", {"eps": 0.0}, "eps: expected a positive number, got 0.0"),
        ("convnext", {"layer_scale": 0.0}, "layer_scale: expected a positive number, got 0.0"),
    ],
)
def test_configs_that_cannot_be(name, change, message, unchecked):
    family = name.removesuffix("_batch")
    options = vars(CASES[name].model.config)
    for make in (getattr(models, family), type(CASES[name].model.config)):
        make(**options)
        with pytest.raises(ValueError, match=re.escape(f"{family}: {message}")):
            make(**options | change)


SMALLEST = {"alexnet": 63, "vgg": 4, "vgg_batch": 4, "convnext": 8}


@every_small
@pytest.mark.parametrize("train", [False, True])
def test_inputs_that_do_not_fit(name, train, unchecked):
    case = CASES[name]
    params, size = case.params(KEY), case.shapes[0][-1]
    shapes = [(3, 1, size, size), (2, size, size), (3, 2, size), ()]
    least = SMALLEST.get(name)
    sizes = f"{least} or more, {least} or more" if least else "height, width"
    if name == "lenet":
        sizes = f"{size}, {size}"
        shapes += [(3, 2, size, size + 1), (3, 2, size + 1, size)]
    elif least:
        shapes += [(3, 2, least - 1, size), (3, 2, size, least - 1)]
    for shape in shapes:
        family = name.removesuffix("_batch")
        message = f"{family}: x: expected [batch, 2, {sizes}], got {list(shape)}"
        x = torch.ones(shape, dtype=DTYPE)
        with pytest.raises(ValueError, match=re.escape(message)), NoArithmetic():
            case.model.apply(params, x, train=train, key=KEY)


@every_small
def test_any_number_of_images_and_any_shape_of_them(name):
    case = CASES[name]
    params, size = case.params(KEY), case.shapes[0][-1]
    wide = size if name == "lenet" else size + 5
    for batch in (0, 1, 3):
        x = random.normal(KEY, (batch, 2, size, wide), dtype=DTYPE)
        outputs = case.model.apply(params, x)
        assert outputs.shape == (batch, 3)
        for i in range(batch):
            torch.testing.assert_close(outputs[i], case.model.apply(params, x[i : i + 1])[0])


def test_a_pretrained_network_with_a_new_head():
    with torch.random.fork_rng():
        module = torchvision.models.mobilenet_v3_small()
    model = models.mobilenet_v3_small(5)
    params = model.from_torchvision(module, KEY, fresh="classifier.3")
    assert params["classifier", "3", "weight"].shape == (5, 1024)
    with pytest.raises(ValueError, match=r"classifier\.3"):
        model.from_torchvision(module)
    assert not tree.compare(params, model.init(random.key(0, device="meta")))

"""What is the U-Net's own: every size of image, the way around the bottom, and its errors."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from model_cases import NoArithmetic
from torch.func import grad

from funcnets import layers, random, tree
from funcnets.models import unet
from funcnets.models.unet import Config

KEY = random.key(3)
MODES = ("transposed", "bilinear", "nearest")


def made(*args, **options):
    model = unet(*args, **options)
    return model, tree.cast(model.init(KEY), torch.float64)


@given(
    depth=st.integers(1, 3),
    upsample=st.sampled_from(MODES),
    norm=st.sampled_from([None, "batch", "group"]),
    data=st.data(),
)
def test_any_size_of_image_from_the_smallest_on(depth, upsample, norm, data):
    smallest = 2**depth
    sizes = st.integers(smallest, 4 * smallest + 1)
    height, width = data.draw(sizes), data.draw(sizes)
    widths = tuple(range(2, 2 * depth + 4, 2))
    model, params = made(2, 5, widths, norm=norm, groups=2, upsample=upsample)
    x = random.normal(KEY, (2, 2, height, width), dtype=torch.float64)
    places = [f"{way}.{level}" for way in ("down", "upsample", "up") for level in range(depth)]
    logits, found = model.apply(params, x, taps=[*places, f"down.{depth}"])
    assert logits.shape == (2, 5, height, width)
    for level in range(depth):
        size = (height // 2**level, width // 2**level)
        assert found[f"down.{level}"].shape == (2, widths[level], *size)
        assert found[f"up.{level}"].shape == (2, widths[level], *size)
        below = widths[level + (upsample != "transposed")]
        assert found[f"upsample.{level}"].shape == (2, below, *size)
    assert found[f"down.{depth}"].shape[2:] == (height // smallest, width // smallest)


@pytest.mark.parametrize("upsample", MODES)
def test_what_comes_from_below_lies_over_what_it_was_made_of(upsample):
    model, params = made(1, 1, (2, 2), norm=None, upsample=upsample)
    x = torch.zeros(1, 1, 5, 7, dtype=torch.float64)
    bottom = torch.arange(12.0, dtype=torch.float64).reshape(1, 2, 2, 3)
    found = model.apply(params, x, taps={"down.1": lambda _: bottom, "upsample.0": None})[1]
    above = found["upsample.0"]
    if upsample == "transposed":
        doubled = layers.conv_transpose(params["upsample", "0"], bottom, stride=2)
        torch.testing.assert_close(above[:, :, :4, :6], doubled)
        # The row and the column that pooling left out are zero, at the end.
        assert not above[:, :, 4:].any()
        assert not above[..., 6:].any()
    else:
        torch.testing.assert_close(above, F.interpolate(bottom, (5, 7), mode=upsample))


def test_an_even_image_is_not_padded():
    model, params = made(1, 1, (2, 2), norm=None)
    x = random.normal(KEY, (1, 1, 4, 6), dtype=torch.float64)
    found = model.apply(params, x, taps=["down.1", "upsample.0"])[1]
    expected = layers.conv_transpose(params["upsample", "0"], found["down.1"], stride=2)
    torch.testing.assert_close(found["upsample.0"], expected)


def test_details_go_around_the_bottom():
    model, params = made(1, 2, (2, 4, 4))
    x = random.normal(KEY, (1, 1, 8, 8), dtype=torch.float64)
    # Without what comes from the bottom, there is still something to say about each pixel.
    logits = model.apply(params, x, taps={"down.2": torch.zeros_like})[0]
    assert not torch.equal(logits, model.apply(params, x))
    assert logits.flatten(2).std(-1).min() > 1e-3
    # With nothing from any level below, the first level alone has it.
    without = model.apply(params, x, taps={"upsample.0": torch.zeros_like})[0]
    assert without.flatten(2).std(-1).min() > 1e-3


def test_dropout_is_at_the_bottom_and_there_alone():
    model, params = made(1, 2, (4, 8), dropout=0.5)
    x = random.normal(KEY, (20, 1, 8, 8), dtype=torch.float64)

    def taps(key):
        return model.apply(params, x, train=True, key=random.key(key), taps=["down.0", "down.1"])

    ((_, first), _), ((_, second), _) = taps(1), taps(2)
    assert torch.equal(first["down.0"], second["down.0"])
    (_, whole), _ = unet(1, 2, (4, 8)).apply(params, x, train=True, taps=["down.1"])
    alive = whole["down.1"] > 0
    kept = first["down.1"][alive] > 0
    assert abs(kept.double().mean() - 0.5) < 5 * (0.25 / kept.numel()) ** 0.5
    torch.testing.assert_close(first["down.1"][alive][kept], 2 * whole["down.1"][alive][kept])
    with pytest.raises(ValueError, match="unet: key: expected a key"):
        model.apply(params, x, train=True)


@pytest.mark.parametrize("upsample", MODES)
def test_it_learns_to_find_an_outline(upsample):
    """One square in noise: from nothing to most pixels right, by plain gradient descent."""
    model = unet(1, 2, (4, 8), convolutions=1, upsample=upsample)
    params = model.init(KEY)
    corner = random.randint(KEY, (16, 2), 1, 8)
    rows, columns = torch.arange(13)[:, None], torch.arange(13)[None, :]
    inside = [
        (rows >= top) & (rows < top + 4) & (columns >= left) & (columns < left + 4)
        for top, left in corner.tolist()
    ]
    target = torch.stack(inside).long()
    x = target[:, None] + 0.3 * random.normal(random.key(8), (16, 1, 13, 13))

    def loss(trainable, buffers):
        logits, buffers = model.apply(tree.merge(trainable, buffers), x, train=True)
        return F.cross_entropy(logits, target), (logits, buffers)

    trainable, buffers = tree.partition(params)
    for _ in range(30):
        grads, (logits, buffers) = grad(loss, has_aux=True)(trainable, buffers)
        trainable = tree.map(lambda leaf, g: leaf - 0.5 * g, trainable, grads)
    assert (logits.argmax(1) == target).float().mean() > 0.95  # no square at all would give 0.905


def test_parameters_by_name():
    def names(**options):
        model = unet(1, 2, (2, 4), convolutions=1, **options)
        return {tree.join(path) for path, _ in tree.leaves_with_path(model.init(KEY))}

    head = {"head.weight", "head.bias"}
    places = ("down.0.0", "down.1.0", "up.0.0")
    bare = {f"{place}.0.{leaf}" for place in places for leaf in ("weight", "bias")}
    transposed = {"upsample.0.weight", "upsample.0.bias"}
    assert names(norm=None) == head | bare | transposed
    assert names(norm=None, upsample="nearest") == head | bare
    stats = {"1.weight", "1.bias", "1.running_mean", "1.running_var"}
    normed = {f"{place}.{leaf}" for place in places for leaf in {"0.weight", *stats}}
    assert names(upsample="bilinear") == head | normed


def test_each_option_arrives_in_its_field():
    options = {
        "convolutions": 3,
        "norm": "group",
        "groups": 2,
        "upsample": "nearest",
        "activation": "gelu",
        "dropout": 0.125,
    }
    assert unet(4, 5, [2, 4], **options).config == Config(4, 5, (2, 4), **options)
    config = dataclasses.replace(unet(4, 5).config, widths=(2, 4, 8))
    assert sorted(unet(**vars(config)).init(KEY)["down"].keys()) == ["0", "1", "2"]


def check(options):
    """The checks of a configuration without those of its annotations, which users do not have."""
    config = Config(1, 2)
    for name, value in options.items():
        object.__setattr__(config, name, value)
    config.__post_init__()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (4,)}, "unet: widths: expected two or more, got (4,)"),
        ({"widths": (4, 0)}, "unet: widths: expected positive integers, got (4, 0)"),
        (
            {"widths": (4, 6), "norm": "group", "groups": 4},
            "unet: widths: expected multiples of groups=4, got (4, 6)",
        ),
        ({"upsample": "cubic"}, "unet: upsample: expected one of 'transposed', 'bilinear', "),
        ({"norm": "layer"}, "unet: norm: expected one of None, 'batch', 'group', got 'layer'"),
        ({"convolutions": 0}, "unet: convolutions: expected a positive integer, got 0"),
        ({"dropout": 2.0}, "unet: dropout: expected a rate between 0 and 1, got 2.0"),
        ({"activation": "no"}, "activation: expected one of celu, "),
    ],
)
def test_configurations_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check(options)


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 3, 3, 8), (2, 3, 8, 3), (3, 8, 8)])
def test_images_that_do_not_fit(shape, unchecked):
    model, params = made(3, 2, (2, 2, 2))
    x = torch.zeros(shape, dtype=torch.float64)
    message = f"unet: x: expected [batch, 3, 4 or more, 4 or more], got {list(shape)}"
    with NoArithmetic(), pytest.raises(ValueError, match=re.escape(message)):
        model.apply(params, x)

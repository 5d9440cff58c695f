"""Swin Transformers: windows, trees with torchvision's constants, what they draw, their errors."""

from __future__ import annotations

import re

import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from model_cases import DTYPE, NoArithmetic, vision
from tensordict import TensorDict
from torch.func import grad, vmap
from torchvision.models import SwinTransformer
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

from funcnets import layers, models, random, tree
from funcnets.models.swin import merge, relative_index, window_attention, windows_of
from funcnets.tree.convert import CONSTANTS

KEY = random.key(13)
SMALL = {"patch_size": 1, "width": 4, "window": 2, "mlp_ratio": 1.0}
versions = pytest.mark.parametrize("version", [1, 2])


def torchvision_module(version):
    """A true network of torchvision, its constants in the state_dict."""
    second = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = SwinTransformer(
            [2, 2], 4, [2, 1], [2, 1], [3, 3], 2.0, **(second if version == 2 else {})
        )
    module = module.double().eval()
    for i, parameter in enumerate(module.parameters()):
        noise = random.normal(random.fold_in(KEY, i), parameter.shape, dtype=DTYPE)
        parameter.data += 0.3 * noise
        if parameter.shape[1:] == (1, 1):  # one of the scales beyond the largest that there is
            parameter.data[0] = 5.0
    return module


def model_of(version):
    options = {"width": 4, "patch_size": 2, "window": 3, "mlp_ratio": 2.0, "version": version}
    return models.swin((2, 1), (2, 1), **options)


@versions
@pytest.mark.parametrize("size", [(2, 2), (9, 15), (13, 6)])
def test_images_of_any_shape(version, size):
    module, model = torchvision_module(version), model_of(version)
    x = random.normal(KEY, (2, 3, *size), dtype=DTYPE)
    outputs = model.apply(model.from_torchvision(module), x)
    torch.testing.assert_close(outputs, module(x).detach(), rtol=1e-10, atol=1e-10)


@versions
def test_trees_with_and_without_the_constants_of_torchvision(version, tmp_path):
    module, model = torchvision_module(version), model_of(version)
    x = random.normal(KEY, (2, 3, 9, 9), dtype=DTYPE)
    params = model.from_torchvision(module)
    expected = model.apply(params, x)
    state = module.state_dict()
    assert any(name.rpartition(".")[2] in CONSTANTS for name in state)
    raw = TensorDict(state).unflatten_keys(".")
    held = tree.from_module(module)
    for given_tree in (held, raw):
        assert torch.equal(model.apply(given_tree, x), expected)
    # What from_torchvision gives has none, whatever it is given.
    torch.save(state, tmp_path / "swin.pth")
    for weights in (state, tmp_path / "swin.pth"):
        assert not tree.compare(model.from_torchvision(weights), params)
    assert not tree.compare(params, model.init(KEY))
    assert all(leaf.is_floating_point() for leaf in tree.leaves(params))
    # Integers and all, it is differentiated as any other tree with buffers is.
    trainable, buffers = tree.partition(held)

    def loss(trainable):
        return model.apply(tree.merge(trainable, buffers), x).square().sum()

    wanted = grad(lambda params: model.apply(params, x).square().sum())(params)
    found = grad(loss)(trainable)
    for path, gradient in tree.leaves_with_path(wanted):
        torch.testing.assert_close(found[path], gradient)
    # Members of an ensemble that hold them.
    ensemble = tree.stack([held, held])
    outputs = vmap(model.apply, (0, None))(ensemble, x)
    torch.testing.assert_close(outputs, torch.stack([expected, expected]))


@versions
def test_what_else_does_not_fit_is_said_beside_the_constants(version):
    model, held = model_of(version), tree.from_module(torchvision_module(version))
    x = torch.ones(1, 3, 9, 9, dtype=DTYPE)
    held["head", "more"] = torch.ones(1)
    with pytest.raises(ValueError, match=r"^head.more: unexpected; got \[1\]$"), NoArithmetic():
        model.apply(held, x)
    with pytest.raises(ValueError, match="expected a key for what is drawn anew"):
        model.from_torchvision(torchvision_module(version), fresh="head")
    params = model.from_torchvision(torchvision_module(version), KEY, fresh="head")
    torch.testing.assert_close(params["head"], tree.cast(model.init(KEY)["head"], DTYPE))


@versions
def test_taps_are_what_the_modules_of_torchvision_give(version):
    module, model = torchvision_module(version), model_of(version)
    params, x = model.from_torchvision(module), random.normal(KEY, (2, 3, 9, 9), dtype=DTYPE)
    with pytest.raises(ValueError, match="taps: expected names among") as error:
        model.apply(params, x, taps=["nowhere"])
    known = str(error.value).partition("among ")[2].partition(";")[0].split(", ")
    blocks = ["features.1.0", "features.1.1", "features.3.0"]
    assert sorted(known) == sorted(
        [
            *["features.0", "features.1", "features.2", "features.3", "features", "norm"],
            *["avgpool", *blocks],
            *[f"{block}.attn" for block in blocks],
            *[f"{block}.attn.weights" for block in blocks],
        ]
    )
    outputs, found = model.apply(params, x, taps=known)
    assert torch.equal(outputs, model.apply(params, x))
    wanted = {}

    def keep(place):
        return lambda module, inputs, output: wanted.update({place: output.detach()})

    for place, part in module.named_modules():
        if place in known:
            part.register_forward_hook(keep(place))
    module(x)
    assert set(known) - set(wanted) == {f"{block}.attn.weights" for block in blocks}
    wanted["avgpool"] = wanted["avgpool"].flatten(1)
    for place, value in wanted.items():
        torch.testing.assert_close(found[place], value, msg=place)
    for block, shape in zip(blocks, [(8, 2, 9, 9), (8, 2, 9, 9), (2, 1, 9, 9)], strict=True):
        weights = found[f"{block}.attn.weights"]
        assert weights.shape == shape
        torch.testing.assert_close(weights.sum(-1), torch.ones(shape[:3], dtype=DTYPE))


@pytest.mark.parametrize("size", [4, 5])
def test_attention_of_each_token_to_itself_moves_nothing(size):
    model = models.swin((2,), (2,), 3, **SMALL)
    params, x = model.init(KEY), random.normal(KEY, (2, 3, size, size))
    for block in ("0", "1"):
        place = f"features.1.{block}.attn"
        eye = {f"{place}.weights": lambda w: torch.eye(4).expand_as(w), place: None}
        before = "features.0" if block == "0" else "features.1.0"
        _, found = model.apply(params, x, taps={**eye, before: None})
        part = params["features", "1", block]
        values = layers.linear(
            part["attn", "qkv"], layers.layer_norm(part["norm1"], found[before])
        ).chunk(3, -1)[2]
        torch.testing.assert_close(found[place], layers.linear(part["attn", "proj"], values))


@versions
def test_tokens_of_a_window_alone_see_each_other(version):
    """And of a moved window those alone that were neighbours before the roll."""
    model = models.swin((2,), (2,), 3, **SMALL, version=version)
    params = tree.cast(model.init(KEY), DTYPE)
    x = random.normal(KEY, (1, 3, 6, 6), dtype=DTYPE)
    part = tree.map(lambda leaf: leaf + 0.1, params["features", "1"])
    features = model.apply(params, x, taps=["features.0"])[1]["features.0"]

    def attended(features, shift):
        windows = windows_of(features, 2, shift)
        index = relative_index(2, features.device)
        return window_attention(
            part["0", "attn"], features, windows, index, heads=2, version=version
        )

    # Where a change of each token is felt: [row, column] of the change, then of what changes.
    for shift, edges in ((0, [0, 2, 4, 6]), (1, [0, 1, 3, 5, 6])):
        felt = torch.zeros(6, 6, 6, 6)
        for row in range(6):
            for column in range(6):
                changed = features.clone()
                changed[0, row, column] += 1
                far = (attended(changed, shift) - attended(features, shift)).abs().amax((0, 3))
                felt[row, column] = far > 1e-20  # exp(-100) is not nothing
        window = torch.bucketize(torch.arange(6), torch.tensor(edges[1:-1]), right=True)
        same = window[:, None] == window
        expected = rearrange(same, "r s -> r 1 s 1") & rearrange(same, "c d -> 1 c 1 d")
        assert torch.equal(felt > 0, expected)


@given(
    st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(0, 99)
)
def test_merging_takes_each_four_neighbours(batch, height, width, channels, seed):
    x = random.normal(random.key(seed), (batch, height, width, channels), dtype=DTYPE)
    eye = torch.eye(4 * channels, dtype=DTYPE)
    norm = layers.init_layer_norm(KEY, 4 * channels, dtype=DTYPE)
    params = TensorDict({"reduction": {"weight": eye}, "norm": norm})
    merged = merge(params, x)
    for row in range((height + 1) // 2):
        for column in range((width + 1) // 2):
            four = [
                x[:, 2 * row + down, 2 * column + right]
                if 2 * row + down < height and 2 * column + right < width
                else torch.zeros(batch, channels, dtype=DTYPE)
                for right in (0, 1)
                for down in (0, 1)
            ]
            expected = layers.layer_norm(norm, torch.cat(four, -1))
            torch.testing.assert_close(merged[:, row, column], expected)


def drew(count, number, rate):
    """Whether so many of a number of draws of this rate are what chance gives."""
    return abs(count - number * rate) < 5 * (number * rate * (1 - rate)) ** 0.5


@pytest.mark.parametrize("branch", ["attention", "mlp"])
def test_stochastic_depth_drops_samples_at_rates_that_grow(branch):
    n, rates = 400, (0.0, 0.3, 0.6)
    model = models.swin((2, 1), (2, 2), 3, **SMALL, stochastic_depth=0.6)
    params = model.init(KEY)
    # The other branch adds nothing.
    for place in (("1", "0"), ("1", "1"), ("3", "0")):
        part = params[("features", *place)]
        off = part["mlp", "3"] if branch == "attention" else part["attn", "proj"]
        off["weight"] = torch.zeros_like(off["weight"])
    x = random.normal(KEY, (n, 3, 2, 2))
    taps = ["features.0", "features.1.0", "features.1.1", "features.2", "features.3.0"]
    (_, found), _ = model.apply(params, x, train=True, key=KEY, taps=taps)
    pairs = [("0", "1.0"), ("1.0", "1.1"), ("2", "3.0")]
    fates = []
    for rate, (before, after) in zip(rates, pairs, strict=True):
        x, y = found[f"features.{before}"], found[f"features.{after}"]
        part = params[("features", *after.split("."))]
        if branch == "mlp":
            hidden = layers.linear(part["mlp", "0"], layers.layer_norm(part["norm2"], x))
            whole = layers.linear(part["mlp", "3"], torch.nn.functional.gelu(hidden))
        else:
            _, again = model.apply(
                params,
                random.normal(KEY, (n, 3, 2, 2)),
                taps={f"features.{before}": lambda _, x=x: x, f"features.{after}.attn": None},
            )
            whole = again[f"features.{after}.attn"]
        gone = (y == x).flatten(1).all(1)
        torch.testing.assert_close(y[~gone], (x + whole / (1 - rate))[~gone])
        assert drew(gone.sum(), n, rate) if rate else not gone.any()
        fates.append(gone)
    alike = (fates[1] == fates[2]).sum()  # one draw for each block
    assert drew(alike, n, rates[1] * rates[2] + (1 - rates[1]) * (1 - rates[2]))


def test_the_branches_of_a_block_are_dropped_apart():
    model = models.swin((1, 1), (2, 2), 3, **SMALL, stochastic_depth=0.5)
    params = model.init(KEY)
    # What either branch adds is a constant: its bias.
    part = params["features", "3", "0"]
    for place, value in ((("attn", "proj"), 1.0), (("mlp", "3"), 10.0)):
        part[(*place, "weight")] = torch.zeros_like(part[(*place, "weight")])
        part[(*place, "bias")] = torch.full_like(part[(*place, "bias")], value)
    x = random.normal(KEY, (400, 3, 2, 2))
    taps = ["features.2", "features.3.0"]
    (_, found), _ = model.apply(params, x, train=True, key=KEY, taps=taps)
    added = (found["features.3.0"] - found["features.2"])[:, 0, 0, 0].round()
    for value in (0, 2, 20, 22):
        assert drew((added == value).sum(), 400, 0.25)


def test_where_dropout_is_and_its_rate():
    model = models.swin((1,), (2,), 3, **SMALL | {"width": 32}, dropout=0.3)
    params = model.init(KEY)
    part = params["features", "1", "0"]
    ones = torch.ones(32)
    part["attn", "proj", "weight"] = torch.zeros(32, 32)
    part["attn", "proj", "bias"] = ones
    for place in ("0", "3"):
        part["mlp", place, "weight"] = torch.eye(32) * (place == "3")
        part["mlp", place, "bias"] = ones * (place == "0")
    x = random.normal(KEY, (8, 3, 4, 4))
    taps = ["features.0", "features.1.0.attn", "features.1.0"]
    (_, found), _ = model.apply(params, x, train=True, key=KEY, taps=taps)
    attended = found["features.1.0.attn"]
    torch.testing.assert_close(attended.unique(), torch.tensor([0, 1 / 0.7]))
    assert drew((attended == 0).sum(), attended.numel(), 0.3)
    added = found["features.1.0"] - found["features.0"] - attended  # of two masks
    one = torch.nn.functional.gelu(torch.ones(())) / 0.49
    kept = added.abs() > 1e-4
    torch.testing.assert_close(added[kept], one.expand(int(kept.sum())))
    assert drew(kept.sum(), kept.numel(), 0.49)


def test_attention_dropout_is_of_the_weights():
    options = SMALL | {"width": 8}
    model = models.swin((1,), (2,), 3, **options, attention_dropout=0.3)
    params, x = model.init(KEY), random.normal(KEY, (64, 3, 4, 4))
    part = params["features", "1", "0", "attn"]
    part["qkv", "weight"] = torch.zeros(24, 8)
    part["qkv", "bias"] = torch.ones(24)  # so the weights are quarters, and the values ones
    part["proj", "weight"], part["proj", "bias"] = torch.eye(8), torch.zeros(8)
    part["relative_position_bias_table"] = torch.zeros(9, 2)
    place = "features.1.0.attn"
    (_, found), _ = model.apply(params, x, train=True, key=KEY, taps=[place])
    heads = rearrange(found[place], "b h w (heads width) -> (b h w heads) width", heads=2)
    assert (heads == heads[:, :1]).all()  # one mask for all of a head
    kept = heads[:, 0] * 0.7 * 4  # how many of four keys
    torch.testing.assert_close(kept, kept.round())
    assert drew(kept.sum(), 4 * len(kept), 0.7)


POSITIVE = "expected a positive integer, got 0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": ()}, "depths, heads: expected one of each per stage, got () and (2, 1)"),
        ({"heads": (2,)}, "depths, heads: expected one of each per stage, got (1, 1) and (2,)"),
        ({"heads": (2, 3)}, "heads[1]: expected a divisor of the stage's 8 channels, got 3"),
        ({"heads": (0, 1)}, f"heads[0]: {POSITIVE}"),
        ({"depths": (1, 0)}, f"depths[1]: {POSITIVE}"),
        ({"window": 0}, f"window: {POSITIVE}"),
        ({"window": 1, "version": 2}, "window: expected 2 or more in version 2, got 1"),
        ({"version": 3}, "version: expected one of 1, 2, got 3"),
        ({"mlp_ratio": 0.1}, "mlp_ratio: expected 1 / width or more, got 0.1 with width=4"),
        ({"mlp_ratio": -1.0}, "mlp_ratio: expected a positive number, got -1.0"),
        ({"stochastic_depth": 1.5}, "stochastic_depth: expected a rate between 0 and 1, got 1.5"),
    ],
)
def test_configs_that_cannot_be(change, message, unchecked):
    options = {"depths": (1, 1), "heads": (2, 1), **SMALL} | change
    with pytest.raises(ValueError, match=re.escape(f"swin: {message}")):
        models.swin(**options)


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (3, 4, 4), (2, 3, 1, 4)])
def test_images_that_do_not_fit(shape, unchecked):
    case = vision("swin", 3, depths=(1,), heads=(1,), **SMALL | {"patch_size": 2})
    message = re.escape(f"swin: x: expected [batch, 3, 2 or more, 2 or more], got {list(shape)}")
    params, x = case.params(KEY), torch.ones(shape, dtype=DTYPE)
    with pytest.raises(ValueError, match=message), NoArithmetic():
        case.model.apply(params, x)

"""Vision Transformers: positions, attention maps, what they draw, their errors."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import DTYPE, NoArithmetic, vision
from torch.func import grad, vmap
from torchvision.models.vision_transformer import interpolate_embeddings

from funcnets import layers, models, random, tree

KEY = random.key(17)
CONFIG = {"image_size": 4, "patch_size": 2, "depth": 2, "heads": 2, "width": 6}
CASE = vision("vit", n=3, m=5, **CONFIG, representation_size=4)
PLACE = "encoder.layers.encoder_layer_{}.self_attention"
BLOCK = ("encoder", "layers", "encoder_layer_0")


@given(
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(1, 3),
    st.sampled_from(["bicubic", "bilinear"]),
    st.integers(0, 99),
)
def test_positions_for_another_image_size_are_those_of_torchvision(old, new, patch, mode, seed):
    options = {"patch_size": patch, "depth": 1, "heads": 1, "width": 3}
    params = models.vit(old * patch, **options).init(random.key(seed))
    before = params.clone()
    resized = models.interpolate_positions(params, new * patch, mode)
    state = OrderedDict(tree.to_state_dict(params.clone()))
    expected = interpolate_embeddings(new * patch, patch, state, mode)
    assert list(tree.to_state_dict(resized)) == list(expected)
    for name, leaf in tree.to_state_dict(resized).items():
        torch.testing.assert_close(leaf, expected[name], rtol=1e-6, atol=1e-6)
    model = models.vit(new * patch, **options)
    assert not tree.compare(resized, model.init(KEY))
    tree.map(torch.testing.assert_close, params, before)


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_positions_of_an_ensemble_and_their_gradient(pool):
    model = models.vit(**CONFIG, pool=pool)
    larger = models.vit(**vars(dataclasses.replace(model.config, image_size=6)))
    ensemble = vmap(model.init)(random.split(KEY, 3))
    resized = vmap(lambda params: models.interpolate_positions(params, 6))(ensemble)
    x = random.normal(KEY, (2, 3, 6, 6))
    assert vmap(larger.apply, (0, None))(resized, x).shape == (3, 2, 1000)
    for i, params in enumerate(tree.unstack(ensemble)):
        alone = models.interpolate_positions(params, 6)
        torch.testing.assert_close(tree.unstack(resized)[i], alone)
        # The class token's stays; a constant stays a constant, so gradients sum to the numbers.
        own = 1 if pool == "token" else 0
        place = ("encoder", "pos_embedding")
        torch.testing.assert_close(alone[place][:, :own], params[place][:, :own])

        def total(params):
            return models.interpolate_positions(params, 6)["encoder", "pos_embedding"].sum()

        gradient = grad(total)(params)[place]
        torch.testing.assert_close(gradient.sum((0, 1)), torch.full((6,), 9.0 + own))


def test_positions_that_cannot_be():
    params = models.vit(**CONFIG).init(KEY)
    for size in (5, 0):
        message = f"image_size: expected a multiple of 2, the size of the patches, got {size}"
        with pytest.raises(ValueError, match=message):
            models.interpolate_positions(params, size)
    params["encoder", "pos_embedding"] = torch.ones(1, 7, 6)
    message = r"pos_embedding: expected the patches of a square, got \[1, 7, 6\]"
    with pytest.raises(ValueError, match=message):
        models.interpolate_positions(params, 6)


def test_taps_are_what_the_modules_of_torchvision_give():
    params, (x,) = CASE.params(KEY), CASE.inputs(KEY)
    model, module = CASE.model, CASE.reference(params).eval()
    with pytest.raises(ValueError, match="taps: expected names among") as error:
        model.apply(params, x, taps=["nowhere"])
    known = str(error.value).partition("among ")[2].partition(";")[0].split(", ")
    layer, attention = PLACE.rpartition(".")[0], PLACE
    assert sorted(known) == sorted(
        [
            *["conv_proj", "encoder.layers", "encoder", "heads.act"],
            *[
                place.format(i)
                for place in (layer, attention, f"{attention}.weights")
                for i in range(2)
            ],
        ]
    )
    outputs, found = model.apply(params, x, taps=known)
    torch.testing.assert_close(outputs, model.apply(params, x))
    wanted = {}

    def keep(place):
        def hook(module, inputs, output):
            wanted[place] = (output[0] if isinstance(output, tuple) else output).detach()

        return hook

    for place, part in module.named_modules():
        if place in known:
            part.register_forward_hook(keep(place))
    for i, part in enumerate(module.encoder.layers):
        # The weights that torch's attention gives, for the same inputs.
        part.ln_1.register_forward_hook(keep(i))
    module(x.clone().requires_grad_())  # or torch would take a path that calls no hooks
    for i, part in enumerate(module.encoder.layers):
        y = wanted.pop(i)
        _, weights = part.self_attention(y, y, y, average_attn_weights=False)
        wanted[PLACE.format(i) + ".weights"] = weights.detach()
    assert set(wanted) == set(known)
    for place, value in wanted.items():
        torch.testing.assert_close(found[place], value, msg=place)


def test_attention_maps_are_computed_where_they_are_tapped(monkeypatch):
    params, (x,) = CASE.params(KEY), CASE.inputs(KEY)
    seen = []
    module = sys.modules[layers.attention.__module__]  # for that name is the function
    real = module.scaled_dot_product_attention

    def count(*args, **kwargs):
        seen.extend([kwargs["tap"]] if kwargs["tap"] else [])
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "scaled_dot_product_attention", count)
    CASE.model.apply(params, x, taps=[PLACE.format(0), "encoder"])
    assert not seen
    _, found = CASE.model.apply(params, x, taps=[PLACE.format(1) + ".weights"])
    assert len(seen) == 1
    assert list(found) == [PLACE.format(1) + ".weights"]


def test_attention_that_is_replaced_counts():
    params, (x,) = CASE.params(KEY), CASE.inputs(KEY)
    place, part = PLACE.format(0), params[(*BLOCK, "self_attention")]
    taps = {f"{place}.weights": lambda w: torch.full_like(w, 1 / 5), place: None}
    _, found = CASE.model.apply(params, x, taps=taps)
    _, first = CASE.model.apply(params, x, taps={"conv_proj": None})
    tokens = rearrange(first["conv_proj"], "b w h a -> b (h a) w")
    tokens = torch.cat([params["class_token"].expand(len(x), 1, 6), tokens], 1)
    y = tokens + params["encoder", "pos_embedding"]
    y = layers.layer_norm(params[(*BLOCK, "ln_1")], y, eps=1e-6)
    values = F.linear(y, part["in_proj_weight"], part["in_proj_bias"])[..., 12:]
    mean = layers.linear(part["out_proj"], values.mean(1, keepdim=True))
    torch.testing.assert_close(found[place], mean.expand_as(found[place]))


def drew(count, number, rate):
    """Whether so many of a number of draws of this rate are what chance gives."""
    return abs(count - number * rate) < 5 * (number * rate * (1 - rate)) ** 0.5


def test_where_dropout_is_and_its_rate():
    case = vision("vit", n=3, size=8, image_size=8, patch_size=2, depth=1, heads=2, width=32,
                  mlp_width=32, dropout=0.3)  # fmt: skip
    params, x = case.model.init(KEY), random.normal(KEY, (16, 3, 8, 8))
    part = params[BLOCK]
    part["self_attention", "out_proj", "weight"] = torch.zeros(32, 32)
    part["self_attention", "out_proj", "bias"] = torch.ones(32)
    for place in ("0", "3"):
        part["mlp", place, "weight"] = torch.eye(32) * (place == "3")
        part["mlp", place, "bias"] = torch.ones(32) * (place == "0")
    taps = ["conv_proj", PLACE.format(0), "encoder.layers"]
    (_, found), _ = case.model.apply(params, x, train=True, key=KEY, taps=taps)
    attended = found[PLACE.format(0)]
    torch.testing.assert_close(attended.unique(), torch.tensor([0, 1 / 0.7]))
    assert drew((attended == 0).sum(), attended.numel(), 0.3)

    # What is left are the embeddings, dropped, and a constant of two masks.
    tokens = rearrange(found["conv_proj"], "b w h a -> b (h a) w")
    embedded = tokens + params["encoder", "pos_embedding"][:, 1:]
    rest = (found["encoder.layers"] - attended)[:, 1:]
    one = F.gelu(torch.ones(())) / 0.49
    fates = {
        (kept, added): (rest - kept * embedded / 0.7 - added * one).abs() < 1e-5
        for kept in (0, 1)
        for added in (0, 1)
    }
    for (kept, added), fate in fates.items():
        rate = (0.7 if kept else 0.3) * (0.49 if added else 0.51)
        assert drew(fate.sum(), fate.numel(), rate)
    assert torch.stack(list(fates.values())).any(0).all()


def test_attention_dropout_is_of_the_weights():
    model = models.vit(**CONFIG, attention_dropout=0.3)
    params, x = model.init(KEY), random.normal(KEY, (200, 3, 4, 4))
    part = params[(*BLOCK, "self_attention")]
    part["in_proj_weight"] = torch.zeros(18, 6)
    part["in_proj_bias"] = torch.ones(18)  # so the weights are fifths, and the values ones
    part["out_proj", "weight"] = torch.eye(6)
    (_, found), _ = model.apply(params, x, train=True, key=KEY, taps=[PLACE.format(0)])
    heads = rearrange(found[PLACE.format(0)], "b t (heads width) -> (b t heads) width", heads=2)
    torch.testing.assert_close(heads, heads[:, :1].expand_as(heads))
    kept = heads[:, 0] * 0.7 * 5  # how many of five keys
    torch.testing.assert_close(kept, kept.round())
    assert drew(kept.sum(), 5 * len(kept), 0.7)
    # The tap gets the weights before, and changes no draw.
    places = [PLACE.format(0) + ".weights", PLACE.format(0)]
    (_, again), _ = model.apply(params, x, train=True, key=KEY, taps=places)
    torch.testing.assert_close(again[places[0]], torch.full((200, 2, 5, 5), 1 / 5))
    torch.testing.assert_close(again[places[1]], found[places[1]])


@settings(max_examples=6)
@given(st.permutations(range(9)), st.sampled_from(["token", "mean"]), st.integers(0, 99))
def test_without_positions_the_order_of_the_patches_does_not_matter(order, pool, seed):
    model = models.vit(6, 2, 1, 2, 6, 4, pool=pool)
    params = vision("vit", 3, 4, image_size=6, patch_size=2, depth=1, heads=2, width=6,
                    pool=pool).params(random.key(seed))  # fmt: skip
    x = random.normal(random.key(seed), (2, 3, 6, 6), dtype=DTYPE)
    patches = rearrange(x, "b c (h i) (w j) -> b (h w) c i j", i=2, j=2)[:, list(order)]
    moved = rearrange(patches, "b (h w) c i j -> b c (h i) (w j)", h=3)
    before, after = (model.apply(params, images) for images in (x, moved))
    assert (list(order) == sorted(order)) == torch.equal(before, after)
    params["encoder", "pos_embedding"] = torch.zeros_like(params["encoder", "pos_embedding"])
    before, after = (model.apply(params, images) for images in (x, moved))
    torch.testing.assert_close(before, after)


def test_a_pretrained_network_for_larger_images_with_a_new_head():
    params, (x,) = CASE.params(KEY), CASE.inputs(KEY)
    module = CASE.reference(params)
    model = models.vit(**vars(CASE.model.config) | {"num_classes": 2})
    fresh = model.from_torchvision(module, KEY, fresh="heads")
    larger = models.vit(**vars(model.config) | {"image_size": 8})
    x = random.normal(KEY, (2, 3, 8, 8), dtype=DTYPE)
    logits = larger.apply(models.interpolate_positions(fresh, 8), x)
    assert torch.equal(logits, torch.zeros(2, 2, dtype=DTYPE))  # as the head begins


POSITIVE = "expected a positive integer, got 0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 3}, "patch_size: expected a divisor of image_size=4, got 3"),
        ({"heads": 4}, "heads: expected a divisor of width=6, got 4"),
        *[({name: 0}, f"{name}: {POSITIVE}") for name in (*CONFIG, "num_classes", "mlp_width")],
        ({"representation_size": 0}, f"representation_size: {POSITIVE}"),
        ({"in_channels": 0}, f"in_channels: {POSITIVE}"),
        ({"dropout": 1.5}, "dropout: expected a rate between 0 and 1, got 1.5"),
        ({"attention_dropout": -1}, "attention_dropout: expected a rate between 0 and 1, got -1"),
        ({"pool": "max"}, "pool: expected one of 'token', 'mean', got 'max'"),
    ],
)
def test_configs_that_cannot_be(change, message, unchecked):
    with pytest.raises(ValueError, match=re.escape(f"vit: {message}")):
        models.vit(**CONFIG | change)


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (3, 4, 4), (2, 3, 4, 6), (2, 3, 6, 6)])
def test_images_that_do_not_fit(shape, unchecked):
    message = re.escape(f"vit: x: expected [batch, 3, 4, 4], got {list(shape)}")
    params, x = CASE.params(KEY), torch.ones(shape, dtype=DTYPE)
    with pytest.raises(ValueError, match=message), NoArithmetic():
        CASE.model.apply(params, x)

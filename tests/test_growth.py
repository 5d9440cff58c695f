"""Networks grown wider and deeper: the same function before and after, and learning goes on."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, vmap

from funcnets import grow, models, random, tree

KEY = random.key(6)
DTYPE = torch.float64
more = st.integers(0, 4)


def trained(model, key):
    """Parameters of no special values, as after training."""

    def perturb(path, leaf):
        place = random.fold_in(key, sum(map(ord, ".".join(path))))
        noise = random.normal(place, leaf.shape, dtype=DTYPE)
        return noise.square() + 0.5 if path[-1] == "running_var" else leaf + 0.3 * noise

    return tree.map_with_path(perturb, tree.cast(model.init(key), DTYPE))


def check(small, big, shape, seed, train):
    key = random.key(seed)
    params, x = trained(small, key), random.normal(key, shape, dtype=DTYPE)
    before = tree.map(torch.clone, params)
    grown = grow(small, params, big, random.fold_in(key, 1))
    tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0), params, before)
    assert not tree.compare(grown, big.init(key))
    torch.testing.assert_close(big.apply(grown, x), small.apply(params, x), rtol=1e-9, atol=1e-9)
    if train:
        torch.testing.assert_close(
            big.apply(grown, x, train=True)[0],
            small.apply(params, x, train=True)[0],
            rtol=1e-9,
            atol=1e-9,
        )
    return grown


@given(
    st.lists(st.tuples(st.integers(1, 4), more), max_size=3),
    st.lists(more, max_size=2),
    st.sampled_from([None, "batch"]),
    st.booleans(),
    st.integers(0, 99),
)
def test_mlp(layers, added, norm, bias, seed):
    widths = tuple(width for width, _ in layers)
    wider = [width + extra for width, extra in layers]
    wider += [widths[-1] + extra for extra in added] if widths else []
    options = {"norm": norm, "bias": bias}
    small, big = models.mlp(3, 2, widths, **options), models.mlp(3, 2, wider, **options)
    check(small, big, (5, 3), seed, train=norm is None or len(wider) == len(widths))


@given(
    st.lists(st.tuples(st.integers(1, 3), more), min_size=1, max_size=2),
    st.integers(1, 2),
    st.integers(0, 2),
    st.integers(1, 3),
    st.sampled_from([None, "batch"]),
    st.integers(0, 99),
)
def test_cnn(blocks, depth, deeper, dims, norm, seed):
    options = {"dims": dims, "norm": norm}
    small = models.cnn(2, 3, [width for width, _ in blocks], depth=depth, **options)
    widths = [width + extra for width, extra in blocks]
    big = models.cnn(2, 3, widths, depth=depth + deeper, **options)
    check(small, big, (3, 2, *(4,) * dims), seed, train=norm is None or not deeper)


@given(
    st.sampled_from(["basic", "bottleneck"]),
    st.lists(st.tuples(st.integers(1, 2), st.integers(0, 2)), min_size=1, max_size=2),
    st.sampled_from([2, 4, 6]),
    st.booleans(),
    st.sampled_from(["imagenet", "small"]),
    st.integers(0, 99),
)
def test_resnet(block, depths, width, squeeze, stem, seed):
    options = {"stem": stem, "squeeze_excitation": squeeze, "num_classes": 3}
    small = models.resnet(block, [depth for depth, _ in depths], width=2, **options)
    big = models.resnet(block, [d + extra for d, extra in depths], width=width, **options)
    check(small, big, (3, 3, 8, 8), seed, train=True)


def test_a_resnet_of_groups_grows_deeper():
    options = {"groups": 2, "width": 4, "stem": "small", "num_classes": 3}
    small = models.resnet("bottleneck", (1,), **options)
    check(small, models.resnet("bottleneck", (3,), **options), (2, 3, 6, 6), 0, train=True)


def test_copies_part_ways():
    small, big = models.mlp(3, 2, (4, 4)), models.mlp(3, 2, (8, 8))
    grown = check(small, big, (5, 3), 0, train=True)
    x = random.normal(KEY, (5, 3), dtype=DTYPE)
    gradient = grad(lambda p: big.apply(p, x).square().sum())(grown)["0", "weight"]
    distances = torch.cdist(gradient, gradient) + torch.eye(8)
    used = gradient.abs().sum(1) > 0
    assert distances[used][:, used].min() > 1e-6  # no two units learn the same


def test_every_unit_may_be_copied_and_none_is_lost():
    small, big = models.mlp(1, 1, (3,)), models.mlp(1, 1, (9,))
    params = trained(small, KEY)
    weights = vmap(lambda key: grow(small, params, big, key)["0", "weight"])(random.split(KEY, 200))
    old = params["0", "weight"].flatten()
    assert torch.equal(weights[:, :3, 0], old.expand(200, 3))
    shares = torch.stack([(weights[:, 3:, 0] == one).double().mean() for one in old])
    assert (shares - 1 / 3).abs().max() < 5 * (2 / 9 / 1200) ** 0.5


def test_training_goes_on():
    small, big = models.mlp(3, 1, (4,)), models.mlp(3, 1, (8, 8))
    x = random.normal(KEY, (64, 3), dtype=DTYPE)
    y = x.prod(1, keepdim=True)
    params = grow(small, trained(small, KEY), big, KEY)

    def loss(params):
        return (big.apply(params, x) - y).square().mean()

    first = loss(params)
    for _ in range(50):
        params = tree.map(lambda p, g: p - 0.02 * g, params, grad(loss)(params))
    assert loss(params) < 0.8 * first


MLP, CNN = models.mlp(3, 2, (4, 4)), models.cnn(1, 2, (4, 4))
RESNET = models.resnet("basic", (1, 1), 2, width=4)
WIDE = {"groups": 2, "width_per_group": 32, "num_classes": 2}


@pytest.mark.parametrize(
    ("small", "big", "message"),
    [
        (MLP, CNN, "grow: expected two models of one family among mlp, cnn, resnet, got mlp and"),
        (models.lenet(), models.lenet(), "grow: expected two models of one family among"),
        (MLP, models.mlp(3, 2, (4, 3)), "grow: mlp: widths[1]: expected 4 units or more, got 3"),
        (MLP, models.mlp(3, 2, (4,)), "grow: mlp: widths: expected as many or more, got (4,)"),
        (MLP, models.mlp(3, 5, (4, 4)), "grow: mlp: out_features: expected 2 as before, got 5"),
        (
            models.mlp(3, 2, ()),
            models.mlp(3, 2, (4,)),
            "grow: mlp: widths: expected a hidden layer to add others to, got none",
        ),
        (
            models.mlp(3, 2, (4,), activation="gelu"),
            models.mlp(3, 2, (4, 4), activation="gelu"),
            "grow: mlp: activation: expected one of 'relu', 'identity' to add layers, got 'gelu'",
        ),
        (
            models.mlp(3, 2, (4,), norm="layer"),
            models.mlp(3, 2, (4, 4), norm="layer"),
            "grow: mlp: norm: expected one of None, 'batch' to add layers, got 'layer'",
        ),
        (
            models.mlp(3, 2, (4,), norm="layer"),
            models.mlp(3, 2, (8,), norm="layer"),
            "grow: mlp: norm: expected one of None, 'batch' to widen, got 'layer'",
        ),
        (CNN, models.cnn(1, 2, (4, 4, 4)), "grow: cnn: widths: expected 2 blocks, got 3"),
        (
            models.cnn(1, 2, (4,), depth=2),
            models.cnn(1, 2, (4,)),
            "grow: cnn: depth: expected 2 or more, got 1",
        ),
        (
            models.cnn(1, 2, (8,), norm="group"),
            models.cnn(1, 2, (16,), norm="group"),
            "grow: cnn: norm: expected one of None, 'batch' to widen, got 'group'",
        ),
        (
            RESNET,
            models.resnet("basic", (1,), 2, width=4),
            "grow: resnet: depths: expected (1, 1) or more, got (1,)",
        ),
        (
            RESNET,
            models.resnet("basic", (1, 1), 2, width=3),
            "grow: resnet: stem: expected 4 units or more, got 3",
        ),
        (
            models.resnet("bottleneck", (1,), width=4, **WIDE),
            models.resnet("bottleneck", (1,), width=8, **WIDE),
            "grow: resnet: width: expected 4 as before, for there are 2 groups, got 8",
        ),
    ],
)
def test_what_is_no_growth(small, big, message):
    params = small.init(random.key(0))
    with pytest.raises(ValueError, match=re.escape(message)):
        grow(small, params, big, KEY)


def test_parameters_of_another_model():
    with pytest.raises(ValueError, match=r"0\.weight: expected \[4, 3\], got \[7, 3\]"):
        grow(MLP, models.mlp(3, 2, (7, 4)).init(KEY), MLP, KEY)

"""Mixup, CutMix and random erasing: targets follow the pixels, and the laws are torchvision's."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch.func import vmap
from torchvision.transforms import v2

from funcnets import data, random
from funcnets.data.mix import beta

SEEDS = st.integers(0, 999)
ALPHAS = st.sampled_from([0.05, 0.2, 1.0, 3.0])


def alike(ours, theirs):
    """Two samples of one distribution, by the test of Kolmogorov and Smirnov."""
    assert stats.ks_2samp(ours.numpy(), theirs.numpy()).pvalue > 1e-4


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_beta(alpha):
    keys = random.split(random.key(0), 40_000)
    drawn = vmap(lambda key: beta(key, alpha))(keys)
    assert ((drawn >= 0) & (drawn <= 1)).all()
    assert stats.kstest(drawn.numpy(), stats.beta(alpha, alpha).cdf).pvalue > 1e-4
    alphas = torch.full((40_000,), alpha, dtype=torch.float64)
    assert torch.equal(vmap(beta)(keys, alphas), drawn)


@given(st.integers(1, 5), ALPHAS, SEEDS)
def test_mixup_mixes_targets_as_samples(batch, alpha, seed):
    labels = torch.arange(batch)
    x = torch.eye(batch, dtype=torch.float64)  # the sample is its label
    mixed, shares = data.mixup(random.key(seed), x, labels, alpha, classes=batch)
    torch.testing.assert_close(mixed, shares)
    torch.testing.assert_close(shares.sum(1), torch.ones(batch, dtype=torch.float64))
    torch.testing.assert_close(shares.sum(0), torch.ones(batch, dtype=torch.float64))
    again, same = data.mixup(random.key(seed), x, x, alpha)  # shares as they are
    torch.testing.assert_close(again, same)
    torch.testing.assert_close(again, mixed)


@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), ALPHAS, SEEDS)
def test_the_share_of_a_label_is_that_of_the_pixels(batch, height, width, alpha, seed):
    labels = torch.arange(batch)
    images = labels.double()[:, None, None, None].expand(batch, 2, height, width)
    mixed, shares = data.cutmix(random.key(seed), images, labels, alpha, classes=batch)
    for i in range(batch):
        pixels = torch.stack([(mixed[i] == label).double().mean() for label in labels])
        torch.testing.assert_close(shares[i], pixels)
    # What differs is one box.
    changed = (mixed != images).any(1)
    for one in changed:
        rows, columns = one.any(1), one.any(0)
        assert torch.equal(one, rows[:, None] & columns)
        for line in (rows, columns):
            places = line.nonzero().flatten()
            assert len(places) == 0 or len(places) == places[-1] - places[0] + 1


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_shares_are_distributed_as_torchvisions(kind, alpha):
    transform = {"mixup": v2.MixUp, "cutmix": v2.CutMix}[kind](alpha=alpha, num_classes=2)
    images, labels, count = torch.zeros(2, 1, 16, 12), torch.tensor([0, 1]), 1500
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = torch.stack([transform(images, labels)[1][0, 0] for _ in range(count)])
    ours = getattr(data, kind)

    def share(key):
        # A batch of two whose others are themselves counts for nothing.
        return ours(key, images, labels, alpha, classes=2)[1][0, 0]

    keys = random.split(random.key(1), 3 * count)
    found = vmap(share)(keys)
    # Half of the orders leave each where it is: of the others torchvision's shares.
    moved = vmap(lambda key: random.permutation(random.split(key, _keys(kind))[1], 2)[0])(keys) == 1
    alike(found[moved], theirs)


def _keys(kind):
    return {"mixup": 2, "cutmix": 4}[kind]


@given(st.integers(1, 4), st.integers(1, 12), st.integers(1, 12), SEEDS)
def test_erased_is_a_box_of_each_image(batch, height, width, seed):
    images = torch.ones(batch, 2, height, width)
    erased = data.random_erasing(random.key(seed), images, p=1.0, value=0.5)
    assert (erased[:, 0] == erased[:, 1]).all()
    assert set(erased.unique().tolist()) <= {0.5, 1.0}
    for one in erased[:, 0] != 1:
        assert torch.equal(one, one.any(1)[:, None] & one.any(0))
    assert torch.equal(data.random_erasing(random.key(seed), images, p=0.0), images)


def test_erased_areas_are_distributed_as_torchvisions():
    count, images = 4000, torch.ones(1, 1, 20, 14)
    transform = v2.RandomErasing(p=0.7)

    def measure(erased):  # area, height, and where
        gone = erased[..., 0, :, :] == 0
        return gone.sum((-2, -1)), gone.any(-1).sum(-1), gone[:, 3, 2], gone[:, -1].any(-1)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = measure(torch.cat([transform(images.clone()) for _ in range(count)]))
    ours = measure(data.random_erasing(random.key(0), images.expand(5 * count, 1, 20, 14), p=0.7))
    for one, other in zip(ours, theirs, strict=True):
        alike(one.double(), other.double())


def test_erased_by_noise():
    images = torch.full((50, 1, 16, 16), 100.0)
    erased = data.random_erasing(random.key(0), images, p=1.0, value="random")
    noise = erased[erased != 100]
    assert abs(noise.mean()) < 0.1
    assert abs(noise.std() - 1) < 0.1


AUGMENTATIONS = {
    "mixup": lambda key, x, alpha: data.mixup(key, x, torch.arange(3), alpha, classes=3),
    "cutmix": lambda key, x, alpha: data.cutmix(key, x, torch.arange(3), alpha, classes=3),
    "erasing": lambda key, x, p: (data.random_erasing(key, x, p),),
}


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_vmap_is_a_loop(name):
    keys, rates = random.split(random.key(0), 3), torch.tensor([0.2, 0.9, 1.0])
    images = random.uniform(random.key(1), (3, 3, 1, 6, 5))
    together = vmap(AUGMENTATIONS[name])(keys, images, rates)
    for i in range(3):
        alone = AUGMENTATIONS[name](keys[i], images[i], rates[i])
        for one, other in zip(together, alone, strict=True):
            torch.testing.assert_close(one[i], other)


@pytest.mark.dynamo
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_compiled(name):
    images = random.uniform(random.key(1), (3, 1, 6, 5))
    compiled = torch.compile(AUGMENTATIONS[name], fullgraph=True, backend="aot_eager")
    found = compiled(random.key(0), images, 0.5)
    for one, other in zip(found, AUGMENTATIONS[name](random.key(0), images, 0.5), strict=True):
        torch.testing.assert_close(one, other)


IMAGES = torch.zeros(2, 1, 4, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda key: data.mixup(key, IMAGES, torch.arange(3), classes=3),
            "mixup: targets: expecte",
        ),
        (
            lambda key: data.mixup(key, IMAGES, torch.arange(2)),
            "labels [batch] and the number of c",
        ),
        (
            lambda key: data.mixup(key, IMAGES, torch.tensor([0, 2]), classes=2),
            "mixup: targets: expected labels from 0 to 1, got 0 to 2",
        ),
        (
            lambda key: data.mixup(key, torch.arange(2), torch.arange(2), classes=2),
            "mixup: samples: expected a floating dtype, got int64[2]",
        ),
        (
            lambda key: data.cutmix(key, IMAGES.byte(), torch.arange(2), classes=2),
            "cutmix: samples: expected a floating dtype, got uint8",
        ),
        (
            lambda key: data.cutmix(key, IMAGES, torch.arange(2), alpha=0, classes=2),
            "alpha: expected more than 0, got 0",
        ),
        (
            lambda key: data.cutmix(key, IMAGES[0], torch.arange(2)),
            "cutmix: images: expected [batc",
        ),
        (
            lambda key: data.random_erasing(key, IMAGES[0]),
            "random_erasing: images: expected [batch",
        ),
        (
            lambda key: data.random_erasing(key, IMAGES, 1.5),
            "random_erasing: p: expected a rate be",
        ),
        (lambda key: data.random_erasing(key, IMAGES, scale=(0.5, 0.1)), "scale: expected two sha"),
        (lambda key: data.random_erasing(key, IMAGES, ratio=(0.0, 1.0)), "ratio: expected two rat"),
    ],
)
def test_errors(call, message, unchecked):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(random.key(0))

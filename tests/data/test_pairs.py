"""Samplers: what they draw is of the right kind, all of it is drawn, and the key decides."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap

from funcnets import data, random

SEEDS = st.integers(0, 999)
label_lists = st.lists(st.sampled_from([-3, 0, 1, 7]), min_size=3, max_size=12)
drawable = label_lists.filter(
    lambda labels: len(set(labels)) > 1 and len(labels) > len(set(labels))
).map(torch.tensor)


def alike(shares, expected):
    """Shares of 2000 draws, within five standard errors."""
    assert set(shares) == set(expected)
    for name, share in expected.items():
        assert abs(shares[name] - share) < 5 * (share * (1 - share) / 2000) ** 0.5 + 1e-9


def shares(values):
    found, count = torch.tensor(values).unique(return_counts=True)
    return dict(zip(found.tolist(), (count / len(values)).tolist(), strict=True))


@given(drawable, SEEDS)
def test_triplets_are_triplets(labels, seed):
    anchor, positive, negative = data.triplets(random.key(seed), data.group(labels), 200)
    assert anchor.shape == positive.shape == negative.shape == (200,)
    assert (labels[anchor] == labels[positive]).all()
    assert (anchor != positive).all()
    assert (labels[anchor] != labels[negative]).all()


def test_triplets_are_drawn_uniformly():
    labels = torch.tensor([2, 0, 1, 0, 2, 0])  # one sample of class 1, three of 0, two of 2
    drawn = data.triplets(random.key(0), data.group(labels), 2000)
    anchor, positive, negative = (column.tolist() for column in drawn)
    sixth, quarter = 1 / 6, 1 / 4
    expected = {1: sixth, 3: sixth, 5: sixth, 0: quarter, 4: quarter}
    alike(shares(anchor), expected)
    alike(shares(positive), expected)
    first = [i for i, a in enumerate(anchor) if labels[a] == 0]
    alike(shares([positive[i] for i in first if anchor[i] == 1]), {3: 0.5, 5: 0.5})
    alike(shares([negative[i] for i in first]), {0: 1 / 3, 2: 1 / 3, 4: 1 / 3})
    others = [negative[i] for i in range(2000) if labels[anchor[i]] == 2]
    alike(shares(others), {1: quarter, 2: quarter, 3: quarter, 5: quarter})


@given(drawable, SEEDS, st.sampled_from([0.0, 0.5, 1.0]))
def test_pairs(labels, seed, similar):
    first, second, same = data.pairs(random.key(seed), data.group(labels), 200, similar)
    assert ((labels[first] == labels[second]) == same).all()
    assert (first != second).all()
    assert abs(same.double().mean() - similar) <= 5 * (similar * (1 - similar) / 200) ** 0.5


def test_half_of_the_pairs_are_similar():
    groups = data.group(torch.tensor([0, 0, 1, 1]))
    same = data.pairs(random.key(0), groups, 2000)[2].double().mean()
    assert abs(same - 0.5) < 5 * (0.25 / 2000) ** 0.5


@given(st.integers(2, 4), st.lists(st.integers(0, 2), min_size=1, max_size=4), SEEDS, st.data())
def test_balanced_batches(least, more, seed, draws):
    counts = [least + extra for extra in more]
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate(counts)])
    labels = labels[random.permutation(random.key(seed), len(labels))]
    classes = draws.draw(st.integers(1, len(counts)))
    samples = draws.draw(st.integers(1, least))
    batch = data.balanced(random.key(seed), data.group(labels), classes, samples)
    assert batch.shape == (classes, samples)
    assert len(batch.unique()) == classes * samples
    assert (labels[batch] == labels[batch[:, :1]]).all()
    assert len(labels[batch[:, 0]].unique()) == classes


def test_balanced_batches_are_drawn_uniformly():
    labels = torch.tensor([0, 0, 1, 1, 1])
    groups = data.group(labels)
    keys = random.split(random.key(0), 2000)
    batches = vmap(lambda key: data.balanced(key, groups, 1, 2))(keys)[:, 0]
    third, half = 1 / 3, 1 / 2
    assert shares(labels[batches[:, 0]].tolist()).keys() == {0, 1}
    for first, expected in ((0, {0: half, 1: half}), (1, {2: third, 3: third, 4: third})):
        chosen = batches[labels[batches[:, 0]] == first]
        for name, share in expected.items():
            found = (chosen[:, 0] == name).double().mean()
            assert abs(found - share) < 5 * (share * (1 - share) / len(chosen)) ** 0.5


@given(
    st.lists(st.tuples(st.integers(2, 4), st.integers(1, 3)), min_size=1, max_size=3),
    SEEDS,
)
def test_forgeries(counts, seed):
    persons = torch.cat(
        [torch.full((real + fake,), 3 * i) for i, (real, fake) in enumerate(counts)]
    )
    forged = torch.cat([torch.arange(real + fake) >= real for real, fake in counts])
    order = random.permutation(random.key(seed), len(persons))
    persons, forged = persons[order], forged[order]
    signatures = data.group_forgeries(persons, forged)
    anchor, positive, negative = data.forgery_triplets(random.key(seed), signatures, 600)
    assert (persons[anchor] == persons[positive]).all()
    assert (persons[anchor] == persons[negative]).all()
    assert not forged[anchor].any()
    assert not forged[positive].any()
    assert forged[negative].all()
    assert (anchor != positive).all()
    # Nothing is left out: 1 / 36 at least is each one's share.
    assert set(anchor.tolist()) == set(positive.tolist()) == set((~forged).nonzero()[:, 0].tolist())
    assert set(negative.tolist()) == set(forged.nonzero()[:, 0].tolist())


LABELS = torch.tensor([0, 1, 0, 1, 2, 2, 2])
GROUPS = data.group(LABELS)


def samplers():
    forged = torch.tensor([False, False, True])
    signatures = data.group_forgeries(torch.tensor([0, 0, 0, 1, 1, 1]), torch.cat([forged, forged]))
    return {
        "triplets": lambda key: data.triplets(key, GROUPS, 5),
        "pairs": lambda key: data.pairs(key, GROUPS, 5),
        "balanced": lambda key: (data.balanced(key, GROUPS, 2, 2),),
        "forgeries": lambda key: data.forgery_triplets(key, signatures, 5),
    }


@pytest.mark.parametrize("name", samplers())
def test_the_key_decides(name):
    sampler = samplers()[name]
    keys = random.split(random.key(0), 4)
    together = vmap(sampler)(keys)
    for i, key in enumerate(keys.unbind()):
        for drawn, again in zip(together, sampler(key), strict=True):
            assert torch.equal(drawn[i], again)
    assert any(not torch.equal(column[0], column[1]) for column in together)


@pytest.mark.dynamo
@pytest.mark.parametrize("name", samplers())
def test_compiled(name):
    sampler = samplers()[name]
    compiled = torch.compile(sampler, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        for drawn, again in zip(compiled(random.key(seed)), sampler(random.key(seed)), strict=True):
            assert torch.equal(drawn, again)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: data.group(torch.ones(3)), "group: labels: expected integers [samples], got f"),
        (lambda: data.group(torch.ones(0).long()), "expected integers [samples], got int64[0]"),
        (
            lambda: data.triplets(random.key(0), data.group(torch.arange(3)), 4),
            "triplets: expected two or more classes, one of them with two or more samples, got 3",
        ),
        (
            lambda: data.pairs(random.key(0), data.group(torch.zeros(3).long()), 4),
            "got 1 of at most 3 samples",
        ),
        (
            lambda: data.pairs(random.key(0), data.group(torch.arange(3)), 4),
            "pairs: expected two or more classes, one of them with two or more samples, got 3",
        ),
        (
            lambda: data.pairs(random.key(0), GROUPS, 4, 1.5),
            "pairs: similar: expected a rate between 0 and 1, got 1.5",
        ),
        (
            lambda: data.balanced(random.key(0), GROUPS, 4, 2),
            "balanced: classes: expected 1 to 3, got 4",
        ),
        (
            lambda: data.balanced(random.key(0), GROUPS, 2, 3),
            "balanced: samples: expected 1 to 2 (the smallest class), got 3",
        ),
        (
            lambda: data.group_forgeries(torch.ones(2).long(), torch.ones(3).bool()),
            "expected persons [samples] and forged [samples], at least one, got int64[2]",
        ),
        (
            lambda: data.group_forgeries(
                torch.tensor([4, 4, 4, 5]), torch.tensor([False, False, True, True])
            ),
            "person 5: expected two or more genuine samples and one or more forged, got 0 and 1",
        ),
    ],
)
def test_errors(call, message, unchecked):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()

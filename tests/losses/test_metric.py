"""Losses of embeddings against torch and against loops over single pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, vmap

from funcnets import losses, random

SEEDS = st.integers(0, 999)


def rows(seed, *shape):
    return random.normal(random.key(seed), shape, dtype=torch.float64)


def labels_of(seed, batch, classes):
    return random.randint(random.fold_in(random.key(seed), 1), (batch,), 0, classes)


@given(seed=SEEDS, n=st.integers(1, 5), m=st.integers(1, 5), features=st.integers(1, 4))
def test_pairwise_distances(seed, n, m, features):
    x, y = rows(seed, n, features), rows(seed + 1, m, features)
    torch.testing.assert_close(losses.pairwise_distances(x, y), torch.cdist(x, y))


def test_distance_of_equal_rows_is_exactly_zero_and_has_a_gradient():
    x = 1e4 + rows(0, 3, 5)
    assert (losses.pairwise_distances(x, x).diagonal() == 0).all()
    gradient = grad(lambda x: losses.pairwise_distances(x, x).sum())(x)
    assert gradient.isfinite().all()
    y = x.clone()
    assert (grad(lambda x: losses.pairwise_distances(x, y).diagonal().sum())(x) == 0).all()


@given(
    seed=SEEDS,
    batch=st.integers(1, 6),
    features=st.integers(1, 4),
    margin=st.sampled_from([0.5, 2.0, 5.0]),
)
def test_contrastive_by_hand(seed, batch, features, margin):
    x, y = rows(seed, batch, features), rows(seed + 1, batch, features)
    similar = labels_of(seed, batch, 2)
    distances = np.linalg.norm((x - y).numpy(), axis=1)
    expected = np.mean(
        [d**2 if s else max(0, margin - d) ** 2 for d, s in zip(distances, similar, strict=True)]
    )
    found = losses.contrastive(x, y, similar, margin)
    np.testing.assert_allclose(float(found), expected, rtol=1e-12)
    torch.testing.assert_close(losses.contrastive(x, y, similar.bool(), margin), found)
    if margin == 2.0:
        torch.testing.assert_close(losses.contrastive(x, y, similar), found)


def test_contrastive_of_equal_embeddings():
    x = rows(0, 2, 3)
    similar = torch.tensor([1, 0])
    assert losses.contrastive(x, x, similar) == 2.0  # (0 + 2 ** 2) / 2
    assert (grad(losses.contrastive)(x, x, similar) == 0).all()
    torch.testing.assert_close(
        losses.contrastive(x, 0 * x, torch.tensor([0.25, 0.25])),
        0.25 * losses.contrastive(x, 0 * x, torch.ones(2))
        + 0.75 * losses.contrastive(x, 0 * x, torch.zeros(2)),
    )


@given(
    seed=SEEDS,
    batch=st.integers(1, 5),
    features=st.integers(1, 4),
    margin=st.sampled_from([0.2, 1.0]),
    p=st.sampled_from([1.0, 2.0, 3.0, math.inf]),
    swap=st.booleans(),
)
def test_triplet_margin_is_torchs(seed, batch, features, margin, p, swap):
    x = [rows(seed + i, batch, features) for i in range(3)]
    found = losses.triplet_margin(*x, margin, p, swap)
    expected = F.triplet_margin_loss(*x, margin=margin, p=p, swap=swap)
    torch.testing.assert_close(found, expected)
    where = labels_of(seed, batch, 2).bool()
    each = F.triplet_margin_loss(*x, margin=margin, p=p, swap=swap, reduction="none")
    expected = each[where].mean() if where.any() else torch.zeros((), dtype=torch.float64)
    found = losses.triplet_margin(*x, margin, p, swap, where=where)
    torch.testing.assert_close(found, expected)
    # What is left out has no gradient.
    gradient = grad(lambda a: losses.triplet_margin(a, x[1], x[2], margin, p, swap, where=where))(
        x[0]
    )
    assert (gradient[~where] == 0).all()


@given(seed=st.integers(0, 99), swap=st.booleans())
def test_triplets_that_are_left_out_have_no_gradient_whatever_they_are(seed, swap):
    x = random.normal(random.key(seed), (3, 5, 4), dtype=torch.float64)
    counts = random.uniform(random.key(seed + 1), (5,)) < 0.5
    spoilt = torch.where(counts[:, None], x, torch.nan)

    def f(x, where):
        return losses.triplet_margin(*x, swap=swap, where=where)

    value, slope = f(spoilt, counts), grad(f)(spoilt, counts)
    assert torch.equal(value, f(x, counts))
    assert torch.equal(slope, grad(f)(x, counts))
    assert not slope[:, ~counts].any()


def test_triplet_margin_defaults_and_eps():
    x = [rows(i, 4, 3) for i in range(3)]
    torch.testing.assert_close(losses.triplet_margin(*x), F.triplet_margin_loss(*x))
    found = losses.triplet_margin(*x, eps=0.5)
    torch.testing.assert_close(found, F.triplet_margin_loss(*x, eps=0.5))


batches = given(
    seed=SEEDS, batch=st.integers(1, 7), features=st.integers(1, 3), classes=st.integers(1, 4)
)


@batches
def test_batch_hard_by_hand(seed, batch, features, classes):
    x, labels = rows(seed, batch, features), labels_of(seed, batch, classes)
    distance = torch.cdist(x, x)
    found = losses.batch_hard(x, labels)
    assert found.anchor.tolist() == list(range(batch))
    for a, p, n, valid in zip(*(column.tolist() for column in found), strict=True):
        positives = [i for i in range(batch) if i != a and labels[i] == labels[a]]
        negatives = [i for i in range(batch) if labels[i] != labels[a]]
        assert valid == bool(positives and negatives)
        if valid:
            assert p == max(positives, key=lambda i: distance[a, i])
            assert n == min(negatives, key=lambda i: distance[a, i])


@batches
def test_semi_hard_by_hand(seed, batch, features, classes):
    x, labels = rows(seed, batch, features), labels_of(seed, batch, classes)
    distance = torch.cdist(x, x)
    found = losses.semi_hard(x, labels)
    held = {
        (a, p): n
        for a, p, n, valid in zip(*(column.tolist() for column in found), strict=True)
        if valid
    }
    expected = {}
    for a in range(batch):
        for p in range(batch):
            negatives = [i for i in range(batch) if labels[i] != labels[a]]
            if p == a or labels[p] != labels[a] or not negatives:
                continue
            beyond = [i for i in negatives if distance[a, i] > distance[a, p]]
            expected[a, p] = (
                min(beyond, key=lambda i: distance[a, i])
                if beyond
                else max(negatives, key=lambda i: distance[a, i])
            )
    assert held == expected
    assert len(found.valid) == batch**2


@pytest.mark.parametrize("mine", [losses.batch_hard, losses.semi_hard])
def test_mined_triplets_under_vmap_and_grad(mine):
    x, labels = rows(0, 4, 6, 3), torch.tensor([0, 0, 1, 1, 2, 2])

    def loss(x, labels):
        t = mine(x, labels)
        return losses.triplet_margin(x[t.anchor], x[t.positive], x[t.negative], where=t.valid)

    together = vmap(grad(loss), in_dims=(0, None))(x, labels)
    for member, gradient in zip(x, together, strict=True):
        torch.testing.assert_close(gradient, grad(loss)(member, labels))
        t = mine(member, labels)
        chosen = [member[i[t.valid]] for i in (t.anchor, t.positive, t.negative)]
        torch.testing.assert_close(loss(member, labels), F.triplet_margin_loss(*chosen))
    shuffled = vmap(loss)(x, torch.stack([labels, labels + 5, labels.flip(0), -labels]))
    torch.testing.assert_close(shuffled, torch.stack([loss(member, labels) for member in x]))


@given(
    seed=SEEDS,
    batch=st.integers(1, 5),
    features=st.integers(1, 4),
    temperature=st.sampled_from([0.05, 1.0]),
    symmetric=st.booleans(),
)
def test_info_nce_is_a_cross_entropy(seed, batch, features, temperature, symmetric):
    x, y = rows(seed, batch, features), rows(seed + 1, batch, features)
    cosines = F.cosine_similarity(x[:, None], y[None], dim=-1)
    places = torch.arange(batch)
    expected = F.cross_entropy(cosines / temperature, places)
    if symmetric:
        expected = (expected + F.cross_entropy(cosines.T / temperature, places)) / 2
    found = losses.info_nce(x, y, temperature, symmetric)
    torch.testing.assert_close(found, expected)
    # Lengths are of no account.
    torch.testing.assert_close(losses.info_nce(3 * x, 0.2 * y, temperature, symmetric), found)


@batches
def test_supervised_contrastive_by_hand(seed, batch, features, classes):
    x, labels = rows(seed, batch, features), labels_of(seed, batch, classes)
    cosines = F.cosine_similarity(x[:, None], x[None], dim=-1).numpy() / 0.2
    terms = []
    for a in range(batch):
        others = sum(np.exp(cosines[a, n]) for n in range(batch) if labels[n] != labels[a])
        for p in range(batch):
            if p != a and labels[p] == labels[a]:
                terms.append(np.log(1 + others / np.exp(cosines[a, p])))
    found = losses.supervised_contrastive(x, labels, 0.2)
    np.testing.assert_allclose(float(found), np.mean(terms) if terms else 0, rtol=1e-9, atol=1e-12)
    gradient = grad(losses.supervised_contrastive)(x, labels, 0.2)
    assert gradient.isfinite().all()


def test_supervised_contrastive_by_another_similarity():
    x, labels = rows(0, 5, 3), torch.tensor([0, 1, 0, 2, 1])
    cosines = lambda x, y: F.cosine_similarity(x[:, None], y[None], dim=-1)  # noqa: E731
    found = losses.supervised_contrastive(x, labels, 0.2, cosines)
    torch.testing.assert_close(found, losses.supervised_contrastive(x, labels, 0.2))
    farther = losses.supervised_contrastive(x, labels, 0.2, lambda x, y: -cosines(x, y))
    assert not torch.isclose(found, farther)
    with pytest.raises(ValueError, match=r"similarity: expected \[5, 5\], got \[\]"):
        losses.supervised_contrastive(x, labels, 0.2, lambda x, y: x.sum())


def test_supervised_contrastive_counts_all_other_views():
    x, y = rows(0, 5, 3), rows(1, 5, 3)
    labels = torch.arange(5)
    found = losses.supervised_contrastive(torch.cat([x, y]), torch.cat([labels, labels]))
    # Of the other views, too, each sample has to be told apart: info_nce is below.
    assert found > losses.info_nce(x, y, symmetric=True)
    only_two = losses.supervised_contrastive(torch.cat([x[:1], y[:1]]), torch.zeros(2).long())
    assert only_two == 0


@given(
    seed=SEEDS,
    support=st.integers(1, 6),
    queries=st.integers(1, 4),
    features=st.integers(1, 3),
    classes=st.integers(1, 4),
)
def test_prototypical_by_hand(seed, support, queries, features, classes):
    x, q = rows(seed, support, features), rows(seed + 1, queries, features)
    labels = labels_of(seed, support, classes)
    logits = losses.prototypical_logits(x, labels, q, classes)
    for c in range(classes):
        if (labels == c).any():
            expected = -(q - x[labels == c].mean(0)).square().sum(1)
            torch.testing.assert_close(logits[:, c], expected)
        else:
            assert (logits[:, c] == -math.inf).all()
    present = labels[random.randint(random.key(seed), (queries,), 0, support)]
    found = losses.prototypical(x, labels, q, present, classes)
    torch.testing.assert_close(found, F.cross_entropy(logits, present))
    gradient = grad(losses.prototypical)(x, labels, q, present, classes)
    assert gradient.isfinite().all()


def calls():
    x, labels = rows(0, 4, 3), torch.tensor([0, 0, 1, 1])
    return {
        "contrastive": lambda x: losses.contrastive(x, x.flip(0), labels),
        "triplet_margin": lambda x: losses.triplet_margin(
            x, x.flip(0), x.roll(1, 0), 1.0, 1.0, True
        ),
        "batch_hard": lambda x: x[losses.batch_hard(x, labels).negative].sum(),
        "semi_hard": lambda x: x[losses.semi_hard(x, labels).negative].sum(),
        "info_nce": lambda x: losses.info_nce(x, x.flip(0), 0.1, True),
        "supervised_contrastive": lambda x: losses.supervised_contrastive(x, labels),
        "prototypical": lambda x: losses.prototypical(x, labels, x.flip(0), labels, 2),
    }, x


@pytest.mark.parametrize("name", calls()[0])
def test_members_at_once_are_members_alone(name):
    function, x = calls()[0][name], rows(1, 3, 4, 3)
    together = vmap(grad(function))(x)
    torch.testing.assert_close(together, torch.stack([grad(function)(member) for member in x]))


@pytest.mark.dynamo
@pytest.mark.parametrize("name", calls()[0])
def test_compiled(name):
    function, x = calls()[0][name], rows(0, 4, 3)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), function(x))


X = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: losses.contrastive(X, X[:3], torch.ones(4)),
            r"contrastive: expected equal shapes \[batch, features\], "
            r"got first float32\[4, 3\], second float32\[3, 3\]",
        ),
        (
            lambda: losses.contrastive(X, X, torch.ones(3)),
            r"contrastive: similar: expected \[4\] \(as the pairs\), got \[3\]",
        ),
        (lambda: losses.info_nce(X[:0], X[:0]), r"info_nce: expected equal shapes"),
        (
            lambda: losses.triplet_margin(X, X, X, where=torch.ones(3, dtype=torch.bool)),
            r"triplet_margin: where: expected \[4\] \(as the triplets\), got \[3\]",
        ),
        (lambda: losses.triplet_margin(X, X, X[0]), r"triplet_margin: .* negative float32\[3\]"),
        (
            lambda: losses.batch_hard(X, torch.ones(3, dtype=torch.int64)),
            r"batch_hard: expected embeddings \[batch, features\] and labels \[batch\], "
            r"got float32\[4, 3\] and int64\[3\]",
        ),
        (
            lambda: losses.pairwise_distances(X, X[:, :2]),
            r"pairwise_distances: .* got float32\[4, 3\] and float32\[4, 2\]",
        ),
        (
            lambda: losses.prototypical(X, torch.zeros(3).long(), X, torch.zeros(4).long(), 2),
            r"prototypical: labels: expected \[4\] \(as support\), got \[3\]",
        ),
        (
            lambda: losses.prototypical(X, torch.zeros(4).long(), X, torch.zeros(3).long(), 2),
            r"prototypical: query_labels: expected \[4\] \(as queries\), got \[3\]",
        ),
        (
            lambda: losses.contrastive(X.long(), X.long(), torch.ones(4)),
            r"contrastive: expected floats of one dtype, got first int64\[4, 3\], second int64",
        ),
        (
            lambda: losses.info_nce(X, X.double()),
            r"info_nce: expected floats of one dtype, got queries float32.*, keys float64\[4, 3\]",
        ),
        (
            lambda: losses.prototypical_logits(X, torch.zeros(4), X, 2),
            r"prototypical: labels: expected integers, got float32\[4\]",
        ),
        (
            lambda: losses.prototypical_logits(X, torch.zeros(4).long(), X, 0),
            "prototypical: classes: expected at least 1, got 0",
        ),
        (
            lambda: losses.prototypical_logits(X, torch.zeros(4).long(), X[:, :2], 2),
            r"prototypical: expected support .* got float32\[4, 3\] and float32\[4, 2\]",
        ),
    ],
)
def test_errors(call, message, unchecked):
    with pytest.raises(ValueError, match=message):
        call()

"""A gradient for each sample: as one backward pass for each, and what is made of them."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from funcnets import grad, models, per_sample, random, tree

MODEL = models.mlp(3, 2, (5,))
PARAMS = tree.cast(MODEL.init(random.key(0)), torch.float64)
CHUNKS = st.sampled_from([None, 1, 2, 3, 100])


def batch(seed, count):
    x = random.normal(random.key(seed), (count, 3), dtype=torch.float64)
    return x, (x.sum(1) > 0).long()


def loss(params, batch):
    return F.cross_entropy(MODEL.apply(params, batch[0]), batch[1])


def one_by_one(samples):
    x, y = samples
    each = [grad(loss)(PARAMS, (x[i : i + 1], y[i : i + 1])) for i in range(len(x))]
    return torch.stack([torch.cat([leaf.flatten() for leaf in tree.leaves(g)]) for g in each])


@given(st.integers(1, 6), CHUNKS)
def test_gradients_and_norms(count, chunk):
    samples = batch(1, count)
    found = per_sample.gradients(loss, PARAMS, samples, chunk)
    assert found.batch_size == (count,)
    flat = torch.cat([leaf.flatten(1) for leaf in tree.leaves(found)], 1)
    expected = one_by_one(samples)
    torch.testing.assert_close(flat, expected)
    norms = per_sample.norms(loss, PARAMS, samples, chunk)
    torch.testing.assert_close(norms, expected.norm(dim=1))
    whole = torch.cat([leaf.flatten() for leaf in tree.leaves(grad(loss)(PARAMS, samples))])
    torch.testing.assert_close(flat.mean(0), whole)


@given(st.integers(2, 6), CHUNKS)
def test_noise_scale(count, chunk):
    samples = batch(2, count)
    found = per_sample.noise_scale(loss, PARAMS, samples, chunk)
    g = one_by_one(samples)
    trace = g.var(0).sum()
    torch.testing.assert_close(found.trace, trace)
    torch.testing.assert_close(found.square, g.mean(0).square().sum() - trace / count)
    expected = trace / found.square if found.square > 0 else torch.tensor(float("inf"))
    torch.testing.assert_close(found.scale, expected.double())


def test_the_noise_that_was_put_in():
    """Gradients are normal numbers of mean 1 and variance 4, in 3 dimensions."""
    x = 1 + 2 * random.normal(random.key(0), (20_000, 3), dtype=torch.float64)
    dot = lambda params, x: (x @ params["w"]).mean()  # noqa: E731
    found = per_sample.noise_scale(dot, {"w": torch.zeros(3).double()}, x, chunk=4096)
    assert abs(found.trace - 12) < 0.3
    assert abs(found.square - 3) < 0.1
    assert abs(found.scale - 4) < 0.2


def test_no_noise_and_nothing_but_noise():
    dot = lambda params, x: (x @ params["w"]).mean()  # noqa: E731
    params = {"w": torch.zeros(1)}
    assert per_sample.noise_scale(dot, params, torch.ones(4, 1)).scale == 0
    alternating = torch.tensor([[1.0], [-1.0]])
    assert per_sample.noise_scale(dot, params, alternating).scale == torch.inf
    assert per_sample.noise_scale(dot, params, torch.zeros(4, 1)).scale == torch.inf


@given(st.integers(1, 5), CHUNKS)
def test_influence_is_the_product_of_gradients(count, chunk):
    train, test = batch(3, count), batch(4, 2)
    expected = one_by_one(train) @ one_by_one(test).T
    found = per_sample.influence(loss, PARAMS, train, test, 0.1, chunk)
    torch.testing.assert_close(found, 0.1 * expected)
    twice = per_sample.influence(loss, [PARAMS, PARAMS], train, test, [0.1, 0.3], chunk)
    torch.testing.assert_close(twice, 0.4 * expected)


def test_influence_is_what_a_step_does():
    train, test = batch(5, 4), batch(6, 3)
    rate = 1e-4
    found = per_sample.influence(loss, PARAMS, train, test, rate)
    for i in range(4):
        one = tuple(part[i : i + 1] for part in train)
        after = tree.map(lambda p, g: p - rate * g, PARAMS, grad(loss)(PARAMS, one))
        for j in range(3):
            other = tuple(part[j : j + 1] for part in test)
            lowered = loss(PARAMS, other) - loss(after, other)
            torch.testing.assert_close(found[i, j], lowered, rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: per_sample.norms(loss, PARAMS, ()),
            "norms: batch: expected tensors of one numbe",
        ),
        (
            lambda x: per_sample.gradients(loss, PARAMS, (x[0], x[1][1:])),
            "gradients: batch: expected tensors of one number of samples, got 0 [3, 3], 1 [2]",
        ),
        (lambda x: per_sample.noise_scale(loss, PARAMS, (x[0][:1], x[1][:1])), "2 or more samples"),
        (
            lambda x: per_sample.influence(loss, [PARAMS], x, x, [0.1, 0.1]),
            "influence: rates: expected one for each of 1 checkpoints, got 2",
        ),
        (lambda x: per_sample.noise_scale(loss, PARAMS, x, 0), "None or at least 1, got 0"),
        (
            lambda x: per_sample.norms(loss, PARAMS, x, 0),
            "chunk: expected None or at least 1, got 0",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(batch(0, 3))


@pytest.mark.usefixtures("unchecked")
def test_no_chunk_is_chosen_for_one_call():
    with pytest.raises(ValueError, match="chunk: expected None or at least 1, got 'auto'"):
        per_sample.gradients(loss, PARAMS, batch(0, 3), "auto")

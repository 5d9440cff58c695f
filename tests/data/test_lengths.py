"""Batches of near lengths: every sample once, and no batch over its budget."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from funcnets import data, random

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=40).map(torch.tensor)
SEEDS = st.integers(0, 999)


@given(LENGTHS, st.integers(1, 5), st.integers(30, 90), SEEDS)
def test_a_budget_of_tokens(lengths, num, tokens, seed):
    buckets = data.buckets(lengths, num, tokens=tokens)
    found = data.bucket_batches(random.key(seed), buckets)
    assert torch.cat(found).sort().values.tolist() == list(range(len(lengths)))
    for batch in found:
        assert len(batch) * int(lengths[batch].max()) <= tokens
    # As many batches in every epoch, whatever the key, so that a step has its place in one.
    assert len(data.bucket_batches(random.key(seed + 1), buckets)) == len(found)


@given(LENGTHS, st.integers(1, 5), st.integers(1, 7), SEEDS)
def test_buckets_of_near_lengths(lengths, num, batch_size, seed):
    buckets = data.buckets(lengths, num, batch_size=batch_size)
    sizes = [len(samples) for samples in buckets.samples]
    assert max(sizes) - min(sizes) <= 1
    for samples, longest, after in zip(
        buckets.samples, buckets.longest, (*buckets.samples[1:], None), strict=True
    ):
        assert lengths[samples].max() == longest
        assert after is None or lengths[after].min() >= longest
    held = [set(samples.tolist()) for samples in buckets.samples]
    for batch in data.bucket_batches(random.key(seed), buckets):
        assert len(batch) <= batch_size
        assert any(set(batch.tolist()) <= samples for samples in held)


def test_the_key_decides():
    buckets = data.buckets(torch.arange(1, 41), 4, batch_size=5)
    one, again = (data.bucket_batches(random.key(0), buckets) for _ in range(2))
    other = data.bucket_batches(random.key(1), buckets)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert [batch.tolist() for batch in one] != [batch.tolist() for batch in other]
    # Within a bucket, too, others come together.
    assert {frozenset(b.tolist()) for b in one} != {frozenset(b.tolist()) for b in other}
    # And the short ones do not always come first.
    assert sorted(int(batch.min()) for batch in one) != [int(batch.min()) for batch in one]
    streamed = data.stream(lambda key: data.bucket_batches(key, buckets), random.key(0), start=11)
    expected = data.bucket_batches(random.fold_in(random.key(0), 1), buckets)[3]
    assert torch.equal(next(streamed), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: data.buckets(torch.ones(3), tokens=4), "lengths: expected integers [samples], at"),
        (lambda: data.buckets(torch.tensor([2, 0]), tokens=4), "lengths: expected at least 1, got"),
        (
            lambda: data.buckets(torch.tensor([2, 9]), tokens=4),
            "tokens: expected at least 9 (the length of sample 1), got 4",
        ),
        (
            lambda: data.buckets(torch.tensor([2])),
            "expected one of batch_size and tokens, got None",
        ),
        (
            lambda: data.buckets(torch.tensor([2]), tokens=2, batch_size=1),
            "expected one of batch_si",
        ),
        (lambda: data.buckets(torch.tensor([2]), 0, tokens=2), "num: expected at least 1, got 0"),
        (lambda: data.buckets(torch.tensor([2]), batch_size=0), "batch_size: expected at least 1"),
    ],
)
def test_errors(call, message, unchecked):
    with pytest.raises(ValueError, match=re.escape(f"buckets: {message}")):
        call()

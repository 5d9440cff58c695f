"""Orders of an epoch: all that they promise of every sample, class and key, at any step."""

from __future__ import annotations

import re
from functools import partial
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap

from funcnets import data, random

SEEDS = st.integers(0, 999)
SIZES = st.integers(1, 9)
label_lists = st.lists(st.sampled_from([-3, 0, 1, 7]), min_size=1, max_size=40).map(torch.tensor)
COUNTS = torch.tensor([12, 5, 1])
LABELS = torch.repeat_interleave(torch.arange(3), COUNTS)[random.permutation(random.key(9), 18)]
GROUPS = data.group(LABELS)
ORDERS = {
    "batches": lambda key, **options: data.batches(key, 18, 4, **options),
    "stratified": lambda key, **options: data.stratified_batches(key, GROUPS, 4, **options),
    "balanced": lambda key, **options: data.balanced_batches(key, GROUPS, 4, **options),
    "weighted": lambda key, **options: data.weighted_batches(
        key, torch.arange(6.0), 18, 4, **options
    ),
}


def sizes(found):
    return [len(batch) for batch in found]


@given(st.integers(1, 40), SIZES, SEEDS)
def test_every_sample_once(n, batch_size, seed):
    found = data.batches(random.key(seed), n, batch_size)
    assert torch.cat(found).sort().values.tolist() == list(range(n))
    full, rest = divmod(n, batch_size)
    assert sizes(found) == [batch_size] * full + [rest] * (rest > 0)
    if full:
        kept = data.batches(random.key(seed), n, batch_size, drop_last=True)
        assert kept.tolist() == [batch.tolist() for batch in found[:full]]


@given(label_lists, SIZES, SEEDS)
def test_stratified_batches_hold_every_class_at_its_share(labels, batch_size, seed):
    groups = data.group(labels)
    found = data.stratified_batches(random.key(seed), groups, batch_size)
    assert torch.cat(found).sort().values.tolist() == list(range(len(labels)))
    classes = labels.unique()
    for batch in found:
        for label, count in zip(classes, groups.count, strict=True):
            share = float(count) / len(labels)
            held = int((labels[batch] == label).sum())
            assert abs(held - share * len(batch)) <= 1 + share * len(classes) + 1e-9


def test_stratified_batches_with_shares_that_come_out_even():
    labels = torch.tensor([0] * 30 + [1] * 20 + [2] * 10)
    for seed in range(5):
        for batch in data.stratified_batches(random.key(seed), data.group(labels), 6):
            assert labels[batch].bincount().tolist() == [3, 2, 1]


@given(label_lists, SIZES, SEEDS)
def test_balanced_batches_hold_as_many_of_each_class(labels, batch_size, seed):
    groups = data.group(labels)
    found = data.balanced_batches(random.key(seed), groups, batch_size)
    drawn = torch.cat(found)
    assert len(drawn) == len(groups.count) * groups.largest
    times = drawn.bincount(minlength=len(labels))
    for label, count in zip(labels.unique(), groups.count, strict=True):
        own = times[labels == label]
        assert own.sum() == groups.largest
        assert own.min() >= groups.largest // count
        assert own.max() - own.min() <= 1
    for batch in found:
        held = torch.stack([(labels[batch] == label).sum() for label in labels.unique()])
        assert held.max() - held.min() <= 2


@pytest.mark.parametrize("name", ORDERS)
def test_the_key_decides_and_vmap_is_a_loop(name):
    keys = random.split(random.key(0), 4)
    for options in ({}, {"drop_last": True}):
        order = partial(ORDERS[name], **options)
        together = vmap(order)(keys)
        for i, key in enumerate(keys.unbind()):
            alone = order(key)
            assert all(torch.equal(a, b) for a, b in zip(alone, order(key), strict=True))
            rows = together[i] if options else [batch[i] for batch in together]
            assert all(torch.equal(a, b) for a, b in zip(rows, alone, strict=True))
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("name", ORDERS)
@given(start=st.integers(0, 17))
def test_a_stream_goes_on_from_any_step(name, start):
    key = random.key(3)
    whole = list(islice(data.stream(ORDERS[name], key), 20))
    rest = islice(data.stream(ORDERS[name], key, start=start), 20 - start)
    assert all(torch.equal(a, b) for a, b in zip(whole[start:], rest, strict=True))
    # Step k alone: from the key and the number.
    epoch, place = divmod(start, len(ORDERS[name](key)))
    again = ORDERS[name](random.fold_in(key, epoch))[place]
    assert torch.equal(whole[start], again)
    assert not torch.equal(torch.cat(whole[:5])[:18], torch.cat(whole[5:10])[:18])


@pytest.mark.dynamo
@pytest.mark.parametrize("name", ORDERS)
def test_compiled(name):
    def order(key):
        return ORDERS[name](key, drop_last=True)

    compiled = torch.compile(order, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(random.key(1)), order(random.key(1)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda key: data.batches(key, 0, 4), "batches: expected at least one sample, got 0"),
        (lambda key: data.batches(key, 3, 0), "batches: batch_size: expected at least 1, got 0"),
        (
            lambda key: data.batches(key, 3, 4, drop_last=True),
            "batches: batch_size: expected at most 3 (the samples), for there to be a full",
        ),
        (
            lambda key: data.stratified_batches(key, GROUPS, 19, drop_last=True),
            "stratified_batches: batch_size: expected at most 18",
        ),
        (lambda key: data.balanced_batches(key, GROUPS, 0), "balanced_batches: batch_size: expec"),
        (lambda key: next(data.stream(ORDERS["batches"], key, -1)), "stream: start: expected at l"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(random.key(0))

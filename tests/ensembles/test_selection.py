"""Greedy selection: the best step of all, each time, and never a member that diverged."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from funcnets import ensembles, random


def sample(seed, members=4, batch=9, classes=3):
    first, second = random.split(random.key(seed))
    logits = random.normal(first, (members, batch, classes), dtype=torch.float64)
    return logits, random.randint(second, (batch,), 0, classes)


def accuracy(probabilities, labels):
    return (probabilities.argmax(-1) == labels).double().mean()


@given(st.integers(0, 99), st.integers(1, 6), st.sampled_from([None, accuracy]))
def test_each_round_takes_what_helps_most(seed, rounds, score):
    logits, labels = sample(seed)
    options = {} if score is None else {"score": score}
    score = score or ensembles.log_likelihood
    found = ensembles.greedy_selection(logits, labels, rounds, **options)
    each, total = logits.softmax(-1), 0
    for count, (taken, reached) in enumerate(zip(found.order, found.scores, strict=True), 1):
        tried = torch.stack([score((total + one) / count, labels) for one in each])
        torch.testing.assert_close(reached, tried.max())
        total = total + each[taken]
        torch.testing.assert_close(score(total / count, labels), reached)
    # The weights are those of the best round, no worse than the best member alone.
    torch.testing.assert_close(found.weights.sum(), torch.ones((), dtype=torch.float64))
    best = score(ensembles.mean(logits, found.weights), labels)
    torch.testing.assert_close(best, found.scores.max())
    assert best >= max(score(one, labels) for one in each) - 1e-12


def test_a_member_that_diverged_is_not_taken():
    logits, labels = sample(0)
    expected = ensembles.greedy_selection(logits[1:], labels, 5)
    logits[0] = torch.nan
    found = ensembles.greedy_selection(logits, labels, 5)
    assert found.weights[0] == 0
    torch.testing.assert_close(found.weights[1:], expected.weights)
    with pytest.raises(ValueError, match="expected a score that is a number, got none"):
        ensembles.greedy_selection(logits * torch.nan, labels, 5)


def test_errors(unchecked):
    logits, labels = sample(0)
    for call, message in (
        (
            lambda: ensembles.greedy_selection(logits[0], labels),
            "expected logits [members, batch, ",
        ),
        (
            lambda: ensembles.greedy_selection(logits, labels[1:]),
            "got float64[4, 9, 3] and int64[8]",
        ),
        (
            lambda: ensembles.greedy_selection(logits, labels, 0),
            "rounds: expected at least 1, got 0",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()

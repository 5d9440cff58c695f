"""Members trained together are those trained alone, whatever becomes of the others."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from funcnets import data, ensembles, models, optim, random, training, tree

MEMBERS, N = 5, 24
X = random.normal(random.key(0), (N, 4), dtype=torch.float64)
Y = (X[:, 0] * X[:, 1] > 0).long()
MODEL = models.mlp(4, 2, (6,), norm="batch", dropout=0.2)
HYPER = {
    "learning_rate": torch.logspace(-4, -1, MEMBERS, dtype=torch.float64),
    "weight_decay": torch.linspace(0, 1, MEMBERS, dtype=torch.float64),
}


def init(key):
    return tree.cast(MODEL.init(key), torch.float64)


def step_of(hyper):
    optimizer = optim.adamw(hyper["learning_rate"], weight_decay=hyper["weight_decay"])
    return training.make_step(MODEL, F.cross_entropy, optimizer, nonfinite=None)


def begin(hyper, key):
    first, second = random.split(key).unbind()
    return step_of(hyper).init(init(first), second)


def batch_of(key, step):
    """A batch of the member's own sample, by its key and the number of the step."""
    own, order = random.split(key).unbind()
    sample = data.bootstrap(own, N)
    epoch, place = divmod(step, 3)
    index = sample[data.batches(random.fold_in(order, epoch), N, 8, drop_last=True)[place]]
    return X[index], Y[index]


def train(chunk=None, hyper=HYPER, steps=4):
    keys = random.split(random.key(1), MEMBERS)
    states = ensembles.chunked(begin, chunk)(hyper, keys)

    def step(hyper, state, key, number):
        return step_of(hyper)(state, batch_of(key, number))[0]

    over = ensembles.chunked(step, chunk, (0, 0, 0, None))
    for number in range(steps):
        states = over(hyper, states, keys, number)
    return states


def alone(member, steps=4):
    key = random.split(random.key(1), MEMBERS)[member]
    hyper = {name: value[member] for name, value in HYPER.items()}
    state = begin(hyper, key)
    for number in range(steps):
        state = step_of(hyper)(state, batch_of(key, number))[0]
    return state


def same(states, others):
    assert tree.flatten(states)[1] == tree.flatten(others)[1]
    for one, other in zip(tree.leaves(states), tree.leaves(others), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_trained_together_and_alone():
    """With own order, bootstrap, keys and hyperparameters."""
    together = tree.unstack(train())
    for member in (0, 3):
        same(together[member], alone(member))


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_in_chunks_and_whole(chunk):
    same(train(chunk), train())


def test_a_member_that_diverges_hurts_no_other():
    rates = HYPER["learning_rate"].clone()
    rates[2] = 1e300
    broken = tree.unstack(train(hyper={**HYPER, "learning_rate": rates}))
    assert not all(leaf.isfinite().all() for leaf in tree.leaves(broken[2].params))
    for member, expected in enumerate(tree.unstack(train())):
        if member != 2:
            same(broken[member], expected)


@pytest.mark.parametrize("score", [lambda state: torch.ones(3), lambda state: 0.5])
def test_a_score_is_one_number(score, unchecked):
    batches = training.minibatches((X, Y), 8)
    with pytest.raises(ValueError, match=r"search: score: expected a tensor of shape \[\], got"):
        ensembles.search(random.key(7), step_of, HYPER, init, batches, score, rounds=(1,))


def search(hyper=HYPER, rounds=(2, 3, 3), **options):
    def score(state):
        logits = MODEL.apply(training.parameters(state), X)
        return -F.cross_entropy(logits, Y)

    batches = training.minibatches((X, Y), 8)
    return ensembles.search(
        random.key(7), step_of, hyper, init, batches, score, rounds=rounds, **options
    )


@pytest.mark.parametrize("own_order", [False, True])
def test_a_search_is_the_same_members_alone(own_order):
    found = search(own_order=own_order)
    assert [len(record["scores"]) for record in found.records] == [3, 3, 2, 1, 1]
    assert [record["steps"] for record in found.records] == [8, 8, 5, 2, 2]
    assert found.states.step.tolist() == [8, 8]
    kept = [record["member"] for record in found.records[:2]]
    assert found.scores.tolist() == [record["score"] for record in found.records[:2]]
    assert found.scores[0] >= found.scores[1]
    whole = search(rounds=(8,), own_order=own_order)  # without halving
    by_member = {record["member"]: place for place, record in enumerate(whole.records)}
    for place, member in enumerate(kept):
        for name, values in HYPER.items():
            assert found.hyper[name][place] == values[member] == found.records[place][name]
        same(tree.unstack(found.states)[place], tree.unstack(whole.states)[by_member[member]])
    # Of those that were dropped, none had a higher score in the round in which it was.
    for number in range(2):
        scores = {r["member"]: r["scores"] for r in found.records if len(r["scores"]) > number}
        dropped = [s[number] for s in scores.values() if len(s) == number + 1]
        assert max(dropped) <= min(s[number] for s in scores.values() if len(s) > number + 1)


def test_a_search_by_hand():
    """One member of it, from the key of the run and its number."""
    found = search(rounds=(4,), own_order=True)
    member = found.records[0]["member"]
    key = random.split(random.key(7), MEMBERS)[member]
    state = begin({name: value[member] for name, value in HYPER.items()}, key)
    step = step_of({name: value[member] for name, value in HYPER.items()})
    epoch = training.minibatches((X, Y), 8)
    for number in range(4):
        order = training.order_key(key, number // 3)
        state, _ = step(state, epoch(order)[number % 3])
    same(tree.unstack(found.states)[0], state)


def test_a_search_in_chunks_and_with_a_member_that_diverges():
    same(search(chunk=2).states, search().states)
    rates = HYPER["learning_rate"].clone()
    rates[2] = 1e300
    broken = search({**HYPER, "learning_rate": rates}, rounds=(4,))
    assert broken.records[-1]["member"] == 2
    assert broken.records[-1]["score"] == -float("inf")
    expected = {r["member"]: r["score"] for r in search(rounds=(4,)).records}
    for record in broken.records[:-1]:
        assert abs(record["score"] - expected[record["member"]]) < 1e-9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hyper": {}}, "hyper: expected tensors .members. of one length, got none"),
        ({"hyper": {"a": torch.ones(2), "b": torch.ones(3)}}, "got a float32.2., b float32.3."),
        ({"rounds": ()}, "rounds: expected numbers of steps"),
        ({"rounds": (3, 0)}, "rounds: expected numbers of steps"),
        ({"halve": 1}, "halve: expected more than 1, got 1"),
    ],
)
def test_errors(options, message, unchecked):
    with pytest.raises(
        ValueError, match=f"search: {message}" if "got a" not in message else message
    ):
        search(**options)

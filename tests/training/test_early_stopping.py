import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from networks import assert_equal, data, make, mlp, start
from torch.func import vmap

from funcnets import random, training, tree

SCORES = st.lists(
    st.sampled_from([0.0, 0.05, 1.0, 1.5, 2.0, torch.nan, torch.inf]), min_size=1, max_size=10
)


def reference(scores, patience, change, mode):
    """When training ends, and which was best (-1: the initial one)."""
    best, place, bad = (torch.inf if mode == "min" else -torch.inf), -1, 0
    for i, score in enumerate(scores):
        better = best - score > change if mode == "min" else score - best > change
        best, place, bad = (score, i, 0) if better else (best, place, bad + 1)
        if bad >= patience:
            return i, place
    return None, place


def marked(i):
    step = make()
    state = start(step, mlp())
    return state._replace(params=tree.map(lambda leaf: torch.full_like(leaf, i), state.params))


@given(
    scores=SCORES,
    patience=st.integers(1, 4),
    change=st.sampled_from([0.0, 0.1]),
    mode=st.sampled_from(["min", "max"]),
)
@example(scores=[1.0, 1.0, 1.0], patience=2, change=0.0, mode="min")
def test_patience_and_the_best(scores, patience, change, mode):
    stopping = training.EarlyStopping("loss", patience, change, mode)
    state, ended = stopping.init(marked(-1)), None
    for i, score in enumerate(scores):
        state = marked(i)._replace(stopping=state.stopping)
        state = stopping.update(state, torch.tensor(score))
        if bool(stopping.done(state)):
            ended = i
            break
    when, place = reference(scores, patience, change, mode)
    assert ended == when
    assert_equal(stopping.restore(state).params, marked(place).params)


def test_each_member_has_its_own_best():
    stopping = training.EarlyStopping(patience=2)
    step = make()
    states = vmap(step.init)(
        vmap(mlp().init)(random.split(random.key(0), 2)), random.split(random.key(1), 2)
    )
    states = vmap(stopping.init)(states)
    for i, scores in enumerate([(3.0, 1.0), (2.0, 5.0), (4.0, 5.0)]):
        params = tree.map(lambda leaf, i=i: torch.full_like(leaf, i), states.params)
        states = vmap(stopping.update)(states._replace(params=params), torch.tensor(scores))
    assert stopping.done(states).tolist() == [False, True]
    best = tree.leaves(vmap(stopping.restore)(states).params)[0]
    assert best.flatten(1)[:, 0].tolist() == [1, 0]


def test_fit_ends_early_and_gives_the_best():
    step, batch = make(), data()
    scores = iter([0.2, 0.9, 0.8, 0.7, 1.0])
    seen = []

    def evaluate(state):
        seen.append(tree.map(torch.clone, state.params))
        return {"accuracy": torch.tensor(next(scores))}

    stopping = training.EarlyStopping("accuracy", patience=2, mode="max")
    state, history = training.fit(
        step, start(step, mlp()), [batch], epochs=5, evaluate=evaluate, early_stopping=stopping
    )
    assert [record["step"] for record in history] == [1, 2, 3, 4]
    assert_equal(state.params, seen[1])
    assert int(state.stopping.step) == 2


def test_errors():
    step = make()
    state = start(step, mlp())
    with pytest.raises(ValueError, match="mode"):
        training.EarlyStopping(mode="least")
    with pytest.raises(ValueError, match="patience"):
        training.EarlyStopping(patience=0)
    with pytest.raises(KeyError, match="expected a score auc, got loss"):
        training.fit(step, state, [data()], epochs=1, early_stopping=training.EarlyStopping("auc"))
    with pytest.raises(ValueError, match="one for each network"):
        training.fit(
            step,
            state,
            [data()],
            epochs=1,
            evaluate=lambda state: {"loss": torch.ones(2)},
            early_stopping=training.EarlyStopping(),
        )

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap

import funcnets
from funcnets import finetuning, models, optim, random, training, tree

NAMES = ("stem", "body", "head")
INNER = {
    "sgd": optim.sgd(0.1, momentum=0.9),
    "adamw": optim.adamw(0.01, weight_decay=0.1),
    "clipped": optim.chain(optim.clip_by_global_norm(1.0), optim.adam(0.01)),
}


def normals(seed):
    keys = random.split(random.key(seed), len(NAMES)).unbind()
    return {
        n: random.normal(k, (3,), dtype=torch.float64) for n, k in zip(NAMES, keys, strict=True)
    }


@given(
    starts=st.dictionaries(st.sampled_from(NAMES), st.integers(0, 5)),
    inner=st.sampled_from(sorted(INNER)),
)
def test_updates_are_zero_until_the_step_and_then_the_optimizers_own(starts, inner):
    params = normals(0)
    optimizer = finetuning.unfreezing(INNER[inner], starts)
    state, plain = optimizer.init(params), INNER[inner].init(params)
    for step in range(6):
        grads = normals(step + 1)
        updates, state = optimizer.update(grads, state, params)
        expected, plain = INNER[inner].update(grads, plain, params)
        for name in NAMES:
            began = step >= starts.get(name, 0)
            assert torch.equal(updates[name], expected[name] if began else 0 * params[name])
        params = optim.apply_updates(params, updates)
    assert state.step == 6


def test_a_leaf_goes_by_the_first_rule_that_it_matches():
    optimizer = finetuning.unfreezing(optim.sgd(1.0), {"head": 0, "*": 1})
    params = normals(0)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert {name: bool(change.any()) for name, change in updates.items()} == {
        "stem": False,
        "body": False,
        "head": True,
    }


def test_what_is_not_finite_does_not_get_through():
    params = normals(0)
    optimizer = finetuning.unfreezing(optim.sgd(1.0), {"stem": 1})
    grads = {**params, "stem": params["stem"] * torch.nan}
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    assert not updates["stem"].any()


MODEL = models.mlp(4, 3, (5,))  # layers "0" and "3"


def batch():
    return random.normal(random.key(3), (6, 4)), torch.arange(6) % 3


def moved(step, state, steps):
    """For each step the layers that it changed."""
    found = []
    for _ in range(steps):
        new, _ = step(state, batch())
        pairs = zip(tree.leaves_with_path(new.params), tree.leaves(state.params), strict=True)
        found.append({path[0] for (path, leaf), old in pairs if not torch.equal(leaf, old)})
        state = new
    return found


def test_one_compiled_step_serves_throughout():
    traces = []

    def loss(outputs, targets):
        traces.append(1)
        return F.cross_entropy(outputs, targets)

    optimizer = finetuning.unfreezing(optim.adamw(0.01, weight_decay=0.1), {"3": 0, "0": 2})
    step = training.make_step(MODEL, loss, optimizer)
    state = step.init(MODEL.init(random.key(0)), random.key(1))
    expected = [{"3"}, {"3"}, {"0", "3"}]
    assert moved(step, state, 3) == expected
    traces.clear()
    assert moved(funcnets.compile(step, backend="aot_eager"), state, 3) == expected
    assert len(traces) == 1


def test_members_begin_at_steps_of_their_own():
    def step_of(start):
        optimizer = finetuning.unfreezing(optim.sgd(0.1), {"0": start})
        return training.make_step(MODEL, F.cross_entropy, optimizer)

    starts = torch.tensor([0, 2])
    params = vmap(MODEL.init)(random.split(random.key(0)))
    keys = random.split(random.key(1))
    state = first = vmap(lambda s, p, k: step_of(s).init(p, k))(starts, params, keys)
    for number in range(3):
        state, _ = vmap(lambda s, state: step_of(s)(state, batch()))(starts, state)
        same = (state.params["0", "weight"] == first.params["0", "weight"]).flatten(1).all(1)
        assert same.tolist() == [False, number < 2]
    for i, start in enumerate([0, 2]):
        step = step_of(start)
        alone = step.init(params[i], keys[i])
        for _ in range(3):
            alone, _ = step(alone, batch())
        tree.map(torch.testing.assert_close, state.params[i], alone.params)


@pytest.mark.usefixtures("unchecked")
def test_errors():
    for wrong in (-1, 1.5, True, torch.ones(2, dtype=torch.int64), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="'stem': expected a step of at least 0"):
            finetuning.unfreezing(optim.sgd(0.1), {"stem": wrong})
    with pytest.raises(ValueError, match="'tail': expected leaves that match, got none"):
        finetuning.unfreezing(optim.sgd(0.1), {"tail": 1}).init(normals(0))
    with pytest.raises(ValueError, match="'head': expected leaves"):
        finetuning.unfreezing(optim.sgd(0.1), {"*": 1, "head": 0}).init(normals(0))
    with pytest.raises(TypeError, match="state: expected UnfreezingState"):
        finetuning.unfreezing(optim.sgd(0.1), {}).update(normals(0), (), normals(0))

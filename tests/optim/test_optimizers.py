"""Each optimizer under vmap, grad, make_fx and torch.compile; what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from optim_cases import OPTIMIZERS, SHAPES, draw
from tensordict import TensorDict
from torch.func import grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from funcnets import optim, tree

STEPS = 4
MEMBERS = 3


def loss(params, step):
    """Smooth; flat in one leaf, whose gradients are zero."""
    curved = [params[name] * (1.0 + 0.1 * step) for name in SHAPES if name != "bias"]
    return sum(leaf.cos().sum() for leaf in curved) + (0.0 * params["bias"]).sum()


def train(optimizer, params, steps=STEPS, start=None):
    state = optimizer.init(params) if start is None else start
    for step in range(steps):
        value = loss(params, step)
        updates, state = optimizer.update(grad(loss)(params, step), state, params, value=value)
        params = optim.apply_updates(params, updates)
    return params, state


def stacked(trees):
    return tree.map(lambda *leaves: torch.stack(leaves), *trees)


def assert_same(found, expected, rtol=1e-9, atol=1e-9):
    for one, other in zip(tree.leaves(found), tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


@pytest.mark.parametrize("kind", [dict, TensorDict])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_learning_rate_per_member(name, kind):
    members = [kind(draw(seed)) for seed in range(MEMBERS)]
    rates = torch.tensor([0.001, 0.02, 0.3], dtype=torch.float64)
    expected = [
        train(OPTIMIZERS[name](rate), member) for rate, member in zip(rates, members, strict=True)
    ]
    found = vmap(lambda rate, params: train(OPTIMIZERS[name](rate), params))(
        rates, stacked(members)
    )
    assert_same(found, stacked(expected))
    # The state goes in and out of vmap: a step later the members still agree.
    states = vmap(lambda rate, params: OPTIMIZERS[name](rate).init(params))(rates, stacked(members))
    found = vmap(lambda rate, params, state: train(OPTIMIZERS[name](rate), params, 4, state))(
        rates, stacked(members), states
    )
    assert_same(found, stacked(expected))
    for leaf in tree.leaves(states):
        assert leaf.stride()[0] != 0 or leaf.numel() == 0, "members share memory"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_hypergradient(name):
    """Of the last loss, with respect to the learning rate and the first parameters."""

    def final(rate, params):
        return loss(train(OPTIMIZERS[name](rate), params)[0], 7)

    rate, params = torch.tensor(0.05, dtype=torch.float64), draw(5)
    found = grad(final, argnums=(0, 1))(rate, params)
    assert all(bool(leaf.isfinite().all()) for leaf in tree.leaves(found))

    def slope(change_rate, change_params, size=1e-5):
        ahead = tree.map(lambda p, c: p + size * c, params, change_params)
        behind = tree.map(lambda p, c: p - size * c, params, change_params)
        rise = final(rate + size * change_rate, ahead) - final(rate - size * change_rate, behind)
        return rise / (2 * size)

    nothing = tree.map(torch.zeros_like, params)
    torch.testing.assert_close(
        found[0], slope(torch.ones_like(rate), nothing), rtol=1e-5, atol=1e-6
    )
    for seed in range(3):
        direction = draw(100 + seed)
        along = sum((found[1][name] * direction[name]).sum() for name in direction)
        expected = slope(torch.zeros_like(rate), direction)
        torch.testing.assert_close(along, expected, rtol=1e-5, atol=1e-6)
        forward = jvp(lambda p: final(rate, p), (params,), (direction,))[1]
        torch.testing.assert_close(forward, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_hypergradient_where_every_gradient_is_zero(name):
    """A second moment of zero has a root without a derivative; ours has one."""

    def final(params):
        state = optimizer.init(params)
        for _ in range(2):
            flat = tree.map(lambda leaf: 0.0 * leaf, params)
            updates, state = optimizer.update(flat, state, params, value=params["scalar"])
            params = optim.apply_updates(params, updates)
        return sum((leaf**2).sum() for leaf in params.values())

    optimizer = OPTIMIZERS[name](0.1)
    found = grad(final)(draw(5))
    assert all(bool(leaf.isfinite().all()) for leaf in found.values())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_traced_once_serves_every_step(name):
    optimizer = OPTIMIZERS[name](0.05)
    params = draw(0)
    state = optimizer.init(params)
    value = torch.tensor(1.0, dtype=torch.float64)
    traced = make_fx(lambda *arguments: optimizer.update(*arguments))(draw(1), state, params, value)
    for step in range(STEPS):
        updates, after = optimizer.update(draw(step), state, params, value)
        found = traced(draw(step), state, params, value)
        assert_same(found, (updates, after), 1e-12, 1e-12)
        params, state = optim.apply_updates(params, updates), after


@pytest.mark.dynamo
@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, dict) for name in OPTIMIZERS), ("muon", TensorDict), ("chain", TensorDict)],
)
def test_compiled(name, kind):
    optimizer = OPTIMIZERS[name](0.05)

    def step(grads, state, params, value):
        updates, state = optimizer.update(grads, state, params, value)
        return optim.apply_updates(params, updates), state

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=False)
    params = kind(draw(0))
    state = optimizer.init(params)
    value = torch.tensor(1.0, dtype=torch.float64)
    for number in range(STEPS):
        # The first call compiles; the state that comes out of it may look different (its strides).
        torch.compiler.set_stance("default" if number < 2 else "fail_on_recompile")
        try:
            found = compiled(kind(draw(number)), state, params, value)
        finally:
            torch.compiler.set_stance("default")
        params, state = step(kind(draw(number)), state, params, value)
        assert_same(found, (params, state), 1e-12, 1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_arguments_stay_as_they_are(name):
    optimizer = OPTIMIZERS[name](0.05)
    params = draw(0)
    _, state = train(optimizer, params)
    arguments = draw(1), state, params
    leaves = tree.leaves(arguments)
    before = [leaf.clone() for leaf in leaves]
    updates, after = optimizer.update(*arguments, value=torch.tensor(1.0))
    new = optim.apply_updates(params, updates)
    for leaf, old in zip(leaves, before, strict=True):
        assert leaf._version == 0
        assert torch.equal(leaf, old)
    again, same = optimizer.update(*arguments, value=torch.tensor(1.0))
    assert_same((again, same), (updates, after), 0, 0)
    held = {leaf.data_ptr() for leaf in leaves if leaf.numel()}
    assert all(leaf.data_ptr() not in held for leaf in tree.leaves(new) if leaf.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_dtype_stays_what_it_is(name, dtype):
    """A learning rate of float64, a count of int64 and scalar parameters promote nothing."""
    params = {**draw(0, dtype=dtype), "other": torch.ones(3)}
    rate = torch.tensor(0.01, dtype=torch.float64)

    def step(rate, grads, params):
        optimizer = OPTIMIZERS[name](rate)
        state = optimizer.init(params)
        updates, after = optimizer.update(grads, state, params, value=torch.tensor(1.0))
        new = optim.apply_updates(params, updates)
        for one, other in zip(
            tree.leaves((state, params, params)), tree.leaves((after, updates, new)), strict=True
        ):
            assert one.dtype == other.dtype
        return new

    grads = {**draw(1, dtype=dtype), "other": torch.ones(3)}
    new = step(rate, grads, params)
    mapped = vmap(step)(rate[None], *(tree.map(lambda x: x[None], t) for t in (grads, params)))
    for name, leaf in new.items():
        assert leaf.dtype == params[name].dtype
        assert mapped[name].dtype == params[name].dtype
        assert leaf.isfinite().all()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_a_tree_of_tensors(name):
    params = draw(0)
    state = OPTIMIZERS[name](0.1).init(params)
    leaves, structure = tree.flatten(state)
    assert all(type(leaf) is torch.Tensor for leaf in leaves)
    again = tree.unflatten(structure, leaves)
    assert type(again) is type(state)
    assert torch.utils._pytree.tree_structure(again) == torch.utils._pytree.tree_structure(state)
    assert len(torch.utils._pytree.tree_leaves(state)) == len(leaves)


def test_entries_in_another_order_and_container():
    params, grads = draw(0), draw(1)
    optimizer = optim.adam(0.1)
    expected, _ = optimizer.update(grads, optimizer.init(params), params)
    shuffled = TensorDict({name: grads[name] for name in reversed(SHAPES)})
    found, state = optimizer.update(shuffled, optimizer.init(params), params)
    assert type(found) is dict
    assert type(state.mean) is dict
    assert_same(found, expected, 0, 0)
    assert list(found) == list(params)


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"muon"}))
def test_a_tree_without_leaves(name):
    optimizer = OPTIMIZERS[name](0.1)
    state = optimizer.init({})
    assert optimizer.update({}, state, {}, value=torch.tensor(1.0))[0] == {}

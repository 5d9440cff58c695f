"""Adam by torch's fused kernel against the rule that is written out."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, jvp, vmap

from funcnets import compile, optim, random, tree
from funcnets.optim import fused

SHAPES = {"matrix": (3, 2), "kernel": (4, 3, 2, 2), "bias": (5,), "number": (), "none": (0, 3)}


def draw(seed, members, dtype, last=False):
    keys = random.split(random.key(seed), len(SHAPES))
    lead = () if members is None else (members,)
    found = {
        name: random.normal(key, (*lead, *shape), dtype=dtype)
        for key, (name, shape) in zip(keys.unbind(), SHAPES.items(), strict=True)
    }
    if last:  # as a convolution with channels last leaves its gradient
        found["kernel"] = found["kernel"].movedim(-3, -1).contiguous().movedim(-1, -3)
    return found


@given(
    members=st.sampled_from([None, 1, 3]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    amsgrad=st.booleans(),
    decay=st.sampled_from([0.0, 0.1]),
    rates=st.sampled_from(["number", "schedule", "each its own"]),
    last=st.booleans(),
    axis=st.sampled_from([0, -1]),
    seed=st.integers(0, 1000),
)
def test_as_the_rule(members, dtype, amsgrad, decay, rates, last, axis, seed):
    params = draw(seed, members, dtype)
    each = torch.linspace(0.01, 0.1, members or 1) if members else torch.tensor(0.05)

    def run(rate, params, *grads):
        made = {"number": 0.05, "schedule": optim.schedules.cosine(0.05, 5), "each its own": rate}
        optimizer = optim.adamw(made[rates], weight_decay=decay, amsgrad=amsgrad)
        state = optimizer.init(params)
        for gradients in grads:
            updates, state = optimizer.update(gradients, state, params)
            params = optim.apply_updates(params, updates)
        return params, state

    grads = [draw(seed + i, members, dtype, last) for i in range(1, 4)]
    over, arguments = run, (each, params, *grads)
    if members is not None:
        over = vmap(run, (0, 0, axis, axis, axis))
        arguments = each, params, *tree.map(lambda leaf: leaf.movedim(0, axis), grads)
    with mock.patch.object(fused, "serves", return_value=False):
        expected = over(*arguments)
    with mock.patch.object(fused, "adam", wraps=fused.adam) as kernel:
        found = over(*arguments)
    assert kernel.call_count == 3
    torch.testing.assert_close(found, expected)
    if members:  # to the bit, as the member alone
        alone = run(each[-1], *({k: v[-1] for k, v in x.items()} for x in [params, *grads]))
        torch.testing.assert_close(
            {k: v[-1] for k, v in found[0].items()}, alone[0], rtol=0, atol=0
        )


def test_a_state_that_members_share():
    optimizer, params, grads = optim.adam(), draw(0, 2, torch.float64), draw(1, 2, torch.float64)
    state = optimizer.init({name: leaf[0] for name, leaf in params.items()})
    found = vmap(optimizer.update, (0, None, 0))(grads, state, params)[0]
    for i in range(2):
        held, slope = ({k: v[i] for k, v in x.items()} for x in (params, grads))
        own = optimizer.update(slope, state, held)[0]
        torch.testing.assert_close({k: v[i] for k, v in found.items()}, own, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["grad", "jvp", "requires grad", "vmap twice", "compiled", "half"])
def test_where_the_kernel_cannot_serve(kind):
    optimizer = optim.adam(0.1)
    dtype = torch.bfloat16 if kind == "half" else torch.float64
    params, grads = torch.ones(3, dtype=dtype), torch.full((3,), 2.0, dtype=dtype)
    state = optimizer.init(params)

    def changed(grads):
        return optimizer.update(grads, state, params)[0]

    runs = {
        "grad": lambda: grad(lambda g: changed(g).sum())(grads),
        "jvp": lambda: jvp(changed, (grads,), (grads,)),
        "requires grad": lambda: changed(grads.clone().requires_grad_()).sum().backward(),
        "vmap twice": lambda: vmap(vmap(optimizer.update, (0, None, 0)), (0, None, 0))(
            grads.expand(2, 2, 3), state, params.expand(2, 2, 3)
        ),
        "compiled": lambda: compile(changed, backend="aot_eager")(grads),
        "half": lambda: changed(grads),
    }
    with mock.patch.object(fused, "adam") as kernel:
        runs[kind]()
    kernel.assert_not_called()

"""Twenty steps of each optimizer against its counterpart in torch.optim, or a plain loop."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optim_cases import CASES, DECAY, RATE, SHAPES, draw

from funcnets import optim

STEPS = 20


@functools.cache
def noises(shapes):
    return [draw(1000 + step, dict(shapes)) for step in range(STEPS)]


def gradient(params, step, scale):
    """Noise and a pull to zero, so that an error in one step shows in those after it."""
    noise = noises(tuple((name, leaf.shape) for name, leaf in params.items()))[step]
    grads = {name: scale * (noise[name] + 0.3 * leaf) for name, leaf in params.items()}
    if "bias" in grads:
        grads["bias"] = torch.zeros_like(grads["bias"])  # a second moment of zero
    return grads


def ours(optimizer, params, scale):
    state = optimizer.init(params)
    for step in range(STEPS):
        updates, state = optimizer.update(gradient(params, step, scale), state, params)
        params = optim.apply_updates(params, updates)
    return params


def theirs(make, params, scale):
    """torch.optim keeps some of its own numbers in the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        params = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
        optimizer = make(list(params.values()))
        for step in range(STEPS):
            held = {name: leaf.detach() for name, leaf in params.items()}
            for name, grad in gradient(held, step, scale).items():
                params[name].grad = grad
            optimizer.step()
    finally:
        torch.set_default_dtype(before)
    return {name: leaf.detach() for name, leaf in params.items()}


@pytest.mark.parametrize("name", CASES)
@given(data=st.data(), seed=st.integers(0, 99), scale=st.sampled_from([1e-4, 1.0, 30.0]))
def test_as_torch(name, data, seed, scale):
    case = CASES[name]
    options = {option: data.draw(drawn, option) for option, drawn in case.options.items()}
    renamed = {case.names.get(option, option): value for option, value in options.items()}
    params = draw(seed, case.shapes)
    params = {**params, "wide": 1e-4 * params["wide"]}  # for adafactor, which scales by the size
    found = ours(case.make(**options), params, scale)
    expected = theirs(lambda leaves: case.torch(leaves, **renamed), params, scale)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@given(
    rate=RATE,
    decay=DECAY,
    betas=st.tuples(st.floats(0.0, 0.99), st.floats(0.0, 0.99)),
    seed=st.integers(0, 99),
)
def test_lion_as_published(rate, decay, betas, seed):
    """Algorithm 2 of Chen et al. 2023, number by number."""
    params = draw(seed)
    found = ours(optim.lion(rate, betas, decay), params, 1.0)
    beta1, beta2 = betas
    means = {name: torch.zeros_like(leaf) for name, leaf in params.items()}
    for step in range(STEPS):
        for name, grad in gradient(params, step, 1.0).items():
            mixed = beta1 * means[name] + (1 - beta1) * grad
            params[name] = params[name] - rate * (mixed.sign() + decay * params[name])
            means[name] = beta2 * means[name] + (1 - beta2) * grad
    torch.testing.assert_close(found, params, rtol=1e-10, atol=1e-10)


@given(max_norm=st.floats(0.01, 20.0), seed=st.integers(0, 99))
def test_clip_by_global_norm_as_torch(max_norm, seed):
    grads = draw(seed)
    clip = optim.clip_by_global_norm(max_norm)
    found, _ = clip.update(grads, clip.init(grads), grads)
    leaves = [torch.zeros_like(leaf, requires_grad=True) for leaf in grads.values()]
    for leaf, grad in zip(leaves, grads.values(), strict=True):
        leaf.grad = grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(leaves, max_norm)
    torch.testing.assert_close(optim.global_norm(grads), norm)
    torch.testing.assert_close(list(found.values()), [leaf.grad for leaf in leaves])


@given(limit=st.floats(0.01, 3.0), seed=st.integers(0, 99), tensor=st.booleans())
def test_clip_by_value(limit, seed, tensor):
    grads = draw(seed)
    clip = optim.clip_by_value(torch.tensor(limit, dtype=torch.float64) if tensor else limit)
    found, _ = clip.update(grads, clip.init(grads), grads)
    for name, grad in grads.items():
        assert torch.equal(found[name], grad.clamp(-limit, limit))


@given(rate=RATE, decay=st.floats(0.001, 0.3), seed=st.integers(0, 99))
def test_decoupled_decay_is_that_of_adamw(rate, decay, seed):
    params = draw(seed, SHAPES)
    apart = optim.chain(optim.adam(rate), optim.decoupled_weight_decay(decay, rate, where="w*"))
    together = optim.adamw(rate, weight_decay=decay, where="w*")
    torch.testing.assert_close(ours(apart, params, 1.0), ours(together, params, 1.0))
    everywhere = ours(optim.adamw(rate, weight_decay=decay), params, 1.0)
    nowhere = ours(optim.adam(rate), params, 1.0)
    for name, leaf in ours(together, params, 1.0).items():
        assert torch.equal(leaf, (everywhere if name in ("weight", "wide") else nowhere)[name])


def test_global_norm_of_half_precision_does_not_overflow():
    tree = {"a": torch.full((4,), 6e4, dtype=torch.float16), "b": torch.zeros(2)}
    assert optim.global_norm(tree) == 1.2e5
    assert optim.global_norm({}) == 0

import re
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, grad_and_value, vmap

import funcnets
from funcnets import layers, random, tree
from funcnets.layers import Routing, mixture

KEY = random.key(0)
DTYPE = torch.float64
keys = st.integers(0, 2**16).map(random.key)
sizes = st.integers(1, 4)
yes_no = st.booleans()
activations = st.sampled_from(["relu", "gelu", "swiglu", "geglu", "squared_relu"])


def close(actual, expected, tolerance=1e-10):
    a, b = tree.leaves(actual), tree.leaves(expected)
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@st.composite
def problems(draw):
    key, experts, width = draw(keys), draw(sizes), draw(sizes)
    options = {
        "top_k": draw(st.integers(1, experts)),
        "activation": draw(activations),
        "normalize": draw(st.none() | yes_no),
    }
    if draw(yes_no):
        options |= {"noise": 0.5, "key": key}
    params = layers.init_mixture(
        key,
        width,
        draw(sizes),
        experts,
        activation=options["activation"],
        bias=draw(yes_no),
        dtype=DTYPE,
    )
    params["router", "weight"] = random.normal(key, (experts, width), dtype=DTYPE)
    batch = draw(st.lists(st.integers(1, 3), max_size=2).map(tuple))
    x = random.normal(random.fold_in(key, 1), (*batch, width), dtype=DTYPE)
    return params, x, options


def by_hand(params, x, top_k, activation, normalize, noise=0.0, key=None):
    """Token by token, expert by expert."""
    logits = x @ params["router", "weight"].T
    if key is not None:
        logits = logits + noise * random.normal(key, logits.shape, dtype=DTYPE)
    rows = []
    for token, scores in zip(
        x.reshape(-1, x.shape[-1]), logits.reshape(-1, logits.shape[-1]), strict=True
    ):
        probabilities = scores.softmax(0)
        chosen = probabilities.argsort(descending=True)[:top_k]
        total = probabilities[chosen].sum()
        divided = normalize if normalize is not None else top_k > 1
        row = torch.zeros_like(token)
        for expert in chosen.tolist():
            weight = probabilities[expert] / total if divided else probabilities[expert]
            own = tree.map(lambda leaf, expert=expert: leaf[expert], params["experts"])
            row = row + weight * layers.feed_forward(own, token, activation=activation)
        rows.append(row)
    return torch.stack(rows).reshape(x.shape)


@given(problem=problems())
def test_routed_and_dense_equal_the_sum_by_hand(problem):
    params, x, options = problem
    expected = by_hand(params, x, **options)

    def loss(params, x, **more):
        return mixture(params, x, **options, **more).sin().sum()

    gradient = grad(lambda params, x: by_hand(params, x, **options).sin().sum(), (0, 1))(params, x)
    for dense in (None, False, True):
        close(mixture(params, x, dense=dense, **options), expected)
        close(grad(loss, (0, 1))(params, x, dense=dense), gradient)


def test_only_the_experts_picked_are_computed(monkeypatch):
    tokens = []

    def counted(params, x, **options):
        tokens.append(len(x))
        return real(params, x, **options)

    real = layers.feed_forward
    monkeypatch.setattr(sys.modules["funcnets.layers.mixture"], "feed_forward", counted)
    params = layers.init_mixture(KEY, 4, 8, 5)
    params["router", "weight"] = torch.eye(5)[:, :4]
    x = 9 * torch.eye(4)[[0, 0, 2]]
    mixture(params, x, top_k=1)
    assert sorted(tokens) == [1, 2]


@given(key=keys, top_k=st.integers(1, 3))
def test_losses_by_hand(key, top_k):
    logits = random.normal(key, (2, 5, 3), dtype=DTYPE)
    gates, experts = logits.softmax(-1).topk(top_k, -1)
    routing = Routing(logits, experts, gates)
    padding = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    for mask in (None, padding):
        real = torch.ones(2, 5, dtype=torch.bool) if mask is None else mask
        count = real.sum()
        balance, importance = 0.0, []
        for expert in range(3):
            share = ((experts == expert) & real[..., None]).double().sum() / (top_k * count)
            balance += 3 * share * logits.softmax(-1)[real][:, expert].mean()
            importance.append(gates[(experts == expert) & real[..., None]].sum())
        importance = torch.stack(importance)
        close(layers.balance_loss(routing, mask), balance)
        variation = importance.var(correction=0) / importance.mean() ** 2
        close(layers.importance_loss(routing, mask), variation)
        close(layers.router_z_loss(routing, mask), logits[real].logsumexp(-1).square().mean())


def test_losses_balance_the_experts():
    params = layers.init_mixture(KEY, 4, 8, 4, dtype=DTYPE)
    x = random.normal(KEY, (64, 4), dtype=DTYPE) + 2
    for name, lowest in (("balance_loss", 1.0), ("importance_loss", 0.0)):

        def loss(params, name=name):
            return getattr(layers, name)(mixture(params, x, top_k=2, routing=True)[1])

        before = loss(params)
        tuned = params
        for _ in range(30):
            gradient = grad(loss)(tuned)
            tuned = tree.map(lambda p, g: p - 0.3 * g, tuned, gradient)
        assert loss(tuned) < before - 0.02
        assert before >= lowest
        assert loss(tuned) >= lowest - 1e-6
    flat = params.clone()
    flat["router", "weight"] = torch.zeros(4, 4, dtype=DTYPE)
    routing = mixture(flat, x, top_k=4, routing=True)[1]
    close(layers.balance_loss(routing), torch.tensor(1.0, dtype=DTYPE))
    close(layers.router_z_loss(routing), torch.tensor(4.0, dtype=DTYPE).log() ** 2)


def test_half_precision_keeps_its_dtype():
    params = layers.init_mixture(KEY, 4, 8, 3, dtype=torch.bfloat16)
    x = random.normal(KEY, (5, 4), dtype=torch.bfloat16)
    for dense in (False, True):
        assert mixture(params, x, dense=dense).dtype == torch.bfloat16


def test_init_of_an_ensemble_is_the_init_of_its_members():
    keys = random.split(KEY, 3)
    ensemble = vmap(lambda key: layers.init_mixture(key, 4, 8, 2))(keys)
    for i, key in enumerate(keys.unbind()):
        member = layers.init_mixture(key, 4, 8, 2)
        close(tree.map(lambda leaf, i=i: leaf[i], ensemble), member, 0)
        assert member["experts"].batch_size == (2,)


def test_errors(unchecked):
    params = layers.init_mixture(KEY, 4, 8, 3)
    x = torch.zeros(5, 4)
    routing = mixture(params, x, routing=True)[1]
    for message, run in (
        (
            "mixture: top_k: expected from 1 to 3 (as router), got 4",
            lambda: mixture(params, x, top_k=4),
        ),
        (
            "mixture: top_k: expected from 1 to 3 (as router), got 0",
            lambda: mixture(params, x, top_k=0),
        ),
        ("linear: x: expected [..., 4], got [5, 3]", lambda: mixture(params, torch.zeros(5, 3))),
        (
            "init_mixture: experts: expected at least 1, got 0",
            lambda: layers.init_mixture(KEY, 4, 8, 0),
        ),
        (
            "mixture: padding: expected [5], got [4]",
            lambda: layers.balance_loss(routing, torch.ones(4, dtype=torch.bool)),
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            run()


def test_compiled_equals_eager():
    params = layers.init_mixture(KEY, 4, 8, 3, dtype=DTYPE)
    x = random.normal(KEY, (2, 5, 4), dtype=DTYPE)

    def loss(params, x):
        outputs, routing = mixture(params, x, routing=True)
        return outputs.sin().sum() + layers.balance_loss(routing)

    close(funcnets.compile(grad(loss), backend="aot_eager")(params, x), grad(loss)(params, x))
    members = tree.stack([params, layers.init_mixture(random.key(1), 4, 8, 3, dtype=DTYPE)])
    per_member = vmap(grad(loss), (0, None))
    close(funcnets.compile(per_member, backend="aot_eager")(members, x), per_member(members, x))


@pytest.mark.dynamo
def test_plain_torch_compile_of_a_mixture():
    params = layers.init_mixture(KEY, 4, 8, 3, activation="swiglu", dtype=DTYPE)
    x = random.normal(KEY, (2, 5, 4), dtype=DTYPE)

    def loss(params, x):
        outputs, routing = mixture(params, x, activation="swiglu", routing=True)
        return outputs.sin().sum() + layers.balance_loss(routing) + layers.router_z_loss(routing)

    step = grad_and_value(loss)
    torch._dynamo.reset()
    close(torch.compile(step, fullgraph=True, backend="aot_eager")(params, x), step(params, x))
    tracked = tree.map(lambda leaf: leaf.clone().requires_grad_(), params)
    torch.compile(loss, fullgraph=True, backend="aot_eager")(tracked, x).backward()
    close(tree.map(lambda leaf: leaf.grad, tracked), grad(loss)(params, x))

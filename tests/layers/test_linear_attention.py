import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, grad_and_value, hessian, vmap

import funcnets
from funcnets import layers, random, tree
from funcnets.layers import linear_attention, linear_dot_product_attention

KEY = random.key(0)
DTYPE = torch.float64
keys = st.integers(0, 2**16).map(random.key)
sizes = st.integers(1, 4)
yes_no = st.booleans()


def normal(key, *shape, dtype=DTYPE):
    return random.normal(key, shape, dtype=dtype)


def close(actual, expected, tolerance=1e-10):
    tree.map(
        lambda a, b: torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance),
        actual,
        expected,
    )


@st.composite
def problems(draw, causal=None):
    key = draw(keys)
    batch = draw(st.lists(st.integers(1, 2), max_size=2).map(tuple))
    groups, shared, width, value_width = draw(sizes), draw(st.integers(1, 2)), draw(sizes), 3
    causal = draw(yes_no) if causal is None else causal
    queries = draw(st.integers(1, 9))
    places = queries if causal else draw(sizes)
    a, b, c, d = random.split(key, 4)
    inputs = (
        normal(a, *batch, groups * shared, queries, width),
        normal(b, *batch, groups, places, width),
        normal(c, *batch, groups, places, value_width),
    )
    options = {"causal": causal}
    if draw(yes_no):
        options["padding"] = random.bernoulli(d, (*batch, places), 0.6)
    return inputs, options


def by_weights(q, k, v, causal=False, padding=None):
    """The weights themselves, which linear attention never has in full."""
    shared = q.shape[-3] // k.shape[-3]
    k, v = (x.repeat_interleave(shared, -3) for x in (k, v))
    weights = layers.elu_features(q) @ layers.elu_features(k).mT
    if causal:
        weights = weights.tril()
    if padding is not None:
        weights = weights * padding[..., None, None, :]
    return (weights / weights.sum(-1, keepdim=True)).nan_to_num() @ v


@given(problem=problems(), chunk=st.integers(1, 10))
def test_equals_attention_with_those_weights(problem, chunk):
    inputs, options = problem
    found = linear_dot_product_attention(*inputs, chunk=chunk, **options)
    close(found, by_weights(*inputs, **options))

    def gradient(apply, **more):
        return grad(lambda inputs: apply(*inputs, **options, **more).sin().sum())(inputs)

    found = gradient(linear_dot_product_attention, chunk=chunk)
    assert all(one.isfinite().all() for one in found)
    if "padding" not in options:  # where nothing is seen, the naive gradient is undefined
        close(found, gradient(by_weights))


@given(problem=problems(causal=True), chunks=st.tuples(sizes, sizes), cut=st.integers(1, 8))
def test_chunked_and_streamed_equal_the_whole(problem, chunks, cut):
    inputs, options = problem
    whole, last = linear_dot_product_attention(*inputs, state=0, **options)
    close(linear_dot_product_attention(*inputs, chunk=chunks[0], **options), whole)
    padding = options.pop("padding", None)
    state, parts = 0, []
    for start, stop in ((0, cut), (cut, None)):
        part = [x[..., start:stop, :] for x in inputs]
        if not part[0].shape[-2]:
            continue
        real = None if padding is None else padding[..., start:stop]
        outputs, state = linear_dot_product_attention(
            *part, padding=real, state=state, chunk=chunks[1], **options
        )
        parts.append(outputs)
    close(torch.cat(parts, -2), whole)
    close(state, last)


@given(key=keys, chunk=st.integers(1, 7))
def test_a_later_token_changes_no_earlier_output(key, chunk):
    params = layers.init_attention(key, 8, 4, key_value_heads=2, dtype=DTYPE)
    x = normal(key, 2, 6, 8)
    changed = x + torch.tensor([0, 0, 0, 1, 1, 1])[:, None]
    before, after = (
        linear_attention(params, each, heads=4, causal=True, chunk=chunk) for each in (x, changed)
    )
    assert torch.equal(after[:, :3], before[:, :3])
    assert (after[:, 3:] != before[:, 3:]).any()


@given(key=keys, causal=yes_no)
def test_padding_changes_nothing(key, causal):
    params = layers.init_attention(key, 8, 2, dtype=DTYPE)
    x = normal(key, 2, 6, 8)
    padding = torch.tensor([True] * 4 + [False] * 2).expand(2, 6)
    found = linear_attention(params, x, heads=2, causal=causal, padding=padding)
    close(found[:, :4], linear_attention(params, x[:, :4], heads=2, causal=causal))


@given(key=keys)
def test_permuted_tokens_give_permuted_outputs(key):
    params = layers.init_attention(key, 8, 2, dtype=DTYPE)
    x, order = normal(key, 2, 6, 8), random.permutation(key, 6)
    close(
        linear_attention(params, x[:, order], heads=2),
        linear_attention(params, x, heads=2)[:, order],
    )


def test_the_layer_is_its_parts():
    params = layers.init_attention(KEY, 8, 2, key_width=5, value_width=3, dtype=DTYPE)
    x, k, v = normal(KEY, 2, 6, 8), normal(KEY, 2, 4, 5), normal(KEY, 2, 4, 3)
    heads = layers.attention_inputs(params, x, k, v, 2)
    turn = layers.rotary_positions(6, 4, keys=4, dtype=DTYPE)
    expected = by_weights(*turn(*heads[:2]), heads[2])
    close(
        linear_attention(params, x, k, v, heads=2, positions=turn),
        layers.attention_outputs(params, expected),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_nothing_to_attend_to_gives_zeros(dtype, causal):
    q, k, v = (x.to(dtype) for x in normal(KEY, 3, 2, 4, 5))
    padding = torch.tensor([False, False, True, True]) if causal else torch.tensor([False] * 4)
    nothing = slice(0, 2) if causal else slice(None)

    def run(inputs):
        return linear_dot_product_attention(*inputs, causal=causal, padding=padding)

    outputs = run((q, k, v))
    assert outputs.dtype == dtype
    assert (outputs[:, nothing] == 0).all()
    gradients = grad(lambda inputs: run(inputs).float().square().sum())((q, k, v))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0][:, nothing] == 0).all()
    # Far below zero, features are small and yet no zeros.
    far = linear_dot_product_attention(q, k - 30, v, causal=causal)
    close(
        far.to(DTYPE),
        by_weights(q.to(DTYPE), k.to(DTYPE) - 30, v.to(DTYPE), causal),
        {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 0.2),
    )
    assert far.isfinite().all()
    assert (far != 0).any()


def test_elu_features():
    x = torch.linspace(-30, 30, 301, dtype=DTYPE)
    close(layers.elu_features(x), F.elu(x) + 1, 1e-12)
    close(vmap(grad(layers.elu_features))(x), vmap(grad(lambda x: F.elu(x) + 1))(x), 1e-12)
    assert (layers.elu_features(torch.tensor([-80.0, 80.0])) > 0).all()
    assert vmap(grad(layers.elu_features))(torch.tensor([1e4, -1e4])).tolist() == [1, 0]


PARAMS = layers.init_attention(KEY, 8, 2)
X = torch.zeros(2, 3, 8)


@pytest.mark.parametrize(
    ("message", "run"),
    [
        (
            "linear_attention: k: expected 3 keys (as many as queries, for it is causal)",
            lambda: linear_attention(PARAMS, X, torch.zeros(2, 4, 8), heads=2, causal=True),
        ),
        (
            "linear_attention: state: expected with causal=True alone",
            lambda: linear_attention(PARAMS, X, heads=2, state=0),
        ),
        (
            "linear_attention: state: expected [2, 2, 4, 5], got [2, 2, 4, 4]",
            lambda: linear_attention(
                PARAMS, X, heads=2, causal=True, state=torch.zeros(2, 2, 4, 4)
            ),
        ),
        (
            "linear_attention: padding: expected [2, 3], got [2, 4]",
            lambda: linear_attention(
                PARAMS, X, heads=2, padding=torch.ones(2, 4, dtype=torch.bool)
            ),
        ),
        (
            "linear_attention: chunk: expected at least 1, got 0",
            lambda: linear_attention(PARAMS, X, heads=2, causal=True, chunk=0),
        ),
        (
            "attention: heads: expected a divisor of the width, 8, got 3",
            lambda: linear_attention(PARAMS, X, heads=3),
        ),
        (
            "linear_attention: q: expected [..., heads, queries, head_width] with at least one",
            lambda: linear_dot_product_attention(*[torch.zeros(2, 0, 4)] * 3),
        ),
    ],
)
def test_errors(unchecked, message, run):
    with pytest.raises(ValueError, match=re.escape(message)):
        run()


def test_compiled_equals_eager():
    params = layers.init_attention(KEY, 4, 2, dtype=DTYPE)
    x = normal(KEY, 2, 5, 4)

    def loss(params, x):
        y, state = linear_attention(params, x, heads=2, causal=True, state=0, chunk=2)
        return linear_attention(params, y, heads=2).sin().sum() + state.sin().sum()

    close(funcnets.compile(grad(loss), backend="aot_eager")(params, x), grad(loss)(params, x))
    assert hessian(lambda x: loss(params, x))(x[:1, :3]).isfinite().all()


@pytest.mark.dynamo
def test_plain_torch_compile_of_linear_attention():
    params = layers.init_attention(KEY, 4, 2, dtype=DTYPE)
    x, padding = normal(KEY, 2, 5, 4), torch.tensor([[True] * 4 + [False]] * 2)

    def step(params, x):
        def loss(params, x):
            y, state = linear_attention(params, x, heads=2, causal=True, state=0, chunk=2)
            y = linear_attention(params, y, heads=2, padding=padding)
            return y.sin().sum() + state.sin().sum()

        return grad_and_value(loss, (0, 1))(params, x)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    close(compiled(params, x), step(params, x))

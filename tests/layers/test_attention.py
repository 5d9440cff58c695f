import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import nn
from torch.func import grad, grad_and_value, hessian, jacrev, jvp, vjp, vmap

import funcnets
from funcnets import _torch, layers, random, tree
from funcnets.layers import attention, init_attention, scaled_dot_product_attention

KEY = random.key(0)
DTYPE = torch.float64
keys = st.integers(0, 2**16).map(random.key)
sizes = st.integers(1, 4)
yes_no = st.booleans()


def normal(key, *shape, dtype=DTYPE):
    return random.normal(key, shape, dtype=dtype)


def close(actual, expected, tolerance=1e-9):
    tree.map(
        lambda a, b: torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance),
        actual,
        expected,
    )


def some_params(key, width, heads, **options):
    """Parameters with no two values alike, biases included."""
    params = init_attention(key, width, heads, dtype=DTYPE, **options)
    return tree.map_with_path(
        lambda path, leaf: (
            leaf + 0.3 * normal(random.fold_in(key, len("".join(path))), *leaf.shape)
        ),
        params,
    )


def reference(params, width, heads, **options):
    with torch.random.fork_rng():
        module = nn.MultiheadAttention(width, heads, batch_first=True, dtype=DTYPE, **options)
    module.load_state_dict(params.flatten_keys(".").to_dict())
    return module


@settings(max_examples=60)
@given(data=st.data(), key=keys)
def test_equals_the_torch_module(data, key):
    heads, head_width = data.draw(sizes), data.draw(sizes)
    width, bias = heads * head_width, data.draw(yes_no)
    key_width = data.draw(st.none() | sizes)
    value_width = data.draw(st.none() | sizes)
    batch, queries, places = data.draw(st.none() | sizes), data.draw(sizes), data.draw(sizes)
    kind = data.draw(st.sampled_from(["self", "memory", "all"]))
    if kind == "self":
        key_width = value_width = None
        places = queries
    elif kind == "memory":
        value_width = key_width
    more = {"add_bias_kv": data.draw(yes_no), "add_zero_attn": data.draw(yes_no)}
    made = {"key_width": key_width, "value_width": value_width, "bias_kv": more["add_bias_kv"]}
    params = some_params(key, width, heads, bias=bias, **made)
    module = reference(params, width, heads, kdim=key_width, vdim=value_width, bias=bias, **more)
    lead = () if batch is None else (batch,)
    a, b, c, d, e = random.split(key, 5)
    inputs = (normal(a, *lead, queries, width),)
    if kind != "self":
        inputs += (normal(b, *lead, places, key_width or width),)
    if kind == "all":
        inputs += (normal(c, *lead, places, value_width or width),)

    # Every query sees the first key: where it sees none, torch gives NaN.
    options, torchs = {"zero_attention": more["add_zero_attn"]}, {}
    masking = data.draw(st.sampled_from([None, "causal", "mask", "heads", "bias"]))
    if masking == "causal" and queries == places:
        options["causal"] = True
        torchs["attn_mask"] = nn.Transformer.generate_square_subsequent_mask(queries, dtype=DTYPE)
    elif masking == "mask":
        options["mask"] = random.bernoulli(d, (queries, places)) | (torch.arange(places) == 0)
        torchs["attn_mask"] = ~options["mask"]
    elif masking == "heads":
        shape = (*lead, heads, queries, places)
        options["mask"] = random.bernoulli(d, shape) | (torch.arange(places) == 0)
        torchs["attn_mask"] = ~options["mask"].flatten(0, -3)
    elif masking == "bias":
        options["bias"] = normal(d, queries, places)
        torchs["attn_mask"] = options["bias"]
    if data.draw(yes_no):
        options["padding"] = random.bernoulli(e, (*lead, places)) | (torch.arange(places) == 0)
        torchs["key_padding_mask"] = ~options["padding"]
        if masking in ("causal", "bias"):  # torch wants both masks of one dtype
            torchs["key_padding_mask"] = torch.where(options["padding"], 0.0, -math.inf).to(DTYPE)

    tracked = [x.clone().requires_grad_() for x in inputs]
    triple = tracked + [tracked[-1]] * (3 - len(tracked))
    expected, weights = module(*triple, average_attn_weights=False, **torchs)

    outputs, found = attention(params, *inputs, heads=heads, weights=True, **options)
    close((outputs, found), (expected.detach(), weights.detach()))
    cotangent = normal(e, *outputs.shape)
    expected.backward(cotangent)
    named = dict(module.named_parameters())
    for fused in (True, False):
        outputs, pull = vjp(
            lambda params, *inputs, fused=fused: attention(
                params, *inputs, heads=heads, fused=fused, **options
            ),
            params,
            *inputs,
        )
        close(outputs, expected.detach())
        gradients, *rest = pull(cotangent)
        for name, gradient in gradients.flatten_keys(".").items():
            close(gradient, named[name].grad)
        close(rest, [x.grad for x in tracked])


def test_initial_values_are_distributed_as_torchs():
    width, heads = 480, 4  # a standard deviation of so many values is known well enough
    for options in ({"bias_kv": True}, {"key_width": 40, "value_width": 60}, {"bias": False}):
        params = init_attention(KEY, width, heads, **options)
        names = {"key_width": "kdim", "value_width": "vdim", "bias": "bias"}
        names["bias_kv"] = "add_bias_kv"
        with torch.random.fork_rng():
            module = nn.MultiheadAttention(
                width, heads, **{names[name]: value for name, value in options.items()}
            )
        state, ours = module.state_dict(), params.flatten_keys(".")
        assert set(state) == set(ours.keys())
        for name, expected in state.items():
            assert ours[name].shape == expected.shape
            torch.testing.assert_close(ours[name].std(), expected.std(), rtol=0.05, atol=0.01)
            if not name.startswith("bias_"):  # which are drawn without a bound
                torch.testing.assert_close(
                    ours[name].abs().max(), expected.abs().max(), rtol=0.05, atol=0
                )


def test_added_keys_are_seen_by_all_and_stand_behind_the_others():
    params, x = some_params(KEY, 4, 2, bias_kv=True), normal(KEY, 3, 5, 4)
    options = {"heads": 2, "causal": True, "window": 2, "zero_attention": True}
    outputs, weights = attention(params, x, weights=True, **options)
    places = torch.ones(5, 5, dtype=torch.bool).tril().triu(-1)
    assert ((weights > 0) == torch.cat([places, torch.ones(5, 2, dtype=torch.bool)], 1)).all()
    # Where there is nothing else, they are what is attended to; and under the transforms.
    nothing = torch.zeros(3, 5, dtype=torch.bool)
    alone = attention(params, x, padding=nothing, **options)
    assert (alone - params["out_proj", "bias"]).abs().min() > 1e-6
    one = lambda row: attention(params, row, **options)  # noqa: E731
    close(vmap(one)(x), outputs)
    loss = lambda params: attention(params, x, **options).square().sum()  # noqa: E731
    _, product = jvp(grad(loss), (params,), (params,))
    assert product["bias_k"].any()
    empty = torch.zeros(3, 2, 5, 2, dtype=DTYPE)
    cache = layers.KeyValueCache(empty, empty, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="cached_attention: params: expected no bias_k"):
        layers.cached_attention(params, x, cache, heads=2)


@st.composite
def problems(draw, dtype=DTYPE):
    """Queries, keys, values of any number of batch axes, and options of every kind."""
    key = draw(keys)
    batch = draw(st.lists(st.integers(1, 2), max_size=2).map(tuple))
    groups, shared = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    heads, queries, places = groups * shared, draw(sizes), draw(sizes)
    width, value_width = draw(sizes), draw(sizes)
    ks = random.split(key, 6)
    q = normal(ks[0], *batch, heads, queries, width, dtype=dtype)
    k = normal(ks[1], *batch, groups, places, width, dtype=dtype)
    v = normal(ks[2], *batch, groups, places, value_width, dtype=dtype)
    full = (*batch, heads, queries, places)

    def broadcast():
        least = draw(st.integers(2, len(full)))
        return tuple(draw(st.sampled_from([1, size])) for size in full[-least:])

    options = {"causal": draw(yes_no), "window": draw(st.none() | sizes)}
    if draw(yes_no):
        options["mask"] = random.bernoulli(ks[3], broadcast(), 0.6)
    if draw(yes_no):
        options["bias"] = normal(ks[4], *broadcast(), dtype=dtype)
        if draw(yes_no):
            cut = random.bernoulli(ks[5], options["bias"].shape, 0.3)
            options["bias"] = torch.where(cut, -math.inf, options["bias"])
    if draw(yes_no):
        options["scale"] = 0.7
    return (q, k, v), options


def by_hand(q, k, v, mask=None, bias=None, causal=False, window=None, scale=None):
    """One query of one head at a time, over the keys that it sees alone."""
    *_, heads, queries, width = q.shape
    places = k.shape[-2]
    k, v = (x.repeat_interleave(heads // x.shape[-3], -3) for x in (k, v))
    full = (*q.shape[:-1], places)
    mask = torch.ones(full, dtype=torch.bool) if mask is None else mask.expand(full)
    bias = torch.zeros(full, dtype=q.dtype) if bias is None else bias.expand(full)
    outputs, weights = q.new_zeros(*q.shape[:-1], v.shape[-1]), q.new_zeros(full)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:-1])).tolist():
        *at, i = place
        here = i + places - queries
        seen = [
            j
            for j in range(places)
            if mask[(*at, i, j)]
            and bias[(*at, i, j)] > -math.inf
            and (not causal or j <= here)
            and (window is None or abs(here - j) < window)
        ]
        if not seen:
            continue
        key_rows, value_rows = k[tuple(at)][seen], v[tuple(at)][seen]
        scores = key_rows @ q[tuple(place)] * (scale or width**-0.5) + bias[tuple(place)][seen]
        outputs[tuple(place)] = scores.softmax(0) @ value_rows
        weights[tuple(place)][seen] = scores.softmax(0)
    return outputs, weights


@settings(max_examples=60)
@given(problem=problems())
def test_every_option_equals_the_sum_by_hand(problem):
    inputs, options = problem
    expected, weights = by_hand(*inputs, **options)
    close(scaled_dot_product_attention(*inputs, **options), expected)
    close(scaled_dot_product_attention(*inputs, fused=False, **options), expected)
    close(scaled_dot_product_attention(*inputs, weights=True, **options), (expected, weights))


@settings(max_examples=30)
@given(problem=problems())
def test_fused_and_plain_have_the_same_gradients(problem):
    inputs, options = problem
    if "bias" in options:
        inputs, fixed = (*inputs, options.pop("bias")), options

        def apply(q, k, v, bias, fused):
            return scaled_dot_product_attention(q, k, v, bias=bias, fused=fused, **fixed)
    else:

        def apply(q, k, v, fused):
            return scaled_dot_product_attention(q, k, v, fused=fused, **options)

    outputs, pull = vjp(lambda *inputs: apply(*inputs, True), *inputs)
    cotangent = normal(KEY, *outputs.shape)
    fused = pull(cotangent)
    close(fused, vjp(lambda *inputs: apply(*inputs, False), *inputs)[1](cotangent))
    assert all(gradient.isfinite().all() for gradient in fused)
    tracked = [x.clone().requires_grad_() for x in inputs]
    close(torch.autograd.grad(apply(*tracked, True), tracked, cotangent), fused)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["mask", "padding", "bias", "float bias", "causal", "window"])
def test_nothing_to_attend_to_gives_zeros_and_no_gradient(how, dtype, fused):
    q, k, v = (x.to(dtype) for x in normal(KEY, 3, 2, 2, 4, 8))
    empty = torch.tensor([False, True, False, True])
    options = {}
    if how == "mask":
        options["mask"] = ~empty[:, None].expand(4, 4)
    elif how == "padding":
        options["mask"] = ~torch.tensor([True, False])[:, None, None, None]
    elif how == "bias":
        options["mask"] = ~empty[:, None].expand(4, 4)
        options["bias"] = normal(KEY, 4, 4)
    elif how == "float bias":
        options["bias"] = torch.where(empty[:, None].expand(4, 4), -math.inf, normal(KEY, 4, 4))
    elif how == "causal":
        options["causal"], k, v = True, k[..., :2, :], v[..., :2, :]
    else:
        options["window"], k, v = 1, k[..., :2, :], v[..., :2, :]
        options["causal"] = True
    tracked = [x.clone().requires_grad_() for x in (q, k, v)]
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way back either
        outputs = scaled_dot_product_attention(*tracked, fused=fused, **options)
        gradients = torch.autograd.grad(outputs.float().square().sum(), tracked)
    nothing = {
        "padding": (slice(0, 1), slice(None), slice(None)),
        "causal": (slice(None), slice(None), slice(0, 2)),
        "window": (slice(None), slice(None), slice(0, 2)),
    }.get(how, (slice(None), slice(None), empty))
    assert outputs.dtype == dtype
    assert (outputs[nothing] == 0).all()
    assert outputs.isfinite().all()
    assert (outputs != 0).any()
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0][nothing] == 0).all()
    assert (gradients[0] != 0).any() or how == "window"  # of one key, the weight is always one
    functional = grad(
        lambda q: (
            scaled_dot_product_attention(q, k, v, fused=fused, **options).float().square().sum()
        )
    )(q)
    torch.testing.assert_close(functional, gradients[0])
    _, weights = scaled_dot_product_attention(q, k, v, weights=True, **options)
    assert (weights[nothing] == 0).all()


def test_all_tokens_padded_gives_the_bias_of_the_output():
    params = some_params(KEY, 4, 2)
    x, padding = normal(KEY, 2, 3, 4), torch.tensor([[True] * 3, [False] * 3])
    outputs, weights = attention(params, x, heads=2, padding=padding, weights=True)
    close(outputs[1], params["out_proj", "bias"].expand(3, 4))
    close(weights[1], torch.zeros(2, 3, 3, dtype=DTYPE))
    close(attention(params, x, heads=2, padding=padding), outputs)


arrangements = st.fixed_dictionaries(
    {
        "causal": yes_no,
        "window": st.none() | st.integers(1, 5),
        "normalize": yes_no,
        "fused": yes_no,
        "positions": st.sampled_from(
            [None, lambda q, k: (layers.rotary(q), layers.rotary(k, base=10000.0))]
        ),
    }
)


def layer_for(data, key):
    groups = data.draw(st.integers(1, 2))
    heads = groups * data.draw(st.integers(1, 2))
    width = heads * 4
    params = some_params(key, width, heads, key_value_heads=groups)
    return params, width, heads


@given(data=st.data(), key=keys, options=arrangements)
def test_a_later_token_changes_no_earlier_output(data, key, options):
    params, width, heads = layer_for(data, key)
    x = normal(key, 2, 6, width)
    place = data.draw(st.integers(1, 5))
    changed = x.clone()
    changed[:, place:] += 1
    options["causal"] = True
    before, after = (attention(params, each, heads=heads, **options) for each in (x, changed))
    close(after[:, :place], before[:, :place], 1e-12)
    assert (after[:, place] != before[:, place]).any()


@given(data=st.data(), key=keys, options=arrangements)
def test_padding_changes_nothing(data, key, options):
    params, width, heads = layer_for(data, key)
    x = normal(key, 2, 4, width)
    real = data.draw(st.integers(1, 4))
    padding = torch.tensor([[True] * 4 + [False] * 3, [True] * real + [False] * (7 - real)])
    padded = torch.cat([x, normal(random.fold_in(key, 1), 2, 3, width)], 1)
    found = attention(params, padded, heads=heads, padding=padding, **options)
    close(found[0, :4], attention(params, x[0], heads=heads, **options))
    close(found[1, :real], attention(params, x[1, :real], heads=heads, **options))


@given(data=st.data(), key=keys, options=arrangements)
def test_permuted_tokens_give_permuted_outputs(data, key, options):
    params, width, heads = layer_for(data, key)
    options |= {"causal": False, "window": None, "positions": None}
    x, order = normal(key, 2, 6, width), random.permutation(key, 6)
    found = attention(params, x[:, order], heads=heads, **options)
    close(found, attention(params, x, heads=heads, **options)[:, order])


@given(data=st.data(), key=keys, window=st.integers(1, 7), causal=yes_no, fused=yes_no)
def test_a_window_is_a_mask(data, key, window, causal, fused):
    params, width, heads = layer_for(data, key)
    x = normal(key, 2, 6, width)
    distance = torch.arange(6)[:, None] - torch.arange(6)
    mask = distance.abs() < window
    mask = mask & (distance >= 0) if causal else mask
    found = attention(params, x, heads=heads, window=window, causal=causal, fused=fused)
    close(found, attention(params, x, heads=heads, mask=mask))


@settings(max_examples=10)
@given(
    key=keys,
    window=st.integers(1, 40),
    time=st.integers(120, 170),
    causal=yes_no,
    fused=yes_no,
    padded=st.sampled_from([None, "samples", "heads", "one for all", "tokens alone"]),
)
def test_a_narrow_window_over_a_long_sequence_is_a_mask(key, window, time, causal, fused, padded):
    a, b, c, d = random.split(key, 4)
    q, k, v = normal(a, 2, 4, time, 3), normal(b, 2, 2, time, 3), normal(c, 2, 2, time, 2)
    distance = torch.arange(time)[:, None] - torch.arange(time)
    band = distance.abs() < window
    band = band & (distance >= 0) if causal else band
    shape = {
        None: (1, 1, 1, 1),
        "samples": (2, 1, 1, time),
        "heads": (4, 1, time),
        "one for all": (2, 1, 1, 1),
        "tokens alone": (1, time),
    }[padded]
    mask = None if padded is None else random.bernoulli(d, shape, 0.7)

    def windowed(inputs):
        return scaled_dot_product_attention(
            *inputs, mask=mask, window=window, causal=causal, fused=fused
        )

    def masked(inputs):
        seen = band if mask is None else band & mask
        return scaled_dot_product_attention(*inputs, mask=seen)

    for run, reference in (
        (windowed, masked),
        *((grad(lambda x, f=f: f(x).sin().sum()) for f in (windowed, masked)),),
        *((lambda x, f=f: jvp(f, (x,), (x,)) for f in (windowed, masked)),),
        *(
            (
                lambda x, f=f: vmap(f, -1)(tuple(y[..., None] for y in x))
                for f in (windowed, masked)
            ),
        ),
    ):
        close(run((q, k, v)), reference((q, k, v)))


def test_a_narrow_window_computes_no_other_scores(monkeypatch):
    sizes = []

    def counted(q, k, v, **options):
        sizes.append(q.shape[-2] * k.shape[-2] * q.shape[:-2].numel())
        return real(q, k, v, **options)

    real = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    x = normal(KEY, 1, 1, 4096, 2)
    scaled_dot_product_attention(x, x, x, causal=True, window=64)
    scaled_dot_product_attention(x, x, x, window=64)
    assert sizes == [4096 * 2 * 64, 4096 * 3 * 64]


@given(data=st.data(), key=keys, options=arrangements)
def test_the_last_queries_see_what_they_see_among_all(data, key, options):
    """What a cache of keys and values rests on."""
    params, width, heads = layer_for(data, key)
    options |= {"causal": True, "positions": None}
    x = normal(key, 2, 6, width)
    last = data.draw(st.integers(1, 6))
    whole = attention(params, x, heads=heads, **options)
    close(attention(params, x[:, -last:], x, heads=heads, **options), whole[:, -last:])


@given(key=keys)
def test_grouped_queries_are_repeated_keys_and_values(key):
    params = some_params(key, 12, 6, key_value_heads=2)
    assert params["in_proj_weight"].shape == (12 + 2 * 4, 12)
    repeated = params.clone()
    for name in ("in_proj_weight", "in_proj_bias"):
        q, *shared = params[name].split([12, 4, 4])
        shared = [x.unflatten(0, (2, 2)).repeat_interleave(3, 0).flatten(0, 1) for x in shared]
        repeated[name] = torch.cat([q, *shared])
    x, memory = normal(key, 2, 5, 12), normal(random.fold_in(key, 1), 2, 4, 12)
    for inputs in ((x,), (x, memory), (x, memory, memory.clone())):
        for fused in (True, False):
            close(
                attention(params, *inputs, heads=6, fused=fused),
                attention(repeated, *inputs, heads=6),
            )
    shared = some_params(key, 12, 6, key_value_heads=1, key_width=5, value_width=7)
    assert shared["k_proj_weight"].shape == (2, 5)
    memory = normal(key, 2, 3, 5), normal(key, 2, 3, 7)
    assert attention(shared, x, *memory, heads=6).shape == x.shape


@given(key=keys)
def test_normalised_queries_and_keys(key):
    params = some_params(key, 8, 2)
    x = normal(key, 3, 5, 8)
    q, k, v = layers.attention_inputs(params, x, None, None, 2)
    q, k = (x / (x.square().mean(-1, keepdim=True) + torch.finfo(DTYPE).eps).sqrt() for x in (q, k))
    expected = layers.attention_outputs(params, scaled_dot_product_attention(q, k, v))
    close(attention(params, x, heads=2, normalize=True), expected)
    # Before the turn, which does not change lengths.
    turned = attention(
        params,
        x,
        heads=2,
        normalize=True,
        positions=lambda q, k: (layers.rotary(q), layers.rotary(k)),
    )
    outputs = scaled_dot_product_attention(layers.rotary(q), layers.rotary(k), v)
    close(turned, layers.attention_outputs(params, outputs))


def test_dropout_of_weights_by_key():
    params = some_params(KEY, 8, 2)
    x = normal(KEY, 2, 50, 8)
    outputs, weights = attention(params, x, heads=2, dropout=0.3, key=KEY, weights=True)
    _, kept = attention(params, x, heads=2, weights=True)
    dropped = weights == 0
    assert 0.25 < dropped.double().mean() < 0.35
    close(weights[~dropped], kept[~dropped] / 0.7)
    assert torch.equal(attention(params, x, heads=2, dropout=0.3, key=KEY), outputs)
    other = attention(params, x, heads=2, dropout=0.3, key=random.key(1))
    assert not torch.equal(other, outputs)
    still = attention(params, x, heads=2)
    for options in ({"dropout": 0.3}, {"key": KEY}, {"dropout": 0.0, "key": KEY}):
        assert torch.equal(attention(params, x, heads=2, **options), still)
    rates = torch.tensor([0.0, 0.3], dtype=DTYPE)
    both = vmap(lambda rate: attention(params, x, heads=2, dropout=rate, key=KEY))(rates)
    close(both, torch.stack([still, outputs]))


def test_the_fused_kernel_serves_where_it_can(monkeypatch):
    called = []

    def fused(*args, **options):
        called.append(options)
        return real(*args, **options)

    real = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)
    params, x = some_params(KEY, 4, 2), normal(KEY, 2, 3, 4)

    def loss(x, **options):
        return attention(params, x, heads=2, causal=True, **options).sum()

    for run in (
        loss,
        grad(loss),
        funcnets.grad(loss),
        lambda x: attention(params, x, heads=2, padding=torch.ones(2, 3, dtype=torch.bool)),
        funcnets.compile(grad(loss), backend="aot_eager"),
    ):
        called.clear()
        run(x)
        assert called
    for run in (
        grad(lambda x: grad(loss)(x).sum()),
        lambda x: jvp(loss, (x,), (x,)),
        hessian(loss),
        vmap(loss),
        vmap(grad(loss)),
        lambda x: loss(x, fused=False),
        lambda x: loss(x, dropout=0.1, key=KEY),
        lambda x: attention(params, x, heads=2, weights=True),
    ):
        called.clear()
        run(x)
        assert not called
    assert _torch.first_order()


def test_attention_under_autocast():
    params, x = init_attention(KEY, 8, 2), random.normal(KEY, (2, 3, 8))
    bias = layers.alibi_bias(2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for options in ({}, {"bias": bias}, {"weights": True}, {"normalize": True}):
            outputs = attention(params, x, heads=2, **options)
            outputs = outputs[0] if "weights" in options else outputs
            assert outputs.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("message", "run"),
    [
        (
            "init_attention: heads: expected a divisor of the width, 10, got 4",
            lambda: init_attention(KEY, 10, 4),
        ),
        (
            "init_attention: key_value_heads: expected a divisor of the heads, 4, got 3",
            lambda: init_attention(KEY, 8, 4, key_value_heads=3),
        ),
        ("init_attention: width: expected at least 1, got 0", lambda: init_attention(KEY, 0, 4)),
        (
            "attention: heads: expected a divisor of the width, 8, got 3",
            lambda: attention(PARAMS, X, heads=3),
        ),
        (
            "attention: queries: expected [..., time, 8] with at least one token, got [2, 3, 7]",
            lambda: attention(PARAMS, torch.zeros(2, 3, 7), heads=2),
        ),
        (
            "attention: queries: expected [..., time, 8] with at least one token, got [2, 0, 8]",
            lambda: attention(PARAMS, torch.zeros(2, 0, 8), heads=2),
        ),
        (
            "attention: keys: expected [2, time, 8] with at least one token, got [2, 0, 8]",
            lambda: attention(PARAMS, X, torch.zeros(2, 0, 8), heads=2),
        ),
        (
            "attention: keys: expected [2, time, 8] (as queries), got [3, 3, 8]",
            lambda: attention(PARAMS, X, torch.zeros(3, 3, 8), heads=2),
        ),
        (
            "attention: keys: expected [2, time, 8] with at least one token, got [2, 3, 5]",
            lambda: attention(PARAMS, X, torch.zeros(2, 3, 5), heads=2),
        ),
        (
            "attention: values: expected [2, 4, 8] (as keys), got [2, 5, 8]",
            lambda: attention(PARAMS, X, torch.zeros(2, 4, 8), torch.zeros(2, 5, 8), heads=2),
        ),
        (
            "attention: values: expected [2, 4, 6] with at least one token, got [2, 4, 7]",
            lambda: attention(
                init_attention(KEY, 8, 2, key_width=5, value_width=6),
                X,
                torch.zeros(2, 4, 5),
                torch.zeros(2, 4, 7),
                heads=2,
            ),
        ),
        (
            "attention: queries: x: expected float32 (as the projection), got float64[2, 3, 8]",
            lambda: attention(PARAMS, X.double(), heads=2),
        ),
        (
            "attention: mask: expected bool (True = may attend; what is added to the scores is "
            "bias), got float32[3, 3]",
            lambda: attention(PARAMS, X, heads=2, mask=torch.zeros(3, 3)),
        ),
        (
            "attention: mask: expected what broadcasts to [2, 2, 3, 3], got [3, 4]",
            lambda: attention(PARAMS, X, heads=2, mask=torch.ones(3, 4, dtype=torch.bool)),
        ),
        (
            "attention: mask: expected what broadcasts to [2, 2, 3, 3], got [3]",
            lambda: attention(PARAMS, X, heads=2, mask=torch.ones(3, dtype=torch.bool)),
        ),
        (
            "attention: bias: expected floating-point numbers, got bool[3, 3]",
            lambda: attention(PARAMS, X, heads=2, bias=torch.ones(3, 3, dtype=torch.bool)),
        ),
        (
            "attention: bias: expected what broadcasts to [2, 2, 3, 3], got [1, 2, 2, 3, 3]",
            lambda: attention(PARAMS, X, heads=2, bias=torch.zeros(1, 2, 2, 3, 3)),
        ),
        (
            "attention: padding: expected [2, 3], got [2, 4]",
            lambda: attention(PARAMS, X, heads=2, padding=torch.ones(2, 4, dtype=torch.bool)),
        ),
        (
            "attention: padding: expected bool (True = a real token), got int64[2, 3]",
            lambda: attention(PARAMS, X, heads=2, padding=torch.ones(2, 3, dtype=torch.int64)),
        ),
        (
            "scaled_dot_product_attention: window: expected at least 1, got 0",
            lambda: attention(PARAMS, X, heads=2, window=0),
        ),
        (
            "attention: in_proj_weight: expected rows for whole heads of 4",
            lambda: attention(
                TensorDict({**dict(PARAMS.items()), "in_proj_weight": torch.zeros(19, 8)}),
                X,
                heads=2,
            ),
        ),
        (
            "scaled_dot_product_attention: k: expected heads that divide 3 (as q), got [2, 4, 5]",
            lambda: scaled_dot_product_attention(
                torch.zeros(3, 4, 5), torch.zeros(2, 4, 5), torch.zeros(2, 4, 5)
            ),
        ),
        (
            "scaled_dot_product_attention: q: expected [..., heads, queries, head_width], none of "
            "them 0, got [3, 0, 5]",
            lambda: scaled_dot_product_attention(
                torch.zeros(3, 0, 5), torch.zeros(3, 4, 5), torch.zeros(3, 4, 5)
            ),
        ),
        (
            "scaled_dot_product_attention: v: expected [3, 4, value_width] (as k), got [3, 5, 5]",
            lambda: scaled_dot_product_attention(
                torch.zeros(3, 4, 5), torch.zeros(3, 4, 5), torch.zeros(3, 5, 5)
            ),
        ),
    ],
)
def test_errors(unchecked, message, run):
    with pytest.raises(ValueError, match=re.escape(message)):
        run()


def test_error_of_missing_weights(unchecked):
    with pytest.raises(KeyError, match=r"expected an entry in_proj_weight, or .* got out_proj"):
        attention(TensorDict({"out_proj": PARAMS["out_proj"]}), X, heads=2)


PARAMS = init_attention(KEY, 8, 2)
X = torch.zeros(2, 3, 8)


@given(key=keys, causal=yes_no)
def test_hessian(key, causal):
    params = some_params(key, 2, 1)
    x = normal(key, 3, 2)

    def loss(x):
        return attention(params, x, heads=1, causal=causal).sin().sum()

    h = hessian(loss)(x).reshape(6, 6)
    close(h, h.T)
    close(h, jacrev(jacrev(loss))(x).reshape(6, 6), 1e-8)
    tracked = x.clone().requires_grad_()
    first = torch.autograd.grad(
        attention(params, tracked, heads=1, causal=causal, fused=False).sin().sum(),
        tracked,
        create_graph=True,
    )[0]
    second = torch.stack(
        [torch.autograd.grad(one, tracked, retain_graph=True)[0] for one in first.flatten()]
    )
    close(h, second.reshape(6, 6))


def test_compiled_equals_eager():
    params, x = some_params(KEY, 4, 2, key_value_heads=1), normal(KEY, 2, 3, 4)
    padding = torch.tensor([[True, True, False], [False] * 3])

    def step(params, x):
        def loss(params, x):
            turn = layers.rotary_positions(3, 2, dtype=DTYPE)
            y = attention(params, x, heads=2, causal=True, positions=turn, normalize=True)
            y = attention(params, y, heads=2, padding=padding, dropout=0.2, key=KEY)
            y = attention(params, y, heads=2, window=2)
            return y.sin().sum(), y

        return grad(loss, (0, 1), has_aux=True)(params, x)

    def plain(params, x):
        return attention(params, x, heads=2, causal=True).sin().sum()

    def members(params, x):
        return vmap(grad(plain), (0, None))(params, x)

    def curvature(params, x):
        return jvp(lambda x: grad(plain)(params, x), (x,), (x,))

    stacked = tree.stack([params, some_params(random.key(1), 4, 2, key_value_heads=1)])
    for f, tree_of in ((step, params), (members, stacked), (curvature, params)):
        close(funcnets.compile(f, backend="aot_eager")(tree_of, x), f(tree_of, x))


@pytest.mark.dynamo
def test_plain_torch_compile_of_attention():
    params, x = some_params(KEY, 8, 2, key_value_heads=1), normal(KEY, 2, 3, 8)
    memory = normal(KEY, 2, 4, 8)
    padding = torch.tensor([[True] * 4, [True, False, True, False]])

    def step(params, x):
        def loss(params, x):
            turn = layers.rotary_positions(3, 4, dtype=DTYPE)
            outputs = attention(params, x, heads=2, causal=True, positions=turn)
            outputs = attention(
                params, outputs, memory, heads=2, padding=padding, dropout=0.1, key=KEY
            )
            return attention(params, outputs, heads=2, window=2, normalize=True).sin().sum()

        return grad_and_value(loss, (0, 1))(params, x)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    close(compiled(params, x), step(params, x))

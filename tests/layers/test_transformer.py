"""Layers of a Transformer: torch's own numbers, and what holds of them whatever the numbers."""

from __future__ import annotations

import importlib
import re
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import vjp

from funcnets import random, tree
from funcnets.layers import (
    KeyValueCache,
    cached_encoder_layer,
    decoder_layer,
    encoder_layer,
    init_decoder_layer,
    init_encoder_layer,
    rotary_positions,
)

KEY = random.key(5)
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
normal = partial(random.normal, dtype=torch.float64)


def drawn(init, *sizes, seed=0, **options):
    """Parameters with no two values alike."""
    params = init(KEY, *sizes, dtype=torch.float64, **options)
    keys = iter(random.split(random.key(seed), len(tree.leaves(params))).unbind())
    return tree.map(lambda leaf: leaf + 0.3 * normal(next(keys), leaf.shape), params)


def bools(key, *shape):
    return random.bernoulli(key, shape, 0.6)


@given(
    st.integers(0, 2**16),
    st.sampled_from([(1, 2), (2, 4), (3, 6), (2, 6)]),
    st.integers(1, 5),
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
    st.fixed_dictionaries(
        {
            "norm_first": st.booleans(),
            "activation": st.sampled_from(["relu", "gelu"]),
            "bias": st.booleans(),
        }
    ),
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
    st.sampled_from(["encoder", "decoder"]),
)
def test_equals_the_torch_layer(seed, shape, hidden, sizes, options, masked, kind):
    (heads, width), (batch, time, memory_time) = shape, sizes
    keys = random.split(random.key(seed), 7).unbind()
    made = {"encoder": nn.TransformerEncoderLayer, "decoder": nn.TransformerDecoderLayer}[kind]
    init = {"encoder": init_encoder_layer, "decoder": init_decoder_layer}[kind]
    named = {name: options[name] for name in ("activation", "bias")}
    params = drawn(init, width, heads, hidden, seed=seed, **named)
    with torch.random.fork_rng():
        module = made(width, heads, hidden, dropout=0.0, batch_first=True, **options).double()
    module.load_state_dict(tree.to_state_dict(params))

    inputs = [normal(keys[0], (batch, time, width))]
    asked, theirs = {}, {}
    first = "src" if kind == "encoder" else "tgt"
    if masked[0]:
        asked["mask"] = bools(keys[2], time, time) | torch.eye(time, dtype=torch.bool)
        theirs["src_mask" if kind == "encoder" else "tgt_mask"] = ~asked["mask"]
    elif masked[1]:
        asked["causal"] = True
        later = torch.ones(time, time, dtype=torch.bool).triu(1)
        theirs["src_mask" if kind == "encoder" else "tgt_mask"] = later
    if masked[2] and not masked[0]:
        asked["padding"] = bools(keys[3], batch, time)
        asked["padding"][:, 0] = True
        theirs[f"{first}_key_padding_mask"] = ~asked["padding"]
    if kind == "decoder":
        inputs.append(normal(keys[1], (batch, memory_time, width)))
        if masked[1]:
            asked["memory_mask"] = bools(keys[4], time, memory_time)
            asked["memory_mask"][:, 0] = True
            theirs["memory_mask"] = ~asked["memory_mask"]
        if masked[2]:
            asked["memory_padding"] = bools(keys[5], batch, memory_time)
            asked["memory_padding"][:, 0] = True
            theirs["memory_key_padding_mask"] = ~asked["memory_padding"]
    f = {"encoder": encoder_layer, "decoder": decoder_layer}[kind]
    how = {"heads": heads, "norm_first": options["norm_first"], "activation": options["activation"]}

    tracked = [x.clone().requires_grad_() for x in inputs]
    expected = module(*tracked, **theirs)
    outputs, pull_back = vjp(lambda p, *x: f(p, *x, **how, **asked), params, *inputs)
    close(outputs, expected.detach())
    cotangent = normal(keys[6], outputs.shape)
    expected.backward(cotangent)
    gradients, *of_inputs = pull_back(cotangent)
    for found, x in zip(of_inputs, tracked, strict=True):
        close(found, x.grad)
    wanted = {name: parameter.grad for name, parameter in module.named_parameters()}
    for name, gradient in tree.to_state_dict(gradients).items():
        close(gradient, wanted[name])
    module.eval()  # torch's fused path
    with torch.no_grad():
        close(f(params, *inputs, **how, **asked), module(*inputs, **theirs))


@pytest.mark.parametrize(
    ("init", "made"),
    [
        (init_encoder_layer, nn.TransformerEncoderLayer),
        (init_decoder_layer, nn.TransformerDecoderLayer),
    ],
)
def test_initial_values_are_torchs(init, made):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reference = tree.from_module(made(16, 4, 32))
    params = init(KEY, 16, 4, 32)
    assert not tree.compare(params, reference).lines
    for name, leaf in tree.to_state_dict(params).items():
        other = tree.to_state_dict(reference)[name]
        assert (leaf.std(correction=0) - other.std(correction=0)).abs() <= 0.25 * other.std()
        assert leaf.abs().max() <= 1.2 * other.abs().max()


@pytest.mark.parametrize("norm_first", [False, True])
def test_dropout_draws_by_key_in_every_place(norm_first):
    x, memory = normal(KEY, (2, 3, 8)), normal(random.key(1), (2, 4, 8))
    for f, params in (
        (encoder_layer, drawn(init_encoder_layer, 8, 2, 8)),
        (lambda *a, **o: decoder_layer(*a, memory, **o), drawn(init_decoder_layer, 8, 2, 8)),
    ):
        apply = partial(f, params, x, heads=2, norm_first=norm_first)
        close(apply(dropout=0.5), apply())  # no key
        close(apply(dropout=0.0, key=KEY), apply())
        close(apply(dropout=0.5, key=KEY), apply(dropout=0.5, key=KEY))
        assert not torch.equal(apply(dropout=0.5, key=KEY), apply(dropout=0.5, key=random.key(1)))
        close(apply(dropout=torch.tensor(0.5), key=KEY), apply(dropout=0.5, key=KEY))
        nothing = apply(dropout=1.0, key=KEY)
        if norm_first:
            close(nothing, x)
        else:
            assert not torch.equal(nothing, apply())


def test_each_dropout_has_its_place(monkeypatch):
    """Of the attention weights, inside the feed-forward part, and at the end of each part."""
    seen = []

    def spy(key, x, p):
        seen.append((tuple(key.tolist()), tuple(x.shape)))
        return x

    for name in ("transformer", "feed_forward", "scaled_dot_product"):
        monkeypatch.setattr(importlib.import_module(f"funcnets.layers.{name}"), "dropout_if", spy)
    x, memory = normal(KEY, (1, 3, 4)), normal(KEY, (1, 5, 4))
    encoder_layer(drawn(init_encoder_layer, 4, 2, 6), x, heads=2, dropout=0.5, key=KEY)
    decoder_layer(drawn(init_decoder_layer, 4, 2, 6), x, memory, heads=2, dropout=0.5, key=KEY)
    own, end, hidden, other = (1, 2, 3, 3), (1, 3, 4), (1, 3, 6), (1, 2, 3, 5)
    assert [shape for _, shape in seen[:4]] == [own, end, hidden, end]
    assert [shape for _, shape in seen[4:]] == [own, end, other, end, hidden, end]
    for keys in (seen[:4], seen[4:]):
        assert len({key for key, _ in keys}) == len(keys)


def test_an_encoder_without_positions_commutes_with_permutations():
    params, x = drawn(init_encoder_layer, 8, 2, 8), normal(KEY, (2, 5, 8))
    order = random.permutation(KEY, 5)
    close(encoder_layer(params, x[:, order], heads=2), encoder_layer(params, x, heads=2)[:, order])


@given(st.integers(0, 3), st.booleans())
def test_a_later_token_and_padding_change_nothing(place, norm_first):
    x, other = normal(KEY, (2, 5, 8)), normal(random.key(1), (2, 5, 8))
    params = drawn(init_encoder_layer, 8, 2, 8)
    later = torch.arange(5) > place
    changed = torch.where(later[:, None], other, x)
    apply = partial(encoder_layer, params, heads=2, norm_first=norm_first)
    before = apply(x, causal=True)[:, : place + 1]
    assert torch.equal(apply(changed, causal=True)[:, : place + 1], before)
    assert not torch.equal(apply(changed)[:, : place + 1], apply(x)[:, : place + 1])
    padding = (~later).expand(2, 5)
    short = apply(x[:, : place + 1])
    close(apply(changed, padding=padding)[:, : place + 1], short)
    # And of a memory.
    params = drawn(init_decoder_layer, 8, 2, 8)
    apply = partial(decoder_layer, params, x, heads=2, norm_first=norm_first)
    close(apply(changed, memory_padding=padding), apply(x[:, : place + 1]))


@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
    st.sampled_from([None, 1, 2]),
    st.sampled_from([None, 1]),
    st.booleans(),
)
def test_a_cache_gives_what_all_at_once_gives(chunks, window, groups, normalize):
    time, options = sum(chunks), {"heads": 2, "window": window, "normalize": normalize}
    params = drawn(init_encoder_layer, 8, 2, 8, key_value_heads=groups)
    x = normal(KEY, (3, time, 8))
    turn = partial(rotary_positions, head_width=4, dtype=torch.float64)
    whole = encoder_layer(params, x, causal=True, positions=turn(time), **options)
    empty = torch.full((3, groups or 2, 9, 4), 7.0, dtype=torch.float64)  # what it holds is nothing
    cache = KeyValueCache(empty, -empty, torch.zeros(3, dtype=torch.int64))
    outputs, begin = [], 0
    for size in chunks:
        at = turn(torch.arange(begin, begin + size))
        part = x[:, begin : begin + size]
        y, cache = cached_encoder_layer(params, part, cache, positions=at, **options)
        outputs.append(y)
        begin += size
    close(torch.cat(outputs, 1), whole)
    assert cache.length.tolist() == [time] * 3


def test_rows_of_a_cache_are_of_different_lengths_and_what_is_too_much_is_lost():
    params, x = drawn(init_encoder_layer, 8, 2, 8), normal(KEY, (2, 5, 8))
    apply = partial(cached_encoder_layer, params, heads=2)
    empty = torch.zeros(2, 2, 5, 4, dtype=torch.float64)
    cache = KeyValueCache(empty, empty, torch.zeros(2, dtype=torch.int64))
    counts = torch.tensor([3, 1])
    _, cache = apply(x[:, :4], cache, counts=counts)
    assert cache.length.tolist() == [3, 1]
    y, new = apply(x[:, 4:], cache)
    for row, count in enumerate(counts.tolist()):
        alone = torch.cat([x[row : row + 1, :count], x[row : row + 1, 4:]], 1)
        close(y[row], encoder_layer(params, alone, heads=2, causal=True)[0, -1:])
    assert not new.keys[1, :, 2:].any()
    full = new._replace(length=torch.tensor([5, 4]))
    assert torch.equal(apply(x[:, :2], full)[1].keys[0], full.keys[0])
    with pytest.raises(ValueError, match=re.escape("cache: keys: expected [2, 2, 5, 4], got")):
        apply(x, cache._replace(keys=empty[:, :1]))


def test_heads_that_do_not_divide_the_width():
    for init in (init_encoder_layer, init_decoder_layer):
        with pytest.raises(ValueError, match="heads: expected a divisor of the width, 6, got 4"):
            init(KEY, 6, 4, 8)
    params = init_encoder_layer(KEY, 6, 3, 8)
    with pytest.raises(ValueError, match="heads: expected a divisor of the width, 6, got 4"):
        encoder_layer(params, torch.ones(1, 2, 6), heads=4)
    mask = torch.ones(3, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="mask: expected what broadcasts to"):
        encoder_layer(params, torch.ones(1, 2, 6), heads=3, mask=mask)

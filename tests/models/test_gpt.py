"""What is the GPT's own: causality, its cache, layers stacked and shared, its errors."""

from __future__ import annotations

import re
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from model_cases import NoArithmetic, gpt, gpts
from tensordict import TensorDict
from torch import nn
from torch.func import grad, jvp, vmap

from funcnets import compile, models, random, tree
from funcnets.layers import layer_norm
from funcnets.models.gpt import Config

KEY = random.key(4)
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
SMALL = {"vocabulary": 7, "context": 6, "width": 8, "depth": 2, "heads": 2, "init_std": 0.3}


def drawn(model, key=KEY):
    return tree.cast(model.init(key), torch.float64)


def tokens_of(*shape, key=KEY, vocabulary=7):
    return random.randint(key, shape, 0, vocabulary)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_equals_torchs_encoder_with_a_causal_mask(bias, activation):
    model = models.gpt(**SMALL, bias=bias, activation=activation)
    params, tokens = drawn(model), tokens_of(3, 5)
    with torch.random.fork_rng():
        layer = nn.TransformerEncoderLayer(
            8, 2, 32, 0.0, activation, batch_first=True, norm_first=True, bias=bias
        )
        norm = nn.LayerNorm(8, bias=bias)
        module = nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False).double()
    held = {name: params[name] for name in ("layers", "norm")}
    module.load_state_dict(tree.to_state_dict(TensorDict(held)))
    x = params["embedding", "weight"][tokens] + params["positions", "weight"][:5]
    later = torch.ones(5, 5, dtype=torch.bool).triu(1)
    expected = module(x, mask=later) @ params["embedding", "weight"].T
    close(model.apply(params, tokens), expected.detach())
    close(model.apply(params, tokens[0]), expected[0].detach())  # no batch at all


@given(gpts(), st.integers(0, 2**16))
def test_a_later_token_changes_no_earlier_output(case, seed):
    key, other = random.split(random.key(seed))
    params, (tokens,), (changed,) = case.params(key), case.inputs(key), case.inputs(other)
    time = tokens.shape[1]
    for place in range(1, time):
        mixed = torch.cat([tokens[:, :place], changed[:, place:]], 1)
        before, after = (case.model.apply(params, x)[:, :place] for x in (tokens, mixed))
        assert torch.equal(before, after)


@given(gpts(), st.data(), st.integers(0, 2**16))
def test_a_cache_gives_what_all_at_once_gives(case, data, seed):
    """In chunks of any sizes, with rows of different lengths, and room to spare or not."""
    params, (tokens,) = case.params(random.key(seed)), case.inputs(random.key(seed))
    model, (batch, time) = case.model, tokens.shape
    expected = model.apply(params, tokens)
    capacity = data.draw(st.integers(time, model.config.context))
    empty = models.gpt_cache(params, model.config, batch, capacity=capacity)
    outputs, cache, begin = [], empty, 0
    while begin < time:
        end = data.draw(st.integers(begin + 1, time))
        logits, cache = model.apply(params, tokens[:, begin:end], cache=cache)
        outputs.append(logits)
        begin = end
    close(torch.cat(outputs, 1), expected)
    assert cache["length"].tolist() == [time] * batch
    assert not tree.compare(cache, empty).lines
    # Rows that begin with prompts of their own lengths, padded behind.
    lengths = torch.tensor([data.draw(st.integers(0, time - 1)) for _ in range(batch)])
    logits, cache = model.apply(params, tokens, cache=empty, lengths=lengths)
    real = torch.arange(time) < lengths[:, None]
    close(logits[real], expected[real])
    newest = tokens.gather(1, lengths[:, None])
    logits, cache = model.apply(params, newest, cache=cache)
    close(logits[:, 0], expected[torch.arange(batch), lengths])
    assert cache["length"].tolist() == (lengths + 1).tolist()


@pytest.mark.parametrize("share", ["none", "stacked", "all"])
@pytest.mark.parametrize("positions", ["learned", "rotary", "alibi"])
def test_the_cache_under_vmap_and_compiled(share, positions):
    model = models.gpt(**SMALL, share=share, positions=positions)
    stacked = tree.stack([drawn(model, random.key(i)) for i in range(3)])
    tokens = tokens_of(2, 4)

    def two_steps(params, tokens):
        cache = models.gpt_cache(params, model.config, 2)
        first, cache = model.apply(params, tokens[:, :3], cache=cache)
        second, cache = model.apply(params, tokens[:, 3:], cache=cache)
        return torch.cat([first, second], 1), cache

    def loss(params, tokens):
        return two_steps(params, tokens)[0].square().sum()

    outputs, caches = vmap(two_steps, (0, None))(stacked, tokens)
    for i, params in enumerate(tree.unstack(stacked)):
        alone, cache = two_steps(params, tokens)
        close(alone, model.apply(params, tokens))
        close(outputs[i], alone)
        tree.map(close, caches[i], cache)
    if positions == "rotary" and share != "all":
        close(compile(two_steps, backend="aot_eager")(params, tokens)[0], alone)
        # Gradients flow through the cache as well.
        whole = grad(lambda p: model.apply(p, tokens).square().sum())(params)
        tree.map(close, grad(loss)(params, tokens), whole)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_stacked_layers_are_the_layers(depth, positions):
    """The same numbers in one tree or in several, and the same gradients."""
    options = SMALL | {"depth": depth, "positions": positions}
    apart, stacked = models.gpt(**options), models.gpt(**options, share="stacked")
    params, tokens = drawn(apart), tokens_of(2, 4)
    tree.map(lambda a, b: close(a.double(), b), together(apart.init(KEY), depth), drawn(stacked))

    def loss(model):
        return lambda params: model.apply(params, tokens).square().sum()

    close(stacked.apply(together(params, depth), tokens), apart.apply(params, tokens))
    expected = together(grad(loss(apart))(params), depth)
    tree.map(close, grad(loss(stacked))(together(params, depth)), expected)
    if depth == 3 and positions == "rotary":
        compiled = compile(grad(loss(stacked)), backend="eager")
        tree.map(close, compiled(together(params, depth)), expected)


def together(params, depth):
    layers = tree.stack([params["layers", str(i)] for i in range(depth)])
    return TensorDict({**dict(params.items()), "layers": layers})


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_shared_layer_has_the_sum_of_the_gradients_of_its_uses(depth):
    options = SMALL | {"depth": depth}
    shared, apart = models.gpt(**options, share="all"), models.gpt(**options)
    params, tokens = drawn(shared), tokens_of(2, 4)
    copies = TensorDict({str(i): params["layers"] for i in range(depth)})
    unshared = TensorDict({**dict(params.items()), "layers": copies})
    close(shared.apply(params, tokens), apart.apply(unshared, tokens))
    found = grad(lambda p: shared.apply(p, tokens).square().sum())(params)["layers"]
    each = grad(lambda p: apart.apply(p, tokens).square().sum())(unshared)["layers"]
    expected = tree.map(lambda *parts: sum(parts), *(each[str(i)] for i in range(depth)))
    tree.map(close, found, expected)


def test_compiling_stacked_layers_makes_a_graph_of_one_size():
    sizes = []

    def backend(graph, inputs):
        parts = [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
        sizes.append(sum(len(part.graph.nodes) for part in parts))
        return graph

    for depth in (2, 9):
        model = models.gpt(**SMALL | {"depth": depth}, share="stacked", dropout=0.1)
        tokens = tokens_of(1, 3)

        def loss(params, key, model=model, tokens=tokens):
            return model.apply(params, tokens, train=True, key=key)[0].square().sum()

        compile(grad(loss), backend=backend)(drawn(model), KEY)
    assert sizes[0] == sizes[1]


def test_a_hessian_vector_product():
    model = models.gpt(**SMALL, positions="rotary", norm="rms", normalize=True, share="stacked")
    params, direction, tokens = drawn(model), drawn(model, random.key(1)), tokens_of(2, 4)
    slope = grad(lambda params: model.apply(params, tokens).square().mean())
    _, product = jvp(slope, (params,), (direction,))
    ahead, behind = (
        slope(tree.map(lambda p, d, h=h: p + h * d, params, direction)) for h in (1e-5, -1e-5)
    )
    finite = tree.map(lambda a, b: (a - b) / 2e-5, ahead, behind)
    tree.map(partial(torch.testing.assert_close, rtol=1e-5, atol=1e-7), product, finite)


def test_a_tied_embedding_has_the_gradient_of_both_uses():
    tied, apart = models.gpt(**SMALL), models.gpt(**SMALL, tied=False)
    params, tokens = drawn(tied), tokens_of(2, 4)
    copied = TensorDict({**dict(params.items()), "head": params["embedding"]})
    close(tied.apply(params, tokens), apart.apply(copied, tokens))
    found = grad(lambda p: tied.apply(p, tokens).square().sum())(params)
    each = grad(lambda p: apart.apply(p, tokens).square().sum())(copied)
    close(found["embedding", "weight"], each["embedding", "weight"] + each["head", "weight"])


def test_what_begins_as_zero_adds_nothing():
    model = models.gpt(**SMALL, zero_init=True, soft_cap=0.5)
    params, tokens = drawn(model), tokens_of(2, 4)
    weight = params["embedding", "weight"]
    x = weight[tokens] + params["positions", "weight"][:4]
    x = layer_norm(params["norm"], x)
    close(model.apply(params, tokens), 0.5 * torch.tanh(x @ weight.T / 0.5))
    assert model.apply(params, tokens).abs().max() <= 0.5
    gradient = grad(lambda p: model.apply(p, tokens).square().sum())(params)
    assert gradient["layers", "0", "linear2", "weight"].any()


def test_taps():
    model = models.gpt(**SMALL)
    params, tokens = drawn(model), tokens_of(2, 4)
    names = ["embedding", "layers.0", "layers.1", "norm"]
    outputs, found = model.apply(params, tokens, taps=names)
    assert list(found) == names
    close(outputs, found["norm"] @ params["embedding", "weight"].T)
    close(found["norm"], layer_norm(params["norm"], found["layers.1"]))
    cache = models.gpt_cache(params, model.config, 2)
    ((logits, _), found), _ = model.apply(params, tokens, cache=cache, taps=["norm"], train=True)
    close(logits, outputs)


@pytest.mark.parametrize("share", ["none", "all"])
@pytest.mark.parametrize("options", [{}, {"key_value_heads": 1, "window": 2}])
def test_taps_of_the_attention(share, options):
    model = models.gpt(**SMALL, share=share, **options)
    params, tokens = drawn(model), tokens_of(2, 4)
    names = ["layers.0.self_attn.weights", "layers.1.self_attn.weights"]
    outputs, found = model.apply(params, tokens, taps=names)
    close(outputs, model.apply(params, tokens))
    for name in names:
        assert found[name].shape == (2, 2, 4, 4)
        close(found[name].sum(-1), torch.ones(2, 2, 4, dtype=torch.float64))
        assert not found[name].triu(1).any()
        assert found[name].tril(-2).any() == (not options)  # beyond the window
        replaced, _ = model.apply(params, tokens, taps={name: lambda weights: weights.flip(-1)})
        assert not torch.allclose(replaced, outputs)
    cache = models.gpt_cache(params, model.config, 2)
    (again, _), kept = model.apply(params, tokens, cache=cache, taps=names)
    close(again, outputs)
    close(kept[names[1]][..., :4], found[names[1]])
    # What is tapped under a transform is what the loop gives.
    each = vmap(lambda one: model.apply(params, one, taps=names)[1][names[0]])(tokens)
    close(each, found[names[0]])
    with pytest.raises(ValueError, match=r"among embedding, layers\.0\.self_attn\.weights, l"):
        model.apply(params, tokens, taps=["layers.0.weights"])


def test_a_fused_kernel_computes_what_is_not_tapped(monkeypatch):
    model, calls = models.gpt(**SMALL), []
    params, tokens, real = drawn(model), tokens_of(2, 4), F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **o: calls.append(1) or real(*a, **o)
    )
    model.apply(params, tokens, taps=["norm"])
    assert len(calls) == 2
    model.apply(params, tokens, taps=["layers.1.self_attn.weights"])
    assert len(calls) == 3


def test_dropout_in_training():
    model = models.gpt(**SMALL, dropout=1.0)
    params, tokens = drawn(model), tokens_of(2, 4)
    names = ["embedding", "layers.1"]
    (logits, found), buffers = model.apply(params, tokens, train=True, key=KEY, taps=names)
    assert buffers.is_empty()
    assert not found["embedding"].any()
    assert not found["layers.1"].any()
    assert not logits.any()
    with pytest.raises(ValueError, match="gpt: key: expected a key"), NoArithmetic():
        model.apply(params, tokens, train=True)
    # Layers that share their parameters draw apart.
    model = models.gpt(**SMALL | {"width": 200}, share="all", dropout=0.5)
    params = drawn(model)
    params["layers"] = params["layers"].apply(torch.zeros_like)
    params["layers", "linear2", "bias"] += 1.0
    names = ["embedding", "layers.0", "layers.1"]
    found = model.apply(params, tokens, train=True, key=KEY, taps=names)[0][1]
    first, second = (found[b] - found[a] > 1 for a, b in pairwise(names))
    for each in (first, second, first == second):
        assert abs(each.double().mean() - 0.5) < 5 * (0.25 / first.numel()) ** 0.5


def test_prompts_that_do_not_fit(unchecked):
    model = models.gpt(**SMALL)
    params = drawn(model)
    cache = models.gpt_cache(params, model.config, 1)

    def refused(message, *tokens, **options):
        with pytest.raises(ValueError, match=re.escape(message)):
            model.apply(params, *tokens, **options)

    long, empty = (torch.empty(2, n, dtype=torch.int64) for n in (7, 0))
    floats = torch.empty(2, 3)
    with NoArithmetic():
        refused("gpt: tokens: expected at most 6 tokens (the context), got 7", long)
        refused("gpt: tokens: expected [..., time] with at least one token, got [2, 0]", empty)
        refused("gpt: tokens: expected integers, got float32[2, 3]", floats)
    for wrong in (-1, 7):
        tokens = torch.tensor([[0, wrong]])
        refused("gpt: tokens: expected tokens from 0 to 6, got others", tokens)
    one, two = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int64)
    message = "gpt: cache: keys: expected [2, 2, 2, capacity, 4], got [1, 2, 2, 6, 4]"
    refused(message, two, cache=cache)
    refused("gpt: lengths: expected None without a cache", one, lengths=torch.tensor([1]))
    lengths = torch.tensor([1, 1])
    refused("gpt: lengths: expected [1], got [2]", one, cache=cache, lengths=lengths)
    refused("gpt: lengths: expected 0 to 1, got 2 to 2", one, cache=cache, lengths=lengths[:1] * 2)
    _, full = model.apply(params, tokens_of(1, 6), cache=cache)
    message = "gpt: tokens: expected at most 6 with those in the cache (its capacity), got 7"
    refused(message, one, cache=full)
    with pytest.raises(KeyError, match="gpt: cache: expected entries keys, values and length"):
        model.apply(params, one, cache=TensorDict({}))
    with pytest.raises(ValueError, match="capacity: expected at most 6"):
        models.gpt_cache(params, model.config, 1, capacity=7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocabulary": 0}, "vocabulary: expected a positive integer, got 0"),
        ({"depth": 0}, "depth: expected 1 or more, got 0"),
        ({"heads": 3}, "heads: expected a divisor of the width, 8, got 3"),
        ({"key_value_heads": 3}, "key_value_heads: expected a divisor of the heads, 2, got 3"),
        ({"hidden": 0}, "hidden: expected a positive integer, got 0"),
        ({"window": 0}, "window: expected a positive integer, got 0"),
        ({"positions": "random"}, "positions: expected one of 'learned', 'sinusoidal'"),
        ({"positions": "sinusoidal", "width": 9, "heads": 3}, "width: expected an even number"),
        ({"positions": "rotary", "heads": 8}, "heads: expected heads of an even width"),
        ({"norm": "batch"}, "norm: expected one of 'layer', 'rms', got 'batch'"),
        ({"activation": "tanh"}, "activation: expected one of 'relu', 'gelu'"),
        ({"share": "some"}, "share: expected one of 'none', 'stacked', 'all'"),
        ({"dropout": 1.5}, "dropout: expected a rate between 0 and 1, got 1.5"),
        ({"soft_cap": 0.0}, "soft_cap: expected more than 0, got 0.0"),
        ({"init_std": -1.0}, "init_std: expected more than 0, got -1.0"),
    ],
)
def test_configs_that_cannot_be(options, message, unchecked):
    for make in (models.gpt, Config):
        with pytest.raises(ValueError, match=re.escape(f"gpt: {message}")):
            make(**SMALL | options)


def test_each_option_arrives_in_its_field():
    options = {
        "key_value_heads": 1,
        "hidden": 5,
        "positions": "rotary",
        "rotary_base": 100.0,
        "norm": "rms",
        "activation": "swiglu",
        "normalize": True,
        "window": 3,
        "bias": False,
        "tied": False,
        "share": "all",
        "dropout": 0.1,
        "zero_init": True,
        "init_std": 0.1,
        "soft_cap": 4.0,
    }
    assert models.gpt(7, 6, 8, 3, 2, **options).config == Config(7, 6, 8, 3, 2, **options)
    assert gpt(share="all").model.config.share == "all"

"""What is the Transformer's own: torch.nn.Transformer with masks, the memory, its errors."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import NoArithmetic
from torch import nn
from torch.func import grad, jvp, vjp, vmap

from funcnets import compile, models, random, tree
from funcnets.generation import beam_search, generate
from funcnets.models.transformer import Config

KEY = random.key(8)
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
SMALL = {"width": 8, "heads": 2, "encoder_depth": 1, "decoder_depth": 2, "hidden": 6}
TEXT = SMALL | {"vocabulary": 7, "context": 6}


def drawn(model, key=KEY):
    return tree.cast(model.init(key), torch.float64)


def tokens_of(*shape, key=KEY):
    return random.randint(key, shape, 0, 7)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@settings(max_examples=8)
@given(st.integers(0, 2**16), st.booleans(), st.booleans(), st.sampled_from(["relu", "gelu"]))
def test_equals_torchs_transformer(seed, norm_first, padded, activation):
    options = {"norm_first": norm_first, "activation": activation}
    model = models.transformer(**SMALL, positions="none", **options)
    keys = random.split(random.key(seed), 4)
    params = drawn(model, keys[0])
    with torch.random.fork_rng():
        module = nn.Transformer(8, 2, 1, 2, 6, 0.0, batch_first=True, **options).double()
    module.load_state_dict(tree.to_state_dict(params))
    source, target = (
        random.normal(key, (3, time, 8), dtype=torch.float64)
        for key, time in ((keys[1], 4), (keys[2], 3))
    )
    ours, theirs = {}, {}
    if padded:
        lengths = random.randint(keys[3], (3, 1), 1, 5)
        ours["source_padding"] = torch.arange(4) < lengths
        ours["target_padding"] = torch.arange(3) < lengths
        theirs = {
            "src_key_padding_mask": ~ours["source_padding"],
            "memory_key_padding_mask": ~ours["source_padding"],
            "tgt_key_padding_mask": ~ours["target_padding"],
        }
    later = torch.ones(3, 3, dtype=torch.bool).triu(1)
    tracked = [x.clone().requires_grad_() for x in (source, target)]
    expected = module(*tracked, tgt_mask=later, **theirs)
    outputs, pull_back = vjp(lambda *args: model.apply(*args, **ours), params, source, target)
    close(outputs, expected.detach())
    cotangent = random.normal(keys[3], outputs.shape, dtype=torch.float64)
    expected.backward(cotangent)
    gradients, *of_inputs = pull_back(cotangent)
    for found, x in zip(of_inputs, tracked, strict=True):
        close(found, x.grad)
    for name, parameter in module.named_parameters():
        close(gradients[tuple(name.split("."))], parameter.grad)
    # The halves alone.
    halves = {**SMALL, "positions": "none", **options}
    encoder = models.transformer(**halves | {"decoder_depth": 0})
    memory = encoder.apply(params.select("encoder"), source)
    close(memory, module.encoder(source).detach())
    decoder = models.transformer(**halves | {"encoder_depth": 0})
    expected = module.decoder(target, memory, tgt_mask=later)
    close(decoder.apply(params.select("decoder"), memory, target), expected.detach())


@pytest.mark.parametrize("share", ["none", "stacked", "all"])
def test_causality_padding_and_the_memory(share):
    model = models.transformer(**TEXT, share=share)
    params = drawn(model)
    source, target = tokens_of(2, 5), tokens_of(2, 4, key=random.key(1))
    whole = model.apply(params, source, target)
    for place in range(1, 4):
        changed = torch.cat([target[:, :place], (target[:, place:] + 1) % 7], 1)
        assert torch.equal(model.apply(params, source, changed)[:, :place], whole[:, :place])
    padding = (torch.arange(5) < 3).expand(2, 5)
    short = model.apply(params, source[:, :3], target)
    close(model.apply(params, source, target, source_padding=padding), short)
    memory = model.apply(params, source, source_padding=padding)
    close(memory[:, :3], model.apply(params, source[:, :3]))
    again = model.apply(params, memory=memory, target=target, source_padding=padding)
    close(again, short)
    real = torch.arange(4) < torch.tensor([[2], [4]])
    padded = model.apply(params, source, target, target_padding=real)
    close(padded[0, :2], whole[0, :2])
    close(padded[1], whole[1])


CACHES = {
    "share": st.sampled_from(["none", "stacked", "all"]),
    "positions": st.sampled_from(["learned", "sinusoidal", "none"]),
    "norm": st.sampled_from(["layer", "rms"]),
    "norm_first": st.booleans(),
    "vocabulary": st.sampled_from([None, 7]),
    "encoder_depth": st.integers(0, 1),
}


@given(st.fixed_dictionaries(CACHES), st.integers(1, 6), st.data(), st.integers(0, 2**16))
def test_a_cache_gives_what_all_at_once_gives(options, time, data, seed):
    """In chunks of any sizes, with sources and rows of different lengths, and room to spare."""
    model = models.transformer(**TEXT | options)
    keys = random.split(random.key(seed), 3)
    params, batch = drawn(model, keys[0]), 3
    memory = random.normal(keys[1], (batch, 4, 8), dtype=torch.float64)
    sources = torch.tensor([data.draw(st.integers(1, 4)) for _ in range(batch)])
    real = torch.arange(4) < sources[:, None]
    padding = data.draw(st.sampled_from([None, real]))
    if options["vocabulary"] is None:
        target = random.normal(keys[2], (batch, time, 8), dtype=torch.float64)
    else:
        target = tokens_of(batch, time, key=keys[2])
    expected = model.apply(params, memory=memory, target=target, source_padding=padding)
    capacity = data.draw(st.integers(time, 6))
    make = partial(models.transformer_cache, params, model.config, memory)
    empty = make(source_padding=padding, capacity=capacity)
    outputs, cache, begin = [], empty, 0
    while begin < time:
        end = data.draw(st.integers(begin + 1, time))
        found, cache = model.apply(params, None, target[:, begin:end], cache=cache)
        outputs.append(found)
        begin = end
    close(torch.cat(outputs, 1), expected)
    assert cache["length"].tolist() == [time] * batch
    assert not tree.compare(cache, empty).lines
    # Rows that begin with parts of their own lengths, padded behind.
    lengths = torch.tensor([data.draw(st.integers(0, time - 1)) for _ in range(batch)])
    found, cache = model.apply(params, None, target, cache=empty, lengths=lengths)
    held = torch.arange(time) < lengths[:, None]
    close(found[held], expected[held])
    rows = torch.arange(batch)
    found, cache = model.apply(params, None, target[rows, lengths][:, None], cache=cache)
    close(found[:, 0], expected[rows, lengths])
    assert cache["length"].tolist() == (lengths + 1).tolist()


def test_the_cache_under_vmap_and_compiled():
    model = models.transformer(**TEXT, share="stacked")
    stacked = tree.stack([drawn(model, random.key(i)) for i in range(2)])
    source, target = tokens_of(2, 3), tokens_of(2, 4, key=random.key(1))

    def two_steps(params):
        cache = models.transformer_cache(params, model.config, model.apply(params, source))
        first, cache = model.apply(params, None, target[:, :3], cache=cache)
        second, _ = model.apply(params, None, target[:, 3:], cache=cache)
        return torch.cat([first, second], 1)

    outputs = vmap(two_steps)(stacked)
    for i, params in enumerate(tree.unstack(stacked)):
        close(two_steps(params), model.apply(params, source, target))
        close(outputs[i], two_steps(params))
    close(compile(two_steps, backend="aot_eager")(params), outputs[1])
    whole = grad(lambda p: model.apply(p, source, target).square().sum())(params)
    tree.map(close, grad(lambda p: two_steps(p).square().sum())(params), whole)


def test_a_text_is_generated_with_the_source_encoded_once():
    model = models.transformer(**TEXT | {"context": 8}, target_vocabulary=5)
    params, source = drawn(model), tokens_of(3, 5)
    padding = torch.arange(5) < torch.tensor([[5], [2], [3]])
    memory = model.apply(params, source, source_padding=padding)
    cache = models.transformer_cache(params, model.config, memory, source_padding=padding)
    apply, start = partial(model.apply, params, None), tokens_of(3, 2) % 5
    lengths = torch.tensor([1, 2, 1])

    def slowly(tokens):  # all again for each token, and each beam with its own source
        rows = torch.arange(len(tokens)) // (len(tokens) // 3)
        options = {"memory": memory[rows], "source_padding": padding[rows]}
        return model.apply(params, target=tokens, **options)

    for write in (partial(generate, KEY), partial(beam_search, beams=3)):
        found = write(apply, start, steps=5, lengths=lengths, cache=cache, stop=1)
        expected = write(slowly, start, steps=5, lengths=lengths, stop=1)
        assert torch.equal(found.tokens, expected.tokens)
        assert torch.equal(found.lengths, expected.lengths)


@pytest.mark.parametrize("share", ["none", "all"])
def test_taps_of_the_attention(share):
    model = models.transformer(**TEXT, share=share)
    params, source, target = drawn(model), tokens_of(2, 5), tokens_of(2, 4)
    padding = torch.arange(5) < torch.tensor([[5], [3]])
    apply = partial(model.apply, params, source, target, source_padding=padding)
    own = [f"{part}.layers.0.self_attn.weights" for part in ("encoder", "decoder")]
    names = [*own, "decoder.layers.1.multihead_attn.weights"]
    outputs, found = apply(taps=names)
    close(outputs, apply())
    for name, size in zip(names, [(5, 5), (4, 4), (4, 5)], strict=True):
        assert found[name].shape == (2, 2, *size)
        close(found[name].sum(-1), torch.ones(2, 2, size[0], dtype=torch.float64))
    assert not found[own[1]].triu(1).any()
    for name in (names[0], names[2]):
        assert not found[name][1, ..., 3:].any()
    for name in names:
        replaced, _ = apply(taps={name: torch.zeros_like})
        assert not torch.allclose(replaced, outputs)
    # With a cache: of the slots that it has.
    memory = model.apply(params, source, source_padding=padding)
    cache = models.transformer_cache(params, model.config, memory, source_padding=padding)
    (again, _), kept = model.apply(params, None, target, cache=cache, taps=names[1:])
    close(again, outputs)
    close(kept[names[1]][..., :4], found[names[1]])
    close(kept[names[2]], found[names[2]])


def test_vocabularies_and_positions():
    options = TEXT | {"target_vocabulary": 5, "positions": "learned"}
    model = models.transformer(**options)
    params, source, target = drawn(model), tokens_of(2, 5), tokens_of(2, 4) % 5
    assert model.apply(params, source, target).shape == (2, 4, 5)
    found = grad(lambda p: model.apply(p, source, target).square().sum())(params)
    assert found["embedding", "weight"].any()
    assert found["target_embedding", "weight"].any()
    assert not found["positions", "weight"][5:].any()
    for name in ("positions", "target_positions"):
        assert found[name, "weight"][:4].any(-1).all()
    assert "head" not in params.keys()  # noqa: SIM118 (a TensorDict knows no other way)
    assert drawn(models.transformer(**options, tied=False))["head", "weight"].shape == (5, 8)


def test_bears_every_transform():
    model = models.transformer(**TEXT, activation="gelu", share="stacked")
    stacked = tree.stack([drawn(model, random.key(i)) for i in range(2)])
    params, direction = tree.unstack(stacked)
    source, target = tokens_of(2, 3), tokens_of(2, 3, key=random.key(1))
    padding = torch.tensor([[True, True, False], [True, True, True]])

    def loss(params, source, target, padding):
        return model.apply(params, source, target, source_padding=padding).square().sum()

    def slope(params):
        return grad(loss)(params, source, target, padding)

    tree.map(close, compile(slope, backend="aot_eager")(params), slope(params))
    ensemble = vmap(slope)(stacked)
    for i, member in enumerate((params, direction)):
        tree.map(close, tree.map(lambda leaf, i=i: leaf[i], ensemble), slope(member))
    each = vmap(grad(loss), (None, 0, 0, 0))(params, source, target, padding)
    tree.map(close, tree.map(lambda leaf: leaf.sum(0), each), slope(params))
    _, product = jvp(slope, (params,), (direction,))
    ahead, behind = (
        slope(tree.map(lambda p, d, h=h: p + h * d, params, direction)) for h in (1e-5, -1e-5)
    )
    finite = tree.map(lambda a, b: (a - b) / 2e-5, ahead, behind)
    tree.map(partial(torch.testing.assert_close, rtol=1e-5, atol=1e-4), product, finite)


def test_dropout_in_training():
    model = models.transformer(**TEXT, dropout=1.0, norm_first=True)
    params = drawn(model)
    names = ["encoder.layers.0", "encoder.norm", "decoder.layers.1", "decoder.norm"]
    arguments = params, tokens_of(1, 3), tokens_of(1, 2)
    (_, found), buffers = model.apply(*arguments, train=True, key=KEY, taps=names)
    assert list(found) == names
    assert not any(value.any() for value in found.values())
    assert buffers.is_empty()
    with pytest.raises(ValueError, match="transformer: key: expected a key"), NoArithmetic():
        model.apply(*arguments, train=True)


def test_inputs_that_do_not_fit(unchecked):
    model = models.transformer(**TEXT)
    encoder, decoder = (
        models.transformer_encoder(width=8, heads=2, depth=1, context=5),
        models.transformer_decoder(7, width=8, heads=2, depth=1),
    )
    params, alone, other = drawn(model), drawn(encoder), drawn(decoder)
    tokens, vectors = tokens_of(2, 4), torch.ones(2, 4, 8, dtype=torch.float64)
    long, wide = torch.ones(2, 7, dtype=torch.int64), torch.ones(2, 6, 8, dtype=torch.float64)
    flags, single, narrow = torch.ones(2, 3, dtype=torch.bool), vectors.float(), vectors[..., :7]
    few, flat, lengths = tokens[:1], vectors[0], torch.tensor([1, 1])
    with NoArithmetic():
        for apply, inputs, options, message in (
            (model, (params, long, tokens), {}, "source: expected at most 6 tokens"),
            (model, (params, tokens, long), {}, "target: expected at most 6 tokens"),
            (model, (params,), {"target": tokens}, "source: expected a source or a memory"),
            (model, (params,), {"memory": vectors}, "target: expected one for the decoder"),
            (model, (params, tokens, few), {}, "target: expected the batch [2]"),
            (
                model,
                (params, tokens, tokens),
                {"source_padding": flags},
                "source_padding: expected bool[2, 4]",
            ),
            (
                model,
                (params, tokens, tokens),
                {"target_padding": flags},
                "target_padding: expected bool[2, 4]",
            ),
            (encoder, (alone, vectors, vectors), {}, "target: expected None (there is no decoder)"),
            (encoder, (alone, wide), {}, "source: expected at most 5 vectors"),
            (encoder, (alone, narrow), {}, "source: expected vectors [..., time, 8]"),
            (encoder, (alone, single), {}, "source: x: expected float64 (as weight), got float32"),
            (decoder, (other, vectors), {}, "target: expected one for the decoder"),
            (decoder, (other, flat, tokens), {}, "target: expected the batch []"),
        ):
            with pytest.raises(ValueError, match=re.escape(f"transformer: {message}")):
                apply.apply(*inputs, **options)
    cache = models.transformer_cache(params, model.config, vectors)
    for inputs, options, message in (
        ((tokens, tokens), {"lengths": lengths}, "lengths: expected None without a cache"),
        ((None, tokens), {"cache": cache, "memory": vectors}, "memory: expected None with a cache"),
        ((None,), {"cache": cache}, "target: expected one with a cache"),
        ((None, few), {"cache": cache}, "cache: keys: expected [1, 2, 2, capacity, 4]"),
        ((None, long), {"cache": cache}, "target: expected at most 6 tokens"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"transformer: {message}")):
            model.apply(params, *inputs, **options)
    _, cache = model.apply(params, None, tokens, cache=cache)
    with pytest.raises(ValueError, match="at most 6 with those in the cache"):
        model.apply(params, None, tokens, cache=cache)
    with pytest.raises(KeyError, match="expected one of transformer_cache, got no memory_keys"):
        model.apply(params, None, tokens, cache=cache.exclude("memory_keys"))
    with pytest.raises(ValueError, match="transformer_cache: config: expected one with a decoder"):
        models.transformer_cache(alone, encoder.config, vectors)
    with pytest.raises(ValueError, match="transformer: target: expected tokens from 0 to 6"):
        model.apply(params, tokens, tokens + 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "heads: expected a divisor of the width, 8, got 3"),
        ({"encoder_depth": -1}, "encoder_depth: expected 0 or more, got -1"),
        ({"encoder_depth": 0, "decoder_depth": 0}, "decoder_depth: expected 1 or more without"),
        ({"target_vocabulary": 3, "decoder_depth": 0}, "target_vocabulary: expected None"),
        ({"positions": "rotary"}, "positions: expected one of 'learned', 'sinusoidal', 'none'"),
        ({"vocabulary": 0}, "vocabulary: expected a positive integer, got 0"),
        ({"share": "some"}, "share: expected one of"),
        ({"norm": "batch"}, "norm: expected one of"),
        ({"activation": "tanh"}, "activation: expected one of"),
        ({"dropout": 2.0}, "dropout: expected a rate"),
    ],
)
def test_configs_that_cannot_be(options, message, unchecked):
    for make in (models.transformer, Config):
        with pytest.raises(ValueError, match=re.escape(f"transformer: {message}")):
            make(**TEXT | options)


def test_each_option_arrives_in_its_field():
    options = {
        "encoder_depth": 2,
        "decoder_depth": 3,
        "hidden": 5,
        "positions": "learned",
        "norm": "rms",
        "norm_first": True,
        "activation": "swiglu",
        "bias": False,
        "tied": False,
        "share": "all",
        "dropout": 0.2,
    }
    assert models.transformer(7, 5, 6, 8, 2, **options).config == Config(7, 5, 6, 8, 2, **options)
    alone = models.transformer_encoder(7, 6, 8, 2, 3, dropout=0.2).config
    assert alone == Config(7, None, 6, 8, 2, encoder_depth=3, decoder_depth=0, dropout=0.2)
    alone = models.transformer_decoder(7, 6, 8, 2, 3, dropout=0.2).config
    assert alone == Config(7, None, 6, 8, 2, encoder_depth=0, decoder_depth=3, dropout=0.2)

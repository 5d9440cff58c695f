"""What is BERT's own: padding, segments, the masking of tokens, its errors."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_cases import NoArithmetic, berts
from tensordict import TensorDict
from torch.func import grad, jvp, vmap

from funcnets import compile, models, random, tree
from funcnets.models import mask_tokens
from funcnets.models.bert import Config

KEY = random.key(6)
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
SMALL = {"vocabulary": 7, "context": 6, "width": 8, "depth": 2, "heads": 2, "init_std": 0.3}


def drawn(model, key=KEY):
    return tree.cast(model.init(key), torch.float64)


def tokens_of(*shape, key=KEY):
    return random.randint(key, shape, 0, 7)


@given(berts(), st.integers(0, 2**16), st.data())
def test_padding_changes_nothing(case, seed, data):
    params, (tokens,) = case.params(random.key(seed)), case.inputs(random.key(seed))
    batch, time = tokens.shape
    length = data.draw(st.integers(1, time))
    padding = (torch.arange(time) < length).expand(batch, time)
    found = case.model.apply(params, tokens, padding=padding)
    close(found[:, :length], case.model.apply(params, tokens[:, :length]))


def test_segments():
    model = models.bert(**SMALL, segments=2)
    params, tokens = drawn(model), tokens_of(2, 4)
    segments = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    # A segment of the whole text is one more vector at each place.
    plain = models.bert(**SMALL)
    moved = params.clone()
    moved["positions", "weight"] += params["segments", "weight"][1]
    del moved["segments"]
    close(model.apply(params, tokens, segments=segments)[1], plain.apply(moved, tokens)[1])
    without = TensorDict({k: v for k, v in params.items() if k != "segments"})
    close(model.apply(params, tokens), plain.apply(without, tokens))
    gradient = grad(lambda p: model.apply(p, tokens, segments=segments).square().sum())(params)
    assert gradient["segments", "weight"].any(-1).all()


@pytest.mark.parametrize("share", ["none", "all"])
def test_taps_of_the_attention(share):
    model = models.bert(**SMALL, share=share)
    params, tokens = drawn(model), tokens_of(2, 4)
    padding = torch.arange(4) < torch.tensor([[4], [2]])
    names = ["layers.0.self_attn.weights", "layers.1.self_attn.weights"]
    outputs, found = model.apply(params, tokens, padding=padding, taps=names)
    close(outputs, model.apply(params, tokens, padding=padding))
    for name in names:
        assert found[name].shape == (2, 2, 4, 4)
        close(found[name].sum(-1), torch.ones(2, 2, 4, dtype=torch.float64))
        assert not found[name][1, ..., 2:].any()
        assert (found[name][0] > 0).all()
        taps = {name: lambda weights: weights.flip(-1)}
        replaced, _ = model.apply(params, tokens, padding=padding, taps=taps)
        assert not torch.allclose(replaced, outputs)


def test_a_shared_layer_has_the_sum_of_the_gradients_of_its_uses():
    shared, apart = models.bert(**SMALL, share="all"), models.bert(**SMALL)
    params, tokens = drawn(shared), tokens_of(2, 4)
    copies = TensorDict({str(i): params["layers"] for i in range(2)})
    unshared = TensorDict({**dict(params.items()), "layers": copies})
    found = grad(lambda p: shared.apply(p, tokens).square().sum())(params)["layers"]
    each = grad(lambda p: apart.apply(p, tokens).square().sum())(unshared)["layers"]
    tree.map(close, found, tree.map(torch.add, each["0"], each["1"]))


def test_padding_and_second_derivatives_under_the_transforms():
    model = models.bert(**SMALL, segments=2, norm_first=True)
    params, direction, tokens = drawn(model), drawn(model, random.key(1)), tokens_of(2, 4)
    padding = torch.tensor([[True] * 3 + [False], [True] * 4])
    segments = torch.tensor([[0, 0, 1, 1]] * 2)

    def loss(params, tokens, padding, segments):
        logits = model.apply(params, tokens, padding=padding, segments=segments)
        return torch.where(padding[..., None], logits, 0.0).square().sum()

    inputs = (tokens, padding, segments)
    slope = partial(lambda p: grad(loss)(p, *inputs))
    tree.map(close, compile(grad(loss), backend="aot_eager")(params, *inputs), slope(params))
    each = vmap(grad(loss), (None, 0, 0, 0))(params, *inputs)
    tree.map(close, tree.map(lambda leaf: leaf.sum(0), each), slope(params))
    _, product = jvp(slope, (params,), (direction,))
    ahead, behind = (
        slope(tree.map(lambda p, d, h=h: p + h * d, params, direction)) for h in (1e-5, -1e-5)
    )
    finite = tree.map(lambda a, b: (a - b) / 2e-5, ahead, behind)
    tree.map(partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5), product, finite)


def test_tokens_are_masked_at_their_rates():
    tokens = random.randint(KEY, (200, 500), 0, 50)
    allowed = random.bernoulli(random.key(1), tokens.shape, 0.9)
    options = {"vocabulary": 50, "mask_token": 50, "allowed": allowed}
    before = tokens.clone()
    inputs, chosen = mask_tokens(KEY, tokens, rate=0.3, **options)
    assert torch.equal(tokens, before)
    assert torch.equal(inputs[~chosen], tokens[~chosen])
    assert not chosen[~allowed].any()

    def about(found, rate):
        assert abs(found.double().mean() - rate) < 5 * (rate * (1 - rate) / found.numel()) ** 0.5

    about(chosen[allowed], 0.3)
    hidden = inputs[chosen]
    about(hidden == 50, 0.8)
    drawn = hidden[hidden != 50]
    # Half of the rest is drawn, and of those one in fifty is what it was.
    about(drawn == tokens[chosen][hidden != 50], 0.5 + 0.5 / 50)
    counts = torch.bincount(drawn, minlength=51)[:50]
    assert (counts > 0).all()
    again = mask_tokens(KEY, tokens, rate=0.3, **options)
    assert torch.equal(again[0], inputs)
    assert torch.equal(again[1], chosen)
    assert not torch.equal(mask_tokens(random.key(1), tokens, rate=0.3, **options)[1], chosen)
    assert (mask_tokens(KEY, tokens, vocabulary=50, mask_token=50, rate=1.0)[1]).all()
    kept = {"random_rate": 0.0, "kept_rate": 1.0}
    assert torch.equal(mask_tokens(KEY, tokens, **options, **kept)[0], tokens)
    drawn = {"random_rate": 1.0, "kept_rate": 0.0, "rate": 1.0}
    assert not (mask_tokens(KEY, tokens, vocabulary=50, mask_token=50, **drawn)[0] == 50).any()
    # One key for each member.
    each = vmap(lambda key: mask_tokens(key, tokens[0], vocabulary=50, mask_token=50))(
        random.split(KEY, 3)
    )
    for i, key in enumerate(random.split(KEY, 3).unbind()):
        alone = mask_tokens(key, tokens[0], vocabulary=50, mask_token=50)
        assert torch.equal(each[0][i], alone[0])


def test_masking_that_cannot_be():
    tokens = tokens_of(2, 3)
    some = {"vocabulary": 7, "mask_token": 7}
    for options, message in (
        ({"rate": 1.1}, "rate: expected a rate between 0 and 1, got 1.1"),
        ({"kept_rate": 0.6, "random_rate": 0.6}, "kept_rate: expected at most 1 with random_rate"),
        ({"vocabulary": 0}, "vocabulary: expected a positive integer, got 0"),
        ({"allowed": tokens[0] > 0}, "allowed: expected [2, 3], got [3]"),
    ):
        with pytest.raises((ValueError, TypeError), match=re.escape(message)):
            _unchecked(mask_tokens)(KEY, tokens, **(some | options))


def _unchecked(f):
    return getattr(f, "__wrapped__", f)


def test_inputs_that_do_not_fit(unchecked):
    model, apart = models.bert(**SMALL), models.bert(**SMALL, segments=2)
    params, tokens = drawn(model), tokens_of(2, 4)
    long = torch.empty(2, 7, dtype=torch.int64)
    ones = torch.ones(2, 4)
    with NoArithmetic():
        for args, options, message in (
            ((long,), {}, "bert: tokens: expected at most 6 tokens (the context), got 7"),
            ((tokens,), {"padding": ones}, "padding: expected bool[2, 4] (True = a real token)"),
            ((tokens,), {"segments": tokens}, "segments: expected None (the model has none)"),
        ):
            with pytest.raises(ValueError, match=re.escape(message)):
                model.apply(params, *args, **options)
    with pytest.raises(ValueError, match=re.escape("bert: tokens: expected tokens from 0 to 6")):
        model.apply(params, torch.tensor([[7]]))
    params = drawn(apart)
    for segments, message in (
        (tokens[:, :2], "bert: segments: expected [2, 4] (as tokens), got [2, 2]"),
        (torch.full((2, 4), 2), "bert: segments: expected tokens from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            apart.apply(params, tokens, segments=segments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "heads: expected a divisor of the width, 8, got 3"),
        ({"segments": -1}, "segments: expected 0 or more, got -1"),
        ({"depth": 0}, "depth: expected 1 or more, got 0"),
        ({"positions": "relative"}, "positions: expected one of 'learned'"),
        ({"activation": "tanh"}, "activation: expected one of 'relu'"),
        ({"norm": "batch"}, "norm: expected one of 'layer', 'rms', got 'batch'"),
        ({"dropout": -0.5}, "dropout: expected a rate"),
        ({"init_std": 0.0}, "init_std: expected more than 0"),
    ],
)
def test_configs_that_cannot_be(options, message, unchecked):
    for make in (models.bert, Config):
        with pytest.raises(ValueError, match=re.escape(f"bert: {message}")):
            make(**SMALL | options)


def test_each_option_arrives_in_its_field():
    options = {
        "hidden": 5,
        "segments": 2,
        "positions": "rotary",
        "norm": "rms",
        "norm_first": True,
        "activation": "swiglu",
        "head": False,
        "share": "all",
        "dropout": 0.2,
        "init_std": 0.1,
    }
    assert models.bert(7, 6, 8, 3, 2, **options).config == Config(7, 6, 8, 3, 2, **options)
    names = ["embedding", "layers.0", "layers.1", "encoder"]
    model = models.bert(**SMALL)
    assert list(model.apply(drawn(model), tokens_of(1, 2), taps=names)[1]) == names

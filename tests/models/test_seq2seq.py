"""What is particular to decoders: what they are given at each step."""

import re
from functools import partial

import pytest
import torch
from torch.func import grad, jvp, vmap

from funcnets import compile, generation, models, random, tree

KEY, DTYPE = random.key(5), torch.float64
kinds = pytest.mark.parametrize("tokens", [False, True], ids=["vectors", "tokens"])


def close(actual, expected, tolerance=1e-10):
    tree.map(
        lambda a, b: torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance),
        actual,
        expected,
    )


def made(tokens=False, batch=4, steps=5, **options):
    """A model, its parameters, an input and targets."""
    model = models.seq2seq(3, 6, steps, 8, tokens=tokens, **options)
    params = tree.map(lambda leaf: 2 * leaf, tree.cast(model.init(KEY), DTYPE))
    params["start"] = torch.linspace(-1, 1, len(params["start"]), dtype=DTYPE)
    x = random.normal(
        KEY, (batch, 7, 3) if options.get("encoder", True) else (batch, 3), dtype=DTYPE
    )
    if tokens:
        return model, params, x, random.randint(KEY, (batch, steps), 0, 6)
    return model, params, x, random.normal(KEY, (batch, steps, 6), dtype=DTYPE)


@kinds
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_scheduled_sampling_lies_between_its_ends(tokens, cell):
    """At a rate of 0 it is teacher forcing, at 1 the decoder runs on its own."""
    model, params, x, targets = made(tokens, cell=cell, num_layers=2)

    def train(rate):
        options = {"sampling": rate, "train": True, "key": KEY}
        return model.apply(params, x, targets, **options)[0]

    forced, free = model.apply(params, x, targets), model.apply(params, x)
    close(train(torch.tensor(0.0)), forced)
    close(train(0.0), forced)
    close(train(1.0), free)
    close(train(torch.tensor(1.0)), free)
    half = train(0.5)
    close(half[:, 0], forced[:, 0])
    same = torch.isclose(half, forced).all(-1)[:, 1], torch.isclose(half, free).all(-1)[:, 1]
    assert (same[0] | same[1]).all()  # each sample of the second step was given one or the other
    close(model.apply(params, x, targets, sampling=0.5, key=KEY), forced)  # at inference none


def test_the_rate_of_scheduled_sampling_and_its_independence():
    """By a decoder that gives on what it was given."""
    model = models.seq2seq(1, 1, 40, 1, cell="rnn_tanh", sampling=0.3)
    params = tree.map(torch.zeros_like, tree.cast(model.init(KEY), DTYPE))
    params["decoder", "weight_ih_l0"] += 1e-6
    params["head", "weight"] += 1e6
    x = torch.zeros(500, 2, 1, dtype=DTYPE)
    targets = torch.arange(1.0, 41.0, dtype=DTYPE)[:, None].expand(500, 40, 1)
    outputs = model.apply(params, x, targets, train=True, key=KEY)[0].squeeze(-1)
    forced = (outputs[:, 1:] - targets[:, :-1, 0]).abs() < 1e-3
    assert abs(forced.double().mean() - 0.7) < 0.02
    assert forced.double().mean(0).sub(0.7).abs().max() < 0.09
    assert forced.double().mean(1).sub(0.7).abs().max() < 0.3
    again, other = (
        model.apply(params, x, targets, train=True, key=key)[0].squeeze(-1)
        for key in (KEY, random.key(6))
    )
    assert torch.equal(again, outputs)
    assert not torch.equal(other, outputs)


@kinds
def test_no_output_depends_on_a_later_target(tokens):
    model, params, x, targets = made(tokens)
    wanted = model.apply(params, x, targets)
    for at in range(5):
        changed = targets.clone()
        changed[:, at] = 5 - changed[:, at]
        outputs = model.apply(params, x, changed)
        close(outputs[:, : at + 1], wanted[:, : at + 1])
        if at < 4:
            assert (outputs[:, at + 1] != wanted[:, at + 1]).any()


def test_nothing_beyond_a_length_matters():
    model, params, x, targets = made(bidirectional=True)
    lengths = torch.tensor([7, 1, 3, 5])
    outputs = model.apply(params, x, targets, lengths)
    beyond = torch.arange(7) >= lengths[:, None]
    spoiled = torch.where(beyond[..., None], 100.0, x)
    close(model.apply(params, spoiled, targets, lengths), outputs)
    for i, length in enumerate(lengths.tolist()):
        close(model.apply(params, x[i : i + 1, :length], targets[i : i + 1])[0], outputs[i])


@kinds
@pytest.mark.parametrize("encoder", [True, False])
def test_steps(tokens, encoder):
    model, params, x, _ = made(tokens, encoder=encoder)
    whole = model.apply(params, x, steps=8)
    assert whole.shape == (4, 8, 6)
    close(model.apply(params, x), whole[:, :5])
    close(model.apply(params, x, steps=1), whole[:, :1])


def test_tokens_are_drawn_by_key():
    model, params, _, _ = made(tokens=True, encoder=False, steps=2)
    params["head"] *= 3
    x = torch.ones(4000, 3, dtype=DTYPE)
    with pytest.raises(ValueError, match="key: expected a key"):
        model.apply(params, x, draw=True)
    outputs = model.apply(params, x, draw=True, key=KEY)
    close(outputs, model.apply(params, x, draw=True, key=KEY))
    close(outputs[:, 0], model.apply(params, x)[:, 0])
    # Which token came first is told by what came second.
    given = torch.arange(6)[:, None].repeat(1, 2)
    second = model.apply(params, x[:6], given)[:, 1]
    distance = (outputs[:, 1, None] - second).abs().amax(-1)
    assert distance.amin(-1).max() < 1e-9
    found = torch.bincount(distance.argmin(-1), minlength=6) / 4000
    assert (found - outputs[0, 0].softmax(-1)).abs().max() < 0.04


def test_dropout_is_in_training_alone():
    model, params, x, targets = made(dropout=0.5, num_layers=2)
    plain, *_ = made(num_layers=2)
    for given in (targets, None):
        close(model.apply(params, x, given), plain.apply(params, x, given))
        first, again, other = (
            model.apply(params, x, given, train=True, key=random.key(i))[0] for i in (0, 0, 1)
        )
        close(first, again)
        assert (first != other).all()
        assert (first != plain.apply(params, x, given)).any()


@kinds
def test_transforms_of_a_decoder_on_its_own(tokens):
    model, params, x, _ = made(tokens, unroll=False)

    def loss(params, x):
        return model.apply(params, x).square().mean()

    per_sample = vmap(grad(loss), (None, 0))(params, x[:, None])
    for i in range(len(x)):
        close(tree.map(lambda g, i=i: g[i], per_sample), grad(loss)(params, x[i : i + 1]))
    direction = tree.map(torch.cos, params)
    _, product = jvp(lambda p: grad(loss)(p, x), (params,), (direction,))
    step = 1e-6
    ahead, behind = (
        grad(loss)(tree.map(lambda p, d, s=s: p + s * d, params, direction), x)
        for s in (step, -step)
    )
    close(product, tree.map(lambda a, b: (a - b) / (2 * step), ahead, behind), 1e-5)
    compiled = compile(grad(loss), backend="aot_eager")
    close(compiled(params, x), grad(loss)(params, x))


def test_autocast():
    for tokens in (False, True):
        model, params, x, targets = made(tokens)
        params = tree.map(lambda leaf: leaf.float(), params)
        targets = targets if tokens else targets.float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model.apply(params, x.float())
            model.apply(params, x.float(), targets)
            model.apply(params, x.float(), targets, sampling=0.5, train=True, key=KEY)


def test_errors(unchecked):
    model, params, x, targets = made()
    refused = {
        "x: expected [batch, time of at least 1, 3], got [4, 3]": (x[:, 0],),
        "targets: expected [batch, steps of at least 1, 6], got [4, 5]": (x, targets[..., 0]),
        "targets: expected [batch, steps of at least 1, 6], got [4, 0, 6]": (x, targets[:, :0]),
        "targets: expected 4 samples (as x), got 2": (x, targets[:2]),
        "targets: expected torch.float64, got torch.int64": (x, targets.long()),
        "gru: lengths: expected 1 to 7, got 8": (x, targets, torch.tensor([1, 2, 3, 8])),
    }
    for message, inputs in refused.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            model.apply(params, *inputs)
    for steps, given, message in (
        (3, targets, "steps: expected 5 (as targets), got 3"),
        (0, None, "steps: expected at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            model.apply(params, x, given, steps=steps)
    model, params, x, targets = made(tokens=True, encoder=False)
    with pytest.raises(ValueError, match=r"x: expected \[batch, 3\], got \[4, 2\]"):
        model.apply(params, x[:, :2])
    with pytest.raises(ValueError, match=r"targets: expected integers, got torch\.float64"):
        model.apply(params, x, targets.double())
    with pytest.raises(ValueError, match="encoder: expected True with bidirectional"):
        models.seq2seq(3, 6, encoder=False, bidirectional=True)
    with pytest.raises(ValueError, match=r"sampling: expected a rate between 0 and 1, got 2\.0"):
        models.seq2seq(3, 6, sampling=2.0)
    with pytest.raises(ValueError, match="steps: expected a positive integer, got 0"):
        models.seq2seq(3, 6, 0)


@kinds
@pytest.mark.parametrize("options", [{"cell": "lstm", "num_layers": 2}, {"encoder": False}])
def test_with_a_cache_outputs_are_those_without(tokens, options):
    """In one piece and in chunks; the first element stands for the beginning, whatever it is."""
    model, params, x, targets = made(tokens, **options)
    whole = model.apply(params, x, targets)
    given = torch.cat([targets[:, -1:], targets[:, :-1]], 1)
    begin = models.seq2seq_cache(params, model.config, x)
    outputs, cache = model.apply(params, None, given, cache=begin)
    close(outputs, whole)
    assert cache["length"].tolist() == [5] * 4
    first, held = model.apply(params, None, given[:, :2], cache=begin)
    second, held = model.apply(params, None, given[:, 2:], cache=held)
    close(torch.cat([first, second], 1), whole)
    close(held, cache)


def test_rows_of_different_lengths_go_into_the_cache():
    model, params, x, targets = made(tokens=True, cell="lstm")
    lengths, more = torch.tensor([1, 5, 2, 3]), torch.tensor([[1], [2], [3], [4]])
    begin = models.seq2seq_cache(params, model.config, x)
    _, cache = model.apply(params, None, targets, lengths, cache=begin)
    outputs, _ = model.apply(params, None, more, cache=cache)
    for i, length in enumerate(lengths.tolist()):
        alone = models.seq2seq_cache(params, model.config, x[i : i + 1])
        row = torch.cat([targets[i : i + 1, :length], more[i : i + 1]], 1)
        close(outputs[i], model.apply(params, None, row, cache=alone)[0][0, -1:])


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_generation_writes_with_the_cache(cell):
    """The greedy text is the decoder's own, a beam's score its probability; and it compiles."""
    model, params, x, _ = made(tokens=True, cell=cell)
    cache, begin = models.seq2seq_cache(params, model.config, x), torch.zeros(4, 1).long()
    f = partial(model.apply, params, None)
    own = model.apply(params, x, steps=5)
    written = generation.greedy(f, begin, 5, cache=cache).tokens[:, 1:]
    assert torch.equal(written, own.argmax(-1))
    found = generation.beam_search(f, begin, 5, beams=3, length_penalty=0.0, cache=cache)
    logits = model.apply(params, x, found.tokens[:, 0, 1:]).log_softmax(-1)
    score = logits.gather(-1, found.tokens[:, 0, 1:, None]).sum((1, 2))
    close(found.scores[:, 0], score)
    if cell == "gru":  # the slower of the two to compile is the other
        drawn = partial(generation.generate, KEY, f, steps=3, cache=cache)
        again = compile(lambda prompts: drawn(prompts=prompts).tokens, backend="aot_eager")
        assert torch.equal(drawn(prompts=begin).tokens, again(begin))


def test_errors_of_the_cache():
    model, params, x, targets = made(cell="lstm")
    cache = models.seq2seq_cache(params, model.config, x)
    for arguments, given, error, message in (
        ((x, targets), cache, ValueError, "x: expected None with a cache"),
        ((None,), cache, ValueError, "targets: expected some with a cache"),
        ((None, targets), None, ValueError, "x: expected a tensor without a cache"),
        ((None, targets[:2]), cache, ValueError, "cache: h: expected [2, 1, 8], got [4, 1, 8]"),
        ((None, targets), cache.exclude("c"), KeyError, "h, c, length, got h, length"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            model.apply(params, *arguments, cache=given)

"""Generation against loops by hand, and beam search against every continuation there is."""

from __future__ import annotations

import itertools
import re
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap

from funcnets import compile, generation, models, random, tree
from funcnets.generation import beam_search, generate, greedy

KEY = random.key(11)
V = 5
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


def toy(seed=0, vocabulary=V):
    """A function in which every token depends on all before it."""
    first, second = random.split(random.key(seed))
    embedding = random.normal(first, (vocabulary, 6), dtype=torch.float64)
    head = random.normal(second, (6, vocabulary), dtype=torch.float64)

    def f(tokens):
        weights = torch.arange(1, tokens.shape[1] + 1, dtype=torch.float64)[:, None]
        return 3 * torch.sin((weights * embedding[tokens]).cumsum(1)) @ head

    return f


def prompts_of(batch=3, time=4, seed=0, vocabulary=V):
    return random.randint(random.key(seed), (batch, time), 0, vocabulary)


def language_model(seed=0, **options):
    options = {"context": 12, "width": 8, "depth": 2, "heads": 2, "init_std": 0.7} | options
    model = models.gpt(V, **options)
    return model, tree.cast(model.init(random.key(seed)), torch.float64)


def by_hand(f, prompt, steps, choose=lambda logits, tokens: int(logits.argmax()), stop=()):
    tokens = list(prompt)
    for _ in range(steps):
        token = choose(f(torch.tensor([tokens]))[0, -1], tokens)
        tokens.append(token)
        if token in stop:
            break
    return tokens


def check_rows(found, expected, total, pad=0):
    assert found.tokens.shape[1] == total
    for tokens, length, row in zip(*found, expected, strict=True):
        assert length == len(row)
        assert tokens.tolist() == row + [pad] * (total - len(row))


logit_rows = st.lists(st.sampled_from([-2.0, 0.0, 0.5, 1.0, 3.0]), min_size=1, max_size=6)


@given(logit_rows, st.integers(1, 7), st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]))
def test_what_is_kept(row, k, p):
    logits = torch.tensor(row, dtype=torch.float64)
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    kept = generation.keep_top_k(logits, k)
    assert kept.isfinite().nonzero().flatten().tolist() == sorted(order[:k])
    assert torch.equal(kept[kept.isfinite()], logits[kept.isfinite()])
    probabilities, nucleus, sum_ = logits.softmax(-1).tolist(), [], 0.0
    for i in order:
        if nucleus and sum_ >= p - 1e-12:
            break
        nucleus.append(i)
        sum_ += probabilities[i]
    kept = generation.keep_nucleus(logits, p - 1e-12 if p else 0.0)
    assert kept.isfinite().nonzero().flatten().tolist() == sorted(nucleus)
    assert torch.equal(kept[kept.isfinite()], logits[kept.isfinite()])


def test_the_nucleus_is_the_fewest_that_do():
    quarters = torch.zeros(4)  # of equal ones the first
    for p, kept in ((0.5, [0, 1]), (0.51, [0, 1, 2]), (0.25, [0])):
        found = generation.keep_nucleus(quarters, p)
        assert found.isfinite().nonzero().flatten().tolist() == kept


def test_what_is_kept_of_rows_and_under_vmap():
    logits = random.normal(KEY, (2, 3, 6))
    for f in (
        partial(generation.keep_top_k, k=2),
        partial(generation.keep_nucleus, p=0.6),
        partial(generation.keep_nucleus, p=torch.tensor(0.6)),
    ):
        each = torch.stack([torch.stack([f(row) for row in rows]) for rows in logits])
        assert torch.equal(f(logits), each)
        assert torch.equal(vmap(f)(logits), each)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_at_their_probabilities(temperature):
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0], dtype=torch.float64)
    many = logits.expand(20000, 4)
    for options, kept in (
        ({}, logits),
        ({"top_k": 2}, generation.keep_top_k(logits, 2)),
        ({"top_p": 0.7}, None),
    ):
        drawn = generation.sample(KEY, many, temperature=temperature, **options)
        scaled = logits / temperature
        if kept is None:
            kept = generation.keep_nucleus(scaled, 0.7) * temperature
        expected = (kept / temperature).softmax(-1)
        found = torch.bincount(drawn, minlength=4) / len(drawn)
        assert (found - expected).abs().max() < 5 * (0.25 / len(drawn)) ** 0.5
        assert not found[expected == 0].any()
    same = generation.sample(KEY, many, temperature=torch.tensor(temperature))
    assert torch.equal(same, generation.sample(KEY, many, temperature=temperature))


def test_at_temperature_zero_and_among_one_the_largest_is_taken():
    logits = torch.tensor([[0.0, 2.0, 2.0], [1.0, 0.0, -1.0]], dtype=torch.float64)
    expected = [1, 0]
    assert generation.sample(None, logits, temperature=0.0).tolist() == expected
    for options in (
        {"temperature": torch.tensor(0.0)},
        {"top_k": 1},
        {"top_p": 0.0},
        {"temperature": torch.tensor(0.0), "top_p": 0.9, "top_k": 2},
    ):
        for key in random.split(KEY, 5):
            assert generation.sample(key, logits, **options).tolist() == expected
    temperatures = torch.tensor([0.0, 1.0, 5.0])
    each = vmap(lambda t: generation.sample(KEY, logits, temperature=t))(temperatures)
    for t, row in zip(temperatures.tolist(), each, strict=True):
        assert torch.equal(row, generation.sample(KEY, logits, temperature=t))


@given(st.integers(0, 2**16), st.integers(0, 5), st.sampled_from([(), 0, (1, 3)]))
def test_greedy_is_the_loop_by_hand(seed, steps, stop):
    f, prompts = toy(seed), prompts_of(seed=seed)
    stops = (stop,) if isinstance(stop, int) else stop
    rows = [by_hand(f, row, steps, stop=stops) for row in prompts.tolist()]
    found = greedy(f, prompts, steps, stop=stop, pad=2)
    check_rows(found, rows, 4 + steps, pad=2)
    for options in ({"temperature": 1e-9}, {"top_k": 1}, {"top_p": 0.0}):
        again = generate(KEY, f, prompts, steps, stop=stop, pad=2, **options)
        assert torch.equal(again.tokens, found.tokens)
        assert torch.equal(again.lengths, found.lengths)
    beams = beam_search(f, prompts, steps, beams=1, stop=stop, pad=2)
    assert torch.equal(beams.tokens[:, 0], found.tokens)
    assert torch.equal(beams.lengths[:, 0], found.lengths)


def test_draws_by_key_and_by_row():
    f, prompts = toy(), prompts_of(1).expand(6, 4)
    found = generate(KEY, f, prompts, 8)
    assert torch.equal(found.tokens, generate(KEY, f, prompts, 8).tokens)
    assert not torch.equal(found.tokens, generate(random.key(1), f, prompts, 8).tokens)
    assert len({tuple(row.tolist()) for row in found.tokens}) == 6
    # Whatever stands beside it, and however many turns follow.
    assert torch.equal(generate(KEY, f, prompts[:2], 8).tokens, found.tokens[:2])
    assert torch.equal(generate(KEY, f, prompts, 5).tokens, found.tokens[:, :9])
    each = vmap(lambda key: generate(key, f, prompts, 4, stop=1))(random.split(KEY, 3))
    for i, key in enumerate(random.split(KEY, 3)):
        alone = generate(key, f, prompts, 4, stop=1)
        assert torch.equal(each.tokens[i], alone.tokens)
        assert torch.equal(each.lengths[i], alone.lengths)


@given(st.integers(0, 2**16), st.sampled_from([None, 1, 2, 3, 20]))
def test_ragged_prompts_and_a_window(seed, window):
    f, prompts = toy(seed), prompts_of(seed=seed)
    lengths = random.randint(random.key(seed), (3,), 1, 5)
    padded = torch.where(torch.arange(4) < lengths[:, None], prompts, -100)

    def seen(tokens):
        return f(tokens if window is None else tokens[:, -window:])

    rows = [
        by_hand(seen, row[:length], 5, stop=(3,))
        for row, length in zip(prompts.tolist(), lengths.tolist(), strict=True)
    ]
    before = padded.clone()
    found = greedy(f, padded, 5, lengths=lengths, window=window, stop=3)
    check_rows(found, rows, 9)
    assert torch.equal(padded, before)
    beams = beam_search(f, padded, 3, beams=3, lengths=lengths, window=window, stop=3)
    for i, length in enumerate(lengths.tolist()):
        one = prompts[i : i + 1, :length]
        alone = beam_search(f, one, 3, beams=3, window=window, stop=3)
        assert torch.equal(beams.lengths[i], alone.lengths[0])
        assert torch.equal(beams.tokens[i, :, : length + 3], alone.tokens[0])
        close(beams.scores[i], alone.scores[0])


def penalized(penalty):
    def choose(logits, tokens):
        for token in set(tokens):
            value = logits[token]
            logits[token] = value / penalty if value > 0 else value * penalty
        return int(logits.argmax())

    return choose


@given(st.integers(0, 2**16), st.sampled_from([0.5, 1.0, 1.3, 50.0]))
def test_repetition_is_penalized(seed, penalty):
    f, prompts = toy(seed, vocabulary=8), prompts_of(seed=seed, vocabulary=8)
    lengths = torch.tensor([1, 4, 2])
    rows = [
        by_hand(f, row[:length], 4, penalized(penalty))
        for row, length in zip(prompts.tolist(), lengths.tolist(), strict=True)
    ]
    found = greedy(f, prompts, 4, lengths=lengths, repetition_penalty=penalty)
    check_rows(found, rows, 8)
    beams = beam_search(f, prompts, 4, beams=1, lengths=lengths, repetition_penalty=penalty)
    assert torch.equal(beams.tokens[:, 0], found.tokens)
    tensor = torch.tensor(penalty, dtype=torch.float64)
    again = greedy(f, prompts, 4, lengths=lengths, repetition_penalty=tensor)
    assert torch.equal(again.tokens, found.tokens)


def test_what_stands_behind_a_row_is_not_penalized():
    logits, tokens = torch.tensor([2.0, 2.0, -2.0]), torch.tensor([2, 99, 1])
    found = generation.penalize_repetition(logits, tokens, 2.0, torch.tensor(1))
    assert found.tolist() == [2.0, 2.0, -4.0]


def test_it_ends_with_the_last_row_and_reads_only_what_is_new():
    model, params = language_model()
    seen = []

    def f(tokens, **options):
        seen.append((tuple(tokens.shape), sorted(options)))
        return model.apply(params, tokens, **options)

    prompts = prompts_of(2)
    cache = models.gpt_cache(params, model.config, 2)
    everything = tuple(range(V))
    found = greedy(f, prompts, 6, cache=cache, stop=everything)
    assert found.lengths.tolist() == [5, 5]
    assert seen == [((2, 4), ["cache"])]
    seen.clear()
    greedy(f, prompts, 3, cache=cache, lengths=torch.tensor([4, 2]))
    assert seen == [((2, 4), ["cache", "lengths"]), ((2, 1), ["cache"]), ((2, 1), ["cache"])]
    seen.clear()
    beam_search(f, prompts, 3, beams=3, cache=cache)
    assert seen == [((2, 4), ["cache"]), ((6, 1), ["cache"]), ((6, 1), ["cache"])]
    assert not cache["keys"].any()


@pytest.mark.parametrize("share", ["none", "stacked"])
def test_a_cache_changes_no_token(share):
    model, params = language_model(share=share, positions="rotary")
    f, prompts = partial(model.apply, params), prompts_of()
    for lengths in (None, torch.tensor([1, 4, 2])):
        cache = models.gpt_cache(params, model.config, 3, capacity=10)
        options = {"lengths": lengths, "stop": 3}
        found = generate(KEY, f, prompts, 6, cache=cache, **options)
        assert torch.equal(found.tokens, generate(KEY, f, prompts, 6, **options).tokens)
        found = beam_search(f, prompts, 6, beams=4, cache=cache, **options)
        expected = beam_search(f, prompts, 6, beams=4, **options)
        assert torch.equal(found.tokens, expected.tokens)
        close(found.scores, expected.scores)
    with pytest.raises(ValueError, match="gpt: tokens: expected at most 12"):
        greedy(f, prompts, 9)
    with pytest.raises(ValueError, match="gpt: tokens: expected at most 10 with those in the"):
        greedy(f, prompts, 8, cache=models.gpt_cache(params, model.config, 3, capacity=10))
    assert greedy(f, prompts, 20, window=12).tokens.shape == (3, 24)


def test_under_compile_and_for_an_ensemble():
    options = {"depth": 1, "share": "stacked"}
    model, params = language_model(**options)
    prompts, cache = prompts_of(), models.gpt_cache(params, model.config, 3)

    def write(params, prompts, key, cache):
        f = partial(model.apply, params)
        return generate(key, f, prompts, 4, temperature=1.5, stop=3, top_p=0.9, cache=cache)

    def search(params, prompts, key, cache):
        f = partial(model.apply, params)
        return beam_search(f, prompts, 4, beams=2, stop=3, cache=cache)

    for f in (write, search):
        compiled = compile(f, backend="aot_eager")
        for seed in (0, 1):
            arguments = params, prompts, random.key(seed), cache
            tree.map(close, compiled(*arguments), f(*arguments))
    compiled = compile(lambda key: generate(key, toy(), prompts, 4, stop=3), backend="aot_eager")
    for key in random.split(KEY, 2):
        tree.map(close, compiled(key), generate(key, toy(), prompts, 4, stop=3))
    members = [language_model(i, **options)[1] for i in range(3)]
    keys = random.split(KEY, 3)
    for f in (write, search):
        every = vmap(partial(f, cache=cache), (0, None, 0))(tree.stack(members), prompts, keys)
        for i, member in enumerate(members):
            alone = f(member, prompts, keys[i], cache)
            tree.map(close, tree.map(lambda leaf, i=i: leaf[i], every), alone)


def score_of(f, prompt, new, power):
    logits = f(torch.tensor([[*prompt, *new]]))[0].log_softmax(-1)
    sum_ = sum(logits[len(prompt) + i - 1, token] for i, token in enumerate(new))
    return float(sum_) / len(new) ** power


def continuations(steps, stop, vocabulary):
    """Every sequence that ends with its first stop token, or is as long as can be."""
    for length in range(1, steps + 1):
        for new in itertools.product(range(vocabulary), repeat=length):
            if any(token in stop for token in new[:-1]):
                continue
            if new[-1] in stop or length == steps:
                yield list(new)


@given(
    st.integers(0, 2**16),
    st.integers(1, 3),
    st.sampled_from([(), (0,), (0, 2)]),
    st.sampled_from([0.0, 0.5, 1.0, 2.0]),
)
def test_a_wide_beam_finds_the_best_of_all(seed, steps, stop, power):
    f, prompts = toy(seed, vocabulary=3), prompts_of(2, 2, seed, vocabulary=3)
    beams = 3**steps + 2
    found = beam_search(f, prompts, steps, beams=beams, stop=stop, length_penalty=power)
    for i, prompt in enumerate(prompts.tolist()):
        every = [(score_of(f, prompt, new, power), new) for new in continuations(steps, stop, 3)]
        every.sort(key=lambda pair: -pair[0])
        scores = torch.tensor([score for score, _ in every], dtype=torch.float64)
        close(found.scores[i, : len(every)], scores)
        assert (found.scores[i, len(every) :] == -torch.inf).all()
        for j, (score, new) in enumerate(every):
            if sum(abs(score - other) < 1e-9 for other, _ in every) > 1:
                continue  # of equal ones either may come first
            length = int(found.lengths[i, j])
            assert found.tokens[i, j, :length].tolist() == prompt + new
            assert not found.tokens[i, j, length:].any()


def test_a_narrow_beam_keeps_the_best_that_it_sees():
    """The beam by hand, in lists."""
    f, prompts, beams, stop = toy(3), prompts_of(2, 3), 3, (1,)
    found = beam_search(f, prompts, 5, beams=beams, stop=stop)
    for i, prompt in enumerate(prompts.tolist()):
        held = [[]]
        for _ in range(5):
            more = [
                [*new, token] for new in held if not (new and new[-1] in stop) for token in range(V)
            ]
            more += [new for new in held if new and new[-1] in stop]
            held = sorted(more, key=lambda new: -score_of(f, prompt, new, 1.0))[:beams]
        for j, new in enumerate(held):
            length = int(found.lengths[i, j])
            assert found.tokens[i, j, :length].tolist() == prompt + new
            assert abs(found.scores[i, j] - score_of(f, prompt, new, 1.0)) < 1e-9


def test_nothing_to_write():
    f, prompts = toy(), prompts_of()
    assert torch.equal(generate(KEY, f, prompts, 0).tokens, prompts)
    found = beam_search(f, prompts, 0, beams=2)
    assert torch.equal(found.tokens[:, 0], prompts)
    assert found.scores.tolist() == [[0.0, -torch.inf]] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": torch.empty(2, 0, dtype=torch.int64)}, "prompts: expected at least one token"),
        ({"lengths": torch.tensor([0, 1])}, "lengths: expected 1 to 3 tokens, got 0 to 1"),
        ({"lengths": torch.tensor([4, 1])}, "lengths: expected 1 to 3 tokens, got 1 to 4"),
        ({"lengths": torch.tensor([1])}, "lengths: expected [2], got [1]"),
        ({"steps": -1}, "steps: expected 0 or more, got -1"),
        ({"window": 0}, "window: expected at least 1, got 0"),
        ({"window": 2, "cache": {}}, "window: expected None with a cache, got 2"),
        ({"f": lambda tokens: tokens}, "f: expected logits [2, 5, vocabulary], got [2, 5]"),
        ({"repetition_penalty": 0.0}, "penalize_repetition: penalty: expected more than 0"),
    ],
)
def test_what_cannot_be(options, message, unchecked):
    given = {"f": toy(), "prompts": prompts_of(2, 3), "steps": 2} | options
    for f in (partial(generate, KEY), greedy, partial(beam_search, beams=2)):
        with pytest.raises(ValueError, match=re.escape(message)):
            f(**given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature: expected 0 or more, got -1.0"),
        ({"temperature": float("nan")}, "temperature: expected 0 or more, got nan"),
        ({"top_k": 0}, "top_k: expected at least 1, got 0"),
        ({"top_p": 1.5}, "top_p: expected a probability, got 1.5"),
        ({"key": None}, "key: expected a key (temperature is not 0), got None"),
    ],
)
def test_choices_that_cannot_be(options, message):
    key = options.pop("key", KEY)
    with pytest.raises(ValueError, match=re.escape(f"generate: {message}")):
        generate(key, toy(), prompts_of(), 2, **options)
    with pytest.raises(ValueError, match=re.escape(f"sample: {message}")):
        generation.sample(key, torch.zeros(3), **options)


def test_a_function_without_a_cache_given_one():
    with pytest.raises(TypeError, match=r"f: expected \(logits, cache\) where a cache is given"):
        greedy(lambda tokens, cache: toy()(tokens), prompts_of(), 2, cache={})
    with pytest.raises(ValueError, match="beams: expected at least 1, got 0"):
        beam_search(toy(), prompts_of(), 2, beams=0)

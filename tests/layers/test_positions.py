import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, vmap

from funcnets import layers, random

KEY = random.key(0)
DTYPE = torch.float64
keys = st.integers(0, 2**16).map(random.key)


def normal(key, *shape):
    return random.normal(key, shape, dtype=DTYPE)


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@given(length=st.integers(1, 20), half=st.integers(1, 8), base=st.sampled_from([10000.0, 50.0]))
def test_sinusoidal_is_the_formula_of_the_paper(length, half, base):
    table = layers.sinusoidal(length, 2 * half, base=base, dtype=DTYPE)
    assert table.shape == (length, 2 * half)
    for place in range(length):
        for i in range(half):
            angle = place / base ** (2 * i / (2 * half))
            assert abs(table[place, 2 * i] - math.sin(angle)) < 1e-12
            assert abs(table[place, 2 * i + 1] - math.cos(angle)) < 1e-12
    some = torch.tensor([[length - 1, 0]])
    close(layers.sinusoidal(some, 2 * half, base=base, dtype=DTYPE), table[some])
    single = layers.sinusoidal(length, 2 * half, base=base)
    close(single.to(DTYPE), table, 1e-5)
    half_precision = layers.sinusoidal(length, 2 * half, base=base, dtype=torch.bfloat16)
    assert torch.equal(half_precision, single.bfloat16())


@given(height=st.integers(1, 5), width=st.integers(1, 5), quarter=st.integers(1, 4))
def test_sincos_2d_is_one_axis_after_the_other(height, width, quarter):
    features = 4 * quarter
    grid = layers.sincos_2d(height, width, features, dtype=DTYPE)
    assert grid.shape == (height, width, features)
    for row in range(height):
        for column in range(width):
            for start, place in ((0, row), (2 * quarter, column)):
                for i in range(quarter):
                    angle = place / 10000 ** (i / quarter)
                    assert abs(grid[row, column, start + i] - math.sin(angle)) < 1e-12
                    assert abs(grid[row, column, start + quarter + i] - math.cos(angle)) < 1e-12


def test_learned_positions():
    params = layers.init_learned_positions(KEY, 500, 40)
    assert 0.019 < params["weight"].std() < 0.021
    close(layers.learned_positions(params, 7), params["weight"][:7])
    close(layers.learned_positions(params, 7, offset=3), params["weight"][3:10])
    close(layers.learned_positions(params, 100, offset=400), params["weight"][400:])
    some = torch.tensor([[5, 0], [499, 5]])
    close(layers.learned_positions(params, some), params["weight"][some])
    gradient = grad(lambda params: layers.learned_positions(params, 2).sum())(params)["weight"]
    assert (gradient[:2] == 1).all()
    assert (gradient[2:] == 0).all()


@pytest.mark.parametrize("interleaved", [False, True])
@given(key=keys, half=st.integers(1, 4), far=st.integers(0, 1000))
def test_rotary_turns_pairs_of_features(interleaved, key, half, far):
    x = normal(key, 2, 3, 5, 2 * half)
    turned = layers.rotary(x, far, interleaved=interleaved)
    for place in range(5):
        for i in range(half):
            angle = (far + place) / 10000 ** (i / half)
            pair = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
            a, b = x[..., place, pair[0]], x[..., place, pair[1]]
            close(turned[..., place, pair[0]], a * math.cos(angle) - b * math.sin(angle), 1e-9)
            close(turned[..., place, pair[1]], a * math.sin(angle) + b * math.cos(angle), 1e-9)


@pytest.mark.parametrize("interleaved", [False, True])
@given(key=keys, a=st.integers(0, 50), b=st.integers(0, 50), shift=st.integers(-50, 5000))
def test_rotary_scores_depend_on_the_distance_only(interleaved, key, a, b, shift):
    q, k = normal(key, 2, 1, 8)

    def score(a, b):
        q_turned = layers.rotary(q, torch.tensor([a]), interleaved=interleaved)
        return (q_turned * layers.rotary(k, torch.tensor([b]), interleaved=interleaved)).sum()

    close(score(a + shift, b + shift), score(a, b), 1e-8)
    assert abs(score(a + 1, b) - score(a, b)) > 1e-9  # and on the distance they do


@given(key=keys, offset=st.integers(0, 100), interleaved=st.booleans())
def test_rotary_places_in_all_their_forms(key, offset, interleaved):
    x = normal(key, 2, 3, 5, 4)
    close(layers.rotary(x, offset), layers.rotary(x, torch.arange(offset, offset + 5)))
    each = torch.stack([torch.arange(5), torch.arange(offset, offset + 5)])
    ragged = layers.rotary(x, each[:, None], interleaved=interleaved)
    close(ragged[0], layers.rotary(x[0], interleaved=interleaved))
    close(ragged[1], layers.rotary(x[1], offset, interleaved=interleaved))
    turn = layers.rotary_positions(
        torch.arange(offset, offset + 5), 4, keys=5, interleaved=interleaved, dtype=DTYPE
    )
    q, k = turn(x, x)
    close(q, layers.rotary(x, offset, interleaved=interleaved))
    close(k, layers.rotary(x, interleaved=interleaved))
    close(vmap(layers.rotary)(x, each[:, None]), layers.rotary(x, each[:, None]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rotary_far_away_in_low_precision(dtype):
    x = random.normal(KEY, (4, 64), dtype=dtype)
    turned = layers.rotary(x, 10_000)
    expected = layers.rotary(x.to(DTYPE), 10_000)
    assert turned.dtype == dtype
    assert (turned.to(DTYPE) - expected).abs().max() < 4e-3 + 8 * torch.finfo(dtype).eps


@given(heads=st.integers(1, 20), queries=st.integers(1, 5), more=st.integers(0, 4))
def test_alibi_bias(heads, queries, more):
    bias = layers.alibi_bias(heads, queries, queries + more, dtype=DTYPE)
    assert bias.shape == (heads, queries, queries + more)

    def slopes(n):
        if math.log2(n).is_integer():
            return [2 ** (-8 * (i + 1) / n) for i in range(n)]
        whole = 2 ** math.floor(math.log2(n))
        return slopes(whole) + slopes(2 * whole)[0::2][: n - whole]

    for head, slope in enumerate(slopes(heads)):
        for i in range(queries):
            for j in range(queries + more):
                assert abs(bias[head, i, j] + slope * abs(i + more - j)) < 1e-12


def bucket_of(distance, buckets, causal, max_distance):
    """One distance, in Python's own numbers."""
    side, start = buckets, 0
    if not causal:
        side, start = buckets // 2, buckets // 2 if distance < 0 else 0
        distance = abs(distance)
    distance = max(distance, 0)
    single = side // 2
    if distance < single:
        return {start + distance}
    share = math.log(distance / single) / math.log(max_distance / single) * (side - single)
    # On the border between two, rounding decides.
    return {start + min(single + int(share + shift), side - 1) for shift in (-1e-6, 0, 1e-6)}


@given(
    half=st.integers(2, 20),
    causal=st.booleans(),
    factor=st.floats(1.1, 40.0),
)
def test_relative_buckets(half, causal, factor):
    buckets = 2 * half
    max_distance = math.ceil(buckets * factor)
    distance = torch.arange(-300, 300)
    found = layers.relative_bucket(distance, buckets, causal=causal, max_distance=max_distance)
    for one, bucket in zip(distance.tolist(), found.tolist(), strict=True):
        assert bucket in bucket_of(one, buckets, causal, max_distance)
    assert 0 <= found.min() <= found.max() == buckets - 1 or max_distance > 300


def test_relative_bias_looks_distances_up():
    params = layers.init_relative_bias(KEY, 3, 8, dtype=DTYPE)
    for causal in (False, True):
        bias = layers.relative_bias(params, 4, 6, causal=causal, max_distance=10)
        for i in range(4):
            for j in range(6):
                bucket = layers.relative_bucket(
                    torch.tensor(i + 2 - j), 8, causal=causal, max_distance=10
                )
                close(bias[:, i, j], params["weight"][bucket])
    gradient = grad(lambda params: layers.relative_bias(params, 4).sum())(params)["weight"]
    assert gradient.sum() == 3 * 16


@pytest.mark.parametrize("kind", ["alibi", "relative", "rotary", "learned"])
def test_positions_break_the_permutation(kind):
    params = layers.init_attention(KEY, 8, 2, dtype=DTYPE)
    bias = layers.init_relative_bias(KEY, 2, 8, dtype=DTYPE)
    learned = layers.init_learned_positions(KEY, 6, 8, dtype=DTYPE)
    options = {
        "alibi": {"bias": layers.alibi_bias(2, 6, dtype=DTYPE)},
        "relative": {"bias": layers.relative_bias(bias, 6)},
        "rotary": {"positions": layers.rotary_positions(6, 4, dtype=DTYPE)},
    }.get(kind, {})
    x = normal(KEY, 6, 8)

    def run(x):
        x = x + layers.learned_positions(learned, 6) if kind == "learned" else x
        return layers.attention(params, x, heads=2, **options)

    order = torch.tensor([3, 1, 0, 2, 5, 4])
    assert (run(x[order]) - run(x)[order]).abs().max() > 1e-5


LEARNED = layers.init_learned_positions(KEY, 8, 4)
X = torch.zeros(2, 5, 4)


@pytest.mark.parametrize(
    ("message", "run"),
    [
        (
            "sinusoidal: width: expected an even number, got 5",
            lambda: layers.sinusoidal(3, 5),
        ),
        (
            "sinusoidal: positions: expected at least 1, got 0",
            lambda: layers.sinusoidal(0, 4),
        ),
        (
            "sincos_2d: features: expected a multiple of 4, got 6",
            lambda: layers.sincos_2d(2, 2, 6),
        ),
        (
            "sincos_2d: height: expected at least 1, got 0",
            lambda: layers.sincos_2d(0, 2, 4),
        ),
        (
            "learned_positions: positions: expected at most 8 (as weight), got 9 from 0 on",
            lambda: layers.learned_positions(LEARNED, 9),
        ),
        (
            "learned_positions: positions: expected at most 8 (as weight), got 5 from 4 on",
            lambda: layers.learned_positions(LEARNED, 5, offset=4),
        ),
        (
            "rotary: head width: expected an even number, got 3",
            lambda: layers.rotary(torch.zeros(2, 5, 3)),
        ),
        (
            "rotary: positions: expected what broadcasts to [2, 5], got [4]",
            lambda: layers.rotary(X, torch.arange(4)),
        ),
        (
            "rotary_positions: head_width: expected an even number, got 5",
            lambda: layers.rotary_positions(3, 5),
        ),
        (
            "rotary: x: expected [..., time, 6], got [2, 5, 4]",
            lambda: layers.rotary_positions(5, 6)(X, X),
        ),
        (
            "alibi_bias: heads: expected at least 1, got 0",
            lambda: layers.alibi_bias(0, 5),
        ),
        (
            "relative_bucket: buckets: expected an even number from 4 on, got 3",
            lambda: layers.relative_bias(layers.init_relative_bias(KEY, 2, 3), 5),
        ),
        (
            "relative_bucket: max_distance: expected more than 8 (as buckets=32), got 8",
            lambda: layers.relative_bias(layers.init_relative_bias(KEY, 2), 5, max_distance=8),
        ),
    ],
)
def test_errors(unchecked, message, run):
    with pytest.raises(ValueError, match=re.escape(message)):
        run()

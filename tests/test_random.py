"""Keys and draws: the same numbers on every path, and the right distributions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch.func import grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from funcnets import random

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
SEEDS = st.integers(0, 2**64 - 1)
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])

# One call of every function that draws; the last shows what vmap sees in a model's init.
DRAWS = {
    "split": lambda key: random.split(key, 3),
    "fold_in": lambda key: random.fold_in(key, 7),
    "uniform": lambda key: random.uniform(key, (2, 3), -1.0, 2.0),
    "uniform of shape []": lambda key: random.uniform(key),
    "uniform of no elements": lambda key: random.uniform(key, (2, 0)),
    "float64 uniform": lambda key: random.uniform(key, (5,), dtype=torch.float64),
    "bfloat16 uniform": lambda key: random.uniform(key, (5,), dtype=torch.bfloat16),
    "normal": lambda key: random.normal(key, (3,), 1.0, 2.0),
    "float64 normal": lambda key: random.normal(key, (2, 2), dtype=torch.float64),
    "truncated_normal": lambda key: random.truncated_normal(key, (5,), -1.0, 0.5),
    "gumbel": lambda key: random.gumbel(key, (5,)),
    "bernoulli": lambda key: random.bernoulli(key, (4, 5), 0.3),
    "randint": lambda key: random.randint(key, (5,), -3, 1000),
    "uint8 randint": lambda key: random.randint(key, (5,), 0, 256, torch.uint8),
    "permutation": lambda key: random.permutation(key, 6),
    "categorical": lambda key: random.categorical(
        key, (4, 2), torch.tensor([0.0, 1.0, -1.0], device=key.device)
    ),
    "a chain": lambda key: random.normal(random.fold_in(random.split(key, 3)[1], 5), (2,)),
}


@pytest.fixture(params=DRAWS)
def draw(request):
    return DRAWS[request.param]


def keys(n, seed=0):
    return random.split(random.key(seed), n)


class TestPhilox:
    def test_published_answer(self):
        # The first line for philox4x32-10 in the kat_vectors file of Random123.
        words = random._philox(random.key(0), torch.tensor(0))
        assert [f"{word:08x}" for word in words.tolist()] == [
            "6627e8d5",
            "e169c58d",
            "bc57ac4c",
            "9b00dbd8",
        ]

    def test_recorded_answers(self):
        """What a seed means must not change from one version to the next."""
        key = random.key(2**63 + 5)
        assert random.split(key, 2).tolist() == RECORDED["split"]
        assert random.randint(key, (3,), -100, 100).tolist() == RECORDED["randint"]
        assert random.permutation(key, 6).tolist() == RECORDED["permutation"]
        torch.testing.assert_close(
            random.normal(key, (3,), dtype=torch.float64).tolist(),
            RECORDED["normal"],
            rtol=1e-12,
            atol=0,
        )

    @pytest.mark.skipif(not random.NATIVE, reason="torch has no Philox operators")
    @given(SEEDS, st.integers(0, 2**64 - 1), SHAPES, DTYPES)
    def test_native_and_pure_give_the_same_bits(self, seed, offset, shape, dtype):
        key = torch.tensor([[seed, offset], [offset, seed]], dtype=torch.uint64)
        native, pure = random._uniform, random._pure_uniform
        assert torch.equal(
            native(key, list(shape), -0.3, 1.7, dtype), pure(key, list(shape), -0.3, 1.7, dtype)
        )
        for low, high in [(0, 1), (-5, 9), (-(2**62), 2**62 - 1), (0, 2**63 - 1)]:
            assert torch.equal(
                random._randint(key, list(shape), low, high),
                random._pure_randint(key, list(shape), low, high),
            )
        count = math.prod(shape)
        assert torch.equal(random._words(key, count), random._pure_bits(key, count))
        indices = torch.arange(3)
        assert torch.equal(random._split(key, 3), random._pure_keys(key.unsqueeze(-2), indices))
        data = random.randint(random.key(1), (), 0, 2**62)
        assert torch.equal(random._fold_in(key, data), random._pure_keys(key, data))

    @pytest.mark.skipif(not random.NATIVE, reason="torch has no Philox operators")
    @given(SEEDS, SHAPES)
    def test_agrees_with_torch(self, seed, shape):
        from torch.func import _random as reference

        key = random.key(seed)
        assert torch.equal(key, reference.key(seed))
        assert torch.equal(random.split(key, 5), reference.split(key, 5))
        assert torch.equal(random.fold_in(key, 2**40), reference.fold_in(key, 2**40))
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            assert torch.equal(
                random.uniform(key, shape, -1.0, 3.0, dtype),
                reference.uniform(key, *shape, low=-1.0, high=3.0, dtype=dtype),
            )
        assert torch.equal(
            random.randint(key, shape, -4, 90),
            reference.randint(key, *shape, low=-4, high=90, dtype=torch.int64),
        )
        torch.testing.assert_close(
            random.normal(key, shape), reference.normal(key, *shape), rtol=1e-6, atol=1e-6
        )


RECORDED: dict[str, list] = {
    "split": [
        [204203713156361233, 8711661285036705915],
        [12845810772338177734, 13319006282185206869],
    ],
    "randint": [53, -20, -86],
    "permutation": [3, 0, 5, 1, 2, 4],
    "normal": [-0.060039691062803956, 0.23634513262356532, -1.389014805374204],
}


class TestKeys:
    @given(SEEDS, st.integers(1, 20))
    def test_split_keys_differ(self, seed, n):
        derived = random.split(random.key(seed), n).tolist()
        assert len({tuple(key) for key in [*derived, [seed, 0]]}) == n + 1

    @given(SEEDS, st.integers(0, 50))
    def test_fold_in_is_one_of_split(self, seed, index):
        key = random.key(seed)
        assert torch.equal(random.fold_in(key, index), random.split(key, index + 1)[index])
        assert torch.equal(random.fold_in(key, index), random.fold_in(key, torch.tensor(index)))

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.uint64])
    def test_fold_in_of_any_integer_dtype(self, dtype):
        key = random.key(1)
        data = torch.tensor(9, dtype=dtype)
        assert torch.equal(random.fold_in(key, data), random.fold_in(key, 9))

    def test_fold_in_is_modulo_two_to_the_64(self):
        key = random.key(1)
        assert torch.equal(random.fold_in(key, -1), random.fold_in(key, 2**64 - 1))
        assert not torch.equal(random.fold_in(key, -1), random.fold_in(key, 2**63 - 1))

    @pytest.mark.parametrize("data", [2**64, -(2**63) - 1])
    def test_fold_in_refuses_what_does_not_fit(self, data):
        with pytest.raises(ValueError, match="data: expected an integer in"):
            random.fold_in(random.key(0), data)

    @pytest.mark.parametrize("data", [torch.tensor(1.0), torch.tensor([1])])
    def test_fold_in_refuses_other_tensors(self, data):
        with pytest.raises(ValueError, match="data: expected an integer tensor"):
            random.fold_in(random.key(0), data)

    def test_seed(self):
        assert torch.equal(random.key(-1), random.key(2**64 - 1))
        for seed in (1.0, True, "1"):
            with pytest.raises(TypeError, match=r"seed"):
                random.key(seed)


class TestEveryFunction:
    def test_same_key_same_numbers(self, draw):
        first, again, other = draw(random.key(5)), draw(random.key(5)), draw(random.key(6))
        assert torch.equal(first, again)
        assert first.numel() == 0 or first.ndim == 0 or not torch.equal(first, other)

    @pytest.mark.parametrize("in_dim", [0, 1, -1])
    def test_vmap_draws_what_each_draws_alone(self, draw, in_dim):
        several = keys(4)
        mapped = vmap(draw, in_dims=in_dim)(several.movedim(0, in_dim))
        assert torch.equal(mapped, torch.stack([draw(key) for key in several]))

    def test_nested_vmap(self, draw):
        several = keys(6).reshape(2, 3, 2)
        expected = torch.stack([torch.stack([draw(key) for key in row]) for row in several])
        assert torch.equal(vmap(vmap(draw))(several), expected)
        assert torch.equal(vmap(vmap(draw, 1), 1)(several.movedim(-1, 0)), expected)

    def test_one_key_for_all_members(self, draw):
        key = random.key(3)
        mapped = vmap(lambda x: (x, draw(key)), out_dims=(0, None))(torch.ones(2))[1]
        assert torch.equal(mapped, draw(key))

    def test_traced(self, draw):
        traced = make_fx(draw, tracing_mode="fake")(random.key(1))
        assert torch.equal(traced(random.key(2)), draw(random.key(2)))
        traced = make_fx(vmap(draw), tracing_mode="fake")(keys(3))
        assert torch.equal(traced(keys(3, seed=1)), vmap(draw)(keys(3, seed=1)))

    @pytest.mark.dynamo
    def test_compiled(self, draw):
        torch.compiler.reset()
        compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(random.key(2)), draw(random.key(2)))

    def test_meta(self, draw):
        there = draw(random.key(1, device="meta"))
        here = draw(random.key(1))
        assert (there.shape, there.dtype) == (here.shape, here.dtype)

    @pytest.mark.parametrize("level", ["key", "data", "both", "crossed", "crossed back"])
    def test_vmap_of_fold_in(self, level):
        several, data = keys(3), torch.tensor([5, -1, 2**40])
        if level == "key":
            got, pairs = vmap(random.fold_in, (0, None))(several, data[0]), None
            pairs = [(key, data[0]) for key in several]
        elif level == "data":
            got = vmap(random.fold_in, (None, 0))(several[0], data)
            pairs = [(several[0], d) for d in data]
        elif level == "both":
            got = vmap(random.fold_in)(several, data)
            pairs = list(zip(several, data, strict=True))
        elif level == "crossed":
            inner = vmap(random.fold_in, (None, 0))
            got = vmap(inner, (0, None))(several, data[:2]).flatten(0, 1)
            pairs = list(itertools.product(several, data[:2]))
        else:
            inner = vmap(random.fold_in, (0, None))
            got = vmap(inner, (None, 0))(several, data[:2]).flatten(0, 1)
            pairs = [(key, d) for d in data[:2] for key in several]
        assert torch.equal(got, torch.stack([random.fold_in(*pair) for pair in pairs]))


class TestTransforms:
    @staticmethod
    def loss(weight, key):
        noise = random.normal(random.fold_in(key, 1), (3,), dtype=torch.float64)
        keep = random.bernoulli(key, (3,), weight.detach().sigmoid())
        return (weight * noise * keep).sum()

    def test_grad(self):
        weight, key = torch.tensor(0.5, dtype=torch.float64), random.key(4)
        slope = self.loss(weight, key) / weight
        assert torch.allclose(grad(self.loss)(weight, key), slope)
        tangent = jvp(lambda w: self.loss(w, key), (weight,), (torch.ones_like(weight),))[1]
        assert torch.allclose(tangent, slope)

    def test_grad_and_vmap(self):
        weights, several = torch.linspace(0.5, 1, 3, dtype=torch.float64), keys(3)
        slopes = torch.stack(
            [grad(self.loss)(*pair) for pair in zip(weights, several, strict=True)]
        )
        assert torch.allclose(vmap(grad(self.loss))(weights, several), slopes)
        total = grad(lambda w: vmap(self.loss)(w, several).sum())(weights)
        assert torch.allclose(total, slopes)

    def test_the_key_has_no_gradient(self):
        with pytest.raises(Exception, match=r"[Ff]loat"):
            grad(lambda key: random.normal(key))(random.key(0))


N = 20_000
SIGNIFICANT = 1e-4  # the draws are always the same, so a pass stays a pass


def fits(sample, distribution, *arguments):
    return stats.kstest(sample.double().numpy(), distribution, args=arguments).pvalue > SIGNIFICANT


def evenly(counts, probabilities=None):
    expected = None if probabilities is None else [p * sum(counts) for p in probabilities]
    return stats.chisquare(counts, expected).pvalue > SIGNIFICANT


class TestDistributions:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_uniform(self, dtype):
        assert fits(random.uniform(random.key(1), (N,), -2.0, 3.0, dtype), "uniform", -2, 5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_normal(self, dtype):
        sample = random.normal(random.key(2), (N,), 3.0, 0.5, dtype)
        assert fits(sample, "norm", 3, 0.5)
        # Both halves of a pair of Box and Muller, and the pair as independent coordinates.
        assert fits(sample[0::2], "norm", 3, 0.5)
        assert stats.pearsonr(sample[0::2], sample[1::2]).pvalue > SIGNIFICANT
        assert stats.pearsonr(sample[0::2] ** 2, sample[1::2] ** 2).pvalue > SIGNIFICANT

    @pytest.mark.parametrize(
        ("lower", "upper"),
        [
            (-2.0, 2.0),
            (-0.1, 3.0),
            (1.0, math.inf),
            (-math.inf, -1.0),
            (-math.inf, math.inf),
            (5.0, math.inf),
            (8.0, 9.0),
            (-30.0, -29.0),
            (0.0, 1e-3),
        ],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_truncated_normal(self, lower, upper, dtype):
        key = random.key(3)
        sample = random.truncated_normal(key, (N,), lower, upper, dtype=dtype)
        assert sample.isfinite().all()
        assert sample.min() >= torch.tensor(lower, dtype=dtype)
        assert sample.max() <= torch.tensor(upper, dtype=dtype)
        assert fits(sample, "truncnorm", lower, upper)
        moved = random.truncated_normal(key, (N,), lower, upper, 4.0, 0.5, dtype)
        torch.testing.assert_close(moved, sample * 0.5 + 4)

    def test_gumbel(self):
        assert fits(random.gumbel(random.key(4), (N,)), "gumbel_r")

    def test_bernoulli(self):
        p = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])
        counts = random.bernoulli(random.key(5), (N, 5), p).sum(0).tolist()
        assert counts[0] == 0
        assert counts[4] == N
        for share, n in zip(p.tolist()[1:4], counts[1:4], strict=True):
            assert evenly([n, N - n], [share, 1 - share])
        assert random.bernoulli(random.key(5), (N,), 0.25).sum() == pytest.approx(N / 4, rel=0.05)

    @pytest.mark.parametrize(("low", "high"), [(0, 7), (-3, 10), (-(2**62), 2**62 - 1)])
    def test_randint(self, low, high):
        sample = random.randint(random.key(6), (N,), low, high)
        assert sample.min() >= low
        assert sample.max() < high
        bins = min(high - low, 16)
        width = (high - low) // bins
        assert evenly(torch.bincount((sample - low) // width, minlength=bins).tolist())

    def test_categorical(self):
        p = torch.tensor([0.5, 0.0, 0.2, 0.3])
        sample = random.categorical(random.key(7), (N,), p.log())
        counts = sample.bincount(minlength=4)
        assert counts[1] == 0
        assert evenly(counts[p > 0].tolist(), [0.5, 0.2, 0.3])
        rows = random.categorical(random.key(8), (N, 2), torch.stack([p.log(), p.flip(0).log()]))
        assert evenly(rows[:, 1].bincount(minlength=4)[[0, 1, 3]].tolist(), [0.3, 0.2, 0.5])

    def test_permutation(self):
        sample = vmap(lambda key: random.permutation(key, 4))(keys(6000))
        orders = dict.fromkeys(itertools.permutations(range(4)), 0)
        for row in sample.tolist():
            orders[tuple(row)] += 1
        assert evenly(list(orders.values()))

    def test_split_and_folded_keys_are_independent(self):
        for several in (
            keys(N, 9),
            vmap(lambda i: random.fold_in(random.key(9), i))(torch.arange(N)),
        ):
            first = vmap(lambda key: random.uniform(key, (2,)))(several)
            assert fits(first[:, 0], "uniform")
            assert stats.pearsonr(first[:-1, 0], first[1:, 0]).pvalue > SIGNIFICANT
            assert stats.pearsonr(first[:, 0], first[:, 1]).pvalue > SIGNIFICANT

    @given(SEEDS, st.integers(0, 30))
    def test_permutation_holds_every_number(self, seed, n):
        assert random.permutation(random.key(seed), n).sort().values.tolist() == list(range(n))

    @given(SEEDS, SHAPES, DTYPES)
    def test_shapes_and_dtypes(self, seed, shape, dtype):
        key = random.key(seed)
        for sample in (
            random.uniform(key, shape, dtype=dtype),
            random.normal(key, shape, dtype=dtype),
            random.truncated_normal(key, shape, dtype=dtype),
            random.gumbel(key, shape, dtype=dtype),
        ):
            assert (tuple(sample.shape), sample.dtype) == (shape, dtype)
            assert sample.isfinite().all()


class TestErrors:
    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda k: random.split(k, 0), "num: expected at least 1, got 0"),
            (lambda k: random.uniform(k, (-1,)), "shape: expected sizes of at least 0"),
            (lambda k: random.uniform(k, (2,), 1.0, 0.0), "uniform: expected low <= high"),
            (lambda k: random.uniform(k, (2,), -3e38, 3e38), "uniform: expected low <= high"),
            (lambda k: random.uniform(k, (2,), 0.0, math.inf), "both finite"),
            (lambda k: random.normal(k, (2,), std=-1.0), "normal: expected std >= 0"),
            (lambda k: random.normal(k, (2,), std=math.nan), "normal: expected std >= 0"),
            (lambda k: random.truncated_normal(k, (2,), 1.0, 1.0), "expected lower < upper"),
            (lambda k: random.truncated_normal(k, (2,), std=-1.0), "expected std >= 0"),
            (lambda k: random.truncated_normal(k, (2,), 50.0, 51.0), "rounds to 0"),
            (lambda k: random.truncated_normal(k, (2,), -math.inf, -50.0), "rounds to 0"),
            (lambda k: random.bernoulli(k, (2,), 1.5), "expected p between 0 and 1, got 1.5"),
            (lambda k: random.bernoulli(k, (2,), math.nan), "expected p between 0 and 1"),
            (lambda k: random.randint(k, (2,), 3, 3), "randint: expected low < high"),
            (lambda k: random.randint(k, (2,), 0, 300, torch.uint8), "does not fit"),
            (lambda k: random.randint(k, (2,), -1, 5, torch.uint8), "does not fit"),
            (lambda k: random.randint(k, (2,), -(2**63), 2**62), "does not fit"),
            (lambda k: random.permutation(k, -1), "permutation: expected n >= 0"),
            (lambda k: random.categorical(k, (3,), torch.zeros(2, 5)), r"got \[2, 5\]"),
            (lambda k: random.categorical(k, (2,), torch.zeros(2, 0)), r"got \[2, 0\]"),
        ],
    )
    def test_values(self, call, message):
        with pytest.raises(ValueError, match=message):
            call(random.key(0))

    @pytest.mark.parametrize(
        "call",
        [
            lambda k: random.uniform(k, (2,), dtype=torch.int64),
            lambda k: random.normal(k, (2,), dtype=torch.int64),
            lambda k: random.randint(k, (2,), 0, 2, torch.float32),
            lambda k: random.randint(k, (2,), 0, 2, torch.bool),
        ],
    )
    def test_dtypes(self, call):
        with pytest.raises(TypeError, match="expected"):
            call(random.key(0))

    # The checked signatures refuse these first, so this asks the function below them.
    @pytest.mark.parametrize(
        ("key", "error", "message"),
        [
            (3, TypeError, r"got int|Actual value: 3"),
            (torch.zeros(2), ValueError, r"expected uint64\[2\], got float32\[2\]"),
            (torch.zeros(2, dtype=torch.int64), ValueError, r"got int64\[2\]"),
            (torch.zeros(3, dtype=torch.uint64), ValueError, r"got uint64\[3\]"),
            (torch.zeros(4, 2, dtype=torch.uint64), ValueError, r"got uint64\[4, 2\].*vmap"),
        ],
    )
    def test_keys(self, key, error, message):
        with pytest.raises(error, match=message):
            random.check_key(key)

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch.func import grad, vmap
from trees import params, same, tensors

from funcnets import random, tree


def shifted(whole, by):
    return tree.map(lambda leaf: (leaf + by).to(leaf.dtype), whole)


@given(params())
def test_count(whole):
    assert tree.count(whole) == sum(leaf.numel() for leaf in tree.leaves(whole))


@given(params())
def test_global_norm(whole):
    floating = [leaf for leaf in tree.leaves(whole) if leaf.is_floating_point()]
    vector = torch.cat([leaf.double().flatten() for leaf in floating] or [torch.zeros(1).double()])
    norm = tree.global_norm(whole)
    torch.testing.assert_close(norm.double(), vector.norm(), rtol=1e-6, atol=0)
    wide = any(leaf.dtype == torch.float64 for leaf in floating)
    assert norm.dtype == (torch.float64 if wide else torch.float32)


def test_global_norm_at_the_edges():
    half = {"a": torch.full((1000,), 300.0, dtype=torch.float16)}
    assert tree.global_norm(half).item() == pytest.approx(300 * 1000**0.5)
    assert tree.global_norm({}).item() == 0
    assert grad(tree.global_norm)({"a": torch.zeros(2)})["a"].tolist() == [0, 0]


@given(params(), st.integers(1, 4))
def test_unstack_inverts_stack(whole, n):
    members = [shifted(whole, i) for i in range(n)]
    ensemble = tree.stack(members)
    assert ensemble.batch_size == (n,)
    assert all(same(a, b) for a, b in zip(tree.unstack(ensemble), members, strict=True))
    assert same(tree.stack(tree.unstack(ensemble)), ensemble)
    if all(leaf.ndim for leaf in tree.leaves(whole)):
        assert tree.stack([ensemble, ensemble]).batch_size == (2, n)


def test_stack_batches_nested_trees_and_dicts():
    member = {"a": TensorDict({"b": {"w": torch.ones(2, 3)}}, batch_size=[2]), "n": torch.tensor(1)}
    ensemble = tree.stack([member, member, member])
    assert ensemble["a"].batch_size == (3, 2)
    assert ensemble["a", "b"].batch_size == (3, 2) if "a.b" in ensemble else True
    assert ensemble["n"].tolist() == [1, 1, 1]
    assert same(tree.unstack(ensemble)[2], member)


def test_stack_is_what_vmap_makes():
    def init(key):
        return TensorDict({"fc": {"weight": random.normal(key, (2, 3)), "n": torch.tensor(0)}})

    keys = random.split(random.key(0), 3)
    assert same(tree.stack([init(key) for key in keys]), vmap(init)(keys))


def test_members_share_no_memory():
    ensemble = TensorDict({"w": torch.ones(2, 3)}, batch_size=[2])
    first, _ = tree.unstack(ensemble)
    first["w"].zero_()
    assert ensemble["w"].sum() == 6


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"a": {"w": torch.ones(3)}}, r"a\.w: expected float32\[2\], got float32\[3\]"),
        ({"a": {"w": torch.ones(2).double()}}, r"a\.w: expected float32\[2\], got float64\[2\]"),
        ({"a": {"v": torch.ones(2)}}, "a: expected the same names.*missing w, unexpected v"),
    ],
)
def test_trees_that_do_not_fit(other, message):
    first = TensorDict({"a": {"w": torch.ones(2)}})
    for function in (
        lambda: tree.stack([first, TensorDict(other)]),
        lambda: tree.lerp(first, TensorDict(other), 0.5),
    ):
        with pytest.raises(ValueError, match=message):
            function()


def test_no_ensemble():
    with pytest.raises(ValueError, match="at least one"):
        tree.stack([])
    with pytest.raises(TypeError, match="a: expected a tensor, got int"):
        tree.stack([{"a": 1}])
    with pytest.raises(ValueError, match=r"b: expected \[2, ...\], got \[3\]"):
        tree.unstack({"a": torch.ones(2), "b": torch.ones(3)})
    with pytest.raises(ValueError, match=r"b: expected \[2, ...\], got \[\]"):
        tree.unstack({"a": torch.ones(2), "b": torch.tensor(1)})
    with pytest.raises(ValueError, match=r"a: expected \[n, ...\], got \[\]"):
        tree.unstack({"a": torch.tensor(1)})
    with pytest.raises(ValueError, match="at least one leaf"):
        tree.unstack({})


@given(params(), st.floats(-1, 2))
def test_lerp(start, weight):
    end = shifted(start, 2)
    between = tree.lerp(start, end, weight)
    for (_, a), b, c in zip(
        tree.leaves_with_path(start), tree.leaves(end), tree.leaves(between), strict=True
    ):
        if a.is_floating_point():
            tolerance = {"rtol": 3e-2, "atol": 3e-2} if a.dtype == torch.bfloat16 else {}
            torch.testing.assert_close(c, a + weight * (b - a), **tolerance)
        else:
            assert c is b
    assert same(tree.lerp(start, end, torch.tensor(weight, dtype=torch.float64)), between)
    assert same(tree.lerp(start, end, 0.0), tree.map(keep_floating, start, end))
    assert same(tree.lerp(start, end, 1.0), end)


def keep_floating(a, b):
    return a if a.is_floating_point() else b


@given(params(tensors(dtype=st.just(torch.float64))), st.floats(0, 1))
def test_ema(average, decay):
    new = shifted(average, 1)
    expected = tree.map(lambda a, b: decay * a + (1 - decay) * b, average, new)
    result = tree.ema(average, new, decay)
    torch.testing.assert_close(tree.leaves(result), tree.leaves(expected))
    torch.testing.assert_close(
        tree.leaves(tree.ema(average, new, torch.tensor(decay))),
        tree.leaves(expected),
        rtol=1e-6,
        atol=1e-6,
    )


def test_one_rate_per_member():
    start = TensorDict({"w": torch.zeros(3, 2)}, batch_size=[3])
    end = TensorDict({"w": torch.ones(3, 2)}, batch_size=[3])
    rates = torch.tensor([0.0, 0.5, 1.0])
    assert vmap(tree.lerp)(start, end, rates)["w"].tolist() == [[0, 0], [0.5, 0.5], [1, 1]]
    norms = vmap(tree.global_norm)(TensorDict({"w": torch.diag(rates)}, batch_size=[3]))
    assert norms.tolist() == rates.tolist()
    slope = grad(lambda p: tree.global_norm(tree.ema(p, end, 0.5)))(end)
    assert slope["w"].allclose(torch.full((3, 2), 0.5 / 6**0.5))


@given(params(), st.sampled_from([torch.float32, torch.float16, torch.float64]))
def test_cast(whole, dtype):
    narrow = tree.cast(whole, dtype)
    assert narrow.batch_size == whole.batch_size
    for before, after in zip(tree.leaves(whole), tree.leaves(narrow), strict=True):
        assert after.dtype == (dtype if before.is_floating_point() else before.dtype)
        assert torch.equal(after, before.to(after.dtype))
    assert all(
        a is b for a, b in zip(tree.leaves(tree.cast(whole)), tree.leaves(whole), strict=True)
    )


def test_cast_to_a_device():
    moved = tree.cast({"key": random.key(0), "w": torch.ones(1)}, torch.float64, "meta")
    assert {(leaf.device.type, leaf.dtype) for leaf in tree.leaves(moved)} == {
        ("meta", torch.uint64),
        ("meta", torch.float64),
    }
    with pytest.raises(TypeError, match=r"floating-point dtype, got torch\.int64"):
        tree.cast({}, torch.int64)

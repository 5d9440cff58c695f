"""vmap in chunks is vmap, TensorDicts and empty ones included."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch.func import vmap

import funcnets
from funcnets import ensembles, random, tree
from funcnets.ensembles import chunks


class State(NamedTuple):
    params: TensorDict
    nothing: TensorDict
    rest: dict


def state(count):
    w = random.normal(random.key(0), (count, 3, count))
    inner = TensorDict({"w": w, "n": torch.arange(count)}, [count])
    params = TensorDict({"inner": inner}, [count])
    return State(params, TensorDict({}, [count]), {"step": torch.arange(count)})


def step(state, x, scale):
    inner = state.params["inner"]
    params = TensorDict({"inner": {"w": inner["w"] @ x * scale, "n": inner["n"] + 1}})
    return state._replace(params=params), {"loss": inner["w"].sum()}


@pytest.mark.parametrize("chunk", [2, "auto"])
def test_what_is_wrong_says_vmap(chunk):
    with pytest.raises(ValueError, match="in_dims"):
        ensembles.chunked(torch.add, chunk, (0,))(torch.ones(3), 1)
    with pytest.raises(ValueError, match=r"Got in_dim=0 for an input"):
        ensembles.chunked(torch.add, chunk, (0, 0))(torch.ones(3), 1)


@given(st.integers(1, 6), st.integers(1, 7))
def test_as_the_whole(count, chunk):
    x = random.normal(random.key(1), (count, 2))
    dims = (0, None, None)
    expected = vmap(step, dims)(state(count), x, 2.0)
    found = ensembles.chunked(step, chunk, dims)(state(count), x, 2.0)
    assert tree.flatten(found)[1] == tree.flatten(expected)[1]  # batch sizes are part of it
    for one, other in zip(tree.leaves(found), tree.leaves(expected), strict=True):
        torch.testing.assert_close(one, other)
    again = ensembles.chunked(step, chunk, dims)(found[0], torch.eye(2), 1.0)
    assert again[0].nothing.batch_size == (count,)


@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from([1, 2, 3, "auto"]))
def test_members_of_several_numbers_are_told_as_vmap_tells_them(first, second, chunk):
    x, y = torch.ones(first, 2), {"y": torch.ones(second)}
    add = ensembles.chunked(lambda x, tree: x + tree["y"], chunk)
    if first == second:
        assert add(x, y).shape == (first, 2)
    else:
        with pytest.raises(ValueError, match=f"sizes.*{first}.*{second}"):
            add(x, y)


@pytest.mark.parametrize(("cost", "fastest"), [(lambda n: n**2, 1), (lambda n: 20 / n, 20)])
def test_auto_takes_what_is_fastest_for_each_shape(cost, fastest, monkeypatch):
    sizes, clock = [], [0.0]
    monkeypatch.setattr(chunks, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def slow(x, y):  # its time depends on how many there are at once
        size = len(torch._C._functorch.get_unwrapped(x))
        sizes.append(size)
        clock[0] += cost(size)
        return {"sum": x.sum() + y}

    auto = ensembles.chunked(slow, "auto", (0, None))
    x = random.normal(random.key(0), (20, 3))
    for _ in range(2):
        torch.testing.assert_close(auto(x, 1.0), {"sum": x.sum(1) + 1.0})
    assert set(sizes) == {20, 5, 1}  # all were tried, once
    tried = len(sizes)
    auto(x, 2.0)
    assert set(sizes[tried:]) == {fastest}
    auto(x[:2], 1.0)
    assert 2 in sizes
    del sizes[:]
    auto_compiled = funcnets.compile(auto, backend="aot_eager", static=1)
    torch.testing.assert_close(auto_compiled(x, 1.0), {"sum": x.sum(1) + 1.0})
    assert sizes == [20]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=5))
def test_members(places):
    whole = state(4)
    for chosen in (places, torch.tensor(places)):
        found = ensembles.members(whole, chosen)
        assert found.params.batch_size == found.nothing.batch_size == (len(places),)
        expected = tree.stack([tree.unstack(whole)[place] for place in places])
        assert tree.flatten(found)[1] == tree.flatten(expected)[1]
        assert all(map(torch.equal, tree.leaves(found), tree.leaves(expected)))


def test_errors():
    with pytest.raises(ValueError, match="chunk: expected None, 'auto' or at least 1, got 0"):
        ensembles.chunked(step, 0)
    with pytest.raises(ValueError, match=r"in_dims: expected 0 or None for each, got \(1, None\)"):
        ensembles.chunked(step, 2, (1, None))

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch.func import grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from trees import params, same, tensors

from funcnets import tree

WHERE = st.sampled_from(
    [
        "*",
        "nothing",
        "*.weight",
        "layer1",
        ["fc.*", "*bias"],
        [],
        re.compile(r"(.*\.)?[01]"),
        lambda path, leaf: leaf.ndim > 1,
    ]
)


def names(params):
    return {tree.join(path) for path, _ in tree.leaves_with_path(params)}


def subtrees(params):
    held = tree.entries(params)
    if held is not None:
        yield params
        for child in held.values():
            yield from subtrees(child)


@given(params(), WHERE)
def test_partition_and_merge(whole, where):
    first, second = tree.partition(whole, where)
    matches = tree.matcher(where)
    chosen = {tree.join(p) for p, leaf in tree.leaves_with_path(whole) if matches(p, leaf)}
    assert names(first) == chosen
    assert names(second) == names(whole) - chosen
    for part in (first, second):
        assert all(tree.leaves(node) for node in subtrees(part) if node is not part)
    assert same(tree.merge(first, second), whole)
    assert same(tree.merge(second, first), whole)
    there = {id(leaf) for leaf in tree.leaves(whole)}
    assert {id(leaf) for leaf in tree.leaves(tree.merge(first, second))} == there


@given(params())
def test_partition_by_default_parts_off_the_buffers(whole):
    trainable, buffers = tree.partition(whole)
    assert names(buffers) == {
        tree.join(path)
        for path, leaf in tree.leaves_with_path(whole)
        if path[-1].startswith("running_") or not leaf.is_floating_point()
    }
    assert same(tree.merge(trainable, buffers), whole)


@given(params(), WHERE, WHERE)
def test_three_parts(whole, first, second):
    a, rest = tree.partition(whole, first)
    b, c = tree.partition(rest, second)
    assert same(tree.merge(c, a, b), whole)


def test_nothing_is_changed():
    whole = TensorDict({"a": {"weight": torch.ones(1), "running_mean": torch.ones(1)}})
    trainable, buffers = tree.partition(whole)
    trainable["a", "new"] = torch.ones(1)
    merged = tree.merge(*tree.partition(whole))
    merged["a", "other"] = torch.ones(1)
    del merged["a", "weight"]
    assert names(whole) == {"a.weight", "a.running_mean"}
    assert names(buffers) == {"a.running_mean"}


def test_a_model_without_buffers():
    whole = TensorDict({"fc": {"weight": torch.ones(2)}}, batch_size=[2])
    trainable, buffers = tree.partition(whole)
    assert buffers.is_empty()
    assert same(tree.merge(trainable, buffers), whole)
    assert same(tree.merge(trainable, TensorDict({})), whole)
    assert same(tree.merge(TensorDict({}), trainable), whole)


def test_subtrees_without_leaves_stay():
    whole = TensorDict({"relu": {}, "fc": {"weight": torch.ones(2)}})
    assert same(tree.merge(*tree.partition(whole)), whole)
    assert same(tree.merge(*tree.partition(whole, "nothing")), whole)


def test_plain_dicts_and_networks_side_by_side():
    pair = {"one": TensorDict({"w": torch.ones(2)}, batch_size=[2]), "two": {"w": torch.ones(1)}}
    one, two = tree.partition(pair, "one")
    assert list(one) == ["one"]
    assert isinstance(one["one"], TensorDict)
    assert one["one"].batch_size == (2,)
    assert same(tree.merge(one, two), pair)


def test_batch_sizes():
    eight, none = TensorDict({"a": torch.ones(8, 2)}, [8]), TensorDict({"b": torch.ones(2)})
    assert tree.merge(eight, none).batch_size == ()
    assert tree.merge(eight, TensorDict({"b": torch.ones(8, 3)}, [8, 3])).batch_size == (8,)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"a": {"w": torch.ones(2)}}, {"a": {"w": torch.ones(3)}}, r"a\.w: .*float32\[2\].*\[3\]"),
        ({"a": {"w": torch.ones(2)}}, {"a": torch.ones(3)}, "a: expected it in one"),
        ({"a": torch.ones(2)}, {"a": {"w": torch.ones(3)}}, "a: expected it in one"),
    ],
)
def test_merging_two_leaves_at_one_place(first, second, message):
    with pytest.raises(ValueError, match=message):
        tree.merge(TensorDict(first), TensorDict(second))


def test_other_arguments():
    with pytest.raises(TypeError, match=r"partition: .* got float32\[1\]"):
        tree.partition(torch.ones(1))
    with pytest.raises(TypeError, match=r"merge: .* got float32\[1\]"):
        tree.merge(TensorDict({}), torch.ones(1))
    with pytest.raises(TypeError, match="at least one"):
        tree.merge()
    with pytest.raises(TypeError, match="a: expected a TensorDict, got list"):
        tree.partition({"a": [torch.ones(1)]})
    for where in (3, [3]):
        with pytest.raises(TypeError, match=r"where|Type-check"):
            tree.matcher(where)


@pytest.mark.parametrize(
    ("where", "path", "expected"),
    [
        ("layer1.*", "layer1.0.weight", True),
        ("layer1", "layer1.0.weight", True),
        ("layer1", "layer10.weight", False),
        ("layer?.bn*", "layer1.bn2.bias", True),
        ("*.bias", "bias", False),
        ("*bias", "bias", True),
        ("FC.*", "fc.weight", False),
        ("a.[0-3].w", "a.2.w", True),
        (["x", "fc"], "fc.weight", True),
        ([], "fc.weight", False),
        (re.compile("fc"), "fc.weight", False),
        (re.compile(r"fc\..*"), "fc.weight", True),
        (lambda path, leaf: path[0] == "fc", "fc.weight", True),
    ],
)
def test_matcher(where, path, expected):
    assert tree.matcher(where)(tuple(path.split(".")), torch.ones(1)) is expected


FLOATS = params(tensors(st.just((3, 2)), st.just(torch.float32)))


@given(FLOATS)
def test_under_transforms(whole):
    def loss(trainable, rest):
        merged = tree.merge(trainable, rest)
        return sum((leaf**2).sum() for leaf in tree.leaves(merged))

    first, second = tree.partition(whole, ["*weight", "fc"])
    if tree.leaves(first):
        slope = tree.map(lambda leaf: 2 * leaf, first)
        assert same(grad(loss)(first, second), slope)

        ensemble = TensorDict(whole.to_dict(), batch_size=[3])
        mapped = vmap(lambda p: grad(loss)(*tree.partition(p, ["*weight", "fc"])))(ensemble)
        assert same(mapped, TensorDict(slope.to_dict(), batch_size=[3]))


def test_traced():
    whole = TensorDict({"bn": {"weight": torch.ones(2), "running_mean": torch.zeros(2)}})
    leaves, structure = tree.flatten(whole)

    def step(*leaves):
        trainable, buffers = tree.partition(tree.unflatten(structure, list(leaves)))
        return tree.leaves(tree.merge(tree.map(lambda leaf: leaf + 1, trainable), buffers))

    traced = make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(*leaves)
    assert [leaf.tolist() for leaf in traced(*leaves)] == [[2, 2], [0, 0]]


@pytest.mark.dynamo
def test_compiled():
    whole = TensorDict({"bn": {"weight": torch.ones(2), "running_mean": torch.zeros(2)}})

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(params):
        trainable, buffers = tree.partition(params)
        return tree.merge(tree.map(lambda leaf: leaf + 1, trainable), buffers)

    assert step(whole)["bn", "weight"].tolist() == [2, 2]

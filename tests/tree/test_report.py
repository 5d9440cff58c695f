import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch.func import vmap
from trees import nested, params

from funcnets import tree


def expected():
    return TensorDict(
        {
            "layer1": {"0": {"conv1": {"weight": torch.ones(4, 3, 7, 7)}}},
            "fc1": {"weight": torch.ones(5, 2), "bias": torch.ones(5)},
            "fc2": {"weight": torch.ones(10, 5), "bias": torch.ones(10)},
            "scale": torch.ones(()),
        }
    )


def changed(**changes):
    params = expected()
    for name, value in changes.items():
        path = tuple(name.split("__"))
        if value is None:
            del params[path]
        else:
            params[path] = value
    return params


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        (
            {"layer1__0__conv1__weight": torch.ones(4, 1, 7, 7)},
            ["layer1.0.conv1.weight: expected [4, 3, 7, 7], got [4, 1, 7, 7]"],
        ),
        ({"fc2": None}, ["fc2: missing; expected weight [10, 5], bias [10]"]),
        ({"fc1__bias": None}, ["fc1.bias: missing; expected [5]"]),
        ({"layer1": None}, ["layer1: missing; expected 0.conv1.weight [4, 3, 7, 7]"]),
        (
            {"fc3": TensorDict({"weight": torch.ones(1)}), "fc1__scale": torch.ones(())},
            ["fc1.scale: unexpected; got []", "fc3: unexpected; got weight [1]"],
        ),
        ({"fc2": torch.ones(3)}, ["fc2: expected weight [10, 5], bias [10], got [3]"]),
        (
            {"scale": TensorDict({"a": torch.ones(3)})},
            ["scale: expected [], got a [3]"],
        ),
        ({"scale": TensorDict({})}, ["scale: expected [], got a subtree without leaves"]),
    ],
)
def test_each_difference_in_words(changes, lines):
    params = changed(**changes)
    assert list(tree.compare(params, expected()).lines) == lines
    with pytest.raises(ValueError) as caught:
        tree.check(params, expected())
    assert str(caught.value).splitlines() == lines


def test_names_of_the_differences():
    params = changed(fc2=None, fc1__bias=torch.ones(4), fc3=TensorDict({"weight": torch.ones(1)}))
    report = tree.compare(params, expected())
    assert report
    assert report.missing == ("fc2.weight", "fc2.bias")
    assert report.unexpected == ("fc3.weight",)
    assert report.mismatched == ("fc1.bias",)


def test_dtypes_only_where_asked():
    narrow = tree.cast(expected(), torch.bfloat16)
    tree.check(narrow, expected())
    with pytest.raises(ValueError, match=r"fc1\.bias: expected float32\[5\], got bfloat16\[5\]"):
        tree.check(narrow, expected(), dtype=True)


def test_long_reports_are_cut():
    many = TensorDict({str(i): torch.ones(1) for i in range(30)})
    lines = str(tree.compare(TensorDict({}), many)).splitlines()
    assert len(lines) == 21
    assert lines[-1] == "... and 10 more"
    with pytest.raises(ValueError, match=r"a: missing; expected 0 .*, 3 .* and 26 more"):
        tree.check(TensorDict({}), TensorDict({"a": many}))


@given(params(), nested())
def test_no_difference_means_the_same_names_and_shapes(whole, other):
    def shapes(params):
        return {path: leaf.shape for path, leaf in tree.leaves_with_path(params)}

    assert not tree.compare(whole, whole)
    assert not tree.compare(whole, tree.specs(whole))
    report = tree.compare(whole, other)
    assert bool(report) == (shapes(whole) != shapes(other))
    assert bool(report) == bool(tree.compare(other, whole))


def test_subtrees_without_leaves_are_no_difference():
    assert not tree.compare(TensorDict({"relu": {}}), TensorDict({"gelu": {"a": {}}}))


def test_under_vmap():
    ensemble = TensorDict({"w": torch.ones(3, 2)}, batch_size=[3])

    def member(params):
        tree.check(params, {"w": torch.ones(2)})
        return params["w"]

    assert vmap(member)(ensemble).shape == (3, 2)


@given(params(min_size=0))
def test_summary(whole):
    lines = tree.summary(whole).splitlines()
    assert len(lines) == len(tree.leaves(whole)) + 2
    assert len({len(line) for line in lines[:-1]}) == 1
    assert lines[-1].startswith(f"trainable {tree.count(tree.partition(whole)[0]):,}, ")
    for line, (path, leaf) in zip(lines[1:], tree.leaves_with_path(whole), strict=False):
        assert line.split()[0] == tree.join(path)
        assert str(list(leaf.shape)) in line
        assert int(line.split()[-1].replace(",", "")) == leaf.numel()


@given(st.integers(1, 5))
def test_summary_of_an_ensemble(n):
    member = TensorDict({"bn": {"weight": torch.ones(250, 2), "running_mean": torch.ones(2)}})
    assert tree.summary(tree.stack([member] * n)).splitlines() == [
        "name             shape     dtype    count",
        "bn.weight        [250, 2]  float32    500",
        "bn.running_mean  [2]       float32      2",
        f"trainable 500, buffers 2 in each member of an ensemble of [{n}], {2.008 * n:.3g} kB",
    ]

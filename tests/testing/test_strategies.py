"""What the strategies draw, and that it reaches what it should."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, find, given, settings
from tensordict import TensorDict

from funcnets import models, random, testing, tree
from funcnets.testing import strategies as own

MODEL = models.mlp(3, 2, (4,), norm="batch")


def finds(strategy, wanted):
    return find(
        strategy,
        wanted,
        settings=settings(max_examples=500, database=None, phases=[Phase.generate]),
    )


@given(own.tensors(extreme=True, dtype=own.dtypes()))
def test_extreme_values_are_finite(x):
    assert x.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_extreme_values_are_reached(dtype):
    info = torch.finfo(dtype)
    for limit in (info.max, info.min, info.tiny):
        finds(own.tensors((3,), dtype, extreme=True), lambda x, v=limit: (x == v).any())


@given(own.trees())
def test_trees_are_nested_tensordicts_with_leaves(params):
    assert isinstance(params, TensorDict)
    assert all(isinstance(leaf, torch.Tensor) for leaf in tree.leaves(params))
    assert tree.leaves(params)


def test_trees_reach_depth_and_dtypes():
    finds(own.trees(), lambda t: any(len(path) > 2 for path, _ in tree.leaves_with_path(t)))
    for dtype in (torch.int64, torch.bool, torch.bfloat16):
        finds(own.trees(), lambda t, d=dtype: any(x.dtype == d for x in tree.leaves(t)))


@pytest.mark.parametrize("kind", [list, tuple, dict, TensorDict])
def test_operands_reach_every_kind_of_node(kind):
    found = finds(own.operands(), lambda value: isinstance(value, kind))
    assert tree.leaves(found)


@given(own.parameters(MODEL, extreme=True))
def test_parameters_fit_their_model(params):
    expected = MODEL.init(random.key(0))
    assert not tree.compare(params, expected, dtype=True)
    assert (params["1", "running_var"] >= 0).all()
    assert MODEL.apply(params, torch.ones(2, 3)).shape == (2, 2)


def test_parameters_reach_the_largest_values():
    limit = torch.finfo(torch.float32).max
    finds(
        own.parameters(MODEL, extreme=True),
        lambda p: any((x == limit).any() for x in tree.leaves(p)),
    )


@given(
    own.batches(
        (
            testing.floats("batch time 3"),
            {"mask": testing.booleans("batch time"), "ends": testing.lengths("batch", of="time")},
        ),
        {"time": (2, 6)},
        torch.float64,
    )
)
def test_batches_agree_in_their_axes(inputs):
    x, named = inputs
    assert x.dtype == torch.float64
    assert x.shape[2] == 3
    assert x.shape[:2] == named["mask"].shape
    assert named["ends"].shape == x.shape[:1]
    assert 2 <= x.shape[1] <= 6
    assert (named["ends"] >= 1).all()
    assert (named["ends"] <= x.shape[1]).all()


@given(own.samples(MODEL, testing.floats("batch 3"), values=("normal", "large")), own.devices())
def test_samples_run(sample, device):
    outputs, buffers = MODEL.apply(sample.params, *sample.inputs, train=True, key=sample.key)
    assert outputs.shape == (sample.sizes["batch"], 2)
    assert tree.leaves(buffers)[0].device == device or device.type == "cuda"

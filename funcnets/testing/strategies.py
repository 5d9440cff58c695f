"""Hypothesis strategies for property tests of one's own: keys, trees, models, inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from tensordict import TensorDict
from torch import Tensor

from funcnets import random, tree
from funcnets.testing.declared import axes_of, declare
from funcnets.testing.declared import draw as draw_declared
from funcnets.testing.families import invalid_options, models
from funcnets.testing.subject import Sample, Subject

__all__ = [
    "batches",
    "devices",
    "dtypes",
    "invalid_options",
    "keys",
    "models",
    "nested",
    "operands",
    "parameters",
    "samples",
    "shapes",
    "tensors",
    "trees",
]
NAMES = ("weight", "bias", "running_mean", "running_var", "0", "1", "conv1", "layer1", "fc")


def keys() -> SearchStrategy[random.Key]:
    """Keys of `funcnets.random`."""
    return st.integers(0, 2**32 - 1).map(random.key)


def dtypes(*, floating: bool = True) -> SearchStrategy[torch.dtype]:
    """Dtypes of parameters; with ``floating=False`` those of whole numbers and of masks as well."""
    found = [torch.float32, torch.float64, torch.bfloat16]
    return st.sampled_from(found if floating else [*found, torch.int64, torch.bool])


def devices() -> SearchStrategy[torch.device]:
    """The CPU, and the GPU where there is one."""
    names = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return st.sampled_from(names).map(torch.device)


def shapes(max_dims: int = 3, max_size: int = 3, min_size: int = 0) -> SearchStrategy[Any]:
    """Shapes, scalars and (where ``min_size`` is 0) empty ones among them."""
    return st.lists(st.integers(min_size, max_size), max_size=max_dims).map(tuple)


@st.composite
def tensors(draw: Any, shape: Any = None, dtype: Any = None, *, extreme: bool = False) -> Tensor:
    """Tensors of drawn values, all finite.

    Args:
        shape: a shape or a strategy of shapes; by default `shapes`.
        dtype: a dtype or a strategy of dtypes; by default floating ones, whole numbers and masks.
        extreme: whether there are the largest and smallest values and zeros of both signs in it.
    """
    shape = _drawn(draw, shapes() if shape is None else shape)
    dtype = _drawn(draw, dtypes(floating=False) if dtype is None else dtype)
    key = draw(keys())
    values = random.normal(key, shape, 0.0, 3.0, torch.float64)
    if not dtype.is_floating_point:
        return values > 0 if dtype == torch.bool else values.to(dtype)
    values = values.to(dtype)
    if not extreme:
        return values
    info = torch.finfo(dtype)
    limits = [info.max, info.min, info.tiny, -info.tiny, info.eps, 0.0, -0.0, 1.0]
    chosen = random.randint(random.fold_in(key, 1), shape, 0, 2 * len(limits))
    special = torch.tensor(limits, dtype=dtype)[chosen.clamp(max=len(limits) - 1)]
    return torch.where(chosen < len(limits), special, values)


def nested(leaves: SearchStrategy[Any] | None = None, min_size: int = 1) -> SearchStrategy[Any]:
    """Nested dicts with the names that networks have, without empty ones below the root.

    Args:
        leaves: what they hold; by default `tensors`.
        min_size: the least number of names at the root.
    """
    names = st.sampled_from(NAMES)
    inner = st.recursive(
        tensors() if leaves is None else leaves,
        lambda inner: st.dictionaries(names, inner, min_size=1, max_size=3),
        max_leaves=8,
    )
    return st.dictionaries(names, inner, min_size=min_size, max_size=4)


def trees(leaves: SearchStrategy[Any] | None = None, min_size: int = 1) -> SearchStrategy[Any]:
    """As `nested`, as TensorDicts: parameter trees."""
    return nested(leaves, min_size).map(TensorDict)


def operands(leaves: SearchStrategy[Any] | None = None) -> SearchStrategy[Any]:
    """Pytrees as control flow takes them: tensors in tuples, lists, dicts and TensorDicts."""
    leaves = tensors(dtype=torch.float64) if leaves is None else leaves

    def below(inner: SearchStrategy[Any]) -> SearchStrategy[Any]:
        return st.one_of(
            st.lists(inner, min_size=1, max_size=3),
            st.lists(inner, min_size=1, max_size=3).map(tuple),
            st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=3),
            trees(leaves),
        )

    return st.recursive(leaves, below, max_leaves=5)


@st.composite
def samples(
    draw: Any, model: Any, inputs: Any, *, values: tuple[str, ...] = ("normal",), **options: Any
) -> Sample:
    """Parameters, inputs and a key for a model: what the invariants are tried on.

    Args:
        model: as for `check_model`.
        inputs: as there.
        values: the kinds of inputs: "normal", "zeros", "equal", "large", "shifted".
        options: as there.
    """
    subject = model if isinstance(model, Subject) else Subject(model, inputs, **options)
    sizes = {name: draw(st.integers(low, high)) for name, (low, high) in subject.axes.items()}
    return subject.sample(draw(st.integers(0, 999)), draw(st.sampled_from(values)), sizes)


@st.composite
def parameters(
    draw: Any,
    init: Any,
    *,
    dtype: torch.dtype = torch.float32,
    perturb: float = 0.3,
    extreme: bool = False,
) -> Any:
    """Parameters of a model, moved away from where they begin.

    Args:
        init: ``init(key)``, or what has such an ``init``.
        dtype: of the floating ones.
        perturb: how far they are moved, in units of a standard normal.
        extreme: whether one of them has the largest and smallest values instead.
    """
    init = getattr(init, "init", init)
    params = tree.cast(init(draw(keys())), dtype)
    found = tree.leaves_with_path(params)
    key = draw(keys())
    wild = draw(st.sampled_from([path for path, _ in found])) if extreme and found else None
    strange = draw(tensors(tuple(dict(found)[wild].shape), dtype, extreme=True)) if wild else None

    def one(path: tuple[str, ...], leaf: Tensor) -> Tensor:
        if path == wild and strange is not None and leaf.is_floating_point():
            return strange.abs() if path[-1] == "running_var" else strange
        if not leaf.is_floating_point():
            return leaf
        place = random.fold_in(key, [p for p, _ in found].index(path))
        noise = perturb * random.normal(place, leaf.shape, dtype=torch.float64).to(dtype)
        return leaf + (noise.abs() if path[-1] == "running_var" else noise)

    return tree.map_with_path(one, params)


@st.composite
def batches(
    draw: Any,
    inputs: Any,
    axes: Mapping[str, int | tuple[int, int]] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Inputs as they are declared, with sizes of the named axes that agree.

    Args:
        inputs: a declaration (`floats`, `integers`, ...), or a nest of them.
        axes: sizes of the named axes: a number, or the least and the largest.
        dtype: of the floating ones.
    """
    declared = declare(inputs)
    found = axes_of(declared, axes)
    sizes = {name: draw(st.integers(low, high)) for name, (low, high) in found.items()}
    values = draw(st.sampled_from(["normal", "zeros", "equal"]))
    return draw_declared(declared, draw(keys()), sizes, values, dtype)


def _drawn(draw: Any, value: Any) -> Any:
    return draw(value) if isinstance(value, SearchStrategy) else value

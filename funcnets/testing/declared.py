"""What a model is called with and what it returns: shapes by named axes, and values to draw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from funcnets import random, tree

Kind = Literal["floats", "integers", "booleans", "lengths"]

# Sizes that a named axis is drawn from where nothing else is said.
BATCH, SIZES = (2, 4), (1, 5)


@dataclass(frozen=True)
class Declared:
    """One tensor: its kind and its axes, which are numbers or names.

    A name has one size wherever it stands. The axis named ``batch`` is that of the samples. A name
    may have its size in ``given``: an axis that has this size here, and could have another.
    """

    kind: Kind
    axes: tuple[int | str, ...]
    low: float | None = None
    high: float | None = None
    of: str | None = None
    given: tuple[tuple[str, int], ...] = ()

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape for given sizes of the named axes."""
        return tuple(axis if isinstance(axis, int) else sizes[axis] for axis in self.axes)

    def draw(
        self, key: random.Key, sizes: Mapping[str, int], values: str, dtype: torch.dtype
    ) -> Tensor:
        """A tensor; ``values`` is "normal", "zeros", "equal", "large" or "shifted"."""
        shape = self.shape(sizes)
        if self.kind == "integers":
            return random.randint(key, shape, int(self.low or 0), int(self.high or 2))
        if self.kind == "booleans":
            return random.bernoulli(key, shape)
        if self.kind == "lengths":
            return random.randint(key, shape, 1, sizes[str(self.of)] + 1)
        if self.low is not None and self.high is not None:
            return random.uniform(key, shape, self.low, self.high, dtype=dtype)
        if values == "zeros":
            return torch.zeros(shape, dtype=dtype)
        if values == "equal":
            return torch.ones(shape, dtype=dtype)
        drawn = random.normal(key, shape, dtype=dtype)
        return {"large": 100 * drawn, "shifted": 1000 + drawn}.get(values, drawn)


def floats(axes: str, low: float | None = None, high: float | None = None) -> Declared:
    """Real numbers: normally distributed, or uniform between two bounds.

    Args:
        axes: sizes and names, apart by spaces: ``"batch 3 height width"``. A size without a name is
            one that the model insists on; ``height=8`` has the size 8, and might have another.
        low: the least value, if there is one.
        high: the largest one.

    >>> floats("batch 3").shape({"batch": 2})
    (2, 3)
    """
    if (low is None) != (high is None):
        raise ValueError(f"floats: expected both bounds or none, got {low} and {high}")
    return Declared("floats", names(axes), low, high, given=sizes(axes))


def integers(axes: str, high: int, low: int = 0) -> Declared:
    """Whole numbers from ``low`` to ``high - 1``, such as tokens and classes.

    >>> integers("batch time", 65).axes
    ('batch', 'time')
    """
    if high <= low:
        raise ValueError(f"integers: high: expected more than {low}, got {high}")
    return Declared("integers", names(axes), low, high, given=sizes(axes))


def booleans(axes: str) -> Declared:
    """True and False, as in a mask.

    >>> booleans("batch time").kind
    'booleans'
    """
    return Declared("booleans", names(axes), given=sizes(axes))


def lengths(axes: str, of: str) -> Declared:
    """Lengths along a named axis, from 1 to its size.

    >>> lengths("batch", of="time").of
    'time'
    """
    return Declared("lengths", names(axes), of=of, given=sizes(axes))


def declare(inputs: Any) -> Any:
    """The declaration of inputs, of which some or all may be tensors as examples.

    Tensors whose first axes agree are batches; their other axes keep their sizes, and their values
    the range that they have.

    >>> declare(torch.tensor([[0.0, 2.0]])).axes
    ('batch', 2)
    """
    examples = [leaf for leaf in tree.leaves(inputs) if isinstance(leaf, Tensor)]
    batched = len({leaf.shape[:1] for leaf in examples if leaf.ndim}) == 1 and all(
        leaf.ndim for leaf in examples
    )

    def one(path: tuple[str, ...], leaf: Any) -> Declared:
        if isinstance(leaf, Declared):
            return leaf
        if not isinstance(leaf, Tensor) or not leaf.numel():
            place = tree.join(path) if path else "inputs"
            raise TypeError(
                f"{place}: expected a tensor with elements, or floats, integers, booleans or "
                f"lengths of funcnets.testing, got {tree.describe(leaf)}"
            )
        axes = ("batch", *leaf.shape[1:]) if batched else tuple(leaf.shape)
        if leaf.dtype == torch.bool:
            return Declared("booleans", axes)
        low, high = leaf.min().item(), leaf.max().item()
        if leaf.is_floating_point():
            return Declared("floats", axes, low, high if high > low else low + 1)
        return Declared("integers", axes, low, high + 1)

    return tree.map_with_path(one, inputs)


def axes_of(
    declared: Any, given: Mapping[str, int | tuple[int, int]] | None = None
) -> dict[str, tuple[int, int]]:
    """The named axes, with the least and the largest size that they are drawn from.

    Args:
        declared: a nest of declarations.
        given: sizes that are wanted for some of them: a number, or the least and the largest.
    """
    found: dict[str, tuple[int, int]] = {}
    for leaf in tree.leaves(declared):
        for axis in (*leaf.axes, *([leaf.of] if leaf.of else [])):
            if isinstance(axis, str):
                found.setdefault(axis, BATCH if axis == "batch" else SIZES)
        found |= {name: (size, size) for name, size in leaf.given}
    for name, sizes in (given or {}).items():
        if name not in found:
            names = ", ".join(found) or "none"
            raise ValueError(f"axes: expected some of the named axes ({names}), got {name!r}")
        found[name] = (sizes, sizes) if isinstance(sizes, int) else (sizes[0], sizes[1])
    return found


def draw(
    declared: Any, key: random.Key, sizes: Mapping[str, int], values: str, dtype: torch.dtype
) -> Any:
    """Tensors for a nest of declarations."""
    leaves, structure = tree.flatten(declared)
    keys = random.split(key, max(len(leaves), 1)).unbind()
    drawn = [leaf.draw(k, sizes, values, dtype) for k, leaf in zip(keys, leaves, strict=False)]
    return tree.unflatten(structure, drawn)


def names(axes: str) -> tuple[int | str, ...]:
    """The axes of ``"batch 3 height=8"``: names, and sizes that have none."""
    parts = [part.partition("=") for part in axes.split()]
    for name, equals, size in parts:
        if not (name.isidentifier() or (name.isdigit() and not equals)) or (
            equals and not size.isdigit()
        ):
            raise ValueError(f"axes: expected names and sizes apart by spaces, got {axes!r}")
    return tuple(int(name) if name.isdigit() else name for name, _, _ in parts)


def sizes(axes: str) -> tuple[tuple[str, int], ...]:
    """The sizes that stand with their names."""
    parts = [part.partition("=") for part in axes.split()]
    return tuple((name, int(size)) for name, _, size in parts if size)

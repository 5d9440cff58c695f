"""Gaps filled and columns standardised by what the training samples say, and nothing else.

Each is a pair: ``fit_x`` looks at the training samples and returns a named tuple of tensors, and
``x`` applies it to any. ``where`` marks the training samples of a table, so that ``vmap`` over the
masks of several folds fits all of them.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from funcnets import _torch
from funcnets.tree.flatten import describe


class Imputation(NamedTuple):
    """What stands for a gap, by column."""

    fill: Float[Tensor, " columns"]


class Standardisation(NamedTuple):
    """Mean and standard deviation by column."""

    mean: Float[Tensor, " columns"]
    std: Float[Tensor, " columns"]


def fit_imputation(
    x: Float[Tensor, "rows columns"],
    strategy: Literal["mean", "median"] = "mean",
    where: Bool[Tensor, " rows"] | None = None,
) -> Imputation:
    """The mean or median of the known values of each column.

    As `sklearn.impute.SimpleImputer`.

    Args:
        x: nan where there is a gap.
        where: the rows to look at, by default all.

    Raises:
        ValueError: naming the column, where nothing is known of it.

    >>> fit_imputation(torch.tensor([[1.0], [float("nan")], [3.0]]))
    Imputation(fill=tensor([2.]))
    """
    if strategy not in ("mean", "median"):
        raise ValueError(f"fit_imputation: strategy: expected mean or median, got {strategy!r}")
    known = _known("fit_imputation", x, where)
    if strategy == "mean":
        return Imputation(known.nanmean(0))
    # The mean of the two in the middle, for an even number: torch's median is the lower one.
    ordered, count = known.sort(0).values, (~known.isnan()).sum(0, keepdim=True)
    low, high = ((count - 1) // 2).clamp(min=0), count // 2
    middle = torch.cat([low, high.clamp(max=len(x) - 1)])
    return Imputation(ordered.gather(0, middle).mean(0))


def impute(
    fitted: Imputation, x: Float[Tensor, "rows columns"], indicator: bool = False
) -> Float[Tensor, "rows filled"]:
    """The table with its gaps filled.

    Args:
        indicator: whether a column of ones and zeros is added for every column: was it a gap?

    >>> fitted = Imputation(torch.tensor([2.0]))
    >>> impute(fitted, torch.tensor([[float("nan")], [5.0]]), indicator=True)
    tensor([[2., 1.],
            [5., 0.]])
    """
    _check_columns("impute", x, fitted.fill)
    gap = x.isnan()
    filled = torch.where(gap, fitted.fill, x)
    return torch.cat([filled, gap.to(x.dtype)], 1) if indicator else filled


def fit_standardisation(
    x: Float[Tensor, "rows columns"], where: Bool[Tensor, " rows"] | None = None
) -> Standardisation:
    """Mean and standard deviation (of the population) of the known values of each column.

    As `sklearn.preprocessing.StandardScaler`: one that does not vary has a deviation of one.

    Args:
        x: nan where there is a gap.
        where: the rows to look at, by default all.

    Raises:
        ValueError: naming the column, where nothing is known of it.

    >>> fit_standardisation(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    Standardisation(mean=tensor([2., 5.]), std=tensor([1., 1.]))
    """
    known = _known("fit_standardisation", x, where)
    mean = known.nanmean(0)
    std = (known - mean).square().nanmean(0).sqrt()
    return Standardisation(mean, torch.where(std > 0, std, 1.0))


def standardise(
    fitted: Standardisation, x: Float[Tensor, "rows columns"]
) -> Float[Tensor, "rows columns"]:
    """``(x - mean) / std``; gaps stay gaps.

    >>> fitted = Standardisation(torch.tensor([2.0]), torch.tensor([4.0]))
    >>> standardise(fitted, torch.tensor([[6.0]])), unstandardise(fitted, torch.tensor([[1.0]]))
    (tensor([[1.]]), tensor([[6.]]))
    """
    _check_columns("standardise", x, fitted.mean)
    return (x - fitted.mean) / fitted.std


def unstandardise(
    fitted: Standardisation, x: Float[Tensor, "rows columns"]
) -> Float[Tensor, "rows columns"]:
    """The inverse of `standardise`: ``mean + std * x``."""
    _check_columns("unstandardise", x, fitted.mean)
    return fitted.mean + fitted.std * x


def _known(name: str, x: Tensor, where: Tensor | None) -> Tensor:
    """The table with gaps in place of the rows that are not to be looked at."""
    if x.ndim != 2 or not len(x) or not x.is_floating_point():
        raise ValueError(f"{name}: x: expected numbers [rows, columns], got {describe(x)}")
    if where is not None:
        if where.shape != x.shape[:1] or where.dtype != torch.bool:
            raise ValueError(
                f"{name}: where: expected bool[{len(x)}] (as the rows), got {describe(where)}"
            )
        x = torch.where(rearrange(where, "rows -> rows 1"), x, torch.nan)
    if not _torch.inlining():  # where values may be looked at
        nothing = x.isnan().all(0).nonzero().flatten().tolist()
        if nothing:
            raise ValueError(f"{name}: column {nothing[0]}: expected a known value, got gaps alone")
    return x


def _check_columns(name: str, x: Tensor, fitted: Tensor) -> None:
    if x.ndim != 2 or x.shape[1:] != fitted.shape:
        raise ValueError(
            f"{name}: x: expected [rows, {len(fitted)}] (as it was fitted to), got {describe(x)}"
        )

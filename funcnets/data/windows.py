"""Windows of a series: what is known, and what came after."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Shaped
from torch import Tensor

from funcnets.tree.flatten import describe


class Windows(NamedTuple):
    """Windows, one after another; views of the series, which take no memory of their own.

    Attributes:
        past: what is known.
        future: what follows it.
    """

    past: Shaped[Tensor, "windows length *features"]
    future: Shaped[Tensor, "windows horizon *features"]


def windows(
    series: Shaped[Tensor, " time *features"],
    length: int,
    horizon: int,
    *,
    start: int | None = None,
    end: int | None = None,
    stride: int = 1,
) -> Windows:
    """All windows of a series whose futures lie within the times from ``start`` to ``end``.

    Give the parts of a series, training before validation before test, as ``start`` and ``end``: no
    future then is of another part, while the past of the first windows reaches into the part
    before.

    Args:
        length: of the past.
        horizon: of the future.
        start: the first time of a future, by default ``length``.
        end: one after the last, by default that of the series.
        stride: from one window to the next.

    Raises:
        ValueError: where no window fits, or a past would begin before the series.

    >>> import torch
    >>> past, future = windows(torch.arange(6), length=2, horizon=1, start=3)
    >>> past.tolist(), future.tolist()
    ([[1, 2], [2, 3], [3, 4]], [[3], [4], [5]])
    """
    for name, value in (("length", length), ("horizon", horizon), ("stride", stride)):
        if value < 1:
            raise ValueError(f"windows: {name}: expected at least 1, got {value}")
    if not series.ndim:
        raise ValueError(f"windows: series: expected [time, ...], got {describe(series)}")
    start = length if start is None else start
    end = len(series) if end is None else end
    if not length <= start <= end - horizon <= len(series) - horizon:
        raise ValueError(
            f"windows: expected {length} (length) <= start, start + {horizon} (horizon) <= end "
            f"and end <= {len(series)} (the series), got start {start} and end {end}"
        )
    past = series[start - length : end - horizon].unfold(0, length, stride)
    future = series[start:end].unfold(0, horizon, stride)
    # unfold puts the times of a window last.
    return Windows(past.movedim(-1, 1), future.movedim(-1, 1))

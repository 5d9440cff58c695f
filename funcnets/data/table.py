"""Tables from CSV files, with gaps."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor


class Table(NamedTuple):
    """Numbers by row and column, and what each row is.

    Attributes:
        values: nan where there is a gap.
        columns: the names of the columns.
        labels: places in ``classes``; None without a label column.
        classes: the different labels as they are written, in ascending order: as numbers where all
            are numbers, else as text.
    """

    values: Float[Tensor, "rows columns"]
    columns: tuple[str, ...]
    labels: Int64[Tensor, " rows"] | None
    classes: tuple[str, ...]


def read_csv(
    path: str | os.PathLike[str],
    label: str | None = None,
    *,
    gaps: Collection[str] = ("", "NA", "N/A", "nan", "NaN", "null", "?"),
    delimiter: str = ",",
    dtype: torch.dtype = torch.float32,
) -> Table:
    """Reads a CSV file with a line of names first.

    Args:
        label: the column that tells the class of a row; all others are numbers.
        gaps: what stands for a value that is not known, blanks around it aside.

    Raises:
        ValueError: naming line and column, where a line is longer or shorter than the first, a
            value is no finite number, or a label is missing.
        KeyError: where there is no column of the label's name.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "water.csv"
    >>> _ = path.write_text("ph,hardness,kind\\n7.5,200,river\\n,180,lake\\n")
    >>> table = read_csv(path, label="kind")
    >>> table.values.tolist(), table.labels.tolist(), table.classes
    ([[7.5, 200.0], [nan, 180.0]], [1, 0], ('lake', 'river'))
    """
    place = os.fspath(path)
    with Path(path).open(newline="", encoding="utf-8-sig") as file:
        lines = csv.reader(file, delimiter=delimiter)
        names = tuple(name.strip() for name in next(lines, ()))
        if not any(names):
            raise ValueError(f"{place}: expected a line of names, got nothing")
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{place}: line 1: expected different names, got {twice!r} twice")
        if label is not None and label not in names:
            raise KeyError(f"{place}: expected a column {label!r}, got {', '.join(names)}")
        rows: list[list[float]] = []
        kinds: list[str] = []
        most = torch.finfo(dtype).max
        for cells in lines:
            if not cells:  # an empty line
                continue
            at = f"{place}: line {lines.line_num}"
            if len(cells) != len(names):
                raise ValueError(f"{at}: expected {len(names)} values, got {len(cells)}")
            found = dict(zip(names, map(str.strip, cells), strict=True))
            if label is not None:
                kinds.append(found.pop(label))
                if kinds[-1] in gaps:
                    raise ValueError(f"{at}: column {label!r}: expected a label, got none")
            rows.append([_number(f"{at}: column {n!r}", v, gaps, most) for n, v in found.items()])
    if not rows:
        raise ValueError(f"{place}: expected at least one line of values, got none")
    columns = tuple(name for name in names if name != label)
    values = torch.tensor(rows, dtype=torch.float64).to(dtype)
    if label is None:
        return Table(values, columns, None, ())
    classes = _ordered(set(kinds))
    number = {kind: i for i, kind in enumerate(classes)}
    return Table(values, columns, torch.tensor([number[kind] for kind in kinds]), classes)


def _number(place: str, text: str, gaps: Collection[str], most: float) -> float:
    if text in gaps:
        return math.nan
    try:
        value = float(text) if "_" not in text else float("")  # 1_000 is Python's alone
    except ValueError:
        raise ValueError(f"{place}: expected a number, got {text!r}") from None
    if not abs(value) <= most:
        raise ValueError(f"{place}: expected a finite number, got {text!r}")
    return value


def _ordered(kinds: set[str]) -> tuple[str, ...]:
    try:
        return tuple(sorted(kinds, key=lambda kind: (float(kind), kind)))
    except ValueError:
        return tuple(sorted(kinds))

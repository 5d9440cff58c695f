"""What the families made of tables share: rows with names, and channels in round numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from funcnets.models import blocks

Row = TypeVar("Row", bound=tuple)


def as_rows(model: str, name: str, kind: type[Row], rows: Iterable[Any]) -> tuple[Row, ...]:
    """The rows of a table as records of a named tuple's kind.

    Raises:
        ValueError: where there are none, where one has too many or too few entries, and where an
            entry that is an int by its annotation is not a positive integer.

    >>> from typing import NamedTuple
    >>> Stage = NamedTuple("Stage", [("width", int), ("depth", int)])
    >>> as_rows("net", "stages", Stage, [(16, 2)])
    (Stage(width=16, depth=2),)
    """
    fields = kind.__annotations__
    found = []
    for i, row in enumerate(rows):
        if not isinstance(row, (tuple, list)) or len(row) != len(fields):
            raise ValueError(f"{model}: {name}[{i}]: expected {', '.join(fields)}; got {row!r}")
        sizes = {
            f"{name}[{i}].{field}": value
            for (field, annotation), value in zip(fields.items(), row, strict=True)
            if _is_int(annotation)
        }
        blocks.check_sizes(model, **sizes)
        found.append(kind(*row))
    if not found:
        raise ValueError(f"{model}: {name}: expected at least one row, got none")
    return tuple(found)


def divisible(channels: int | float, divisor: int = 8) -> int:
    """The multiple of the divisor nearest to ``channels``, at least 0.9 of it and not zero.

    >>> divisible(32 * 1.4), divisible(11), divisible(3)
    (48, 16, 8)
    """
    nearest = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return nearest if nearest >= 0.9 * channels else nearest + divisor


def check_scale(model: str, name: str, scale: int | float) -> None:
    """Raises unless the scale is a positive number."""
    if not isinstance(scale, (int, float)) or not scale > 0:
        raise ValueError(f"{model}: {name}: expected a positive number, got {scale!r}")


def _is_int(annotation: Any) -> bool:
    # A string, or a reference that holds one, where annotations are postponed.
    return getattr(annotation, "__forward_arg__", annotation) in (int, "int")

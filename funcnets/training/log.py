"""Where the records of a run go: callbacks of `fit`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from funcnets.training.state import State


class JsonLines:
    """Writes each record as a line of JSON.

    A run that is resumed begins the file anew with the records that its checkpoint has, so that
    there is one line for each record, whenever it was killed.

    >>> import tempfile
    >>> log = JsonLines(os.path.join(tempfile.mkdtemp(), "log.jsonl"))
    >>> log.start([])
    >>> log(None, {"step": 1, "loss": 0.5})
    >>> log.path.read_text()
    '{"step": 1, "loss": 0.5}\\n'
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def start(self, history: list[dict[str, Any]]) -> None:
        """The records so far, none for a new run."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(json.dumps(record) + "\n" for record in history))

    def __call__(self, state: State | None, record: dict[str, Any]) -> None:
        """Writes one more line."""
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


class TensorBoard:
    """Writes the numbers of each record for TensorBoard, which must be installed.

    Those of a member of an ensemble, or of a class, are ``name/0``, ``name/1`` and so on.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("TensorBoard: needs the package tensorboard") from error
        self._make = lambda step: SummaryWriter(os.fspath(folder), purge_step=step)
        self._writer: Any = None

    def start(self, history: list[dict[str, Any]]) -> None:
        """What was written beyond the records so far no longer counts."""
        self._writer = self._make(history[-1]["step"] + 1 if history else None)

    def __call__(self, state: State | None, record: dict[str, Any]) -> None:
        """Writes the numbers of one more record."""
        if self._writer is None:
            self.start([])
        for name, value in flat_record(record).items():
            if name not in ("step", "epoch"):
                self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()


def flat_record(record: dict[str, Any]) -> dict[str, float | int]:
    """The numbers of a record by names alone: ``recall/3`` for what is in a list or dict.

    >>> flat_record({"loss": [0.5, 0.25], "note": "text"})
    {'loss/0': 0.5, 'loss/1': 0.25}
    """
    found: dict[str, float | int] = {}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, child in value.items():
                walk(f"{name}/{key}" if name else str(key), child)
        elif isinstance(value, (list, tuple)):
            for i, child in enumerate(value):
                walk(f"{name}/{i}", child)
        elif isinstance(value, (int, float)):
            found[name] = value

    walk("", record)
    return found


def draw_curves(path: str | os.PathLike[str], history: list[dict[str, Any]], *names: str) -> None:
    """A figure of scores by step, one panel a name; needs matplotlib. A list has a line for each.

    Args:
        history: as `fit` returns it.
        names: of the scores, as ``"evaluation/accuracy"``; by default all.
    """
    from matplotlib.figure import Figure

    rows = [flat_record(record) for record in history]
    present = dict.fromkeys(name for row in rows for name in row)
    # Of "training/recall/3" the panel is "training/recall".
    panels = names or tuple(
        dict.fromkeys("/".join(name.split("/")[:2]) for name in present if "/" in name)
    )
    for panel in panels or ("",):
        if not any(_belongs(name, panel) for name in present):
            raise ValueError(f"draw_curves: expected some of {', '.join(present)}, got {panel!r}")
    figure = Figure(figsize=(4 * len(panels), 3), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)
    for panel, axis in zip(panels, axes[0], strict=True):
        lines = dict.fromkeys(name for row in rows for name in row if _belongs(name, panel))
        for name in lines:
            points = [(row["step"], row[name]) for row in rows if name in row]
            label = name.removeprefix(panel).lstrip("/")
            axis.plot(*zip(*points, strict=True), lw=1.2, label=label)
        axis.set(xlabel="step", ylabel=panel)
        if 1 < len(lines) <= 10:
            axis.legend(fontsize=7)
    figure.savefig(os.fspath(path), dpi=120)


def _belongs(name: str, panel: str) -> bool:
    return name == panel or name.startswith(f"{panel}/")

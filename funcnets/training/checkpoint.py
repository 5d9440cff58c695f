"""States in files: written whole or not at all, and read only into what they were written from."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from funcnets import serialization, tree
from funcnets.tree.flatten import Tree

_KIND = "funcnets.training.checkpoint"


def save_checkpoint(
    path: str | os.PathLike[str], state: Tree, metadata: Mapping[str, Any] | None = None
) -> None:
    """Writes a state to a file, atomically: at any moment it is the old one or the new one.

    Args:
        state: any tree of tensors: a `State`, or one of your own.
        metadata: anything that JSON can say.

    Raises:
        OSError: where it cannot be written; an earlier file is then as it was.
    """
    nested = _nested(state)
    try:
        serialization.save(path, nested, metadata={_KIND: 1, **(metadata or {})})
    except SafetensorError as error:  # which is how safetensors says that the disk is full
        raise OSError(f"{os.fspath(path)}: {error}") from error
    _sync_folder(Path(path).parent)


def load_checkpoint(
    path: str | os.PathLike[str], like: Tree, device: torch.device | str | None = None
) -> tuple[Any, dict[str, Any]]:
    """Reads what `save_checkpoint` wrote: the state and the metadata.

    Args:
        like: a state of the same structure, as ``step.init`` gives it. Its values do not matter.
        device: where the tensors go; by default where those of ``like`` are.

    Raises:
        FileNotFoundError: where there is no file.
        ValueError: naming the file, where it is cut short or foreign, and naming the first places
            that differ, where it is the checkpoint of something else.

    >>> import tempfile
    >>> file = os.path.join(tempfile.mkdtemp(), "state.safetensors")
    >>> save_checkpoint(file, ({"w": torch.ones(2)}, torch.tensor(3)), {"epoch": 1})
    >>> load_checkpoint(file, ({"w": torch.zeros(2)}, torch.tensor(0)))
    (({'w': tensor([1., 1.])}, tensor(3)), {'epoch': 1})
    """
    metadata = _read_metadata(path)
    nested = serialization.load(path)[1]
    differences = tree.compare(nested, _nested(like), dtype=True)
    if differences:
        raise ValueError(
            f"{os.fspath(path)}: expected a checkpoint of this state, got another:\n{differences}"
        )
    found = dict(tree.leaves_with_path(nested))

    def place(place: tuple[str, ...], leaf: Tensor) -> Tensor:
        return found[place].to(leaf.device if device is None else device)

    return tree.map_with_path(place, like), metadata


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run, in a folder of their own: the last few, and the best.

    Attributes:
        folder: made where it is not there.
        keep: how many of the last.
        best: the score by which the best one is kept as well, or None.
        mode: whether the ``"min"`` or the ``"max"`` of the scores is best.

    >>> import tempfile
    >>> checkpoints = Checkpoints(tempfile.mkdtemp(), keep=1, best="accuracy", mode="max")
    >>> for step, accuracy in enumerate((0.5, 0.9, 0.7)):
    ...     checkpoints.save({"w": torch.tensor(step)}, step, {"scores": {"accuracy": accuracy}})
    >>> checkpoints.steps()
    [1, 2]
    >>> checkpoints.restore({"w": torch.tensor(0)}, "best")[0]
    {'w': tensor(1)}
    """

    folder: str | os.PathLike[str]
    keep: int = 3
    best: str | None = None
    mode: str = "min"

    def __post_init__(self) -> None:
        if self.keep < 1 or self.mode not in ("min", "max"):
            raise ValueError(
                "Checkpoints: expected a keep of at least 1 and a mode of 'min' or 'max', "
                f"got {self.keep} and {self.mode!r}"
            )

    def path(self, step: int) -> Path:
        """The file of the checkpoint of a step."""
        return Path(self.folder) / f"step-{step:010d}.safetensors"

    def steps(self) -> list[int]:
        """The steps that there is a checkpoint of, ascending."""
        names = (file.name for file in Path(self.folder).glob("step-*.safetensors"))
        numbers = (name.removeprefix("step-").removesuffix(".safetensors") for name in names)
        return sorted(int(number) for number in numbers if number.isdecimal())

    def save(self, state: Tree, step: int, metadata: Mapping[str, Any] | None = None) -> None:
        """Writes a checkpoint; then those that are not to be kept go, and not before.

        Args:
            metadata: what JSON can say; its ``"scores"``, a dict, holds the score of the best.
        """
        folder = Path(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_checkpoint(self.path(step), state, metadata)
        steps = self.steps()
        kept = {*steps[-self.keep :], self.best_step()}
        for old in steps:
            if old not in kept:
                self.path(old).unlink(missing_ok=True)
        for left in folder.glob(".step-*.safetensors.*.tmp"):  # by a process that was killed
            left.unlink(missing_ok=True)

    def best_step(self) -> int | None:
        """The step of the best checkpoint, the first among equals; None where none has a score."""
        if self.best is None:
            return None
        scores = {}
        for step in self.steps():
            try:
                score = (_read_metadata(self.path(step)).get("scores") or {}).get(self.best)
            except ValueError:  # a file that is not whole is nobody's best
                continue
            if isinstance(score, (int, float)) and score == score:
                scores[step] = score
        if not scores:
            return None
        return (min if self.mode == "min" else max)(scores, key=lambda step: scores[step])

    def restore(
        self, like: Tree, which: str | int = "last", *, fall_back: bool = False
    ) -> tuple[Any, dict[str, Any]]:
        """Reads a checkpoint: the state and the metadata. Raises as `load_checkpoint` does.

        Args:
            like: a state of the same structure.
            which: ``"last"``, ``"best"``, or a step.
            fall_back: whether to go on to the one before, with a warning, where the last is not
                whole. (A process that is killed leaves no such file; a broken disk may.)
        """
        steps = self.steps()
        step = (
            self.best_step()
            if which == "best"
            else steps[-1]
            if which == "last" and steps
            else which
        )
        if step not in steps:
            raise FileNotFoundError(
                f"{os.fspath(self.folder)}: expected a checkpoint ({which}), got those of "
                f"steps {steps}"
                if steps
                else f"{os.fspath(self.folder)}: there is no checkpoint"
            )
        while True:
            try:
                return load_checkpoint(self.path(step), like)
            except ValueError as error:
                earlier = [other for other in steps if other < step]
                if fall_back and earlier and not _is_whole(self.path(step)):
                    warnings.warn(f"{error}; going back to step {earlier[-1]}", stacklevel=2)
                    step = earlier[-1]
                    continue
                if earlier:
                    error.add_note(f"There are earlier ones, of steps {earlier}: see fall_back.")
                raise


def _nested(state: Tree) -> dict[str, Any]:
    """The leaves of any tree as nested dicts, as `serialization.save` takes them."""
    nested: dict[str, Any] = {}
    for path, leaf in tree.leaves_with_path(state):
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{tree.join(path)}: expected a tensor, got {tree.describe(leaf)}")
        node = nested
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node["".join(path[-1:])] = leaf
    return nested


def _read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata, from the header alone."""
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > os.fstat(file.fileno()).st_size:
                raise ValueError("it is cut short, or no safetensors file")
            header = json.loads(file.read(size))
        metadata = json.loads(header["__metadata__"]["funcnets"])["metadata"]
        version = metadata.pop(_KIND)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)}: expected a checkpoint, got: {error}") from error
    if version != 1:
        raise ValueError(f"{os.fspath(path)}: expected a checkpoint of version 1, got {version}")
    return metadata


def _is_whole(path: Path) -> bool:
    try:
        _read_metadata(path)
        serialization.load(path)
    except ValueError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    """The name of a new file outlives a power cut only once its folder is on the disk."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

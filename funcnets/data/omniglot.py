"""Omniglot: handwritten characters of many alphabets, each drawn by twenty people."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from funcnets.data.folders import image_folder


class Omniglot(NamedTuple):
    """Drawings of characters, and what is known of each.

    Attributes:
        images: ink, from 0 (none) to 1.
        characters: places in ``character_names``.
        alphabets: places in ``alphabet_names``.
        drawers: from 0 to 19; each drew every character of an alphabet once, and is somebody else
            in another alphabet.
        character_names: as ``Greek/character01``, in alphabetical order.
        alphabet_names: as ``Greek``, in alphabetical order.
    """

    images: Float[Tensor, "samples 1 height width"]
    characters: Int64[Tensor, " samples"]
    alphabets: Int64[Tensor, " samples"]
    drawers: Int64[Tensor, " samples"]
    character_names: tuple[str, ...]
    alphabet_names: tuple[str, ...]


def omniglot(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    size: tuple[int, int] | None = None,
) -> Omniglot:
    """Reads sets of Omniglot (Lake et al. 2015), as they are published.

    Args:
        path: of a set, as a zip file (``images_background.zip``) or the folder in it; of a folder
            of such zip files; or several of these. What two sets share is taken once.
        size: height and width to resize to; the originals have 105 by 105 pixels.

    Raises:
        FileNotFoundError: where there is neither folder nor zip file.
        ValueError: naming the file, where one is no image of ``alphabet/character/*_drawer.png``.

    >>> import tempfile
    >>> from PIL import Image
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / "Greek" / "character01").mkdir(parents=True)
    >>> Image.new("1", (4, 4), 1).save(folder / "Greek" / "character01" / "0394_20.png")
    >>> found = omniglot(folder)
    >>> found.images.sum(), found.drawers, found.character_names
    (tensor(0.), tensor([19]), ('Greek/character01',))
    """
    paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
    drawings: dict[str, Tensor] = {}
    for source in [file for given in paths for file in _sets(Path(given))]:
        images, _, _, names = image_folder(source, size=size)
        for name, image in zip(names, images.unbind(), strict=True):
            if not re.fullmatch(r"[^/]+/[^/]+/[^/]*_(0[1-9]|1\d|20)\.png", name):
                raise ValueError(
                    f"{source}: {name}: expected alphabet/character/*_drawer.png, drawer 01 to 20"
                )
            drawings.setdefault(name, 1 - image)
    if not drawings:
        raise ValueError("omniglot: expected the path of at least one set, got none")
    places = sorted(drawings)
    characters = tuple(sorted({name.rpartition("/")[0] for name in places}))
    alphabets = tuple(sorted({name.partition("/")[0] for name in places}))
    number = {name: i for names in (characters, alphabets) for i, name in enumerate(names)}
    return Omniglot(
        torch.stack([drawings[name] for name in places]),
        torch.tensor([number[name.rpartition("/")[0]] for name in places]),
        torch.tensor([number[name.partition("/")[0]] for name in places]),
        torch.tensor([int(name[-6:-4]) - 1 for name in places]),
        characters,
        alphabets,
    )


def _sets(path: Path) -> list[Path]:
    """The zip files in a folder; where there are none, the folder itself."""
    return (sorted(path.glob("*.zip")) if path.is_dir() else []) or [path]

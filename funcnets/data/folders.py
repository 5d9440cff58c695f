"""Images in folders, or in a zip file of folders: a class for each folder."""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

# PIL and torchvision are imported where they are used: they take 0.5 s, and most runs no images.

KINDS = ("real", "fake")


class Images(NamedTuple):
    """Images and their classes.

    Attributes:
        images: values from 0 to 1; one channel, or three with mode "RGB".
        labels: places in ``classes``.
        classes: the folders that hold images, as ``alphabet/character``, in alphabetical order;
            ``"."`` for the given folder itself.
        names: of the image files, as ``alphabet/character/0001_01.png``.
    """

    images: Float[Tensor, "samples channels height width"]
    labels: Int64[Tensor, " samples"]
    classes: tuple[str, ...]
    names: tuple[str, ...]


class Signatures(NamedTuple):
    """Genuine and forged images by person.

    Attributes:
        images: values from 0 to 1; one channel, or three with mode "RGB".
        labels: places in ``persons``.
        forged: which are forgeries.
        persons: the folders, in alphabetical order.
        names: of the image files.
    """

    images: Float[Tensor, "samples channels height width"]
    labels: Int64[Tensor, " samples"]
    forged: Bool[Tensor, " samples"]
    persons: tuple[str, ...]
    names: tuple[str, ...]


def image_folder(
    path: str | os.PathLike[str], mode: str = "L", size: tuple[int, int] | None = None
) -> Images:
    """All images below a folder, at any depth; those in one folder are one class.

    Args:
        path: of the folder, or of a zip file that holds it (its name in the file is no class).
            Hidden files, and files without the ending of an image, are passed over.
        mode: ``"L"`` for one channel, ``"RGB"`` for three.
        size: height and width to resize to; without it all images must be of one size.

    Raises:
        FileNotFoundError: where there is neither folder nor zip file.
        ValueError: naming the file, where there are no images, one cannot be read, has more than
            8 bits a value, or they differ in size; or where mode or size is another.

    >>> import tempfile
    >>> from PIL import Image
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / "Greek" / "alpha").mkdir(parents=True)
    >>> Image.new("L", (4, 3)).save(folder / "Greek" / "alpha" / "1.png")
    >>> found = image_folder(folder)
    >>> found.images.shape, found.classes
    (torch.Size([1, 1, 3, 4]), ('Greek/alpha',))
    """
    with _opened(path) as (held, read):
        if not held:
            raise ValueError(
                f"{os.fspath(path)}: expected images ({', '.join(_endings())}) in folders, "
                "one folder for each class, got none"
            )
        images = _read(held, read, mode, size)
    names = tuple("/".join(place) for place in held)
    folders = ["/".join(place[:-1]) or "." for place in held]
    classes = tuple(sorted(set(folders)))
    number = {name: place for place, name in enumerate(classes)}
    return Images(images, torch.tensor([number[name] for name in folders]), classes, names)


def signature_folder(
    path: str | os.PathLike[str], mode: str = "L", size: tuple[int, int] | None = None
) -> Signatures:
    """Signatures in folders ``person/real`` and ``person/fake``, the latter forgeries of theirs.

    Arguments and errors are those of `image_folder`; it is a ValueError, too, where an image lies
    elsewhere, or a person lacks one of the two folders.

    >>> import tempfile
    >>> from PIL import Image
    >>> folder = Path(tempfile.mkdtemp())
    >>> for kind in KINDS:
    ...     (folder / "ann" / kind).mkdir(parents=True)
    ...     Image.new("L", (4, 3)).save(folder / "ann" / kind / "1.png")
    >>> found = signature_folder(folder)
    >>> found.names, found.forged.tolist()
    (('ann/fake/1.png', 'ann/real/1.png'), [True, False])
    """
    images, labels, classes, names = image_folder(path, mode, size)
    folders = [tuple(name.split("/")) for name in classes]
    for folder, name in zip(folders, classes, strict=True):
        if len(folder) != 2 or folder[1] not in KINDS:
            raise ValueError(
                f"{os.fspath(path)}: expected images in person/real and person/fake, "
                f"got some in {name}"
            )
    persons = tuple(sorted({person for person, _ in folders}))
    for person in persons:
        for kind in KINDS:
            if (person, kind) not in folders:
                raise ValueError(f"{os.fspath(path)}: {person}/{kind}: expected images, got none")
    number = torch.tensor([persons.index(person) for person, _ in folders])
    forged = torch.tensor([kind == "fake" for _, kind in folders])
    return Signatures(images, number[labels], forged[labels], persons, names)


Place = tuple[str, ...]


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[list[Place], Callable[..., Any]]]:
    """The places of the images below a folder or in a zip file, and what opens the file at one."""
    root = Path(path)
    if root.is_dir():
        files = [file.relative_to(root).parts for file in root.rglob("*") if file.is_file()]
        yield _images(files), lambda place: root.joinpath(*place).open("rb")
        return
    if not root.exists():
        raise FileNotFoundError(
            f"{root}: expected a folder of images, or a zip file of one, got nothing"
        )
    if not zipfile.is_zipfile(root):
        raise ValueError(f"{root}: expected a folder of images, or a zip file of one")
    with zipfile.ZipFile(root) as archive:
        held = _images([tuple(name.split("/")) for name in archive.namelist()])
        # The folder that was packed is the root, not a class.
        top = held[0][:1] if held and all(place[:1] == held[0][:1] for place in held) else ()
        if any(len(place) == len(top) for place in held):
            top = ()
        yield (
            [place[len(top) :] for place in held],
            lambda place: archive.open("/".join((*top, *place))),
        )


def _endings() -> tuple[str, ...]:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return IMG_EXTENSIONS


def _images(files: list[Place]) -> list[Place]:
    """Those that are images by their ending, without what is hidden, in alphabetical order."""
    endings = _endings()
    return sorted(
        place
        for place in files
        if place[-1].lower().endswith(endings)
        and not any(part.startswith((".", "__MACOSX")) for part in place)
    )


def _read(
    places: list[Place], read: Callable[..., Any], mode: str, size: tuple[int, int] | None
) -> Tensor:
    from PIL import Image, UnidentifiedImageError
    from torchvision.transforms.v2.functional import pil_to_tensor

    if mode not in ("L", "RGB"):
        raise ValueError(f"mode: expected 'L' or 'RGB', got {mode!r}")
    if size is not None and (
        not isinstance(size, Sequence)
        or len(size) != 2
        or any(not isinstance(side, int) or side < 1 for side in size)
    ):
        raise ValueError(f"size: expected (height, width) in pixels, got {size!r}")
    images: list[Tensor] = []
    for place in places:
        name = "/".join(place)
        try:
            with read(place) as stream, Image.open(stream) as image:
                if image.mode in ("I", "F") or image.mode.startswith("I;"):
                    raise OSError(f"8 bits a value, got mode {image.mode}")
                converted = image.convert(mode)
        except (UnidentifiedImageError, OSError, SyntaxError, zipfile.BadZipFile) as error:
            raise ValueError(f"{name}: expected an image: {error}") from error
        if size is not None:
            converted = converted.resize((size[1], size[0]), Image.Resampling.BILINEAR)
        images.append(pil_to_tensor(converted))
        if images[-1].shape != images[0].shape:
            first, got = list(images[0].shape[1:]), list(images[-1].shape[1:])
            raise ValueError(
                f"{name}: expected {first} pixels (as the first image), got {got}; "
                "size=(height, width) resizes all"
            )
    return torch.stack(images).to(torch.float32) / 255

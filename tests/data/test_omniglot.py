"""Omniglot read from folders and zip files: made here, and the published ones where they are."""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from funcnets.data import omniglot

NAMES = (
    "Greek/character01/0394_01.png",
    "Greek/character01/0394_20.png",
    "Greek/character02/0395_01.png",
    "Latin/character01/0683_07.png",
)


def write(folder, names=NAMES, pixel=(0, 0)):
    """White images with one black pixel."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.new("1", (6, 4), 1)
        image.putpixel(pixel, 0)
        image.save(path)
    return folder


def packed(folder, path):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, f"{folder.name}/{file.relative_to(folder)}")
    return path


def test_a_folder_a_zip_file_and_a_folder_of_zip_files(tmp_path):
    folder = write(tmp_path / "set")
    file = packed(folder, tmp_path / "set.zip")
    for path in (folder, str(folder), file, tmp_path, [file, folder]):
        found = omniglot(path)
        ink = torch.zeros(4, 1, 4, 6)
        ink[:, :, 0, 0] = 1
        torch.testing.assert_close(found.images, ink)
        assert found.characters.tolist() == [0, 0, 1, 2]
        assert found.alphabets.tolist() == [0, 0, 0, 1]
        assert found.drawers.tolist() == [0, 19, 0, 6]
        assert found.character_names == (
            "Greek/character01",
            "Greek/character02",
            "Latin/character01",
        )
        assert found.alphabet_names == ("Greek", "Latin")


def test_several_sets_and_what_they_share(tmp_path):
    """Taken once, from the first; labels are places in the names of all together."""
    first = write(tmp_path / "a", ["Latin/character01/0683_07.png"])
    second = write(tmp_path / "b", pixel=(5, 3))
    found = omniglot([first, second])
    assert found.alphabets.tolist() == [0, 0, 0, 1]
    assert found.images[-1, 0, 0, 0] == 1
    assert found.images[0, 0, 3, 5] == 1
    assert found.images.sum() == 4


def test_size(tmp_path):
    assert omniglot(write(tmp_path), size=(2, 3)).images.shape == (4, 1, 2, 3)


@pytest.mark.parametrize(
    "name",
    [
        "Greek/0394_01.png",
        "set/Greek/character01/0394_01.png",
        "Greek/character01/0394_21.png",
        "Greek/character01/0394_00.png",
        "Greek/character01/039401.png",
        "Greek/character01/0394_01.jpg",
    ],
)
def test_what_is_no_omniglot(tmp_path, name):
    write(tmp_path, [name])
    message = re.escape(f"{name}: expected alphabet/character/*_drawer.png, drawer 01 to 20")
    with pytest.raises(ValueError, match=message):
        omniglot(tmp_path)


def test_nothing_to_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        omniglot(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="expected images"):
        omniglot(tmp_path)
    with pytest.raises(ValueError, match="omniglot: expected the path of at least one set"):
        omniglot([])


@pytest.mark.skipif("FUNCNETS_DATA" not in os.environ, reason="needs Omniglot in FUNCNETS_DATA")
def test_the_published_sets():
    found = omniglot(Path(os.environ["FUNCNETS_DATA"]) / "omniglot", size=(28, 28))
    assert found.images.shape == (4840, 1, 28, 28)
    assert 0.05 < found.images.mean() < 0.12  # ink is sparse
    assert (len(found.character_names), len(found.alphabet_names)) == (242, 8)
    assert found.characters.bincount().tolist() == [20] * 242
    assert found.drawers.bincount().tolist() == [242] * 20
    # Each drawer drew each character once, and each character has one alphabet.
    assert len(torch.stack([found.characters, found.drawers]).unique(dim=1)[0]) == 4840
    of_name = [name.partition("/")[0] for name in found.character_names]
    given = [found.alphabet_names[i] for i in found.alphabets]
    assert given == [of_name[i] for i in found.characters]

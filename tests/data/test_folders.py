"""Folders of images, good and bad."""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from funcnets import data

NAMES = st.sampled_from(["a/b", "a/c/d", "b", ".", "Z"])


def write(folder, tree):
    """``{name: array}`` as files; arrays of [height, width] or [height, width, 3]."""
    for name, values in tree.items():
        file = Path(folder) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(values, bytes):
            file.write_bytes(values)
        else:
            Image.fromarray(np.asarray(values, dtype=np.uint8)).save(file)


def image(value, height=2, width=3):
    values = np.full((height, width), value)
    values[0, -1] = 255
    return values


def packed(folder, file, top=""):
    with zipfile.ZipFile(file, "w") as archive:
        for name in sorted(folder.rglob("*")):
            archive.write(name, Path(top) / name.relative_to(folder))


@given(st.dictionaries(NAMES, st.integers(1, 3), min_size=1), st.booleans())
def test_folders_are_classes(tmp_path_factory, counts, zipped):
    folder = tmp_path_factory.mktemp("images")
    files = {
        f"{name}/{i}.png": image(10 * k + i)
        for k, (name, count) in enumerate(counts.items())
        for i in range(count)
    }
    write(folder, files)
    if zipped:
        file = tmp_path_factory.mktemp("zip") / "images.zip"
        packed(folder, file, top="packed")
        folder = file
    found = data.image_folder(folder)
    assert found.classes == tuple(sorted(counts))
    assert len(found.names) == len(files) == len(found.labels)
    for pixels, label, name in zip(found.images, found.labels, found.names, strict=True):
        key = name if "/" in name else f"./{name}"
        expected = torch.tensor(files[key]).to(torch.float32)[None] / 255
        torch.testing.assert_close(pixels, expected, rtol=0, atol=0)
        assert found.classes[label] == key.rpartition("/")[0]


def test_what_is_no_image_is_passed_over(tmp_path):
    write(tmp_path, {"a/1.PNG": image(1), "a/notes.txt": b"", ".b/2.png": image(2), ".c.png": b""})
    assert data.image_folder(tmp_path).names == ("a/1.PNG",)


def test_modes_and_sizes(tmp_path, unchecked):
    colour = np.zeros((2, 3, 3))
    colour[..., 0] = 255
    write(tmp_path, {"1.png": colour, "2.png": image(7, 6, 8)})
    found = data.image_folder(tmp_path, mode="RGB", size=(4, 5))
    assert found.images.shape == (2, 3, 4, 5)
    assert found.images[0].mean((1, 2)).tolist() == [1, 0, 0]
    assert data.image_folder(tmp_path, size=(4, 5)).images.shape == (2, 1, 4, 5)
    with pytest.raises(ValueError, match=re.escape("mode: expected 'L' or 'RGB', got 'CMYK'")):
        data.image_folder(tmp_path, mode="CMYK")
    for size in (2, (2,), (2, 0), (2.0, 2.0)):
        with pytest.raises(ValueError, match=re.escape("size: expected (height, width) in pixels")):
            data.image_folder(tmp_path, size=size)


def test_a_zip_file_of_images_at_its_top(tmp_path):
    write(tmp_path / "in", {"1.png": image(1), "a/2.png": image(2)})
    packed(tmp_path / "in", tmp_path / "images.zip")
    assert data.image_folder(tmp_path / "images.zip").classes == (".", "a")


def test_signatures(tmp_path):
    names = [f"{who}/{kind}/{i}.png" for who in "ab" for kind in ("real", "fake") for i in "01"]
    write(tmp_path, {name: image(k) for k, name in enumerate(names)})
    found = data.signature_folder(tmp_path)
    assert found.persons == ("a", "b")
    for label, forged, name in zip(found.labels, found.forged, found.names, strict=True):
        person, kind, _ = name.split("/")
        assert (found.persons[label], bool(forged)) == (person, kind == "fake")
    values = {name: k / 255 for k, name in enumerate(names)}
    assert found.images[:, 0, 1, 0].tolist() == pytest.approx([values[n] for n in found.names])
    signatures = data.group_forgeries(found.labels, found.forged)
    assert signatures.real.tolist() == signatures.fake.tolist() == [2, 2]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a/real/1.png": 1, "b.png": 1}, "expected images in person/real and person/fake, got so"),
        ({"a/real/1.png": 1, "a/forged/2.png": 1}, "got some in a/forged"),
        ({"a/real/x/1.png": 1, "a/fake/2.png": 1}, "got some in a/real/x"),
        ({"a/real/1.png": 1, "a/fake/2.png": 1, "b/real/1.png": 1}, "b/fake: expected images, got"),
        ({"a/fake/2.png": 1}, "a/real: expected images, got none"),
    ],
)
def test_folders_of_signatures_that_are_none(tmp_path, files, message):
    write(tmp_path, {name: image(value) for name, value in files.items()})
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        data.signature_folder(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="none: expected a folder of images, or a zip"):
        data.image_folder(tmp_path / "none")
    with pytest.raises(ValueError, match=r"expected images \(.*\.png.*\) in folders, one folder"):
        data.image_folder(tmp_path)
    (tmp_path / "file").write_text("no zip")
    with pytest.raises(ValueError, match="file: expected a folder of images, or a zip file of one"):
        data.image_folder(tmp_path / "file")


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\nbroken"])
def test_files_that_are_no_images(tmp_path, content):
    write(tmp_path, {"a/1.png": image(1), "a/2.png": content})
    with pytest.raises(ValueError, match=re.escape("a/2.png: expected an image")):
        data.image_folder(tmp_path)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_images_of_more_than_eight_bits(tmp_path, mode):
    """PIL would cut their values off at 255."""
    Image.new(mode, (2, 1), 16384).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=f"x.tif: .*8 bits a value, got mode {mode}"):
        data.image_folder(tmp_path)


def test_an_image_cut_short(tmp_path):
    with_noise = np.arange(64 * 64).reshape(64, 64) % 251
    write(tmp_path, {"1.png": with_noise})
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=re.escape("1.png: expected an image")):
        data.image_folder(tmp_path)


def test_images_of_several_sizes(tmp_path):
    write(tmp_path, {"a/1.png": image(1), "b/2.png": image(1, 4, 5)})
    message = re.escape("b/2.png: expected [2, 3] pixels (as the first image), got [4, 5]; size=")
    with pytest.raises(ValueError, match=message):
        data.image_folder(tmp_path)


@pytest.mark.skipif("FUNCNETS_DATA" not in os.environ, reason="needs FUNCNETS_DATA")
def test_omniglot():
    folder = Path(os.environ["FUNCNETS_DATA"]) / "omniglot"
    found = data.image_folder(folder / "images_background_small1.zip")
    assert found.images.shape == (136 * 20, 1, 105, 105)
    assert sorted({name.partition("/")[0] for name in found.classes}) == [
        "Balinese",
        "Early_Aramaic",
        "Greek",
        "Korean",
        "Latin",
    ]
    groups = data.group(found.labels)
    assert groups.count.tolist() == [20] * 136
    assert (found.images.unique() == torch.tensor([0.0, 1.0])).all()

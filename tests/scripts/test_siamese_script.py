"""scripts/siamese.py on real data, for a few steps; and what its views and trials are."""

from __future__ import annotations

import os
import runpy
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tensordict import TensorDict

import funcnets
from funcnets import data, optim, random, tree
from funcnets.serialization import read_metadata

SCRIPT = Path(__file__).parents[2] / "scripts" / "siamese.py"
DATA = os.environ.get("FUNCNETS_DATA")

needs_data = pytest.mark.skipif(DATA is None, reason="needs Omniglot in FUNCNETS_DATA")


@pytest.fixture(scope="module")
def script():
    return SimpleNamespace(**runpy.run_path(str(SCRIPT), run_name="siamese"))


def few(known):
    """The drawings of sixty characters."""
    some = known.characters < 60
    return data.Omniglot(*(x[some] for x in known[:4]), known.character_names[:60], known[5])


@needs_data
def test_a_few_steps_and_what_is_saved(script, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--output", str(tmp_path), *arguments])
        script.main()
        return capsys.readouterr().out

    flags = ["--data", f"{DATA}/omniglot", "--train-set", "small2", "--steps", "2", "--runs", "3"]
    printed = run(*flags, "--no-compile")
    for alphabet in ("Balinese", "Early_Aramaic", "Korean", "all"):
        assert alphabet in printed
    for known in ("Greek", "Latin", "Sanskrit"):
        assert known not in printed
    assert (tmp_path / "small2.png").read_bytes().startswith(b"\x89PNG")
    file = tmp_path / "small2.safetensors"
    assert read_metadata(file) == {"train_set": "small2", "steps": 2, "seed": 0}

    folder = tmp_path / "images"
    folder.mkdir()
    pixels = np.full((60, 90), 255, dtype=np.uint8)
    pixels[20:40, 30:35] = 0
    Image.fromarray(pixels).save(folder / "b.png")
    Image.fromarray(pixels[::-1]).save(folder / "a.png")
    Image.fromarray(np.roll(pixels, 9, axis=1)).save(folder / "c.png")
    names, embeddings = script.embed(file, folder)
    assert names == ("a.png", "b.png", "c.png")
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(embeddings[1], embeddings[2], atol=0.05, rtol=0)  # shifted
    assert "3 embeddings of" in run("--train-set", "small2", "--embed", str(folder))
    saved = np.load(tmp_path / "images.npz")
    assert saved["names"].tolist() == list(names)
    np.testing.assert_array_equal(saved["embeddings"], embeddings.numpy())


@needs_data
def test_training_compiled_is_training(script, monkeypatch):
    """The whole step as one graph, in bfloat16, Muon and all, over a few of the characters."""
    monkeypatch.setattr(funcnets, "compile", partial(funcnets.compile, backend="aot_eager"))
    known = few(data.omniglot(Path(DATA, "omniglot", "images_background_small2.zip")))
    (eager, curve), (compiled, same) = (script.train(known, 2, 0, flag) for flag in (False, True))
    np.testing.assert_allclose(same, curve, rtol=1e-3)
    start = script.model.init(random.split(random.key(0)).unbind()[0])
    moved, apart = (
        tree.global_norm(tree.map(torch.sub, eager, other)) for other in (start, compiled)
    )
    assert apart < 0.01 * moved


@needs_data
def test_trials_are_of_one_alphabet_and_two_drawers(script):
    held = data.omniglot(Path(DATA, "omniglot", "images_background_small1.zip"))
    params = script.model.init(random.key(0))
    found = script.try_out(params, held, "Early_Aramaic", runs=5, key=random.key(1))
    assert found.distances.shape == (5, 20, 20)
    for tests, given, distances, wrong in zip(
        found.tests, found.given, found.distances, found.wrong, strict=True
    ):
        assert {held.character_names[c].split("/")[0] for c in held.characters[tests]} == {
            "Early_Aramaic"
        }
        assert torch.equal(held.characters[tests], held.characters[given])
        assert len(held.characters[tests].unique()) == 20
        drawers = held.drawers[tests].unique(), held.drawers[given].unique()
        assert len(drawers[0]) == len(drawers[1]) == 1
        assert drawers[0] != drawers[1]
        assert torch.equal(wrong, distances.argmin(1) != torch.arange(20))
    ink = held.images[torch.cat([found.tests[0, :3], found.given[0, :2]])]
    embeddings = script.embeddings_of(params, script.drawings_of(ink))
    distances = 1 - script.similarities(embeddings[:3], embeddings[3:])
    torch.testing.assert_close(distances, found.distances[0, :3, :2], atol=0.02, rtol=0)


@pytest.mark.parametrize("views", [1, 2])
def test_similarities_by_hand(script, views):
    """Each place against the neighbour that is most like it, at the price of the move."""
    size, channels = script.PLACES, script.CHANNELS
    shape = (views, size, size, channels)
    one, other = random.normal(random.key(0), (2, *shape))
    one, other = one / one.norm(), other / other.norm()

    def one_way(a, b):
        total = 0.0
        for v in range(views):
            for y in range(size):
                for x in range(size):
                    found = []
                    for down in (-1, 0, 1):
                        for right in (-1, 0, 1):
                            inside = 0 <= y + down < size and 0 <= x + right < size
                            near = b[v, y + down, x + right] @ a[v, y, x] if inside else 0.0
                            price = script.STIFFNESS / (views * size * size)
                            found.append(near - price * (down**2 + right**2))
                    total += max(found)
        return total

    rows = [each.reshape(1, -1) for each in (one, other)]
    expected = (one_way(one, other) + one_way(other, one)) / 2
    torch.testing.assert_close(script.similarities(*rows), expected.reshape(1, 1))
    torch.testing.assert_close(script.similarities(rows[0], rows[0]), torch.ones(1, 1))
    both = script.similarities(torch.cat(rows), rows[1])
    torch.testing.assert_close(both[1:], script.similarities(rows[1], rows[1]))


@needs_data
def test_alphabets_never_seen(script):
    sets = [script.read(Path(DATA, "omniglot"), name) for name in ("small1", "small2")]
    assert script.unseen_alphabets(*sets) == ["Japanese_(katakana)", "Sanskrit"]
    assert script.unseen_alphabets(*sets[::-1]) == ["Balinese", "Early_Aramaic", "Korean"]


@needs_data
def test_a_batch_has_groups_of_one_alphabet_and_the_same_drawers(script):
    known = data.omniglot(Path(DATA, "omniglot", "images_background_small1.zip"))
    batches = script.make_batches(known)
    batch, again = batches(random.key(0)), batches(random.key(0))
    for column, other in zip(batch, again, strict=True):
        assert torch.equal(column, other)
    assert not torch.equal(batch.places, batches(random.key(1)).places)

    characters, drawers = known.characters[batch.places], known.drawers[batch.places]
    assert torch.equal(characters, characters[:, :1].expand_as(characters))
    sizes = [*script.GROUPS, *(2 * script.PAIRED * [4])]
    groups = [x.split(sizes) for x in (characters[:, 0], drawers, batch.matrix, batch.offset)]
    for of, *shared in zip(*groups, strict=True):
        assert len({known.character_names[i].split("/")[0] for i in of}) == 1
        for column in shared:
            assert torch.equal(column, column[:1].expand_as(column))
        assert len(shared[0][0].unique()) == script.SAMPLES
    plain = sum(script.GROUPS)
    assert (batch.offset[:plain] == 0).all()
    assert (batch.size[:plain] == 1).all()
    labels = batch.labels[:plain]
    assert torch.equal(labels // 8, characters[:plain, 0])
    for group in labels.split(list(script.GROUPS)):
        assert len(group.unique()) == len(group)
        assert len((group % 8).unique()) == 1  # seen alike

    # Four classes of two characters each, of four characters; all their labels differ.
    assert len(batch.labels[plain:].unique()) == 4 * script.PAIRED
    first, second = batch.offset[plain:].chunk(2)
    assert torch.equal(first, -second)
    assert 0.05 < float(batch.size[plain:].min()) < 1
    # The first groups are cut, each along one line; the others are not.
    cuts = batch.cut.split(4)
    assert [float(cut.norm(dim=1).sum()) for cut in cuts] == pytest.approx([4, 0])
    for cut, offset in zip(cuts, first.split(4), strict=True):
        assert torch.equal(cut, cut[:1].expand_as(cut))
        assert (cut.any() and not offset.any()) or (offset.any() and not cut.any())
    parts = characters[plain:, 0].chunk(2)
    hands = drawers[plain:].chunk(2)
    assert torch.equal(*hands)
    for pair in zip(*(part.split(4) for part in parts), strict=True):
        assert len(torch.cat(pair).unique()) == 4
        assert len(torch.stack(pair, 1).unique(dim=0)) == 4


@needs_data
def test_views_of_pairs_hold_the_ink_of_both(script):
    known = data.omniglot(Path(DATA, "omniglot", "images_background_small2.zip"))
    views, labels = script.make_views(few(known))(random.key(0))
    classes = sum(script.GROUPS) + 4 * script.PAIRED + 4 * script.MADE_UP
    assert views.shape == (classes * script.SAMPLES, 1, script.SIZE, script.SIZE)
    assert torch.equal(labels[:: script.SAMPLES], labels[script.SAMPLES - 1 :: script.SAMPLES])
    ink = views.mean((1, 2, 3))
    plain = sum(script.GROUPS) * script.SAMPLES
    paired = plain + 4 * script.PAIRED * script.SAMPLES
    assert ink[plain:paired].mean() > 1.1 * ink[:plain].mean()
    assert len(labels.unique()) >= 4 * (script.PAIRED + script.MADE_UP)
    made_up = labels[paired:]
    assert len(made_up.unique()) == 4 * script.MADE_UP
    assert made_up.min() > labels[:paired].max()


def test_convolutions_are_matrices_to_the_optimizer(script):
    params, grads = (
        TensorDict({"layer1": {"conv1": {"weight": random.normal(key, (4, 2, 3, 3))}}})
        for key in random.split(random.key(0))
    )
    wrapped, muon = script.as_matrices(optim.muon(0.1)), optim.muon(0.1)
    updates, _ = wrapped.update(grads, wrapped.init(params), params)
    params, grads = (column.apply(lambda leaf: leaf.flatten(1)) for column in (params, grads))
    expected, _ = muon.update(grads, muon.init(params), params)
    for found, flat in zip(tree.leaves(updates), tree.leaves(expected), strict=True):
        assert found.shape == (4, 2, 3, 3)
        assert torch.equal(found.flatten(1), flat)

    params, _ = tree.partition(script.model.init(random.key(0)))
    flat = params.apply(lambda leaf: leaf.flatten(1) if leaf.ndim > 2 else leaf)
    chosen = [p[-3:] for p, leaf in tree.leaves_with_path(flat) if script.is_block_matrix(p, leaf)]
    blocks = [f"layer{i}" for i in (1, 2, 3)]
    assert sorted(chosen) == sorted(
        [(block, conv, "weight") for block in blocks for conv in ("conv1", "conv2")]
        + [(block, "downsample", "0", "weight")[-3:] for block in blocks[:2]]
    )


def strokes(seed, n=3, side=105):
    """Ink in a box somewhere: rectangles of no symmetry."""
    ink = torch.zeros(n, 1, side, side)
    for i, corner in enumerate(random.randint(random.key(seed), (n, 2), 5, 40).tolist()):
        down, right = corner
        ink[i, 0, down : down + 40, right : right + 6] = 1
        ink[i, 0, down : down + 6, right : right + 25 + 5 * i] = 1
    return ink


def test_views_are_centred_and_fill_the_square(script):
    drawings = script.drawings_of(strokes(0))
    plain = torch.eye(2).expand(3, 2, 2)
    views = script.look(drawings, plain)
    moved = script.look(script.drawings_of(strokes(1)), plain)
    torch.testing.assert_close(views, moved, atol=1e-4, rtol=0)  # where it was does not matter
    columns, rows = ((views[:, 0].amax(axis) > 0.5).float() for axis in (1, 2))
    for i in range(3):
        inked = rows[i].nonzero()
        assert abs(inked.float().mean() - 23.5) <= 1
        assert 36 <= len(inked) <= 41  # 48 / 1.25
    assert (columns.sum(1).diff() > 0).all()
    for i, width in enumerate((25, 30, 35)):  # wider than drawn, by the root of the ratio
        assert columns[i].sum() == pytest.approx(48 / 1.25 * (width / 40) ** 0.5, abs=2)


def test_parts_are_joined_whole_or_at_a_line(script):
    one = torch.ones(4, 1, script.SIZE, script.SIZE)
    cut = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, -1.0], [1.0, 0.0]])
    joined = script.join(one, 2 * one, cut, torch.tensor([0.5, 0.0, 0.0, 0.5]))[:, 0]
    half, quarter = script.SIZE // 2, script.SIZE // 4
    assert (joined[0] == 2).all()
    assert (joined[1, :, half:] == 1).all()
    assert (joined[1, :, :half] == 2).all()
    assert (joined[2, :half] == 1).all()
    assert (joined[2, half:] == 2).all()
    assert (joined[3, :, quarter:] == 1).all()
    assert (joined[3, :, :quarter] == 2).all()


def test_the_symmetries_are_those_of_the_square(script):
    drawings = script.drawings_of(strokes(0)[:1])
    views = [script.look(drawings, matrix[None])[0, 0] for matrix in script.SYMMETRIES]
    expected = [
        torch.rot90(side, turns) for side in (views[0], views[0].flip(1)) for turns in range(4)
    ]
    for view in views:
        distances = [(view - other).abs().max() for other in expected]
        assert min(distances) < 1e-4
    pairs = [(a - b).abs().max() for i, a in enumerate(views) for b in views[:i]]
    assert min(pairs) > 0.1


def test_knots_are_joined_as_torch_does(script):
    knots = random.normal(random.key(0), (3, 2, 5, 5))
    size = script.SIZE, script.SIZE
    expected = F.interpolate(knots, size, mode="bicubic", align_corners=True)
    found = script.BETWEEN @ knots @ script.BETWEEN.T
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_redrawing_is_a_function_of_the_key_and_keeps_the_drawing(script):
    drawings = script.drawings_of(strokes(0))
    whole = torch.eye(2).expand(3, 2, 2), torch.ones(3, 2), torch.zeros(3, 2)
    first, again, other = (script.redraw(random.key(seed), drawings, *whole) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    views = script.look(drawings, whole[0])
    for changed in (first, other):
        assert 0.02 < (changed - views).abs().mean() < 0.3
    assert (first - other).abs().mean() > 0.02

    # In the left half: little ink in the right one, and none where the view is as before.
    left = torch.tensor([0.5, 1.0]).expand(3, 2), torch.tensor([-0.5, 0.0]).expand(3, 2)
    placed = script.redraw(random.key(0), drawings, whole[0], *left)
    sides = [side.sum() for side in placed.chunk(2, dim=3)]
    assert sides[1] < 0.2 * sides[0]

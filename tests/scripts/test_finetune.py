"""scripts/finetune.py on real data, for a step of each way; and what each of them trains."""

from __future__ import annotations

import itertools
import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict

from funcnets import data, finetuning, random, training, tree

SCRIPT = Path(__file__).parents[2] / "scripts" / "finetune.py"
DATA = os.environ.get("FUNCNETS_DATA")
WAYS = [
    "new head, features frozen",
    "unfrozen layer by layer",
    "LoRA of rank 8 and new head",
    "all at once, rates by depth",
    "from scratch",
]


@pytest.fixture(scope="module")
def script():
    return SimpleNamespace(**runpy.run_path(str(SCRIPT), run_name="finetune"))


@pytest.mark.skipif(DATA is None, reason="needs Omniglot in FUNCNETS_DATA")
def test_a_step_of_each_way(script, tmp_path, monkeypatch, capsys):
    arguments = ["--data", f"{DATA}/omniglot", "--output", str(tmp_path)]
    arguments += ["--first-steps", "1", "--steps", "1", "--drawers", "19"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    script.main()
    printed = " ".join(capsys.readouterr().out.split())
    assert "2720 drawings of 136 characters" in printed
    assert "106 characters of Japanese_(katakana), Sanskrit, Tagalog: 2014 drawings" in printed
    assert "106 by others to test with" in printed
    for way in WAYS:
        assert way in printed
    figure = (tmp_path / "finetune.png").read_bytes()
    assert figure.startswith(b"\x89PNG")
    assert len(figure) > 10_000


def test_other_drawers_of_other_alphabets_are_for_testing(script):
    def drawings(names):
        """Of each alphabet two characters by three drawers, the ink saying which."""
        of = [(a, c, d) for a in range(len(names)) for c in range(2) for d in range(3)]
        alphabets, characters, drawers = (torch.tensor(column) for column in zip(*of, strict=True))
        characters = 2 * alphabets + characters
        images = (100 * characters + drawers)[:, None, None, None].float()
        characters_names = tuple(f"{name}/{c}" for name in names for c in range(2))
        return data.Omniglot(images, characters, alphabets, drawers, characters_names, names)

    known, other = drawings(("Greek",)), drawings(("Arabic", "Greek", "Tamil"))
    few, test, names = script.split(known, other, 2)
    assert names == ("Arabic", "Tamil")
    assert few.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert test.labels.tolist() == [0, 1, 2, 3]
    assert few.images.flatten().tolist() == [0, 1, 100, 101, 400, 401, 500, 501]
    assert test.images.flatten().tolist() == [2, 102, 402, 502]


def test_what_each_way_begins_from_and_trains(script):
    known = script.network(7).init(random.key(0))
    known["bn1", "running_mean"] += 0.01
    ways = script.ways(known, 3, 5, random.key(1))
    assert list(ways) == WAYS
    batch = random.uniform(random.key(2), (6, 1, 28, 28)), torch.arange(6) % 3
    below, _ = tree.partition(tree.partition(known, "fc")[1])
    for name, way in ways.items():
        begun = way.params["base"] if "LoRA" in name else way.params
        assert begun["fc", "weight"].shape == (3, 64)
        kept = [torch.equal(leaf, begun[p]) for p, leaf in tree.leaves_with_path(below)]
        assert all(kept) == (name != "from scratch")
        assert (begun["bn1", "running_mean"] > 0).all() == (name != "from scratch")

        step = training.make_step(
            way.model, torch.nn.functional.cross_entropy, way.optimizer, trainable=way.trainable
        )
        state = step.init(way.params, random.key(3))
        seen = [state]
        for _ in range(5):
            seen.append(step(seen[-1], batch)[0])
        moved = []
        for old, new in itertools.pairwise(seen):
            old, new = training.parameters(old), training.parameters(new)
            if "LoRA" in name:
                old, new = (finetuning.apply_lora(x["base"], x["lora"]) for x in (old, new))
            trainable, _ = tree.partition(new)
            moved.append(
                {p[0] for p, x in tree.leaves_with_path(trainable) if not torch.equal(x, old[p])}
            )
        everything = set(known.keys())
        layers = {"layer1", "layer2", "layer3"}
        if "features frozen" in name:
            assert moved == [{"fc"}] * 5
        elif "layer by layer" in name:
            down = ["fc", "layer3", "layer2", "layer1"]
            assert moved == [set(down[: i + 1]) for i in range(4)] + [everything]
        elif "LoRA" in name:
            # The second factors are zero at first, so from the first step on they change all.
            assert moved == [{"fc"} | layers] * 5
        else:
            assert moved == [everything] * 5
        pairs = zip(tree.leaves(seen[0].buffers), tree.leaves(seen[-1].buffers), strict=True)
        buffers = list(itertools.starmap(torch.equal, pairs))
        assert all(buffers) == ("features frozen" in name or "LoRA" in name)


def test_redrawing_is_a_function_of_the_key_and_keeps_the_drawing(script):
    images = torch.zeros(4, 1, 28, 28)
    images[..., 8:20, 8:12] = 1
    first, again, other = (script.redraw(random.key(seed), images) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    for changed in (first, other):
        assert 0.01 < (changed - images).abs().mean() < 0.15
        torch.testing.assert_close(changed.sum(), images.sum(), rtol=0.3, atol=0)
    assert not torch.allclose(first, other)
    assert not torch.allclose(first[0], first[1])


def test_training_is_that_of_the_way(script):
    way = script.ways(script.network(7).init(random.key(0)), 3, 2, random.key(1))[WAYS[0]]
    known = script.Drawings(random.uniform(random.key(2), (6, 1, 28, 28)), torch.arange(6) % 3)
    params, outcome = script.train(way, known, 2, random.key(3), known)
    assert list(outcome.accuracies) == [1, 2]
    assert outcome.trained == 3 * 64 + 3
    assert isinstance(params, TensorDict)
    found = training.accuracy(way.model.apply(params, known.images), known.labels)
    assert outcome.accuracies[2] == pytest.approx(float(found))

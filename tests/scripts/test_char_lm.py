"""scripts/char_lm.py: its text, a training that is stopped and goes on, and a run end to end."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from funcnets import random, tree

PATH = Path(__file__).parents[2] / "scripts" / "char_lm.py"
KEY = random.key(3)
SMALL = ["--context=8", "--width=8", "--depth=1", "--heads=2", "--batch=3", "--characters=12"]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("char_lm", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog.\n" * 20)
    return path


def run(script, monkeypatch, text_file, output, *options):
    flags = [*SMALL, "--data", str(text_file), "--output", str(output), "--prompt", "the "]
    monkeypatch.setattr(sys, "argv", ["char_lm.py", *flags, *map(str, options)])
    script.main()


def test_the_text_as_numbers(script, text_file):
    text = script.read_text(text_file, None)
    written = text_file.read_text()
    assert text.decode(torch.cat([text.train, text.validation])) == written
    assert len(text.train) == int(0.9 * len(written))
    assert text.decode(text.encode("fox")) == "fox"
    with pytest.raises(ValueError, match="prompt: expected characters of the text, got 'QZ'"):
        text.encode("ZaQ")


def test_an_epoch_reads_all_of_the_text_once(script):
    tokens, context = torch.arange(100), 7
    places = script.starts(KEY, len(tokens), context, 30)
    read = tokens.unfold(0, context + 1, 1)[places]
    assert read.shape == (30, 8)
    for epoch in (read[:13], read[13:26]):
        seen = epoch[:, :-1].flatten().sort().values
        assert torch.equal(seen, torch.arange(int(seen[0]), int(seen[0]) + 91))
    assert not torch.equal(places[:13], places[13:26])
    with pytest.raises(ValueError, match="text: expected at least 15 characters, got 14"):
        script.starts(KEY, 14, context, 1)


def test_a_character_sees_those_before_at_once_and_none_behind(script):
    plain = script.models.gpt(5, 6, width=4, depth=2, heads=2)
    model = script.with_neighbours(plain, ["embedding", "layers.0"])
    params, ones = model.init(KEY), torch.ones(3, 4)
    tokens = random.randint(KEY, (2, 6), 0, 5)
    assert torch.equal(model.apply(params, tokens), plain.apply(params["gpt"], tokens))
    # Of the embedding the vectors of the pairs, and what is three places back at most.
    params["pairs"] = random.normal(KEY, (25, 4))
    params["shift", "embedding"] = ones
    before = torch.cat([torch.zeros(2, 1, dtype=tokens.dtype), tokens[:, :5]], 1)

    def changed(x):
        x = x + params["pairs"][5 * before + tokens]
        return x + sum(F.pad(x, (0, 0, i, 0))[:, :6] for i in (1, 2, 3))

    expected, _ = plain.apply(params["gpt"], tokens, taps={"embedding": changed})
    torch.testing.assert_close(model.apply(params, tokens), expected)
    params["shift", "layers_0"] = ones
    logits = model.apply(params, tokens)
    assert not torch.allclose(logits, expected)
    other = tokens.clone()
    other[:, 3] = (tokens[:, 3] + 1) % 5
    same = (model.apply(params, other) == logits).all(-1)
    assert same[:, :3].all()
    assert not same[:, 3:].any()


def test_the_loss_of_a_text_is_the_mean_over_all_its_whole_windows(script):
    class Uniform:
        @staticmethod
        def apply(params, tokens):
            """One more nat for the token that follows, at the first place of a window alone."""
            logits = torch.zeros(*tokens.shape, 5)
            logits[:, 0] += torch.nn.functional.one_hot((tokens[:, 0] + 1) % 5, 5)
            return logits

    tokens = torch.arange(2000) % 5
    chance = math.log(5)
    known = math.log(4 + math.e) - 1
    found = script.evaluate(None, Uniform, tokens, 4)
    assert found == pytest.approx((known + 3 * chance) / 4, rel=1e-5)


def test_stopped_and_resumed_it_ends_as_if_never_stopped(
    script, monkeypatch, text_file, tmp_path, capsys
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(script, monkeypatch, text_file, whole, "--steps", 6, "--every", 2)

    class StopError(Exception):
        pass

    save = script.training.Checkpoints.save
    for at in (4, 6):  # of each run, stopped when this step has been written

        def save_and_stop(self, state, step, metadata, at=at):
            save(self, state, step, metadata)
            if step == at < 6:
                raise StopError

        monkeypatch.setattr(script.training.Checkpoints, "save", save_and_stop)
        options = "--steps", 6, "--every", 2, "--resume", "--networks", "gpt"
        if at < 6:
            with pytest.raises(StopError):
                run(script, monkeypatch, text_file, parts, *options)
        else:
            run(script, monkeypatch, text_file, parts, *options)
    ended = [script.funcnets.load(folder / "gpt.safetensors")[1] for folder in (whole, parts)]
    assert all(tree.leaves(tree.map(torch.equal, *ended)))
    histories = [
        script.funcnets.read_metadata(
            script.training.Checkpoints(folder / "gpt_checkpoints").path(6)
        )["history"]
        for folder in (whole, parts)
    ]
    for history in histories:
        assert [record["step"] for record in history] == [2, 4, 6]
        assert [len(record["losses"]) for record in history] == [2, 2, 2]
    for name in ("evaluation", "losses"):
        assert [r[name] for r in histories[0]] == [r[name] for r in histories[1]]

    assert (whole / "losses.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "lstm" in printed
    assert "the " in printed
    with pytest.raises(ValueError, match="gpt_checkpoints: expected a checkpoint of"):
        run(script, monkeypatch, text_file, parts, "--steps", 8, "--resume", "--networks", "gpt")

"""scripts/char_lm.py: its text, a training that is stopped and goes on, and a run end to end."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

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

    write = script.write_checkpoint
    for at in (4, 6):  # of each run, stopped when this step has been written

        def write_and_stop(path, state, metadata, at=at):
            write(path, state, metadata)
            if int(state.step) == at < 6:
                raise StopError

        monkeypatch.setattr(script, "write_checkpoint", write_and_stop)
        options = "--steps", 6, "--every", 2, "--resume", "--networks", "gpt"
        if at < 6:
            with pytest.raises(StopError):
                run(script, monkeypatch, text_file, parts, *options)
        else:
            run(script, monkeypatch, text_file, parts, *options)
    ended = [script.funcnets.load(folder / "gpt.safetensors")[1] for folder in (whole, parts)]
    assert all(tree.leaves(tree.map(torch.equal, *ended)))
    records = [
        script.funcnets.read_metadata(folder / "gpt_checkpoint.safetensors")
        for folder in (whole, parts)
    ]
    assert records[0]["validation"] == records[1]["validation"]
    assert [step for step, _ in records[0]["validation"]] == [2, 4, 6]

    assert (whole / "losses.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "lstm" in printed
    assert "the " in printed
    with pytest.raises(ValueError, match=r"gpt_checkpoint\.safetensors: expected a checkpoint of"):
        run(script, monkeypatch, text_file, parts, "--steps", 8, "--resume", "--networks", "gpt")

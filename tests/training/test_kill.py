"""A run that is killed at random moments and resumed ends with the bits of one that was not."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from networks import assert_equal

import funcnets

PROGRAM = Path(__file__).with_name("killed_program.py")


@pytest.fixture(scope="module")
def server():
    root = str(Path(funcnets.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, str(PROGRAM)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    ) as process:

        def run(network, folder, seconds):
            folder.mkdir(exist_ok=True)
            process.stdin.write(f"{network} {folder} {seconds}\n")
            process.stdin.flush()
            return process.stdout.readline().strip()

        assert process.stdout.readline().strip() == "ready"
        yield run
        process.stdin.close()


def final(folder):
    params = funcnets.load(folder / "final.safetensors")[1]
    return params, funcnets.read_metadata(folder / "final.safetensors")


def lines(folder):
    return len((folder / "log.jsonl").read_text().splitlines())


@pytest.mark.parametrize("network", ["mlp", "cnn", "gpt"])
def test_killed_and_resumed(network, server, tmp_path, request):
    kills = 20 if request.config.getoption("--full") else 2
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    began = time.monotonic()
    assert server(network, whole, 0) == "finished"
    seconds = time.monotonic() - began
    # Random moments, from before the first step to after the last: each is a run's end, and a run
    # that finishes before its moment begins again from nothing.
    chosen, done, rounds = random.Random(network), 0, 0
    while done < kills:
        outcome = server(network, parts, chosen.uniform(0.02, 0.6) * seconds)
        assert outcome in ("killed", "finished")
        done += outcome == "killed"
        if outcome == "finished":
            assert_same(parts, whole)
            rounds += 1
            parts = tmp_path / f"parts{rounds}"
    assert server(network, parts, 0) == "finished"
    assert_same(parts, whole)


def assert_same(parts, whole):
    (params, told), (expected, wanted) = final(parts), final(whole)
    assert_equal(params, expected)
    assert told == wanted
    assert lines(parts) == lines(whole)

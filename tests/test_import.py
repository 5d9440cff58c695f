"""`import funcnets` brings no more than it needs; what is put off is there when it is asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

import funcnets

PROGRAM = """
import sys
import torch, tensordict
before = set(sys.modules)
import funcnets
brought = {name.partition(".")[0] for name in set(sys.modules) - before}
heavy = {"torchvision", "PIL", "hypothesis", "sklearn", "scipy", "matplotlib", "rich", "beartype"}
assert not brought & heavy, brought & heavy
later = {f"funcnets.{name}" for name in ("data", "ensembles", "models", "testing", "training")}
assert not later & set(sys.modules), later & set(sys.modules)
for name in funcnets.__all__:
    assert name in dir(funcnets), name
    getattr(funcnets, name)
assert funcnets.grow is __import__("funcnets.growth", fromlist=["grow"]).grow
from funcnets import layers, models
assert "torchvision" not in sys.modules
"""


def test_import_brings_nothing_heavy_and_the_rest_when_asked():
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'funcnets' has no attribute 'serialisation'"):
        _ = funcnets.serialisation

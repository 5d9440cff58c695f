"""The code of the README runs, block after block, as it stands there."""

import functools
import re
from pathlib import Path

import torch

import funcnets

README = Path(__file__).parents[1] / "README.md"


def test_the_code_of_the_readme(capsys, monkeypatch):
    # Inductor takes minutes here and has tests of its own.
    quick = functools.partial(funcnets.compile, backend="aot_eager")
    monkeypatch.setattr(funcnets, "compile", quick)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 24
    namespace: dict = {}
    with torch.random.fork_rng():  # the page makes its data with torch.rand
        for block in blocks:
            exec(compile(block, str(README), "exec"), namespace)
    printed = capsys.readouterr().out
    # What the comments of the page promise to be printed.
    assert "3: missing; expected weight [128, 128], bias [128]" in printed
    assert "0.weight" in printed
    assert "  failed  samples_are_independent" in printed
    assert (
        "again:    funcnets.testing.sample(model, inputs, seed=0, values='normal', batch=2"
        in printed
    )
    assert "total" in printed or "trainable" in printed


def test_the_commands_of_the_readme_are_those_of_the_project():
    text = README.read_text()
    assert "python -m pip install uv && uv run scripts/quickstart.py" in text
    assert "python -m pip install uv && uv run pytest" in text
    assert "uv run pytest" in (README.parent / ".ci" / "run").read_text()

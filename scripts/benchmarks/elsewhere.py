"""A contender in a process of its own, asked for one step at a time: Equinox with optax."""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import machine, networks
from benchmarks.race import Contender, MissingError

PROGRAM = Path(__file__).with_name("equinox_rivals.py")


def needs(*packages: str) -> None:
    """An error that says what is not installed, and how to get it."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingError(f"no {', '.join(missing)}: uv run --group bench brings it")


def elsewhere(workload: str, params: Any, x: Tensor, y: Tensor) -> Contender:
    """Equinox's side of a workload, beginning with the same parameters."""
    needs("jax", "equinox", "optax")
    folder = Path(tempfile.mkdtemp())
    data = networks.named(params) | {"x": x, "y": y}
    held = {name: leaf.detach().cpu().contiguous() for name, leaf in data.items()}
    save_file(held, folder / "data.safetensors")
    threads = torch.get_num_threads()
    environment = os.environ | {"NPROC": str(threads)}  # as many threads as we have
    if not machine.GPU:
        environment["JAX_PLATFORMS"] = "cpu"
    if threads == 1:
        environment["XLA_FLAGS"] = (
            "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        )
    process = subprocess.Popen(
        [sys.executable, PROGRAM, workload, folder],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(process.kill)

    def ask(what: str) -> Any:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{what}\n")
        process.stdin.flush()
        if not (line := process.stdout.readline()):
            raise RuntimeError(f"{PROGRAM.name} has ended; its own message is above")
        return json.loads(line)

    def result() -> dict[str, Tensor]:
        ask("result")
        return load_file(folder / "result.safetensors")

    return Contender(lambda: float(ask("step")), result)

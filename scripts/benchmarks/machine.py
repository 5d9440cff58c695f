"""What the benchmark runs on, how fast that is, and the floor it sets to a step."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"
PACKAGES = ("torch", "torchvision", "tensordict", "jax", "equinox", "optax", "opacus")


@contextlib.contextmanager
def precision() -> Iterator[None]:
    """bfloat16 where there is a GPU, for us and our rivals; float32 elsewhere."""
    with torch.autocast("cuda", torch.bfloat16, enabled=GPU):
        yield


def place(tensor: Tensor) -> Tensor:
    """On the device, and there, for images and the weights of convolutions, channels last."""
    if GPU and tensor.ndim == 4:
        return tensor.to(DEVICE, memory_format=torch.channels_last)
    return tensor.to(DEVICE)


def place_module(network: nn.Module) -> nn.Module:
    """On the device, as `place` has it."""
    network.to(DEVICE)
    return network.to(memory_format=torch.channels_last) if GPU else network


def synchronize() -> None:
    """Waits for the device."""
    if GPU:
        torch.cuda.synchronize()


def seconds(f: Callable[[], Any]) -> float:
    """How long f takes, unless it says so itself, as what runs in another process does."""
    synchronize()
    begin = time.perf_counter()
    found = f()
    synchronize()
    return found if isinstance(found, float) else time.perf_counter() - begin


@functools.cache
def rates() -> tuple[float, float]:
    """Operations and bytes a second: of a product of two matrices, and of a copy."""
    n, dtype = (8192, torch.bfloat16) if GPU else (1024, torch.float32)
    a = torch.ones(n, n, device=DEVICE, dtype=dtype)
    source = torch.ones(2**28 if GPU else 2**25, device=DEVICE)
    target = torch.empty_like(source)
    product = statistics.median([seconds(lambda: a @ a) for _ in range(9)][2:])
    copy = statistics.median([seconds(lambda: target.copy_(source)) for _ in range(9)][2:])
    return 2 * n**3 / product, 2 * source.nbytes / copy


class _Bytes(TorchDispatchMode):
    """The bytes of all that matrix products and convolutions read and write."""

    total = 0

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = f(*args, **(kwargs or {}))
        if f._overloadpacket in flop_registry:
            held = tree_leaves((args, kwargs, found))
            self.total += sum(leaf.nbytes for leaf in held if isinstance(leaf, Tensor))
        return found


def floor(step: Callable[[], Any], updated: int) -> dict[str, float]:
    """What a step must take here if all but the arithmetic itself were free.

    The larger of its operations at the rate of a product of matrices, and, at that of a copy, the
    bytes that products and convolutions read and write, and the eight passes of Adam over the
    ``updated`` numbers (gradient written and read; parameter and moments read and written).
    """
    with FlopCounterMode(display=False) as flops, _Bytes() as moved:
        step()
    operations, moved_bytes = flops.get_total_flops(), moved.total + 8 * 4 * updated
    rate, bandwidth = rates()
    return {
        "operations": operations,
        "bytes": moved_bytes,
        "seconds": max(operations / rate, moved_bytes / bandwidth),
    }


def describe() -> dict[str, Any]:
    """Hardware, versions and measured rates."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if "model name" in line), name)
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    rate, bandwidth = rates()
    return {
        "device": torch.cuda.get_device_name() if GPU else name,
        "dtype": "bfloat16" if GPU else "float32",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
        "gflops": rate / 1e9,
        "gbytes": bandwidth / 1e9,
    }

"""The most memory that a training step holds at one moment."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import machine, networks, steps
from benchmarks.race import Contender, Row, Settings, Workloads, compare, is_compiled
from funcnets import Model, models, random


def live() -> int:
    """Bytes of all tensors that Python holds; those that share memory count once."""
    gc.collect()
    held: dict[int, int] = {}
    for found in gc.get_objects():
        # By its type alone: fake tensors, and those that were donated, hold no memory.
        if type(found) in (Tensor, nn.Parameter) and found.device.type == machine.DEVICE.type:
            with contextlib.suppress(NotImplementedError):  # a wrapper of what vmap maps over
                storage = found.untyped_storage()
                held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


def growth_within(step: Callable[[], Any]) -> int:
    """How many bytes a step holds at its peak beyond what is held before it."""
    if machine.GPU:
        machine.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        machine.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    found = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(found, key=lambda event: event[0]):
        held += change
        peak = max(peak, held)
    return peak


def peaks(
    workload: str,
    contenders: dict[str, Callable[[], Contender]],
    start: dict[str, Tensor],
    quick: bool,
) -> Row:
    """The peak of each, built alone: what it holds before a step, and what the step adds."""
    row = Row(workload, 1.0, None)
    held: dict[str, Contender] = {}
    for name, build in contenders.items():
        if quick and is_compiled(name):
            continue
        before = live()
        held[name] = build()
        with machine.precision():
            for _ in range(2):
                held[name].step()
            own = live() - before
            total = own + growth_within(held[name].step)
        row.contenders[name] = {"bytes": total, "held": own}
    row.reported = compare(held, start)
    ours = [name for name in row.contenders if name.startswith("funcnets")]
    row.ours = min(ours, key=lambda name: row.contenders[name]["bytes"])
    row.rival = "nn.Module, eager"
    if row.rival not in row.reported:
        row.value = row.contenders[row.ours]["bytes"] / row.contenders[row.rival]["bytes"]
    return row


def training_step(
    name: str, model: Model, build: Any, loss: networks.Loss, x: Tensor, y: Tensor, quick: bool
) -> Row:
    """Ours, donated, beside a module with fused Adam."""
    params, batch = model.init(random.key(0)), (machine.place(x), machine.place(y))
    start, step = networks.pure_step(model, loss)

    def fresh() -> Any:
        return start(networks.copied(params))

    contenders = {
        "funcnets, eager": lambda: networks.pure(step, fresh(), *batch),
        "funcnets, donated, compiled": lambda: networks.donated(step, fresh(), *batch),
        "nn.Module, eager": lambda: networks.module(build(), loss, params, *batch),
        "nn.Module, compiled": lambda: networks.module(
            build(), loss, params, *batch, mode="default"
        ),
    }
    return peaks(f"peak memory, {name}", contenders, networks.named(params), quick)


def resnet18(settings: Settings) -> list[Row]:
    """16 images of 64 x 64."""
    x, y = steps.images(2 if settings.quick else 16, 32 if settings.quick else 64)

    def build() -> Any:
        return torchvision.models.resnet18(num_classes=10)

    model = models.resnet18(num_classes=10)
    return [training_step("ResNet-18", model, build, F.cross_entropy, x, y, settings.quick)]


WORKLOADS: Workloads = {"peak memory, ResNet-18": resnet18}

"""One Adam step of many networks of one kind, on the same batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from tensordict import TensorDict
from tensordict.nn import EnsembleModule, TensorDictModule
from torch import Tensor, nn
from torch.func import stack_module_state, vmap

import funcnets
from benchmarks import machine, networks
from benchmarks.elsewhere import elsewhere
from benchmarks.race import Case, Contender, races
from funcnets import Model, ensembles, models, random, tree


def ensemble(
    model: Model,
    build: Callable[[], nn.Module],
    members: int,
    x: Tensor,
    y: Tensor,
    equinox: str | None = None,
) -> Case:
    """All members at once by us, by torch.func, tensordict and Equinox; one by one by nn.Module."""
    params = vmap(model.init)(random.split(random.key(0), members))
    batch = machine.place(x), machine.place(y)
    first, step = networks.pure_step(model, F.cross_entropy)
    start, all_at_once = vmap(first), vmap(step, (0, None, None))
    chosen = ensembles.chunked(step, "auto", (0, None, None))

    def fresh() -> Any:
        return networks.copied(params)

    def rival(make: Callable[..., Contender], *flags: Any) -> Callable[[], Contender]:
        return lambda: make(build, fresh(), *batch, *flags)

    contenders = {
        "funcnets, eager": lambda: networks.pure(all_at_once, start(fresh()), *batch),
        "funcnets, fused torch.optim": lambda: networks.torch_optim(
            model, F.cross_entropy, fresh(), *batch, members=True
        ),
        "funcnets, chunk chosen, eager": lambda: networks.pure(chosen, start(fresh()), *batch),
        "funcnets, compiled": lambda: networks.donated(all_at_once, start(fresh()), *batch),
        "funcnets, fused torch.optim, compiled": lambda: networks.torch_optim(
            model, F.cross_entropy, fresh(), *batch, members=True, compiled=True
        ),
        "funcnets, one by one, compiled": lambda: one_by_one(step, start(fresh()), *batch),
        "nn.Module one by one, eager": rival(loop, False),
        "nn.Module one by one, compiled": rival(loop, True),
        "torch.func, eager": rival(stacked, False),
        "torch.func, compiled": rival(stacked, True),
    }
    if not tree.leaves(tree.partition(params)[1]):  # its vmap stops at running statistics
        contenders["EnsembleModule, eager"] = rival(ensemble_module)
    if equinox is not None:
        contenders["Equinox, jit"] = lambda: elsewhere(equinox, params, x, y)
    if machine.GPU:
        contenders["funcnets, CUDA graph"] = lambda: networks.graphed(
            all_at_once, start(fresh()), *batch
        )
    return Case(networks.named(params), contenders, networks.count(params))


def one_by_one(step: Callable[..., Any], held: Any, x: Tensor, y: Tensor) -> Contender:
    """The compiled step of a member, called for each."""
    compiled, members = funcnets.compile(step, donate=0), tree.unstack(held)

    def run() -> None:
        nonlocal members
        members = [compiled(member, x, y) for member in members]

    def result() -> dict[str, Tensor]:
        return networks.named(tree.stack([tree.merge(own[0], own[1]) for own in members]))

    return Contender(run, result)


def modules(build: Callable[[], nn.Module], params: Any) -> list[nn.Module]:
    """A module for each member."""
    held = []
    for own in tree.unstack(params):
        network = build().train()
        tree.to_module(own, network)
        held.append(machine.place_module(network))
    return held


def loop(
    build: Callable[[], nn.Module], params: Any, x: Tensor, y: Tensor, compiled: bool
) -> Contender:
    """The members one after the other; Adam over all of their parameters at once."""
    held = modules(build, params)
    adam = torch.optim.Adam([p for m in held for p in m.parameters()], lr=networks.RATE, fused=True)

    # One graph serves them all.
    forward = [torch.compile(network) if compiled else network for network in held]

    def run() -> None:
        adam.zero_grad()
        for network in forward:
            F.cross_entropy(network(x), y).backward()
        adam.step()

    return Contender(
        run, lambda: networks.named(tree.stack([tree.from_module(network) for network in held]))
    )


def stacked(
    build: Callable[[], nn.Module], params: Any, x: Tensor, y: Tensor, compiled: bool
) -> Contender:
    """As in torch's tutorial: stack_module_state, and vmap of functional_call."""
    held = modules(build, params)
    weights, buffers = stack_module_state(held)
    weights = {name: weight.detach() for name, weight in weights.items()}
    return networks.functional(
        held[0], F.cross_entropy, weights, buffers, x, y, compiled, members=True
    )


def ensemble_module(build: Callable[[], nn.Module], params: Any, x: Tensor, y: Tensor) -> Contender:
    """tensordict's own: its parameters are stacked, its forward pass is a vmap."""
    network = TensorDictModule(build().to(machine.DEVICE), in_keys=["x"], out_keys=["logits"])
    held = EnsembleModule(network, num_copies=len(tree.leaves(params)[0]))
    values = {f"module.{name}": leaf for name, leaf in networks.named(params).items()}
    weights = {
        ".".join(path) if isinstance(path, tuple) else path: weight
        for path, weight in held.params_td.items(True, True)
    }
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(values[name])
    adam = torch.optim.Adam(held.parameters(), lr=networks.RATE, fused=True)
    count = len(tree.leaves(params)[0])
    data = TensorDict({"x": x})

    def run() -> None:
        adam.zero_grad()
        logits = held(data.copy())["logits"]
        F.cross_entropy(logits.flatten(0, 1), y.repeat(count)).mul(count).backward()
        adam.step()

    return Contender(
        run, lambda: {name.removeprefix("module."): weight for name, weight in weights.items()}
    )


def mlps(quick: bool, members: int = 32) -> Case:
    """Of 784-256-256-10, batch 128."""
    members, batch = (4, 16) if quick else (members, 128)
    x = random.normal(random.key(1), (batch, 784))
    y = random.randint(random.key(2), (batch,), 0, 10)
    model = models.mlp(784, 10, (256, 256))
    return ensemble(model, lambda: networks.mlp(784, 256, 256, 10), members, x, y, "mlps")


def convs(quick: bool, members: int = 8) -> Case:
    """Of two convolutions, 32 images of 28 x 28."""
    members, batch = (2, 4) if quick else (members, 32)
    x = random.normal(random.key(1), (batch, 1, 28, 28))
    y = random.randint(random.key(2), (batch,), 0, 10)
    model = models.cnn(1, 10, (32, 64), norm=None)
    return ensemble(model, lambda: networks.Conv(1, 32, 64), members, x, y, "convs")


def resnets(quick: bool, members: int = 8) -> Case:
    """ResNet-18, eight images of 32 x 32."""
    members, batch = (2, 8) if quick else (members, 8)
    x = random.normal(random.key(1), (batch, 3, 32, 32))
    y = random.randint(random.key(2), (batch,), 0, 10)

    def build() -> nn.Module:
        return torchvision.models.resnet18(num_classes=10)

    return ensemble(models.resnet18(num_classes=10), build, members, x, y)


WORKLOADS = races(
    {
        "ensemble of 32 MLPs": ({"": 0.95}, mlps),
        "ensemble of 8 conv nets": ({"": 0.95}, convs),
        "ensemble of 8 ResNet-18": ({"": 0.95}, resnets),
    }
)

GPU_WORKLOADS = races(
    {
        "ensemble of 64 MLPs": ({"": 0.95}, partial(mlps, members=64)),
        "ensemble of 64 conv nets": ({"": 0.95}, partial(convs, members=64)),
        "ensemble of 64 ResNet-18": ({"": 0.95}, partial(resnets, members=64)),
    }
)

"""One training step of one network: forward, loss, gradient, Adam."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from benchmarks import machine, networks
from benchmarks.race import Case, races
from funcnets import Model, models, random


def training_step(
    model: Model, build: Callable[[], nn.Module], x: Tensor, y: Tensor, loss: networks.Loss
) -> Case:
    """One step by us, by nn.Module and by torch.func, each eager and compiled."""
    params, batch = model.init(random.key(0)), (machine.place(x), machine.place(y))
    start, step = networks.pure_step(model, loss)

    def fresh() -> Any:
        return networks.copied(params)

    contenders = {
        "funcnets, eager": lambda: networks.pure(step, start(fresh()), *batch),
        "funcnets, fused torch.optim": lambda: networks.torch_optim(model, loss, fresh(), *batch),
        "funcnets, backward()": lambda: networks.backward(model, loss, fresh(), *batch),
        "funcnets, compiled": lambda: networks.donated(step, start(fresh()), *batch),
        "funcnets, fused torch.optim, compiled": lambda: networks.torch_optim(
            model, loss, fresh(), *batch, compiled=True
        ),
        "nn.Module, eager": lambda: networks.module(build(), loss, params, *batch),
        "nn.Module, compiled": lambda: networks.module(
            build(), loss, params, *batch, mode="default"
        ),
        "torch.func, eager": lambda: networks.torch_func(build(), loss, fresh(), *batch, False),
        "torch.func, compiled": lambda: networks.torch_func(build(), loss, fresh(), *batch, True),
    }
    if machine.GPU:
        contenders |= {
            "funcnets, CUDA graph": lambda: networks.graphed(step, start(fresh()), *batch),
            "nn.Module, CUDA graph": lambda: networks.module(
                build(), loss, params, *batch, mode="reduce-overhead"
            ),
        }
    return Case(networks.named(params), contenders, networks.count(params))


def images(batch: int, size: int, classes: int = 10) -> tuple[Tensor, Tensor]:
    """[batch, 3, size, size], and their classes."""
    shape = (batch, 3, size, size)
    return random.normal(random.key(1), shape), random.randint(random.key(2), (batch,), 0, classes)


def resnet18(quick: bool) -> Case:
    """16 images of 64 x 64."""
    model = models.resnet18(num_classes=10)

    def build() -> nn.Module:
        return torchvision.models.resnet18(num_classes=10)

    return training_step(model, build, *images(*((2, 32) if quick else (16, 64))), F.cross_entropy)


def densenet121(quick: bool) -> Case:
    """Eight images of 64 x 64."""
    model = models.densenet121(num_classes=10)

    def build() -> nn.Module:
        return torchvision.models.densenet121(num_classes=10)

    return training_step(model, build, *images(*((2, 32) if quick else (8, 64))), F.cross_entropy)


def vit_tiny(quick: bool) -> Case:
    """Eight images of 64 x 64 in patches of 8 x 8; width 192, 12 layers (DeiT-Ti)."""
    depth = 2 if quick else 12
    model = models.vit(64, 8, depth, 3, 192, num_classes=10)

    def build() -> nn.Module:
        return torchvision.models.VisionTransformer(
            64, 8, depth, 3, 192, mlp_dim=4 * 192, num_classes=10
        )

    return training_step(model, build, *images(2 if quick else 8, 64), F.cross_entropy)


def gpt(quick: bool) -> Case:
    """16 rows of 128 characters; width 128, 4 layers."""
    sizes = (65, 128, 128, 2 if quick else 4, 4)
    tokens = random.randint(random.key(1), (2 if quick else 16, 129), 0, 65)
    return training_step(
        models.gpt(*sizes),
        lambda: networks.GPT(*sizes),
        tokens[:, :-1],
        tokens[:, 1:],
        networks.tokens_loss,
    )


def resnet50(quick: bool) -> Case:
    """256 images of 224 x 224."""
    batch = images(*((2, 32) if quick else (256, 224)), classes=1000)
    return training_step(models.resnet50(), torchvision.models.resnet50, *batch, F.cross_entropy)


def vit_b_16(quick: bool) -> Case:
    """256 images of 224 x 224 in patches of 16 x 16; width 768, 12 layers."""
    count, size, depth = (2, 32, 1) if quick else (256, 224, 12)
    model = models.vit(size, 16, depth, 12, 768)

    def build() -> nn.Module:
        return torchvision.models.VisionTransformer(size, 16, depth, 12, 768, mlp_dim=3072)

    return training_step(model, build, *images(count, size, classes=1000), F.cross_entropy)


WORKLOADS = races(
    {
        "training step, ResNet-18": ({"eager": 1.03, "compiled": 1.0}, resnet18),
        "training step, DenseNet-121": ({"eager": 1.0, "compiled": 1.0}, densenet121),
        "training step, ViT-tiny": ({"eager": 1.0, "compiled": 1.0}, vit_tiny),
        "training step, GPT 4 layers": ({"eager": 1.0, "compiled": 1.0}, gpt),
    }
)

# A processor would take minutes a step.
GPU_WORKLOADS = races(
    {
        "training step, ResNet-50, batch 256": ({"eager": 1.0, "compiled": 1.0}, resnet50),
        "training step, ViT-B/16, batch 256": ({"eager": 1.0, "compiled": 1.0}, vit_b_16),
    }
)

"""Modules that torch and torchvision lack, built from theirs, to hold the library against."""

from __future__ import annotations

from typing import Any

from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import SqueezeExcitation


class Squeezed(nn.Module):
    """Mixed into a block of torchvision: squeeze-and-excitation after the last norm."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        last = max(name for name, _ in self.named_children() if name.startswith("bn"))
        channels = getattr(self, last).num_features
        self.se = SqueezeExcitation(channels, max(1, channels // 16))
        getattr(self, last).register_forward_hook(lambda norm, inputs, output: self.se(output))


class SqueezedBasicBlock(Squeezed, BasicBlock):
    """As the library's block with ``squeeze``."""


class SqueezedBottleneck(Squeezed, Bottleneck):
    """As the library's block with ``squeeze``."""


RESIDUAL_BLOCKS = {
    ("basic", False): BasicBlock,
    ("bottleneck", False): Bottleneck,
    ("basic", True): SqueezedBasicBlock,
    ("bottleneck", True): SqueezedBottleneck,
}

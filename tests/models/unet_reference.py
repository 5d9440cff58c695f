"""A U-Net as a torch module, written from the paper without a look at the library's."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn


class Level(nn.Sequential):
    """Convolution, norm, activation, several times."""

    def __init__(
        self,
        channels: int,
        width: int,
        convolutions: int,
        norm: Callable[[int], nn.Module] | None,
        activation: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        for _ in range(convolutions):
            step = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1, bias=norm is None))
            if norm is not None:
                step.append(norm(width))
            self.append(step.append(activation()))
            channels = width


class UNet(nn.Module):
    """Of any depth, by recursion: a level around a smaller U-Net."""

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        widths: tuple[int, ...],
        convolutions: int = 2,
        norm: Callable[[int], nn.Module] | None = None,
        activation: Callable[[], nn.Module] = nn.ReLU,
        upsample: str = "transposed",
    ) -> None:
        super().__init__()
        self.pool, self.mode = nn.MaxPool2d(2, stride=2), upsample

        def level(channels: int, width: int) -> Level:
            return Level(channels, width, convolutions, norm, activation)

        pairs = list(itertools.pairwise(widths))
        inputs = (in_channels, *widths[:-1])
        self.down = nn.ModuleList(level(n, m) for n, m in zip(inputs, widths, strict=True))
        if upsample == "transposed":
            self.upsample = nn.ModuleList(
                nn.ConvTranspose2d(lower, upper, kernel_size=2, stride=2) for upper, lower in pairs
            )
            self.up = nn.ModuleList(level(2 * upper, upper) for upper, _ in pairs)
        else:
            self.up = nn.ModuleList(level(upper + lower, upper) for upper, lower in pairs)
        self.head = nn.Conv2d(widths[0], num_classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.within(x, 0))

    def within(self, x: Tensor, level: int) -> Tensor:
        x = self.down[level](x)
        if level == len(self.up):
            return x
        below = self.within(self.pool(x), level + 1)
        if self.mode == "transposed":
            enlarged = torch.zeros_like(x)
            doubled = self.upsample[level](below)
            enlarged[:, :, : doubled.shape[2], : doubled.shape[3]] = doubled
        else:
            enlarged = nn.Upsample(x.shape[2:], mode=self.mode)(below)
        return self.up[level](torch.cat((x, enlarged), dim=1))

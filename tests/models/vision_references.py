"""Torchvision's transformers, made as small as a configuration of ours; none of them drops."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchvision.models import SwinTransformer, VisionTransformer
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2


class MeanViT(VisionTransformer):
    """Without the token that torchvision's always adds: the head reads the mean of the patches."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        del self.class_token
        positions = self.encoder.pos_embedding.data[:, 1:].clone()
        self.encoder.pos_embedding = nn.Parameter(positions)

    def forward(self, x: Tensor) -> Tensor:
        return self.heads(self.encoder(self._process_input(x)).mean(1))


def vit(config: Any) -> nn.Module:
    kind = {"token": VisionTransformer, "mean": MeanViT}[config.pool]
    module = kind(
        config.image_size,
        config.patch_size,
        config.depth,
        config.heads,
        config.width,
        config.mlp_width or 4 * config.width,
        num_classes=config.num_classes,
        representation_size=config.representation_size,
    )
    channels, size = config.in_channels, config.patch_size
    module.conv_proj = nn.Conv2d(channels, config.width, size, size)
    nn.init.trunc_normal_(module.conv_proj.weight, std=(channels * size**2) ** -0.5)
    nn.init.zeros_(module.conv_proj.bias)
    return module


def swin(config: Any) -> nn.Module:
    second = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}
    module = SwinTransformer(
        [config.patch_size] * 2,
        config.width,
        list(config.depths),
        list(config.heads),
        [config.window] * 2,
        config.mlp_ratio,
        stochastic_depth_prob=0.0,
        num_classes=config.num_classes,
        **(second if config.version == 2 else {}),
    )
    size = config.patch_size
    module.features[0][0] = nn.Conv2d(config.in_channels, config.width, size, size)
    return module


SMALL: dict[str, dict[str, Any]] = {
    "vit": {
        "size": 4,
        "image_size": 4,
        "patch_size": 2,
        "depth": 1,
        "heads": 2,
        "width": 6,
        "mlp_width": 5,
        "dropout": 0.4,
        "attention_dropout": 0.4,
    },
    "swin": {
        "size": 5,
        "patch_size": 1,
        "depths": (1, 1),
        "heads": (1, 2),
        "width": 4,
        "window": 2,
        "mlp_ratio": 1.0,
        "dropout": 0.4,
        "attention_dropout": 0.4,
        "stochastic_depth": 0.4,
    },
    "swin_v2": {
        "size": 3,
        "patch_size": 1,
        "depths": (2,),
        "heads": (2,),
        "width": 4,
        "window": 2,
        "mlp_ratio": 1.0,
        "version": 2,
    },
}

"""Model families, one file each: a Config, ``init``, ``forward``, and constructors by name."""

from funcnets.models.cnn import cnn
from funcnets.models.mlp import mlp
from funcnets.models.resnet import (
    resnet,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)
from funcnets.models.siamese import siamese

__all__ = [
    "cnn",
    "mlp",
    "resnet",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "siamese",
    "wide_resnet50_2",
    "wide_resnet101_2",
]

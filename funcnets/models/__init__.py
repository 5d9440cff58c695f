"""Model families, one file each: a Config, ``init``, ``forward``, and constructors by name."""

from funcnets.models.alexnet import alexnet
from funcnets.models.cnn import cnn
from funcnets.models.convnext import (
    convnext,
    convnext_base,
    convnext_large,
    convnext_small,
    convnext_tiny,
)
from funcnets.models.densenet import (
    densenet,
    densenet121,
    densenet161,
    densenet169,
    densenet201,
)
from funcnets.models.early_exit import early_exit
from funcnets.models.efficientnet import (
    efficientnet,
    efficientnet_b0,
    efficientnet_b1,
    efficientnet_b2,
    efficientnet_b3,
    efficientnet_b4,
    efficientnet_b5,
    efficientnet_b6,
    efficientnet_b7,
    efficientnet_v2_l,
    efficientnet_v2_m,
    efficientnet_v2_s,
)
from funcnets.models.embedding import embedding
from funcnets.models.gated import gated
from funcnets.models.lenet import lenet
from funcnets.models.mlp import mlp
from funcnets.models.mobilenet_v2 import mobilenet_v2
from funcnets.models.mobilenet_v3 import (
    mobilenet_v3,
    mobilenet_v3_large,
    mobilenet_v3_small,
)
from funcnets.models.multimodal import multimodal
from funcnets.models.residual_mlp import residual_mlp
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
from funcnets.models.unet import unet
from funcnets.models.vgg import (
    vgg,
    vgg11,
    vgg11_bn,
    vgg13,
    vgg13_bn,
    vgg16,
    vgg16_bn,
    vgg19,
    vgg19_bn,
)

__all__ = [
    "alexnet",
    "cnn",
    "convnext",
    "convnext_base",
    "convnext_large",
    "convnext_small",
    "convnext_tiny",
    "densenet",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "early_exit",
    "efficientnet",
    "efficientnet_b0",
    "efficientnet_b1",
    "efficientnet_b2",
    "efficientnet_b3",
    "efficientnet_b4",
    "efficientnet_b5",
    "efficientnet_b6",
    "efficientnet_b7",
    "efficientnet_v2_l",
    "efficientnet_v2_m",
    "efficientnet_v2_s",
    "embedding",
    "gated",
    "lenet",
    "mlp",
    "mobilenet_v2",
    "mobilenet_v3",
    "mobilenet_v3_large",
    "mobilenet_v3_small",
    "multimodal",
    "residual_mlp",
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
    "unet",
    "vgg",
    "vgg11",
    "vgg11_bn",
    "vgg13",
    "vgg13_bn",
    "vgg16",
    "vgg16_bn",
    "vgg19",
    "vgg19_bn",
    "wide_resnet50_2",
    "wide_resnet101_2",
]

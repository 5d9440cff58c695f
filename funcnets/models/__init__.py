"""Model families, one file each: a Config, ``init``, ``forward``, and constructors by name."""

from funcnets.models.alexnet import alexnet
from funcnets.models.bert import bert, mask_tokens
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
from funcnets.models.gpt import gpt, gpt_cache
from funcnets.models.lenet import lenet
from funcnets.models.mlp import mlp
from funcnets.models.mobilenet_v2 import mobilenet_v2
from funcnets.models.mobilenet_v3 import (
    mobilenet_v3,
    mobilenet_v3_large,
    mobilenet_v3_small,
)
from funcnets.models.multimodal import multimodal
from funcnets.models.recurrent import recurrent
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
from funcnets.models.seq2seq import seq2seq, seq2seq_cache
from funcnets.models.siamese import siamese
from funcnets.models.swin import swin, swin_b, swin_s, swin_t, swin_v2_b, swin_v2_s, swin_v2_t
from funcnets.models.transformer import (
    transformer,
    transformer_cache,
    transformer_decoder,
    transformer_encoder,
)
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
from funcnets.models.vit import (
    interpolate_positions,
    vit,
    vit_b_16,
    vit_b_32,
    vit_h_14,
    vit_l_16,
    vit_l_32,
)

__all__ = [
    "alexnet",
    "bert",
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
    "gpt",
    "gpt_cache",
    "interpolate_positions",
    "lenet",
    "mask_tokens",
    "mlp",
    "mobilenet_v2",
    "mobilenet_v3",
    "mobilenet_v3_large",
    "mobilenet_v3_small",
    "multimodal",
    "recurrent",
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
    "seq2seq",
    "seq2seq_cache",
    "siamese",
    "swin",
    "swin_b",
    "swin_s",
    "swin_t",
    "swin_v2_b",
    "swin_v2_s",
    "swin_v2_t",
    "transformer",
    "transformer_cache",
    "transformer_decoder",
    "transformer_encoder",
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
    "vit",
    "vit_b_16",
    "vit_b_32",
    "vit_h_14",
    "vit_l_16",
    "vit_l_32",
    "wide_resnet50_2",
    "wide_resnet101_2",
]

"""Layers: pairs of functions ``init_x(key, ...) -> params`` and ``x(params, inputs, ...)``.

Names, parameter names, shapes and defaults are those of torch.nn. What the parameters' shapes tell
(widths, kernel size, number of dimensions) is not asked again.
"""

from funcnets.layers import initializers
from funcnets.layers.activations import (
    activation,
    geglu,
    glu,
    identity,
    quick_gelu,
    squared_relu,
    swiglu,
)
from funcnets.layers.buffers import finish, with_buffers
from funcnets.layers.conv import (
    conv,
    conv_transpose,
    init_conv,
    init_conv_transpose,
    init_separable_conv,
    separable_conv,
)
from funcnets.layers.conv_norm import conv_norm, init_conv_norm
from funcnets.layers.dropout import (
    alpha_dropout,
    channel_dropout,
    dropout,
    feature_alpha_dropout,
    stochastic_depth,
)
from funcnets.layers.embedding import embedding, embedding_bag, init_embedding, unembed
from funcnets.layers.inverted_residual import init_inverted_residual, inverted_residual
from funcnets.layers.linear import bilinear, init_bilinear, init_linear, linear
from funcnets.layers.norm import (
    batch_norm,
    group_norm,
    init_batch_norm,
    init_group_norm,
    init_instance_norm,
    init_layer_norm,
    init_rms_norm,
    instance_norm,
    layer_norm,
    rms_norm,
)
from funcnets.layers.pooling import (
    adaptive_avg_pool1d,
    adaptive_avg_pool2d,
    adaptive_avg_pool3d,
    adaptive_max_pool1d,
    adaptive_max_pool2d,
    adaptive_max_pool3d,
    avg_pool1d,
    avg_pool2d,
    avg_pool3d,
    global_avg_pool,
    global_max_pool,
    max_pool1d,
    max_pool2d,
    max_pool3d,
)
from funcnets.layers.residual import init_bottleneck_block, init_residual_block, residual_block
from funcnets.layers.squeeze_excitation import init_squeeze_excitation, squeeze_excitation

__all__ = [
    "activation",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "alpha_dropout",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "batch_norm",
    "bilinear",
    "channel_dropout",
    "conv",
    "conv_norm",
    "conv_transpose",
    "dropout",
    "embedding",
    "embedding_bag",
    "feature_alpha_dropout",
    "finish",
    "geglu",
    "global_avg_pool",
    "global_max_pool",
    "glu",
    "group_norm",
    "identity",
    "init_batch_norm",
    "init_bilinear",
    "init_bottleneck_block",
    "init_conv",
    "init_conv_norm",
    "init_conv_transpose",
    "init_embedding",
    "init_group_norm",
    "init_instance_norm",
    "init_inverted_residual",
    "init_layer_norm",
    "init_linear",
    "init_residual_block",
    "init_rms_norm",
    "init_separable_conv",
    "init_squeeze_excitation",
    "initializers",
    "instance_norm",
    "inverted_residual",
    "layer_norm",
    "linear",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "quick_gelu",
    "residual_block",
    "rms_norm",
    "separable_conv",
    "squared_relu",
    "squeeze_excitation",
    "stochastic_depth",
    "swiglu",
    "unembed",
    "with_buffers",
]

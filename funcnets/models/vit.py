"""Vision Transformer (Dosovitskiy et al. 2021): an image as a sequence of patches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from jaxtyping import Float
from tensordict import TensorDict
from torch import Tensor

from funcnets import layers, random, tree
from funcnets.layers import (
    conv,
    init_conv,
    init_layer_norm,
    init_linear,
    initializers,
    linear,
)
from funcnets.layers.attention import attention, init_attention
from funcnets.layers.dropout import dropout_if
from funcnets.layers.scaled_dot_product import WeightsTap
from funcnets.model import Model, bind
from funcnets.models import blocks
from funcnets.taps import Taps, TapsLike

Pool = Literal["token", "mean"]
INIT: dict[str, Any] = {
    "weight_init": initializers.xavier_uniform(),
    "bias_init": initializers.normal(std=1e-6),
}

layer_norm = partial(layers.layer_norm, eps=1e-6)


@dataclass(frozen=True)
class Config:
    """What a Vision Transformer is made of.

    Attributes:
        image_size: of each side of the images.
        patch_size: of each side of a patch; it divides the size of the images.
        depth: blocks of attention and MLP.
        heads: of the attention.
        width: features of each token.
        mlp_width: of the hidden layers of the MLPs; by default four times the width.
        dropout: after the embeddings, the attention and each layer of the MLPs.
        attention_dropout: of the attention's weights.
        pool: what the head reads: the "token" added for it, or the "mean" of the patches, in which
            case none is added.
        representation_size: features of a hidden layer of the head; None for none.
    """

    image_size: int
    patch_size: int
    depth: int
    heads: int
    width: int
    num_classes: int = 1000
    in_channels: int = 3
    mlp_width: int | None = None
    dropout: float = 0.0
    attention_dropout: float = 0.0
    pool: Pool = "token"
    representation_size: int | None = None

    def __post_init__(self) -> None:
        sizes = ("image_size", "patch_size", "depth", "heads", "width", "num_classes")
        blocks.check_sizes("vit", **{name: getattr(self, name) for name in sizes})
        blocks.check_sizes("vit", in_channels=self.in_channels, mlp_width=self.hidden())
        if self.representation_size is not None:
            blocks.check_sizes("vit", representation_size=self.representation_size)
        blocks.check_rate("vit", "dropout", self.dropout)
        blocks.check_rate("vit", "attention_dropout", self.attention_dropout)
        blocks.check_choice("vit", "pool", self.pool, ("token", "mean"))
        if self.image_size % self.patch_size:
            raise ValueError(
                f"vit: patch_size: expected a divisor of image_size={self.image_size}, "
                f"got {self.patch_size}"
            )
        if self.width % self.heads:
            raise ValueError(
                f"vit: heads: expected a divisor of width={self.width}, got {self.heads}"
            )

    def hidden(self) -> int:
        """Features of the hidden layers of the MLPs."""
        return 4 * self.width if self.mlp_width is None else self.mlp_width

    def tokens(self) -> int:
        """How many tokens there are."""
        return (self.image_size // self.patch_size) ** 2 + (self.pool == "token")


def vit(
    image_size: int,
    patch_size: int,
    depth: int,
    heads: int,
    width: int,
    num_classes: int = 1000,
    *,
    in_channels: int = 3,
    mlp_width: int | None = None,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    pool: Pool = "token",
    representation_size: int | None = None,
) -> Model:
    """A Vision Transformer, from images [batch, in_channels, size, size] to [batch, num_classes].

    As ``torchvision.models.VisionTransformer``. The arguments are those of `Config`. Taps are
    ``conv_proj``, ``encoder.layers.encoder_layer_0.self_attention.weights`` (the attention [batch,
    heads, queries, keys], which is computed for the tap alone, and may be replaced),
    ``encoder.layers.encoder_layer_0.self_attention``, ``encoder.layers.encoder_layer_0``, ...,
    ``encoder.layers``, ``encoder``, and ``heads.act`` where the head has a hidden layer.

    For images of another size, see `interpolate_positions`.

    >>> model = vit(8, 2, depth=2, heads=4, width=16, num_classes=10)
    >>> params = model.init(random.key(0))
    >>> place = "encoder.layers.encoder_layer_1.self_attention.weights"
    >>> logits, found = model.apply(params, torch.ones(5, 3, 8, 8), taps=[place])
    >>> logits.shape, found[place].shape
    (torch.Size([5, 10]), torch.Size([5, 4, 17, 17]))
    """
    config = Config(
        image_size,
        patch_size,
        depth,
        heads,
        width,
        num_classes,
        in_channels,
        mlp_width,
        dropout,
        attention_dropout,
        pool,
        representation_size,
    )
    return bind("vit", config, init, forward, check)


def vit_b_16(num_classes: int = 1000, *, image_size: int = 224, **options: Any) -> Model:
    """`vit` as ``torchvision.models.vit_b_16``, 86.6 million parameters."""
    return vit(image_size, 16, 12, 12, 768, num_classes, **options)


def vit_b_32(num_classes: int = 1000, *, image_size: int = 224, **options: Any) -> Model:
    """`vit` as ``torchvision.models.vit_b_32``, 88.2 million parameters."""
    return vit(image_size, 32, 12, 12, 768, num_classes, **options)


def vit_l_16(num_classes: int = 1000, *, image_size: int = 224, **options: Any) -> Model:
    """`vit` as ``torchvision.models.vit_l_16``, 304.3 million parameters."""
    return vit(image_size, 16, 24, 16, 1024, num_classes, **options)


def vit_l_32(num_classes: int = 1000, *, image_size: int = 224, **options: Any) -> Model:
    """`vit` as ``torchvision.models.vit_l_32``, 306.5 million parameters."""
    return vit(image_size, 32, 24, 16, 1024, num_classes, **options)


def vit_h_14(num_classes: int = 1000, *, image_size: int = 224, **options: Any) -> Model:
    """`vit` as ``torchvision.models.vit_h_14``, 632.0 million parameters."""
    return vit(image_size, 14, 32, 16, 1280, num_classes, **options)


def interpolate_positions(
    params: TensorDict,
    image_size: int,
    mode: Literal["bicubic", "bilinear", "nearest"] = "bicubic",
) -> TensorDict:
    """Parameters for images of another size: the position embedding as a map, resized.

    As ``torchvision.models.vision_transformer.interpolate_embeddings``. The embedding of the class
    token, if there is one, stays as it is, and so does every other leaf. For an ensemble, vmap it.

    Args:
        params: of a `vit`; its patches are square.
        image_size: a multiple of the size of the patches.
        mode: of ``torch.nn.functional.interpolate``.

    >>> small = vit(8, 2, depth=1, heads=2, width=4).init(random.key(0))
    >>> large = interpolate_positions(small, 12)
    >>> vit(12, 2, depth=1, heads=2, width=4).apply(large, torch.ones(1, 3, 12, 12)).shape
    torch.Size([1, 1000])
    """
    size = params["conv_proj", "weight"].shape[-1]
    if image_size < size or image_size % size:
        raise ValueError(
            f"interpolate_positions: image_size: expected a multiple of {size}, the size of the "
            f"patches, got {image_size}"
        )
    embedding = params["encoder", "pos_embedding"]
    own = 1 if "class_token" in params.keys() else 0  # noqa: SIM118
    side, new = math.isqrt(embedding.shape[1] - own), image_size // size
    if side**2 + own != embedding.shape[1]:
        raise ValueError(
            "interpolate_positions: encoder.pos_embedding: expected the patches of a square, "
            f"got {list(embedding.shape)}"
        )
    if side == new:
        return params
    token, patches = embedding.split((own, side**2), 1)
    patches = rearrange(patches, "1 (height across) width -> 1 width height across", height=side)
    corners = None if mode == "nearest" else True
    patches = F.interpolate(patches, (new, new), mode=mode, align_corners=corners)
    patches = rearrange(patches, "1 width height across -> 1 (height across) width")
    resized = torch.cat([token, patches], 1)
    place = ("encoder", "pos_embedding")
    return tree.map_with_path(lambda path, leaf: resized if path == place else leaf, params)


def init(key: random.Key, config: Config) -> TensorDict:
    """The parameters."""
    stem_key, place_key, blocks_key, head_key = random.split(key, 4).unbind()
    width, channels, size = config.width, config.in_channels, config.patch_size
    params: dict[str, Any] = {
        "conv_proj": init_conv(
            stem_key,
            channels,
            width,
            size,
            weight_init=initializers.truncated_normal(std=(channels * size * size) ** -0.5),
            bias_init=initializers.zeros(),
        ),
        "encoder": {
            "pos_embedding": initializers.normal(std=0.02)(place_key, (1, config.tokens(), width)),
            "layers": {
                f"encoder_layer_{i}": init_block(block_key, width, config.heads, config.hidden())
                for i, block_key in enumerate(random.split(blocks_key, config.depth).unbind())
            },
            "ln": init_layer_norm(key, width),
        },
        "heads": init_head(head_key, config),
    }
    if config.pool == "token":
        params["class_token"] = initializers.zeros()(key, (1, 1, width))
    return TensorDict(params)


def check(x: Tensor, config: Config) -> None:
    """Raises unless x is a batch of images of the size that the model is made for."""
    size = (config.in_channels, config.image_size, config.image_size)
    if x.ndim != 4 or x.shape[1:] != size:
        expected = ", ".join(map(str, size))
        raise ValueError(f"vit: x: expected [batch, {expected}], got {list(x.shape)}")


def forward(
    params: TensorDict,
    x: Float[Tensor, "batch in_channels height width"],
    config: Config,
    *,
    train: bool = False,
    key: random.Key | None = None,
    taps: TapsLike = (),
) -> Any:
    """Logits [batch, num_classes]; in training with buffers, of which there are none."""
    check(x, config)
    draws = train and (config.dropout > 0 or config.attention_dropout > 0)
    keys = blocks.draw_keys("vit", key, draws, config.depth + 1)
    tap, encoder = Taps("vit", taps), params["encoder"]

    x = tap("conv_proj", conv(params["conv_proj"], x, stride=config.patch_size))
    x = rearrange(x, "batch width height across -> batch (height across) width")
    if config.pool == "token":
        token = repeat(params["class_token"], "1 1 width -> batch 1 width", batch=x.shape[0])
        x = torch.cat([token, x], 1)
    x = dropout_if(None if keys is None else keys[-1], x + encoder["pos_embedding"], config.dropout)
    for i in range(config.depth):
        name = f"encoder_layer_{i}"
        place = f"encoder.layers.{name}"
        x = block(
            encoder["layers", name],
            x,
            heads=config.heads,
            dropout=config.dropout,
            attention_dropout=config.attention_dropout,
            key=None if keys is None else keys[i],
            tap=tap,
            name=place,
            weights_tap=tap.at(f"{place}.self_attention.weights"),
        )
    x = tap("encoder", layer_norm(encoder["ln"], tap("encoder.layers", x)))

    x = (
        x[:, 0]
        if config.pool == "token"
        else reduce(x, "batch patches width -> batch width", "mean")
    )
    head = params["heads"]
    if config.representation_size is not None:
        x = tap("heads.act", torch.tanh(linear(head["pre_logits"], x)))
    return tap.finish(linear(head["head"], x), {}, train)


def init_block(key: random.Key, width: int, heads: int, hidden: int) -> TensorDict:
    """Parameters of `block`, named as in torchvision's ``EncoderBlock``."""
    attention_key, up, down = random.split(key, 3).unbind()
    return TensorDict(
        {
            "ln_1": init_layer_norm(key, width),
            "self_attention": init_attention(attention_key, width, heads),
            "ln_2": init_layer_norm(key, width),
            "mlp": {
                "0": init_linear(up, width, hidden, **INIT),
                "3": init_linear(down, hidden, width, **INIT),
            },
        }
    )


def init_head(key: random.Key, config: Config) -> TensorDict:
    """Parameters of the head: the logits begin as zeros."""
    zeros: dict[str, Any] = dict.fromkeys(("weight_init", "bias_init"), initializers.zeros())
    hidden = config.representation_size
    head = init_linear(key, hidden or config.width, config.num_classes, **zeros)
    if hidden is None:
        return TensorDict({"head": head})
    zeros["weight_init"] = initializers.truncated_normal(std=config.width**-0.5)
    return TensorDict({"pre_logits": init_linear(key, config.width, hidden, **zeros), "head": head})


def block(
    params: TensorDict,
    x: Float[Tensor, "batch tokens width"],
    *,
    heads: int,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    key: random.Key | None = None,
    tap: Callable[[str, Any], Any] = lambda name, value: value,
    name: str = "",
    weights_tap: WeightsTap | None = None,
) -> Float[Tensor, "batch tokens width"]:
    """Attention and an MLP, each of the layer norm of its input, to which it is added.

    Args:
        key: with one, dropout draws.
        tap: gets the attention's outputs and those of the block, under ``name``.
        weights_tap: gets the attention's weights.
    """
    keys = [None] * 4 if key is None else random.split(key, 4).unbind()
    y = attention(
        params["self_attention"],
        layer_norm(params["ln_1"], x),
        heads=heads,
        dropout=attention_dropout,
        key=keys[0],
        tap=weights_tap,
    )
    x = x + tap(f"{name}.self_attention", dropout_if(keys[1], y, dropout))
    y = layer_norm(params["ln_2"], x)
    y = dropout_if(keys[2], F.gelu(linear(params["mlp", "0"], y)), dropout)
    return tap(name, x + dropout_if(keys[3], linear(params["mlp", "3"], y), dropout))

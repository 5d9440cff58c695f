"""Swin Transformer (Liu et al. 2021) and its second version (Liu et al. 2022).

Attention within windows of the image, which every second block moves by half their size, so that
what one block keeps apart the next brings together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Float, Int
from tensordict import TensorDict
from torch import Tensor

from funcnets import layers, random
from funcnets.layers import (
    conv,
    init_conv,
    init_layer_norm,
    init_linear,
    initializers,
    layer_norm,
    linear,
    normalize,
)
from funcnets.layers.dropout import dropout_if
from funcnets.model import Model, bind
from funcnets.models import blocks
from funcnets.models.stages import check_scale
from funcnets.taps import Taps, TapsLike

HIDDEN = 512  # of the network that gives the second version its relative biases
INIT: dict[str, Any] = {
    "weight_init": initializers.truncated_normal(std=0.02),
    "bias_init": initializers.zeros(),
}

Tap = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class Config:
    """What a Swin Transformer is made of.

    Attributes:
        depths: blocks in each stage; between the stages each four neighbours become one.
        heads: of the attention in each stage.
        width: channels of the first stage, doubled at each of the others.
        window: tokens on each side of a window.
        mlp_ratio: how many times wider the hidden layers of the MLPs are than the blocks.
        dropout: after the linear maps of the blocks.
        attention_dropout: of the attention's weights.
        stochastic_depth: the rate of the last block, in training; it grows linearly from 0.
        version: 1, or 2 where norms follow the branches, scores are cosines and a network of the
            distance gives the relative biases.
    """

    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    num_classes: int = 1000
    in_channels: int = 3
    width: int = 96
    patch_size: int = 4
    window: int = 7
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    stochastic_depth: float = 0.0
    version: Literal[1, 2] = 1

    def __post_init__(self) -> None:
        blocks.check_choice("swin", "version", self.version, (1, 2))
        blocks.check_sizes(
            "swin",
            num_classes=self.num_classes,
            in_channels=self.in_channels,
            width=self.width,
            patch_size=self.patch_size,
            window=self.window,
            **{f"depths[{i}]": depth for i, depth in enumerate(self.depths)},
            **{f"heads[{i}]": heads for i, heads in enumerate(self.heads)},
        )
        for rate in ("dropout", "attention_dropout", "stochastic_depth"):
            blocks.check_rate("swin", rate, getattr(self, rate))
        check_scale("swin", "mlp_ratio", self.mlp_ratio)
        if not self.depths or len(self.depths) != len(self.heads):
            raise ValueError(
                "swin: depths, heads: expected one of each per stage, "
                f"got {self.depths} and {self.heads}"
            )
        for stage, heads in enumerate(self.heads):
            if self.channels(stage) % heads:
                raise ValueError(
                    f"swin: heads[{stage}]: expected a divisor of the stage's "
                    f"{self.channels(stage)} channels, got {heads}"
                )
        if int(self.width * self.mlp_ratio) < 1:
            raise ValueError(
                f"swin: mlp_ratio: expected 1 / width or more, got {self.mlp_ratio} "
                f"with width={self.width}"
            )
        if self.version == 2 and self.window < 2:
            raise ValueError(f"swin: window: expected 2 or more in version 2, got {self.window}")

    def channels(self, stage: int) -> int:
        """Channels of a stage."""
        return self.width * 2**stage

    def place(self, stage: int) -> str:
        """The name of a stage among the features."""
        return str(2 * stage + 1)

    def drop_rate(self, block: int) -> float:
        """The rate of stochastic depth of a block, counted through all stages."""
        return self.stochastic_depth * block / max(sum(self.depths) - 1, 1)


def swin(
    depths: tuple[int, ...] | list[int],
    heads: tuple[int, ...] | list[int],
    num_classes: int = 1000,
    *,
    in_channels: int = 3,
    width: int = 96,
    patch_size: int = 4,
    window: int = 7,
    mlp_ratio: float = 4.0,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    stochastic_depth: float = 0.0,
    version: Literal[1, 2] = 1,
) -> Model:
    """A Swin Transformer, from images [batch, in_channels, height, width] to [batch, num_classes].

    As ``torchvision.models.SwinTransformer``, for images of any size from one patch on. The
    arguments are those of `Config`. Taps are ``features.0``, ``features.1.0.attn.weights`` (the
    attention [windows, heads, queries, keys], the windows of an image one after the other),
    ``features.1.0.attn``, ``features.1.0``, ``features.1``, ``features.2`` (which merges
    neighbours), ..., ``features``, ``norm``, ``avgpool``.

    Torchvision's state_dicts hold, beside the parameters, indices and coordinates that are the same
    for every network of the same windows. Parameters made here have none; those that come with a
    tree are left aside.

    >>> import torch
    >>> model = swin((1, 2), (2, 4), 10, width=8, window=2)
    >>> model.apply(model.init(random.key(0)), torch.ones(5, 3, 16, 16)).shape
    torch.Size([5, 10])
    """
    config = Config(
        tuple(depths),
        tuple(heads),
        num_classes,
        in_channels,
        width,
        patch_size,
        window,
        mlp_ratio,
        dropout,
        attention_dropout,
        stochastic_depth,
        version,
    )
    return bind("swin", config, init, forward, check)


def swin_t(num_classes: int = 1000, **options: Any) -> Model:
    """`swin` as ``torchvision.models.swin_t``, 28.3 million parameters."""
    options = {"stochastic_depth": 0.2} | options
    return swin((2, 2, 6, 2), (3, 6, 12, 24), num_classes, **options)


def swin_s(num_classes: int = 1000, **options: Any) -> Model:
    """`swin` as ``torchvision.models.swin_s``, 49.6 million parameters."""
    options = {"stochastic_depth": 0.3} | options
    return swin((2, 2, 18, 2), (3, 6, 12, 24), num_classes, **options)


def swin_b(num_classes: int = 1000, **options: Any) -> Model:
    """`swin` as ``torchvision.models.swin_b``, 87.8 million parameters."""
    options = {"width": 128, "stochastic_depth": 0.5} | options
    return swin((2, 2, 18, 2), (4, 8, 16, 32), num_classes, **options)


def swin_v2_t(num_classes: int = 1000, **options: Any) -> Model:
    """`swin` as ``torchvision.models.swin_v2_t``, 28.4 million parameters."""
    return swin_t(num_classes, **{"window": 8, "version": 2, **options})


def swin_v2_s(num_classes: int = 1000, **options: Any) -> Model:
    """`swin` as ``torchvision.models.swin_v2_s``, 49.7 million parameters."""
    return swin_s(num_classes, **{"window": 8, "version": 2, **options})


def swin_v2_b(num_classes: int = 1000, **options: Any) -> Model:
    """`swin` as ``torchvision.models.swin_v2_b``, 87.9 million parameters."""
    return swin_b(num_classes, **{"window": 8, "version": 2, **options})


def init(key: random.Key, config: Config) -> TensorDict:
    """The parameters."""
    keys = iter(random.split(key, sum(config.depths) + len(config.depths) + 1).unbind())
    stem_key, head_key = next(keys), next(keys)
    features: dict[str, Any] = {
        "0": {
            "0": init_conv(stem_key, config.in_channels, config.width, config.patch_size),
            "2": init_layer_norm(stem_key, config.width),
        }
    }
    for stage, (depth, heads) in enumerate(zip(config.depths, config.heads, strict=True)):
        width = config.channels(stage)
        if stage > 0:
            merging = init_linear(next(keys), 2 * width, width, bias=False, **INIT)
            merged = width if config.version == 2 else 2 * width
            features[str(2 * stage)] = {
                "reduction": merging,
                "norm": init_layer_norm(head_key, merged),
            }
        features[config.place(stage)] = {
            str(i): init_block(
                next(keys),
                width,
                heads,
                config.window,
                int(width * config.mlp_ratio),
                version=config.version,
            )
            for i in range(depth)
        }
    last = config.channels(len(config.depths) - 1)
    return TensorDict(
        {
            "features": features,
            "norm": init_layer_norm(head_key, last),
            "head": init_linear(head_key, last, config.num_classes, **INIT),
        }
    )


def check(x: Tensor, config: Config) -> None:
    """Raises unless x is a batch of images of the channels and of a size that the model takes."""
    blocks.check_image("swin", x, config.in_channels, config.patch_size)


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
    rates = (config.dropout, config.attention_dropout, config.stochastic_depth)
    keys = blocks.draw_keys("swin", key, train and any(rates), sum(config.depths))
    tap, features = Taps("swin", taps), params["features"]
    x = conv(features["0", "0"], x, stride=config.patch_size)
    x = rearrange(x, "batch channels height width -> batch height width channels")
    x = tap("features.0", layer_norm(features["0", "2"], x))
    index = relative_index(config.window, x.device)
    n = 0
    for stage, (depth, heads) in enumerate(zip(config.depths, config.heads, strict=True)):
        if stage > 0:
            x = merge(features[str(2 * stage)], x, config.version)
            x = tap(f"features.{2 * stage}", x)
        place = config.place(stage)
        straight, moved = (windows_of(x, config.window, shift) for shift in (0, config.window // 2))
        for i in range(depth):
            x = block(
                features[place, str(i)],
                x,
                moved if i % 2 else straight,
                index,
                heads=heads,
                version=config.version,
                dropout=config.dropout,
                attention_dropout=config.attention_dropout,
                drop_rate=config.drop_rate(n),
                key=None if keys is None else keys[n],
                tap=tap,
                name=f"features.{place}.{i}",
            )
            n += 1
        x = tap(f"features.{place}", x)
    x = tap("norm", layer_norm(params["norm"], tap("features", x)))
    x = tap("avgpool", reduce(x, "batch height width channels -> batch channels", "mean"))
    return tap.finish(linear(params["head"], x), {}, train)


def init_block(
    key: random.Key, width: int, heads: int, window: int, hidden: int, *, version: Literal[1, 2] = 1
) -> TensorDict:
    """Parameters of `block`, named as in torchvision's ``SwinTransformerBlock``."""
    qkv, proj, up, down, relative, last = random.split(key, 6).unbind()
    attn: dict[str, Any] = {
        "qkv": init_linear(qkv, width, 3 * width, **INIT),
        "proj": init_linear(proj, width, width, **INIT),
    }
    if version == 1:
        size = ((2 * window - 1) ** 2, heads)
        attn["relative_position_bias_table"] = INIT["weight_init"](relative, size)
    else:
        attn["logit_scale"] = initializers.constant(math.log(10))(relative, (heads, 1, 1))
        attn["cpb_mlp"] = {
            "0": init_linear(relative, 2, HIDDEN, **INIT),
            "2": init_linear(last, HIDDEN, heads, bias=False, **INIT),
        }
    return TensorDict(
        {
            "norm1": init_layer_norm(key, width),
            "attn": attn,
            "norm2": init_layer_norm(key, width),
            "mlp": {
                "0": init_linear(up, width, hidden, **INIT),
                "3": init_linear(down, hidden, width, **INIT),
            },
        }
    )


def block(
    params: TensorDict,
    x: Float[Tensor, "batch height width channels"],
    windows: Windows,
    index: Int[Tensor, " pairs"],
    *,
    heads: int,
    version: Literal[1, 2] = 1,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    drop_rate: float = 0.0,
    key: random.Key | None = None,
    tap: Tap = lambda name, value: value,
    name: str = "",
) -> Float[Tensor, "batch height width channels"]:
    """Attention within windows and an MLP, each added to its input.

    In version 1 each begins with a layer norm, in version 2 it ends with one.

    Args:
        windows: of `windows_of`.
        index: of `relative_index`.
        key: with one, dropout and stochastic depth draw.
        tap: gets the attention's weights and outputs, under ``name``.
    """
    keys = [None] * 6 if key is None else random.split(key, 6).unbind()

    def attend(x: Tensor) -> Tensor:
        x = window_attention(
            params["attn"],
            x,
            windows,
            index,
            heads=heads,
            version=version,
            dropout=attention_dropout,
            key=keys[0],
            tap=lambda place, value: tap(f"{name}.attn.{place}", value),
        )
        return tap(f"{name}.attn", dropout_if(keys[1], x, dropout))

    def mlp(x: Tensor) -> Tensor:
        hidden = dropout_if(keys[2], F.gelu(linear(params["mlp", "0"], x)), dropout)
        return dropout_if(keys[3], linear(params["mlp", "3"], hidden), dropout)

    for branch, norm, row_key in ((attend, "norm1", keys[4]), (mlp, "norm2", keys[5])):
        if version == 1:
            y = branch(layer_norm(params[norm], x))
        else:
            y = layer_norm(params[norm], branch(x))
        if row_key is not None and drop_rate > 0:
            # A factor for each sample: one pass over the branch.
            rows = torch.ones((y.shape[0], 1, 1, 1), dtype=y.dtype, device=y.device)
            y = y * layers.stochastic_depth(row_key, rows, drop_rate, "row")
        x = x + y
    return tap(name, x)


class Windows(NamedTuple):
    """How an image parts into windows.

    Attributes:
        size: tokens on each side of a window.
        padding: rows and columns added at the ends, so that the windows fill the image.
        shift: rows and columns by which the image is rolled before; 0 where one window spans it.
        mask: what is added to the scores [windows, 1, queries, keys] of tokens that the roll alone
            has brought into one window; None without a shift.
    """

    size: int
    padding: tuple[int, int]
    shift: tuple[int, int]
    mask: Float[Tensor, "windows 1 queries keys"] | None


def windows_of(x: Float[Tensor, "batch height width channels"], size: int, shift: int) -> Windows:
    """The windows of an image moved by ``shift``."""
    height, width = x.shape[1:3]
    padding = -height % size, -width % size
    sides = height + padding[0], width + padding[1]
    shifts = tuple(shift if side > size else 0 for side in sides)
    if not any(shifts):
        return Windows(size, padding, (0, 0), None)

    def regions(side: int, shift: int) -> Tensor:
        """For each row, 0, 1 or 2: rows of different regions were not neighbours before."""
        rows = torch.arange(side, device=x.device)
        return ((rows >= side - size).int() + (rows >= side - shift).int()) * (shift > 0)

    down, across = (regions(*pair) for pair in zip(sides, shifts, strict=True))
    region = rearrange(3 * down, "height -> height 1") + rearrange(across, "width -> 1 width")
    region = rearrange(region, "(down h) (across w) -> (down across) (h w)", h=size, w=size)
    apart = rearrange(region, "n keys -> n 1 1 keys") != rearrange(region, "n q -> n 1 q 1")
    # Torchvision's constant: its networks have never seen a true minus infinity.
    mask = torch.zeros(apart.shape, dtype=x.dtype, device=x.device).masked_fill(apart, -100.0)
    return Windows(size, padding, (shifts[0], shifts[1]), mask)


def window_attention(
    params: TensorDict,
    x: Float[Tensor, "batch height width channels"],
    windows: Windows,
    index: Int[Tensor, " pairs"],
    *,
    heads: int,
    version: Literal[1, 2] = 1,
    dropout: float = 0.0,
    key: random.Key | None = None,
    tap: Tap = lambda name, value: value,
) -> Float[Tensor, "batch height width channels"]:
    """Attention within windows, as ``torchvision.models.swin_transformer.ShiftedWindowAttention``.

    Args:
        windows: of `windows_of`.
        index: of `relative_index`.
        key: with one, dropout of the weights draws.
        tap: gets the weights [windows, heads, queries, keys].
    """
    height, width = x.shape[1:3]
    size, (below, right), (up, left), mask = windows
    if below or right:
        x = F.pad(x, (0, 0, 0, right, 0, below))
    if mask is not None:
        x = torch.roll(x, (-up, -left), (1, 2))
    across = x.shape[2] // size
    parted = rearrange(
        x,
        "batch (down h) (across w) channels -> (batch down across) (h w) channels",
        h=size,
        w=size,
    )
    tokens = linear(params["qkv"] if version == 1 else without_key_bias(params["qkv"]), parted)
    queries, keys, values = rearrange(
        tokens, "n tokens (three heads width) -> three n heads tokens width", three=3, heads=heads
    ).unbind()
    if version == 1:
        scores = (queries * queries.shape[-1] ** -0.5) @ keys.mT
    else:
        scale = params["logit_scale"].clamp(max=math.log(100)).exp()
        scores = normalize(queries) @ normalize(keys).mT * scale
    bias = relative_bias(params, size, index, version)
    if mask is None:
        scores = scores + bias
    else:
        each = rearrange(scores, "(batch n) ... -> batch n ...", n=mask.shape[0])
        scores = rearrange(each + (mask + bias), "batch n ... -> (batch n) ...")
    weights = dropout_if(key, tap("weights", scores.softmax(-1)), dropout)
    attended = rearrange(weights @ values, "n heads tokens width -> n tokens (heads width)")
    x = rearrange(
        linear(params["proj"], attended),
        "(batch down across) (h w) channels -> batch (down h) (across w) channels",
        batch=x.shape[0],
        across=across,
        h=size,
    )
    if mask is not None:
        x = torch.roll(x, (up, left), (1, 2))
    return x[:, :height, :width] if below or right else x


def without_key_bias(params: TensorDict) -> TensorDict:
    """The parameters of queries, keys and values with no bias for the keys."""
    queries, keys, values = rearrange(params["bias"], "(three width) -> three width", three=3)
    bias = torch.cat([queries, torch.zeros_like(keys), values])
    return TensorDict({"weight": params["weight"], "bias": bias})


def relative_index(size: int, device: torch.device) -> Int[Tensor, " pairs"]:
    """For each pair of tokens in a window, the place of their distance in the table of biases."""
    place = torch.arange(size, device=device)
    distance = rearrange(place, "query -> query 1") - place + size - 1
    down = rearrange(distance * (2 * size - 1), "query key -> query 1 key 1")
    across = rearrange(distance, "query key -> 1 query 1 key")
    return rearrange(down + across, "qh qw kh kw -> (qh qw kh kw)")


def relative_bias(
    params: TensorDict, size: int, index: Int[Tensor, " pairs"], version: Literal[1, 2]
) -> Float[Tensor, "heads queries keys"]:
    """What is added to the scores of each pair of tokens, by their distance.

    A table in version 1; in version 2 a small network of the distance's logarithm.
    """
    if version == 1:
        table = params["relative_position_bias_table"]
    else:
        network = params["cpb_mlp"]
        distances = relative_coordinates(size, network["0", "weight"])
        table = linear(network["2"], F.relu(linear(network["0"], distances)))
    bias = rearrange(
        table.index_select(0, index), "(queries keys) heads -> heads queries keys", keys=size**2
    )
    return bias if version == 1 else 16 * torch.sigmoid(bias)


def relative_coordinates(size: int, like: Tensor) -> Float[Tensor, "places 2"]:
    """The distances in the order of the table: sign and logarithm, scaled as in torchvision."""
    # In single precision and then cast, as torchvision's buffer is.
    place = torch.arange(1 - size, size, dtype=torch.float32, device=like.device) / (size - 1) * 8
    place = (place.sign() * torch.log2(place.abs() + 1) / 3).to(like.dtype)
    grid = torch.stack(torch.meshgrid(place, place, indexing="ij"))
    return rearrange(grid, "two height width -> (height width) two")


def merge(
    params: TensorDict, x: Float[Tensor, "batch height width channels"], version: Literal[1, 2] = 1
) -> Float[Tensor, "batch half_height half_width doubled"]:
    """Each four neighbours as one token of twice the channels, as torchvision's ``PatchMerging``.

    Odd sides are padded with zeros. The layer norm is before the linear map, after it in version 2.
    """
    height, width = x.shape[1:3]
    if height % 2 or width % 2:
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
    x = rearrange(
        x,
        "batch (height two) (width deux) channels -> batch height width (deux two channels)",
        two=2,
        deux=2,
    )
    if version == 1:
        return linear(params["reduction"], layer_norm(params["norm"], x))
    return layer_norm(params["norm"], linear(params["reduction"], x))

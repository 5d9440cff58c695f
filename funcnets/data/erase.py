"""Random erasing of a box, as a pure function of a key."""

from __future__ import annotations

import math
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from funcnets import random
from funcnets.tree.flatten import describe

ATTEMPTS = 10  # as torchvision has it


def random_erasing(
    key: random.Key,
    images: Float[Tensor, "batch channels height width"],
    p: float | Float[Tensor, ""] = 0.5,
    scale: tuple[float, float] = (0.02, 0.33),
    ratio: tuple[float, float] = (0.3, 3.3),
    value: float | Literal["random"] = 0.0,
) -> Float[Tensor, "batch channels height width"]:
    """A box of each image replaced, with probability p (Zhong et al. 2020).

    As `torchvision.transforms.v2.RandomErasing` for every image alone: ten boxes are drawn, and the
    first that fits is taken.

    Args:
        scale: least and largest share of the area in an image's.
        ratio: least and largest ratio of height to width, whose logarithm is uniform.
        value: what stands in the box; "random" for normal numbers.

    Raises:
        ValueError: where images have another shape, or a range is empty or not positive.

    >>> erased = random_erasing(random.key(0), torch.ones(2, 1, 8, 8), p=1.0)
    >>> (erased == 0).sum((1, 2, 3)).tolist()
    [12, 15]
    """
    if images.ndim != 4:
        raise ValueError(
            "random_erasing: images: expected [batch, channels, height, width], "
            f"got {describe(images)}"
        )
    if not isinstance(p, Tensor) and not 0 <= p <= 1:
        raise ValueError(f"random_erasing: p: expected a rate between 0 and 1, got {p}")
    if not 0 <= scale[0] <= scale[1] <= 1:
        raise ValueError(f"random_erasing: scale: expected two shares in order, got {scale}")
    if not 0 < ratio[0] <= ratio[1]:
        raise ValueError(f"random_erasing: ratio: expected two ratios in order, got {ratio}")
    (batch, _, height, width), (areas, ratios, top, left, apply, noise) = (
        images.shape,
        random.split(key, 6).unbind(),
    )
    shape = batch, ATTEMPTS
    area = height * width * random.uniform(areas, shape, *scale, torch.float64)
    bounds = math.log(ratio[0]), math.log(ratio[1])
    tall = random.uniform(ratios, shape, *bounds, torch.float64).exp()
    rows, columns = (area * tall).sqrt().round(), (area / tall).sqrt().round()
    fits = (rows < height) & (columns < width)
    first = fits.to(torch.int64).argmax(1, keepdim=True)  # of several largest, the first
    fits, rows, columns = (each.gather(1, first) for each in (fits, rows, columns))
    box = rearrange(_inside(top, rows, height), "batch height -> batch height 1")
    box = box & rearrange(_inside(left, columns, width), "batch width -> batch 1 width")
    erased = fits & rearrange(random.bernoulli(apply, (batch,), p), "batch -> batch 1")
    box = box & rearrange(erased, "batch 1 -> batch 1 1")
    filling = random.normal(noise, images.shape, dtype=images.dtype) if value == "random" else value
    return torch.where(
        rearrange(box, "batch height width -> batch 1 height width"), filling, images
    )


def _inside(key: Tensor, length: Tensor, size: int) -> Tensor:
    """The places of a run of a length, its start uniform among the possible: [batch, size]."""
    start = (random.uniform(key, length.shape, dtype=torch.float64) * (size - length + 1)).floor()
    place = torch.arange(size, device=key.device)
    return (place >= start) & (place < start + length)

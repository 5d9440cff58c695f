"""Random masks: dropout of elements, channels, samples.

Each takes the key first and always draws: leave it out at inference. A rate may be a 0-d tensor,
for instance one per member under vmap. Rates 0 and 1 are exact: the input, and (but for the alpha
kinds, see there) zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from funcnets import random
from funcnets.layers.params import fail
from funcnets.random import Key

Rate = float | Tensor

# What SELU saturates to, -scale * alpha: the value that alpha dropout puts for a dropped one.
SELU_FLOOR = -1.0507009873554804934193349852946 * 1.6732632423543772848170429916717


def dropout(key: Key, x: Float[Tensor, "*shape"], p: Rate = 0.5) -> Float[Tensor, "*shape"]:
    """Zeros each element with probability ``p`` and divides the others by ``1 - p``.

    As ``torch.nn.functional.dropout`` in training (Srivastava et al. 2014).

    >>> dropout(random.key(0), torch.ones(6))
    tensor([2., 2., 2., 2., 0., 0.])
    """
    return _drop("dropout", key, x, x.shape, p)


def draws(key: Key | None, p: Rate) -> bool:
    """Whether a layer that may be given a key drops anything at this rate."""
    return key is not None and (isinstance(p, Tensor) or p > 0)


def dropout_if(
    key: Key | None, x: Float[Tensor, "*shape"], p: Rate = 0.5
) -> Float[Tensor, "*shape"]:
    """`dropout` where a key is given and the rate is not 0, as at training; else the input."""
    return dropout(key, x, p) if key is not None and draws(key, p) else x


def channel_dropout(
    key: Key, x: Float[Tensor, "batch channels *spatial"], p: Rate = 0.5
) -> Float[Tensor, "batch channels *spatial"]:
    """Zeros each channel of each sample with probability ``p``, and divides by ``1 - p``.

    As ``torch.nn.Dropout1d``, ``Dropout2d`` and ``Dropout3d`` in training (Tompson et al. 2015).

    >>> channel_dropout(random.key(1), torch.ones(1, 2, 3))
    tensor([[[0., 0., 0.],
             [2., 2., 2.]]])
    """
    return _drop("channel_dropout", key, x, _channels("channel_dropout", x), p)


def alpha_dropout(key: Key, x: Float[Tensor, "*shape"], p: Rate = 0.5) -> Float[Tensor, "*shape"]:
    """Sets each element to SELU's floor with probability ``p``, then restores mean 0, variance 1.

    As ``torch.nn.functional.alpha_dropout`` in training (Klambauer et al. 2017). A rate of 1 gives
    zeros.

    >>> alpha_dropout(random.key(0), torch.zeros(2), p=1.0)
    tensor([0., 0.])
    """
    return _alpha_drop("alpha_dropout", key, x, x.shape, p)


def feature_alpha_dropout(
    key: Key, x: Float[Tensor, "batch channels *spatial"], p: Rate = 0.5
) -> Float[Tensor, "batch channels *spatial"]:
    """`alpha_dropout` of whole channels, as ``torch.nn.FeatureAlphaDropout`` in training."""
    shape = _channels("feature_alpha_dropout", x)
    return _alpha_drop("feature_alpha_dropout", key, x, shape, p)


def stochastic_depth(
    key: Key, x: Float[Tensor, "*shape"], p: Rate, mode: Literal["batch", "row"] = "batch"
) -> Float[Tensor, "*shape"]:
    """Zeros the residual branch ``x`` with probability ``p``, and divides by ``1 - p``.

    As ``torchvision.ops.stochastic_depth`` in training (Huang et al. 2016).

    Args:
        mode: "batch" keeps or drops all samples together, "row" each sample (axis 0) alone.

    >>> stochastic_depth(random.key(0), torch.ones(5, 1), 0.5, mode="row").flatten()
    tensor([2., 2., 2., 2., 0.])
    """
    if mode not in ("batch", "row"):
        raise ValueError(f"stochastic_depth: mode: expected batch or row, got {mode}")
    if mode == "row" and not x.ndim:
        fail("stochastic_depth", "x", "[batch, ...]", x.shape)
    shape = (x.shape[0], *(1,) * (x.ndim - 1)) if mode == "row" else (1,) * x.ndim
    return _drop("stochastic_depth", key, x, shape, p)


def _drop(layer: str, key: Tensor, x: Tensor, shape: Sequence[int], p: Rate) -> Tensor:
    keep, scale = _mask(layer, key, x, shape, p)
    return torch.where(keep, x * scale, 0.0)


def _alpha_drop(layer: str, key: Tensor, x: Tensor, shape: Sequence[int], p: Rate) -> Tensor:
    keep, scale = _mask(layer, key, x, shape, p)
    # The variance of the mixture of x, of mean 0 and variance 1, and the floor is
    # (1 - p) * (1 + p * floor**2); its mean is p * floor.
    p = p.to(x.dtype) if isinstance(p, Tensor) else p
    factor = (scale / (1 + p * SELU_FLOOR**2)) ** 0.5
    return (torch.where(keep, x, SELU_FLOOR) - p * SELU_FLOOR) * factor


def _mask(
    layer: str, key: Tensor, x: Tensor, shape: Sequence[int], p: Rate
) -> tuple[Tensor, float | Tensor]:
    """What to keep, and ``1 / (1 - p)`` (0 where nothing is kept)."""
    if not isinstance(p, Tensor):
        if not 0 <= p <= 1:
            raise ValueError(f"{layer}: p: expected a rate between 0 and 1, got {p}")
        return random.bernoulli(key, shape, 1 - p), 1 / (1 - p) if p < 1 else 0.0
    if p.ndim:
        fail(layer, "p", "a number or a tensor of shape []", p.shape)
    left = 1 - p.to(x.dtype)
    # The inner where keeps the gradient finite where nothing is left.
    scale = torch.where(left > 0, 1 / torch.where(left > 0, left, 1.0), 0.0)
    return random.bernoulli(key, shape, left), scale


def _channels(layer: str, x: Tensor) -> tuple[int, ...]:
    if x.ndim < 2:
        fail(layer, "x", "[batch, channels, ...]", x.shape)
    return (*x.shape[:2], *(1,) * (x.ndim - 2))

"""How parameters begin: functions that give ``f(key, shape, dtype) -> Tensor``.

Names and defaults are those of ``torch.nn.init``, whose `calculate_gain` is a pure function and
serves as it is. A weight is laid out as torch lays it out, ``[out, in, *kernel]``, hence
``fan_in = in * prod(kernel)`` and ``fan_out = out * prod(kernel)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.init import calculate_gain

from funcnets import random
from funcnets.random import Key

Nonlinearity = Literal[
    "linear",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "sigmoid",
    "tanh",
    "relu",
    "leaky_relu",
    "selu",
]


# An initializer: ``f(key, shape, dtype=torch.float32)``, a parameter on the key's device.
Initializer = Callable[..., Tensor]


def constant(value: float) -> Initializer:
    """The same value everywhere.

    >>> constant(0.5)(random.key(0), (2,))
    tensor([0.5000, 0.5000])
    """
    return partial(_constant, value)


def zeros() -> Initializer:
    """Zero everywhere."""
    return constant(0.0)


def ones() -> Initializer:
    """One everywhere."""
    return constant(1.0)


def uniform(low: float = 0.0, high: float = 1.0) -> Initializer:
    """Uniform in [low, high)."""
    return partial(_uniform, low, high)


def normal(mean: float = 0.0, std: float = 1.0) -> Initializer:
    """Normal with this mean and standard deviation."""
    return partial(_normal, mean, std)


def truncated_normal(
    mean: float = 0.0, std: float = 1.0, low: float = -2.0, high: float = 2.0
) -> Initializer:
    """Normal given that the value lies in [low, high].

    The bounds are absolute, as in ``torch.nn.init.trunc_normal_``: they do not scale with ``std``.
    """
    if not std > 0:
        raise ValueError(f"truncated_normal: std: expected more than 0, got {std}")

    def init(
        key: Key, shape: Sequence[int], dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "*shape"]:
        lower, upper = (low - mean) / std, (high - mean) / std
        return random.truncated_normal(key, shape, lower, upper, mean, std, dtype)

    return init


def xavier_uniform(gain: float = 1.0) -> Initializer:
    """Uniform with standard deviation ``gain * sqrt(2 / (fan_in + fan_out))`` (Glorot 2010)."""
    return variance_scaling(gain**2, "fan_avg", "uniform")


def xavier_normal(gain: float = 1.0) -> Initializer:
    """Normal with standard deviation ``gain * sqrt(2 / (fan_in + fan_out))`` (Glorot 2010)."""
    return variance_scaling(gain**2, "fan_avg", "normal")


def kaiming_uniform(
    a: float = 0.0,
    mode: Literal["fan_in", "fan_out"] = "fan_in",
    nonlinearity: Nonlinearity = "leaky_relu",
) -> Initializer:
    """Uniform with standard deviation ``gain / sqrt(fan)`` (He et al. 2015).

    Args:
        a: negative slope of the leaky ReLU that follows; other nonlinearities ignore it.
        mode: keep the variance of the outputs ("fan_in") or of the gradients ("fan_out").
        nonlinearity: what follows, as ``torch.nn.init.calculate_gain`` names it.
    """
    return variance_scaling(float(calculate_gain(nonlinearity, a)) ** 2, mode, "uniform")


def kaiming_normal(
    a: float = 0.0,
    mode: Literal["fan_in", "fan_out"] = "fan_in",
    nonlinearity: Nonlinearity = "leaky_relu",
) -> Initializer:
    """Normal with standard deviation ``gain / sqrt(fan)``; see `kaiming_uniform`."""
    return variance_scaling(float(calculate_gain(nonlinearity, a)) ** 2, mode, "normal")


def lecun_uniform() -> Initializer:
    """Uniform with variance ``1 / fan_in`` (LeCun et al. 1998)."""
    return variance_scaling(1.0, "fan_in", "uniform")


def lecun_normal() -> Initializer:
    """Truncated normal with variance ``1 / fan_in`` (LeCun et al. 1998)."""
    return variance_scaling(1.0, "fan_in", "truncated_normal")


def variance_scaling(
    scale: float = 1.0,
    mode: Literal["fan_in", "fan_out", "fan_avg"] = "fan_in",
    distribution: Literal["truncated_normal", "normal", "uniform"] = "truncated_normal",
) -> Initializer:
    """Mean 0 and variance ``scale / fan``, as ``jax.nn.initializers.variance_scaling``.

    The truncated normal is cut at two of its own standard deviations, after which its variance is
    the one asked for.

    Raises:
        ValueError: for a shape of fewer than two dimensions, which has no fan.

    >>> variance_scaling(2.0)(random.key(0), (1000, 50)).var()
    tensor(0.0399)
    """
    if mode not in ("fan_in", "fan_out", "fan_avg"):
        raise ValueError(f"mode: expected fan_in, fan_out or fan_avg, got {mode}")
    if distribution not in ("truncated_normal", "normal", "uniform"):
        raise ValueError(
            f"distribution: expected truncated_normal, normal or uniform, got {distribution}"
        )

    def init(
        key: Key, shape: Sequence[int], dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "*shape"]:
        fan_in, fan_out = fans(shape)
        fan = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[mode]
        std = math.sqrt(scale / fan) if fan else 0.0
        if distribution == "uniform":
            return random.uniform(key, shape, -math.sqrt(3) * std, math.sqrt(3) * std, dtype)
        if distribution == "normal":
            return random.normal(key, shape, 0.0, std, dtype)
        return random.truncated_normal(key, shape, std=std / TRUNCATED_STD, dtype=dtype)

    return init


# The standard deviation of a standard normal cut at -2 and 2.
TRUNCATED_STD = math.sqrt(
    1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(2 / math.sqrt(2))
)


def orthogonal(gain: float = 1.0) -> Initializer:
    """A random matrix of ``gain`` times orthonormal rows or columns (Saxe et al. 2014).

    Uniformly distributed over such matrices. A shape of more than two dimensions is read as
    ``[shape[0], prod(shape[1:])]``. Follows ``torch.nn.init.orthogonal_``.

    >>> matrix = orthogonal()(random.key(0), (2, 3))
    >>> torch.allclose(matrix @ matrix.T, torch.eye(2), atol=1e-6)
    True
    """

    def init(
        key: Key, shape: Sequence[int], dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "*shape"]:
        if len(shape) < 2:
            raise ValueError(f"orthogonal: shape: expected at least 2 sizes, got {list(shape)}")
        rows, columns = shape[0], math.prod(shape[1:])
        at_least_single = torch.promote_types(dtype, torch.float32)
        tall = (max(rows, columns), min(rows, columns))
        basis = torch.ops.funcnets.orthonormal_columns(
            random.normal(key, tall, dtype=at_least_single)
        )
        matrix = basis if rows >= columns else basis.mT
        return (gain * matrix).to(dtype).reshape(tuple(shape))

    return init


def fans(shape: Sequence[int]) -> tuple[int, int]:
    """``(fan_in, fan_out)`` of a weight.

    >>> fans((64, 3, 7, 7))
    (147, 3136)
    """
    if len(shape) < 2:
        raise ValueError(f"fans: shape: expected at least 2 sizes, got {list(shape)}")
    field = math.prod(shape[2:])
    return shape[1] * field, shape[0] * field


def _orthonormal_columns(matrix: Tensor) -> Tensor:
    # One matrix at a time, so that a member of an ensemble has the bits it would have alone: a
    # batched factorisation may run another algorithm.
    result = torch.empty_like(matrix, memory_format=torch.contiguous_format)
    for one, out in zip(
        matrix.reshape(-1, *matrix.shape[-2:]), result.view(-1, *matrix.shape[-2:]), strict=True
    ):
        q, r = torch.linalg.qr(one)
        # Signs that make the diagonal of r positive make q unique, and so uniformly distributed.
        out.copy_(q * r.diagonal().sign())
    return result


def _register() -> None:
    op = "funcnets::orthonormal_columns"
    torch.library.define(op, "(Tensor matrix) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(op, "CompositeExplicitAutograd")(_orthonormal_columns)
    torch.library.register_fake(op)(
        lambda matrix: torch.empty_like(matrix, memory_format=torch.contiguous_format)
    )
    torch.library.register_vmap(
        op,
        lambda info, in_dims, matrix: (
            torch.ops.funcnets.orthonormal_columns(matrix.movedim(in_dims[0], 0)),
            0,
        ),
    )


_register()


# The commonest, at the top of the module: in tests every function made anew is checked anew.
def _constant(
    value: float, key: Key, shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*shape"]:
    return torch.full(tuple(shape), value, dtype=dtype, device=key.device)


def _uniform(
    low: float, high: float, key: Key, shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*shape"]:
    return random.uniform(key, shape, low, high, dtype)


def _normal(
    mean: float, std: float, key: Key, shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*shape"]:
    return random.normal(key, shape, mean, std, dtype)

"""Activations that torch.nn.functional lacks, gated units, and activations by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from funcnets.layers.params import fail

Activation = Callable[[Tensor], Tensor]


def identity(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The input, as ``torch.nn.Identity``."""
    return x


def squared_relu(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """``relu(x) ** 2`` (So et al. 2021, "Primer").

    >>> squared_relu(torch.tensor([-1.0, 3.0]))
    tensor([0., 9.])
    """
    return F.relu(x).square()


def quick_gelu(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """``x * sigmoid(1.702 * x)``, the approximation of GELU that CLIP uses.

    >>> quick_gelu(torch.tensor([0.0, 1.0]))
    tensor([0.0000, 0.8458])
    """
    return x * torch.sigmoid(1.702 * x)


def glu(
    x: Float[Tensor, "*batch doubled"],
    activation: Activation = torch.sigmoid,
) -> Float[Tensor, "*batch features"]:
    """The first half of the last axis, gated by the second: ``a * activation(b)``.

    As ``torch.nn.GLU`` (Dauphin et al. 2017); other activations give its variants (Shazeer 2020).

    >>> glu(torch.tensor([2.0, 0.0]))
    tensor([1.])
    """
    if not x.ndim or x.shape[-1] % 2:
        fail("glu", "x", "[..., an even size]", x.shape)
    # Not F.glu, whose forward mode has no vmap rule.
    value, gate = x.chunk(2, -1)
    return value * activation(gate)


def geglu(x: Float[Tensor, "*batch doubled"]) -> Float[Tensor, "*batch features"]:
    """`glu` with GELU (Shazeer 2020)."""
    return glu(x, F.gelu)


def swiglu(x: Float[Tensor, "*batch doubled"]) -> Float[Tensor, "*batch features"]:
    """`glu` with SiLU, also called swish (Shazeer 2020).

    >>> swiglu(torch.tensor([2.0, 1.0]))
    tensor([1.4621])
    """
    return glu(x, F.silu)


ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        "celu": F.celu,
        "elu": F.elu,
        "gelu": F.gelu,
        "gelu_tanh": partial(F.gelu, approximate="tanh"),
        "hardshrink": F.hardshrink,
        "hardsigmoid": F.hardsigmoid,
        "hardswish": F.hardswish,
        "hardtanh": F.hardtanh,
        "identity": identity,
        "leaky_relu": F.leaky_relu,
        "logsigmoid": F.logsigmoid,
        "mish": F.mish,
        "quick_gelu": quick_gelu,
        "relu": F.relu,
        "relu6": F.relu6,
        "selu": F.selu,
        "sigmoid": torch.sigmoid,
        "silu": F.silu,
        "sin": torch.sin,
        "softplus": F.softplus,
        "softshrink": F.softshrink,
        "softsign": F.softsign,
        "squared_relu": squared_relu,
        "tanh": torch.tanh,
        "tanhshrink": F.tanhshrink,
    }
)


def activation(name: str) -> Activation:
    """The elementwise function of a name, for model configs that hold the name.

    Names are those of ``torch.nn.functional`` where it has the function, with its defaults.

    Raises:
        ValueError: for an unknown name; it lists the known ones.

    >>> activation("relu")(torch.tensor([-1.0, 1.0]))
    tensor([0., 1.])
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {name}")
    return ACTIVATIONS[name]

"""Normalisation: batch, layer, group, instance and root mean square."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, overload

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from jaxtyping import Float
from tensordict import TensorDict
from torch import Tensor

from funcnets import _torch, random
from funcnets.layers import members_norm
from funcnets.layers.initializers import Initializer, ones, zeros
from funcnets.layers.params import check_dtype, check_positive, entries, fail, shape
from funcnets.random import Key
from funcnets.tree.flatten import tensordict


def init_batch_norm(
    key: Key,
    num_features: int,
    *,
    affine: bool = True,
    track_running_stats: bool = True,
    weight_init: Initializer | None = None,
    bias_init: Initializer | None = None,
    dtype: torch.dtype = torch.float32,
) -> TensorDict:
    """Parameters of `batch_norm`, each [num_features].

    ``weight`` (ones) and ``bias`` (zeros) if ``affine``; the buffers ``running_mean`` (zeros) and
    ``running_var`` (ones) if ``track_running_stats``. torch's counter ``num_batches_tracked`` is
    not among them.
    """
    check_positive("init_batch_norm", num_features=num_features)
    found = _affine(key, (num_features,), affine, affine, weight_init, bias_init, dtype)
    if track_running_stats:
        found["running_mean"] = torch.zeros(num_features, dtype=dtype, device=key.device)
        found["running_var"] = torch.ones(num_features, dtype=dtype, device=key.device)
    return TensorDict(found)


@overload
def batch_norm(
    params: TensorDict,
    x: Float[Tensor, "batch channels *spatial"],
    *,
    train: Literal[False] = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Float[Tensor, "batch channels *spatial"]: ...


@overload
def batch_norm(
    params: TensorDict,
    x: Float[Tensor, "batch channels *spatial"],
    *,
    train: Literal[True],
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Float[Tensor, "batch channels *spatial"], TensorDict]: ...


@overload
def batch_norm(
    params: TensorDict,
    x: Float[Tensor, "batch channels *spatial"],
    *,
    train: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> (
    Float[Tensor, "batch channels *spatial"]
    | tuple[Float[Tensor, "batch channels *spatial"], TensorDict]
): ...


def batch_norm(
    params: TensorDict,
    x: Float[Tensor, "batch channels *spatial"],
    *,
    train: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> (
    Float[Tensor, "batch channels *spatial"]
    | tuple[Float[Tensor, "batch channels *spatial"], TensorDict]
):
    """Normalises each channel over batch and space (Ioffe and Szegedy 2015).

    As ``torch.nn.BatchNorm1d``, ``BatchNorm2d`` and ``BatchNorm3d``. At inference the running
    statistics serve, as constants: no gradient reaches them. Parameters without running
    statistics normalise by those of the batch in both modes.

    Args:
        momentum: weight of this batch in the new running statistics.

    Returns:
        The outputs, and with ``train=True`` also the new buffers (empty where there are none): the
        running mean, and the running variance, of which the batch's part is the unbiased one.

    Raises:
        ValueError: where a batch to be normalised by its own statistics has one value per channel.

    >>> params = init_batch_norm(random.key(0), 3)
    >>> outputs, buffers = batch_norm(params, torch.arange(12.0).reshape(4, 3), train=True)
    >>> buffers["running_mean"]
    tensor([0.4500, 0.5500, 0.6500])
    """
    layer = "batch_norm"
    found = entries(params)
    _check_channels(layer, found, x)
    weight, bias = found.get("weight", None), found.get("bias", None)
    mean, var = found.get("running_mean", None), found.get("running_var", None)
    if not train and mean is not None and var is not None:
        return _by_statistics(x, weight, bias, mean.detach(), var.detach(), eps)
    count = math.prod(x.shape) // x.shape[1]
    if count <= 1:
        fail(layer, "x", "more than one value per channel in training", x.shape)
    if not train:
        return _batch_norm(x, weight, bias, None, None, True, 0.0, eps)
    if mean is None or var is None:
        return _normalize(x, weight, bias, eps)[0], TensorDict({})
    if isinstance(momentum, float) and not _torch.inlining():
        # torch's own update in place, of copies: a third of the operators.
        new = mean.detach().clone(), var.detach().clone()
        outputs = _batch_norm(x, weight, bias, *new, True, momentum, eps)
        return outputs, tensordict({"running_mean": new[0], "running_var": new[1]})
    outputs, batch_mean, batch_var = _normalize(x, weight, bias, eps)
    return outputs, _new_statistics(mean, var, batch_mean, batch_var, momentum)


def init_instance_norm(
    key: Key,
    num_features: int,
    *,
    affine: bool = False,
    track_running_stats: bool = False,
    weight_init: Initializer | None = None,
    bias_init: Initializer | None = None,
    dtype: torch.dtype = torch.float32,
) -> TensorDict:
    """Parameters of `instance_norm`: those of `init_batch_norm`, none of them by default."""
    check_positive("init_instance_norm", num_features=num_features)
    return init_batch_norm(
        key,
        num_features,
        affine=affine,
        track_running_stats=track_running_stats,
        weight_init=weight_init,
        bias_init=bias_init,
        dtype=dtype,
    )


@overload
def instance_norm(
    params: TensorDict,
    x: Float[Tensor, "batch channels *spatial"],
    *,
    train: Literal[False] = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Float[Tensor, "batch channels *spatial"]: ...


@overload
def instance_norm(
    params: TensorDict,
    x: Float[Tensor, "batch channels *spatial"],
    *,
    train: Literal[True],
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Float[Tensor, "batch channels *spatial"], TensorDict]: ...


@overload
def instance_norm(
    params: TensorDict,
    x: Float[Tensor, "batch channels *spatial"],
    *,
    train: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> (
    Float[Tensor, "batch channels *spatial"]
    | tuple[Float[Tensor, "batch channels *spatial"], TensorDict]
): ...


def instance_norm(
    params: TensorDict,
    x: Float[Tensor, "batch channels *spatial"],
    *,
    train: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> (
    Float[Tensor, "batch channels *spatial"]
    | tuple[Float[Tensor, "batch channels *spatial"], TensorDict]
):
    """Normalises each channel of each sample over space (Ulyanov et al. 2016).

    As ``torch.nn.InstanceNorm1d`` to ``InstanceNorm3d``, for batches. Modes, buffers and errors
    are those of `batch_norm`; the running statistics take up the mean over the batch.

    >>> x = random.normal(random.key(0), (2, 3, 4, 4))
    >>> instance_norm(TensorDict({}), x).shape
    torch.Size([2, 3, 4, 4])
    """
    layer = "instance_norm"
    found = entries(params)
    _check_channels(layer, found, x)
    weight, bias = found.get("weight", None), found.get("bias", None)
    mean, var = found.get("running_mean", None), found.get("running_var", None)
    if not train and mean is not None and var is not None:
        return _by_statistics(x, weight, bias, mean.detach(), var.detach(), eps)
    if math.prod(x.shape[2:]) <= 1:
        fail(layer, "x", "more than one value per channel and sample", x.shape)
    if not train:
        return F.instance_norm(x, None, None, weight, bias, True, 0.0, eps)
    samples = len(x)
    outputs, means, variances = _normalize(
        rearrange(x, "batch channels ... -> 1 (batch channels) ..."),
        None if weight is None else repeat(weight, "c -> (batch c)", batch=samples),
        None if bias is None else repeat(bias, "c -> (batch c)", batch=samples),
        eps,
    )
    outputs = rearrange(outputs, "1 (batch channels) ... -> batch channels ...", batch=samples)
    if mean is None or var is None:
        return outputs, TensorDict({})
    batch_mean, batch_var = (
        reduce(each, "(batch channels) -> channels", "mean", batch=samples)
        for each in (means, variances)
    )
    return outputs, _new_statistics(mean, var, batch_mean, batch_var, momentum)


def init_layer_norm(
    key: Key,
    normalized_shape: int | Sequence[int],
    *,
    elementwise_affine: bool = True,
    bias: bool = True,
    weight_init: Initializer | None = None,
    bias_init: Initializer | None = None,
    dtype: torch.dtype = torch.float32,
) -> TensorDict:
    """Parameters of `layer_norm`: weight (ones) and bias (zeros) of the normalized shape."""
    size = _sizes(normalized_shape)
    with_bias = elementwise_affine and bias
    return TensorDict(
        _affine(key, size, elementwise_affine, with_bias, weight_init, bias_init, dtype)
    )


def layer_norm(
    params: TensorDict,
    x: Float[Tensor, "*shape"],
    *,
    normalized_shape: int | Sequence[int] | None = None,
    eps: float = 1e-5,
) -> Float[Tensor, "*shape"]:
    """Normalises the last axes to mean 0, variance 1 (Ba et al. 2016), as ``torch.nn.LayerNorm``.

    Args:
        normalized_shape: the sizes of those axes; needed only where there is no weight to tell.

    >>> layer_norm(init_layer_norm(random.key(0), 2), torch.tensor([[1.0, 3.0]]))
    tensor([[-1.0000,  1.0000]])
    """
    found = entries(params)
    weight = found.get("weight", None)
    size = _normalized_shape("layer_norm", weight, x, normalized_shape)
    return F.layer_norm(x, size, weight, found.get("bias", None), eps)


def init_rms_norm(
    key: Key,
    normalized_shape: int | Sequence[int],
    *,
    elementwise_affine: bool = True,
    weight_init: Initializer | None = None,
    dtype: torch.dtype = torch.float32,
) -> TensorDict:
    """Parameters of `rms_norm`: a weight (ones) of the normalized shape."""
    size = _sizes(normalized_shape)
    return TensorDict(_affine(key, size, elementwise_affine, False, weight_init, None, dtype))


def rms_norm(
    params: TensorDict,
    x: Float[Tensor, "*shape"],
    *,
    normalized_shape: int | Sequence[int] | None = None,
    eps: float | None = None,
) -> Float[Tensor, "*shape"]:
    """Divides by the root mean square of the last axes (Zhang and Sennrich 2019).

    As ``torch.nn.RMSNorm``.

    Args:
        normalized_shape: the sizes of those axes; needed only where there is no weight to tell.
        eps: added to the mean square; by default the machine epsilon of the dtype.

    >>> rms_norm(init_rms_norm(random.key(0), 2), torch.tensor([[1.0, 7.0]]))
    tensor([[0.2000, 1.4000]])
    """
    weight = entries(params).get("weight", None)
    size = _normalized_shape("rms_norm", weight, x, normalized_shape)
    return F.rms_norm(x, size, weight, eps)


def normalize(x: Float[Tensor, "*shape"], *, eps: float = 1e-12) -> Float[Tensor, "*shape"]:
    """Divides by the Euclidean length of the last axis, at least ``eps``.

    As ``torch.nn.functional.normalize``, whose second derivatives are not finite where all
    features are zero; these are.

    >>> normalize(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # where a square may be large
    square = reduce(wide.square(), "... features -> ... 1", "sum")
    return (wide / square.clamp(min=eps**2).sqrt()).to(x.dtype)


def init_group_norm(
    key: Key,
    num_channels: int,
    *,
    affine: bool = True,
    weight_init: Initializer | None = None,
    bias_init: Initializer | None = None,
    dtype: torch.dtype = torch.float32,
) -> TensorDict:
    """Parameters of `group_norm`: weight (ones) and bias (zeros), each [num_channels]."""
    check_positive("init_group_norm", num_channels=num_channels)
    return TensorDict(_affine(key, (num_channels,), affine, affine, weight_init, bias_init, dtype))


def group_norm(
    params: TensorDict,
    x: Float[Tensor, "batch channels *spatial"],
    num_groups: int,
    *,
    eps: float = 1e-5,
) -> Float[Tensor, "batch channels *spatial"]:
    """Normalises each group of channels of each sample (Wu and He 2018), as ``torch.nn.GroupNorm``.

    >>> x = random.normal(random.key(0), (2, 6, 4, 4))
    >>> group_norm(init_group_norm(random.key(0), 6), x, num_groups=3).shape
    torch.Size([2, 6, 4, 4])
    """
    found = entries(params)
    _check_channels("group_norm", found, x)
    if num_groups < 1 or x.shape[1] % num_groups:
        fail("group_norm", "x", f"channels divisible by {num_groups=}", x.shape)
    # Not of torch.nn.functional, which refuses a group of one value, but in a batch of one alone.
    affine = found.get("weight", None), found.get("bias", None)
    return torch.group_norm(x, num_groups, *affine, eps, torch.backends.cudnn.enabled)


def _affine(
    key: Tensor,
    size: tuple[int, ...],
    weight: bool,
    bias: bool,
    weight_init: Initializer | None,
    bias_init: Initializer | None,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    weight_key, bias_key = random.split(key)
    found = {}
    if weight:
        found["weight"] = (weight_init or ones())(weight_key, size, dtype)
    if bias:
        found["bias"] = (bias_init or zeros())(bias_key, size, dtype)
    return found


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    train: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """What F.batch_norm calls, without its look at each argument."""
    cudnn = torch.backends.cudnn.enabled
    return torch.batch_norm(x, weight, bias, mean, var, train, momentum, eps, cudnn)


def _by_statistics(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    if weight is not None and bias is not None and members_norm.serves_inference(x, weight, bias):
        return members_norm.at_inference(x, weight, bias, mean, var, eps)
    return _batch_norm(x, weight, bias, mean, var, False, 0.0, eps)


def _normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, mean and unbiased variance per channel, in one pass over the batch."""
    if weight is not None and bias is not None and members_norm.serves_training(x, weight, bias):
        normalized = members_norm.in_training(x, weight, bias, eps)
    else:
        normalized = members_norm.normalize(x, weight, bias, eps)
    outputs, mean, inverse_std = normalized
    count = math.prod(x.shape) // x.shape[1]
    var = (inverse_std.detach() ** -2 - eps).clamp(min=0)
    return outputs, mean.detach(), var * (count / (count - 1))


def _new_statistics(
    mean: Tensor, var: Tensor, batch_mean: Tensor, batch_var: Tensor, momentum: float
) -> TensorDict:
    old = mean.detach(), var.detach()
    new = batch_mean.to(mean.dtype), batch_var.to(var.dtype)
    means, variances = (torch.lerp(a, b, momentum) for a, b in zip(old, new, strict=True))
    return tensordict({"running_mean": means, "running_var": variances})


def _sizes(normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    return (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)


def _normalized_shape(
    layer: str, weight: Tensor | None, x: Tensor, asked: int | Sequence[int] | None
) -> Sequence[int]:
    if weight is None:
        if asked is None:
            raise ValueError(f"{layer}: normalized_shape: needed, as params have no weight")
        size: Sequence[int] = _sizes(asked)
    else:
        if x.dtype != weight.dtype:
            check_dtype(layer, x, weight, "weight")
        size = weight.shape
        if asked is not None and _sizes(asked) != tuple(size):
            fail(layer, "normalized_shape", f"{list(size)} (as weight)", _sizes(asked))
    if x.shape[x.ndim - len(size) :] != torch.Size(size) or x.ndim < len(size):
        fail(layer, "x", shape("...", *size), x.shape)
    return size


def _check_channels(layer: str, found: Mapping[str, Tensor], x: Tensor) -> None:
    if x.ndim < 2:
        fail(layer, "x", "[batch, channels, ...]", x.shape)
    name = "weight" if "weight" in found else "running_mean"
    entry = found.get(name)
    if entry is None:
        return
    if x.dtype != entry.dtype:
        check_dtype(layer, x, entry, name)
    if x.shape[1] != entry.shape[0] or entry.ndim != 1:
        fail(layer, "x", f"{shape('batch', entry.shape[0], '...')} (as {name})", x.shape)

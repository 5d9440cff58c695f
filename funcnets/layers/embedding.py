"""Embeddings: rows of a matrix looked up by index, one by one or reduced over bags."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Float, Int
from tensordict import TensorDict
from torch import Tensor

from funcnets.layers.initializers import Initializer, normal
from funcnets.layers.params import check_positive, entries, fail, shape, weight_and_bias
from funcnets.random import Key


def init_embedding(
    key: Key,
    num_embeddings: int,
    embedding_dim: int,
    *,
    padding_idx: int | None = None,
    weight_init: Initializer | None = None,
    dtype: torch.dtype = torch.float32,
) -> TensorDict:
    """Parameters of `embedding`: weight [num_embeddings, embedding_dim], standard normal.

    Args:
        padding_idx: the row that begins as zero; negative counts from the end.
    """
    check_positive("init_embedding", num_embeddings=num_embeddings, embedding_dim=embedding_dim)
    weight = (weight_init or normal())(key, (num_embeddings, embedding_dim), dtype)
    if padding_idx is not None:
        row = _padding("init_embedding", padding_idx, num_embeddings)
        rows = rearrange(torch.arange(num_embeddings, device=key.device), "rows -> rows 1")
        weight = torch.where(rows == row, 0.0, weight)
    return TensorDict({"weight": weight})


def embedding(
    params: TensorDict, indices: Int[Tensor, "*batch"], *, padding_idx: int | None = None
) -> Float[Tensor, "*batch embedding_dim"]:
    """The rows ``weight[indices]``, as ``torch.nn.Embedding``.

    Args:
        padding_idx: the row that is a constant: no gradient, and no tangent, passes through it.

    >>> from funcnets import random
    >>> params = init_embedding(random.key(0), 10, 4, padding_idx=0)
    >>> embedding(params, torch.tensor([0]), padding_idx=0)
    tensor([[0., 0., 0., 0.]])
    """
    weight = _weight("embedding", params)
    rows = F.embedding(indices, weight)
    if padding_idx is None:
        return rows
    # F.embedding's own padding_idx stops the gradient but lets the tangent of forward mode pass.
    row = _padding("embedding", padding_idx, weight.shape[0])
    return torch.where(rearrange(indices == row, "... -> ... 1"), rows.detach(), rows)


def unembed(
    params: TensorDict, x: Float[Tensor, "*batch embedding_dim"]
) -> Float[Tensor, "*batch num_embeddings"]:
    """Logits ``x @ weight.T``: the output projection that is tied to an `embedding`.

    Given the subtree of the embedding, it reads the same weight (Press and Wolf 2017).

    >>> from funcnets import random
    >>> unembed(init_embedding(random.key(0), 10, 4), torch.ones(2, 4)).shape
    torch.Size([2, 10])
    """
    weight, _ = weight_and_bias("unembed", params, x)
    if weight.ndim != 2:
        fail("unembed", "weight", "[num_embeddings, embedding_dim]", weight.shape)
    if not x.ndim or x.shape[-1] != weight.shape[1]:
        fail("unembed", "x", shape("...", weight.shape[1]), x.shape)
    return F.linear(x, weight)


def embedding_bag(
    params: TensorDict,
    indices: Int[Tensor, "*batch"],
    offsets: Int[Tensor, " starts"] | None = None,
    *,
    mode: Literal["sum", "mean", "max"] = "mean",
    per_sample_weights: Float[Tensor, "*batch"] | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Float[Tensor, "bags embedding_dim"]:
    """The rows ``weight[indices]`` reduced over each bag, as ``torch.nn.EmbeddingBag``.

    Parameters are those of `init_embedding`. An empty bag gives zeros.

    Args:
        indices: [bags, size], or [n] with ``offsets``.
        offsets: where each bag begins in ``indices``; the first is 0, and they do not decrease.
        mode: what is taken over a bag.
        per_sample_weights: factors of the rows, for mode "sum" only.
        include_last_offset: whether ``offsets`` ends with the end of the last bag, n.
        padding_idx: the index that is left out of every bag.

    >>> params = TensorDict({"weight": torch.tensor([[1.0], [2.0], [4.0]])})
    >>> embedding_bag(params, torch.tensor([0, 1, 2]), torch.tensor([0, 2]), mode="sum")
    tensor([[3.],
            [4.]])
    """
    layer = "embedding_bag"
    weight = _weight(layer, params)
    if mode not in ("sum", "mean", "max"):
        raise ValueError(f"{layer}: mode: expected sum, mean or max, got {mode}")
    if indices.ndim not in (1, 2):
        fail(layer, "indices", "[bags, size], or [n] with offsets", indices.shape)
    if (offsets is None) != (indices.ndim == 2):
        raise ValueError(f"{layer}: offsets: expected with indices [n], and only with those")
    if per_sample_weights is not None:
        if mode != "sum":
            raise ValueError(f"{layer}: per_sample_weights: expected with mode sum, got {mode}")
        if per_sample_weights.shape != indices.shape:
            fail(layer, "per_sample_weights", str(list(indices.shape)), per_sample_weights.shape)
        if per_sample_weights.dtype != weight.dtype:
            raise ValueError(
                f"{layer}: per_sample_weights: expected {weight.dtype} (as weight), "
                f"got {per_sample_weights.dtype}"
            )
    # Not F.embedding_bag: its operator has neither a vmap rule nor forward mode.
    rows = F.embedding(indices, weight)
    if padding_idx is None:
        keep = torch.ones_like(indices, dtype=torch.bool)
    else:
        keep = indices != _padding(layer, padding_idx, weight.shape[0])
    keep = rearrange(keep, "... -> ... 1")
    if per_sample_weights is not None:
        rows = rows * rearrange(per_sample_weights, "... -> ... 1")
    if offsets is None:
        return _reduce_equal_bags(rows, keep, mode)
    return _reduce_bags(rows, keep, offsets, include_last_offset, mode)


def _reduce_equal_bags(rows: Tensor, keep: Tensor, mode: str) -> Tensor:
    if mode == "max":
        largest = reduce(rows.masked_fill(~keep, float("-inf")), "bags size dim -> bags dim", "max")
        return torch.where(reduce(keep, "bags size 1 -> bags 1", "any"), largest, 0.0)
    total = reduce(torch.where(keep, rows, 0.0), "bags size dim -> bags dim", "sum")
    if mode == "sum":
        return total
    return total / reduce(keep.to(rows.dtype), "bags size 1 -> bags 1", "sum").clamp(min=1)


def _reduce_bags(
    rows: Tensor, keep: Tensor, offsets: Tensor, include_last_offset: bool, mode: str
) -> Tensor:
    n, bags = len(rows), len(offsets) - include_last_offset
    # Each element's bag: how many bags have begun by then, less one. An offset of n is past all.
    begun = offsets.new_zeros(n + 1).index_add(0, offsets[:bags], torch.ones_like(offsets[:bags]))
    bag = begun.cumsum(0)[:n] - 1

    def total(values: Tensor) -> Tensor:
        return values.new_zeros(bags, *values.shape[1:]).index_add(0, bag, values)

    if mode == "max":
        # Which elements attain the maximum is found without a gradient, as scatter_reduce has no
        # forward mode; those that tie share the value.
        fixed = rows.detach()
        lowest = fixed.new_full((bags, fixed.shape[1]), float("-inf"))
        index = bag.unsqueeze(-1).expand_as(fixed)
        largest = lowest.scatter_reduce(0, index, fixed.masked_fill(~keep, float("-inf")), "amax")
        attains = keep & (fixed == largest[bag])
        count = total(attains.to(rows.dtype))
        return total(torch.where(attains, rows, 0.0)) / count.clamp(min=1)
    summed = total(torch.where(keep, rows, 0.0))
    return summed if mode == "sum" else summed / total(keep.to(rows.dtype)).clamp(min=1)


def _weight(layer: str, params: TensorDict) -> Tensor:
    weight = entries(params)["weight"]
    if weight.ndim != 2:
        fail(layer, "weight", "[num_embeddings, embedding_dim]", weight.shape)
    return weight


def _padding(layer: str, padding_idx: int, num_embeddings: int) -> int:
    if not -num_embeddings <= padding_idx < num_embeddings:
        raise ValueError(
            f"{layer}: padding_idx: expected an index of {num_embeddings} rows, got {padding_idx}"
        )
    return padding_idx % num_embeddings

"""The embedding of a category, as a model: the encoder of an input that is no measurement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from tensordict import TensorDict
from torch import Tensor

from funcnets import layers, random
from funcnets.layers import init_embedding
from funcnets.model import Model, bind
from funcnets.models import blocks
from funcnets.taps import Taps, TapsLike


@dataclass(frozen=True)
class Config:
    """What an embedding is made of."""

    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None = None

    def __post_init__(self) -> None:
        blocks.check_sizes(
            "embedding", num_embeddings=self.num_embeddings, embedding_dim=self.embedding_dim
        )
        rows = range(-self.num_embeddings, self.num_embeddings)
        if self.padding_idx is not None and self.padding_idx not in rows:
            raise ValueError(
                f"embedding: padding_idx: expected an index of {self.num_embeddings} rows, "
                f"got {self.padding_idx!r}"
            )


def embedding(num_embeddings: int, embedding_dim: int, *, padding_idx: int | None = None) -> Model:
    """A vector for each of ``num_embeddings`` categories: [...] to [..., embedding_dim].

    The model of `funcnets.layers.embedding`; its one parameter has the name that
    ``torch.nn.Embedding`` gives it, ``weight``.

    Args:
        padding_idx: the row that begins as zero and stays as it is.

    >>> import torch
    >>> model = embedding(10, 4)
    >>> model.apply(model.init(random.key(0)), torch.tensor([3, 1, 3])).shape
    torch.Size([3, 4])
    """
    config = Config(num_embeddings, embedding_dim, padding_idx)
    return bind("embedding", config, init, forward, check)


def init(key: random.Key, config: Config) -> TensorDict:
    """The parameters."""
    return init_embedding(
        key, config.num_embeddings, config.embedding_dim, padding_idx=config.padding_idx
    )


def check(indices: Tensor, config: Config) -> None:
    """Raises unless the indices are integers."""
    if indices.is_floating_point() or indices.is_complex():
        raise ValueError(f"embedding: x: expected integers, got {indices.dtype}")


def forward(
    params: TensorDict,
    indices: Int[Tensor, "*batch"],
    config: Config,
    *,
    train: bool = False,
    key: random.Key | None = None,
    taps: TapsLike = (),
) -> Float[Tensor, "*batch embedding_dim"] | Any:
    """The rows of the indices; in training with no new buffers."""
    check(indices, config)
    rows = layers.embedding(params, indices, padding_idx=config.padding_idx)
    return Taps("embedding", taps).finish(rows, {}, train)

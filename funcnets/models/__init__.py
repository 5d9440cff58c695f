"""Model families, one file each: a Config, ``init``, ``forward``, and constructors by name."""

from funcnets.models.cnn import cnn
from funcnets.models.mlp import mlp

__all__ = ["cnn", "mlp"]

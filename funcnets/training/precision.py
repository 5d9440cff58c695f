"""Mixed precision: half precision within the network, float32 for parameters and losses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor
from torch.overrides import TorchFunctionMode

from funcnets.optim.leafwise import new_step
from funcnets.tree.flatten import Tree

_LEAST, _MOST = 2.0**-14, 2.0**24


class ScaleState(NamedTuple):
    """The loss scale, and how many steps it has been good for."""

    scale: Tensor
    good: Tensor


@dataclass(frozen=True)
class Precision:
    """How the network is computed: `bfloat16` or `float16`."""

    dtype: torch.dtype
    scale: float | None = None
    every: int = 0

    def init(self, params: Tree) -> Any:
        """The first `ScaleState`; ``()`` where nothing is scaled."""
        if self.scale is None:
            return ()
        zero = new_step(params)
        return ScaleState(zero.to(torch.float32) + self.scale, zero)

    def update(self, state: ScaleState, overflow: Bool[Tensor, ""]) -> ScaleState:
        """Half the scale after an overflow, twice after ``every`` good steps in a row."""
        good = torch.where(overflow, 0, state.good + 1)
        grown = torch.where(good >= self.every, 2 * state.scale, state.scale)
        scale = torch.where(overflow, state.scale / 2, grown).clamp(_LEAST, _MOST)
        return ScaleState(scale, torch.where(good >= self.every, 0, good))

    def can_shrink(self, state: ScaleState) -> Bool[Tensor, ""]:
        """Whether a gradient that is not finite may be the fault of the scale."""
        return state.scale > _LEAST


def bfloat16() -> Precision:
    """Matrix products and convolutions in bfloat16, which needs no loss scale."""
    return Precision(torch.bfloat16)


def float16(scale: float = 2.0**16, every: int = 2000) -> Precision:
    """Matrix products and convolutions in float16, with a dynamic loss scale.

    As ``torch.amp.GradScaler`` (Micikevicius et al. 2018), but as state: a step whose gradients
    overflow is skipped and halves the scale, ``every`` good ones in a row double it.
    """
    if not _LEAST <= scale <= _MOST or every < 1:
        raise ValueError(
            f"float16: expected a scale within {_LEAST:g} and {_MOST:g} and every of at least 1, "
            f"got {scale} and {every}"
        )
    return Precision(torch.float16, float(scale), every)


@contextlib.contextmanager
def computing_in(precision: Precision | None, device: str) -> Iterator[None]:
    """Where the network is computed."""
    if precision is None:
        yield
        return
    # Without its cache, whose tensors would outlive the transform that they were made in.
    with torch.autocast(device, precision.dtype, cache_enabled=False):
        if torch.compiler.is_dynamo_compiling():
            yield
            return
        with _BatchNormInFloat32():
            yield


class _BatchNormInFloat32(TorchFunctionMode):
    """Autocast has no rule for batch norm, whose derivative under vmap wants one dtype throughout.

    torch 2.11 to 2.15: "expected scalar type BFloat16 but found Float".
    """

    _functions = frozenset({F.batch_norm, torch.batch_norm, torch._native_batch_norm_legit})

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in self._functions or args[0].dtype not in (torch.float16, torch.bfloat16):
            return func(*args, **(kwargs or {}))
        x, *rest = args
        outputs = func(x.to(torch.float32), *rest, **(kwargs or {}))
        if isinstance(outputs, tuple):
            return outputs[0].to(x.dtype), *outputs[1:]
        return outputs.to(x.dtype)

"""The choice of one token by its logits."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from funcnets import random
from funcnets.random import Key


def sample(
    key: Key | None,
    logits: Float[Tensor, "*batch vocabulary"],
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | None = None,
    top_p: float | Tensor | None = None,
) -> Int[Tensor, "*batch"]:
    """A token drawn with probabilities ``softmax(logits / temperature)``; every row for itself.

    Args:
        key: may be None where the temperature is the number 0.
        temperature: at 0 the token of the largest logit (of equal ones the first); a number, or a
            tensor of shape [].
        top_k: draw among this many of the largest logits.
        top_p: draw from the nucleus, the fewest tokens that have this probability together, at the
            temperature (and among the ``top_k``).

    >>> sample(random.key(0), torch.tensor([[0.0, 9.0, 1.0]]), top_k=2)
    tensor([1])
    """
    check_choice("sample", key, temperature, top_k, top_p)
    if not isinstance(temperature, Tensor):
        if temperature == 0:
            return logits.argmax(-1)
        scaled = logits / temperature
    else:
        scaled = logits / torch.where(temperature > 0, temperature, 1.0)
    assert key is not None
    if top_k is not None:
        scaled = keep_top_k(scaled, top_k)
    if top_p is not None:
        scaled = keep_nucleus(scaled, top_p)
    drawn = random.categorical(key, logits.shape[:-1], scaled)
    if not isinstance(temperature, Tensor):
        return drawn
    return torch.where(temperature > 0, drawn, logits.argmax(-1))


def keep_top_k(
    logits: Float[Tensor, "*batch vocabulary"], k: int
) -> Float[Tensor, "*batch vocabulary"]:
    """The ``k`` largest logits; the others become -inf (Fan et al. 2018).

    Of equal logits the first are kept. A ``k`` beyond the vocabulary keeps all.

    >>> keep_top_k(torch.tensor([1.0, 3.0, 2.0]), 2)
    tensor([-inf, 3., 2.])
    """
    if k < 1:
        raise ValueError(f"keep_top_k: k: expected at least 1, got {k}")
    if k >= logits.shape[-1]:
        return logits
    return logits.masked_fill(_ranks(logits) >= k, float("-inf"))


def keep_nucleus(
    logits: Float[Tensor, "*batch vocabulary"], p: float | Tensor
) -> Float[Tensor, "*batch vocabulary"]:
    """The most probable tokens that together have probability ``p``; the others become -inf.

    The fewest that do, and at least one (Holtzman et al. 2020, "The curious case of neural text
    degeneration").

    >>> keep_nucleus(torch.tensor([0.1, 0.6, 0.3]).log(), 0.7).exp()
    tensor([0.0000, 0.6000, 0.3000])
    """
    if not isinstance(p, Tensor) and not 0 <= p <= 1:
        raise ValueError(f"keep_nucleus: p: expected a probability, got {p}")
    order = logits.argsort(dim=-1, descending=True, stable=True)
    probabilities = logits.softmax(-1).gather(-1, order)
    before = probabilities.cumsum(-1) - probabilities
    # Of the sorted tokens those kept come first: how many there are is the rank that they end at.
    kept = (before < p).sum(-1, keepdim=True).clamp(min=1)
    return logits.masked_fill(order.argsort(dim=-1) >= kept, float("-inf"))


def penalize_repetition(
    logits: Float[Tensor, "*batch vocabulary"],
    tokens: Int[Tensor, "*batch time"],
    penalty: float | Tensor,
    lengths: Int[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch vocabulary"]:
    """Logits of the tokens that have occurred, divided by ``penalty`` (multiplied if negative).

    Keskar et al. 2019 (CTRL): above 1 it makes repetition less likely.

    Args:
        tokens: those so far; in each row only the first ``lengths`` count.

    >>> penalize_repetition(torch.tensor([2.0, -2.0, 2.0]), torch.tensor([0, 1]), 2.0)
    tensor([ 1., -4.,  2.])
    """
    if not isinstance(penalty, Tensor) and penalty <= 0:
        raise ValueError(f"penalize_repetition: penalty: expected more than 0, got {penalty}")
    counts = torch.ones_like(tokens)
    if lengths is not None:
        columns = torch.arange(tokens.shape[-1], device=tokens.device)
        real = columns < rearrange(lengths, "... -> ... 1")
        counts, tokens = real.to(tokens.dtype), torch.where(real, tokens, 0)
    seen = torch.zeros_like(logits, dtype=tokens.dtype).scatter_add(-1, tokens, counts) > 0
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def check_choice(
    name: str,
    key: Tensor | None,
    temperature: float | Tensor,
    top_k: int | None,
    top_p: float | Tensor | None,
) -> None:
    """Raises where the options of `sample` make no sense."""
    if not isinstance(temperature, Tensor) and not 0 <= temperature < float("inf"):
        raise ValueError(f"{name}: temperature: expected 0 or more, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"{name}: top_k: expected at least 1, got {top_k}")
    if top_p is not None and not isinstance(top_p, Tensor) and not 0 <= top_p <= 1:
        raise ValueError(f"{name}: top_p: expected a probability, got {top_p}")
    if key is None and (isinstance(temperature, Tensor) or temperature != 0):
        raise ValueError(f"{name}: key: expected a key (temperature is not 0), got None")


def _ranks(logits: Tensor) -> Tensor:
    """0 for the largest, 1 for the next, ...; equal ones in the order of their places."""
    return logits.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)

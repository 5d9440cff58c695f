"""How generation asks a function for the logits of the next token: of all tokens, or by a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor

from funcnets import _torch

# f(tokens [batch, time]) -> logits [batch, time, vocabulary]; with a cache
# f(tokens, cache=cache) -> (logits, cache), and with ragged prompts f(tokens, cache=, lengths=).
Logits = Callable[..., Any]


def prepare(
    name: str, prompts: Tensor, steps: int, lengths: Tensor | None, pad: int
) -> tuple[Tensor, Tensor]:
    """The prompts with room for ``steps`` tokens, ``pad`` in what is not written, and lengths."""
    batch, time = prompts.shape
    if not time:
        raise ValueError(f"{name}: prompts: expected at least one token, got {list(prompts.shape)}")
    if steps < 0:
        raise ValueError(f"{name}: steps: expected 0 or more, got {steps}")
    room = prompts.new_full((batch, steps), pad)
    if lengths is None:
        return torch.cat([prompts, room], 1), torch.full_like(prompts[:, 0], time)
    if lengths.shape != (batch,):
        raise ValueError(f"{name}: lengths: expected [{batch}], got {list(lengths.shape)}")
    if not _torch.inlining() and batch:
        least, most = (int(bound) for bound in lengths.aminmax())
        if least < 1 or most > time:
            raise ValueError(
                f"{name}: lengths: expected 1 to {time} tokens, got {least} to {most} "
                "(an empty prompt needs a token that begins a text)"
            )
    lengths = lengths.to(prompts.dtype)
    real = torch.arange(time, device=prompts.device) < rearrange(lengths, "batch -> batch 1")
    return torch.cat([torch.where(real, prompts, pad), room], 1), lengths


def check_cache(name: str, cache: Any, window: int | None) -> None:
    """Raises unless it is one or the other."""
    if window is not None and window < 1:
        raise ValueError(f"{name}: window: expected at least 1, got {window}")
    if window is not None and cache is not None:
        raise ValueError(f"{name}: window: expected None with a cache, got {window}")


def stop_tokens(stop: int | Sequence[int]) -> tuple[int, ...]:
    """As a tuple."""
    return (stop,) if isinstance(stop, int) else tuple(stop)


def among(tokens: Tensor, stop: tuple[int, ...]) -> Tensor:
    """Which of the tokens are stop tokens."""
    found = torch.zeros_like(tokens, dtype=torch.bool)
    for one in stop:
        found = found | (tokens == one)
    return found


def first_logits(
    name: str,
    f: Logits,
    tokens: Tensor,
    lengths: Tensor,
    cache: Any,
    window: int | None,
    time: int,
    ragged: bool,
) -> tuple[Tensor, Any]:
    """Logits [batch, vocabulary] after the prompts, which are ``time`` wide, and the cache."""
    if cache is None:
        return _uncached(name, f, tokens, lengths, window), None
    more = {"lengths": lengths} if ragged else {}
    logits, cache = _pair(name, f(tokens[:, :time], cache=cache, **more))
    _check_logits(name, logits, len(tokens), time)
    return _at(logits, lengths - 1), cache


def next_logits(
    name: str, f: Logits, tokens: Tensor, lengths: Tensor, cache: Any, window: int | None
) -> tuple[Tensor, Any]:
    """Logits [batch, vocabulary] after one more token, the last of each row, and the cache."""
    if cache is None:
        return _uncached(name, f, tokens, lengths, window), None
    newest = tokens.gather(1, rearrange(lengths - 1, "batch -> batch 1"))
    logits, cache = _pair(name, f(newest, cache=cache))
    _check_logits(name, logits, len(tokens), 1)
    return rearrange(logits, "batch 1 vocabulary -> batch vocabulary"), cache


def _uncached(name: str, f: Logits, tokens: Tensor, lengths: Tensor, window: int | None) -> Tensor:
    last = lengths - 1
    if window is not None and window < tokens.shape[1]:
        start = (lengths - window).clamp(min=0)
        columns = torch.arange(window, device=tokens.device)
        tokens = tokens.gather(1, rearrange(start, "batch -> batch 1") + columns)
        last = last - start
    logits = f(tokens)
    _check_logits(name, logits, *tokens.shape)
    return _at(logits, last)


def _at(logits: Tensor, place: Tensor) -> Tensor:
    """Logits [batch, time, vocabulary] at one place in each row."""
    index = repeat(place, "batch -> batch 1 vocabulary", vocabulary=logits.shape[-1])
    return rearrange(logits.gather(1, index), "batch 1 vocabulary -> batch vocabulary")


def _pair(name: str, result: Any) -> tuple[Tensor, Any]:
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(
            f"{name}: f: expected (logits, cache) where a cache is given, "
            f"got {type(result).__name__}"
        )
    return result


def _check_logits(name: str, logits: Any, batch: int, time: int) -> None:
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != (batch, time):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{name}: f: expected logits [{batch}, {time}, vocabulary], got {got}")

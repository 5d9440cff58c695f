"""Token after token: greedy, or drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Int
from torch import Tensor

from funcnets import _torch, random
from funcnets.control import scan
from funcnets.generation.choice import check_choice, penalize_repetition, sample
from funcnets.generation.reading import (
    Logits,
    among,
    check_cache,
    first_logits,
    next_logits,
    prepare,
    stop_tokens,
)
from funcnets.random import Key


class Generated(NamedTuple):
    """Prompts and what follows them.

    Attributes:
        tokens: [batch, time + steps]; each row its prompt, its new tokens, then ``pad``.
        lengths: [batch], how many tokens of each row are real (a stop token is).
    """

    tokens: Tensor
    lengths: Tensor


def generate(
    key: Key | None,
    f: Logits,
    prompts: Int[Tensor, "batch time"],
    steps: int,
    *,
    lengths: Int[Tensor, " batch"] | None = None,
    cache: Any = None,
    window: int | None = None,
    temperature: float | Tensor = 1.0,
    top_k: int | None = None,
    top_p: float | Tensor | None = None,
    repetition_penalty: float | Tensor | None = None,
    stop: int | Sequence[int] = (),
    pad: int = 0,
) -> Generated:
    """Continues each prompt by up to ``steps`` tokens, drawn from the logits that ``f`` gives.

    The same key gives the same tokens, whatever the batch beside a row; each row draws for itself.
    Called plainly it ends as soon as every row has met a stop token; under `funcnets.compile` it is
    one loop of ``steps`` turns.

    Args:
        f: ``f(tokens) -> logits``, [batch, time] to [batch, time, vocabulary], in which a token may
            not depend on those behind it (they are padding). Where a ``cache`` is given,
            ``f(tokens, cache=cache) -> (logits, cache)``, for the tokens that are new.
            ``functools.partial(model.apply, params)`` of `funcnets.models.gpt` is both.
        prompts: as many tokens as the longest prompt, the shorter ones padded behind.
        steps: how many tokens at most.
        lengths: of the prompts, if they differ; a function with a cache is then first called with
            ``lengths=lengths`` too, and counts that many tokens of each row.
        cache: the state before the prompts, of which every leaf begins with the batch.
        window: how many of the latest tokens ``f`` is given, where it has no cache; for texts that
            outgrow the context. By default all.
        temperature: see `sample`, as ``top_k`` and ``top_p``.
        repetition_penalty: see `penalize_repetition`; prompts count.
        stop: the tokens that end a row.
        pad: what stands behind the end of a row; a token that ``f`` takes.

    >>> count = lambda tokens: torch.nn.functional.one_hot((tokens + 1) % 5, 5) * 100.0
    >>> generate(random.key(0), count, torch.tensor([[1], [3]]), 3, stop=4)
    Generated(tokens=tensor([[1, 2, 3, 4],
            [3, 4, 0, 0]]), lengths=tensor([4, 2]))
    """
    name = "generate"
    check_choice(name, key, temperature, top_k, top_p)
    check_cache(name, cache, window)
    time, stops = prompts.shape[1], stop_tokens(stop)
    tokens, held = prepare(name, prompts, steps, lengths, pad)
    if not steps:
        return Generated(tokens, held)
    # A key for each turn, though a greedy one draws nothing with it.
    keys = random.split(random.key(0, device=tokens.device) if key is None else key, steps)
    columns = torch.arange(tokens.shape[1], device=tokens.device)

    def extend(state: dict[str, Any], logits: Tensor, key: Tensor) -> dict[str, Any]:
        tokens, lengths, finished = state["tokens"], state["lengths"], state["finished"]
        if repetition_penalty is not None:
            logits = penalize_repetition(logits, tokens, repetition_penalty, lengths)
        token = sample(key, logits, temperature=temperature, top_k=top_k, top_p=top_p)
        token = torch.where(finished, pad, token.to(tokens.dtype))
        here = columns == rearrange(lengths, "batch -> batch 1")
        return {
            "tokens": torch.where(here, rearrange(token, "batch -> batch 1"), tokens),
            "lengths": lengths + (~finished).to(lengths.dtype),
            "finished": finished | among(token, stops),
        }

    def turn(state: dict[str, Any], key: Tensor) -> tuple[dict[str, Any], None]:
        logits, cache = next_logits(
            name, f, state["tokens"], state["lengths"], state["cache"], window
        )
        return {**extend(state, logits, key), "cache": cache}, None

    begun = torch.zeros_like(held, dtype=torch.bool)
    logits, cache = first_logits(
        name, f, tokens, held, cache, window, time, ragged=lengths is not None
    )
    state = extend({"tokens": tokens, "lengths": held, "finished": begun}, logits, keys[0])
    state["cache"] = cache
    if _torch.tracing():
        state, _ = scan(turn, state, keys[1:], unroll=False)
    else:
        for one in keys[1:].unbind():
            if stops and not _torch.inlining() and bool(state["finished"].all()):
                break
            state, _ = turn(state, one)
    return Generated(state["tokens"], state["lengths"])


def greedy(
    f: Logits,
    prompts: Int[Tensor, "batch time"],
    steps: int,
    *,
    lengths: Int[Tensor, " batch"] | None = None,
    cache: Any = None,
    window: int | None = None,
    repetition_penalty: float | Tensor | None = None,
    stop: int | Sequence[int] = (),
    pad: int = 0,
) -> Generated:
    """Continues each prompt by the most probable token each time: `generate` at temperature 0.

    >>> count = lambda tokens: torch.nn.functional.one_hot((tokens + 1) % 5, 5) * 1.0
    >>> greedy(count, torch.tensor([[1]]), 3).tokens
    tensor([[1, 2, 3, 4]])
    """
    return generate(
        None,
        f,
        prompts,
        steps,
        lengths=lengths,
        cache=cache,
        window=window,
        temperature=0.0,
        repetition_penalty=repetition_penalty,
        stop=stop,
        pad=pad,
    )

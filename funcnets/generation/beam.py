"""Beam search: the continuations of the highest probability, several at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Int
from torch import Tensor

from funcnets import _torch, tree
from funcnets.control import scan
from funcnets.generation.choice import penalize_repetition
from funcnets.generation.reading import (
    Logits,
    among,
    check_cache,
    first_logits,
    next_logits,
    prepare,
    stop_tokens,
)


class Beams(NamedTuple):
    """The continuations found for each prompt, the best first.

    Attributes:
        tokens: [batch, beams, time + steps]; prompt, new tokens, then ``pad``.
        lengths: [batch, beams], how many tokens of each are real (a stop token is).
        scores: [batch, beams], log-probability over length to the penalty; -inf where there are
            fewer continuations than beams.
    """

    tokens: Tensor
    lengths: Tensor
    scores: Tensor


def beam_search(
    f: Logits,
    prompts: Int[Tensor, "batch time"],
    steps: int,
    *,
    beams: int,
    length_penalty: float = 1.0,
    lengths: Int[Tensor, " batch"] | None = None,
    cache: Any = None,
    window: int | None = None,
    repetition_penalty: float | Tensor | None = None,
    stop: int | Sequence[int] = (),
    pad: int = 0,
) -> Beams:
    """The best continuations of each prompt by up to ``steps`` tokens that a beam of them finds.

    In each turn every continuation is extended by every token, and the ``beams`` of the highest
    score stay. One that has met a stop token competes on with the score that it has. With one beam
    this is `greedy`; with as many as there are continuations it is exhaustive.

    Args:
        beams: how many continuations are kept.
        length_penalty: the score is the log-probability of the new tokens divided by their number
            to this power: 0 prefers short ones, 1 takes the mean (as in Hugging Face transformers).
        lengths: this and what follows is as in `generate`.

    >>> count = lambda tokens: torch.nn.functional.one_hot((tokens + 1) % 5, 5) * 2.0
    >>> beam_search(count, torch.tensor([[1]]), 3, beams=2).tokens
    tensor([[[1, 2, 3, 4],
             [1, 2, 3, 0]]])
    """
    name = "beam_search"
    if beams < 1:
        raise ValueError(f"{name}: beams: expected at least 1, got {beams}")
    check_cache(name, cache, window)
    (batch, time), stops = prompts.shape, stop_tokens(stop)
    tokens, held = prepare(name, prompts, steps, lengths, pad)
    columns = torch.arange(tokens.shape[1], device=tokens.device)

    def extend(state: dict[str, Any], logits: Tensor) -> tuple[dict[str, Any], Tensor]:
        """The state with one more token each, and the rows that the beams come from."""
        tokens, lengths, finished = state["tokens"], state["lengths"], state["finished"]
        if repetition_penalty is not None:
            logits = penalize_repetition(logits, tokens, repetition_penalty, lengths)
        vocabulary = logits.shape[-1]
        # What is finished goes on as it is, once: by the first of all tokens.
        only = torch.arange(vocabulary, device=logits.device) == 0
        once = torch.where(only, 0.0, float("-inf")).to(logits.dtype)
        ended = rearrange(finished, "rows -> rows 1")
        sums = rearrange(state["sums"], "rows -> rows 1")
        sums = sums + torch.where(ended, once, logits.log_softmax(-1))
        news = state["news"] + (~finished).to(lengths.dtype)
        scores = sums / rearrange(news, "rows -> rows 1").to(sums.dtype) ** length_penalty
        scores, sums = (
            rearrange(each, "(batch beams) v -> batch (beams v)", beams=beams)
            for each in (scores, sums)
        )
        scores, order = scores.sort(dim=-1, descending=True, stable=True)
        scores, order = scores[:, :beams], order[:, :beams]
        first = torch.arange(batch, device=order.device) * beams
        rows = rearrange(first, "batch -> batch 1") + order // vocabulary
        rows = rearrange(rows, "batch beams -> (batch beams)")
        token = rearrange(order % vocabulary, "batch beams -> (batch beams)").to(tokens.dtype)
        tokens, lengths, finished = tokens[rows], lengths[rows], finished[rows]
        token = torch.where(finished, pad, token)
        here = columns == rearrange(lengths, "rows -> rows 1")
        return {
            "tokens": torch.where(here, rearrange(token, "rows -> rows 1"), tokens),
            "lengths": lengths + (~finished).to(lengths.dtype),
            "finished": finished | among(token, stops),
            "news": news[rows],
            "sums": rearrange(sums.gather(-1, order), "batch beams -> (batch beams)"),
            "scores": rearrange(scores, "batch beams -> (batch beams)"),
        }, rows

    def turn(state: dict[str, Any], _: Any) -> tuple[dict[str, Any], None]:
        logits, cache = next_logits(
            name, f, state["tokens"], state["lengths"], state["cache"], window
        )
        new, rows = extend(state, logits)
        return {**new, "cache": _rows(cache, rows)}, None

    def spread(leaf: Tensor) -> Tensor:
        return repeat(leaf, "batch ... -> (batch beams) ...", beams=beams)

    logits, cache = first_logits(
        name, f, tokens, held, cache, window, time, ragged=lengths is not None
    )
    tokens, held = spread(tokens), spread(held)
    # All beams of a prompt begin as the prompt: only the first of them may be continued.
    number = torch.arange(batch * beams, device=tokens.device) % beams
    sums = torch.where(number == 0, 0.0, float("-inf")).to(logits.dtype)
    state: dict[str, Any] = {
        "tokens": tokens,
        "lengths": held,
        "finished": torch.zeros_like(held, dtype=torch.bool),
        "news": torch.zeros_like(held),
        "sums": sums,
        "scores": sums,
    }
    if steps:
        state, rows = extend(state, spread(logits))
        state["cache"] = None if cache is None else _rows(tree.map(spread, cache), rows)
        if _torch.tracing():
            state, _ = scan(turn, state, length=steps - 1, unroll=False)
        else:
            for _ in range(steps - 1):
                if stops and not _torch.inlining() and bool(state["finished"].all()):
                    break
                state, _ = turn(state, None)
    return Beams(
        *(
            rearrange(state[part], "(batch beams) ... -> batch beams ...", beams=beams)
            for part in ("tokens", "lengths", "scores")
        )
    )


def _rows(cache: Any, rows: Tensor) -> Any:
    return tree.map(lambda leaf: leaf[rows], cache)

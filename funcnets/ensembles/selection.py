"""Which members to take, and how often each."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int, Int64
from torch import Tensor
from torch.func import vmap

from funcnets.tree.flatten import describe

Score = Callable[[Tensor, Tensor], Tensor]


class Selection(NamedTuple):
    """The members taken.

    Attributes:
        weights: how often each was taken, as shares; `mean` takes them.
        order: the members in the order in which they were taken, up to the last round.
        scores: of the ensemble after each round; the weights are those of the best.
    """

    weights: Float[Tensor, " members"]
    order: Int64[Tensor, " rounds"]
    scores: Float[Tensor, " rounds"]


def log_likelihood(
    probabilities: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]
) -> Float[Tensor, ""]:
    """The mean log-probability of the labels, which is higher for a better prediction.

    >>> log_likelihood(torch.tensor([[0.5, 0.5]]), torch.tensor([0]))
    tensor(-0.6931)
    """
    chosen = probabilities.gather(-1, rearrange(labels.to(torch.int64), "batch -> batch 1"))
    return chosen.clamp(min=torch.finfo(chosen.dtype).tiny).log().mean()


def greedy_selection(
    logits: Float[Tensor, "members batch classes"],
    labels: Int[Tensor, " batch"],
    rounds: int = 50,
    score: Score = log_likelihood,
) -> Selection:
    """Takes the member that helps most, with replacement, round by round (Caruana et al. 2004).

    Give samples that the members were not trained on. A member whose score is not a number is never
    taken.

    Args:
        logits: of all members there are.
        rounds: how many times one is taken, at most.
        score: ``score(probabilities [batch, classes], labels)``, higher where better; it is called
            under vmap.

    Raises:
        ValueError: where the shapes do not fit, or no member's score is a number.

    >>> first, second, wrong = [[3, 0], [0, 1]], [[1, 0], [0, 3]], [[0, 3], [3, 0]]
    >>> logits = torch.tensor([first, second, wrong], dtype=torch.float32)
    >>> greedy_selection(logits, torch.tensor([0, 1]), rounds=2).weights
    tensor([0.5000, 0.5000, 0.0000])
    """
    if logits.ndim != 3 or labels.shape != logits.shape[1:2] or not logits.numel():
        raise ValueError(
            "greedy_selection: expected logits [members, batch, classes] and labels [batch], "
            f"got {describe(logits)} and {describe(labels)}"
        )
    if rounds < 1:
        raise ValueError(f"greedy_selection: rounds: expected at least 1, got {rounds}")
    each = logits.softmax(-1)
    total, taken, scores = torch.zeros_like(each[0]), [], []
    for count in range(1, rounds + 1):
        found = vmap(score, (0, None))((total + each) / count, labels)
        found = torch.where(found.isnan(), -torch.inf, found)
        best = found.argmax()
        taken.append(best)
        scores.append(found[best])
        total = total + each[best]
    if not bool(scores[0] > -torch.inf):
        raise ValueError("greedy_selection: expected a score that is a number, got none")
    order, reached = torch.stack(taken), torch.stack(scores)
    size = int(reached.argmax()) + 1
    times = torch.bincount(order[:size], minlength=len(logits))
    return Selection(times.to(logits.dtype) / size, order, reached)

"""Temperature scaling."""

from __future__ import annotations

import torch
from einops import rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor

from funcnets import _torch
from funcnets.tree.flatten import describe

ITERATIONS = 60
LEAST, MOST = 0.01, 100.0


def fit_temperature(
    logits: Float[Tensor, "*batch classes"], labels: Int[Tensor, "*batch"]
) -> Float[Tensor, ""]:
    """The T for which ``logits / T`` have the lowest negative log-likelihood (Guo et al. 2017).

    In the inverse of T it is convex; Newton's method within a bracket finds it. Take samples that
    the network was not trained on. For an ensemble give `losses.ensemble_log_probabilities`, which
    are logits as well (pool, then calibrate: Rahaman and Thiery 2021); ``vmap`` fits one for each
    member.

    Returns:
        Between 0.01 and 100. (Where every label is predicted, ever smaller ones are better, until
        the difference is lost in rounding.)

    Raises:
        ValueError: where the shapes or dtypes do not fit, there are no samples, a label is no
            class, or a logit is nan.

    >>> logits = torch.tensor([[4.0, 0.0]]).expand(4, 2)  # 98 % sure, and right in 3 of 4 cases
    >>> (logits[0] / fit_temperature(logits, torch.tensor([0, 0, 0, 1]))).softmax(-1)
    tensor([0.7500, 0.2500])
    """
    if not logits.ndim or labels.shape != logits.shape[:-1] or not labels.numel():
        raise ValueError(
            "fit_temperature: expected logits [..., classes] and labels [...], at least one, "
            f"got {describe(logits)} and {describe(labels)}"
        )
    if not logits.is_floating_point() or labels.is_floating_point():
        raise ValueError(
            "fit_temperature: expected floats as logits and integers as labels, "
            f"got {describe(logits)} and {describe(labels)}"
        )
    if not _torch.inlining() and bool(logits.isnan().any()):
        raise ValueError("fit_temperature: logits: expected numbers, got nan")
    classes = logits.shape[-1]
    if not _torch.inlining() and not bool(((labels >= 0) & (labels < classes)).all()):
        raise ValueError(
            f"fit_temperature: labels: expected 0 to {classes - 1}, "
            f"got {int(labels.min())} to {int(labels.max())}"
        )
    # Of minus infinity, where a class is impossible, a finite number far below the others.
    z = logits.to(torch.float64).log_softmax(-1).clamp(min=-1e6)
    chosen = z.gather(-1, rearrange(labels.to(torch.int64), "... -> ... 1"))
    inverse = z.new_ones(())
    low, high = inverse / MOST, inverse / LEAST
    for _ in range(ITERATIONS):
        p = (inverse * z).softmax(-1)
        expected = reduce(p * z, "... classes -> ... 1", "sum")
        slope = (expected - chosen).mean()
        curvature = reduce(p * (z - expected).square(), "... classes -> ...", "sum").mean()
        low, high = torch.where(slope < 0, inverse, low), torch.where(slope < 0, high, inverse)
        step = inverse - slope / curvature.clamp(min=1e-300)
        inside = (step > low) & (step < high)
        inverse = torch.where(inside, step, (low * high).sqrt())
    return (1 / inverse).to(logits.dtype)

"""The predictions of an ensemble, and how well calibrated predictions are."""

from __future__ import annotations

import math

import torch
from einops import rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor

from funcnets.tree.flatten import describe


def ensemble_log_probabilities(
    logits: Float[Tensor, "members *batch classes"],
) -> Float[Tensor, "*batch classes"]:
    """The log of the mean over the members of their class probabilities.

    This is the prediction of a deep ensemble (Lakshminarayanan et al. 2017); its negative
    log-likelihood is ``F.nll_loss(ensemble_log_probabilities(logits), labels)``. It is computed
    without leaving the logarithms, so probabilities far below the smallest float keep their place.

    >>> logits = torch.tensor([[[0.0, 0.0]], [[0.0, float("-inf")]]])  # 1/2, 1/2 and 1, 0
    >>> ensemble_log_probabilities(logits).exp()
    tensor([[0.7500, 0.2500]])
    """
    if logits.ndim < 2 or not logits.shape[0]:
        raise ValueError(
            f"ensemble_log_probabilities: logits: expected [members, ..., classes], "
            f"got {describe(logits)}"
        )
    members = torch.log_softmax(logits, dim=-1)
    return torch.logsumexp(members, dim=0) - math.log(logits.shape[0])


def expected_calibration_error(
    probabilities: Float[Tensor, "*batch classes"], labels: Int[Tensor, ...], bins: int = 15
) -> Float[Tensor, ""]:
    """How far the confidence of a classifier is from its accuracy (Guo et al. 2017, eq. 3).

    The predictions are sorted by confidence (the largest probability) into bins of equal width,
    open below and closed above. The result is the mean over the predictions of the distance
    between the accuracy and the mean confidence of their bin, between 0 and 1.

    Args:
        probabilities: of the classes, as softmax gives them.
        labels: the true classes, of the shape ``*batch``.

    Raises:
        ValueError: where the shapes do not fit, or there is no prediction.

    >>> probabilities = torch.tensor([[0.75, 0.25], [0.75, 0.25]])
    >>> expected_calibration_error(probabilities, torch.tensor([0, 1]))  # one of two is right
    tensor(0.2500)
    """
    if bins < 1:
        raise ValueError(f"expected_calibration_error: bins: expected at least 1, got {bins}")
    if labels.shape != probabilities.shape[:-1]:
        raise ValueError(
            f"expected_calibration_error: labels: expected {list(probabilities.shape[:-1])} "
            f"(as probabilities without the classes), got {list(labels.shape)}"
        )
    if not labels.numel():
        raise ValueError("expected_calibration_error: labels: expected at least one, got none")
    confidence, predicted = probabilities.max(dim=-1)
    excess = rearrange(confidence - (predicted == labels).to(confidence.dtype), "... -> (...) 1")
    # In float64, for rounding to move as little as can be over the (closed) upper edges.
    bin_of = (confidence.to(torch.float64) * bins).ceil().clamp(1, bins)
    chosen = rearrange(bin_of, "... -> (...) 1") == torch.arange(1, bins + 1, device=bin_of.device)
    # The size of a bin cancels: of its weight in the mean, and of the means within it.
    gaps = reduce(excess * chosen, "samples bins -> bins", "sum").abs()
    return gaps.sum() / labels.numel()

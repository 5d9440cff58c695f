"""Scores of predictions, as functions of all outputs and targets. All work under vmap.

Classifiers are scored from logits (or log-probabilities) [samples, classes] and labels [samples].
A label that is no class is a ValueError; under vmap and compiled, where no value can be looked at,
it counts as a mistake in `accuracy` and not at all elsewhere. For any other score there are
torchmetrics and scikit-learn.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import reduce
from jaxtyping import Float, Int, Int64
from torch import Tensor

from funcnets import _torch, losses
from funcnets.tree.flatten import describe


class PrecisionRecall(NamedTuple):
    """Precision and recall of each class [classes], and their averages []."""

    precision: Float[Tensor, " classes"]
    recall: Float[Tensor, " classes"]
    micro_precision: Float[Tensor, ""]
    micro_recall: Float[Tensor, ""]
    macro_precision: Float[Tensor, ""]
    macro_recall: Float[Tensor, ""]
    weighted_precision: Float[Tensor, ""]
    weighted_recall: Float[Tensor, ""]


def accuracy(
    logits: Float[Tensor, "samples classes"], labels: Int[Tensor, " samples"]
) -> Float[Tensor, ""]:
    """The share of the samples whose largest logit is that of their label.

    >>> accuracy(torch.tensor([[0.0, 1.0], [2.0, 1.0]]), torch.tensor([1, 1]))
    tensor(0.5000)
    """
    _check("accuracy", logits, labels)
    return (logits.argmax(-1) == labels).to(logits.dtype).mean()


def confusion_matrix(
    logits: Float[Tensor, "samples classes"], labels: Int[Tensor, " samples"]
) -> Int64[Tensor, "classes classes"]:
    """How many samples of each class (rows) are taken for each class (columns).

    As `sklearn.metrics.confusion_matrix`.

    >>> confusion_matrix(torch.tensor([[0.0, 1.0], [2.0, 1.0]]), torch.tensor([1, 1]))
    tensor([[0, 0],
            [1, 1]])
    """
    _check("confusion_matrix", logits, labels)
    classes = torch.arange(logits.shape[-1], device=logits.device)
    true = (labels[:, None] == classes).to(torch.float64)
    predicted = (logits.argmax(-1)[:, None] == classes).to(torch.float64)
    return (true.T @ predicted).to(torch.int64)


def precision_recall(
    logits: Float[Tensor, "samples classes"], labels: Int[Tensor, " samples"]
) -> PrecisionRecall:
    """Of each class and micro, macro and weighted averages.

    As `sklearn.metrics.precision_recall_fscore_support` with ``zero_division=0``: the precision
    of a class that is never predicted is 0, and so is the recall of one that has no samples. Macro
    averages are over all classes, weighted ones by the number of samples.

    >>> precision_recall(torch.tensor([[0.0, 1.0], [2.0, 1.0]]), torch.tensor([1, 1])).recall
    tensor([0.0000, 0.5000])
    """
    counts = confusion_matrix(logits, labels).to(logits.dtype)
    right = counts.diagonal()
    predicted, true = reduce(counts, "t p -> p", "sum"), reduce(counts, "t p -> t", "sum")
    precision, recall = right / predicted.clamp(min=1), right / true.clamp(min=1)
    micro = right.sum() / counts.sum()
    share = true / true.sum()
    return PrecisionRecall(
        precision,
        recall,
        micro,
        micro.clone(),
        precision.mean(),
        recall.mean(),
        (precision * share).sum(),
        (recall * share).sum(),
    )


def nll(
    logits: Float[Tensor, "samples classes"], labels: Int[Tensor, " samples"]
) -> Float[Tensor, ""]:
    """The mean negative log-likelihood, in nats: `F.cross_entropy`.

    >>> nll(torch.zeros(3, 2), torch.tensor([0, 1, 1]))
    tensor(0.6931)
    """
    _check("nll", logits, labels)
    return F.cross_entropy(logits, labels)


def calibration_error(
    logits: Float[Tensor, "samples classes"], labels: Int[Tensor, " samples"], bins: int = 15
) -> Float[Tensor, ""]:
    """`losses.expected_calibration_error` of ``softmax(logits)``."""
    _check("calibration_error", logits, labels)
    return losses.expected_calibration_error(logits.softmax(-1), labels, bins)


def mse(outputs: Float[Tensor, "*batch"], targets: Float[Tensor, "*batch"]) -> Float[Tensor, ""]:
    """The mean squared error.

    >>> mse(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))
    tensor(2.)
    """
    if outputs.shape != targets.shape:
        raise ValueError(f"mse: expected {describe(outputs)} as outputs, got {describe(targets)}")
    return (outputs - targets).square().mean()


def _check(name: str, logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(
            f"{name}: expected logits [samples, classes] and labels [samples], at least one, "
            f"got {describe(logits)} and {describe(labels)}"
        )
    if _torch.inlining():
        return
    classes = logits.shape[-1]
    strange = (labels < 0) | (labels >= classes)
    if bool(strange.any()):
        place = int(strange.to(torch.int8).argmax())
        raise ValueError(
            f"{name}: labels: expected 0 to {classes - 1}, got {int(labels[place])} at {place}"
        )

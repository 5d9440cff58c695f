"""Stratified folds, for cross-validation."""

from __future__ import annotations

import torch
from jaxtyping import Int64
from torch import Tensor

from funcnets import random
from funcnets.data.order import within_classes
from funcnets.data.pairs import Groups


def folds(key: random.Key, groups: Groups, num: int) -> Int64[Tensor, " samples"]:
    """The fold of each sample, from 0 to num - 1, stratified: for cross-validation.

    The folds have equally many samples, and of each class equally many, give or take one. As
    `sklearn.model_selection.StratifiedKFold`.

    Raises:
        ValueError: for fewer than two folds, or where a class has too few samples for every fold
            to hold one.

    >>> from funcnets.data.pairs import group
    >>> labels = torch.tensor([0, 0, 1, 0, 1, 0])
    >>> fold = folds(random.key(0), group(labels), 2)
    >>> [sorted(labels[fold == i].tolist()) for i in range(2)]
    [[0, 0, 1], [0, 0, 1]]
    """
    if num < 2:
        raise ValueError(f"folds: num: expected at least 2, got {num}")
    if groups.smallest < num:
        raise ValueError(
            f"folds: expected at least {num} samples of every class, one for each fold, "
            f"got a class of {groups.smallest}"
        )
    within, names = random.split(key)
    samples = groups.order[within_classes(within, groups)]
    place = torch.arange(len(samples), device=samples.device) % num
    return torch.empty_like(samples).scatter(0, samples, random.permutation(names, num)[place])

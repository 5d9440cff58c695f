"""What torch.nn.functional has no function for: losses of embeddings, of ensembles, calibration."""

from funcnets.losses.calibration import ensemble_log_probabilities, expected_calibration_error
from funcnets.losses.metric import (
    Triplets,
    batch_hard,
    contrastive,
    info_nce,
    pairwise_distances,
    prototypical,
    prototypical_logits,
    semi_hard,
    supervised_contrastive,
    triplet_margin,
)
from funcnets.losses.multitask import (
    init_uncertainty,
    scale_by_largest,
    uncertainty,
    weighted_sum,
)

__all__ = [
    "Triplets",
    "batch_hard",
    "contrastive",
    "ensemble_log_probabilities",
    "expected_calibration_error",
    "info_nce",
    "init_uncertainty",
    "pairwise_distances",
    "prototypical",
    "prototypical_logits",
    "scale_by_largest",
    "semi_hard",
    "supervised_contrastive",
    "triplet_margin",
    "uncertainty",
    "weighted_sum",
]

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
    triplet_margin,
)

__all__ = [
    "Triplets",
    "batch_hard",
    "contrastive",
    "ensemble_log_probabilities",
    "expected_calibration_error",
    "info_nce",
    "pairwise_distances",
    "prototypical",
    "prototypical_logits",
    "semi_hard",
    "triplet_margin",
]

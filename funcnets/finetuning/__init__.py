"""From a trained network to another task: low-rank overlays, unfreezing, still statistics.

What else fine-tuning takes is elsewhere: ``make_step(trainable="fc")`` trains a part,
`optim.scale_by_path` sets learning rates by depth, `tree.transfer` loads what fits with a report of
the rest, and ``model.from_torchvision(..., fresh="fc")`` puts a new head on a pretrained network.
"""

from funcnets.finetuning.lora import apply_lora, init_lora, lora, unmerge_lora
from funcnets.finetuning.statistics import frozen_statistics
from funcnets.finetuning.unfreeze import UnfreezingState, unfreezing

__all__ = [
    "UnfreezingState",
    "apply_lora",
    "frozen_statistics",
    "init_lora",
    "lora",
    "unfreezing",
    "unmerge_lora",
]

"""Data for pairs and triplets: folders of images, and keyed samplers over labels."""

from funcnets.data.folders import Images, Signatures, image_folder, signature_folder
from funcnets.data.omniglot import Omniglot, omniglot
from funcnets.data.pairs import (
    Forgeries,
    Groups,
    balanced,
    forgery_triplets,
    group,
    group_forgeries,
    pairs,
    triplets,
)

__all__ = [
    "Forgeries",
    "Groups",
    "Images",
    "Omniglot",
    "Signatures",
    "balanced",
    "forgery_triplets",
    "group",
    "group_forgeries",
    "image_folder",
    "omniglot",
    "pairs",
    "signature_folder",
    "triplets",
]

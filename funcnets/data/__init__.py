"""Data: the order of an epoch by key, augmentation, tables and series, images in folders."""

from funcnets.data.erase import random_erasing
from funcnets.data.folders import Images, Signatures, image_folder, signature_folder
from funcnets.data.folds import folds
from funcnets.data.lengths import Buckets, bucket_batches, buckets
from funcnets.data.mix import cutmix, mixup
from funcnets.data.omniglot import Omniglot, omniglot
from funcnets.data.order import (
    balanced_batches,
    batches,
    stratified_batches,
    stream,
)
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
from funcnets.data.preparation import (
    Imputation,
    Standardisation,
    fit_imputation,
    fit_standardisation,
    impute,
    standardise,
    unstandardise,
)
from funcnets.data.sampling import bootstrap, out_of_bag, weighted_batches
from funcnets.data.table import Table, read_csv
from funcnets.data.windows import Windows, windows

__all__ = [
    "Buckets",
    "Forgeries",
    "Groups",
    "Images",
    "Imputation",
    "Omniglot",
    "Signatures",
    "Standardisation",
    "Table",
    "Windows",
    "balanced",
    "balanced_batches",
    "batches",
    "bootstrap",
    "bucket_batches",
    "buckets",
    "cutmix",
    "fit_imputation",
    "fit_standardisation",
    "folds",
    "forgery_triplets",
    "group",
    "group_forgeries",
    "image_folder",
    "impute",
    "mixup",
    "omniglot",
    "out_of_bag",
    "pairs",
    "random_erasing",
    "read_csv",
    "signature_folder",
    "standardise",
    "stratified_batches",
    "stream",
    "triplets",
    "unstandardise",
    "weighted_batches",
    "windows",
]

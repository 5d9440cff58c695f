"""Small networks and data that the tests of training share."""

import torch
import torch.nn.functional as F

from funcnets import models, optim, random, training, tree

SAMPLES, FEATURES, CLASSES = 24, 6, 3


def mlp(dropout=0.0):
    return models.mlp(FEATURES, CLASSES, (8,), dropout=dropout)


def cnn():
    return models.cnn(in_channels=1, num_classes=CLASSES, widths=(4, 6))


def data(seed=0, dtype=torch.float64, shape=(FEATURES,)):
    x = random.normal(random.key(seed), (SAMPLES, *shape), dtype=dtype)
    return x, random.randint(random.fold_in(random.key(seed), 1), (SAMPLES,), 0, CLASSES)


def start(step, model, seed=0, dtype=torch.float64):
    return step.init(tree.cast(model.init(random.key(seed)), dtype), random.key(seed + 100))


def make(model=None, **options):
    optimizer = options.pop("optimizer", optim.adamw(1e-2))
    return training.make_step(model or mlp(), F.cross_entropy, optimizer, **options)


def assert_equal(a, b):
    """Bit for bit, where not a number equals not a number."""
    assert tree.flatten(a)[1] == tree.flatten(b)[1]
    for (path, x), y in zip(tree.leaves_with_path(a), tree.leaves(b), strict=True):
        assert x.dtype == y.dtype, path
        assert torch.equal(x, y) or torch.allclose(x, y, 0, 0, equal_nan=True), path


def assert_close(a, b, **tolerances):
    tree.map(lambda x, y: torch.testing.assert_close(x, y, **tolerances), a, b)

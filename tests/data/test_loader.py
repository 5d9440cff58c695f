"""A DataLoader, workers and all, feeds the step that batches by key feed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from funcnets import data, models, optim, random, training, tree


def test_the_same_batches_give_the_same_parameters():
    x, y = random.normal(random.key(0), (40, 6)), torch.arange(40) % 3
    model = models.mlp(6, 3, (8,), dropout=0.2)
    step = training.make_step(model, F.cross_entropy, optim.adamw(1e-2))
    begin = step.init(model.init(random.key(1)), random.key(2))
    order = data.stratified_batches(random.key(3), data.group(y), 8)
    loader = DataLoader(
        TensorDataset(x, y),
        batch_sampler=[batch.tolist() for batch in order],
        num_workers=2,
        generator=torch.Generator().manual_seed(0),  # or the global one gives the workers' seeds
    )
    by_loader, by_key = begin, begin
    for inputs, targets in loader:
        by_loader, _ = step(by_loader, (inputs, targets))
    for batch in order:
        by_key, _ = step(by_key, (x[batch], y[batch]))
    assert int(by_loader.step) == len(order) == 5
    for one, other in zip(tree.leaves(by_loader), tree.leaves(by_key), strict=True):
        assert torch.equal(one, other)

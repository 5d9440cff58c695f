"""Running statistics that stay as they are while the rest of a network is trained."""

from __future__ import annotations

from typing import Any

from tensordict import TensorDict

from funcnets.model import Model
from funcnets.tree.flatten import Tree


def frozen_statistics(model: Model) -> Model:
    """The model, whose batch norms use their running statistics in training, too.

    So a few or unlike images do not spoil what the statistics were gathered from, a batch may have
    one sample, and the outputs of each sample depend on it alone. Weights and biases of the norms
    are parameters still. The network is computed as at inference: dropout and stochastic depth
    rest as well.

    >>> import torch
    >>> from funcnets import models, random
    >>> model = frozen_statistics(models.cnn(in_channels=1, num_classes=2, widths=(4,)))
    >>> params, x = model.init(random.key(0)), torch.ones(3, 1, 8, 8)
    >>> outputs, buffers = model.apply(params, x, train=True)
    >>> torch.equal(outputs, model.apply(params, x)), buffers.is_empty()
    (True, True)
    """

    def apply(
        params: Tree, *inputs: Any, train: bool = False, key: Any = None, **options: Any
    ) -> Any:
        outputs = model.apply(params, *inputs, **options)
        return (outputs, TensorDict({})) if train else outputs

    return Model(model.init, apply, check=model.check)

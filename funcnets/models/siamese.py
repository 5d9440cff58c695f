"""One encoder for several inputs: pairs and triplets that read the same parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tensordict import TensorDict
from torch import Tensor

from funcnets import random, tree
from funcnets.layers import finish, normalize
from funcnets.model import Model, bind
from funcnets.taps import Taps, TapsLike, within


@dataclass(frozen=True)
class Config:
    """What a siamese network is made of."""

    encoder: Model
    normalize: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.encoder, Model):
            raise TypeError(
                f"siamese: encoder: expected a Model, got {type(self.encoder).__name__}"
            )


def siamese(encoder: Model, *, normalize: bool = False) -> Model:
    """A model of any number of inputs, each embedded by the same encoder (Bromley et al. 1993).

    ``apply(params, x)`` is the embedding of x; of several inputs, ``apply(params, x, y, ...)``, it
    is the tuple of theirs. The parameters are those of one encoder, named ``encoder``: they are
    read once for each input, so their gradient is the sum over the inputs.

    In training the inputs are encoded one after the other, as by calling a module several times:
    each gets a key of its own, and running statistics take up all of them in turn. A tap,
    ``encoder.`` and the encoder's name for the place, gives the tuple of what flowed there.

    Args:
        encoder: any model of one input.
        normalize: divide each embedding by its Euclidean length, so that distances lie between 0
            and 2 and order pairs as cosines do.

    >>> import torch
    >>> from funcnets import models
    >>> model = siamese(models.mlp(in_features=8, out_features=2), normalize=True)
    >>> params = model.init(random.key(0))
    >>> left, right = model.apply(params, torch.ones(5, 8), torch.zeros(3, 8))
    >>> left.shape, right.shape
    (torch.Size([5, 2]), torch.Size([3, 2]))
    """
    return bind("siamese", Config(encoder, normalize), init, forward, check)


def init(key: random.Key, config: Config) -> TensorDict:
    """The parameters of the encoder, once."""
    return TensorDict({"encoder": config.encoder.init(key)})


def check(*inputs: Any, config: Config) -> None:
    """Raises unless there are inputs, and each is what the encoder takes."""
    if not inputs:
        raise ValueError("siamese: expected at least one input, got none")
    for i, x in enumerate(inputs):
        within(f"siamese: inputs[{i}]", config.encoder.check, x)


def forward(
    params: TensorDict,
    *inputs: Any,
    config: Config,
    train: bool = False,
    key: random.Key | None = None,
    taps: TapsLike = (),
) -> Any:
    """The embedding of one input, or the tuple of those of several; in training with buffers."""
    check(*inputs, config=config)
    keys = (None,) * len(inputs) if key is None else random.split(key, len(inputs)).unbind()
    shared: Any = params["encoder"]
    buffers: TensorDict | None = None
    embeddings, found = [], []
    for x, own_key in zip(inputs, keys, strict=True):
        if buffers is not None:  # the running statistics as the input before left them
            shared = tree.transfer(buffers, into=shared)[0]
        tapped = Taps("siamese", taps)
        y, buffers = tapped.run("encoder", config.encoder, shared, x, train=train, key=own_key)
        if config.normalize:
            if not isinstance(y, Tensor):
                raise TypeError(
                    "siamese: normalize: expected embeddings that are one tensor, "
                    f"got {tree.describe(y)}"
                )
            y = normalize(y)
        y = tapped.finish(y, {}, train=False)
        if taps:
            y, places = y
            found.append(places)
        embeddings.append(y)
    outputs: Any = embeddings[0] if len(inputs) == 1 else tuple(embeddings)
    if taps:
        together = {name: tuple(places[name] for places in found) for name in found[0]}
        outputs = outputs, found[0] if len(inputs) == 1 else together
    return finish(outputs, {"encoder": buffers}, train)

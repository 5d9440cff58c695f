"""Stages with an exit after each: a sample leaves where the network is sure of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from funcnets import random
from funcnets.control import route
from funcnets.model import Model, bind
from funcnets.models import blocks
from funcnets.taps import Taps, TapsLike, within


@dataclass(frozen=True)
class Config:
    """What the network is made of; see `early_exit`."""

    stages: tuple[Model, ...]
    exits: tuple[Model, ...]
    threshold: float = 0.9

    def __post_init__(self) -> None:
        if not self.stages or len(self.stages) != len(self.exits):
            raise ValueError(
                f"early_exit: exits: expected one after each stage, got {len(self.exits)} "
                f"for {len(self.stages)} stages"
            )
        for name in ("stages", "exits"):
            for i, part in enumerate(getattr(self, name)):
                if not isinstance(part, Model):
                    raise TypeError(
                        f"early_exit: {name}[{i}]: expected a Model, got {type(part).__name__}"
                    )
        blocks.check_alike("early_exit", {f"exits[{i}]": e for i, e in enumerate(self.exits)})
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"early_exit: threshold: expected a probability, got {self.threshold}")


def early_exit(stages: Sequence[Model], exits: Sequence[Model], threshold: float = 0.9) -> Model:
    """A classifier that stops where it is sure (Teerapittayanon et al. 2016, "BranchyNet").

    ``apply(params, x)`` sends each sample through the stages until an exit gives some class a
    probability of ``threshold`` or more, or the stages end, and returns ``{"logits": [batch,
    classes], "exit": [batch]}``, the exit being the number of the one taken. What a stage costs is
    paid for the samples that come so far (by `funcnets.route`). ``apply(params, x, threshold)``
    takes another threshold, a number or a tensor of shape [], so that one network serves any
    budget.

    In training every exit gives its logits for every sample, [exits, batch, classes]; their losses
    are to be summed. Parameters and taps are named ``stages.{i}`` and ``exits.{i}``; there are taps
    in training alone, for at inference the samples part ways.

    Args:
        stages: each takes what the one before returns, [batch, ...].
        exits: from the features after each stage to logits [batch, classes].

    >>> from funcnets import models
    >>> stages = models.mlp(4, 8, ()), models.residual_mlp(8, 8, depth=6)
    >>> model = early_exit(stages, [models.mlp(8, 3, ())] * 2)
    >>> outputs = model.apply(model.init(random.key(0)), torch.ones(5, 4), threshold=0.0)
    >>> outputs["exit"]
    tensor([0, 0, 0, 0, 0])
    """
    config = Config(tuple(stages), tuple(exits), threshold)
    return bind("early_exit", config, init, forward, check)


def init(key: random.Key, config: Config) -> TensorDict:
    """The parameters and buffers."""
    keys = random.split(key, 2 * len(config.stages)).unbind()
    parts = {"stages": config.stages, "exits": config.exits}
    return TensorDict(
        {
            name: {str(i): model.init(keys[2 * i + place]) for i, model in enumerate(models)}
            for place, (name, models) in enumerate(parts.items())
        }
    )


def check(x: Any, config: Config) -> None:
    """Raises unless x is what the first stage takes."""
    within("early_exit: stages.0", config.stages[0].check, x)


def forward(
    params: TensorDict,
    x: Any,
    threshold: float | Tensor | None = None,
    *,
    config: Config,
    train: bool = False,
    key: random.Key | None = None,
    taps: TapsLike = (),
) -> Any:
    """The logits and exits taken; in training the logits of all exits, with the new buffers."""
    check(x, config)
    tap = Taps("early_exit", taps)
    if not train:
        limit = config.threshold if threshold is None else threshold
        if not isinstance(limit, Tensor) and not 0 <= limit <= 1:
            raise ValueError(f"early_exit: threshold: expected a probability, got {limit}")
        outputs = _leave(params, x, limit, 0, config)
        return tap.finish({**outputs, "exit": outputs["exit"].long()}, {}, train)
    keys: Any = iter([None] * 2 * len(config.stages))
    if key is not None:
        keys = iter(random.split(key, 2 * len(config.stages)).unbind())
    logits, stages, exits = [], {}, {}
    for i, (stage, leave) in enumerate(zip(config.stages, config.exits, strict=True)):
        n, place = str(i), f"stages.{i}"
        own = params["stages", n]
        x, stages[n] = tap.run(place, stage, own, x, train=True, key=next(keys))
        own, place = params["exits", n], f"exits.{i}"
        out, exits[n] = tap.run(place, leave, own, x, train=True, key=next(keys))
        logits.append(out)
    return tap.finish(torch.stack(logits), {"stages": stages, "exits": exits}, train)


def _leave(params: Any, x: Any, threshold: float | Tensor, i: int, config: Config) -> Any:
    """One more stage for these samples; those that are sure then leave."""
    parts = config.stages[i], config.exits[i]
    h = within(f"early_exit: stages.{i}", parts[0].apply, params["stages", str(i)], x)
    logits = within(f"early_exit: exits.{i}", parts[1].apply, params["exits", str(i)], h)
    # Not an integer, for the derivative of torch's own conditional knows none.
    taken = logits.new_full(logits.shape[:1], i)
    if i + 1 == len(config.stages):
        return {"logits": logits, "exit": taken}
    unsure = ~(logits.softmax(-1).amax(-1) >= threshold)  # as is what is not a number
    return route(
        unsure,
        [
            lambda params, h, logits, taken: {"logits": logits, "exit": taken},
            lambda params, h, logits, taken: _leave(params, h, threshold, i + 1, config),
        ],
        params,
        h,
        logits,
        taken,
    )

"""A base, then a shallow or a deep path: by a flag given with the input, or by a learned gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from einops import reduce
from tensordict import TensorDict
from torch import Tensor

from funcnets import random, tree
from funcnets.control import cond, route
from funcnets.layers import init_linear, linear
from funcnets.model import Model, bind
from funcnets.models import blocks
from funcnets.taps import Taps, TapsLike, within

Gate: TypeAlias = Literal["straight_through", "gumbel"]


@dataclass(frozen=True)
class Config:
    """What the network is made of; see `gated`."""

    base: Model
    shallow: Model
    deep: Model
    gate: Gate | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("base", "shallow", "deep"):
            if not isinstance(part := getattr(self, name), Model):
                raise TypeError(f"gated: {name}: expected a Model, got {type(part).__name__}")
        blocks.check_alike("gated", {"shallow": self.shallow, "deep": self.deep})
        blocks.check_choice("gated", "gate", self.gate, (None, "straight_through", "gumbel"))
        if not self.temperature > 0:
            raise ValueError(
                f"gated: temperature: expected a positive number, got {self.temperature}"
            )
        if self.gate is not None:
            blocks.num_features("gated", "base", self.base)


def gated(
    base: Model,
    shallow: Model,
    deep: Model,
    *,
    gate: Gate | None = None,
    temperature: float = 1.0,
) -> Model:
    """A network whose second half is shallow or deep, so that easy inputs cost less.

    ``apply(params, x, deep)`` goes the way it is told: ``deep`` is a bool (of Python, or a tensor
    of shape []) for the whole batch, by `funcnets.cond`, or a bool tensor [batch], one for each
    sample, by `funcnets.route`. It returns the outputs.

    With a ``gate``, ``apply(params, x)`` decides by itself: a linear layer of the base's features
    gives each sample the probability of the deep path. It returns ``{"outputs": ..., "gate":
    [batch]}``; the mean of the probabilities, in the loss, is the price of computing. At inference
    a sample takes the deep path alone if that is the likelier. In training both paths run, and the
    one taken is returned with the gradient of the soft choice (straight-through, Bengio et al.
    2013); "gumbel" draws the choice, from noise of the ``temperature`` (Jang et al. 2017), which
    takes a key. That gradient takes the loss to be linear in the outputs between the two paths: it
    is of the right size where both return log-probabilities and the loss is their ``nll_loss``.

    Parameters and taps are named ``base``, ``shallow``, ``deep`` and ``gate``; at inference the two
    paths cannot be tapped. In training each path that runs updates its batch norms by the whole
    batch.

    Args:
        base: from inputs to features [batch, ...]; for a gate [batch, features, *spatial], of which
            it sees the means over space, and the model's config tells how many features there are,
            as that of every family does.
        shallow: from features to outputs.
        deep: the same, at more cost.

    >>> from funcnets import models
    >>> paths = models.mlp(8, 2, ()), models.residual_mlp(8, 2, depth=6)
    >>> model = gated(models.mlp(4, 8, ()), *paths, gate="straight_through")
    >>> outputs = model.apply(model.init(random.key(0)), torch.ones(5, 4))
    >>> outputs["outputs"].shape, outputs["gate"].shape
    (torch.Size([5, 2]), torch.Size([5]))
    """
    return bind("gated", Config(base, shallow, deep, gate, temperature), init, forward, check)


def init(key: random.Key, config: Config) -> TensorDict:
    """The parameters and buffers."""
    base, shallow, deep, gate = random.split(key, 4).unbind()
    params = {
        "base": config.base.init(base),
        "shallow": config.shallow.init(shallow),
        "deep": config.deep.init(deep),
    }
    if config.gate is not None:
        params["gate"] = init_linear(gate, blocks.num_features("gated", "base", config.base), 1)
    return TensorDict(params)


def check(x: Any, config: Config) -> None:
    """Raises unless x is what the base takes."""
    within("gated: base", config.base.check, x)


def forward(
    params: TensorDict,
    x: Any,
    deep: bool | Tensor | None = None,
    *,
    config: Config,
    train: bool = False,
    key: random.Key | None = None,
    taps: TapsLike = (),
) -> Any:
    """The outputs, with the gate's probabilities where it decides; in training with buffers."""
    check(x, config)
    _check(deep, x, config)
    if train and key is None and deep is None and config.gate == "gumbel":
        raise ValueError("gated: key: expected a key (the gate draws in training), got None")
    tap, new = Taps("gated", taps), {}
    keys = [None] * 4 if key is None else random.split(key, 4).unbind()
    h, new["base"] = tap.run("base", config.base, params["base"], x, train=train, key=keys[0])
    gate = None
    if deep is None:
        seen = reduce(h, "batch features ... -> batch features", "mean") if h.ndim > 2 else h
        gate = tap("gate", within("gated: gate", linear, params["gate"], seen)[..., 0])
    if train and (gate is not None or (isinstance(deep, Tensor) and deep.ndim)):
        both = {}
        for name, model, one in (("shallow", config.shallow, 1), ("deep", config.deep, 2)):
            both[name], new[name] = tap.run(name, model, params[name], h, train=True, key=keys[one])
        outputs, chance = _mixed(deep, gate, both["shallow"], both["deep"], keys[3], config)
    elif train:
        outputs, chance = _whole(params, h, deep, keys, config, new), None
    else:
        paths = [
            lambda p, h: within("gated: shallow", config.shallow.apply, p["shallow"], h),
            lambda p, h: within("gated: deep", config.deep.apply, p["deep"], h),
        ]
        chance = None if gate is None else torch.sigmoid(gate)
        way: Any = deep if gate is None else gate > 0
        if isinstance(way, Tensor) and way.ndim:
            outputs = route(way, paths, params, h)
        else:
            outputs = cond(way, paths[1], paths[0], (params, h))
    return tap.finish(
        outputs if chance is None else {"outputs": outputs, "gate": chance}, new, train
    )


def _mixed(
    deep: Any, gate: Any, one: Tensor, other: Tensor, key: random.Key | None, config: Config
) -> tuple[Tensor, Tensor | None]:
    """Sample by sample the output of the path taken, with the gradient of a soft choice."""
    if gate is None:
        return torch.where(_beside(deep, one), other, one), None
    noisy = gate
    if config.gate == "gumbel":
        assert key is not None  # forward has seen to it
        uniform = random.uniform(key, gate.shape, dtype=gate.dtype)
        tiny = torch.finfo(gate.dtype).tiny
        # The difference of two Gumbel variables is logistic.
        noisy = (gate + torch.log(uniform.clamp(min=tiny)) - torch.log1p(-uniform)) / (
            config.temperature
        )
    soft = torch.sigmoid(noisy)
    taken = (noisy > 0).to(soft.dtype) + soft - soft.detach()
    taken = _beside(taken, one)
    return taken * other + (1 - taken) * one, torch.sigmoid(gate)


def _whole(
    params: TensorDict, h: Any, deep: Any, keys: Any, config: Config, new: dict[str, Any]
) -> Any:
    """The whole batch down one path; the buffers of the other stay."""
    held = {name: tree.partition(params[name])[1] for name in ("shallow", "deep")}

    def path(name: str, model: Model, one: int) -> Any:
        def run(params: Any, h: Any) -> Any:
            options = {"train": True, "key": keys[one]}
            outputs, fresh = within(f"gated: {name}", model.apply, params[name], h, **options)
            return outputs, {**held, name: fresh}

        return run

    ways = path("deep", config.deep, 2), path("shallow", config.shallow, 1)
    outputs, found = cond(deep, *ways, (params, h))
    new |= found
    return outputs


def _beside(choice: Tensor, outputs: Tensor) -> Tensor:
    """A value for each sample, of as many dimensions as the outputs."""
    return choice.reshape(*choice.shape, *(1,) * (outputs.ndim - choice.ndim))


def _check(deep: Any, x: Any, config: Config) -> None:
    if deep is None:
        if config.gate is None:
            raise ValueError("gated: deep: expected a flag, as the model has no gate, got None")
    elif isinstance(deep, Tensor) and deep.dtype == torch.bool and deep.ndim < 2:
        if deep.ndim and isinstance(x, Tensor) and x.shape[:1] != deep.shape:
            raise ValueError(
                f"gated: deep: expected {list(x.shape[:1])} (the batch of x) or [], "
                f"got {list(deep.shape)}"
            )
    elif not isinstance(deep, bool):
        raise ValueError(
            "gated: deep: expected a bool, or a bool tensor [] or [batch], "
            f"got {tree.describe(deep)}"
        )

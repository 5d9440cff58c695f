"""Several named inputs, each with an encoder, fused into one and read by several named heads."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from einops import einsum, rearrange, reduce
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from funcnets import random, tree
from funcnets.layers import activation, init_linear, linear
from funcnets.model import Model, bind
from funcnets.models import blocks
from funcnets.taps import Taps, TapsLike, within

Fusion: TypeAlias = Literal["concat", "sum", "gated", "attention"]
Encoders: TypeAlias = tuple[tuple[str, Model | str], ...]
Heads: TypeAlias = tuple[tuple[str, Model | int], ...]


@dataclass(frozen=True)
class Config:
    """What a network of several inputs and outputs is made of; see `multimodal`."""

    encoders: Encoders
    heads: Heads
    fusion: Fusion = "concat"
    attention_heads: int = 1
    activation: str = "relu"

    def __post_init__(self) -> None:
        _check_names("encoders", self.encoders)
        _check_names("heads", self.heads)
        blocks.check_choice(
            "multimodal", "fusion", self.fusion, ("concat", "sum", "gated", "attention")
        )
        blocks.check_sizes("multimodal", attention_heads=self.attention_heads)
        activation(self.activation)
        self._check_encoders()
        self._check_heads()

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the inputs."""
        return tuple(name for name, _ in self.encoders)

    def source(self, name: str) -> str:
        """The input under whose name the encoder of this input stands, mostly its own."""
        encoder = dict(self.encoders)[name]
        return encoder if isinstance(encoder, str) else name

    def encoder(self, name: str) -> Model:
        """The encoder of an input."""
        model = dict(self.encoders)[self.source(name)]
        assert isinstance(model, Model)  # _check_encoders has seen to it
        return model

    def features(self, name: str) -> int:
        """The size of what the encoder of an input gives."""
        return blocks.num_features("multimodal", f"encoders.{name}", self.encoder(name))

    @property
    def fused(self) -> int:
        """The size of what the heads read."""
        sizes = [self.features(name) for name in self.inputs]
        return sum(sizes) if self.fusion == "concat" else sizes[0]

    def _check_encoders(self) -> None:
        models = {name for name, encoder in self.encoders if isinstance(encoder, Model)}
        for name, encoder in self.encoders:
            if not isinstance(encoder, (Model, str)):
                raise TypeError(
                    f"multimodal: encoders.{name}: expected a Model or the name of another input, "
                    f"got {type(encoder).__name__}"
                )
            if isinstance(encoder, str) and encoder not in models:
                raise ValueError(
                    f"multimodal: encoders.{name}: expected the name of an input with a model "
                    f"({', '.join(sorted(models)) or 'none'}), got {encoder}"
                )
        first = self.inputs[0]
        size = self.features(first)
        for name in self.inputs:
            if self.fusion != "concat" and self.features(name) != size:
                raise ValueError(
                    f"multimodal: encoders.{name}: expected {size} features (as {first}) for "
                    f"fusion {self.fusion!r}, got {self.features(name)}"
                )
        if self.fusion == "attention" and size % self.attention_heads:
            raise ValueError(
                f"multimodal: attention_heads: expected a divisor of the {size} features, "
                f"got {self.attention_heads}"
            )

    def _check_heads(self) -> None:
        for name, head in self.heads:
            if not isinstance(head, Model):
                blocks.check_sizes("multimodal", **{f"heads.{name}": head})
                continue
            size = getattr(head.config, "in_features", self.fused)
            if size != self.fused:
                raise ValueError(
                    f"multimodal: heads.{name}: expected in_features {self.fused} (of the "
                    f"{self.fusion} of {', '.join(self.inputs)}), got {size}"
                )


def multimodal(
    encoders: Mapping[str, Model | str] | Encoders,
    heads: Mapping[str, Model | int] | Heads,
    *,
    fusion: Fusion = "concat",
    attention_heads: int = 1,
    activation: str = "relu",
) -> Model:
    """A network of named inputs and named outputs.

    ``apply(params, inputs)`` takes a dict of the inputs by name and returns a dict of the outputs.
    Each input goes through its encoder to [..., features]; the parts are fused, activated, and read
    by every head. Parameters are named ``encoders.{input}``, ``fusion`` and ``heads.{output}``;
    taps likewise, an encoder's own below its name.

    The parts are fused by one of

    - "concat": their concatenation, in the order of the encoders;
    - "sum";
    - "gated": their sum, each feature of each part times a gate in (0, 1), a logistic function of
      all the parts (Arevalo et al. 2017; tapped as ``fusion.gates``, [parts, ..., features]);
    - "attention": the attention of a learned query to the parts, with projections as in
      ``torch.nn.MultiheadAttention`` (Vaswani et al. 2017; the weights are tapped as
      ``fusion.weights``, [..., attention heads, parts]).

    All but the first ask for encoders of equally many features.

    An input may be absent: ``apply(params, inputs, present)`` takes a dict of masks, True where the
    input is there, of the shape [batch] or []. What stands in its place counts for nothing, not
    even for a gradient: the encoder is given zeros, and its part is left out of the fusion (in a
    concatenation, zeros again). With ``present={"x": False}`` the input x may be missing from the
    inputs, and its encoder is not run.

    In training each encoder gets a key of its own; an encoder that serves several inputs is run on
    one after the other, and its running statistics take up all of them in turn.

    Args:
        encoders: for each input a model, from the input to [..., features], whose config has
            ``out_features``, ``num_classes`` or ``embedding_dim``; or the name of another input,
            whose encoder it shares: the same parameters are read twice.
        heads: for each output a model that takes the fused features, or a number, for a linear map
            to so many features.
        attention_heads: of "attention"; they divide the features.
        activation: a name that `funcnets.layers.activation` knows, for the fused features;
            "identity" for none.

    Raises:
        ValueError: naming the part, where sizes or names do not fit. All that can be told from the
            inputs, their names and masks, comes first.

    >>> from funcnets import models
    >>> model = multimodal(
    ...     {"image": models.cnn(1, 16), "alphabet": models.embedding(5, 16)},
    ...     {"character": 26, "drawer": models.mlp(16, 20)},
    ...     fusion="gated",
    ... )
    >>> params = model.init(random.key(0))
    >>> inputs = {"image": torch.ones(3, 1, 8, 8), "alphabet": torch.tensor([0, 4, 4])}
    >>> {name: tuple(output.shape) for name, output in model.apply(params, inputs).items()}
    {'character': (3, 26), 'drawer': (3, 20)}
    >>> del inputs["alphabet"]
    >>> model.apply(params, inputs)
    Traceback (most recent call last):
    ValueError: multimodal: inputs: expected image, alphabet; missing alphabet
    """
    config = Config(
        _pairs("encoders", encoders),
        _pairs("heads", heads),
        fusion,
        attention_heads,
        activation,
    )
    return bind("multimodal", config, init, forward, check)


def init(key: random.Key, config: Config) -> TensorDict:
    """The parameters (with the buffers of the submodels)."""
    encoder_key, fusion_key, head_key = random.split(key, 3)
    encoder_keys = random.split(encoder_key, len(config.encoders)).unbind()
    head_keys = random.split(head_key, len(config.heads)).unbind()
    params = {
        "encoders": TensorDict(
            {
                name: encoder.init(key)
                for (name, encoder), key in zip(config.encoders, encoder_keys, strict=True)
                if isinstance(encoder, Model)
            }
        ),
        "heads": TensorDict(
            {
                name: head.init(key)
                if isinstance(head, Model)
                else init_linear(key, config.fused, head)
                for (name, head), key in zip(config.heads, head_keys, strict=True)
            }
        ),
    }
    if config.fusion == "gated":
        size = len(config.encoders) * config.fused
        params["fusion"] = TensorDict({"gate": init_linear(fusion_key, size, size)})
    if config.fusion == "attention":
        keys, size = random.split(fusion_key, 4), config.fused
        params["fusion"] = TensorDict(
            {
                "query": random.normal(keys[0], (size,)),
                "key": init_linear(keys[1], size, size),
                "value": init_linear(keys[2], size, size),
                "out": init_linear(keys[3], size, size),
            }
        )
    return TensorDict(params)


def check(inputs: Any, present: Any = None, *, config: Config) -> None:
    """Raises unless each input has its name, a mask that fits, and is what its encoder takes."""
    _check_inputs(inputs, present, config)


def forward(
    params: TensorDict,
    inputs: Any,
    present: Any = None,
    *,
    config: Config,
    train: bool = False,
    key: random.Key | None = None,
    taps: TapsLike = (),
) -> Any:
    """The outputs by name; in training with the new buffers."""
    given, masks = _check_inputs(inputs, present, config)
    tap = Taps("multimodal", taps)
    count = len(config.encoders) + len(config.heads)
    keys = iter([None] * count if key is None else random.split(key, count).unbind())
    shared = {name: params["encoders", name] for name in map(config.source, config.inputs)}
    new: dict[str, dict[str, Any]] = {"encoders": {}, "heads": {}}
    parts: dict[str, Tensor] = {}
    for name in config.inputs:
        source, encoder_key = config.source(name), next(keys)
        found = new["encoders"]
        if name not in given:  # the running statistics stay as they are
            if train and source not in found:
                found[source] = tree.map(torch.clone, tree.partition(shared[source])[1])
            continue
        if (buffers := found.get(source)) is not None:  # as the input before left them
            shared[source] = tree.transfer(buffers, into=shared[source])[0]
        x = given[name]
        if name in masks:  # whatever stands where nothing is, be it nan or -1
            x = torch.where(_spread(masks[name], x), x, 0)
        place, encoder = f"encoders.{name}", config.encoder(name)
        parts[name], found[source] = tap.run(
            place, encoder, shared[source], x, train=train, key=encoder_key
        )
    _check_parts(parts, config)
    x = _fuse(params, parts, masks, config, tap)
    x = tap("fusion", activation(config.activation)(x))
    outputs = {}
    for name, head in config.heads:
        place, head_params, head_key = f"heads.{name}", params["heads", name], next(keys)
        if isinstance(head, Model):
            outputs[name], new["heads"][name] = tap.run(
                place, head, head_params, x, train=train, key=head_key
            )
        else:
            outputs[name] = tap(place, within(f"multimodal: {place}", linear, head_params, x))
    return tap.finish(outputs, new, train)


def _fuse(
    params: Any, parts: dict[str, Tensor], masks: dict[str, Tensor], config: Config, tap: Taps
) -> Tensor:
    """The fused features [..., fused]; absent parts are zeros where they are not left out."""
    first = next(iter(parts.values()))
    filled = []
    for name in config.inputs:
        part, mask = parts.get(name), masks.get(name)
        if part is None:
            part = first.new_zeros((*first.shape[:-1], config.features(name)))
        filled.append(part if mask is None else torch.where(_spread(mask, part), part, 0))
    if config.fusion == "concat":
        return torch.cat(filled, dim=-1)
    if config.fusion == "sum":
        return functools.reduce(torch.add, filled)
    if config.fusion == "gated":
        gates = linear(params["fusion", "gate"], torch.cat(filled, dim=-1)).sigmoid()
        pattern = "... (parts features) -> parts ... features"
        gates = tap("fusion.gates", rearrange(gates, pattern, features=config.fused))
        return reduce(gates * torch.stack(filled), "parts ... features -> ... features", "sum")
    present = []
    for name in config.inputs:
        there = torch.full_like(first[..., 0], name in parts, dtype=torch.bool)
        present.append(there & _spread(masks[name], there) if name in masks else there)
    return _attend(params["fusion"], torch.stack(filled, -2), torch.stack(present, -1), config, tap)


def _attend(params: Any, parts: Tensor, present: Tensor, config: Config, tap: Taps) -> Tensor:
    """The attention of the query to parts [..., parts, features] that are present [..., parts]."""

    def heads(x: Tensor) -> Tensor:
        pattern = "... (heads dim) -> ... heads dim"
        return rearrange(x, pattern, heads=config.attention_heads)

    query, values = heads(params["query"]), heads(linear(params["value"], parts))
    keys = heads(linear(params["key"], parts))
    scores = einsum(query, keys, "heads dim, ... parts heads dim -> ... heads parts")
    present = rearrange(present, "... parts -> ... 1 parts")
    # Not -inf, and once more after the softmax: where nothing is present the weights are zeros.
    scores = scores / math.sqrt(query.shape[-1])
    scores = torch.where(present, scores, torch.finfo(scores.dtype).min)
    weights = tap("fusion.weights", torch.where(present, scores.softmax(dim=-1), 0))
    attended = einsum(weights, values, "... heads parts, ... parts heads dim -> ... heads dim")
    return linear(params["out"], rearrange(attended, "... heads dim -> ... (heads dim)"))


def _spread(mask: Tensor, x: Tensor) -> Tensor:
    """A mask over the leading axes of x, with as many axes as x."""
    return rearrange(mask, "... -> ..." + " 1" * (x.ndim - mask.ndim))


def _pairs(field: str, named: Any) -> tuple[tuple[str, Any], ...]:
    if isinstance(named, Mapping):
        return tuple(named.items())
    if isinstance(named, Sequence) and all(isinstance(p, Sequence) and len(p) == 2 for p in named):
        return tuple((name, value) for name, value in named)
    raise TypeError(f"multimodal: {field}: expected a dict by name, got {named!r}")


def _check_names(field: str, pairs: tuple[tuple[str, Any], ...]) -> None:
    names = [name for name, _ in pairs]
    if not names:
        raise ValueError(f"multimodal: {field}: expected at least one, got none")
    for name in names:
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"multimodal: {field}: expected names without dots, got {name!r}")
        if names.count(name) > 1:
            raise ValueError(f"multimodal: {field}: expected each name once, got {name} twice")


def _check_inputs(
    inputs: Any, present: Any, config: Config
) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    """The inputs by name and the masks of some of them."""
    given = _named(inputs)
    if given is None:
        raise TypeError(
            f"multimodal: inputs: expected a dict of {', '.join(config.inputs)}, "
            f"got {tree.describe(inputs)}"
        )
    masks: dict[str, Any] = {}
    if present is not None:
        held = _named(present)
        if held is None:
            raise TypeError(
                f"multimodal: present: expected a dict of masks, got {tree.describe(present)}"
            )
        _check_known("present", held, config, optional=config.inputs)
        masks = {name: mask for name, mask in held.items() if mask is not True}
    absent = [name for name, mask in masks.items() if mask is False]
    _check_known("inputs", given, config, optional=absent)
    if len(absent) == len(config.inputs):
        raise ValueError("multimodal: present: expected at least one input, got none")
    given = {name: given[name] for name in config.inputs if name not in absent}
    masks = {name: mask for name, mask in masks.items() if name not in absent}
    for name, mask in masks.items():
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise ValueError(
                f"multimodal: present.{name}: expected a bool tensor, got {tree.describe(mask)}"
            )
        shape = given[name].shape
        if mask.ndim and mask.shape != shape[:1]:
            raise ValueError(
                f"multimodal: present.{name}: expected {list(shape[:1])} or [], "
                f"got {list(mask.shape)}"
            )
    for name, x in given.items():
        within(f"multimodal: encoders.{name}", config.encoder(name).check, x)
    return given, masks


def _named(given: Any) -> Mapping[str, Any] | None:
    """What a dict or TensorDict holds by name; None for anything else."""
    return tree.entries(given) if isinstance(given, (dict, TensorDictBase)) else None


def _check_known(field: str, named: Any, config: Config, optional: Sequence[str]) -> None:
    missing = [name for name in config.inputs if name not in named and name not in optional]
    unknown = [str(name) for name in named if name not in config.inputs]
    if missing or unknown:
        found = [f"missing {', '.join(missing)}"] if missing else []
        found += [f"unknown {', '.join(unknown)}"] if unknown else []
        raise ValueError(
            f"multimodal: {field}: expected {', '.join(config.inputs)}; {', '.join(found)}"
        )


def _check_parts(parts: dict[str, Tensor], config: Config) -> None:
    """Raises where the encoders disagree about the batch, or one gives other features."""
    first, part = next(iter(parts.items()))
    for name, other in parts.items():
        expected = [*part.shape[:-1], config.features(name)]
        if list(other.shape) != expected:
            raise ValueError(
                f"multimodal: encoders.{name}: expected outputs {expected} (the batch as that of "
                f"{first}), got {list(other.shape)}"
            )

"""What the model families share: norms picked by name, checks of a config, the key of a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from tensordict import TensorDict
from torch import Tensor

from funcnets import layers, random
from funcnets.model import Model

Norm = Literal["batch", "group", "layer", "rms"]


def init_norm(key: random.Key, kind: Norm, width: int) -> TensorDict:
    """The parameters of a norm over ``width`` channels or features."""
    inits: dict[str, Callable[..., TensorDict]] = {
        "batch": layers.init_batch_norm,
        "group": layers.init_group_norm,
        "layer": layers.init_layer_norm,
        "rms": layers.init_rms_norm,
    }
    return inits[kind](key, width)


def norm(
    params: TensorDict, x: Tensor, kind: Norm, *, train: bool, groups: int = 1
) -> tuple[Tensor, TensorDict | None]:
    """The normalised x, and the new buffers of a batch norm in training (None otherwise)."""
    if kind == "batch":
        return layers.with_buffers(layers.batch_norm, params, x, train=train)
    if kind == "group":
        return layers.group_norm(params, x, groups), None
    if kind == "layer":
        return layers.layer_norm(params, x), None
    return layers.rms_norm(params, x), None


def draw_keys(model: str, key: random.Key | None, needed: bool, num: int) -> Any:
    """``num`` keys for one call, or None where nothing is drawn."""
    if not needed:
        return None
    if key is None:
        raise ValueError(f"{model}: key: expected a key (dropout in training draws), got None")
    return random.split(key, num).unbind()


def known_features(model: Model) -> int | None:
    """How many features a model gives, where its config tells."""
    for field in ("out_features", "num_classes", "embedding_dim", "heads"):
        if isinstance(size := getattr(model.config, field, None), int):
            return size
    return None


def num_features(family: str, place: str, model: Model) -> int:
    """How many features a model within another gives, as its config has to tell."""
    if (size := known_features(model)) is not None:
        return size
    raise ValueError(
        f"{family}: {place}: expected a model whose config tells its out_features, num_classes or "
        f"embedding_dim, got {type(model.config).__name__}; "
        "a model of one's own is Model(init, apply, config=...)"
    )


def check_alike(family: str, parts: dict[str, Model]) -> None:
    """Raises where models whose outputs stand for each other give other numbers of features."""
    known = {place: known_features(model) for place, model in parts.items()}
    sizes = {place: size for place, size in known.items() if size is not None}
    for place, size in sizes.items():
        first, expected = next(iter(sizes.items()))
        if size != expected:
            raise ValueError(f"{family}: {place}: expected {expected} (as {first}), got {size}")


def check_sizes(model: str, **sizes: int) -> None:
    """Raises unless every size is a positive integer."""
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{model}: {name}: expected a positive integer, got {size!r}")


def check_widths(model: str, widths: Sequence[int]) -> tuple[int, ...]:
    """Widths as a tuple of positive integers."""
    if not isinstance(widths, Sequence) or any(not isinstance(w, int) or w < 1 for w in widths):
        raise ValueError(f"{model}: widths: expected positive integers, got {widths!r}")
    return tuple(widths)


def check_image(model: str, x: Tensor, channels: int, smallest: int = 1) -> None:
    """Raises unless x is [batch, channels, height, width], each size at least the smallest."""
    if x.ndim != 4 or x.shape[1] != channels or min(x.shape[2:]) < smallest:
        sizes = f"{smallest} or more, {smallest} or more" if smallest > 1 else "height, width"
        raise ValueError(f"{model}: x: expected [batch, {channels}, {sizes}], got {list(x.shape)}")


def check_choice(model: str, name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raises unless the value is one of the choices."""
    if value not in choices:
        known = ", ".join(map(repr, choices))
        raise ValueError(f"{model}: {name}: expected one of {known}, got {value!r}")


def check_rate(model: str, name: str, rate: float) -> None:
    """Raises unless the rate is a probability."""
    if not isinstance(rate, (int, float)) or not 0 <= rate <= 1:
        raise ValueError(f"{model}: {name}: expected a rate between 0 and 1, got {rate!r}")

"""What the families of funcnets are not meant to have, and their momenta: known beforehand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from funcnets.model import Model

_DERIVATIVES = ("gradients_match_finite_differences", "hessian_products_are_right")
_PRECISIONS = ("single_precision_is_close", "bfloat16_is_close")
_BY_FAMILY: dict[str, tuple[str, tuple[str, ...]]] = {
    "gated": ("the gate is trained as though it were soft", _DERIVATIVES),
    "early_exit": (
        "in training all exits answer",
        ("returns_what_is_declared", "training_equals_inference", "the_order_of_a_batch_is_kept"),
    ),
    "multimodal": ("an encoder looks at its input when it runs", ("tells_a_wrong_input",)),
}


def not_meant(model: Any) -> dict[str, str]:
    """Names of invariants that a model is not meant to have, each with the reason.

    >>> from funcnets import models
    >>> sorted(not_meant(models.embedding(4, 2, padding_idx=0)))
    ['gradients_match_finite_differences', 'hessian_products_are_right']
    >>> not_meant(models.embedding(4, 2))
    {}
    """
    found: dict[str, str] = {}
    for part in _within(model):
        reason, names = _BY_FAMILY.get(part.family or "", ("", ()))
        if getattr(part.config, "padding_idx", None) is not None:
            reason, names = "the row of padding is read and not trained", _DERIVATIVES
        found |= dict.fromkeys(names, reason)
        if part.family == "mlp" and (part.config.norm, part.config.activation) == ("rms", "relu"):
            reason = "of what relu leaves next to nothing of, an RMS norm is its epsilon's"
            found |= dict.fromkeys(_PRECISIONS, reason)
    return found


def momenta(model: Any) -> tuple[float, ...]:
    """The momenta of the running statistics in a model, by default 0.1 as in torch.

    >>> from funcnets import models
    >>> momenta(models.siamese(models.efficientnet_b5()))
    (0.01,)
    """
    found = []
    for part in _within(model):
        if part.family == "mobilenet_v3":
            found.append(0.01)
        elif hasattr(part.config, "momentum"):
            found.append(part.config.momentum)
        elif not any(True for value in _values(part) for _ in _within(value)):
            found.append(0.1)  # not made of other models: these are its own
    return tuple(dict.fromkeys(found)) or (0.1,)


def _values(model: Model) -> list[Any]:
    return list(vars(model.config).values()) if model.family is not None else []


def _within(part: Any) -> Iterator[Model]:
    """A model of a family and all that are parts of its configuration."""
    if isinstance(part, Model) and part.family is not None:
        yield part
        for value in _values(part):
            yield from _within(value)
    elif isinstance(part, tuple):
        for each in part:
            yield from _within(each)

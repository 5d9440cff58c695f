"""Intermediate outputs by name: what ``apply(..., taps=...)`` reads and changes on its way."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, TypeAlias

from tensordict import TensorDict
from torch import Tensor

from funcnets import layers
from funcnets.tree.flatten import describe

# The names of the outputs to read; in a mapping each may have a function that replaces the output.
TapsLike: TypeAlias = Collection[str] | Mapping[str, Callable[[Any], Any] | None]


def within(place: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """``function(*args, **options)``; its ValueErrors and TypeErrors begin with the place."""
    try:
        return function(*args, **options)
    except (ValueError, TypeError) as error:
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(f"{place}: {error}") from error


class Taps:
    """The taps of one forward pass: a record local to it, which makes nothing else impure.

    A forward function calls it at each named place, ``x = taps("layer1.0", x)``, hands submodels
    their part with `run`, and ends with `finish`. The names are those of the modules in torch.

    >>> import torch
    >>> taps = Taps("toy", {"hidden": lambda h: h + 1})
    >>> h = taps("hidden", torch.zeros(2))
    >>> taps.finish(2 * h, {}, train=False)
    (tensor([2., 2.]), {'hidden': tensor([1., 1.])})
    """

    def __init__(self, model: str, taps: TapsLike) -> None:
        if isinstance(taps, str):
            raise TypeError(f"{model}: taps: expected a list of names, got {taps!r}")
        self._model = model
        self._wanted: dict[str, Any] = (
            dict(taps) if isinstance(taps, Mapping) else dict.fromkeys(taps)
        )
        self._found: dict[str, Any] = {}
        self._known: dict[str, None] = {}  # in the order of the places

    def __call__(self, name: str, value: Any) -> Any:
        """The value at a named place, replaced if the tap says so; remembered if it is tapped."""
        if not self._wanted:
            return value
        self._known[name] = None
        if name in self._wanted:
            replace = self._wanted[name]
            value = self._found[name] = value if replace is None else self._new(name, value)
        return value

    def _new(self, name: str, value: Any) -> Any:
        """What the tap puts in place of the value."""
        if not callable(replace := self._wanted[name]):
            raise TypeError(
                f"{self._model}: taps: {name}: expected a function or None, got {describe(replace)}"
            )
        new = replace(value)
        if isinstance(value, Tensor) and (
            not isinstance(new, Tensor) or new.shape != value.shape or new.dtype != value.dtype
        ):
            raise ValueError(
                f"{self._model}: taps: {name}: expected {describe(value)} from the function, "
                f"got {describe(new)}"
            )
        return new

    def at(self, name: str) -> Callable[[Any], Any] | None:
        """The tap of a named place, or None where nobody wants what would be computed for it."""
        if self._wanted:
            self._known[name] = None
        return partial(self, name) if name in self._wanted else None

    def run(
        self, name: str, model: Any, params: Any, *inputs: Any, train: bool, key: Any = None
    ) -> tuple[Any, TensorDict | None]:
        """``(outputs, new buffers or None)`` of a submodel, whose taps are those below ``name``.

        Its errors say where it stands.
        """
        below = {
            place.removeprefix(f"{name}."): replace
            for place, replace in self._wanted.items()
            if place.startswith(f"{name}.")
        }
        options = {"train": train, "key": key} | ({"taps": below} if below else {})
        place = f"{self._model}: {name}"
        result, buffers = within(
            place, layers.with_buffers, model.apply, params, *inputs, **options
        )
        if below:
            result, found = result
            for place, value in found.items():
                self._known[f"{name}.{place}"] = None
                self._found[f"{name}.{place}"] = value
        return self(name, result), buffers

    def finish(self, outputs: Any, buffers: Mapping[str, Any], train: bool) -> Any:
        """What ``apply`` returns: the outputs, with the taps if any, with the buffers in training.

        Raises:
            ValueError: where a tap has a name that no place has; it lists the names there are.
        """
        if self._wanted:
            unknown = [name for name in self._wanted if name not in self._found]
            if unknown:
                known = f"names among {', '.join(self._known)}" if self._known else "none here"
                raise ValueError(f"{self._model}: taps: expected {known}; got {', '.join(unknown)}")
            outputs = outputs, self._found
        return layers.finish(outputs, buffers, train)

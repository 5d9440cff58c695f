"""A model: a pair of functions, and what it takes to make the pair again."""

from __future__ import annotations

import functools
import inspect
import math
import threading
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase

from funcnets import pretrained, random, tree
from funcnets.taps import TapsLike
from funcnets.tree.convert import without_counters
from funcnets.tree.flatten import entries


def _anything_fits(*inputs: Any) -> None:
    """What is asked of the inputs of a model without a check."""


@dataclass(frozen=True, eq=False)
class Model:
    """A network as two functions. Anything with these two will do: ``Model(init=..., apply=...)``.

    Attributes:
        init: ``init(key) -> params``.
        apply: ``apply(params, *inputs, train=False, key=None, taps=())``, the inputs by position
            or, where the family gives them names, by name; the outputs, and with
            ``train=True`` the pair of the outputs and the new buffers. With ``taps``, names of
            intermediate outputs, the outputs become the pair of them and a dict of those; where
            taps are a mapping, each name may have a function that replaces what flows there.
        family: the module of funcnets.models that can make the model again; None for one's own.
        config: the family's configuration, a frozen dataclass.
        check: ``check(*inputs)`` raises where an input does not fit, before anything is computed;
            a model of several inputs asks each of its parts first. Nothing, for one's own.

    >>> model = Model(init=lambda key: {"w": random.normal(key)}, apply=lambda p, x: p["w"] * x)
    >>> model.apply({"w": 2}, 3)
    6
    """

    init: Callable[..., Any]
    apply: Callable[..., Any]
    family: str | None = None
    config: Any = None
    check: Callable[..., None] = _anything_fits

    def __eq__(self, other: object) -> bool:
        """Models of a family are equal where their configurations are."""
        return isinstance(other, Model) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[Any, ...]:
        if self.family is None:
            return self.init, self.apply, self.config
        return self.family, type(self.config), self.config

    def from_torchvision(
        self,
        weights: Any,
        key: random.Key | None = None,
        fresh: str | Sequence[str] | Callable[..., bool] = (),
    ) -> Any:
        """Parameters of this model with the values of a network of torchvision.

        The names are torchvision's own, so any module, checkpoint or state_dict of the same network
        will do, torchvision's pretrained weights first of all.

        Args:
            weights: a module, a state_dict, the path of a file that holds one (of ``torch.save`` or
                safetensors; no code of it is run), or a member of a torchvision weights enum, such
                as ``torchvision.models.ResNet18_Weights.DEFAULT``, which torchvision downloads.
            key: for what is drawn anew.
            fresh: the parts that are drawn anew, as `funcnets.tree.partition` takes them: ``"fc"``
                for a new head of any size.

        Raises:
            ValueError: naming each place where the weights do not fit.

        >>> from torchvision.models import resnet18
        >>> from funcnets import models
        >>> module, model = resnet18(), models.resnet18(num_classes=5)
        >>> params = model.from_torchvision(module, random.key(0), fresh="fc")
        >>> params["fc", "weight"].shape
        torch.Size([5, 512])
        """
        return pretrained.from_torchvision(self.init, specs_of(self.init), weights, key, fresh)


def bind(
    family: str,
    config: Any,
    init: Callable[..., Any],
    forward: Callable[..., Any],
    check: Callable[..., None] | None = None,
) -> Model:
    """The model of one configuration of a family.

    Its ``apply`` first compares the names and shapes of the parameters with those that ``init``
    gives, so that an error says where in the tree it lies.

    Args:
        family: the name of the module in funcnets.models.
        config: the configuration, a frozen dataclass.
        init: ``init(key, config) -> params``.
        forward: ``forward(params, *inputs, config, train=False, key=None, taps=())``.
        check: ``check(*inputs, config)``, with which forward begins; see `Model`.
    """

    def bound_init(key: random.Key) -> Any:
        return init(key, config=config)

    most = _most_inputs(forward)

    @functools.cache
    def expected() -> tuple[Any, Any]:
        specs = parameter_specs(bound_init)
        return specs, _sizes(specs)

    def apply(
        params: Any,
        *inputs: Any,
        train: bool = False,
        key: Any = None,
        taps: TapsLike = (),
        **named: Any,
    ) -> Any:
        # Under Dynamo the check would be traced for nothing: the operators check there.
        if not torch.compiler.is_dynamo_compiling() and not _fits(params, expected()[1]):
            params = without_counters(params)  # of a state_dict as torch gives it
            check_parameters(params, expected()[0])
        if isinstance(params, dict):
            params = TensorDict(params)
        if len(inputs) > most:
            raise TypeError(f"{family}: expected {most} inputs at most, got {len(inputs)}")
        if taps:
            named["taps"] = taps
        return forward(params, *inputs, config=config, train=train, key=key, **named)

    # A code object of its own, for Dynamo gives up on one that it has compiled in many ways.
    own = types.FunctionType(
        apply.__code__.replace(), apply.__globals__, family, apply.__defaults__, apply.__closure__
    )
    own.__kwdefaults__ = apply.__kwdefaults__
    bound_check = _anything_fits if check is None else functools.partial(check, config=config)
    return Model(bound_init, own, family, config, bound_check)


def _most_inputs(forward: Callable[..., Any]) -> float:
    """How many inputs a forward function takes at most."""
    _, *rest = inspect.signature(forward).parameters.values()
    if any(one.kind is one.VAR_POSITIONAL for one in rest):
        return math.inf
    named = ("config", "train", "key", "taps")
    return sum(one.kind is one.POSITIONAL_OR_KEYWORD and one.name not in named for one in rest)


def parameter_specs(init: Callable[[random.Key], Any]) -> Any:
    """The tree of names, shapes and dtypes that ``init(key)`` gives, found on the meta device.

    So ``init`` has to make all its tensors on the device of the key; nothing is computed.
    """
    result: list[Any] = []

    def work() -> None:
        try:
            result.append(tree.specs(init(random.key(0, device="meta"))))
        except BaseException as error:
            result.append(error)

    # A new thread has none of the transforms (vmap, grad) and tracing modes of this one.
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]


def specs_of(init: Callable[[random.Key], Any]) -> Any:
    """As `parameter_specs`, also for an ``init`` of one's own that needs real values."""
    try:
        return parameter_specs(init)
    except Exception:
        return tree.specs(init(random.key(0)))


def check_parameters(params: Any, expected: Any) -> None:
    """Raises a ValueError where the parameters are not as `parameter_specs` has them."""
    differences = tree.compare(params, expected)
    if not differences:
        return
    batch = params.batch_size if isinstance(params, TensorDictBase) else torch.Size([])
    axes = max(len(batch), 1)
    member = tree.map(lambda leaf: tree.Spec(leaf.shape[axes:], leaf.dtype), params)
    if not tree.compare(member, expected):
        size = list(batch) or list(tree.leaves(params)[0].shape[:1])
        raise ValueError(
            f"params: expected one network, got an ensemble of batch size {size}; "
            "use torch.func.vmap(model.apply, in_dims=(0, None))(params, inputs)"
        )
    raise ValueError(str(differences))


def _sizes(specs: Any) -> Any:
    """The shapes of a tree of specs as plain nested dicts, the quickest to compare with."""
    held = entries(specs)
    return specs.shape if held is None else {name: _sizes(child) for name, child in held.items()}


def _fits(params: Any, sizes: dict[str, Any]) -> bool:
    """Whether names and shapes are the expected ones, found out quickly."""
    held = params._tensordict if type(params) is TensorDict else entries(params)
    if held is None or len(held) != len(sizes):
        return False
    for name, size in sizes.items():
        child = held.get(name)
        if type(size) is dict:
            if not _fits(child, size):
                return False
        elif getattr(child, "shape", None) != size:
            return False
    return True

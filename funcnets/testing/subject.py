"""The model under test: how it is called, what is drawn for it, and what can be said of it."""

from __future__ import annotations

import copy
import inspect
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.func import functional_call

from funcnets import random, tree
from funcnets.testing.declared import axes_of, declare, draw
from funcnets.testing.designed import momenta, not_meant
from funcnets.tree.flatten import Path
from funcnets.tree.select import BUFFERS, Where


@dataclass(frozen=True)
class Sample:
    """One case that was drawn: parameters, inputs and a key; and what it takes to draw it again."""

    sizes: Mapping[str, int]
    seed: int = 0
    values: str = "normal"
    params: Any = field(default=None, repr=False, compare=False)
    inputs: tuple[Any, ...] = field(default=(), repr=False, compare=False)
    key: Any = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        sizes = "".join(f", {name}={size}" for name, size in self.sizes.items())
        return f"seed={self.seed}, values={self.values!r}{sizes}"


class Subject:
    """A model with its declared inputs, as the invariants look at it.

    Args:
        model: a `funcnets.Model`; a pair ``(init, apply)``; a torch module, which is looked at as
            it is at inference; or ``apply`` alone, with ``params``.
        inputs: what it is called with: one input, or a tuple of several. Each is a declaration
            (`floats`, `integers`, `booleans`, `lengths`) or a tensor as an example, or a dict or
            other nest of those.
        params: the parameters, or ``params(key)``, where ``init`` is not what should be looked at.
        outputs: the declaration of the outputs, nested as they are.
        axes: sizes of the named axes: a number, or the least and the largest.
        draws: whether training draws by its key; found out where it is not said.
        trainable: what has a gradient, as `funcnets.tree.partition` takes it.
        perturb: how far the initial parameters are moved away, in units of a standard normal, so
            that no two values are alike and none is zero by design.
        reference: a torch module with the parameter names of the model, or a function of the
            parameters and inputs, that the model equals.
        shared: how often the forward function reads a subtree, by its path.
        symmetries: `Symmetry` by name.
        momentum: of running statistics; by default that of torch.nn, 0.1, and of the families of
            funcnets their own.
        checks_shapes: whether the model says by itself which parameter has a wrong shape; by
            default this is expected of the families of funcnets.
    """

    def __init__(
        self,
        model: Any,
        inputs: Any,
        *,
        params: Any = None,
        outputs: Any = None,
        axes: Mapping[str, int | tuple[int, int]] | None = None,
        draws: bool | None = None,
        trainable: Where = tree.is_trainable,
        perturb: float = 0.3,
        reference: Any = None,
        shared: Mapping[str, int] | None = None,
        symmetries: Mapping[str, Any] | None = None,
        momentum: float | None = None,
        checks_shapes: bool | None = None,
    ) -> None:
        self.model = model
        self.given = isinstance(model, nn.Module) or not (params is None or callable(params))
        self.init, self.apply = _pair(model, params)
        self.inputs = tuple(
            declare(one) for one in (inputs if isinstance(inputs, tuple) else (inputs,))
        )
        self.outputs = outputs
        self.axes = axes_of((self.inputs, outputs), axes or {})
        self.trainable = tree.matcher(trainable)
        self.perturb = perturb
        self.momenta = momenta(model) if momentum is None else (momentum,)
        self.not_meant = not_meant(model)
        self.reference, self.shared = reference, dict(shared or {})
        self.symmetries = dict(symmetries or {})
        family = getattr(model, "family", None)
        self.checks_shapes = family is not None if checks_shapes is None else checks_shapes
        named = inspect.signature(self.apply).parameters
        self.trains, self.keyed = "train" in named, "key" in named
        with torch.random.fork_rng(devices=[]):  # which a wrong model may draw from
            self.dtype, self.why_not_double = self._precision()
            self.draws = self._draws() if draws is None else draws
            sample = self.sample()
            outputs_now = self.infer(sample.params, sample.inputs)
        self.batched = "batch" in self.axes and all(
            isinstance(leaf, Tensor) and leaf.shape[:1] == (sample.sizes["batch"],)
            for leaf in tree.leaves(outputs_now)
        )
        self.buffered = any(
            path and path[-1] in BUFFERS for path, _ in tree.leaves_with_path(sample.params)
        )

    # Calls.

    def infer(self, params: Any, inputs: Sequence[Any], key: Any = None) -> Any:
        """The outputs at inference. A model without a mode of training, but with a key, gets it."""
        named = {"key": self._key(key)} if self.keyed and not self.trains and self._wants() else {}
        return self.apply(params, *inputs, **named)

    def train(self, params: Any, inputs: Sequence[Any], key: Any) -> tuple[Any, Any]:
        """The outputs in training and the new buffers; those of inference if that is all."""
        if not self.trains:
            return self.infer(params, inputs, key), TensorDict({})
        named = {"key": key} if self.keyed else {}
        result = self.apply(params, *inputs, train=True, **named)
        if not isinstance(result, tuple) or len(result) != 2:
            raise Violation(
                "train=True", "(outputs, buffers)", tree.describe(result), "what is returned"
            )
        return result

    def loss(self, outputs: Any) -> Tensor:
        """A number that every floating output has a share in, with weights of its own."""
        total: Any = 0.0
        for i, y in enumerate(smooth(outputs)):
            weight = random.normal(random.fold_in(random.key(17), i), y.shape, dtype=torch.float64)
            total = total + (weight.to(y) * y + 0.15 * y.square()).sum()
        return total

    def points(self, params: Any) -> tuple[dict[Path, Tensor], Callable[[dict[Path, Tensor]], Any]]:
        """The trainable leaves by path, and what puts others into their places."""
        return points(params, self.trainable)

    # What is drawn.

    def sample(
        self,
        seed: int = 0,
        values: str = "normal",
        sizes: Mapping[str, int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Sample:
        """The case of given sizes of the named axes (by default the smallest) and a seed."""
        unknown = set(sizes or ()) - set(self.axes)
        if unknown:
            raise ValueError(f"sizes: expected {', '.join(self.axes)}, got {', '.join(unknown)}")
        sizes = {name: low for name, (low, _) in self.axes.items()} | dict(sizes or {})
        dtype = self.dtype if dtype is None else dtype
        param_key, input_key, key = random.split(random.key(seed), 3).unbind()
        return Sample(
            sizes,
            seed,
            values,
            self.params(param_key, dtype),
            self.draw_inputs(input_key, sizes, values, dtype),
            key,
        )

    def params(self, key: random.Key, dtype: torch.dtype | None = None) -> Any:
        """Parameters moved away from where they begin, with positive variances."""
        begin = self.init(key)
        dtype = self.dtype if dtype is None else dtype
        move = random.fold_in(key, 1)

        def one(path: tuple[str, ...], leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                return leaf
            leaf = leaf.detach().to(dtype)
            if not self.perturb:
                return leaf
            place = random.fold_in(move, zlib.crc32(".".join(path).encode()) % 2**31)
            # Drawn in one dtype, that they are the same numbers in every other.
            noise = random.normal(place, leaf.shape, dtype=torch.float64).to(dtype)
            if path and path[-1] == "running_var":
                return noise.square() + 0.5
            return leaf + self.perturb * noise

        return tree.map_with_path(one, begin)

    def draw_inputs(
        self, key: random.Key, sizes: Mapping[str, int], values: str, dtype: torch.dtype
    ) -> tuple[Any, ...]:
        """Inputs as they are declared."""
        return draw(self.inputs, key, sizes, values, dtype)

    # What is found out.

    def _key(self, key: Any) -> Any:
        return random.key(0) if key is None else key

    def _wants(self) -> bool:
        return getattr(self, "draws", True)

    def _precision(self) -> tuple[torch.dtype, str | None]:
        sample: Any = "init"
        try:
            sample = self.sample(dtype=torch.float64)
            self.infer(sample.params, sample.inputs)
            return torch.float64, None
        except Exception as double:
            try:
                sample = self.sample(dtype=torch.float32)
                self.infer(sample.params, sample.inputs)
            except Exception as single:
                # Not the model's fault, most often: its inputs were declared wrongly.
                raise ValueError(
                    f"the model does not run on the declared inputs ({sample}): "
                    f"{type(single).__name__}: {single}"
                ) from single
            return torch.float32, f"{type(double).__name__}: {double}"

    def _draws(self) -> bool:
        if not self.keyed:
            return False
        sample, mode = self.sample(), {"train": True} if self.trains else {}
        try:
            self.apply(sample.params, *sample.inputs, **mode)
        except Exception:
            return True  # It asks for the key that was not given.
        first, second = (
            self.apply(sample.params, *sample.inputs, **mode, key=random.key(i)) for i in (1, 2)
        )
        return not all(map(torch.equal, tree.leaves(first), tree.leaves(second)))


class Violation(AssertionError):  # noqa: N818 - it is a finding
    """What an invariant found: where, what was expected and what came."""

    def __init__(self, path: str, expected: str, got: str, meaning: str = "") -> None:
        self.path = "outputs" if path == tree.join(()) else path
        self.expected, self.got, self.meaning = expected, got, meaning
        about = f"{meaning}: " if meaning else ""
        super().__init__(f"{self.path}: {about}expected {expected}, got {got}")


class Skipped(Exception):  # noqa: N818 - it is no error
    """Why an invariant says nothing of a model."""


def smooth(outputs: Any) -> list[Tensor]:
    """The outputs that may have a gradient."""
    return [y for y in tree.leaves(outputs) if isinstance(y, Tensor) and y.is_floating_point()]


def points(
    held: Any, wanted: Callable[[Path, Any], bool] = tree.is_trainable
) -> tuple[dict[Path, Tensor], Callable[[dict[Path, Tensor]], Any]]:
    """The leaves of a tree that have a gradient, and what puts others into their places."""
    found = {
        path: leaf
        for path, leaf in tree.leaves_with_path(held)
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and wanted(path, leaf)
    }

    def rebuild(others: dict[Path, Tensor]) -> Any:
        return tree.map_with_path(lambda path, leaf: others.get(path, leaf), held)

    return found, rebuild


def _pair(model: Any, params: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    init: Any = None
    apply: Any = model
    if isinstance(model, nn.Module):
        still = copy.deepcopy(model).eval()

        def from_module(key: Any) -> Any:
            return tree.from_module(still)

        def call(params: Any, *inputs: Any) -> Any:
            return functional_call(still, tree.to_state_dict(params, still), inputs)

        init, apply = from_module, call
    elif isinstance(model, tuple) and len(model) == 2:
        init, apply = model
    elif hasattr(model, "apply"):
        init, apply = getattr(model, "init", None), model.apply
    if params is not None:
        init = params if callable(params) else lambda key: params
    if not callable(init) or not callable(apply):
        raise TypeError(
            "model: expected a funcnets.Model, a pair (init, apply), a torch module, or a function "
            f"with params, got {model!r}"
        )
    return init, apply

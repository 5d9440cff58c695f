"""Compiling pure functions over trees: forward pass, loss, gradient and optimizer in one graph."""

from __future__ import annotations

import functools
import inspect
import itertools
import operator
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnets import _torch, tree

_new = operator.attrgetter("data")  # the same memory in a new tensor, sooner than by detach()
# How many graphs of one function may differ in nothing but a Python number before it is said aloud.
_MANY = 8


def compile(
    f: Callable[..., Any] | None = None,
    *,
    donate: str | int | Sequence[str | int] = (),
    static: str | int | Sequence[str | int] = (),
    backend: str | Callable[..., Any] = "inductor",
) -> Any:
    """`torch.compile` for pure functions over trees, torch.func transforms and all.

    The function is run once per structure of its arguments (a few times, with `funcnets.route` in
    it) while its operations are recorded, as with ``jax.jit``: ``grad``, ``vmap`` and ``jvp`` in it
    are resolved, `funcnets.cond` stays a conditional, and the record is compiled. Calls with the
    same structure, shapes, strides and dtypes run the compiled code; others compile again. A
    compiled function called inside a transform, or inside another compiled function, is the plain
    function. Where arguments require grad, the result can be differentiated with backward() as
    that of torch.compile; conditionals and loops inside are better differentiated inside, with
    ``torch.func.grad``.

    Args:
        f: takes and returns trees whose leaves are tensors. Every other leaf of the arguments (a
            number, a flag, a name) must be hashable and is a constant of its own graph. Tensors
            that the function closes over are constants, too.
        donate: arguments (by name or position) whose memory the results may take over, as the
            parameters and the optimizer state of a training step. A donated tensor cannot be used
            afterwards: any attempt is an error. On a CPU, what has the shape of a convolution's
            weight comes back with channels last where Inductor computes so: where there are more
            inputs and results of convolutions than weights.
        static: arguments that are constants as a whole, such as a config; they must be hashable.
        backend: a backend of torch.compile; ``"aot_eager"`` runs the record one by one.

    Raises:
        TypeError: an argument that is neither a tensor nor hashable; it names the place.
        RuntimeError: a donated tensor is used again, or is donated twice in one call.

    >>> step = compile(lambda params, x: {"w": params["w"] + x}, donate=0, backend="aot_eager")
    >>> params = {"w": torch.zeros(2)}
    >>> step(params, torch.ones(2))
    {'w': tensor([1., 1.])}
    >>> params["w"] + 1
    Traceback (most recent call last):
    RuntimeError: this tensor was donated to a compiled function; use the result of the call instead
    """
    if f is None:
        return functools.partial(compile, donate=donate, static=static, backend=backend)
    return Compiled(f, donate, static, backend)


class Compiled:
    """What `compile` returns: call it as the function that was compiled."""

    def __init__(
        self,
        f: Callable[..., Any],
        donate: str | int | Sequence[str | int],
        static: str | int | Sequence[str | int],
        backend: str | Callable[..., Any],
    ) -> None:
        functools.update_wrapper(self, f, updated=())
        self._f = f
        self._backend = backend
        self._donate = _places(f, donate)
        self._static = _places(f, static)
        self._entries: dict[Any, list[_Entry]] = {}
        self._structures: dict[Any, tuple[tree.Template, int]] = {}  # of all calls, numbered
        self._numbers = itertools.count()
        self._last: tuple[tree.Template, int] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The result of the compiled function; it is compiled first where this call is new."""
        if _torch.inlining():
            return self._f(*args, **kwargs)
        if self._static:
            args, kwargs = self._wrap_static(args, kwargs)
        # Mostly a call is like the one before.
        known = self._last
        leaves = known[0].flatten((args, kwargs)) if known else None
        if leaves is None:
            leaves, structure = tree.flatten((args, kwargs))
            known = None
        tensors: list[Tensor] = leaves
        constants: tuple[Any, ...] = ()
        if set(map(type, leaves)) != {Tensor}:
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            constants = tuple((type(leaf), leaf) for leaf in leaves if not isinstance(leaf, Tensor))
        try:
            if known is None:
                known = self._structures.get(structure) or self._structures.setdefault(
                    structure, (tree.Template(structure), next(self._numbers))
                )
                self._last = known
            template, number = known
            key = (number, constants, _ambient())
            entries = self._entries.get(key, ())
        except TypeError:
            raise self._unhashable(args, kwargs) from None
        for entry in entries:
            if entry.matches(*tensors):
                return entry.run(tensors)
        for path, leaf in tree.leaves_with_path({"args": args, "kwargs": kwargs}):
            if isinstance(leaf, Donated):
                raise RuntimeError(f"{self._where(path)}: {Donated.message}")
        donated = self._donated(args, kwargs, tensors)
        # What vmap expands has one number in many places, and cannot be written over.
        tensors = [
            tensor.contiguous() if place in donated and 0 in tensor.stride() else tensor
            for place, tensor in enumerate(tensors)
        ]
        # The quick check says no to a tensor given twice, too.
        signature = _signature(tensors)
        for entry in entries:
            if entry.signature == signature:
                return entry.run(tensors)
        found = self._compile(leaves, template, tensors, donated)
        self._entries.setdefault(key, []).extend(found)
        self._warn_if_many(number)
        return found[0].run(tensors)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def _donated(self, args: Any, kwargs: Any, tensors: list[Tensor]) -> list[int]:
        """The places of the donated tensors."""
        given = {
            id(leaf)
            for place, argument in [*enumerate(args), *kwargs.items()]
            if place in self._donate
            for leaf in tree.leaves(argument)
        }
        return [place for place, tensor in enumerate(tensors) if id(tensor) in given]

    def _compile(
        self,
        leaves: list[Any],
        template: tree.Template,
        tensors: list[Tensor],
        donated: list[int],
        ragged: bool | None = None,
    ) -> list[_Entry]:
        """The entries for these tensors: for them as they are, and as they come back."""
        recorded, outputs = _record(self._f, leaves, template, tensors, donated, ragged)
        # Where convolutions are computed with channels last, what else of their weights' shapes is
        # given away, moments and all, is better laid out so once than in each step.
        shapes = _torch.channels_last_weights(recorded) if self._backend == "inductor" else ()
        moved = {place for place in donated if tensors[place].shape in shapes}
        laid_out = _channels_last(tensors, moved)
        if any(one is not other for one, other in zip(laid_out, tensors, strict=True)):
            found = self._compile(leaves, template, laid_out, donated, ragged)
            matches, signature = _torch.guard(tensors), _signature(tensors)
            first = found[0]._replace(matches=matches, signature=signature, moved=frozenset(moved))
            return [first, *found]
        differentiated = any(tensor.requires_grad for tensor in tensors)
        try:
            if differentiated and _torch.holds_loop(recorded):
                raise NotImplementedError(
                    "torch's own derivative of a while loop is not to be used"
                )
            # The record has the casts of autocast in it; the backend must not add them again.
            with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                compiled = _torch.compile_graph(recorded, self._backend)
        except Exception as error:
            if recorded.ragged:
                compiled = None
            elif differentiated:
                raise RuntimeError(
                    f"{self._name}: cannot be differentiated from outside, as its arguments that "
                    "require grad ask; take the gradient inside it with torch.func.grad"
                ) from error
            else:
                raise
        if compiled is None:  # not everything compiles for batches of any size
            return self._compile(leaves, template, tensors, donated, ragged=False)
        matches, signature = _torch.guard(tensors), _signature(tensors)
        return [_Entry(matches, signature, compiled, outputs, donated, self._name)]

    def _wrap_static(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return (
            tuple(_Static(a) if i in self._static else a for i, a in enumerate(args)),
            {name: _Static(a) if name in self._static else a for name, a in kwargs.items()},
        )

    def _unhashable(self, args: Any, kwargs: Any) -> TypeError:
        for path, leaf in tree.leaves_with_path({"args": args, "kwargs": kwargs}):
            try:
                hash(leaf)
            except TypeError:
                return TypeError(
                    f"{self._where(path)}: expected a tensor or a hashable constant, "
                    f"got {type(leaf).__name__}"
                )
        return TypeError(f"{self._name}: the structure of the arguments is not hashable")

    def _warn_if_many(self, number: int) -> None:
        alike = sum(
            not entry.moved
            for key, entries in self._entries.items()
            if key[0] == number
            for entry in entries
        )
        if alike == _MANY:
            warnings.warn(
                f"{self._name} was compiled {alike} times for one structure of its arguments: "
                "pass numbers that change as 0-d tensors, and pad shapes that change",
                stacklevel=4,
            )

    @property
    def _name(self) -> str:
        return getattr(self._f, "__qualname__", type(self._f).__name__)

    def _where(self, path: tuple[str, ...]) -> str:
        """The name of an argument's leaf: ``step: params.fc1.weight``."""
        try:
            names = list(inspect.signature(self._f).parameters)
        except (TypeError, ValueError):
            names = []
        first, *rest = path[1:]
        if path[0] == "args" and int(first) < len(names):
            first = names[int(first)]
        return f"{self._name}: {tree.join((first, *rest))}"


class Donated(Tensor):
    """The class that a tensor takes on when its memory is given away: every use is an error."""

    message = "this tensor was donated to a compiled function; use the result of the call instead"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        raise RuntimeError(cls.message)

    def __repr__(self) -> str:  # type: ignore[override]
        return "Donated()"


@dataclass(frozen=True)
class _Static:
    """A static argument: whatever it is made of, one constant."""

    value: Any


class _Outputs(NamedTuple):
    """How the result is put together from what the graph returns."""

    template: tree.Template
    donors: list[int]  # the tensors of the call whose memory holds a result
    constants: list[Any]  # the leaves that are no tensors
    # Where each leaf stands among the graph's results, the donors and the constants, in a row.
    order: list[int]


class _Entry(NamedTuple):
    """One compiled graph, and which calls it serves."""

    matches: Callable[..., bool]
    signature: list[Any]
    compiled: Callable[..., Any]
    outputs: _Outputs
    donated: list[int]
    name: str
    moved: frozenset[int] = frozenset()  # the donated tensors to be laid out with channels last

    def run(self, given: list[Tensor]) -> Any:
        if self.donated:
            self._check_aliases(given)
        tensors = _channels_last(given, self.moved) if self.moved else given
        template, donors, constants, order = self.outputs
        leaves = list(self.compiled(*tensors))
        if donors or constants:  # else all come from the graph, in order
            # A result over donated memory is a new tensor; the old one becomes unusable.
            leaves.extend(map(_new, map(tensors.__getitem__, donors)))
            leaves.extend(constants)
            leaves = list(map(leaves.__getitem__, order))
        for place in self.donated:
            given[place].__class__ = Donated
        return template.unflatten(leaves)

    def _check_aliases(self, tensors: list[Tensor]) -> None:
        pointers = list(map(Tensor.data_ptr, tensors))
        if len(set(pointers)) == len(pointers):
            return
        donated = {pointers[place] for place in self.donated} - {0}  # 0: an empty tensor
        if sum(map(donated.__contains__, pointers)) > len(donated):
            raise RuntimeError(
                f"{self.name}: a donated tensor is given twice in one call; copy one of them first"
            )


def _record(
    f: Callable[..., Any],
    leaves: list[Any],
    template: tree.Template,
    tensors: list[Tensor],
    donated: list[int],
    ragged: bool | None,
) -> tuple[_torch.Recorded, _Outputs]:
    """Records f for these arguments, with the results written over the donated tensors."""
    outputs = _Outputs(template, [], [], [])

    def flat(*traced: Tensor) -> list[Tensor]:
        nonlocal outputs
        rest = iter(traced)
        given = [
            next(rest)
            if isinstance(leaf, Tensor)
            else leaf.value
            if isinstance(leaf, _Static)
            else leaf
            for leaf in leaves
        ]
        args, kwargs = template.unflatten(given)
        results, structure = tree.flatten(f(*args, **kwargs))
        donors = _donors(results, traced, donated)
        donor_storages = {traced[place].untyped_storage()._cdata for place in donated}
        returned: dict[int, Tensor] = {}
        constants: dict[int, Any] = {}
        for i, result in enumerate(results):
            if not isinstance(result, Tensor):
                constants[i] = result
            elif i not in donors:
                # A view of memory that is about to be overwritten must become a copy first.
                shared = result.untyped_storage()._cdata in donor_storages
                returned[i] = result.clone() if shared else result
        copies = []
        for i, place in donors.items():
            if results[i] is not traced[place]:
                shared = results[i].untyped_storage()._cdata in donor_storages
                copies.append((traced[place], results[i].clone() if shared else results[i]))
        for target, source in copies:
            target.copy_(source)
        row = [*returned, *donors, *constants]
        order = sorted(range(len(row)), key=row.__getitem__)
        outputs = _Outputs(
            tree.Template(structure), list(donors.values()), list(constants.values()), order
        )
        return list(returned.values())

    return _torch.trace(flat, tensors, ragged), outputs


def _donors(results: list[Any], traced: tuple[Tensor, ...], donated: list[int]) -> dict[int, int]:
    """Which donated tensor each result is written over: place in results to place in traced.

    A donated tensor that is returned as it is keeps its memory; the others go in order to results
    of the same shape and dtype, so that a tree that comes back updated lands on itself.
    """
    own = {id(traced[place]): place for place in donated}
    donors: dict[int, int] = {}
    for i, result in enumerate(results):
        if id(result) in own and own[id(result)] not in donors.values():
            donors[i] = own[id(result)]
    free: dict[Any, list[int]] = {}
    for place in donated:
        if place not in donors.values():
            free.setdefault(_kind(traced[place]), []).append(place)
    for i, result in enumerate(results):
        if i not in donors and isinstance(result, Tensor) and free.get(_kind(result)):
            donors[i] = free[_kind(result)].pop(0)
    return donors


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device


def _places(f: Callable[..., Any], names: str | int | Sequence[str | int]) -> frozenset[str | int]:
    """Names and positions of arguments, each completed by the other where the signature tells."""
    given = (names,) if isinstance(names, (str, int)) else tuple(names)
    if not given:
        return frozenset()
    try:
        parameters = list(inspect.signature(f).parameters)
    except (TypeError, ValueError):
        return frozenset(given)
    found: set[str | int] = set()
    for name in given:
        if isinstance(name, str) and name not in parameters:
            raise ValueError(f"compile: expected one of {', '.join(parameters)}, got {name!r}")
        if isinstance(name, int) and not 0 <= name < max(len(parameters), name + 1):
            raise ValueError(f"compile: expected a position of at least 0, got {name}")
        position = parameters.index(name) if isinstance(name, str) else name
        found |= {position, *parameters[position : position + 1]}
    return frozenset(found)


def _channels_last(tensors: list[Tensor], places: Collection[int]) -> list[Tensor]:
    """The tensors, of which those at some places are laid out with channels last."""
    return [
        tensor.contiguous(memory_format=torch.channels_last) if place in places else tensor
        for place, tensor in enumerate(tensors)
    ]


def _signature(tensors: list[Tensor]) -> list[Any]:
    return [(type(t), t.requires_grad, t.stride(), *_kind(t)) for t in tensors]


def _ambient() -> tuple[Any, ...]:
    """The settings of torch that a graph depends on besides its inputs."""
    return (
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"),
        torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
    )

"""Trees to lists of leaves and back, and functions mapped over trees.

A tree is any nesting of TensorDict, dict, list, tuple, named tuple and whatever else is registered
with torch's pytrees. None holds no leaves; everything else is a leaf. This does what
``torch.utils._pytree`` does for the same trees, except that it walks a TensorDict twenty times
faster, matches the entries of several trees by name and not by position, and names the place where
two trees differ.
"""

from __future__ import annotations

import builtins
import functools
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from tensordict import TensorDict, TensorDictBase
from torch.utils._pytree import SUPPORTED_NODES

Path: TypeAlias = tuple[str, ...]
Tree: TypeAlias = Any  # its kinds are registered at run time, so no annotation can tell them apart

_TENSOR = frozenset({torch.Tensor})
_TENSORS = (torch.Tensor, TensorDictBase)
_NO_BATCH = torch.Size([])
_Held = type(TensorDict()._tensordict)


class Structure(NamedTuple):
    """What is left of a tree without its leaves: hashable, and equal for equal structures."""

    kind: Any
    meta: Any
    keys: tuple[Any, ...]
    children: tuple[Structure | None, ...]


def flatten(tree: Any) -> tuple[list[Any], Structure | None]:
    """The leaves of a tree from left to right, and its structure (None for a lone leaf).

    >>> leaves, structure = flatten({"a": 1, "b": (2, None)})
    >>> leaves
    [1, 2]
    >>> unflatten(structure, leaves)
    {'a': 1, 'b': (2, None)}
    """
    leaves: list[Any] = []
    return leaves, _flatten(tree, leaves)


def unflatten(structure: Structure | None, leaves: list[Any]) -> Any:
    """The tree of this structure that holds these leaves; the inverse of `flatten`.

    A TensorDict keeps its batch size where its new leaves still begin with it, and has batch size
    ``[]`` otherwise.
    """
    if structure is None:
        return _spend("unflatten", leaves, lambda rest, _: next(rest))
    return _spend("unflatten", leaves, functools.partial(_unflatten, structure))


def unflatten_like(tree: Any, leaves: list[Any]) -> Any:
    """The tree that holds these leaves and is shaped as another tree, as `unflatten` builds it.

    >>> unflatten_like({"a": 1, "b": (2, None)}, [3, 4])
    {'a': 3, 'b': (4, None)}
    """
    return _spend("unflatten_like", leaves, functools.partial(_refill, tree))


class Template:
    """Reads and builds the trees of one structure, in half the time of `flatten` and `unflatten`.

    >>> template = Template(flatten({"a": 1, "b": (2, None)})[1])
    >>> template.flatten({"a": 3, "b": (4, None)})
    [3, 4]
    >>> template.unflatten([5, 6])
    {'a': 5, 'b': (6, None)}
    """

    def __init__(self, structure: Structure | None) -> None:
        # Inner nodes, those nearer to the root first: where their parent stands among them, their
        # name in it, kind, meta and keys. Place 0 is for a row of the root alone.
        self._nodes: list[tuple[int, Any, Any, Any, tuple[Any, ...]]] = []
        self._owners: list[int] = []  # of each leaf
        self._names: list[Any] = []
        self._empty: list[dict[Any, Any]] = [{0: None}]
        self._add(structure, 0, 0)

    def flatten(self, tree: Any) -> list[Any] | None:
        """The leaves of a tree of this structure, from left to right; None for any other tree."""
        held: list[Any] = [(tree,)]  # what each node holds, by name
        for parent, name, kind, meta, keys in self._nodes:
            node = held[parent][name]
            if type(node) is not kind:
                return None
            if kind is TensorDict:
                inner = node._tensordict  # as in `entries`
                if tuple(inner) != keys or node._batch_size != meta:
                    return None
                held.append(inner)
            else:
                found, children, context = _children(node) or ((), [], None)
                if found != keys or context != meta:
                    return None
                held.append(dict(zip(keys, children, strict=True)))
        owners = builtins.map(held.__getitem__, self._owners)
        leaves = list(builtins.map(operator.getitem, owners, self._names))
        if not _TENSOR.issuperset(builtins.map(type, leaves)) and any(
            _children(leaf) is not None for leaf in leaves
        ):
            return None
        return leaves

    def unflatten(self, leaves: list[Any]) -> Any:
        """The tree of this structure that holds these leaves, as many as it has places."""
        build = _builder(leaves)
        held = list(builtins.map(dict.copy, self._empty))
        for owner, name, leaf in zip(self._owners, self._names, leaves, strict=True):
            held[owner][name] = leaf
        for (parent, name, kind, meta, keys), inner in zip(
            reversed(self._nodes), reversed(held), strict=False
        ):
            held[parent][name] = (
                build(inner, meta)
                if kind is TensorDict
                else _build(kind, meta, keys, list(inner.values()))
            )
        return held[0][0]

    def _add(self, structure: Structure | None, parent: int, name: Any) -> None:
        if structure is None:
            self._owners.append(parent)
            self._names.append(name)
            return
        self._nodes.append((parent, name, *structure[:3]))
        self._empty.append(dict.fromkeys(structure.keys))
        place = len(self._nodes)
        for key, child in zip(structure.keys, structure.children, strict=True):
            self._add(child, place, key)


def leaves(tree: Any) -> list[Any]:
    """The leaves of a tree, from left to right."""
    found: list[Any] = []
    _collect(tree, found)
    return found


def leaves_like(tree: Any, other: Any) -> list[Any]:
    """The leaves of a tree in the order of those of another, which has the same names.

    Raises:
        ValueError: where the names or the kinds of containers differ; it names the place.

    >>> leaves_like({"a": 1, "b": (2, 3)}, {"b": (0, 0), "a": 0})
    [2, 3, 1]
    """
    found: list[Any] = []
    if not _collect_like(tree, other, found):  # the names may still be the same, in another order
        found = []
        _map(lambda _path, _leaf, leaf: found.append(leaf), (), other, (tree,))
    return found


def leaves_with_path(tree: Any) -> list[tuple[Path, Any]]:
    """The leaves of a tree, each with the names that lead to it.

    >>> leaves_with_path({"a": 1, "b": (2, 3)})
    [(('a',), 1), (('b', '0'), 2), (('b', '1'), 3)]
    """
    found: list[tuple[Path, Any]] = []
    map_with_path(lambda path, leaf: found.append((path, leaf)), tree)
    return found


def map(f: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """The tree of ``f(leaf, *leaves at the same place in rest)``, shaped as the first tree.

    Raises:
        ValueError: where a tree in ``rest`` has another structure; it names the place.

    >>> map(lambda a, b: a + b, {"x": 1, "y": 2}, {"y": 20, "x": 10})
    {'x': 11, 'y': 22}
    """
    if not rest:
        return unflatten_like(tree, [f(leaf) for leaf in leaves(tree)])
    columns = [leaves(tree), *(leaves_like(other, tree) for other in rest)]
    return unflatten_like(tree, [f(*row) for row in zip(*columns, strict=True)])


def map_with_path(f: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """As `map`, with ``f(path, leaf, *leaves)``; a path is a tuple of names.

    >>> map_with_path(lambda path, leaf: ".".join(path), {"conv": {"weight": 0}})
    {'conv': {'weight': 'conv.weight'}}
    """
    return _map(f, (), tree, rest)


def join(path: Path) -> str:
    """A path as state_dict writes it: ``layer1.0.conv1.weight``; the tree itself is ``(root)``."""
    return ".".join(path) or "(root)"


def describe(leaf: Any) -> str:
    """A leaf in an error message: ``float32[3, 4]`` for a tensor, its type's name otherwise."""
    if isinstance(leaf, torch.Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
    return type(leaf).__name__


def entries(tree: Any, path: Path = ()) -> dict[str, Any] | None:
    """What a TensorDict or dict holds by name, to be read only; None for a leaf.

    Raises:
        TypeError: for another container: parameter trees are nested by name alone.
    """
    kind = type(tree)
    if kind is TensorDict:
        return tree._tensordict  # items() of the public interface takes sixty times as long
    if kind is torch.Tensor:
        return None
    if isinstance(tree, dict):
        return tree
    if isinstance(tree, TensorDictBase):
        return dict(tree.items())
    if _children(tree) is not None:
        raise TypeError(f"{join(path)}: expected a TensorDict, got {describe(tree)}")
    return None


def _flatten(tree: Any, leaves: list[Any]) -> Structure | None:
    kind = type(tree)
    if kind is torch.Tensor:
        leaves.append(tree)
        return None
    if kind is TensorDict:
        held = tree._tensordict  # as in `entries`
        places: list[Structure | None] = []
        for child in held.values():
            if type(child) is torch.Tensor:
                leaves.append(child)
                places.append(None)
            else:
                places.append(_flatten(child, leaves))
        return Structure(kind, tree._batch_size, tuple(held), tuple(places))
    node = _children(tree)
    if node is None:
        leaves.append(tree)
        return None
    keys, children, meta = node
    return Structure(kind, meta, keys, tuple([_flatten(child, leaves) for child in children]))


def _collect(tree: Any, leaves: list[Any]) -> None:
    """As `_flatten`, in a third of the time, without the structure."""
    kind = type(tree)
    if kind is TensorDict:
        children = tree._tensordict.values()  # as in `entries`
    elif kind is torch.Tensor or (node := _children(tree)) is None:
        leaves.append(tree)
        return
    else:
        children = node[1]
    for child in children:
        if type(child) is torch.Tensor:
            leaves.append(child)
        else:
            _collect(child, leaves)


def _collect_like(tree: Any, other: Any, leaves: list[Any]) -> bool:
    """As `_collect`, up to where the tree is not built as the other is; whether it is."""
    kind = type(other)
    if kind is TensorDict:
        if type(tree) is not TensorDict:
            return False
        held, expected = tree._tensordict, other._tensordict  # as in `entries`
        if list(held) != list(expected):
            return False
        pairs = zip(held.values(), expected.values())  # noqa: B905
    elif kind is torch.Tensor or (node := _children(other)) is None:
        if type(tree) is not torch.Tensor and _children(tree) is not None:
            return False
        leaves.append(tree)
        return True
    else:
        found = _children(tree)
        if type(tree) is not kind or found is None or (found[0], found[2]) != (node[0], node[2]):
            return False
        pairs = zip(found[1], node[1])  # noqa: B905
    for child, place in pairs:
        if type(child) is torch.Tensor and type(place) is torch.Tensor:
            leaves.append(child)
        elif not _collect_like(child, place, leaves):
            return False
    return True


def _spend(name: str, leaves: list[Any], fill: Callable[..., Any]) -> Any:
    """What ``fill(iterator, build)`` makes of the leaves, all of which it has to take."""
    rest = iter(leaves)
    try:
        tree = fill(rest, _builder(leaves))
    except StopIteration:
        raise ValueError(f"{name}: fewer leaves than there are places") from None
    if (extra := sum(1 for _ in rest)) > 0:
        raise ValueError(f"{name}: {extra} more leaves than there are places")
    return tree


def _unflatten(
    structure: Structure, leaves: Iterator[Any], build: Callable[[dict[str, Any], torch.Size], Any]
) -> Any:
    # Raises StopIteration where the leaves run out.
    kind, meta, keys, places = structure
    if kind is TensorDict:
        named = {}
        for key, place in zip(keys, places):  # noqa: B905
            named[key] = next(leaves) if place is None else _unflatten(place, leaves, build)
        return build(named, meta)
    children = [
        next(leaves) if place is None else _unflatten(place, leaves, build) for place in places
    ]
    return _build(kind, meta, keys, children)


def _refill(
    tree: Any, leaves: Iterator[Any], build: Callable[[dict[str, Any], torch.Size], Any]
) -> Any:
    """As `_unflatten`, of a tree in place of its structure."""
    kind = type(tree)
    if kind is TensorDict:
        named = {}
        for key, child in tree._tensordict.items():  # as in `entries`
            leaf = type(child) is torch.Tensor
            named[key] = next(leaves) if leaf else _refill(child, leaves, build)
        return build(named, tree._batch_size)
    if kind is torch.Tensor or (node := _children(tree)) is None:
        return next(leaves)
    keys, children, meta = node
    return _build(kind, meta, keys, [_refill(child, leaves, build) for child in children])


def _children(tree: Any) -> tuple[tuple[Any, ...], list[Any], Any] | None:
    """The names, children and remaining data of an inner node, or None for a leaf."""
    if tree is None:
        return (), [], None
    if isinstance(tree, TensorDictBase):
        return tuple(tree.keys()), list(tree.values()), tree.batch_size
    if type(tree) in (dict, OrderedDict):
        return tuple(tree), list(tree.values()), None
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return tree._fields, list(tree), None
    if type(tree) in (tuple, list):
        return tuple(range(len(tree))), list(tree), None
    if (node := SUPPORTED_NODES.get(type(tree))) is not None:
        children, context = node.flatten_fn(tree)
        return tuple(range(len(children))), list(children), _Context(context)
    return None


def _build(kind: Any, meta: Any, keys: tuple[Any, ...], children: list[Any]) -> Any:
    if kind is TensorDict or (isinstance(kind, type) and issubclass(kind, TensorDictBase)):
        return _tensordict(dict(zip(keys, children, strict=True)), meta)
    if kind is type(None):
        return None
    if kind in (dict, OrderedDict):
        return kind(zip(keys, children, strict=True))
    if kind in (tuple, list):
        return kind(children)
    if isinstance(meta, _Context):
        return SUPPORTED_NODES[kind].unflatten_fn(children, meta.value)
    return kind(*children)  # a named tuple


def _builder(leaves: list[Any]) -> Callable[[dict[str, Any], torch.Size], Any]:
    """What makes the TensorDicts of a tree with these leaves."""
    if not _TENSOR.issuperset(builtins.map(type, leaves)):
        return _tensordict
    return tensordict if torch.compiler.is_compiling() else _made


def _tensordict(named: dict[str, Any], size: torch.Size) -> Any:
    """A TensorDict; a plain dict where there are leaves that are no tensors (names, say)."""
    if all(isinstance(child, _TENSORS) for child in named.values()):
        return tensordict(named, size)
    return named


def tensordict(named: dict[str, Any], size: torch.Size = _NO_BATCH) -> TensorDict:
    """A TensorDict of tensors and TensorDicts, made without a look at them: fifty times as fast.

    Its batch size is the one given where all that it holds has it, and else none.
    """
    if torch.compiler.is_compiling():  # Dynamo knows the public ways alone
        return TensorDict._new_unsafe(named, batch_size=_common_size(named, size), nested=False)
    return _made(dict(named), size)


def _made(named: dict[str, Any], size: torch.Size) -> TensorDict:
    size = _common_size(named, size) if size else size
    made = TensorDict.__new__(TensorDict)
    made._device = None
    made._tensordict = named if _Held is dict else _Held(named)
    made._batch_size = size
    made._td_dim_names = None
    return made


def _common_size(named: dict[str, Any], size: torch.Size) -> torch.Size:
    for child in named.values():
        shape = child.shape[: len(size)]
        # One that is not known (while something is compiled) is not to be compared.
        if torch.SymInt in builtins.map(type, shape) or shape != size:
            return _NO_BATCH
    return size


def _map(f: Callable[..., Any], path: Path, tree: Any, rest: tuple[Any, ...]) -> Any:
    node = _children(tree)
    if node is None:
        for other in rest:
            if _children(other) is not None:
                raise ValueError(f"{join(path)}: expected a leaf, got {describe(other)}")
        return f(path, tree, *rest)
    keys, children, meta = node
    others = [_matching(path, tree, keys, other) for other in rest]
    mapped = [
        _map(f, (*path, str(key)), child, tuple(other[i] for other in others))
        for i, (key, child) in enumerate(zip(keys, children, strict=True))
    ]
    return _build(type(tree), meta, keys, mapped)


def _matching(path: Path, tree: Any, keys: tuple[Any, ...], other: Any) -> list[Any]:
    """The children of ``other`` in the order of ``keys``."""
    node = _children(other)
    if node is None or isinstance(other, (dict, TensorDictBase)) != isinstance(
        tree, (dict, TensorDictBase)
    ):
        raise ValueError(f"{join(path)}: expected {describe(tree)}, got {describe(other)}")
    found = dict(zip(node[0], node[1], strict=True))
    if found.keys() != set(keys):
        missing = ", ".join(str(key) for key in keys if key not in found) or "nothing"
        extra = ", ".join(str(key) for key in found if key not in keys) or "nothing"
        raise ValueError(
            f"{join(path)}: expected the same names in both trees; "
            f"missing {missing}, unexpected {extra}"
        )
    return [found[key] for key in keys]


class _Context:
    """A pytree context, which need not be hashable, as part of a hashable structure."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Context) and bool(self.value == other.value)

    def __hash__(self) -> int:
        try:
            return hash(self.value)
        except TypeError:
            return hash(type(self.value))

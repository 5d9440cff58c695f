"""Parameters in files, with what it takes to make their model again.

A file is in the safetensors format: names, shapes and bytes, and nothing that is run. Its header
holds the leaves by their dotted names and one JSON record of ours: the version of the format, the
order of the names, the batch sizes of an ensemble, the family and configuration of the model, and
whatever the user adds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import pkgutil
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import safetensors
import safetensors.torch
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from funcnets import models, tree
from funcnets.model import Model, bind, check_parameters, parameter_specs, specs_of
from funcnets.tree.convert import nest
from funcnets.tree.flatten import Path, entries

VERSION = 1

_RECORD = "funcnets"
_MODEL = "funcnets.model"


def save(
    path: str | os.PathLike[str],
    params: Any,
    model: Model | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes parameters to a file, atomically: at any moment it is the old one or the new one.

    Args:
        path: of the file; an earlier one is replaced.
        params: a parameter tree (nested TensorDicts or dicts), which may be an ensemble.
        model: its model, whose family and configuration are kept so that `load` can make it again.
        metadata: anything that JSON can say, to be read with `read_metadata`.

    Raises:
        ValueError: where ``params`` are not the model's, or a name contains a dot.
        TypeError: for a leaf that is no dense tensor, or whose dtype safetensors does not know, or
            what JSON cannot say. After any error, an earlier file is as it was.

    >>> import tempfile
    >>> file = os.path.join(tempfile.mkdtemp(), "params.safetensors")
    >>> save(file, TensorDict({"w": torch.ones(2)}), metadata={"epoch": 3})
    >>> load(file)[1]["w"], read_metadata(file)
    (tensor([1., 1.]), {'epoch': 3})
    """
    if entries(params) is None:
        raise TypeError(f"params: expected a TensorDict, got {tree.describe(params)}")
    tensors: dict[str, Tensor] = {}
    for place, leaf in tree.leaves_with_path(params):
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{tree.join(place)}: expected a tensor, got {tree.describe(leaf)}")
        if leaf.is_meta or leaf.layout != torch.strided:
            kind = "one on the meta device" if leaf.is_meta else f"a layout {leaf.layout}"
            raise TypeError(f"{tree.join(place)}: expected a dense tensor with values, got {kind}")
        if any("." in name for name in place) or place[0] == "__metadata__":
            raise ValueError(f"{place}: expected names without dots, and not __metadata__")
        # A copy of its own, for safetensors refuses memory shared between leaves.
        tensors[".".join(place)] = leaf.detach().cpu().clone(memory_format=torch.contiguous_format)
    if model is not None:
        _check_model(params, model)
    record = {
        "version": VERSION,
        "names": list(tensors),
        "batch_sizes": _batch_sizes(params, (), ()),
        "family": model.family if model is not None else None,
        "config": _encode(model.config) if model is not None and model.family else None,
        "metadata": dict(metadata or {}),
    }
    _write(os.path.realpath(path), tensors, json.dumps(record))


def load(
    path: str | os.PathLike[str],
    model: Model | None = None,
    device: torch.device | str | None = None,
) -> tuple[Model | None, Any]:
    """Reads what `save` wrote: ``(model, params)``.

    The tensors are in memory of their own; the file may be changed or removed afterwards.

    Args:
        path: of the file.
        model: the model that the parameters are for, needed only for a model of one's own (for
            which the file has no family). It is returned as it is.
        device: where the tensors go, by default the CPU.

    Returns:
        The model made again from its family and configuration (None where the file has none and
        none is given), and the parameters as a TensorDict.

    Raises:
        FileNotFoundError: where there is no file.
        ValueError: naming the file, where it is cut short, not of this library, or of another
            model. Nothing is returned then.
    """
    with _naming(path):
        params, record = _read(path)
        if model is None and record["family"] is not None:
            model = _make(record)
        elif model is not None and model.family is not None and record["family"] is not None:
            _check_same(model, record)
        if model is not None:
            _check_model(params, model)
    return model, params if device is None else tree.cast(params, device=device)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata that `save` was given; raises as `load` does."""
    with _naming(path):
        return _read(path)[1]["metadata"]


@contextlib.contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns whatever an unsound file leads to into a ValueError that names the file."""
    try:
        yield
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error


def _write(path: str, tensors: dict[str, Tensor], record: str) -> None:
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.tmp")
    try:
        try:
            safetensors.torch.save_file(tensors, temporary, {"format": "pt", _RECORD: record})
        except KeyError as error:  # how safetensors says that it has no such dtype
            odd = next((n for n, leaf in tensors.items() if leaf.dtype == error.args[0]), "?")
            raise TypeError(f"{odd}: safetensors cannot hold {error.args[0]}") from None
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def _read(path: str | os.PathLike[str]) -> tuple[TensorDict, dict[str, Any]]:
    """The tree and our record."""
    with open(path, "rb") as file:
        data = file.read()
    try:
        tensors = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise ValueError(f"expected a whole safetensors file, got: {error}") from error
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    held = header.get("__metadata__") or {}
    if _RECORD not in held:
        raise ValueError("expected a file written by funcnets.save, got another safetensors file")
    record = json.loads(held[_RECORD])
    version = record.get("version") if isinstance(record, dict) else None
    if version != VERSION:
        raise ValueError(f"expected format version {VERSION}, got {version}")
    wanted: dict[str, Any] = {
        "names": list,
        "batch_sizes": list,
        "family": (str, type(None)),
        "config": (dict, type(None)),
        "metadata": dict,
    }
    for name, kind in wanted.items():
        if name not in record or not isinstance(record[name], kind):
            raise ValueError(f"{name}: missing or of a wrong type in the header")
    names = record["names"]
    if not all(isinstance(name, str) for name in names) or sorted(names) != sorted(tensors):
        raise ValueError("expected the names that the header lists, got others")
    sizes = {tuple(place): torch.Size(size) for place, size in record["batch_sizes"]}
    nested = nest({name: tensors[name] for name in names})
    return _sized(nested, (), sizes, torch.Size([])), record


def _batch_sizes(node: Any, path: Path, above: tuple[int, ...]) -> list[Any]:
    """``[path, batch size]`` of every TensorDict whose batch size is not that of the one above."""
    held = entries(node)
    if held is None:
        return []
    size = tuple(node.batch_size) if isinstance(node, TensorDictBase) else ()
    found = [[list(path), list(size)]] if size != above else []
    return found + [
        one for name, child in held.items() for one in _batch_sizes(child, (*path, name), size)
    ]


def _sized(
    node: dict[str, Any], path: Path, sizes: dict[Path, torch.Size], above: torch.Size
) -> TensorDict:
    size = sizes.get(path, above)
    children = {
        name: _sized(child, (*path, name), sizes, size) if isinstance(child, dict) else child
        for name, child in node.items()
    }
    for name, child in children.items():
        if child.shape[: len(size)] != size:
            raise ValueError(
                f"{tree.join((*path, name))}: expected a batch of {list(size)}, "
                f"got shape {list(child.shape)}"
            )
    return TensorDict(children, batch_size=size)


def _make(record: dict[str, Any]) -> Model:
    return _make_model(record["family"], record["config"] or {})


def _make_model(family: str, config: dict[str, Any]) -> Model:
    known = [module.name for module in pkgutil.iter_modules(models.__path__)]
    if family not in known:
        raise ValueError(
            f"family: expected one of {', '.join(known)}, got {family}; "
            "for a model of your own, use load(path, model=model)"
        )
    module = importlib.import_module(f"{models.__name__}.{family}")
    try:
        made = module.Config(**_decode(config))
        model = bind(family, made, module.init, module.forward)
        parameter_specs(model.init)
    except Exception as error:
        raise ValueError(
            f"config: expected one of {module.__name__}.Config, got {config}: {error}"
        ) from error
    return model


def _check_same(model: Model, record: dict[str, Any]) -> None:
    expected = model.family, _encode(model.config)
    if (got := (record["family"], record["config"])) != expected:
        raise ValueError(
            f"expected parameters of {expected[0]} with {expected[1]}, got {got[0]} with {got[1]}"
        )


def _check_model(params: Any, model: Model) -> None:
    """Compares names and shapes, those of one member for an ensemble."""
    expected = specs_of(model.init)
    axes = len(params.batch_size) if isinstance(params, TensorDictBase) else 0
    member = tree.map(lambda leaf: tree.Spec(leaf.shape[axes:], leaf.dtype), params)
    check_parameters(member, expected)


def _encode(config: Any) -> dict[str, Any]:
    """The fields of a configuration, as JSON gives them back."""
    if not dataclasses.is_dataclass(config):
        raise TypeError(f"config: expected a dataclass, got {type(config).__name__}")
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    encoded = json.loads(json.dumps(fields, default=_encode_model))
    if (again := _decode(encoded)) != fields:
        raise TypeError(f"config: expected numbers, strings and tuples, got {fields}, not {again}")
    return encoded


def _encode_model(value: Any) -> dict[str, Any]:
    """A model within a configuration, as an encoder of one that has several."""
    if not isinstance(value, Model):
        raise TypeError(f"config: expected what JSON can say, got {type(value).__name__}")
    if value.family is None:
        raise TypeError(
            "config: expected models of funcnets.models, got one of your own: save the parameters "
            "without a model, and load them with load(path, model=model)"
        )
    return {_MODEL: value.family, "config": _encode(value.config)}


def _decode(value: Any) -> Any:
    """With tuples for the lists that JSON has made of them, and models for their descriptions."""
    if isinstance(value, list):
        return tuple(_decode(item) for item in value)
    if isinstance(value, dict):
        if value.keys() == {_MODEL, "config"}:
            return _make_model(value[_MODEL], value["config"])
        return {name: _decode(item) for name, item in value.items()}
    return value

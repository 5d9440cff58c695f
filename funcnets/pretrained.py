"""Parameters from networks of torchvision: modules, state_dicts, their files, their downloads."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable, Mapping
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from funcnets import random, tree
from funcnets.tree.report import Differences
from funcnets.tree.select import Where

# The names in torchvision's oldest files, written when names could hold dots (as in its densenet).
_OLD_NAME = re.compile(r"(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..*)")


def from_torchvision(
    init: Callable[[random.Key], Any],
    specs: Any,
    weights: Any,
    key: random.Key | None,
    fresh: Where,
) -> Any:
    """See `funcnets.Model.from_torchvision`.

    Args:
        init: of the model that the parameters are for.
        specs: the shapes of its parameters.
    """
    # What the weights hold at the fresh places has no say, whatever its names and shapes.
    source = tree.partition(tree.from_state_dict(_state_dict(weights)), fresh)[1]
    anew, kept = tree.partition(specs, fresh)
    if fresh != () and not tree.leaves(anew):
        raise ValueError(f"from_torchvision: fresh: {fresh!r}: expected leaves, matched none")
    if report := tree.compare(source, kept):
        raise ValueError(_explain(report))
    if not tree.leaves(anew):
        return source
    if key is None:
        raise ValueError("from_torchvision: key: expected a key for what is drawn anew, got None")
    drawn = tree.partition(init(key), fresh)[0]
    dtypes = {leaf.dtype for leaf in tree.leaves(source) if leaf.is_floating_point()}
    return tree.merge(source, tree.cast(drawn, dtypes.pop()) if len(dtypes) == 1 else drawn)


def _explain(report: Differences) -> str:
    advice = ""
    if report.mismatched and not report.missing and not report.unexpected:
        places = sorted({name.rpartition(".")[0] for name in report.mismatched})
        advice = f"\nto draw these anew, pass a key and fresh={places}"
    return f"{report}{advice}"


def _state_dict(weights: Any) -> Mapping[str, Any]:
    if isinstance(weights, nn.Module):
        return weights.state_dict(keep_vars=True)
    if isinstance(weights, (str, os.PathLike)):
        weights = _read(os.fspath(weights))
    elif hasattr(weights, "get_state_dict"):
        weights = weights.get_state_dict(progress=True, check_hash=True)
    if not isinstance(weights, Mapping):
        raise TypeError(
            "from_torchvision: weights: expected a module, a state_dict, a path or a member of a "
            f"weights enum, got {type(weights).__name__}"
        )
    return {_OLD_NAME.sub(r"\1\2", name): tensor for name, tensor in weights.items()}


def _read(path: str) -> Any:
    try:
        if path.endswith(".safetensors"):
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path}: expected the file of a state_dict, got: {error}") from error

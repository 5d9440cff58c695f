"""A wrong shape is told before any arithmetic, with its place."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from funcnets import tree
from funcnets.testing.engine import Try, invariant
from funcnets.testing.subject import Subject, Violation


def _unchecked(subject: Subject) -> str | None:
    if subject.checks_shapes:
        return None
    return "the model does not say that it checks shapes (checks_shapes=True)"


@invariant(when=_unchecked, examples=1)
def tells_a_wrong_parameter(trial: Try) -> None:
    """A parameter of a wrong shape, missing or too many is told by name, before any arithmetic."""
    subject, (params, inputs, key) = trial.subject, trial.parts
    for i, (path, leaf) in enumerate(tree.leaves_with_path(params), trial.sample.seed):
        # Not the shape that an ensemble would have.
        more = (leaf.shape[-1] + 1,) if leaf.ndim else (2, 2)
        wrong: dict[str, Tensor | None] = {
            "too many axes": torch.ones((*leaf.shape, *more), dtype=leaf.dtype),
            "missing": None,
        }
        if leaf.ndim:
            sizes = (*leaf.shape[:-1], leaf.shape[-1] + 1)
            wrong["one more at its end"] = torch.ones(sizes, dtype=leaf.dtype)
        what, other = list(wrong.items())[i % len(wrong)]  # with another seed, another one
        _refused(subject, _with(params, path, other), inputs, key, tree.join(path), what)
    extra = _with(params, ("unknown_part",), torch.ones(2))
    _refused(subject, extra, inputs, key, "unknown_part", "too many")


@invariant(when=_unchecked, examples=1)
def tells_a_wrong_input(trial: Try) -> None:
    """An input whose fixed axis has another size is told before any arithmetic."""
    subject, (params, inputs, key) = trial.subject, trial.parts
    declared = dict(tree.leaves_with_path(subject.inputs))
    for path, x in tree.leaves_with_path(inputs):
        for axis, size in enumerate(declared[path].axes):
            if isinstance(size, int) and x.is_floating_point():
                shape = [*x.shape]
                shape[axis] += 1
                wrong = torch.ones(shape, dtype=x.dtype)
                changed = tree.map_with_path(
                    lambda p, leaf, path=path, wrong=wrong: wrong if p == path else leaf, inputs
                )
                _refused(
                    subject, params, changed, key, "", f"axis {axis} of input {tree.join(path)}"
                )


class _NoArithmetic(TorchDispatchMode):
    """Within it no operator may run, but for those that split keys and make empty tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "funcnets" or func.__name__.split(".")[0] in _HARMLESS:
            return func(*args, **(kwargs or {}))
        raise _Ran(str(func))


_HARMLESS = {"new_zeros", "new_empty", "zeros", "empty", "unbind", "select", "detach"}


class _Ran(BaseException):
    """An operator ran."""


def _refused(subject: Subject, params: Any, inputs: Any, key: Any, name: str, what: str) -> None:
    place = name or "inputs"
    for mode, call in (("inference", subject.infer), ("training", subject.train)):
        try:
            with _NoArithmetic():
                call(params, inputs, key)
        except (ValueError, TypeError, KeyError) as error:
            if name not in str(error):
                raise Violation(place, f"an error that names {name}", str(error), what) from error
        except _Ran as ran:
            raise Violation(place, "an error before any arithmetic", f"{ran} ran", what) from None
        except Exception as error:
            kind = type(error).__name__
            raise Violation(place, "a ValueError", f"{kind}: {error}", f"{what}, {mode}") from error
        else:
            raise Violation(place, "an error", "a result", f"{what}, {mode}")


def _with(params: Any, path: tuple[str, ...], leaf: Tensor | None) -> Any:
    """The tree with another leaf at a path, or without it."""
    changed = params.clone() if hasattr(params, "batch_size") else copy.deepcopy(params)
    held = changed
    for name in path[:-1]:
        held = held[name]
    if leaf is None:
        del held[path[-1]]
    else:
        held[path[-1]] = leaf
    return changed

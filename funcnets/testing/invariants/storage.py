"""Parameters go through a file and through a state_dict and are the same."""

from __future__ import annotations

import os
import tempfile

from funcnets import tree
from funcnets.model import Model
from funcnets.serialization import load, save
from funcnets.testing.engine import Try, compare, invariant
from funcnets.testing.subject import Subject


def _no_tree(subject: Subject) -> str | None:
    if tree.entries(subject.sample().params) is not None:
        return None
    return "the parameters are no TensorDict or dict"


@invariant(when=_no_tree, examples=2)
def a_file_changes_nothing(trial: Try) -> None:
    """Saved and loaded, the parameters and what the model computes are the same, bit for bit."""
    subject, (params, inputs, key) = trial.subject, trial.parts
    model = subject.model if isinstance(subject.model, Model) and subject.model.family else None
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "params.safetensors")
        save(file, params, model)
        again, loaded = load(file)
    compare(loaded, params, 0.0, "loaded")
    compare(subject.infer(loaded, inputs, key), subject.infer(params, inputs, key), 0.0, "outputs")
    if model is not None and again is not None:
        compare(again.apply(loaded, *inputs), model.apply(params, *inputs), 0.0, "the model loaded")


@invariant(when=_no_tree, examples=2)
def a_state_dict_changes_nothing(trial: Try) -> None:
    """Written as a state_dict and read again, parameters and outputs are the same."""
    subject, (params, inputs, key) = trial.subject, trial.parts
    again = tree.from_state_dict(tree.to_state_dict(params))
    compare(again, params, 0.0, "read from a state_dict")
    compare(subject.infer(again, inputs, key), subject.infer(params, inputs, key), 0.0, "outputs")

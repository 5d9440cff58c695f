"""Property tests for anyone's functional model: ``check_model(model, inputs)``.

Needs Hypothesis. `check_model` tries every invariant that applies and reports; `model_properties`
makes a pytest test of each; an invariant alone is a function of a model and its inputs.
"""

from funcnets.testing.check import Report, Result, check_model, model_properties, properties, sample
from funcnets.testing.declared import booleans, floats, integers, lengths
from funcnets.testing.engine import Invariant
from funcnets.testing.invariants import *  # noqa: F403
from funcnets.testing.invariants import INVARIANTS
from funcnets.testing.invariants.symmetry import (
    Symmetry,
    causal,
    equivariant,
    padding,
    permutation,
    rotation,
    translation,
)
from funcnets.testing.subject import Sample, Subject

from funcnets.testing import strategies  # isort: skip - last, for the engine tells what is missing

__all__ = [
    "INVARIANTS",
    "Invariant",
    "Report",
    "Result",
    "Sample",
    "Subject",
    "Symmetry",
    "booleans",
    "causal",
    "check_model",
    "equivariant",
    "floats",
    "integers",
    "lengths",
    "model_properties",
    "padding",
    "permutation",
    "properties",
    "rotation",
    "sample",
    "strategies",
    "translation",
    *(invariant.name for invariant in INVARIANTS),
]

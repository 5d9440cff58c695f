"""Training: one pure step, and a loop around it that survives being killed.

    step = training.make_step(model, F.cross_entropy, optim.adamw(1e-3))
    state = step.init(model.init(key), key)
    state, history = training.fit(step, state, training.minibatches((x, y), 64), epochs=10)
    params = training.parameters(state)

``vmap(step.init)`` and ``vmap(step)`` are an ensemble, ``funcnets.compile(step, donate="state")``
is one graph, and `fit` takes any of them.
"""

from funcnets.training.averages import Average, AverageState, ema, swa
from funcnets.training.batches import Batches, Epoch, Turn, minibatches, turns
from funcnets.training.checkpoint import Checkpoints, load_checkpoint, save_checkpoint
from funcnets.training.early_stopping import EarlyStopping, StoppingState
from funcnets.training.evaluate import evaluate
from funcnets.training.fit import fit
from funcnets.training.log import JsonLines, TensorBoard, draw_curves
from funcnets.training.nonfinite import NonFinite, NonFiniteError, first_nonfinite, place_name
from funcnets.training.precision import Precision, ScaleState, bfloat16, float16
from funcnets.training.scores import (
    PrecisionRecall,
    accuracy,
    calibration_error,
    confusion_matrix,
    mse,
    nll,
    precision_recall,
)
from funcnets.training.state import State, order_key, parameters, step_key
from funcnets.training.step import Step, make_step

__all__ = [
    "Average",
    "AverageState",
    "Batches",
    "Checkpoints",
    "EarlyStopping",
    "Epoch",
    "JsonLines",
    "NonFinite",
    "NonFiniteError",
    "Precision",
    "PrecisionRecall",
    "ScaleState",
    "State",
    "Step",
    "StoppingState",
    "TensorBoard",
    "Turn",
    "accuracy",
    "bfloat16",
    "calibration_error",
    "confusion_matrix",
    "draw_curves",
    "ema",
    "evaluate",
    "first_nonfinite",
    "fit",
    "float16",
    "load_checkpoint",
    "make_step",
    "minibatches",
    "mse",
    "nll",
    "order_key",
    "parameters",
    "place_name",
    "precision_recall",
    "save_checkpoint",
    "step_key",
    "swa",
    "turns",
]

"""Optimizers: pairs of pure functions ``(init, update)`` that chain.

    optimizer = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-3))
    state = optimizer.init(params)
    ...
    updates, state = optimizer.update(grads, state, params)
    params = optim.apply_updates(params, updates)

A learning rate is a number, a tensor of shape [] (one per member, under vmap) or a schedule.
"""

from funcnets.optim import schedules
from funcnets.optim.accumulate import AccumulateState, accumulate
from funcnets.optim.adafactor import AdafactorState, adafactor
from funcnets.optim.adagrad import AdagradState, adagrad
from funcnets.optim.adam import AdamState, adam, adamw
from funcnets.optim.adam_variants import NadamState, nadam, radam
from funcnets.optim.base import ChainState, Optimizer, apply_updates, chain
from funcnets.optim.clip import ClipState, clip_by_global_norm, clip_by_value, global_norm
from funcnets.optim.decay import DecayState, decoupled_weight_decay
from funcnets.optim.lion import LionState, lion
from funcnets.optim.muon import MuonState, muon
from funcnets.optim.paths import ByPathState, ScaleByPathState, by_path, scale_by_path
from funcnets.optim.plateau import PlateauState, reduce_on_plateau
from funcnets.optim.rmsprop import RmspropState, rmsprop
from funcnets.optim.sgd import SgdState, sgd

__all__ = [
    "AccumulateState",
    "AdafactorState",
    "AdagradState",
    "AdamState",
    "ByPathState",
    "ChainState",
    "ClipState",
    "DecayState",
    "LionState",
    "MuonState",
    "NadamState",
    "Optimizer",
    "PlateauState",
    "RmspropState",
    "ScaleByPathState",
    "SgdState",
    "accumulate",
    "adafactor",
    "adagrad",
    "adam",
    "adamw",
    "apply_updates",
    "by_path",
    "chain",
    "clip_by_global_norm",
    "clip_by_value",
    "decoupled_weight_decay",
    "global_norm",
    "lion",
    "muon",
    "nadam",
    "radam",
    "reduce_on_plateau",
    "rmsprop",
    "scale_by_path",
    "schedules",
    "sgd",
]

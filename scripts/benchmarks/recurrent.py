"""A training step of a GRU over a long series."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from benchmarks import machine, networks
from benchmarks.elsewhere import elsewhere
from benchmarks.race import Case, races
from funcnets import models, random


def gru(quick: bool) -> Case:
    """Hidden 32, 32 series of 7 numbers at 96 times."""
    batch, time = (4, 12) if quick else (32, 96)
    model = models.recurrent(7, 1, hidden_size=32)
    params = model.init(random.key(0))
    x = machine.place(random.normal(random.key(1), (batch, time, 7)))
    y = machine.place(random.normal(random.key(2), (batch, 1)))
    start, step = networks.pure_step(model, F.mse_loss)

    def fresh() -> Any:
        return networks.copied(params)

    def build() -> networks.GRU:
        return networks.GRU(7, 32)

    return Case(
        networks.named(params),
        {
            "funcnets, eager": lambda: networks.pure(step, start(fresh()), x, y),
            "funcnets, compiled": lambda: networks.donated(step, start(fresh()), x, y),
            "nn.GRU, eager": lambda: networks.module(build(), F.mse_loss, params, x, y),
            "nn.GRU, compiled": lambda: networks.module(
                build(), F.mse_loss, params, x, y, mode="default"
            ),
            "Equinox, jit": lambda: elsewhere("gru", params, x, y),
        },
        networks.count(params),
        against="nn.GRU",  # to which the target is; Equinox stands beside it
    )


WORKLOADS = races({"GRU step, hidden 32, length 96": ({"": 0.5}, gru)})

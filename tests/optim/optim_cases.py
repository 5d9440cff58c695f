"""The optimizers of the tests, with their counterparts in torch.optim and their hyperparameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st

from funcnets import optim

SHAPES = {"scalar": (), "bias": (3,), "weight": (4, 2), "kernel": (2, 3, 2, 1), "wide": (2, 5)}
MATRICES = {"tall": (5, 2), "wide": (2, 5), "square": (3, 3)}


def numbers(low, high):
    return st.floats(low, high, allow_subnormal=False)


RATE = numbers(1e-5, 0.3)
DECAY = st.just(0.0) | numbers(0.0, 0.3)
BETA = numbers(0.0, 0.9999)
BETAS = st.tuples(BETA, BETA)
EPS = st.sampled_from([1e-8, 1e-3])


class Case(NamedTuple):
    """``make(**options)`` is ours, ``torch(params, **options)`` the reference."""

    make: Callable[..., optim.Optimizer]
    torch: Callable[..., torch.optim.Optimizer]
    options: dict[str, st.SearchStrategy]
    names: dict[str, str]
    """From our names of options to torch's, where they differ."""
    shapes: dict[str, tuple[int, ...]] = SHAPES


def case(make, reference, shapes=SHAPES, names=None, **options):
    options = {"learning_rate": RATE, "weight_decay": DECAY, **options}
    return Case(make, reference, options, {"learning_rate": "lr", **(names or {})}, shapes)


CASES = {
    "sgd": case(
        optim.sgd,
        torch.optim.SGD,
        momentum=st.just(0.0) | numbers(0.1, 0.99),
        dampening=st.just(0.0) | numbers(0.0, 1.0),
    ),
    "nesterov": case(
        optim.sgd, torch.optim.SGD, momentum=numbers(0.1, 0.99), nesterov=st.just(True)
    ),
    "adagrad": case(
        optim.adagrad,
        torch.optim.Adagrad,
        names={"learning_rate_decay": "lr_decay"},
        learning_rate_decay=DECAY,
        initial_accumulator_value=DECAY,
        eps=st.sampled_from([1e-10, 1e-3]),
    ),
    "rmsprop": case(
        optim.rmsprop,
        torch.optim.RMSprop,
        names={"smoothing": "alpha"},
        smoothing=numbers(0.5, 0.999),
        momentum=st.just(0.0) | numbers(0.1, 0.99),
        centered=st.booleans(),
        eps=EPS,
    ),
    "adam": case(optim.adam, torch.optim.Adam, betas=BETAS, eps=EPS, amsgrad=st.booleans()),
    "adamw": case(optim.adamw, torch.optim.AdamW, betas=BETAS, eps=EPS, amsgrad=st.booleans()),
    "nadam": case(
        optim.nadam, torch.optim.NAdam, betas=BETAS, eps=EPS, momentum_decay=numbers(0.0, 0.1)
    ),
    "radam": case(optim.radam, torch.optim.RAdam, betas=BETAS, eps=EPS),
    "adafactor": case(
        optim.adafactor,
        torch.optim.Adafactor,
        names={"decay_exponent": "beta2_decay", "threshold": "d"},
        decay_exponent=numbers(-1.0, -0.1),
        eps=st.sampled_from([(None, 1e-3), (1e-5, 0.1)]),
        threshold=numbers(1.0, 2.0),
    ),
    "muon": case(
        optim.muon,
        torch.optim.Muon,
        shapes=MATRICES,
        names={"iterations": "ns_steps", "adjust": "adjust_lr_fn"},
        momentum=numbers(0.1, 0.99),
        nesterov=st.booleans(),
        iterations=st.integers(1, 6),
        adjust=st.sampled_from(["original", "match_rms_adamw"]),
    ),
}

# One of each, with the options that bring out the most of its state, for the transforms.
OPTIMIZERS: dict[str, Callable[..., optim.Optimizer]] = {
    "sgd": lambda rate: optim.sgd(rate, momentum=0.9, dampening=0.1, weight_decay=0.01),
    "nesterov": lambda rate: optim.sgd(rate, momentum=0.9, nesterov=True),
    "adagrad": lambda rate: optim.adagrad(rate, learning_rate_decay=0.1, weight_decay=0.01),
    "rmsprop": lambda rate: optim.rmsprop(rate, momentum=0.5, centered=True, weight_decay=0.01),
    "adam": lambda rate: optim.adam(rate, weight_decay=0.01, amsgrad=True),
    "adamw": lambda rate: optim.adamw(rate, where="w*"),
    "nadam": lambda rate: optim.nadam(rate, weight_decay=0.01),
    "radam": lambda rate: optim.radam(rate, betas=(0.9, 0.99)),
    "adafactor": lambda rate: optim.adafactor(rate, weight_decay=0.01),
    "lion": lambda rate: optim.lion(rate, weight_decay=0.01),
    "muon": lambda rate: optim.by_path(
        {lambda path, leaf: leaf.ndim == 2: optim.muon(rate, dtype=torch.float64)},
        default=optim.adam(rate),
    ),
    "chain": lambda rate: optim.chain(
        optim.clip_by_global_norm(1.0),
        optim.clip_by_value(0.4),
        optim.sgd(rate, momentum=0.9),
        optim.decoupled_weight_decay(0.1, rate, where=["weight", "wide"]),
        optim.scale_by_path({"weight": 0.5, "*": 2.0}),
        optim.reduce_on_plateau(0.5, patience=0),
    ),
    "accumulate": lambda rate: optim.accumulate(optim.adam(rate), 2),
    "scheduled": lambda rate: optim.adamw(
        optim.schedules.warmup(optim.schedules.cosine(rate, 4), 2, initial=1e-3),
        weight_decay=optim.schedules.constant(0.1),
    ),
}


def draw(seed: int, shapes: dict[str, tuple[int, ...]] = SHAPES, dtype=torch.float64) -> Any:
    """A tree of normal numbers, from a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()
    }

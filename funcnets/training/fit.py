"""The loop: batches through a step, with a look at what comes out now and then."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from funcnets import tree
from funcnets.training.batches import Batches, turns
from funcnets.training.checkpoint import Checkpoints
from funcnets.training.early_stopping import EarlyStopping
from funcnets.training.evaluate import plain
from funcnets.training.nonfinite import NonFiniteError, place_name
from funcnets.training.progress import bar
from funcnets.training.state import State

Callback = Callable[[State, dict[str, Any]], State | None]


def fit(
    step: Callable[..., tuple[State, dict[str, Tensor]]],
    state: State,
    batches: Batches,
    *,
    steps: int | None = None,
    epochs: int | None = None,
    every: int | None = None,
    evaluate: Callable[[State], dict[str, Any]] | None = None,
    early_stopping: EarlyStopping | None = None,
    checkpoints: Checkpoints | None = None,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
) -> tuple[State, list[dict[str, Any]]]:
    """Trains: the last state (the best, with early stopping) and the history.

    Every so many steps, or at the end of every epoch, there is a record: ``step``, ``epoch``,
    ``seconds``, under ``training`` the means of the metrics since the record before, under
    ``evaluation`` what ``evaluate`` finds. The history is the list of them. With each record early
    stopping looks, a checkpoint is written, and the callbacks are called.

    The order of the data and every random number come from ``state.key`` and ``state.step``; so a
    run that was killed and is resumed ends with the same bits as one that was not. Numbers that are
    not finite are dealt with as the step was told, and the first such place is named in a warning.

    Args:
        step: as `make_step` gives it, its ``vmap``, or either compiled.
        state: as ``step.init`` gives it; of an ensemble from ``vmap(step.init)``.
        batches: of an epoch, by key (`minibatches`), or an iterable that is gone through in each.
        steps: how many steps, those of a resumed run before it was stopped included; or
        epochs: how many epochs, likewise.
        every: how many steps from record to record, by default an epoch.
        evaluate: from the state to scores; see `evaluate`.
        early_stopping: by a score of ``evaluate``, without which by a metric of the step.
        checkpoints: where they go.
        resume: whether to go on from the last checkpoint, if there is one.
        callbacks: called as ``callback(state, record)``; one may return a state to go on with.
            One that has a method ``start`` gets the history so far at the beginning.
        progress: whether to show a bar, where rich is installed and there is a terminal.

    Raises:
        NonFiniteError: where the policy is ``"stop"``, and of an ensemble all members have stopped.
        FileExistsError: where a new run would write among the checkpoints of another.

    >>> import torch.nn.functional as F
    >>> from funcnets import models, optim, random, training
    >>> model = models.mlp(in_features=4, out_features=2)
    >>> step = training.make_step(model, F.cross_entropy, optim.adamw(1e-2))
    >>> state = step.init(model.init(random.key(0)), random.key(1))
    >>> x = random.normal(random.key(2), (64, 4))
    >>> batches = training.minibatches((x, (x[:, 0] > 0).long()), 16)
    >>> state, history = training.fit(step, state, batches, epochs=3)
    >>> state.step, [record["step"] for record in history]
    (tensor(12), [4, 8, 12])
    """
    if (steps is None) == (epochs is None):
        raise ValueError("fit: expected either steps or epochs")
    for name, number in (("steps", steps), ("epochs", epochs)):
        if number is not None and number < 0:
            raise ValueError(f"fit: {name}: expected at least 0, got {number}")
    if every is not None and every < 1:
        raise ValueError(f"fit: every: expected at least 1, got {every}")
    each: Any = vmap if state.step.ndim else lambda f: f  # of an ensemble
    history: list[dict[str, Any]] = []
    if early_stopping is not None and not state.stopping:
        state = each(early_stopping.init)(state)
    if checkpoints is not None and (found := checkpoints.steps()):
        if not resume:
            raise FileExistsError(
                f"{checkpoints.folder}: holds checkpoints of steps {found}; "
                "go on from the last with resume=True, or choose another folder"
            )
        state, metadata = checkpoints.restore(state)
        history = metadata.get("history", [])
    for callback in callbacks:
        if hasattr(callback, "start"):
            callback.start(list(history))

    start = int(state.step.flatten()[0])
    began = time.perf_counter() - (history[-1]["seconds"] if history else 0.0)
    means, warned = _Means(), False
    with bar(progress, steps, start) as show:
        for turn in turns(batches, state.key.clone(), start):
            # Beyond them is a resumed run that went on for longer.
            beyond = (steps is not None and turn.step >= steps) or (
                epochs is not None and turn.epoch >= epochs
            )
            if beyond or _done(early_stopping, state):
                break
            try:
                state, metrics = step(state, turn.batch)
            except Exception as error:
                error.add_note(f"fit: in step {turn.step}, epoch {turn.epoch}")
                raise
            means.add(metrics)
            show(turn.step + 1, metrics["loss"])
            last = turn.step + 1 == steps or (turn.last and turn.epoch + 1 == epochs)
            due = turn.last if every is None else (turn.step + 1) % every == 0
            # A look waits for the device, and with nothing to lose by a late one need not be often.
            if due or last or state.step.device.type == "cpu" or turn.step % 20 == 0:
                warned = _look(state, turn.batch, warned, history)
            if not (due or last):
                continue

            scores = means.read() if evaluate is None else _scores(evaluate(state))
            record = {
                "step": turn.step + 1,
                "epoch": turn.epoch,
                "seconds": time.perf_counter() - began,
                "training": plain(means.read()),
            }
            if evaluate is not None:
                record["evaluation"] = plain(scores)
            if state.nonfinite:
                record["nonfinite"] = plain(state.nonfinite.times)
            history.append(record)
            means = _Means()
            if early_stopping is not None:
                state = _observed(early_stopping, state, scores)
            for callback in callbacks:
                changed = callback(state, record)
                state = state if changed is None else changed
            if checkpoints is not None:
                if checkpoints.best is not None and checkpoints.best not in scores:
                    raise KeyError(
                        f"checkpoints: expected a score {checkpoints.best}, got {', '.join(scores)}"
                    )
                told = {"history": history, "scores": plain(scores)}
                checkpoints.save(state, turn.step + 1, told)
            if last:
                break
    if early_stopping is not None:
        state = each(early_stopping.restore)(state)
    return state, history


class _Means:
    """The means of metrics, over the steps in which they are finite."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Tensor]] = []
        self._sums: dict[str, tuple[Any, Any]] = {}

    def add(self, metrics: dict[str, Tensor]) -> None:
        # In every step a copy alone, the rest now and then: a small network's step takes so little.
        self._rows.append(
            {
                name: value.detach().to(torch.float64, copy=True)
                for name, value in metrics.items()
                if name != "nonfinite"
            }
        )
        if len(self._rows) == 100:
            self._sum()

    def read(self) -> dict[str, Tensor]:
        self._sum()
        return {name: total / count for name, (total, count) in self._sums.items()}

    def _sum(self) -> None:
        for name in self._rows[0] if self._rows else ():
            values = torch.stack([row[name] for row in self._rows])
            finite = values.isfinite()
            total, count = self._sums.get(name, (0.0, 0))
            total = total + torch.where(finite, values, 0.0).sum(0)
            self._sums[name] = total, count + finite.sum(0)
        self._rows = []


def _scores(found: Any) -> dict[str, Any]:
    if not isinstance(found, Mapping):
        raise TypeError(f"fit: evaluate: expected a dict of scores, got {tree.describe(found)}")
    return dict(found)


def _done(stopping: EarlyStopping | None, state: State) -> bool:
    return stopping is not None and bool(stopping.done(state).all())


def _observed(stopping: EarlyStopping, state: State, scores: dict[str, Any]) -> State:
    if stopping.metric not in scores:
        raise KeyError(
            f"early_stopping: expected a score {stopping.metric}, got {', '.join(scores)}"
        )
    value = torch.as_tensor(scores[stopping.metric], device=state.step.device)
    if value.shape != state.step.shape:
        raise ValueError(
            f"early_stopping: {stopping.metric}: expected shape {list(state.step.shape)}, "
            f"one for each network, got {list(value.shape)}"
        )
    return (vmap(stopping.update) if value.ndim else stopping.update)(state, value)


def _look(state: State, batch: Any, warned: bool, history: list[dict[str, Any]]) -> bool:
    """Warns of, or stops at, numbers that are not finite; whether a warning was given by now."""
    found = state.nonfinite
    if not found or not bool((found.times > 0).any()):
        return warned
    stopped = bool(found.stopped.all())
    if warned and not stopped:
        return True
    which, params = "", state.params
    if state.step.ndim:
        member = int((found.times > 0).to(torch.int8).argmax())
        which = f"member {member}: "
        found, params = tree.map(lambda leaf: leaf[member], (found, params))
    name = place_name(int(found.place), params, batch)
    message = f"step {int(found.step)}: {which}{name} is not finite"
    if stopped:
        raise NonFiniteError(message, state, history)
    warnings.warn(message, RuntimeWarning, stacklevel=3)
    return True

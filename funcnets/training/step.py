"""One training step as a pure function: ``state, metrics = step(state, batch, key)``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from funcnets import random, tree
from funcnets.gradients import grad_and_value
from funcnets.model import Model
from funcnets.optim.base import Optimizer, apply_updates
from funcnets.optim.leafwise import new_step
from funcnets.random import Key
from funcnets.training.averages import Average
from funcnets.training.nonfinite import POLICIES, NonFinite, init_nonfinite, place_of
from funcnets.training.objective import Objective, make_objective
from funcnets.training.precision import Precision, bfloat16, float16
from funcnets.training.state import State, step_key
from funcnets.tree.flatten import Tree
from funcnets.tree.select import Where


@dataclass(frozen=True, eq=False)
class Step:
    """What `make_step` returns: ``step.init(params, key)`` and ``step(state, batch, key)``.

    Both are pure, so ``vmap(step.init)(params, keys)`` and ``vmap(step)(states, batches)`` are an
    ensemble, and ``funcnets.compile(step, donate="state")`` is one graph.
    """

    objective: Objective
    optimizer: Optimizer
    accumulate: int
    precision: Precision | None
    average: Average | None
    nonfinite: str | None
    good_every: int
    trainable: Where | None

    def init(self, params: Tree, key: Key) -> State:
        """The first state.

        Args:
            params: all of the network's parameters, buffers included.
            key: of the run; it goes where the parameters are.
        """
        random.check_key(key)
        trained, buffers = tree.partition(params)
        frozen: Tree = TensorDict({}) if isinstance(params, TensorDictBase) else {}
        if self.trainable is not None:
            trained, frozen = tree.partition(trained, self.trainable)
            if not tree.leaves(trained):
                raise ValueError(f"trainable: {self.trainable!r}: expected leaves, matched none")
        # Tensors of its own, for compile(step, donate="state") gives their memory away.
        trained, buffers, frozen = tree.map(torch.clone, (trained, buffers, frozen))
        optimizer = self.optimizer.init(trained)
        average = () if self.average is None else self.average.init(trained, buffers)
        changing = trained, buffers, optimizer, average
        return State(
            *(trained, buffers, frozen, optimizer),
            step=new_step(trained),
            key=key.clone().to(new_step(trained).device),
            average=average,
            scaler=() if self.precision is None else self.precision.init(trained),
            nonfinite=() if self.nonfinite is None else init_nonfinite(trained),
            good=tree.map(torch.clone, changing) if self.nonfinite == "restore" else (),
        )

    def __call__(
        self, state: State, batch: Any, key: Key | None = None
    ) -> tuple[State, dict[str, Tensor]]:
        """The next state, and the metrics, tensors of shape [] with the loss first.

        ``metrics["nonfinite"]`` is -1, or the place that `place_name` names. ``metrics["scale"]``
        is the loss scale of float16.

        Args:
            batch: as the loss wants it; ``(inputs, targets)`` with a model.
            key: by default derived from ``state.key`` and ``state.step``.

        Raises:
            TypeError: the state is none of ``init``, but parameters, say.
        """
        if not isinstance(state, State):
            raise TypeError(f"state: expected that of step.init, got {tree.describe(state)}")
        if key is None:
            key = step_key(state.key, state.step)
        gradients, value, told, buffers = self._gradients(state, batch, key)
        updates, optimizer = self.optimizer.update(gradients, state.optimizer, state.params, value)
        params = apply_updates(state.params, updates)
        number = state.step + 1
        average = state.average
        if self.average is not None:
            average = self.average.update(average, params, buffers, number)
        new = params, buffers, optimizer, average
        old = state.params, state.buffers, state.optimizer, state.average

        metrics = {"loss": value, **told}
        good, nonfinite, scaler = state.good, state.nonfinite, state.scaler
        if self.nonfinite is not None or scaler:
            place = place_of(value, gradients, batch)
            left = torch.zeros_like(place, dtype=torch.bool)  # whether all stays as it is
            if self.precision is not None and scaler:
                metrics["scale"] = scaler.scale
                left = (place >= 0) & self.precision.can_shrink(scaler)
                scaler = self.precision.update(scaler, left)
                place = torch.where(left, -1, place)  # the scale's fault
            if self.nonfinite is not None:
                metrics["nonfinite"] = place
                bad = place != -1
                nonfinite = _noted(nonfinite, bad, state.step, place, self.nonfinite == "stop")
                left = left | bad | nonfinite.stopped
            if self.nonfinite == "restore":
                due = left.logical_not() & (state.step % self.good_every == 0)
                old = _choose(bad, good, old)
                good = _choose(due, old, good)
            new = _choose(left, old, new)
        params, buffers, optimizer, average = new
        new_state = state._replace(
            params=params,
            buffers=buffers,
            optimizer=optimizer,
            step=number,
            average=average,
            scaler=scaler,
            nonfinite=nonfinite,
            good=good,
        )
        return new_state, metrics

    def _gradients(
        self, state: State, batch: Any, key: Key
    ) -> tuple[Tree, Tensor, dict[str, Tensor], Tree]:
        """The gradient of the batch, the loss, the other metrics and the new buffers."""
        scale = state.scaler.scale if state.scaler else None

        def scaled(params: Tree, buffers: Tree, batch: Any, key: Key) -> Any:
            whole = tree.merge(params, buffers, state.frozen)
            value, metrics, new = self.objective(whole, batch, key)
            aux = value, metrics, _overlaid(buffers, new)
            return value if scale is None else value.to(torch.float32) * scale, aux

        differentiate = grad_and_value(scaled, has_aux=True)
        if self.accumulate == 1:
            gradients, (_, aux) = differentiate(state.params, state.buffers, batch, key)
        else:
            # What is summed up: gradients, losses and metrics. The buffers go from part to part.
            total, buffers = None, state.buffers
            for i, part in enumerate(_parts(batch, self.accumulate)):
                part_key = random.fold_in(key, i)
                gradients, (_, aux) = differentiate(state.params, buffers, part, part_key)
                buffers = aux[2]
                one = gradients, aux[0], aux[1]
                total = one if total is None else tree.map(torch.add, total, one)
            gradients, *told = tree.map(lambda leaf: leaf / self.accumulate, total)
            aux = (*told, buffers)
        if scale is not None:
            gradients = tree.map(lambda leaf: leaf / scale.to(leaf.dtype), gradients)
        return gradients, *aux


def make_step(
    model: Model | None,
    loss: Callable[..., Any],
    optimizer: Optimizer,
    *,
    accumulate: int = 1,
    precision: str | Precision | None = None,
    average: Average | None = None,
    nonfinite: str | None = "stop",
    good_every: int = 1,
    trainable: Where | None = None,
) -> Step:
    """A training step. To clip gradients or schedule rates, chain optimizers (`funcnets.optim`).

    Args:
        model: called as ``model.apply(params, *inputs, train=True, key=key)``. The inputs, the
            first of the batch, are one argument (a tensor, or a dict of them) or a tuple of
            several. An ``apply`` of one's own without ``train`` is called plainly.
        loss: ``loss(outputs, targets) -> value`` or ``(value, metrics)``, a dict of 0-d tensors.
            Without a model ``loss(params, batch, key) -> (value, metrics, buffers)``.
        accumulate: cuts each batch into so many parts, one after the other, and updates once with
            the mean of their gradients: for a loss that is a mean over the batch, that of the whole
            batch in less memory. Batch norm sees the parts. (`optim.accumulate` is for parts that
            arrive in calls of their own.)
        precision: None, ``"bfloat16"`` or ``"float16"`` (`bfloat16`, `float16`). The network is
            then computed under ``torch.autocast``; parameters and loss stay in float32. Without a
            model all of the loss runs so: begin it with ``outputs.float()``.
        average: `ema` or `swa`, read with ``parameters(state, average=True)``.
        nonfinite: what to do where the loss or a gradient is not finite. ``"skip"``: leave all as
            it is but for the step's number. ``"restore"``: go back to the last good parameters,
            buffers and optimizer state, for where the update before was at fault. ``"stop"``: leave
            all as it is from then on; `fit` ends with an error. None: nothing is looked at.
        good_every: how many steps apart ``"restore"`` keeps parameters, once their loss was finite.
        trainable: which parameters are trained, as `tree.partition` takes it; by default all.

    >>> import torch.nn.functional as F
    >>> from funcnets import models, optim
    >>> model = models.mlp(in_features=4, out_features=2)
    >>> step = make_step(model, F.cross_entropy, optim.adamw(1e-3))
    >>> state = step.init(model.init(random.key(0)), random.key(1))
    >>> state, metrics = step(state, (torch.ones(8, 4), torch.zeros(8, dtype=torch.int64)))
    >>> metrics["loss"].shape, state.step
    (torch.Size([]), tensor(1))
    """
    for name, number in (("accumulate", accumulate), ("good_every", good_every)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"make_step: {name}: expected an int of at least 1, got {number!r}")
    for name, value, parts in (
        ("model", model, ("apply",)),
        ("optimizer", optimizer, ("init", "update")),
        ("average", average, ("init", "update")),
    ):
        absent = value is None and name != "optimizer"
        if not absent and (isinstance(value, type) or not all(hasattr(value, p) for p in parts)):
            raise TypeError(
                f"make_step: {name}: expected what has {' and '.join(parts)}, got {value!r}"
            )
    if nonfinite is not None and nonfinite not in POLICIES:
        raise ValueError(
            f"make_step: nonfinite: expected {', '.join(POLICIES)} or None, got {nonfinite!r}"
        )
    if isinstance(precision, str):
        kinds = {"bfloat16": bfloat16, "float16": float16, "float32": lambda: None}
        if precision not in kinds:
            raise ValueError(
                f"make_step: precision: expected one of {', '.join(kinds)}, got {precision!r}"
            )
        precision = kinds[precision]()
    return Step(
        make_objective(model, loss, precision),
        optimizer,
        accumulate,
        precision,
        average,
        nonfinite,
        good_every,
        trainable,
    )


def _choose(condition: Tensor, yes: Tree, no: Tree) -> Any:
    return tree.map(lambda a, b: torch.where(condition, a, b), yes, no)


def _noted(noted: NonFinite, bad: Tensor, step: Tensor, place: Tensor, stop: bool) -> NonFinite:
    first = bad & (noted.times == 0)
    return NonFinite(
        noted.times + bad.to(torch.int64),
        torch.where(first, step, noted.step),
        torch.where(first, place, noted.place),
        noted.stopped | bad if stop else noted.stopped,
    )


def _parts(batch: Any, count: int) -> list[Any]:
    """The batch cut along the first axis of all its tensors."""
    found = tree.leaves_with_path(batch)
    sizes = {leaf.shape[0] if leaf.ndim else 0 for _, leaf in found}
    if len(sizes) != 1 or 0 in sizes or min(sizes) % count:
        shapes = ", ".join(f"{tree.join(path)} {list(leaf.shape)}" for path, leaf in found)
        raise ValueError(
            f"accumulate: expected batches whose first axes are one multiple of {count}, "
            f"got {shapes}"
        )
    cut = tree.map(lambda leaf: rearrange(leaf, "(n b) ... -> n b ...", n=count), batch)
    return [tree.map(lambda leaf, i=i: leaf[i], cut) for i in range(count)]


def _overlaid(old: Tree, new: Tree) -> Tree:
    """The buffers with the new ones in their places, in the dtypes of the old."""
    if tree.flatten(old)[1] != tree.flatten(new)[1]:  # some of them, or in another order
        held = dict(tree.leaves_with_path(new))
        if extra := held.keys() - dict(tree.leaves_with_path(old)).keys():
            names = ", ".join(sorted(map(tree.join, extra)))
            raise ValueError(f"buffers: expected those of the parameters, got {names} as well")
        new = tree.map_with_path(lambda path, leaf: held.get(path, leaf), old)
    return tree.map(lambda leaf, like: leaf.detach().to(like.dtype), new, old)

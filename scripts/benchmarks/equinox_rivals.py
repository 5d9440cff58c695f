"""Workloads as people write them with Equinox and optax, under jit: a program, see elsewhere.py.

It reads "step", makes one and answers with its seconds; it reads "result" and writes the parameters
(or whatever comes out) to a file, by torch's names.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from safetensors.numpy import load_file, save_file

RATE = 1e-3
Step = Callable[[], Any]
Result = Callable[[], dict[str, Any]]


class MLP(eqx.Module):
    """Three linear layers."""

    layers: list[eqx.nn.Linear]

    def __init__(self, keys: Any) -> None:
        sizes = ((784, 256), (256, 256), (256, 10))
        self.layers = [eqx.nn.Linear(*s, key=k) for s, k in zip(sizes, keys, strict=True)]

    def __call__(self, x: Any) -> Any:
        """Logits of one sample."""
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


class Conv(eqx.Module):
    """Two convolutions, each with pooling, and a linear layer."""

    first: eqx.nn.Conv2d
    second: eqx.nn.Conv2d
    classifier: eqx.nn.Linear

    def __init__(self, keys: Any) -> None:
        self.first = eqx.nn.Conv2d(1, 32, 3, padding=1, key=keys[0])
        self.second = eqx.nn.Conv2d(32, 64, 3, padding=1, key=keys[1])
        self.classifier = eqx.nn.Linear(64, 10, key=keys[2])

    def __call__(self, x: Any) -> Any:
        """Logits of one image."""
        pool = eqx.nn.MaxPool2d(2, 2)
        x = pool(jax.nn.relu(self.first(x)))
        x = pool(jax.nn.relu(self.second(x)))
        return self.classifier(x.mean((1, 2)))


class GRU(eqx.Module):
    """A GRU with both of torch's biases, which Equinox's own cell has as one, and a head."""

    weight_ih: Any
    weight_hh: Any
    bias_ih: Any
    bias_hh: Any
    head: eqx.nn.Linear

    def __init__(self, keys: Any) -> None:
        self.weight_ih = self.weight_hh = self.bias_ih = self.bias_hh = jnp.zeros(())
        self.head = eqx.nn.Linear(1, 1, key=keys[0])

    def __call__(self, x: Any) -> Any:
        """One number for a series [time, inputs]."""
        inputs = x @ self.weight_ih.T + self.bias_ih

        def cell(h: Any, i: Any) -> Any:
            i_r, i_z, i_n = jnp.split(i, 3)
            h_r, h_z, h_n = jnp.split(self.weight_hh @ h + self.bias_hh, 3)
            r, z = jax.nn.sigmoid(i_r + h_r), jax.nn.sigmoid(i_z + h_z)
            new = jnp.tanh(i_n + r * h_n)
            return new + z * (h - new), None

        return self.head(jax.lax.scan(cell, jnp.zeros(self.weight_hh.shape[1]), inputs)[0])


def leaves_of(model: Any) -> dict[str, tuple[Any, Any]]:
    """For each parameter by torch's name, where it is, and the shape to give it."""
    if isinstance(model, MLP):
        return {
            f"{3 * i}.{name}": (lambda m, i=i, name=name: getattr(m.layers[i], name), None)
            for i in range(3)
            for name in ("weight", "bias")
        }
    if isinstance(model, GRU):
        own = {
            f"rnn.{name}_l0": (lambda m, name=name: getattr(m, name), None)
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        }
        return own | {
            f"head.{name}": (lambda m, name=name: getattr(m.head, name), None)
            for name in ("weight", "bias")
        }
    places: dict[str, tuple[Any, Any]] = {}
    for i, part in enumerate(("first", "second")):
        places[f"features.{i}.0.0.weight"] = (lambda m, part=part: getattr(m, part).weight, None)
        places[f"features.{i}.0.0.bias"] = (lambda m, part=part: getattr(m, part).bias, (1, 1))
    for name in ("weight", "bias"):
        places[f"classifier.{name}"] = (lambda m, name=name: getattr(m.classifier, name), None)
    return places


def filled(model: Any, data: dict[str, Any]) -> Any:
    """The model with the values of a file, which may have a dimension of members."""
    for name, (where, extra) in leaves_of(model).items():
        value = jnp.asarray(data[name])
        model = eqx.tree_at(where, model, value.reshape(*value.shape, *(extra or ())))
    return model


def values(model: Any) -> dict[str, Any]:
    """The parameters of a model by torch's names."""
    return {
        name: where(model).squeeze((-2, -1)) if extra else where(model)
        for name, (where, extra) in leaves_of(model).items()
    }


def cross_entropy(model: Any, x: Any, y: Any) -> Any:
    """Of a batch."""
    return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(x), y).mean()


def squared_error(model: Any, x: Any, y: Any) -> Any:
    """Of a batch."""
    return jnp.square(jax.vmap(model)(x) - y).mean()


def training(model: Any, loss: Any, x: Any, y: Any, members: bool) -> tuple[Step, Result]:
    """Adam steps of one network, or of all members of an ensemble at once."""
    adam = optax.adam(RATE)

    def update(model: Any, state: Any, x: Any, y: Any) -> Any:
        gradients = eqx.filter_grad(loss)(model, x, y)
        updates, state = adam.update(gradients, state)
        return eqx.apply_updates(model, updates), state

    def begin(model: Any) -> Any:
        return adam.init(eqx.filter(model, eqx.is_array))

    if members:
        update = eqx.filter_vmap(update, in_axes=(eqx.if_array(0), eqx.if_array(0), None, None))
        begin = eqx.filter_vmap(begin)
    held = model, begin(model)
    jitted = eqx.filter_jit(lambda batch, held: update(*held, *batch), donate="all-except-first")

    def step() -> Any:
        nonlocal held
        held = jitted((x, y), held)
        return held

    return step, lambda: values(held[0])


def per_sample(model: Any, x: Any, y: Any) -> tuple[Step, Result]:
    """The gradient of each sample."""
    found: Any = None

    def one(model: Any, x: Any, y: Any) -> Any:
        return cross_entropy(model, x[None], y[None])

    jitted = eqx.filter_jit(eqx.filter_vmap(eqx.filter_grad(one), in_axes=(None, 0, 0)))

    def step() -> Any:
        nonlocal found
        found = jitted(model, x, y)
        return found

    return step, lambda: values(found)


def workload(name: str, data: dict[str, Any]) -> tuple[Step, Result]:
    """The step of a workload, and what tells its results."""
    x, y, keys = data["x"], data["y"], jax.random.split(jax.random.key(0), 3)
    x, y = jnp.asarray(x), jnp.asarray(y)
    if name == "mlps":
        return training(filled(MLP(keys), data), cross_entropy, x, y, True)
    if name == "convs":
        return training(filled(Conv(keys), data), cross_entropy, x, y, True)
    if name == "gru":
        return training(filled(GRU(keys), data), squared_error, x, y, False)
    return per_sample(filled(Conv(keys), data), x, y)


def main() -> None:
    """Answers until there is nothing more to read."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    step, result = workload(name, load_file(folder / "data.safetensors"))
    for line in sys.stdin:
        begin = time.perf_counter()
        if line.strip() == "step":
            jax.block_until_ready(jax.tree.leaves(eqx.filter(step(), eqx.is_array)))
        else:
            held = jax.device_get(result())
            save_file({k: v.copy() for k, v in held.items()}, folder / "result.safetensors")
        print(json.dumps(time.perf_counter() - begin), flush=True)


if __name__ == "__main__":
    main()

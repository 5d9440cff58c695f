"""What the tests of control flow share."""

import inspect

import torch
from torch.func import jvp, vmap

from funcnets import random, tree
from funcnets.compile import compile

ticks: list[str] = []
ticked: list[tuple[str, int]] = []  # the same, with the batch of what was given
torch.library.define("funcnets_control_test::tick", "(Tensor x, str name) -> Tensor")


@torch.library.impl("funcnets_control_test::tick", "CompositeExplicitAutograd")
def _tick(x, name):
    ticks.append(name)
    ticked.append((name, x.shape[0] if x.ndim else 1))
    return x.clone()


@torch.library.register_fake("funcnets_control_test::tick")
def _(x, name):
    return torch.empty_like(x)


def tick(x, name):
    """Notes when it is carried out on numbers, not when it is recorded or asked for shapes."""
    return torch.ops.funcnets_control_test.tick(x.detach(), name)


def unchecked(f):
    """A function without the check of its signature, to see the errors that it raises itself."""
    return inspect.unwrap(f)


def compiled(f):
    return compile(f, backend="eager")


def normal(seed, *shape, dtype=torch.float64):
    return random.normal(random.key(seed), shape, dtype=dtype)


def assert_same(actual, expected):
    """Equal leaves under equal names, in whatever order."""
    actual, expected = dict(tree.leaves_with_path(actual)), dict(tree.leaves_with_path(expected))
    assert actual.keys() == expected.keys()
    for path, leaf in actual.items():
        torch.testing.assert_close(leaf, expected[path], rtol=1e-10, atol=1e-12)


def per_member(f, *args, in_dims=0):
    """vmap as a Python loop."""
    dims = in_dims if isinstance(in_dims, tuple) else (in_dims,) * len(args)
    size = next(
        tree.leaves(arg)[0].shape[0] for arg, d in zip(args, dims, strict=True) if d is not None
    )
    results = [
        f(
            *(
                arg if d is None else tree.map(lambda leaf, i=i: leaf[i], arg)
                for arg, d in zip(args, dims, strict=True)
            )
        )
        for i in range(size)
    ]
    return tree.map(lambda *parts: torch.stack(parts), *results)


def pushed(f):
    """The directional derivative of f along ones."""
    return lambda *args: jvp(f, args, tuple(torch.ones_like(arg) for arg in args))


def run_with_flag(mode, f, x):
    """``f(flag, x)`` with the flag as each way of running has it."""
    if mode in ("true", "false"):
        return f(torch.tensor(mode == "true"), x)
    if mode == "compiled":
        return compiled(f)(torch.tensor(True), x)
    flags = {"agree": [True, True], "disagree": [False, False]}.get(mode, [True, False])
    mapped = vmap(f, (0, None))
    if mode == "compiled(vmap)":
        mapped = compiled(mapped)
    elif mode == "grad(vmap)":
        inner = mapped
        mapped = lambda flags, x: torch.func.vjp(lambda x: inner(flags, x), x)[0]  # noqa: E731
    return mapped(torch.tensor(flags), x)


MODES = [
    "true",
    "false",
    "compiled",
    "mixed",
    "agree",
    "disagree",
    "compiled(vmap)",
    "grad(vmap)",
]

"""remat: the same numbers, computed again where they are needed, and less kept."""

import functools

import pytest
import torch
from control_cases import assert_same, compiled, normal, per_member, pushed, tick, ticks
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from funcnets import random, tree
from funcnets.control import remat
from funcnets.models import mlp

RUN = {"eager": lambda f: f, "compiled": compiled}


def f(w, x):
    return torch.tanh(w * x).sin().sum() * x.sum()


TRANSFORMS = {
    "forward": lambda f: f,
    "grad": lambda f: grad(f, (0, 1)),
    "grad(grad)": lambda f: grad(lambda *a: grad(f)(*a).sin().sum(), (0, 1)),
    "jvp": pushed,
    "hessian": hessian,
    "jacrev(jacrev)": lambda f: jacrev(jacrev(f, 1), 0),
    "jacfwd(jacfwd)": lambda f: jacfwd(jacfwd(f, 1), 0),
}


@pytest.mark.parametrize("run", RUN)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_same_numbers(transform, run):
    @given(st.integers(1, 3), st.integers(0, 99))
    @settings(max_examples=2)
    def check(size, seed):
        w, x = normal(seed, 2, size), normal(seed + 100, 2, size)
        plain, again = TRANSFORMS[transform](f), TRANSFORMS[transform](remat(f))
        assert_same(RUN[run](again)(w[0], x[0]), plain(w[0], x[0]))
        for dims in ((0, 0), (0, None), (None, 0)):
            args = tuple(a[0] if dim is None else a for a, dim in zip((w, x), dims, strict=True))
            expected = per_member(plain, *args, in_dims=dims)
            assert_same(RUN[run](vmap(again, dims))(*args), expected)
        if transform == "grad":
            mapped = grad(lambda w, x: vmap(remat(f))(w, x).sum(), (0, 1))
            assert_same(RUN[run](mapped)(w, x), per_member(plain, w, x))

    check()


def counted(x):
    return (x * (1 + 0 * tick(x, "forward"))).sin().sum()


@pytest.mark.parametrize(
    ("expected", "transform"),
    [
        (1, lambda f: f),
        (2, grad),
        (2, lambda f: vmap(f)),
        (2, lambda f: lambda x: f(x.requires_grad_()).backward()),
        (2, lambda f: grad(lambda x: f(x) + x.sum())),
    ],
)
@pytest.mark.parametrize("run", RUN)
def test_computed_once_more_in_the_backward_pass(expected, transform, run):
    ticks.clear()
    x = normal(0, 2)
    if run == "compiled":
        g = compiled(grad(remat(counted)))
        g(x)
        ticks.clear()
        g(x)
        assert len(ticks) == 2
        return
    transform(remat(counted))(x)
    assert len(ticks) == expected
    ticks.clear()
    grad(counted)(normal(0, 2))
    assert len(ticks) == 1


def test_plain_autograd():
    results = []
    for g in (f, remat(f)):
        w, x = normal(0, 3).requires_grad_(), normal(1, 3).requires_grad_()
        value = g(w, x)
        first = torch.autograd.grad(value, (w, x), create_graph=True)
        second = torch.autograd.grad(first[0].sum() + first[1].sin().sum(), (w, x))
        results.append((value.detach(), tuple(t.detach() for t in first), second))
    assert_same(results[1], results[0])
    with torch.no_grad():
        assert not remat(f)(w, x).requires_grad
    # An argument that is not differentiated stays so.
    x = normal(1, 3)
    remat(f)(w, x).backward()
    assert x.grad is None
    assert w.grad is not None


def kept(step):
    """How many numbers a chain of ten steps keeps for the backward pass, each memory once."""
    sizes = {}

    def pack(tensor):
        sizes[tensor.data_ptr()] = tensor.numel()
        return tensor

    x = normal(0, 100).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = x
        for _ in range(10):
            y = step(y)
    result = sum(sizes.values())
    y.sum().backward()
    return result


def test_less_is_kept():
    def step(x):
        return (x.sin().exp().tanh() * x.cos()).sigmoid()

    assert kept(step) >= 4 * 10 * 100
    assert kept(remat(step)) == 10 * 100  # the input of each step


@pytest.mark.parametrize("run", RUN)
def test_arguments_and_outputs_of_every_kind(run):
    def layer(params, x, power, *, scale=1.0, flag, name="n"):
        y = (params["w"] * x) ** power * scale
        return {"y": y if flag else -y, "name": name, "x": x, "none": None, "n": y.argmax(),
                "list": [y, y, 3]}  # fmt: skip

    def total(g):
        def loss(params, x):
            out = g(params, x, 2, scale=torch.tensor(3.0).double(), flag=True)
            assert (out["name"], out["none"], out["list"][2]) == ("n", None, 3)
            return out["y"].sum() + out["x"].sin().sum() + out["list"][1].sum(), out["n"]

        return grad(loss, (0, 1), has_aux=True)

    params, x = TensorDict({"w": normal(0, 3)}), normal(1, 3)
    assert_same(RUN[run](total(remat(layer)))(params, x), total(layer)(params, x))


@pytest.mark.parametrize("run", RUN)
def test_closures_and_keyword_tensors(run):
    def loss(wrap):
        def f(w, x, key):
            inner = wrap(lambda y, *, shift: (y * w).sin() * random.normal(key, (3,)) + shift)
            return wrap(functools.partial(inner, shift=x))(x).square().sum()

        return f

    args = normal(0, 3), normal(1, 3), random.key(0)
    expected = grad(loss(lambda f: f), (0, 1))(*args)
    assert_same(RUN[run](grad(loss(remat), (0, 1)))(*args), expected)


@pytest.mark.parametrize("run", RUN)
def test_an_input_returned_as_it_is(run):
    def swap(x, y):
        return y, x, x

    x, y = normal(0, 2), normal(1, 2)
    assert_same(RUN[run](remat(swap))(x, y), (y, x, x))
    g = grad(lambda x, y: sum(i * t.sin().sum() for i, t in enumerate(remat(swap)(x, y))), (0, 1))
    assert_same(RUN[run](g)(x, y), (3 * x.cos(), 0 * y))
    a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
    sum(i * t.sin().sum() for i, t in enumerate(remat(swap)(a, b))).backward()
    assert_same(a.grad, 3 * x.cos())


@pytest.mark.parametrize("run", RUN)
def test_one_tensor_given_twice_and_a_model(run):
    x = normal(0, 3)
    assert_same(RUN[run](grad(lambda x: remat(f)(x, x)))(x), grad(lambda x: f(x, x))(x))
    model = mlp(3, 2, widths=(4,))
    params, x = model.init(random.key(0)), normal(1, 5, 3, dtype=torch.float32)
    expected = grad(lambda p: model.apply(p, x).sin().sum())(params)
    got = RUN[run](grad(lambda p: remat(model.apply)(p, x).sin().sum()))(params)
    assert_same(got, expected)


def test_of_no_tensors_and_without_outputs():
    assert remat(lambda n: n + 1)(2) == 3
    assert remat(lambda x: None)(torch.ones(2)) is None
    assert remat(lambda: torch.ones(2))().sum() == 2


def test_name_and_documentation_stay():
    assert remat(f).__name__ == "f"


# --- plain torch.compile -----------------------------------------------------------------------


@pytest.mark.dynamo
def test_plain_torch_compile():
    def loss(params, x):
        h = remat(lambda p, *, scale: (p["w"] * x).sin() * scale)(params, scale=x)
        return remat(f)(h, x)

    results = []
    for kind in (dict, TensorDict):
        for g in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
            w, x = normal(0, 3).requires_grad_(), normal(1, 3).requires_grad_()
            value = g(kind({"w": w}), x)
            results.append((value.detach(), torch.autograd.grad(value, (w, x))))
    for result in results[1:]:
        assert_same(result, results[0])
    assert tree.leaves(results[0])[1].abs().sum() > 0

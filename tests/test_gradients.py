"""funcnets.grad beside torch.func.grad: the same numbers, everywhere; without wrappers, plainly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch.func import hessian, jvp, vmap

import funcnets
from funcnets import compile, models, random, tree
from funcnets.gradients import grad, grad_and_value

KEY = random.key(8)
X = random.normal(KEY, (4, 3), dtype=torch.float64)
MODEL = models.mlp(3, 2, (4,), norm="batch")
PARAMS = tree.cast(MODEL.init(KEY), torch.float64)
TRAINABLE, BUFFERS = tree.partition(PARAMS)


def loss(params, x):
    outputs, buffers = MODEL.apply(tree.merge(params, BUFFERS), x, train=True)
    return outputs.square().sum(), {"buffers": buffers, "outputs": outputs}


def value(params, x):
    return loss(params, x)[0]


def identical(actual, expected):
    tree.map(
        lambda a, b: (
            torch.testing.assert_close(a, b, rtol=0, atol=0)
            if isinstance(a, torch.Tensor)
            else None
        ),
        actual,
        expected,
    )
    assert tree.flatten(actual)[1] == tree.flatten(expected)[1]


def test_tensors_made_in_inference_mode():
    with torch.inference_mode():
        params, x = tree.map(torch.clone, TRAINABLE), X.clone()
        inside = grad(value)(TRAINABLE, X)
    expected = torch.func.grad(value)(TRAINABLE, X)
    identical(tree.map(torch.clone, inside), expected)
    for p, other in ((params, X), (TRAINABLE, x), (params, x)):
        identical(grad(value)(p, other), expected)
        identical(grad(lambda p, other=other: value(p, other))(p), expected)  # closed over


@pytest.mark.parametrize("argnums", [None, 1.0, (0, None), [0]])
def test_argnums_are_ints(argnums, unchecked):
    with pytest.raises(TypeError, match="grad: argnums: expected an int or a tuple of ints, got"):
        grad(value, argnums)(TRAINABLE, X)


@given(
    argnums=st.sampled_from([0, 1, (0,), (1, 0), (0, 1)]),
    has_aux=st.booleans(),
    with_value=st.booleans(),
)
def test_equals_torch_func(argnums, has_aux, with_value):
    f = loss if has_aux else value
    ours = grad_and_value if with_value else grad
    theirs = torch.func.grad_and_value if with_value else torch.func.grad
    result = ours(f, argnums, has_aux)(TRAINABLE, X)
    expected = theirs(f, argnums, has_aux)(TRAINABLE, X)
    if has_aux:
        # torch's own kernel rounds the running variance in another order than the transforms' way:
        # this leaf is compared by itself, all others bit for bit.
        variances = []
        for part in (result, expected):
            aux = part[1][1] if with_value else part[1]
            variances.append(aux["buffers"]["1"].pop("running_var"))
        torch.testing.assert_close(*variances, rtol=1e-14, atol=0)
    identical(result, expected)
    assert not any(leaf.requires_grad for leaf in tree.leaves(result))


def test_is_exported():
    assert funcnets.grad is grad
    assert funcnets.grad_and_value is grad_and_value


def wrappers(f):
    """Whether f is run on the wrapped tensors of torch.func."""
    seen = []

    def probe(x):
        seen.append(torch._C._functorch.is_functorch_wrapped_tensor(x))
        return f(x)

    return probe, seen


def test_plain_calls_have_no_wrappers_and_others_are_torchs():
    probe, seen = wrappers(lambda x: x.square().sum())
    grad(probe)(X)
    assert seen == [False]
    for transform in (
        lambda: vmap(grad(probe))(X),
        lambda: grad(lambda x: grad(probe)(x).sum())(X),
        lambda: jvp(grad(probe), (X,), (X,)),
        lambda: grad(probe)(X.clone().requires_grad_()),
        lambda: compile(grad(probe), backend="eager")(X),
    ):
        seen.clear()
        transform()
        assert seen[-1]


@pytest.mark.parametrize(
    "transform",
    [
        lambda g: lambda p, x: vmap(g(value), in_dims=(None, 0))(p, x[:, None].expand(-1, 2, -1)),
        lambda g: g(lambda p, x: sum(t.square().sum() for t in tree.leaves(g(value)(p, x)))),
        lambda g: lambda p, x: jvp(lambda x: g(value)(p, x), (x,), (x,))[1],
        lambda g: lambda p, x: hessian(lambda x: value(p, x))(x),
        lambda g: compile(g(value), backend="aot_eager"),
    ],
    ids=["vmap", "grad", "jvp", "hessian", "compile"],
)
def test_transforms_of_it_are_those_of_torchs(transform):
    close = transform(grad)(TRAINABLE, X), transform(torch.func.grad)(TRAINABLE, X)
    tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12), *close)


@pytest.mark.parametrize("aux", ["leaf", "computed"])
def test_a_second_output_stays_connected(aux):
    w = X[0].clone().requires_grad_()

    def f(x):
        return x.square().sum(), w if aux == "leaf" else (x * w).sum()

    for call in (lambda: grad(f, has_aux=True)(X[0]), lambda: vmap(grad(f, has_aux=True))(X)):
        _, found = call()
        w.grad = None
        found.sum().backward()
        assert w.grad.any()


@given(computed=st.booleans())
def test_a_second_output_is_no_part_of_the_graph(computed):
    """It comes back as it is where it was none before, and detached where it was."""
    constant = {"n": torch.ones(2), "name": "constant"}

    def f(x):
        return x.square().sum(), constant | ({"y": 2 * x} if computed else {})

    value, aux = grad_and_value(f, has_aux=True)(X)[1]
    assert not value.requires_grad
    assert list(aux) == ["n", "name", "y"][: 2 + computed]
    torch.testing.assert_close(aux["n"], torch.ones(2), rtol=0, atol=0)
    assert not any(getattr(leaf, "requires_grad", False) for leaf in aux.values())


@given(
    last=st.booleans(),
    leaf_last=st.booleans(),
    shape=st.tuples(*[st.integers(1, 3)] * 4),
    kind=st.sampled_from(["conv", "sum", "transposed"]),
)
def test_gradients_lie_in_memory_as_their_parameters(last, leaf_last, shape, kind):
    """As backward() leaves them: torch.optim's fused kernels do not look at strides."""
    formats = torch.contiguous_format, torch.channels_last
    w = random.normal(KEY, shape).to(memory_format=formats[leaf_last])
    x = random.normal(KEY, (2, shape[1], 4, 4)).to(memory_format=formats[last])

    def f(w):
        if kind == "sum":
            return w.sum()
        if kind == "transposed":
            return (w.mT @ torch.arange(12.0).reshape(3, 4)[: shape[2]]).square().sum()
        return torch.nn.functional.conv2d(x, w).square().sum()

    found = grad(f)(w)
    assert found.stride() == w.stride()
    torch.testing.assert_close(found, torch.func.grad(f)(w), rtol=0, atol=0)
    ours, theirs = w.clone(), w.clone().requires_grad_()
    ours.grad = found
    f(theirs).backward()
    for leaf in (ours, theirs):
        torch.optim.Adam([leaf], lr=0.1, fused=True).step()
    torch.testing.assert_close(ours, theirs.detach())


def test_arguments_that_require_grad_stay_connected():
    x = X.clone().requires_grad_()
    grad(lambda x: x.pow(3).sum())(x).sum().backward()
    torch.testing.assert_close(x.grad, 6 * X)


def test_a_tensor_closed_over_is_a_constant_where_it_does_not_require_grad():
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    connected = grad(lambda x: (w * x).square().sum())(X)
    assert connected.requires_grad
    torch.testing.assert_close(connected, 2 * X)
    result = grad(lambda x: (w.detach() * x).square().sum())(X)
    assert not result.requires_grad
    torch.testing.assert_close(result, 2 * X)


@given(st.booleans(), st.booleans(), st.sampled_from(["leaf", "computed"]))
def test_what_is_closed_over_stays_connected(over_members, nested, kind):
    """A tensor that requires grad, or one of a gradient around it (a penalty of a gradient)."""

    def penalized(of):
        def f(w):
            scale = w if kind == "leaf" else w.exp()
            inner = of(lambda x: (scale * x.pow(3)).sum())
            return (vmap(inner) if over_members else inner)(X).square().sum() + w.sum()

        return f

    w = X[0].clone()
    expected = torch.func.grad(penalized(torch.func.grad))(w)
    if nested:
        found = grad(penalized(grad))(w)
    else:
        penalized(grad)(w.requires_grad_()).backward()
        found = w.grad
    torch.testing.assert_close(found, expected)


def test_within_no_grad_and_what_does_not_depend_on_the_argument():
    with torch.no_grad():
        assert torch.equal(grad(lambda x: x.square().sum())(X), 2 * X)
    assert not grad(lambda p, x: x.sum())(TRAINABLE, X)["0", "weight"].any()  # no part of it
    partly = grad(lambda p: p["a"].sum())({"a": X, "b": X})
    assert not partly["b"].any()


def test_keywords_and_arguments_that_are_no_tensors():
    def f(params, scale, *, shift):
        return (scale * params["w"] + shift).square().sum()

    assert torch.equal(grad(f)({"w": X}, 2, shift=1.0)["w"], 4 * (2 * X + 1))


def test_nothing_is_changed():
    before = tree.map(torch.clone, TRAINABLE)
    grad(value)(TRAINABLE, X)
    identical(TRAINABLE, before)
    assert not any(leaf.requires_grad for leaf in tree.leaves(TRAINABLE))


@pytest.mark.parametrize(
    "call",
    [
        lambda g: g(lambda x: x)(X),  # no scalar
        lambda g: g(lambda x: x.sum(), has_aux=True)(X),  # no pair
        lambda g: g(lambda x: x.sum())(torch.arange(3)),  # integers
        lambda g: g(lambda x: x.sum(), 1)(X),  # no such argument
        lambda g: g(lambda x: x.sum(), (0, 0))(X),  # the same twice
        lambda g: g(lambda p: 1.0)(TensorDict({"a": X})),  # no tensor
    ],
)
def test_errors_are_torchs(call):
    with pytest.raises(Exception) as theirs:
        call(torch.func.grad)
    with pytest.raises(type(theirs.value)) as ours:
        call(grad)
    assert str(ours.value) == str(theirs.value)

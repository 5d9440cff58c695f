"""Every kind of control flow under every transform, eager and compiled, against torch.where.

One table: the rows are transforms, the columns are ways to write the same function of a flag,
parameters and inputs with one kind of control flow each.
"""

import functools

import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from funcnets import random, tree
from funcnets.compile import compile
from funcnets.control import cond, remat, route, scan, switch, while_loop

MEMBERS = 3


def deep(params, x):
    return torch.tanh(params["w"] * x).sum() * 2


def shallow(params, x):
    return (x * x * params["w"]).sin().sum()


def reference(flag, params, x):
    return torch.where(flag, deep(params, x), shallow(params, x))


def with_cond(flag, params, x):
    return cond(flag, deep, shallow, (params, x))


def with_closures(flag, params, x):
    return cond(flag, lambda: deep(params, x), lambda: shallow(params, x))


def with_nested_cond(flag, params, x):
    def other(params, x):
        return cond(~flag, lambda x: shallow(params, x), lambda x: x.sum(), (x,))

    return cond(flag, deep, other, (params, x))


def with_switch(flag, params, x):
    branches = [lambda params, x: params["w"].sum() * x.sum(), shallow, deep]
    return switch(flag.long() + 1, branches, (params, x))


def with_scan(flag, params, x, unroll=True):
    def turn(carry, scale):
        return carry + scale * cond(flag, deep, shallow, (params, x)), carry

    scales = torch.tensor([0.25, 0.75], dtype=x.dtype)
    return scan(turn, torch.zeros((), dtype=x.dtype), scales, unroll=unroll)[0]


def with_rolled_scan(flag, params, x):
    return with_scan(flag, params, x, unroll=False)


def with_bounded_while(flag, params, x):
    return with_while(flag, params, x, max_steps=2)


def with_while(flag, params, x, max_steps=None):
    def turn(i, total):
        return i + 1, total + reference(flag, params, x) / (1 + flag.long())

    start = torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=x.dtype)
    # The number of turns depends on the flag: one or two.
    return while_loop(lambda i, _: i < 1 + flag.long(), turn, start, max_steps=max_steps)[1]


def with_route(flag, params, x):
    batch = torch.stack([x, x + 1])
    index = torch.stack([flag, ~flag])
    per_sample = [
        lambda params, xs: torch.sin(xs * xs * params["w"]).sum(1),
        lambda params, xs: torch.tanh(params["w"] * xs).sum(1) * 2,
    ]
    return route(index, per_sample, params, batch)[0]


def with_remat(flag, params, x):
    inner = remat(lambda q: shallow(q, x))  # x is closed over
    return torch.where(flag, remat(deep)(params, x), inner(params))


COLUMNS = {
    f.__name__: f
    for f in (
        with_cond,
        with_closures,
        with_nested_cond,
        with_switch,
        with_scan,
        with_rolled_scan,
        with_bounded_while,
        with_while,
        with_route,
        with_remat,
    )
}


def summed(f, in_dims):
    return lambda *args: vmap(f, in_dims)(*args).sum()


def pushed(f):
    return lambda flag, params, x: jvp(
        lambda params, x: f(flag, params, x), (params, x), (tree.map(torch.cos, params), x + 1)
    )


def squared_gradient(f):
    return lambda flag, params, x: grad(f, 2)(flag, params, x).pow(2).sum()


OVER_PARAMS, OVER_INPUTS, OVER_FLAG, OVER_ALL = (
    (None, 0, None),
    (None, None, 0),
    (0, None, None),
    (0, 0, 0),
)
# Each row: the transform of a function, and over what it maps (which arguments are batched).
ROWS = {
    "forward": (lambda f: f, (None, None, None)),
    "grad": (lambda f: grad(f, (1, 2)), (None, None, None)),
    "grad(grad)": (lambda f: grad(squared_gradient(f), (1, 2)), (None, None, None)),
    "jvp": (pushed, (None, None, None)),
    "hessian": (lambda f: hessian(f, 2), (None, None, None)),
    "jacrev(jacrev)": (lambda f: jacrev(jacrev(f, 2), 2), (None, None, None)),
    "jacfwd(jacfwd)": (lambda f: jacfwd(jacfwd(f, 2), 2), (None, None, None)),
}
for over, dims in {
    "params": OVER_PARAMS,
    "inputs": OVER_INPUTS,
    "flag": OVER_FLAG,
    "all": OVER_ALL,
}.items():
    ROWS |= {
        f"vmap({over})": (lambda f, d=dims: vmap(f, d), dims),
        f"vmap(grad)({over})": (lambda f, d=dims: vmap(grad(f, (1, 2)), d), dims),
        f"grad(vmap)({over})": (lambda f, d=dims: grad(summed(f, d), (1, 2)), dims),
        f"vmap(jvp)({over})": (lambda f, d=dims: vmap(pushed(f), d), dims),
        f"vmap(jacrev(jacrev))({over})": (
            lambda f, d=dims: vmap(jacrev(jacrev(f, 2), 2), d),
            dims,
        ),
    }
ROWS["vmap(hessian)(all)"] = (lambda f: vmap(hessian(f, 2), OVER_ALL), OVER_ALL)
ROWS["vmap(vmap)(flag, then inputs)"] = (
    lambda f: vmap(vmap(f, OVER_INPUTS), OVER_FLAG),
    (0, None, 0),
)
ROWS["vmap(vmap(grad))(inputs, then flag)"] = (
    lambda f: vmap(vmap(grad(f, (1, 2)), OVER_FLAG), OVER_INPUTS),
    (0, None, 0),
)
REVERSE = [row for row in ROWS if any(word in row for word in ("grad", "jacrev", "hessian"))]


def arguments(seed, size, flags, in_dims):
    """A flag, parameters and inputs, each with a members' dimension where in_dims says so."""
    params_key, x_key = random.split(random.key(seed))

    def shape(dim):
        return (size,) if dim is None else (MEMBERS, size)

    flag = torch.tensor(flags[0]) if in_dims[0] is None else torch.tensor(flags)
    w = random.normal(params_key, shape(in_dims[1]), dtype=torch.float64)
    params = TensorDict({"w": w}, batch_size=[] if in_dims[1] is None else [MEMBERS])
    return flag, params, random.normal(x_key, shape(in_dims[2]), dtype=torch.float64)


def assert_same(actual, expected):
    actual, expected = pytree.tree_leaves(actual), pytree.tree_leaves(expected)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


flag_lists = st.lists(st.booleans(), min_size=MEMBERS, max_size=MEMBERS)


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("row", ROWS)
def test_eager(row, column):
    transform, in_dims = ROWS[row]

    @given(st.integers(0, 2**32), st.integers(1, 3), flag_lists)
    @settings(max_examples=4)
    def check(seed, size, flags):
        args = arguments(seed, size, flags, in_dims)
        assert_same(transform(COLUMNS[column])(*args), transform(reference)(*args))

    check()


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("row", ROWS)
def test_compiled(row, column):
    transform, in_dims = ROWS[row]
    # What AOTAutograd makes of the record is the same for all; it is tried on the first column.
    backend = "aot_eager" if column == "with_cond" else "eager"
    compiled = compile(transform(COLUMNS[column]), backend=backend)
    if column == "with_while" and row in REVERSE:
        with pytest.raises(RuntimeError, match="no reverse-mode derivative; give max_steps"):
            compiled(*arguments(0, 2, [True] * MEMBERS, in_dims))
        return

    @given(st.integers(0, 2**32), flag_lists)
    @settings(max_examples=4)
    def check(seed, flags):
        args = arguments(seed, 2, flags, in_dims)
        assert_same(compiled(*args), transform(reference)(*args))

    check()


@pytest.mark.parametrize("column", COLUMNS)
def test_autograd_without_torch_func(column):
    flag, params, x = arguments(0, 3, [True] * MEMBERS, (None, None, None))
    gradients = []
    compiled = compile(COLUMNS[column], backend="aot_eager")
    # What torch's own conditional cannot do, nested or with integers, and its loops.
    refused = {"with_switch", "with_while", "with_bounded_while"}
    if torch.__version__ < "2.15":
        refused.add("with_rolled_scan")
    for f in (COLUMNS[column], reference, compiled):
        w = params["w"].clone().requires_grad_()
        if f is compiled and column in refused:
            with pytest.raises(RuntimeError, match=r"torch.func.grad"):
                f(flag, TensorDict({"w": w}), x).backward()
            continue
        f(flag, TensorDict({"w": w}), x).backward()
        gradients.append(w.grad)
    assert_same(gradients[1:], [gradients[0]] * (len(gradients) - 1))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "operation",
    [
        lambda x: cond(x.sum() > 0, torch.sin, torch.cos, (x,)),
        lambda x: switch((x.sum() <= 0).long(), [torch.sin, torch.cos], (x,)),
        lambda x: while_loop(
            lambda i, _: i < 1, lambda i, x: (i + 1, x.sin()), (torch.tensor(0), x), max_steps=1
        )[1],
        lambda x: remat(torch.sin)(x),
    ],
    ids=["cond", "switch", "while_loop", "remat"],
)
def test_forward_over_reverse_of_a_vector_that_is_summed_outside(operation, compiled):
    """The cotangent of a sum is one number in many places, which forward mode cannot write to."""
    x = torch.tensor([[0.1, 0.2], [0.3, 0.5]], dtype=torch.float64)

    def f(x):
        return operation(x).sum()

    for transform in (hessian, lambda f: jacfwd(grad(f)), lambda f: lambda x: vmap(hessian(f))(x)):
        g = compile(transform(f), backend="aot_eager") if compiled else transform(f)
        for at in (x, 2 * x):
            assert_same(g(at), transform(lambda x: x.sin().sum())(at))


def test_a_hessian_per_member_of_a_conditional():
    f = vmap(hessian(with_cond, 2), OVER_FLAG)
    args = arguments(0, 2, [True, False, True], OVER_FLAG)
    assert_same(compile(f, backend="aot_eager")(*args), f(*args))
    assert_same(f(*args), vmap(hessian(reference, 2), OVER_FLAG)(*args))


@pytest.mark.parametrize("f", [torch.square, torch.exp, torch.sigmoid, lambda x: x * x.sin()])
def test_a_hessian_of_each_member_compiled(f):
    """Without any conditional: torch's zeros for absent tangents would end on the meta device."""
    x = torch.tensor([[0.1, 0.2, 0.3], [0.2, 0.4, 0.6]], dtype=torch.float64)
    for transform in (hessian, lambda f: jacfwd(grad(f))):
        mapped = vmap(transform(lambda x: f(x).sum()))
        assert_same(compile(mapped, backend="aot_eager")(x), mapped(x))


def test_purity():
    args = arguments(0, 3, [True, False, True], OVER_ALL)
    before = tree.map(torch.clone, args)
    for f in COLUMNS.values():
        once, again = (vmap(grad(f, (1, 2)))(*args) for _ in range(2))
        for a, b in zip(tree.leaves(once), tree.leaves(again), strict=True):
            assert torch.equal(a, b)
    assert all(map(torch.equal, tree.leaves(args), tree.leaves(before)))


def test_functools_partial_and_global_functions_as_branches():
    x = torch.tensor([1.0, -2.0])
    f = functools.partial(torch.mul, x)
    assert_same(grad(lambda y: cond(True, f, torch.neg, (y,)).sum())(x), x)
    compiled = compile(
        grad(lambda y, flag: cond(flag, functools.partial(torch.mul, y), torch.neg, (x,)).sum()),
        backend="aot_eager",
    )
    assert_same(compiled(x, torch.tensor(True)), x)
    assert_same(compiled(x, torch.tensor(False)), torch.zeros(2))

"""route against one sample at a time: order, gradients, who is called with what, and errors."""

import functools

import pytest
import torch
import torch.nn.functional as F
from control_cases import (
    assert_same,
    compiled,
    normal,
    per_member,
    pushed,
    tick,
    ticked,
    ticks,
    unchecked,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch.func import grad, vmap

import funcnets
from funcnets import random, tree
from funcnets.control import cond, route

RUN = {"eager": lambda f: f, "compiled": compiled}
WIDTH = 2


def linear(params, inputs):
    return {"y": inputs["x"] @ params["a"] + inputs["t"], "s": inputs["x"].sum(1).sin()}


def product(params, inputs):
    return {"y": inputs["x"] * params["b"], "s": inputs["t"][:, 0]}


def passed_on(params, inputs):
    return {"s": inputs["t"][:, 1].square(), "y": inputs["x"]}


BRANCHES = [linear, product, passed_on]


def one_by_one(index, branches, params, *inputs):
    """What route means."""
    if len(index) == 0:
        return branches[0](params, *inputs)
    samples = [
        branches[int(place)](params, *tree.map(lambda x, i=i: x[i : i + 1], inputs))
        for i, place in enumerate(index)
    ]
    return tree.map(lambda *parts: torch.cat(parts), *samples)


def setting(batch, *members):
    params = TensorDict(
        {"a": normal(0, *members, WIDTH, WIDTH), "b": normal(1, *members, WIDTH)},
        batch_size=members,
    )
    return params, {"x": normal(2, batch, WIDTH), "t": normal(3, batch, WIDTH)}


def loss(run, branches=BRANCHES):
    def f(index, params, inputs):
        out = run(index, branches, params, inputs)
        return (out["y"].sum(1).exp() * out["s"]).sum()

    return f


indices = st.lists(st.integers(0, 2), max_size=7)


@given(indices, st.sampled_from([torch.int64, torch.int32, torch.uint8]))
def test_every_sample_goes_its_own_way(index, dtype):
    params, inputs = setting(len(index))
    index = torch.tensor(index, dtype=dtype)
    assert_same(route(index, BRANCHES, params, inputs), one_by_one(index, BRANCHES, params, inputs))
    got = grad(loss(route), (1, 2))(index, params, inputs)
    assert_same(got, grad(loss(one_by_one), (1, 2))(index, params, inputs))


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("transform", ["forward", "grad", "jvp", "vmap(params)", "vmap(grad)"])
def test_compiled(transform, size):
    params, inputs = setting(size)
    many, _ = setting(size, 3)
    plain, routed = loss(one_by_one), loss(route)

    @given(st.lists(st.integers(0, 2), min_size=size, max_size=size))
    @settings(max_examples=6)
    def check(index):
        index = torch.tensor(index)
        if transform.startswith("vmap"):
            one = plain if transform == "vmap(params)" else grad(plain, 1)
            expected = per_member(one, index, many, inputs, in_dims=(None, 0, None))
            assert_same(f(index, many, inputs), expected)
        elif transform == "jvp":
            expected = pushed(lambda x: plain(index, params, inputs | {"x": x}))(inputs["x"])
            assert_same(f(index, params, inputs), expected)
        else:
            one = plain if transform == "forward" else grad(plain, (1, 2))
            assert_same(f(index, params, inputs), one(index, params, inputs))

    f = compiled(
        {
            "forward": routed,
            "grad": grad(routed, (1, 2)),
            "jvp": lambda i, p, xs: pushed(lambda x: routed(i, p, xs | {"x": x}))(xs["x"]),
            "vmap(params)": vmap(routed, (None, 0, None)),
            "vmap(grad)": vmap(grad(routed, 1), (None, 0, None)),
        }[transform]
    )
    check()


@given(st.lists(st.booleans(), max_size=6), st.sampled_from(list(RUN)))
@settings(max_examples=10)
def test_bool_masks(mask, run):
    """False takes the first branch, True the second."""
    params, inputs = setting(len(mask))
    mask = torch.tensor(mask, dtype=torch.bool)
    f = RUN[run](lambda mask, params, inputs: route(mask, BRANCHES[:2], params, inputs))
    expected = one_by_one(mask.long(), BRANCHES[:2], params, inputs)
    assert_same(f(mask, params, inputs), expected)


@pytest.mark.parametrize("run", RUN)
@pytest.mark.parametrize("over", ["params", "index", "inputs", "all"])
def test_vmap(over, run):
    @given(st.lists(st.lists(st.integers(0, 2), min_size=4, max_size=4), min_size=3, max_size=3))
    @settings(max_examples=5)
    def check(index):
        index = torch.tensor(index)
        params, inputs = setting(4, 3)
        inputs = {name: torch.stack([x, 2 * x, x - 1]) for name, x in inputs.items()}
        args = [
            arg if dim == 0 else tree.map(lambda x: x[0], arg)
            for arg, dim in zip((index, params, inputs), dims, strict=True)
        ]
        for f, plain in functions:
            assert_same(f(*args), per_member(plain, *args, in_dims=dims))

    names = ("index", "params", "inputs")
    dims = tuple(0 if over in (name, "all") else None for name in names)
    functions = [
        (RUN[run](vmap(of(loss(route)), dims)), of(loss(one_by_one)))
        for of in (lambda f: f, lambda f: grad(f, (1, 2)))
    ]
    check()


def recording(sizes, ran, name):
    def branch(params, x):
        sizes.append((name, len(x)))
        ran.append(name)
        return x * params

    return branch


@given(indices)
def test_each_branch_is_called_once_and_gets_its_own_samples(index):
    sizes, ran = [], []
    branches = [recording(sizes, ran, i) for i in range(3)]
    route(
        torch.tensor(index, dtype=torch.int64), branches, torch.tensor(2.0), normal(0, len(index))
    )
    assert sizes == ([(i, index.count(i)) for i in range(3) if i in index] or [(0, 0)])
    # The same under grad, and under a vmap that shares the index.
    sizes.clear()
    f = vmap(
        lambda p: route(torch.tensor(index, dtype=torch.int64), branches, p, normal(0, len(index)))
    )
    f(torch.ones(2))
    assert sizes == ([(i, index.count(i)) for i in range(3) if i in index] or [(0, 0)])


def test_where_the_index_differs_between_members_each_branch_is_called_once():
    sizes, ran = [], []
    branches = [recording(sizes, ran, i) for i in range(4)]
    x = normal(0, 3)
    index = torch.tensor([[0, 0, 2], [2, 3, 0]])
    got = vmap(lambda i: route(i, branches, torch.tensor(2.0), x))(index)
    assert_same(got, (2 * x).expand(2, 3))
    assert ran == [0, 2, 3]


@pytest.mark.parametrize("transform", [lambda f: f, lambda f: grad(lambda i, x: f(i, x).sum(), 1)])
def test_compiled_a_branch_that_no_sample_takes_does_not_run(transform):
    def branch(i, _, x):
        inner = cond(x.sum() > 0, lambda: x * (1 + 0 * tick(x, str(i))), lambda: 2 * x)
        return inner * (1 + 0 * tick(x, str(i)))

    branches = [functools.partial(branch, i) for i in range(3)]
    f = compiled(transform(lambda index, x: route(index, branches, None, x)))
    x = normal(0, 2)
    f(torch.tensor([0, 1]), x)
    for index in ([0, 1], [2, 2], [1, 2]):
        ticks.clear()
        f(torch.tensor(index), x)
        assert set(ticks) == set(map(str, index))


def scaled(name):
    return lambda scale, x: (x * scale).sin() * (1 + 0 * tick(x, name))


@pytest.mark.parametrize("transform", [lambda f: f, lambda f: grad(lambda *a: f(*a).sum(), 1)])
def test_compiled_a_branch_is_given_its_own_samples_alone(transform):
    def f(index, scale, x):
        return route(index, [scaled("0"), scaled("1"), scaled("2")], scale, x)

    g, plain = compiled(transform(f)), transform(f)
    scale, x = normal(0, 2), normal(1, 5, 2)

    @given(st.lists(st.integers(0, 2), min_size=5, max_size=5))
    def check(index):
        expected = plain(torch.tensor(index), scale, x)
        ticked.clear()
        assert_same(g(torch.tensor(index), scale, x), expected)
        assert set(ticked) == {(str(i), index.count(i)) for i in index}

    check()


@pytest.mark.parametrize("transform", [lambda f: f, lambda f: grad(lambda *a: f(*a).sum(), 1)])
def test_compiled_a_route_in_a_branch_runs_on_whole_batches(transform):
    """And so does the one around it: at no samples some kernels of torch crash."""

    def inner(scale, ways, x):
        return route(
            ways, [lambda p, x, i=i: scaled(f"1{i}")(p, x) + i for i in range(2)], scale, x
        )

    def outer(index, scale, ways, x):
        return route(index, [lambda p, _, x: scaled("0")(p, x), inner], scale, ways, x)

    f, plain = compiled(transform(outer)), transform(outer)
    scale, x = normal(0, 2), normal(1, 5, 2)

    @given(st.lists(st.sampled_from(["0", "10", "11"]), min_size=5, max_size=5))
    def check(names):
        index = torch.tensor([int(name[0]) for name in names])
        ways = torch.tensor([int(name[-1]) for name in names])
        expected = plain(index, scale, ways, x)
        ticked.clear()
        assert_same(f(index, scale, ways, x), expected)
        assert set(ticked) == {(name, 5) for name in names}

    check()


def test_compiled_a_branch_may_ask_how_many_samples_it_has():
    """Which nobody knows beforehand: it gets the whole batch."""

    def sized(scale, x):
        return scaled("sized")(scale, x).reshape(len(x), 2)

    f = compiled(lambda index, scale, x: route(index, [sized, scaled("other")], scale, x))
    scale, x = normal(0, 2), normal(1, 4, 2)
    for index in ([0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]):
        ticked.clear()
        got = f(torch.tensor(index), scale, x)
        assert set(ticked) == {(("sized", "other")[i], 4) for i in index}
        assert_same(got, (x * scale).sin())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_with_keys_and_batch_sizes_each_branch_has_its_own(backend):
    """Keys are of uint64, and a TensorDict's batch size is of no known size in a branch."""

    def advanced(i):
        def branch(scale, keys, held):
            return {"y": scaled(str(i))(scale, held["x"]), "keys": keys}

        return branch

    def f(index, scale, keys, held):
        return route(index, [advanced(0), advanced(1)], scale, keys, held)

    keys, scale = random.split(random.key(0), 4), normal(0, 2)
    held = TensorDict({"x": normal(1, 4, 2)}, batch_size=[4])
    index = torch.tensor([0, 1, 1, 1])
    expected = f(index, scale, keys, held)
    g = funcnets.compile(f, backend=backend)
    ticked.clear()
    assert_same(g(index, scale, keys, held), expected)
    assert set(ticked) == {("0", 1), ("1", 3)}


def test_compiled_a_route_within_try_is_as_elsewhere():
    def f(index, x):
        try:
            return route(index, [lambda _, x: x + 1, lambda _, x: 2 * x], None, x)
        except Exception:
            return 0 * x

    index, x = torch.tensor([0, 1, 1]), normal(0, 3)
    assert_same(compiled(f)(index, x), f(index, x))


def test_what_a_backend_cannot_compile_is_given_whole_batches():
    seen = []

    def backend(graph, inputs):
        seen.append(any("nonzero" in part.code for part in graph.modules() if part is not graph))
        if seen[-1]:
            raise RuntimeError("batches of any size")
        return graph

    @funcnets.compile(backend=backend)
    def f(index, scale, x):
        return route(index, [scaled("one"), scaled("other")], scale, x)

    scale, x = normal(0, 2), normal(1, 4, 2)
    assert_same(f(torch.tensor([0, 1, 1, 0]), scale, x), (x * scale).sin())
    assert seen == [True, False]


def test_inductor_lays_out_convolutions_as_it_says():
    """It did not where the size of the batch is unknown: the strides were others at run time."""

    def convolved(factor):
        def branch(w, x):
            return factor * F.conv2d(F.conv2d(x, w, padding=1).relu(), w, padding=1).sum((2, 3))

        return branch

    @grad
    def gradient(w, index, x):
        return route(index, [convolved(1), convolved(2)], w, x).square().sum()

    f = funcnets.compile(gradient)
    w, x = normal(0, 3, 3, 3, 3), normal(1, 5, 3, 4, 4)
    for given_x in (x, x.contiguous(memory_format=torch.channels_last)):
        for index in ([0, 1, 1, 0, 1], [1, 1, 1, 1, 1]):
            index = torch.tensor(index)
            assert_same(f(w, index, given_x), gradient(w, index, given_x))


@pytest.mark.parametrize("run", RUN)
@pytest.mark.parametrize("way", ["plain", "vmap(index)", "vmap(both)"])
def test_a_sample_never_sees_another_branch(way, run):
    """Neither do a member's parameters, where none of its samples goes there."""

    def f(index, w, x):
        roots = route(index, [lambda w, x: torch.sqrt(w * x), lambda w, x: w * x * x], w, x)
        return roots.sum()

    # The root is of positive numbers where it is taken, and of none or negative ones elsewhere.
    index = torch.tensor([[0, 1, 0], [1, 1, 1], [1, 0, 1]])
    x = torch.where(index == 0, 2.0, -1.0).double() + torch.arange(3) / 7
    x[1, 0] = 0.0
    w = torch.tensor([1.0, -3.0, 2.0]).double()
    for g in (f, grad(f, (1, 2))):
        if way == "plain":
            for i in range(3):
                assert_same(RUN[run](g)(index[i], w[i], x[i]), finite(g(index[i], w[i], x[i])))
            continue
        dims = (0, None, 0) if way == "vmap(index)" else (0, 0, 0)
        args = index, w[0] if way == "vmap(index)" else w, x
        assert_same(RUN[run](vmap(g, dims))(*args), finite(per_member(g, *args, in_dims=dims)))


def finite(result):
    assert all(leaf.isfinite().all() for leaf in tree.leaves(result))
    return result


@pytest.mark.parametrize("run", RUN)
def test_keys_as_inputs(run):
    def f(index, keys):
        draws = [
            lambda _, keys: vmap(lambda key: random.normal(key, (2,)))(keys),
            lambda _, keys: vmap(lambda key: random.uniform(key, (2,)))(keys),
        ]
        return route(index, draws, None, keys)

    index, keys = torch.tensor([[0, 1, 1], [1, 1, 1]]), random.split(random.key(0), 3)
    assert_same(RUN[run](f)(index[0], keys), f(index[0], keys))
    assert_same(
        RUN[run](vmap(f, (0, None)))(index, keys), per_member(f, index, keys, in_dims=(0, None))
    )


def test_closed_over_tensors_are_differentiated():
    x, index = normal(0, 4), torch.tensor([0, 1, 1, 0])

    def f(w):
        return route(index, [lambda _, x: w * x, lambda _, x: (w * x).sin()], None, x).sum()

    w = torch.tensor(2.0).double()
    expected = grad(lambda w: torch.where(index == 0, w * x, (w * x).sin()).sum())(w)
    for run in RUN.values():
        assert_same(run(grad(f))(w), expected)


@pytest.mark.parametrize(
    ("index", "error", "pattern"),
    [
        (torch.tensor([0.0, 1.0]), TypeError, r"got float32\[2\]"),
        (torch.tensor([[0, 1]]), TypeError, r"got int64\[1, 2\]"),
        (torch.tensor(0), TypeError, r"got int64\[\]"),
        ([0, 1], TypeError, "got list"),
        (torch.tensor([0, 3]), ValueError, "values from 0 to 2, got values from 0 to 3"),
        (torch.tensor([-1, 2]), ValueError, "values from 0 to 2, got values from -1 to 2"),
        (torch.tensor([True, False]), ValueError, "2 branches for a boolean index, got 3"),
        (torch.tensor([0, 1, 2]), ValueError,
         r"inputs: 0: expected a batch of 3 .* got float64\[2\]"),
    ],
)  # fmt: skip
def test_indices_that_do_not_fit(index, error, pattern):
    with pytest.raises(error, match=f"route: .*{pattern}"):
        unchecked(route)(index, [lambda p, x: x] * 3, None, normal(0, 2))


def test_an_index_out_of_range():
    branches, x = [lambda p, x: x, lambda p, x: -x], normal(0, 2)
    index = torch.tensor([[0, 1], [1, 2]])
    with pytest.raises(ValueError, match="values from 0 to 1, got values from 0 to 2"):
        vmap(lambda i: route(i, branches, None, x))(index)
    with pytest.raises(ValueError, match="values from 0 to 1, got values from 1 to 2"):
        vmap(lambda p: route(index[1], branches, p, x))(torch.ones(2))
    # Compiled, clamped.
    assert_same(compiled(lambda i: route(i, branches, None, x))(torch.tensor([-1, 7])),
                torch.stack([x[0], -x[1]]))  # fmt: skip


def test_no_branches_and_inputs_without_a_batch():
    with pytest.raises(ValueError, match="at least one branch, got none"):
        route(torch.tensor([0]), [], None)
    for wrong, got in ((torch.tensor(1.0), r"float32\[\]"), (1.0, "float")):
        with pytest.raises(ValueError, match=rf"inputs: 0\.x: expected a batch of 1 .* got {got}"):
            route(torch.tensor([0]), [lambda p, x: x], None, {"x": wrong})


@pytest.mark.parametrize("run", ["eager", "compiled", "vmap", "compiled(vmap)"])
@pytest.mark.parametrize(
    ("error", "pattern", "branch"),
    [
        (ValueError, r"y float64\[0\].*y float64\[0, 1\]", lambda p, x: {"y": x[:, None]}),
        (ValueError, r"y float64\[0\].*y float32\[0\]", lambda p, x: {"y": x.float()}),
        (ValueError, r"branch 0 returns y .*branch 1 returns z ", lambda p, x: {"z": x}),
        (ValueError, r"branch 0 returns y .*branch 1 returns \(root\) ", lambda p, x: x),
        (ValueError, r"branch 1: y: expected a batch of \d, got float64\[\]",
         lambda p, x: {"y": x.sum()}),
        (TypeError, r"branch 1: y: expected a tensor, got float", lambda p, x: {"y": 1.0}),
    ],
)  # fmt: skip
def test_outputs_that_do_not_fit(error, pattern, branch, run):
    def f(index):
        return route(index, [lambda p, x: {"y": x}, branch], None, normal(0, 3))

    index = torch.tensor([[0, 1, 0], [1, 0, 0]])
    run, index = {
        "eager": (f, index[0]),
        "compiled": (compiled(f), index[0]),
        "vmap": (vmap(f), index),
        "compiled(vmap)": (compiled(vmap(f)), index),
    }[run]
    with pytest.raises(error, match=f"route: .*{pattern}"):
        run(index)


# --- plain torch.compile -----------------------------------------------------------------------


@pytest.mark.dynamo
def test_plain_torch_compile():
    def f(index, w, x):
        branches = [lambda w, x: {"y": w * x}, lambda w, x: {"y": (w + x).sin()}]
        return route(index, branches, w, x)["y"].square().sum()

    g = torch.compile(f, fullgraph=True, backend="aot_eager")
    for index in ([0, 1, 1], [1, 1, 1], [0, 0, 0]):
        results = []
        for h in (f, g):
            w, x = normal(0, 3, 2).requires_grad_(), normal(1, 3, 2).requires_grad_()
            result = h(torch.tensor(index), w[0], x)
            results.append((result.detach(), torch.autograd.grad(result, (w, x))))
        assert_same(results[1], results[0])

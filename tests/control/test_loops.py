"""scan against a Python loop and torch's own scan; while_loop against a Python loop per member."""

import functools
from typing import Any, NamedTuple

import pytest
import torch
from control_cases import assert_same, compiled, normal, per_member, pushed, tick, ticks, unchecked
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch._higher_order_ops.scan import scan as torch_scan
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from funcnets import _torch
from funcnets.compile import compile
from funcnets.control import cond, scan, while_loop

RUN = {"eager": lambda f: f, "compiled": compiled}


# --- scan --------------------------------------------------------------------------------------


SCANS = RUN | {"rolled": compiled}


def scan_by(run):
    """scan, as one node of the compiled graph where that is how it is run."""
    return functools.partial(scan, unroll=run != "rolled")


def turn(carry, x):
    new = {"a": carry["a"] * 0.5 + x[0].sum(), "b": (carry["b"][0] + x[1].sum(),)}
    return new, [x[0] * new["a"], {"none": None, "total": new["b"][0]}]


def start():
    return {"a": torch.tensor(1.0).double(), "b": (torch.zeros(2).double(),)}


def loop(combine, carry, xs, dim, reverse):
    """What scan means."""
    turns = xs[0].shape[dim]
    ys = [None] * turns
    for i in reversed(range(turns)) if reverse else range(turns):
        carry, ys[i] = combine(carry, tuple(x.select(dim, i) for x in xs))
    return carry, ys


@given(
    st.integers(1, 4),
    st.lists(st.integers(1, 3), min_size=0, max_size=2),
    st.integers(-3, 2),
    st.booleans(),
    st.sampled_from(list(SCANS)),
)
def test_scan_is_a_loop(turns, rest, dim, reverse, run):
    dim = max(-len(rest) - 1, min(dim, len(rest)))
    shape = list(rest)
    shape.insert(dim % (len(rest) + 1), turns)
    xs = normal(0, *shape), normal(1, *shape)
    f = SCANS[run](lambda c, xs: scan_by(run)(turn, c, xs, dim=dim, reverse=reverse))
    carry, (first, second) = f(start(), xs)
    expected, ys = loop(turn, start(), xs, dim, reverse)
    assert_same(carry, expected)
    # y of the shape of a slice: stacked as the slices of xs were.
    assert_same(first, torch.stack([y[0] for y in ys], dim))
    assert second["none"] is None
    assert first.shape == xs[0].shape
    totals = [y[1]["total"] for y in ys]
    assert_same(second["total"], torch.stack(totals, dim if -2 <= dim <= 1 else 0))


@given(
    st.integers(0, 2),
    st.booleans(),
    st.integers(0, 3),
    st.integers(0, 2),
)
@settings(max_examples=10)
def test_scan_stacks_as_torchs_scan_does(dim, reverse, ndim, carry_ndim):
    """Outputs of more, fewer and as many dimensions as the slices."""
    xs = normal(0, 2, 3, 4)
    carry = normal(1, *[2] * carry_ndim)

    def combine(carry, x):
        return carry * 0.5 + x.mean(), x.sum() * torch.ones([2, 3, 4][:ndim], dtype=x.dtype) + 1

    got = scan(combine, carry, xs, dim=dim, reverse=reverse)
    turns, ys = xs.shape[dim], []
    ours = carry
    for i in reversed(range(turns)) if reverse else range(turns):
        ours, y = combine(ours, xs.select(dim, i))
        ys.append(y)
    stacked = torch.stack(ys[::-1] if reverse else ys)
    # torch/_higher_order_ops/scan.py: movedim(out, 0, dim) "if dim < elem.ndim else elem"
    expected = stacked.movedim(0, dim) if dim < stacked.ndim else stacked
    assert_same(got, (ours, expected))


@pytest.mark.dynamo
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("reverse", [False, True])
def test_torchs_own_scan(dim, reverse):
    if dim and torch.__version__ < "2.15":
        pytest.skip("torch's scan (2.11) stacked its outputs in front, whatever dim was")

    def combine(carry, x):
        return carry * 0.5 + x, {"y": carry * x, "sum": x.sum()}

    xs, carry = normal(0, 3, 3), normal(1, 3)
    assert_same(
        scan(combine, carry, xs, dim=dim, reverse=reverse),
        torch_scan(combine, carry, xs, dim=dim, reverse=reverse),
    )


@pytest.mark.parametrize("run", SCANS)
def test_scan_without_xs(run):
    f = SCANS[run](lambda c: scan_by(run)(lambda c, x: (c * 2, (c, x)), c, length=3))
    carry, (ys, none) = f(torch.tensor(1.0))
    assert carry == 8
    assert ys.tolist() == [1, 2, 4]
    assert none is None


@pytest.mark.parametrize("run", SCANS)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_scan_of_no_turns(run, dim):
    def f(c, xs):
        return scan_by(run)(
            lambda c, x: (
                c + 1 + x["a"].sum(),
                {"y": x["a"], "n": x["i"].sum(), "wide": c.expand(2, 2)},
            ),
            c,
            xs,
            dim=dim,
        )

    xs = {"a": torch.empty((2, 0) if dim else (0, 2)), "i": torch.empty((2, 0) if dim else (0, 2))}
    xs["i"] = xs["i"].long()
    c = torch.tensor(3.0)
    carry, ys = SCANS[run](f)(c, xs)
    assert_same(carry, c)
    assert ys["y"].shape == xs["a"].shape
    assert ys["n"].shape == (0,)
    assert ys["n"].dtype == torch.int64
    assert ys["wide"].shape == {0: (0, 2, 2), 1: (2, 0, 2), -1: (2, 2, 0)}[dim]
    assert SCANS[run](grad(lambda c: f(c, xs)[0] + f(c, xs)[1]["wide"].sum()))(c) == 1
    mapped = SCANS[run](vmap(lambda c: f(c, xs)))(torch.ones(3))
    assert mapped[0].shape == (3,)
    assert mapped[1]["y"].shape == (3, *xs["a"].shape)
    empty = SCANS[run](lambda c: scan_by(run)(lambda c, _: (c, c), c, length=0))(torch.ones(2))
    assert empty[1].shape == (0, 2)


@pytest.mark.parametrize(
    ("error", "pattern", "arguments"),
    [
        (ValueError, "equal lengths .* a 2, b 3", {"xs": {"a": torch.ones(2), "b": torch.ones(3)}}),
        (ValueError, "equal lengths .* length 3, a 2", {"xs": {"a": torch.ones(2)}, "length": 3}),
        (ValueError, "expected xs or a length, got neither", {}),
        (ValueError, "expected xs or a length, got neither", {"xs": {}}),
        (ValueError, "length: expected at least 0, got -1", {"length": -1}),
        (ValueError, "length: expected an int, got 2.0", {"length": 2.0}),
        (ValueError, r"xs: 1: .* dimension 1, got float32\[2\]",
         {"xs": (torch.ones(2, 2), torch.ones(2)), "dim": 1}),
        (ValueError, r"dimension 0, got float32\[\]", {"xs": torch.tensor(1.0)}),
        (ValueError, r"xs: 0: .* got float", {"xs": [1.0]}),
    ],
)  # fmt: skip
def test_scan_sequences_that_do_not_fit(error, pattern, arguments, unchecked):
    with pytest.raises(error, match=f"scan: .*{pattern}"):
        scan(lambda c, x: (c, c), torch.tensor(0.0), **arguments)


@pytest.mark.parametrize("run", SCANS)
@pytest.mark.parametrize(
    ("error", "pattern", "combine"),
    [
        (ValueError, r"carry so far.*float32\[2\].*float32\[4\]", lambda c, x: (c.repeat(2), x)),
        (ValueError, r"carry so far.*float32\[2\].*float64\[2\]", lambda c, x: (c.double(), x)),
        (ValueError, r"carry so far.*0 float32\[2\]", lambda c, x: ([c], x)),
        (TypeError, r"combine_fn: \(root\): expected a tensor, got int", lambda c, x: (1, x)),
        (TypeError, r"combine_fn: output: 1: expected a tensor, got str",
         lambda c, x: (c, (x, "y"))),
        (TypeError, r"expected \(carry, output\), got float32\[2\]", lambda c, x: c),
        (TypeError, r"expected \(carry, output\), got tuple", lambda c, x: (c, x, x)),
        (TypeError, r"expected \(carry, output\), got list", lambda c, x: [c, x]),
    ],
)  # fmt: skip
def test_scan_turns_that_do_not_fit(error, pattern, combine, run):
    with pytest.raises(error, match=f"scan: .*{pattern}"):
        SCANS[run](lambda c, xs: scan_by(run)(combine, c, xs))(torch.ones(2), torch.ones(3))


def test_scan_outputs_that_change_from_turn_to_turn():
    sizes = iter([2, 3])
    with pytest.raises(ValueError, match=r"the first turn.*float32\[2\].*float32\[3\]"):
        scan(lambda c, x: (c, torch.ones(next(sizes))), torch.tensor(0.0), torch.ones(2))
    with pytest.raises(TypeError, match="scan: init: a: expected a tensor, got float"):
        scan(lambda c, x: (c, x), {"a": 1.0}, torch.ones(2))


@pytest.mark.parametrize("run", SCANS)
def test_names_of_a_carry_may_change_their_order(run):
    def swap(c, x):
        return {"b": c["b"] * x, "a": c["a"] + x}, None

    f = SCANS[run](lambda c, xs: scan_by(run)(swap, c, xs))
    carry, ys = f({"a": torch.tensor(0.0), "b": torch.tensor(1.0)}, torch.tensor([2.0, 3.0]))
    assert_same(dict(sorted(carry.items())), {"a": torch.tensor(5.0), "b": torch.tensor(6.0)})
    assert ys is None


@given(st.booleans(), st.integers(1, 3), st.sampled_from(list(SCANS)))
@settings(max_examples=6)
def test_scan_under_vmap_and_grad(reverse, turns, run):
    def f(w, c, xs):
        final, ys = scan_by(run)(
            lambda c, x: (torch.tanh(w * c + x), c * x), c, xs, dim=1, reverse=reverse
        )
        return (final * ys.sum()).sum()

    args = normal(0, 3, 2), normal(1, 3, 2), normal(2, 3, 2, turns)
    for g in (f, grad(f, (0, 1, 2)), pushed(f)):
        assert_same(SCANS[run](vmap(g))(*args), per_member(g, *args))


def graphs_of(f, *args):
    """Every graph, those of subgraphs included, that compiling f for these arguments makes."""
    found = []

    def backend(graph, inputs):
        found.extend(m for m in graph.modules() if isinstance(m, torch.fx.GraphModule))
        return graph

    result = compile(f, backend=backend)(*args)
    return found, result


@pytest.mark.parametrize(
    ("transform", "members", "nodes"),
    [
        (lambda f: f, (), 1),
        (lambda f: vmap(f, (None, 0)), (3,), 1),
        (grad, (), 2),
        (lambda f: vmap(grad(f), (None, 0)), (3,), 2),
    ],
    ids=["forward", "vmap", "grad", "vmap(grad)"],
)
def test_a_rolled_scan_is_one_node_of_a_graph_whose_size_is_the_same_for_every_length(
    transform, members, nodes
):
    def f(w, xs):
        return scan(lambda c, x: (torch.sin(w * c) + x, None), w, xs, unroll=False)[0].sum()

    sizes = []
    for turns in (2, 30):
        args = normal(0, 2), normal(1, *members, turns, 2)
        graphs, result = graphs_of(transform(f), *args)
        assert_same(result, transform(f)(*args))
        targets = [node.target for graph in graphs for node in graph.graph.nodes]
        assert targets.count(_torch.scan_node) == nodes
        sizes.append(len(targets))
    assert sizes[0] == sizes[1]


def test_rolled_scans_within_one_another_and_around_control_flow():
    def f(w, xs, unroll):
        def inner(c, x):
            new = cond(x.sum() > 0, lambda c: torch.sin(c * w), lambda c: c - w, (c,))
            return new, {"s": new.sum()}

        def outer(c, row):
            last, found = scan(inner, c, row, unroll=unroll)
            return (last + c), found

        last, found = scan(outer, w, xs, unroll=unroll)
        return (last * found["s"].square().sum()).sum()

    args = normal(0, 2), normal(1, 3, 4, 2)
    for transform in (lambda f: f, lambda f: grad(f, (0, 1)), lambda f: vmap(grad(f), (None, 1))):
        rolled = compiled(transform(lambda w, xs: f(w, xs, unroll=False)))
        assert_same(rolled(*args), transform(lambda w, xs: f(w, xs, unroll=True))(*args))


@given(st.booleans(), st.integers(2, 4))
@settings(max_examples=4)
def test_second_derivatives_of_a_rolled_scan(reverse, turns):
    def f(w, c, xs, unroll):
        def turn(c, x):
            new = torch.tanh(w * c["h"].flip(0) + x)
            return {"h": new, "n": c["n"] + 1}, new.square().sum() * c["n"]

        start = {"h": c, "n": torch.tensor(0)}
        last, ys = scan(turn, start, xs, reverse=reverse, unroll=unroll)
        return (last["h"] * ys.sum()).sum()

    def slope(*args):
        return sum(part.square().sum() for part in grad(f, (0, 1, 2))(*args))

    args = normal(0, 2), normal(1, 2), normal(2, turns, 2)
    batch = (*args[:2], torch.stack([args[2], 2 * args[2]]))
    for transform, inputs in (
        (lambda g: grad(slope, (0, 1, 2)), args),
        (lambda g: hessian(g, 1), args),
        (lambda g: jacfwd(jacfwd(g, 0), 0), args),
        (lambda g: vmap(grad(slope, (0, 2)), (None, None, 0, None)), batch),
    ):
        rolled = compiled(lambda *args, t=transform: t(f)(*args, False))
        assert_same(rolled(*inputs), transform(f)(*inputs, True))


@pytest.mark.parametrize("carry", [(), {"a": torch.tensor(1), "b": torch.tensor(2.0)}])
def test_rolled_scans_of_carries_without_numbers_or_derivatives(carry):
    def f(w, xs):
        last, ys = scan(lambda c, x: (c, x * w), carry, xs, unroll=False)
        return ys.sum(), last

    def value_and_gradients(w, xs):
        return grad(f, (0, 1), has_aux=True)(w, xs)

    args = normal(0, 2), normal(1, 3, 2)
    expected = args[1].sum(0), args[0].expand(3, 2)
    assert_same(compiled(value_and_gradients)(*args), (expected, carry))


@pytest.mark.dynamo
def test_plain_torch_compile_lays_a_rolled_scan_out():
    def f(w, xs):
        return scan(lambda c, x: (c * w + x, c), w, xs, unroll=False)

    args = normal(0, 2), normal(1, 3, 2)
    assert_same(torch.compile(f, fullgraph=True, backend="aot_eager")(*args), f(*args))


# --- while_loop --------------------------------------------------------------------------------


def halve(limit, x):
    """How often x is halved until it is below the limit, and what is left."""
    return while_loop(
        lambda n, x: x.abs() > limit,
        lambda n, x: (n + 1, x * 0.5),
        (torch.tensor(0), x),
    )


@given(st.lists(st.sampled_from([0.1, 1.0, 3.0, 100.0]), min_size=1, max_size=4),
       st.sampled_from(list(RUN)))  # fmt: skip
@settings(max_examples=6)
def test_each_member_stops_by_itself(values, run):
    x, limit = torch.tensor(values, dtype=torch.float64), torch.tensor(1.0).double()
    maps = {"x": (None, 0), "both": (0, 0), "limit": (0, None)}
    for over, dims in maps.items():
        args = (
            limit if dims[0] is None else torch.linspace(1, 2, len(values)).double(),
            x if dims[1] == 0 else x[0],
        )
        expected = per_member(halve, *args, in_dims=dims)
        assert_same(RUN[run](vmap(halve, dims))(*args), expected)
        turns = [int(n) for n in expected[0]]
        assert over != "x" or turns == [{0.1: 0, 1.0: 0, 3.0: 2, 100.0: 7}[v] for v in values]


@given(
    st.sampled_from([0.5, 3.0, 100.0]), st.sampled_from([0, 1, 2, 10]), st.sampled_from(list(RUN))
)
@settings(max_examples=6)
def test_max_steps_bounds_the_turns(value, max_steps, run):
    def f(x):
        return while_loop(
            lambda n, x: x > 1, lambda n, x: (n + 1, x / 2), (torch.tensor(0), x),
            max_steps=max_steps,
        )  # fmt: skip

    turns = min({0.5: 0, 3.0: 2, 100.0: 7}[value], max_steps)
    x = torch.tensor(value).double()
    assert_same(RUN[run](f)(x), (torch.tensor(turns), x / 2**turns))
    assert_same(RUN[run](grad(lambda x: f(x)[1]))(x), torch.tensor(0.5**turns).double())
    xs = torch.stack([x, x / 4])
    assert_same(
        RUN[run](vmap(grad(lambda x: f(x)[1])))(xs), per_member(grad(lambda x: f(x)[1]), xs)
    )


@pytest.mark.parametrize("max_steps", [-1, 2.5])
def test_max_steps_that_are_none(max_steps, unchecked):
    with pytest.raises(
        ValueError, match=f"while_loop: max_steps: .* of at least 0, got {max_steps}"
    ):
        while_loop(lambda n: n < 3, lambda n: (n + 1,), (torch.tensor(0),), max_steps=max_steps)


@pytest.mark.parametrize("max_steps", [None, 5])
@pytest.mark.parametrize("run", RUN)
@pytest.mark.parametrize("closed_over", [True, False])
def test_a_member_that_has_stopped_is_not_evaluated_where_it_must_not_be(
    run, max_steps, closed_over
):
    """The square root of how much is left: not defined once nothing is."""

    def f(y):
        if closed_over:
            return while_loop(
                lambda n, s: n < y,
                lambda n, s: (n + 1, s + torch.sqrt(y - n)),
                (torch.zeros_like(y), torch.zeros_like(y)),
                max_steps=max_steps,
            )[1]
        return while_loop(
            lambda n, s, y: n < y,
            lambda n, s, y: (n + 1, s + torch.sqrt(y - n), y),
            (torch.zeros_like(y), torch.zeros_like(y), y),
            max_steps=max_steps,
        )[1]

    ys = torch.tensor([1.0, 4.0, 0.0, 2.0], dtype=torch.float64)
    transforms = [(vmap(f), f), (vmap(pushed(f)), pushed(f))]
    if run == "eager" or max_steps is not None:
        transforms += [(vmap(grad(f)), grad(f)), (grad(lambda y: vmap(f)(y).sum()), grad(f))]
    for mapped, one in transforms:
        expected = per_member(one, ys)
        assert_same(RUN[run](mapped)(ys), expected)
    nested = ys.reshape(2, 2)
    assert_same(RUN[run](vmap(vmap(f)))(nested), per_member(f, ys).reshape(2, 2))


@pytest.mark.parametrize("run", RUN)
def test_no_turn_at_all(run):
    x = torch.tensor([1.0, 2.0])
    ticks.clear()
    f = RUN[run](
        lambda x: while_loop(lambda x: x.sum() < 0, lambda x: (x * tick(x, "body"),), (x,))
    )
    (got,) = f(x)
    assert_same(got, x)
    assert ticks == []


def test_a_body_runs_as_often_as_the_loop_turns():
    for run in RUN.values():
        f = run(
            lambda n: while_loop(
                lambda i, n: i < n, lambda i, n: (i + 1 + tick(i, "b") * 0, n), (n * 0, n)
            )
        )
        for turns in (0, 1, 4):
            f(torch.tensor(turns))
            ticks.clear()
            assert f(torch.tensor(turns))[0] == turns
            assert len(ticks) == turns


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_loops_turn_as_often_as_the_numbers_say(backend):
    f = compile(halve, backend=backend)
    g = compile(vmap(halve, (None, 0)), backend=backend)
    h = compile(pushed(lambda x: halve(torch.tensor(1.0), x)[1]), backend=backend)
    limit = torch.tensor(1.0)
    for value in (0.5, 5.0, 1000.0):
        x = torch.tensor(value, dtype=torch.float64)
        assert_same(f(limit, x), halve(limit, x))
        xs = torch.stack([x, x / 3, x * 7])
        assert_same(g(limit, xs), per_member(halve, limit, xs, in_dims=(None, 0)))
        assert_same(h(x), pushed(lambda x: halve(limit, x)[1])(x))


def test_tangents_have_the_dtype_of_what_they_belong_to():
    """torch's own of a float32 number times a Python float is float64."""
    f = compiled(pushed(lambda x: halve(torch.tensor(1.0), x)[1]))
    assert_same(f(torch.tensor(3.0)), (torch.tensor(0.75), torch.tensor(0.25)))


@pytest.mark.parametrize("transform", [grad, jacrev, lambda f: vmap(grad(f))])
def test_a_compiled_loop_has_no_reverse_derivative(transform):
    f = compiled(transform(lambda x: halve(torch.tensor(1.0), x)[1]))
    x = torch.ones(2) if transform not in (grad, jacrev) else torch.tensor(1.0)
    with pytest.raises(RuntimeError, match=r"while_loop: .* no reverse-mode .* max_steps"):
        f(x)


def test_gradients_through_an_eager_loop():
    x = torch.tensor(100.0, dtype=torch.float64)
    assert grad(lambda x: halve(torch.tensor(1.0), x)[1])(x) == 0.5**7
    w = torch.tensor(3.0, requires_grad=True)
    (out,) = while_loop(lambda y: y < 100, lambda y: y * w, (torch.tensor(1.0),))
    out.backward()
    assert w.grad == 5 * 3.0**4


class State(NamedTuple):
    a: Any
    b: Any


@pytest.mark.parametrize("run", RUN)
def test_carries_of_every_kind(run):
    def body(state):
        return State(
            TensorDict({"n": state.a["n"] + 1}), {"y": state.b["y"] * 2, "x": state.b["x"]}
        )

    def f(x):
        state = State(TensorDict({"n": torch.tensor(0)}), {"x": x, "y": x})
        return while_loop(lambda s: s.a["n"] < 3, body, (state,))

    ((a, b),) = RUN[run](f)(torch.tensor(1.5))
    assert a["n"] == 3
    assert (b["x"], b["y"]) == (1.5, 12)
    # The carried inputs themselves as a named tuple, and a lone tensor for a tuple of one.
    got = RUN[run](
        lambda x: while_loop(lambda a, b: a < 3, lambda a, b: State(a + 1, b * 2), State(x, x))
    )(torch.tensor(1.0))
    assert_same(tuple(got), (torch.tensor(3.0), torch.tensor(4.0)))
    got = RUN[run](lambda x: while_loop(lambda x: x < 3, lambda x: x + 1, [x]))(torch.tensor(0))
    assert_same(got, (torch.tensor(3),))


@pytest.mark.parametrize("max_steps", [None, 2])
@pytest.mark.parametrize("run", ["eager", "compiled", "vmap"])
@pytest.mark.parametrize(
    ("error", "pattern", "cond_fn", "body_fn"),
    [
        (TypeError, r"cond_fn: .*, got float32\[\]", lambda x: x.sum(), lambda x: (x,)),
        (TypeError, r"cond_fn: .*, got bool\[2\]", lambda x: x > 0, lambda x: (x,)),
        (TypeError, r"cond_fn: .*, got NoneType", lambda x: None, lambda x: (x,)),
        (TypeError, r"cond_fn: .*, got int", lambda x: 1, lambda x: (x,)),
        (ValueError, r"at 0; the carry so far.*float32\[2\].*float32\[\]",
         lambda x: x.sum() > 0, lambda x: (x.sum(),)),
        (ValueError, r"float32\[2\].*float64\[2\]", lambda x: x.sum() > 0, lambda x: (x.double(),)),
        (ValueError, r"at 1;", lambda x: x.sum() > 0, lambda x: (x, x)),
        (ValueError, r"returns nothing", lambda x: x.sum() > 0, lambda x: ()),
        (TypeError, r"body_fn: 0: expected a tensor, got float",
         lambda x: x.sum() > 0, lambda x: (1.0,)),
    ],
)  # fmt: skip
def test_while_loops_that_do_not_fit(error, pattern, cond_fn, body_fn, run, max_steps):
    def f(x):
        return while_loop(cond_fn, body_fn, (x,), max_steps=max_steps)

    run, x = {
        "eager": (f, torch.ones(2)),
        "compiled": (compiled(f), torch.ones(2)),
        "vmap": (vmap(f), torch.tensor([[1.0, 1.0], [-1.0, -1.0]])),
    }[run]
    with pytest.raises(error, match=f"while_loop: .*{pattern}"):
        run(x)


def test_carried_inputs_that_are_no_tensors():
    with pytest.raises(
        TypeError, match="while_loop: carried_inputs: 1: expected a tensor, got int"
    ):
        unchecked(while_loop)(lambda x, n: True, lambda x, n: (x, n), (torch.ones(1), 3))


def test_a_loop_inside_the_branch_that_is_not_taken():
    """Its shapes are asked for, and it makes no turn."""

    def other(x):
        return while_loop(lambda x: x.sum() < 100, lambda x: (x * 2,), (x,))[0]

    x = torch.ones(2)
    assert_same(cond(torch.tensor(False), other, torch.neg, (x,)), -x)
    with pytest.raises(ValueError, match=r"float32\[2\]"):
        cond(torch.tensor(False), other, lambda x: x.sum(), (x,))
    with _torch.shapes_only():
        assert other(torch.empty(3)).shape == (3,)


def test_a_loop_with_python_bools():
    x = torch.tensor(1.0)
    for run in RUN.values():
        f = run(lambda x: while_loop(lambda x: True, lambda x: x * 2, (x,), max_steps=3))
        assert f(x)[0] == 8
        assert run(lambda x: while_loop(lambda x: False, lambda x: x * 2, (x,)))(x)[0] == 1


# --- plain torch.compile -----------------------------------------------------------------------


@pytest.mark.dynamo
def test_plain_torch_compile():
    def with_scan(w, x):
        final, ys = scan(lambda c, x: ({"c": c["c"] * w + x}, (c["c"], x)), {"c": w}, x)
        return final["c"] * ys[0].sum() + ys[1].sum()

    w, x = normal(0), normal(1, 3)
    results = []
    for f in (with_scan, torch.compile(with_scan, fullgraph=True, backend="aot_eager")):
        given = w.clone().requires_grad_(), x.clone().requires_grad_()
        result = f(*given)
        results.append((result.detach(), torch.autograd.grad(result, given)))
    assert_same(results[1], results[0])


@pytest.mark.dynamo
@pytest.mark.parametrize("max_steps", [None, 4])
def test_plain_torch_compile_of_a_while_loop(max_steps):
    def f(state, factor):
        return while_loop(
            lambda s: s["x"] < 10,
            lambda s: {"x": s["x"] * factor, "n": s["n"] + 1},
            (state,),
            max_steps=max_steps,
        )[0]

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for start in (0.5, 3.0, 20.0):
        state = {"n": torch.tensor(0), "x": torch.tensor(start)}
        assert_same(compiled(state, torch.tensor(2.0)), f(state, torch.tensor(2.0)))


@pytest.mark.dynamo
@pytest.mark.parametrize("which", ["carried", "closed over"])
def test_plain_torch_compile_refuses_the_derivative_of_a_while_loop(which):
    """torch's own was found wrong for a loop of no turns."""

    def f(w, x):
        return while_loop(lambda x: x < 10, lambda x: x * w, (x,))[0]

    w, x = torch.tensor(2.0), torch.tensor(20.0)
    (x if which == "carried" else w).requires_grad_()
    g = torch.compile(f, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"no reverse-mode derivative; give max_steps"):
        g(w, x)
    with torch.no_grad():
        assert g(w, x) == 20


@pytest.mark.dynamo
def test_plain_torch_compile_of_a_bounded_while_loop_backward():
    def f(w, x):
        return while_loop(lambda x: x < 10, lambda x: x * w, (x,), max_steps=3)[0]

    g = torch.compile(f, fullgraph=True, backend="aot_eager")
    for start in (1.0, 4.0, 20.0):
        results = []
        for h in (f, g):
            w, x = torch.tensor(2.0, requires_grad=True), torch.tensor(start, requires_grad=True)
            value = h(w, x)
            results.append(torch.autograd.grad(value, (w, x), allow_unused=True,
                                               materialize_grads=True))  # fmt: skip
        assert_same(results[1], results[0])

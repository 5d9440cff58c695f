"""funcnets.compile: whole steps, entries, donation, constants, errors."""

import warnings
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch.func import grad, grad_and_value, vmap

from funcnets import _torch, optim, random, tree
from funcnets.compile import compile
from funcnets.control import cond, scan


class State(NamedTuple):
    momentum: Any
    count: torch.Tensor


def init(key):
    first, second = random.split(key)
    return TensorDict(
        {
            "first": TensorDict({"weight": random.normal(first, (4, 3)), "bias": torch.zeros(4)}),
            "second": TensorDict({"weight": random.normal(second, (2, 4))}),
        }
    )


def forward(params, x, key):
    """A layer, dropout, and a conditional inside a scan: what a step is made of."""
    h = torch.tanh(x @ params["first", "weight"].mT + params["first", "bias"])
    h = h * random.bernoulli(key, h.shape, 0.8)

    def turn(h, scale):
        h = cond(h.sum() > 0, lambda h: h * scale, lambda h: torch.sin(h), (h,))
        return h, h.sum()

    h, sums = scan(turn, h, torch.tensor([0.5, 1.5]))
    return h @ params["second", "weight"].mT + sums.sum()


def step(params, state, batch, key, lr):
    """One member's training step: gradient, momentum, new parameters."""

    def loss(params):
        return forward(params, batch, key).pow(2).mean()

    gradients, value = grad_and_value(loss)(params)
    momentum = tree.map(lambda m, g: 0.9 * m + g, state.momentum, gradients)
    params = tree.map(lambda p, m: p - lr * m, params, momentum)
    return params, State(momentum, state.count + 1), {"loss": value, "name": "step"}


def start(members=None, seed=0):
    keys = random.split(random.key(seed), members) if members else random.key(seed)
    params = vmap(init)(keys) if members else init(keys)
    count = torch.zeros(members, dtype=torch.int64) if members else torch.tensor(0)
    return params, State(tree.map(torch.zeros_like, params), count), keys


def assert_trees_close(actual, expected):
    for (path, a), (other, e) in zip(
        tree.leaves_with_path(actual), tree.leaves_with_path(expected), strict=True
    ):
        assert path == other
        if isinstance(e, torch.Tensor):
            torch.testing.assert_close(a, e, msg=lambda m, path=path: f"{path}: {m}")
        else:
            assert a == e


@pytest.mark.parametrize("members", [None, 3])
@pytest.mark.parametrize("donate", [(), ("params", "state"), (0, 1)])
def test_whole_step_equals_eager(members, donate):
    one = step
    if members:

        def one(params, state, batch, key, lr):
            def member(params, state, key):
                params, state, metrics = step(params, state, batch, key, lr)
                return params, state, metrics["loss"]

            params, state, losses = vmap(member)(params, state, key)
            return params, state, {"loss": losses, "name": "step"}

    compiled = compile(one, donate=donate, backend="aot_eager")
    params, state, keys = start(members)
    eager = (params, state)
    mine = tree.map(torch.clone, eager)
    lr = torch.tensor(0.1)
    for turn in range(3):
        batch = random.normal(random.key(10 + turn), (5, 3))
        *eager, expected = one(*eager, batch, keys, lr)
        *mine, metrics = compiled(*mine, batch, keys, lr)
        assert_trees_close((mine, metrics), (list(eager), expected))
        assert mine[0].batch_size == eager[0].batch_size
        assert isinstance(mine[1], State)


def test_donated_memory_is_taken_over_and_the_old_tree_is_unusable():
    compiled = compile(step, donate=("params", "state"), backend="aot_eager")
    params, state, key = start()
    batch, lr = torch.ones(5, 3), torch.tensor(0.1)
    pointers = [leaf.data_ptr() for leaf in tree.leaves((params, state))]
    new, new_state, _ = compiled(params, state, batch, key, lr)
    assert [leaf.data_ptr() for leaf in tree.leaves((new, new_state))] == pointers
    for use in (
        lambda: params["first", "weight"] + 1,
        lambda: params["first", "bias"].sum(),
        lambda: torch.stack([params["second", "weight"]]),
        lambda: state.count.item(),
        lambda: new["first", "bias"].add(params["first", "bias"]),
    ):
        with pytest.raises(RuntimeError, match="was donated to a compiled function"):
            use()
    with pytest.raises(RuntimeError, match=r"step: params.first.weight: .* donated"):
        compiled(params, new_state, batch, key, lr)
    assert "Donated" in repr(params["first", "bias"])
    assert batch.sum() == 15  # not donated, still there
    compiled(new, new_state, batch, key, lr)


def test_a_tensor_donated_twice_is_an_error():
    compiled = compile(lambda a, b: (a + b, a * b), donate=(0, 1), backend="aot_eager")
    x, y = torch.ones(3), torch.ones(3)
    with pytest.raises(RuntimeError, match="given twice"):
        compiled(x, x)
    compiled(x, y)
    z = torch.ones(3)
    with pytest.raises(RuntimeError, match="given twice"):
        compiled(z, z)
    assert z.sum() == 3
    half = compile(lambda a, b: a + b, donate=0, backend="aot_eager")
    with pytest.raises(RuntimeError, match="given twice"):
        half(z, z)


@given(st.permutations(range(4)), st.booleans())
def test_donation_with_swapped_passed_on_and_viewed_results(order, transpose):
    def f(tensors, y):
        made = [tensors[0], tensors[1] * 2, tensors[3], tensors[2].T + y]
        views = tensors[0][0], tensors[1].T if transpose else tensors[1]
        return [made[i] for i in order], views

    tensors = [random.normal(random.key(i), (2, 2)) for i in range(4)]
    y = torch.ones(2, 2)
    expected = tree.map(torch.clone, f(tensors, y))
    actual = compile(f, donate="tensors", backend="aot_eager")(tensors, y)
    assert_trees_close(actual, expected)


def test_results_that_are_arguments_or_constants():
    shared = torch.tensor([2.0])
    f = compile(
        lambda x, y: (x, {"y": y, "c": shared * 1, "none": None, "n": 3}), backend="aot_eager"
    )
    x, y = torch.ones(2), torch.zeros(1)
    got, rest = f(x, y)
    assert_trees_close((got, rest), (x, {"y": y, "c": shared, "none": None, "n": 3}))
    assert f(x + 1, y)[0].sum() == 4


def test_one_entry_per_structure_shape_dtype_stride_and_constant():
    traced = []

    def f(x, scale=1.0, flag=True):
        traced.append(1)
        return x["a"] * scale if flag else x["a"]

    compiled = compile(f, backend="aot_eager")
    a = torch.ones(2, 3)
    calls = [
        (({"a": a},), {}),
        (({"a": a, "b": a},), {}),
        ((TensorDict({"a": a}),), {}),
        (({"a": torch.ones(3, 3)},), {}),
        (({"a": a.double()},), {}),
        (({"a": torch.ones(3, 2).T},), {}),
        (({"a": a},), {"scale": 2.0}),
        (({"a": a},), {"scale": 2}),
        (({"a": a},), {"flag": False}),
        (({"a": a},), {"flag": 1}),
    ]
    for _ in range(2):
        for args, kwargs in calls:
            torch.testing.assert_close(
                compiled(*args, **kwargs), args[0]["a"] * kwargs.get("scale", 1)
            )
    assert len(traced) == len(calls)


def test_settings_of_torch_are_part_of_an_entry():
    f = compile(lambda x: (x @ x) + torch.ones(2), backend="aot_eager")
    x = torch.ones(2, 2)
    assert f(x).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compile(lambda x: x @ x, backend="aot_eager")(x).dtype == torch.bfloat16
        assert f(x).dtype == torch.float32  # bfloat16 and float32 add up to float32
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert f(x).dtype == torch.float64
    finally:
        torch.set_default_dtype(before)
    assert f(x).dtype == torch.float32


def test_static_arguments_are_constants_as_a_whole():
    f = compile(lambda x, axes: x.sum(axes), static="axes", backend="aot_eager")
    x = torch.ones(2, 3)
    for _ in range(2):
        assert f(x, (0, 1)) == 6
        assert f(x, axes=(0,)).tolist() == [2, 2, 2]
        assert f(x, 1).tolist() == [3, 3]
    with pytest.raises(TypeError, match=r"axes: expected a tensor or a hashable constant, got"):
        f(x, [0, {1}])


def test_unhashable_leaves_are_named():
    f = compile(lambda params, options: params, backend="aot_eager")
    with pytest.raises(
        TypeError, match=r"options\.names\.1: expected a tensor or a hashable .* set"
    ):
        f(torch.ones(1), {"names": [1, {2}]})


@pytest.mark.parametrize("places", ["nothing", ("x", "nothing"), -1])
def test_unknown_argument_names(places):
    with pytest.raises(ValueError, match="compile: expected"):
        compile(lambda x: x, donate=places)


def test_a_number_that_changes_is_said_aloud_once():
    f = compile(lambda x, lr: x * lr, backend="aot_eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(10):
            f(torch.ones(1), 0.1 * i)
    assert [w for w in caught if "pass numbers that change as 0-d tensors" in str(w.message)][
        1:
    ] == []
    assert caught


def test_inside_a_transform_and_inside_another_compiled_function_it_is_the_plain_function():
    inner = compile(lambda x: (x**3).sum(), backend="aot_eager")
    x = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(torch.func.grad(inner)(x), 3 * x**2)
    torch.testing.assert_close(vmap(inner)(torch.stack([x, x])), torch.tensor([9.0, 9.0]))
    outer = compile(torch.func.grad(lambda x: inner(x) * 2), backend="aot_eager")
    torch.testing.assert_close(outer(x), 6 * x**2)
    with _torch.shapes_only():
        assert inner(torch.empty(2)).shape == ()


def test_as_a_decorator_and_as_a_method():
    class Thing:
        scale = 2

        @compile(backend="aot_eager")
        def double(self, x):
            """Twice x."""
            return x * self.scale

    assert Thing().double(torch.ones(1)) == 2
    assert Thing.double.__doc__ == "Twice x."


def test_an_error_in_the_function_leaves_no_entry_and_no_donation():
    fail = [True]

    def f(x):
        if fail[0]:
            raise KeyError("mine")
        return x + 1

    compiled = compile(f, donate="x", backend="aot_eager")
    x = torch.ones(1)
    with pytest.raises(KeyError, match="mine"):
        compiled(x)
    fail[0] = False
    assert compiled(x) == 2


def test_reading_a_number_is_an_error_while_recording():
    f = compile(lambda x: x * 2 if x.sum() > 0 else x, backend="aot_eager")
    with pytest.raises(Exception, match=r"(?i)data.dependent"):
        f(torch.ones(2))


def test_arguments_that_require_grad():
    f = compile(lambda p, x: {"y": (p["w"] * x).sin().sum()}, backend="aot_eager")
    w, x = (
        torch.randn(3, generator=torch.Generator().manual_seed(0)).requires_grad_(),
        torch.ones(3),
    )
    f({"w": w}, x)["y"].backward()
    torch.testing.assert_close(w.grad, w.detach().cos())
    with torch.no_grad():
        assert not f({"w": w}, x)["y"].requires_grad


calls: list[str] = []
torch.library.define("funcnets_test::tick", "(Tensor x, str name) -> Tensor")


@torch.library.impl("funcnets_test::tick", "CompositeExplicitAutograd")
def _tick(x, name):
    calls.append(name)
    return x.clone()


@torch.library.register_fake("funcnets_test::tick")
def _(x, name):
    return torch.empty_like(x)


def tick(x, name):
    return torch.ops.funcnets_test.tick(x, name)


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("run", ["eager", "compiled"])
def test_only_the_branch_taken_runs(flag, run):
    """Counted by an operator that notes when it is carried out, not when it is recorded."""
    params = TensorDict({"w": torch.tensor([2.0, 3.0])})

    def loss(params, flag):
        return cond(
            flag,
            lambda p: p["w"].pow(2).sum() + tick(p["w"].detach(), "true").sum() * 0,
            lambda p: p["w"].sum() + tick(p["w"].detach(), "false").sum() * 0,
            (params,),
        )

    f = grad_and_value(loss)
    if run == "compiled":
        f = compile(f, backend="aot_eager")
        f(params, torch.tensor(not flag))
    calls.clear()
    gradients, _ = f(params, torch.tensor(flag))
    assert set(calls) == {str(flag).lower()}
    expected = 2 * params["w"] if flag else torch.ones(2)
    torch.testing.assert_close(gradients["w"], expected)


def test_the_conditional_stands_in_the_graph_that_the_backend_gets():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    f = grad_and_value(lambda x, flag: cond(flag, torch.sin, torch.neg, (x,)).sum())
    compile(f, backend=backend)(torch.ones(2), torch.tensor(True))
    nodes = [node.target for node in graphs[0].graph.nodes]
    assert nodes.count(_torch.cond_node) == 2  # forward and backward
    assert torch.ops.aten.sin.default not in nodes  # only inside the branch


def test_inductor_runs_the_whole_donated_step():
    compiled = compile(step, donate=("params", "state"))
    params, state, key = start()
    batch, lr = random.normal(random.key(3), (5, 3)), torch.tensor(0.1)
    expected = step(params, state, batch, key, lr)
    first = compiled(*tree.map(torch.clone, (params, state)), batch, key, lr)
    assert_trees_close(first, expected)
    expected = step(*expected[:2], batch, key, lr)
    assert_trees_close(compiled(*first[:2], batch, key, lr), expected)


def test_a_donated_tensor_that_vmap_has_expanded():
    traced = []

    def f(count):
        traced.append(1)
        return count + 1

    compiled = compile(f, donate="count", backend="aot_eager")
    count = torch.zeros(()).expand(3)
    for turn in range(3):
        count = compiled(count)
        assert count.tolist() == [turn + 1.0] * 3
    assert len(traced) == 1


@given(
    channels=st.sampled_from([(2, 4, 1), (4, 4, 4), (3, 2, 1), (8, 8, 1)]),
    kernel=st.sampled_from([(1, 1), (3, 3), (2, 3)]),
    size=st.sampled_from([(2, 5, 4), (1, 1, 1)]),
    autocast=st.booleans(),
)
def test_convolutions_are_compiled_with_channels_last_where_weights_are_few_and_come_back_so(
    channels, kernel, size, autocast
):
    inputs, outputs, groups = channels
    options_given = []
    batch, height, width = size
    results = batch * outputs * (height + 3 - kernel[0]) * (width + 3 - kernel[1])
    weights = outputs * inputs // groups * kernel[0] * kernel[1]
    last = batch * inputs * height * width + results > weights

    def conv_step(params, mean, x):
        def loss(params):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                h = torch.conv2d(x, params["conv"], padding=1, groups=groups)
            return h.float().square().mean() + params["table"].sin().sum()

        gradients = grad(loss)(params)
        mean = tree.map(lambda m, g: 0.5 * m + g, mean, gradients)
        return tree.map(lambda p, m: p - 0.1 * m, params, mean), mean

    def begin():
        shape = outputs, inputs // groups, *kernel
        table = random.normal(random.key(1), (2, 3, 2, 5))  # of no convolution
        params = {"conv": random.normal(random.key(0), shape), "table": table}
        return params, tree.map(torch.zeros_like, params)

    def uncompiled(graph, inputs, **options):
        options_given.append(options)
        return graph

    x = random.normal(random.key(2), (batch, inputs, height, width))
    once = conv_step(*begin(), x)
    twice = conv_step(*once, x)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_torch, "lookup_backend", lambda backend: uncompiled)
        compiled = compile(conv_step, donate=(0, 1))
        for _ in range(2):  # the second time, all is compiled
            held = begin()
            found = compiled(*held, x)
            with pytest.raises(RuntimeError, match="donated"):
                held[0]["conv"].sum()
            for part in found:
                if last:
                    assert part["conv"].is_contiguous(memory_format=torch.channels_last)
                else:
                    assert part["conv"].is_contiguous()
                assert part["table"].is_contiguous()
            assert_trees_close(found, once)
            assert_trees_close(compiled(*found, x), twice)
        assert len(options_given) == 1
        assert options_given == [{"config_patches": {"layout_optimization": last}}]
        kept = begin()
        assert_trees_close(compile(conv_step)(*kept, x), once)  # nothing given, nothing moved
        assert kept[0]["conv"].is_contiguous()


@pytest.mark.parametrize("ragged", [False, True])
def test_batches_of_unknown_size_are_compiled_in_the_layout_they_have(ragged, monkeypatch):
    """Whatever is in the graph, for not 2-d convolutions on a CPU alone are laid out anew."""
    given = []

    def uncompiled(graph, inputs, **options):
        given.append(options)
        return graph

    monkeypatch.setattr(_torch, "lookup_backend", lambda backend: uncompiled)
    recorded = _torch.trace(torch.sin, [torch.ones(2)])._replace(ragged=ragged)
    _torch.compile_graph(recorded, "inductor")
    assert given == [{"config_patches": {"layout_optimization": False}} if ragged else {}]


def test_what_schedules_say_is_computed_once_in_a_graph(monkeypatch):
    """Inductor would compute it for every few elements of each leaf."""
    graphs = []

    def kept(recorded, backend):
        graphs.append(recorded.graph.graph)
        return recorded.graph

    monkeypatch.setattr(_torch, "compile_graph", kept)
    optimizer = optim.adamw(optim.schedules.cosine(1e-2, 10))
    params = {"a": torch.ones(3), "b": torch.ones(2, 2)}
    state = optimizer.init(params)
    compile(optimizer.update)(params, state, params)
    (graph,) = graphs
    leaves = [node for node in graph.nodes if node.op == "placeholder"]
    for node in graph.nodes:
        used = [user for user in node.users if user.op == "call_function"]
        wide = [user for user in used if user.meta["val"].ndim and user.meta["val"].numel() < 16]
        if node.op == "call_function" and node.meta["val"].ndim == 0 and wide:
            assert node.target is torch.ops.aten.amax.default, node
    assert len(leaves) == 9

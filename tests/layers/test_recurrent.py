"""The recurrent layers equal torch.nn's, by its kernel and by scan, under every transform."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrent_cases import DTYPE, FIXED, INITS, LAYERS, Case, cases
from tensordict import TensorDict
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from funcnets import compile, layers, random, scan, tree
from funcnets.layers import initializers

keys = st.integers(0, 2**16).map(random.key)
KEY = random.key(3)
each_case = pytest.mark.parametrize("case", FIXED.values(), ids=FIXED)


def close(actual, expected, tolerance=1e-10):
    tree.map(
        lambda a, b: torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance),
        actual,
        expected,
    )


def loss_of(case, **options):
    """``loss((params, x, state))``: a number that all outputs and last states enter."""

    def loss(point):
        outputs = tree.leaves(case.apply(*point, **options))
        return sum((y * (i + 1) + 0.3 * y.square()).sum() for i, y in enumerate(outputs))

    return loss


def noise_like(structure, key):
    leaves, kind = tree.flatten(structure)
    drawn = zip(random.split(key, len(leaves)), leaves, strict=True)
    return tree.unflatten(kind, [random.normal(k, x.shape, dtype=x.dtype) for k, x in drawn])


def dot(a, b):
    return sum((x * y).sum() for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


def stack(members):
    return tree.map(lambda *leaves: torch.stack(leaves), *members)


class Operators(TorchDispatchMode):
    """Counts what runs: before an error, nothing may."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fused", [True, False])
@settings(max_examples=40)
@given(case=cases(), key=keys)
def test_equals_the_torch_module(fused, case, key):
    point = case.draw(key)
    module = case.module()
    module.load_state_dict(dict(point[0].items()), strict=True)
    track = lambda part: tree.map(lambda leaf: leaf.clone().requires_grad_(), part)  # noqa: E731
    tracked = track(point[1:])
    expected = case.expected(module, *tracked)
    cotangent = noise_like(expected, random.fold_in(key, 1))
    dot(expected, cotangent).backward()
    if fused:  # plain autograd, under which sequences of any length go to the kernel
        own = track(point)
        actual = case.apply(*own)
        dot(actual, cotangent).backward()
        gradients, *rest = (tree.map(lambda leaf: leaf.grad, part) for part in own)
    else:
        actual, pull = vjp(lambda *point: case.apply(*point, fused=False), *point)
        gradients, *rest = pull(cotangent)
    close(*(tree.map(torch.detach, outputs) for outputs in (actual, expected)))
    close(rest, [tree.map(lambda leaf: leaf.grad, part) for part in tracked])
    for name, parameter in module.named_parameters():
        close(gradients[name], parameter.grad)


@pytest.mark.parametrize("dtype", [torch.float32, DTYPE], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_second_derivative_of_the_kernel_and_its_jacobian(kind, dtype):
    """Plain autograd tells nothing beforehand, and vmap of a vjp comes after the kernel has run."""
    tolerance = 1e-9 if dtype == DTYPE else 1e-4
    case = Case(kind, stateful=False)
    params, x, _ = case.draw(KEY, dtype)

    def loss(x, **options):
        return case.apply(params, x, None, **options)[0].square().sum()

    tracked = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(tracked), tracked, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), tracked)
    close(second, grad(lambda x: grad(loss)(x).square().sum())(x), tolerance)
    jacobian = jacrev(lambda x: case.apply(params, x, None)[0])(x)
    close(jacobian, jacrev(lambda x: case.apply(params, x, None, fused=False)[0])(x), tolerance)
    close(hessian(loss)(x), jacrev(jacrev(loss))(x), tolerance)


@each_case
def test_the_kernel_runs_where_nothing_is_transformed(case):
    case = Case(case.kind, build=case.build)
    point = case.draw(KEY)
    called = []
    module = layers.recurrent_layers
    kept = module._fused
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_fused", lambda *a, **k: called.append(0) or kept(*a, **k))
        case.apply(*point)
        grad(loss_of(case))(point)
        assert len(called) == 2
        vmap(lambda x: case.apply(point[0], x, point[2]))(torch.stack([point[1]]))
        jvp(lambda x: case.apply(point[0], x, point[2]), (point[1],), (point[1],))
        grad(lambda p: dot(grad(loss_of(case))(p), p))(point)
        case.apply(*point, fused=False)
        compile(case.apply, backend="aot_eager")(*point)
        assert len(called) == 2


@settings(max_examples=20)
@given(case=cases(), key=keys, data=st.data(), fused=st.booleans())
def test_chunks_equal_one_pass(case, key, data, fused):
    build = {**case.build, "bidirectional": False}
    case = Case(case.kind, case.sizes, 5, case.batch, None, case.stateful, True, build)
    params, x, state = case.draw(key)
    wanted, last = case.apply(params, x, state, fused=fused)
    at = data.draw(st.integers(1, 4))
    outputs = []
    for chunk in x.split([at, 5 - at], -2):
        y, state = case.apply(params, chunk, state, fused=fused)
        outputs.append(y)
    close(torch.cat(outputs, -2), wanted)
    close(state, last)


@settings(max_examples=15)
@given(case=cases(), key=keys, fused=st.booleans())
def test_nothing_beyond_a_length_matters(case, key, fused):
    lengths = (2, 4, 1)
    case = Case(case.kind, case.sizes, 4, 3, lengths, build=case.build, **{"stateful": True})
    params, x, state = case.draw(key)
    outputs, last = case.apply(params, x, state, fused=fused)
    beyond = torch.arange(4) >= torch.tensor(lengths)[:, None]
    assert (outputs[beyond] == 0).all()
    spoiled = torch.where(beyond[..., None], 1e6, x)
    close(case.apply(params, spoiled, state, fused=fused), (outputs, last))
    gradient = grad(lambda x: loss_of(case, fused=fused)((params, x, state)))(x)
    assert (gradient[beyond] == 0).all()
    for i, length in enumerate(lengths):  # each is what it would be alone
        own = tree.map(lambda part, i=i: part[:, i], state)
        alone = Case(case.kind, case.sizes, length, None, build=case.build)
        y, final = alone.apply(params, x[i, :length], own)
        close(outputs[i, :length], y)
        close(tree.map(lambda part, i=i: part[:, i], last), final)


def test_lengths_may_be_vmapped():
    case = Case("gru", build={"bidirectional": True})
    params, x, state = case.draw(KEY)
    many = torch.tensor([[3, 1], [2, 3]])
    outputs = vmap(lambda lengths: layers.gru(params, x, state, lengths))(many)
    close(outputs, stack([layers.gru(params, x, state, lengths) for lengths in many]))
    alone = vmap(lambda x, length: layers.gru(params, x, None, length))(x, many[0])
    assert (alone[0][1, 1:] == 0).all()
    with pytest.raises(ValueError, match="lengths: expected 1 to 3, got 4"):
        vmap(lambda lengths: layers.gru(params, x, state, lengths))(many + 1)


@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_between_layers_by_key(kind):
    case = Case(kind, lengths=(3, 2), build={"num_layers": 3, "bidirectional": True})
    params, x, state = case.draw(KEY)
    options = {"dropout": 0.5, "key": random.key(1)}
    dropped = case.apply(params, x, state, **options)
    close(case.apply(params, x, state, fused=False, **options), dropped)
    close(case.apply(params, x, state, dropout=0.5), case.apply(params, x, state))
    close(case.apply(params, x, state, key=KEY), case.apply(params, x, state))
    zero = {"dropout": torch.tensor(0.0), "key": KEY}
    close(case.apply(params, x, state, **zero), case.apply(params, x, state))
    other = case.apply(params, x, state, dropout=0.5, key=random.key(2))
    assert not torch.equal(dropped[0], other[0])
    # The first layer has none; with all dropped after it, its last state is as it was.
    silent = case.apply(params, x, state, dropout=1.0, key=KEY)[1]
    plain = case.apply(params, x, state)[1]
    close(*(tree.map(lambda part: part[:2], last) for last in (silent, plain)))
    split = random.split(KEY, 3)
    together = vmap(lambda key: case.apply(params, x, state, dropout=0.5, key=key))(split)
    each = [case.apply(params, x, state, dropout=0.5, key=key) for key in split]
    close(together, stack(each))
    shallow = Case(kind)
    point = shallow.draw(KEY)
    close(shallow.apply(*point, **options), shallow.apply(*point))  # nothing lies between


def test_dropout_has_torchs_scale():
    case = Case("rnn", (1, 64), 50, 8, stateful=False, build={"num_layers": 2})
    params, x, _ = case.draw(KEY)
    params["weight_hh_l1"] = torch.zeros_like(params["weight_hh_l1"])
    params["weight_ih_l1"] = torch.eye(64, dtype=DTYPE) * 1e-3  # small, where tanh is linear
    params["bias_ih_l1"] = params["bias_hh_l1"] = torch.zeros(64, dtype=DTYPE)
    whole = case.apply(params, x, None)[0]
    half = case.apply(params, x, None, dropout=0.25, key=KEY)[0]
    kept = half != 0
    assert abs(kept.double().mean() - 0.75) < 0.02
    close(half[kept] / whole[kept], torch.full_like(half[kept], 4 / 3), 1e-5)


@each_case
@pytest.mark.parametrize("unroll", [True, False])
def test_compiled_equals_eager(case, unroll):
    step = grad(loss_of(case))
    compiled = compile(grad(loss_of(case, unroll=unroll)), backend="aot_eager")
    for seed in (0, 1):
        point = case.draw(random.key(seed))
        close(compiled(point), step(point))


def test_a_rolled_graph_does_not_grow_with_the_length():
    counts = []
    for time in (5, 20):
        case = Case("gru", time=time)
        params, x, state = case.draw(KEY)

        def backend(graph, inputs):
            counts.append(len(graph.graph.nodes))
            return graph

        compile(lambda *p: case.apply(*p, unroll=False), backend=backend)(params, x, state)  # noqa: B023
    assert counts[0] == counts[1]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_autocast(kind, fused):
    case = Case(kind, lengths=(3, 2), build={"num_layers": 2})
    params, x, state = case.draw(KEY, torch.float32)
    wanted = case.apply(params, x, state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = case.apply(params, x, state, fused=fused)
        case.apply(params, x.bfloat16(), None, fused=False)
    close(actual[0].float(), wanted[0], 0.05)


@pytest.mark.parametrize("kind", INITS)
def test_initial_values(kind):
    init, gates = INITS[kind], {"rnn": 1, "lstm": 4, "gru": 3}[kind]
    params = init(KEY, 20, 25, num_layers=2, bidirectional=True)
    for leaf in params.values():
        assert 0.15 < leaf.abs().max() <= 0.2
    values = [leaf.flatten()[0].item() for leaf in params.values()]
    assert len(set(values)) == len(values) == 16
    params = init(
        KEY,
        3,
        4,
        weight_init=initializers.ones(),
        recurrent_init=initializers.orthogonal(),
        bias_init=initializers.constant(2.0),
        dtype=DTYPE,
    )
    assert (params["weight_ih_l0"] == 1).all()
    assert (params["bias_hh_l0"] == 2).all()
    blocks = params["weight_hh_l0"].reshape(gates, 4, 4)
    close(blocks @ blocks.mT, torch.eye(4, dtype=DTYPE).expand(gates, 4, 4))
    assert len(blocks[:, 0, 0].unique()) == gates
    ensemble = vmap(lambda key: init(key, 3, 4))(random.split(KEY, 3))
    close(tree.unstack(ensemble), [init(key, 3, 4) for key in random.split(KEY, 3)], 0)


def test_forget_bias():
    for params in (
        layers.init_lstm(KEY, 3, 4, num_layers=2, forget_bias=1.5),
        layers.init_lstm_cell(KEY, 3, 4, forget_bias=1.5),
    ):
        sums = [
            leaf + params[name.replace("ih", "hh")]
            for name, leaf in params.items()
            if name.startswith("bias_ih")
        ]
        for total in sums:
            assert (total[4:8] == 1.5).all()
            assert not (total == 1.5)[[0, 1, 2, 3, 8, 9]].any()
    # With the forget gate open and all else shut, the memory stays.
    params = tree.map(torch.zeros_like, layers.init_lstm(KEY, 1, 2, dtype=DTYPE))
    params["bias_ih_l0"][2:4] = 50.0
    state = (torch.zeros(1, 2, dtype=DTYPE), torch.ones(1, 2, dtype=DTYPE))
    close(layers.lstm(params, torch.ones(9, 1, dtype=DTYPE), state)[1][1], state[1])
    for refused in (layers.init_lstm, layers.init_lstm_cell):
        with pytest.raises(ValueError, match="forget_bias: expected with bias=True"):
            refused(KEY, 3, 4, bias=False, forget_bias=1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (5, 7, 4)}, "lstm: x: expected [batch, time, 3] or [time, 3], got [5, 7, 4]"),
        ({"x": (3,)}, "lstm: x: expected [batch, time, 3] or [time, 3], got [3]"),
        ({"x": (5, 0, 3)}, "lstm: x: expected a sequence of at least one element, got [5, 0, 3]"),
        ({"x": (0, 3)}, "lstm: x: expected a sequence of at least one element, got [0, 3]"),
        ({"h": (2, 5, 4)}, "lstm: state: h: expected [4, 5, 4], got [2, 5, 4]"),
        ({"c": (4, 7, 4)}, "lstm: state: c: expected [4, 5, 4], got [4, 7, 4]"),
        ({"lengths": [1, 2]}, "lstm: lengths: expected [5], got [2]"),
        ({"lengths": [1, 2, 3, 4, 0]}, "lstm: lengths: expected 1 to 7, got 0"),
        ({"lengths": [1, 2, 3, 4, 8]}, "lstm: lengths: expected 1 to 7, got 8"),
        ({"weight_ih_l1": (16, 4)}, "lstm: weight_ih_l1: expected [16, 8], got [16, 4]"),
        ({"weight_hh_l0": (15, 4)}, "lstm: weight_hh_l0: expected [4 * hidden_size, hidden_size],"),
        ({"bias_ih_l1_reverse": (3,)}, "lstm: bias_ih_l1_reverse: expected [16], got [3]"),
        ({"weight_hr_l0": (3, 4)}, "lstm: weight_hr_l0: expected [4, 4], got [3, 4]"),
    ],
)
def test_errors(change, message, unchecked):
    params = layers.init_lstm(KEY, 3, 4, num_layers=2, bidirectional=True)
    arguments = {name: torch.zeros(4, 5, 4) for name in ("h", "c")} | {"x": torch.zeros(5, 7, 3)}
    for name, value in change.items():
        if "_l" in name:
            params[name] = torch.zeros(value)
        elif name == "lengths":
            arguments[name] = torch.tensor(value)
        else:
            arguments[name] = torch.zeros(value)
    state = arguments["h"], arguments["c"]
    with pytest.raises(ValueError, match=re.escape(message)), Operators() as operators:
        layers.lstm(params, arguments["x"], state, arguments.get("lengths"))
    assert operators.count <= 16 * ("lengths" in change)  # reading the lengths


def test_more_errors(unchecked):
    params, x = layers.init_gru(KEY, 3, 4, num_layers=2), torch.zeros(5, 7, 3)
    with pytest.raises(ValueError, match=r"gru: x: expected float32 \(as weight\), got float64"):
        layers.gru(params, x.double())
    with pytest.raises(ValueError, match=r"gru: state: expected torch.float32 \(as x\)"):
        layers.gru(params, x, torch.zeros(2, 5, 4, dtype=DTYPE))
    with pytest.raises(ValueError, match=r"gru: state: expected \[2, 7, 4\], got \[2, 5, 4\]"):
        layers.gru(params, x, torch.zeros(2, 5, 4), batch_first=False)
    with pytest.raises(ValueError, match=r"gru: state: expected \[2, 4\], got \[2, 5, 4\]"):
        layers.gru(params, x[0], torch.zeros(2, 5, 4))
    with pytest.raises(ValueError, match=r"lengths: expected integers, got torch\.float32"):
        layers.gru(params, x, lengths=torch.ones(5))
    with pytest.raises(KeyError, match="expected an entry weight_hh_l1, got weight_ih_l0"):
        layers.gru(params.exclude("weight_hh_l1"), x)
    with pytest.raises(ValueError, match="expected both bias_ih_l1 and bias_hh_l1"):
        layers.gru(params.exclude("bias_hh_l1"), x)
    wider = {n.replace("0", "1"): leaf for n, leaf in layers.init_gru(KEY, 4, 5).items()}
    with pytest.raises(ValueError, match=r"weight_hh_l1: expected \[12, 4\], got \[15, 5\]"):
        layers.gru(params.update(wider), x)
    with pytest.raises(ValueError, match="nonlinearity: expected tanh or relu, got sine"):
        layers.rnn(layers.init_rnn(KEY, 3, 4), x, nonlinearity="sine")
    with pytest.raises(ValueError, match="hidden_size: expected at least 1, got 0"):
        layers.init_gru(KEY, 3, 0)
    with pytest.raises(ValueError, match="proj_size: expected less than hidden_size 4, got 4"):
        layers.init_lstm(KEY, 3, 4, proj_size=4)


CELLS = {
    "rnn": (layers.init_rnn_cell, layers.rnn_cell, torch.nn.RNNCell),
    "lstm": (layers.init_lstm_cell, layers.lstm_cell, torch.nn.LSTMCell),
    "gru": (layers.init_gru_cell, layers.gru_cell, torch.nn.GRUCell),
}


@pytest.mark.parametrize("kind", CELLS)
@given(key=keys, n=st.integers(1, 3), m=st.integers(1, 3), bias=st.booleans(), data=st.data())
def test_cells_equal_the_torch_modules(kind, key, n, m, bias, data):
    init, cell, module = CELLS[kind]
    own = theirs = {}
    if kind == "rnn":
        own = theirs = {"nonlinearity": data.draw(st.sampled_from(["tanh", "relu"]))}
    params = init(key, n, m, bias=bias, dtype=DTYPE)
    with torch.random.fork_rng():
        reference = module(n, m, bias=bias, **theirs).to(DTYPE)
    reference.load_state_dict(dict(params.items()), strict=True)
    batch = data.draw(st.sampled_from([(), (2,)]))
    x, h, c = (
        random.normal(k, (*batch, size), dtype=DTYPE)
        for k, size in zip(random.split(key, 3), (n, m, m), strict=True)
    )
    state = data.draw(st.sampled_from([None, (h, c) if kind == "lstm" else h]))
    weights = dict(params.items())
    actual, pull = vjp(lambda p, x: cell(p, x, state, **own), params, x)
    expected, wanted = vjp(lambda p, x: functional_call(reference, p, (x, state)), weights, x)
    close(actual, expected)
    cotangent = noise_like(actual, key)
    gradients, of_x = pull(cotangent)
    close((dict(gradients.items()), of_x), wanted(cotangent))
    # Batch axes may be any number.
    several = random.normal(key, (3, *x.shape), dtype=DTYPE)
    states = tree.map(lambda leaf: torch.stack([leaf, -leaf, 2 * leaf]), state)
    each = [tree.map(lambda leaf, i=i: leaf[i], states) for i in range(3)]
    alone = [cell(params, *one, **own) for one in zip(several, each, strict=True)]
    close(cell(params, several, states, **own), stack(alone))


@pytest.mark.parametrize("kind", CELLS)
def test_a_layer_is_its_cell_scanned(kind):
    case = Case(kind, time=4)
    params, x, state = case.draw(KEY)
    cell = CELLS[kind][1]
    own = {name.removesuffix("_l0"): leaf for name, leaf in params.items()}

    def turn(state, x):
        state = cell(TensorDict(own), x, state)
        return state, state[0] if kind == "lstm" else state

    last, outputs = scan(turn, tree.map(lambda part: part[0], state), x, dim=1)
    close((outputs, tree.map(lambda part: part[None], last)), case.apply(params, x, state))


def test_errors_of_cells(unchecked):
    params = layers.init_lstm_cell(KEY, 3, 4)
    x, h = torch.zeros(5, 3), torch.zeros(5, 4)
    with pytest.raises(ValueError, match=r"lstm_cell: x: expected \[\.\.\., 3\], got \[5, 4\]"):
        layers.lstm_cell(params, h)
    with pytest.raises(ValueError, match=r"lstm_cell: state: c: expected \[5, 4\], got \[4\]"):
        layers.lstm_cell(params, x, (h, h[0]))
    with pytest.raises(ValueError, match=r"x: expected float32 \(as weight\), got float64"):
        layers.lstm_cell(params, x.double())
    with pytest.raises(KeyError, match="lstm_cell: params: expected an entry weight_hh, got"):
        layers.lstm_cell(params.exclude("weight_hh"), x)
    with pytest.raises(ValueError, match=r"weight_hh: expected \[4 \* hidden_size, hidden_size\]"):
        layers.lstm_cell(params.update({"weight_hh": torch.zeros(8, 4)}), x)
    with pytest.raises(ValueError, match="rnn_cell: nonlinearity: expected tanh or relu"):
        layers.rnn_cell(layers.init_rnn_cell(KEY, 3, 4), x, nonlinearity="sine")


@pytest.mark.dynamo
@each_case
def test_plain_torch_compile(case):
    torch.compiler.reset()
    params, x, state = case.draw(KEY)
    compiled = torch.compile(case.apply, fullgraph=True, backend="aot_eager")
    close(compiled(params, x, state), case.apply(params, x, state))
    tracked = tree.map(lambda leaf: leaf.clone().requires_grad_(), params)
    loss = sum(y.square().sum() for y in tree.leaves(compiled(tracked, x, state)))
    loss.backward()
    wanted = grad(lambda p: sum(y.square().sum() for y in tree.leaves(case.apply(p, x, state))))(
        params
    )
    close(tree.map(lambda leaf: leaf.grad, tracked), wanted)

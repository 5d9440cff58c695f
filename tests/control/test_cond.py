"""cond and switch: what they accept and refuse; an untaken branch leaves no trace."""

import functools

import pytest
import torch
from control_cases import (
    MODES,
    assert_same,
    compiled,
    normal,
    per_member,
    pushed,
    run_with_flag,
    tick,
    ticks,
    unchecked,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch._subclasses.fake_tensor import FakeTensor
from torch.func import grad, jacrev, vmap

from funcnets import random, tree
from funcnets.compile import compile
from funcnets.control import cond, switch, while_loop
from funcnets.models import mlp

TRUE, FALSE = torch.tensor(True), torch.tensor(False)


# --- outputs that disagree ---------------------------------------------------------------------

DISAGREEING = {
    "dict and tuple": (lambda x: {"a": x}, lambda x: (x,), r"at (a|0)"),
    "TensorDict and dict": (
        lambda x: TensorDict({"a": x}),
        lambda x: {"a": x},
        r"\((TensorDict and dict|dict and TensorDict)\)",
    ),
    "list and tuple": (lambda x: [x, x], lambda x: (x, x), r"\((list and tuple|tuple and list)\)"),
    "tensor and tuple": (lambda x: x, lambda x: (x,), r"(\(root\)|at 0)"),
    "a name is missing": (lambda x: {"a": x, "b": x}, lambda x: {"a": x}, r"at b"),
    "other names": (lambda x: {"a": x}, lambda x: {"b": x}, r"at (a|b)"),
    "shapes": (lambda x: x, lambda x: x[:1], r"float64\[2\].*float64\[1\]|\[1\].*\[2\]"),
    "dimensions that broadcast": (lambda x: x, lambda x: x.sum(), r"float64\[2\]"),
    "dtypes": (lambda x: x, lambda x: x.float(), r"float32\[2\]"),
    "deep": (
        lambda x: {"layers": [{"w": x}, {"w": x}]},
        lambda x: {"layers": [{"w": x}, {"w": x.sum()}]},
        r"at layers\.1\.w",
    ),
    "nothing and something": (lambda x: (), lambda x: (x,), r"nothing"),
}


def disagree_by_operand(yes, no):
    return lambda flag, x: cond(flag, yes, no, (x,))


def disagree_by_closure(yes, no):
    return lambda flag, x: cond(flag, lambda: yes(x), lambda: no(x))


@pytest.mark.parametrize("write", [disagree_by_operand, disagree_by_closure])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", DISAGREEING)
def test_outputs_that_disagree(case, mode, write):
    yes, no, pattern = DISAGREEING[case]
    for first, second in ((yes, no), (no, yes)):
        with pytest.raises(ValueError, match=pattern) as error:
            run_with_flag(mode, write(first, second), torch.ones(2, dtype=torch.float64))
        assert "cond: " in str(error.value)
        assert "true_fn returns " in str(error.value)
        assert "false_fn returns " in str(error.value)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("yes", [lambda x: (x, 1.0), lambda x: (x, "name")])
def test_outputs_that_are_no_tensors(yes, mode):
    for f in (
        lambda flag, x: cond(flag, yes, lambda x: (x, x), (x,)),
        lambda flag, x: cond(flag, lambda x: (x, x), yes, (x,)),
        lambda flag, x: cond(flag, yes, yes, (x,)),
    ):
        with pytest.raises(TypeError, match=r"cond: (true|false)_fn: 1: expected a tensor, got"):
            run_with_flag(mode, f, torch.ones(2))


def test_one_branch_compared_with_two_others_in_turn():
    """What was found for one pair of branches is not taken for another's."""

    def same(x):
        return {"a": x}

    x = torch.ones(2)
    cond(TRUE, lambda x: {"a": x}, same, (x,))
    with pytest.raises(ValueError, match="at 0"):
        cond(TRUE, lambda x: (x,), same, (x,))
    for size in (2, 3):  # the same code, with another number and other tensors in its closure
        for other in (
            lambda size=size: torch.zeros(size),
            functools.partial(torch.add, torch.zeros(size, 1).expand(size, 1)[:, 0]),
        ):
            takes = (x,) if isinstance(other, functools.partial) else ()
            if size == 2:
                cond(TRUE, lambda *_: x, other, takes)
            elif takes == ():
                with pytest.raises(ValueError, match=r"float32\[3\]"):
                    cond(TRUE, lambda *_: x, other, takes)


def test_callables_of_one_class_and_methods_are_told_apart():
    class Branch:
        def __init__(self, f):
            self.f = f

        def __call__(self, x):
            return self.f(x)

        def total(self, x):
            return self.f(x).sum()

    x = torch.ones(2)
    kept = Branch(torch.sin), Branch(torch.sum)
    for good, bad in (kept, (kept[0].f, kept[0].total), (kept[0].__call__, kept[0].total)):
        cond(TRUE, torch.neg, good, (x,))
        with pytest.raises(ValueError, match=r"float32\[2\].*float32\[\]"):
            cond(TRUE, torch.neg, bad, (x,))


@pytest.mark.parametrize("mode", ["eager", "vmap", "compiled", "python"])
@pytest.mark.parametrize("count", [3, 4, 5])
def test_one_branch_of_a_switch_that_disagrees(count, mode):
    for place in range(count):
        branches = [lambda x: {"y": x} for _ in range(count)]
        branches[place] = lambda x: {"y": x.sum()}

        def f(index, x, branches=branches):
            return switch(index, branches, (x,))

        run = {
            "eager": lambda f=f: f(torch.tensor(0), torch.ones(2)),
            "vmap": lambda f=f: vmap(f, (0, None))(torch.arange(count), torch.ones(2)),
            "compiled": lambda f=f: compiled(f)(torch.tensor(0), torch.ones(2)),
            "python": lambda f=f: f(0, torch.ones(2)),
        }[mode]
        if mode == "python":
            run()  # no other branch is looked at
            continue
        with pytest.raises(ValueError, match=r"switch: .* at y; branch.* returns") as error:
            run()
        assert "y float32[]" in str(error.value)
        assert "y float32[2]" in str(error.value)


@given(st.permutations(["a", "b", "c"]), st.sampled_from(MODES), st.booleans())
def test_the_order_of_names_does_not_count(order, mode, as_tensordict):
    def no(x):
        values = {"a": x, "b": 2 * x, "c": 3 * x}
        made = {name: -values[name] for name in order}
        return {"d": TensorDict(made) if as_tensordict else made}

    def yes(x):
        made = {"a": x, "b": 2 * x, "c": 3 * x}
        return {"d": TensorDict(made) if as_tensordict else made}

    def f(flag, x):
        return cond(flag, yes, no, (x,))["d"]

    x = torch.tensor([1.0, 5.0])
    got = run_with_flag(mode, f, x)
    signs = {"false": -1.0, "disagree": torch.tensor([[-1.0], [-1.0]])}.get(mode, 1.0)
    signs = torch.tensor([[1.0], [-1.0]]) if mode in MODES[-2:] or mode == "mixed" else signs
    for i, name in enumerate("abc"):
        torch.testing.assert_close(got[name], (signs * x * (i + 1)).expand_as(got[name]))


@pytest.mark.parametrize("mode", MODES)
def test_dicts_named_by_numbers_in_another_order(mode):
    def f(flag, x):
        return cond(flag, lambda x: {0: x, 1: (2 * x,)}, lambda x: {1: (2 * x,), 0: x}, (x,))

    got = run_with_flag(mode, f, torch.ones(2))
    assert got[0].max() == 1
    assert got[1][0].min() == 2


# --- predicates --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pred", "error", "got"),
    [
        (torch.tensor(1.0), TypeError, r"float32\[\]"),
        (torch.tensor(1), TypeError, r"int64\[\]"),
        (1.0, TypeError, "float"),
        (1, TypeError, "int"),
        (None, TypeError, "NoneType"),
        (torch.tensor([True, False]), ValueError, r"bool\[2\]"),
        (torch.zeros(0, dtype=torch.bool), ValueError, r"bool\[0\]"),
    ],
)
def test_predicates_that_are_none(pred, error, got):
    with pytest.raises(error, match=rf"cond: pred: expected .*, got {got}"):
        unchecked(cond)(pred, torch.sin, torch.cos, (torch.ones(2),))


@pytest.mark.parametrize(
    ("index", "error", "got"),
    [
        (torch.tensor(1.0), TypeError, r"float32\[\]"),
        (torch.tensor(True), TypeError, r"bool\[\]"),
        (torch.tensor(1j), TypeError, r"complex64\[\]"),
        (1.0, TypeError, "float"),
        (None, TypeError, "NoneType"),
        ("1", TypeError, "str"),
        (torch.tensor([0, 1]), ValueError, r"int64\[2\]"),
    ],
)
def test_indices_that_are_none(index, error, got):
    with pytest.raises(error, match=rf"switch: index: expected .*, got {got}"):
        unchecked(switch)(index, [torch.sin, torch.cos], (torch.ones(2),))


def test_a_switch_without_branches():
    with pytest.raises(ValueError, match="switch: expected at least one branch, got none"):
        switch(torch.tensor(0), [])


def test_python_bools_and_tensors_of_one_element():
    x = torch.ones(1)
    for yes in (True, TRUE, torch.tensor([True]), torch.tensor([[True]])):
        assert unchecked(cond)(yes, torch.neg, torch.sin, (x,)) == -1
    for no in (False, FALSE, torch.tensor([False])):
        assert cond(no, torch.sin, torch.neg, (x,)) == -1


@given(
    st.integers(-4, 9),
    st.integers(1, 6),
    st.sampled_from([torch.int64, torch.int32, torch.int8, None]),
    st.booleans(),
)
def test_switch_clamps(index, count, dtype, one_dimension):
    branches = [lambda x, i=i: x + i for i in range(count)]
    expected = torch.tensor(float(min(max(index, 0), count - 1)))
    given_index = index
    if dtype is not None:
        given_index = torch.tensor([index] if one_dimension else index, dtype=dtype)
    assert_same(switch(given_index, branches, (torch.tensor(0.0),)), expected)
    if dtype is not None:
        f = compiled(lambda i: switch(i, branches, (torch.tensor(0.0),)))
        assert_same(f(given_index), expected)
        indices = torch.tensor([index, 0, 1, count], dtype=dtype)
        got = vmap(lambda i: switch(i, branches, (torch.tensor(0.0),)))(indices)
        assert_same(got, indices.clamp(0, count - 1).float())


# --- the branch that is not taken --------------------------------------------------------------


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("transform", [lambda f: f, grad, jacrev, pushed])
def test_the_other_branch_sees_no_numbers(flag, transform):
    seen = []

    def note(name, x):
        if not isinstance(x, FakeTensor):
            seen.append(name)
        return (x * tick(x, name)).sum()

    def by_operand(x):
        return cond(torch.tensor(flag), *(functools.partial(note, n) for n in names), (x,))

    def by_closure(x):
        return cond(torch.tensor(flag), lambda: note("true", x), lambda: note("false", x))

    names = "true", "false"
    for f in (by_operand, by_closure):
        ticks.clear()
        seen.clear()
        transform(f)(torch.ones(2))
        assert set(ticks) == {str(flag).lower()}
        assert set(seen) == {str(flag).lower()}


def test_where_all_members_agree_one_branch_runs():
    def f(flag, x):
        return cond(flag, lambda x: x * tick(x, "true"), lambda x: x * tick(x, "false"), (x,))

    for flag in (True, False):
        ticks.clear()
        vmap(f)(torch.tensor([flag] * 3), torch.ones(3))
        assert ticks == [str(flag).lower()] * len(ticks)
        assert ticks


def logarithm(x):
    return torch.log(x)


def root(x):
    return torch.sqrt(x) + x.abs().sqrt().clamp(max=1.0)


def quotient(x):
    return 1 / x + x.pow(-2.0)


# Each is infinite, or has no derivative, at some of the values below.
PARTIAL = [
    (logarithm, lambda x: x > 0),
    (root, lambda x: x > 0),
    (quotient, lambda x: x != 0),
]
DANGEROUS = st.lists(st.sampled_from([-2.0, 0.0, 0.5, 3.0]), min_size=1, max_size=4)


def total_of(partial, defined, closed_over):
    def f(x):
        if closed_over:
            return cond(defined(x), lambda: partial(x), lambda: 3 * x)
        return cond(defined(x), partial, lambda x: 3 * x, (x,))

    return f


RUN = {"eager": lambda f: f, "compiled": compiled}
SAFE_TRANSFORMS = {
    "vmap": vmap,
    "vmap(grad)": lambda f: vmap(grad(f)),
    "vmap(grad(grad))": lambda f: vmap(grad(grad(f))),
    "grad(vmap)": lambda f: grad(lambda x: vmap(f)(x).sum()),
    "vmap(jvp)": lambda f: vmap(pushed(f)),
    "jvp(vmap)": lambda f: pushed(vmap(f)),
}


@pytest.mark.parametrize("run", RUN)
@pytest.mark.parametrize("closed_over", [True, False])
@pytest.mark.parametrize("transform", SAFE_TRANSFORMS)
def test_members_never_see_the_other_branch_at_their_own_values(transform, closed_over, run):
    @given(DANGEROUS, st.sampled_from(PARTIAL))
    @settings(max_examples=5)
    def check(values, case):
        f = total_of(*case, closed_over)
        x = torch.tensor(values, dtype=torch.float64)
        one = {
            "vmap": f,
            "vmap(grad)": grad(f),
            "vmap(grad(grad))": grad(grad(f)),
            "grad(vmap)": grad(f),
        }.get(transform, pushed(f))
        expected = per_member(one, x)
        assert tree.leaves(expected)[0].isfinite().all()
        assert_same(RUN[run](SAFE_TRANSFORMS[transform](f))(x), expected)

    check()


@pytest.mark.parametrize("run", RUN)
@pytest.mark.parametrize("levels", ["both", "outer", "inner"])
def test_nested_vmap_with_predicates_that_differ_at_either_level(levels, run):
    @given(
        st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=2, max_size=2),
        st.booleans(),
    )
    @settings(max_examples=4)
    def check(flags, first_axis):
        # A member's x is positive where its flag says so: else the logarithm is not defined.
        flags = torch.tensor(flags)
        if levels != "both":
            flags = (flags[:, :1] if levels == "outer" else flags[:1]).expand(2, 3)
        x = torch.where(flags, 2.0, -1.0).double() * torch.arange(1, 7).reshape(2, 3)
        scale = torch.tensor([1.0, 2.0], dtype=torch.float64)

        def f(flag, x, scale):
            return cond(flag, lambda x: torch.log(x) * scale, lambda x: x * x * scale, (x,))

        inner, outer = (0, 0, None), (0, 0, 0)
        flag = flags
        if levels == "outer":
            inner, flag = (None, 0, None), flags[:, 0]
        elif levels == "inner":
            outer, flag = (None, 0, 0), flags[0]
        for g in (f, grad(f, 1), grad(f, 2)):
            got = RUN[run](vmap(vmap(g, inner), outer))(flag, x, scale)
            assert_same(
                got,
                per_member(
                    lambda *a, g=g: per_member(g, *a, in_dims=inner), flag, x, scale, in_dims=outer
                ),
            )

    check()


@pytest.mark.parametrize("run", RUN)
def test_a_branch_that_no_member_takes_leaves_no_trace_in_what_all_share(run):
    def loss(w, xs):
        return vmap(lambda x: cond(x > 0, lambda: torch.sqrt(w * x), lambda: w * x))(xs).sum()

    xs = torch.tensor([0.0, -1.0, -0.0])
    assert_same(RUN[run](grad(loss))(torch.tensor(1.0), xs), torch.tensor(-1.0))


@pytest.mark.parametrize("run", RUN)
def test_integer_operands_out_of_range_where_the_branch_is_not_taken(run):
    table = normal(0, 4)

    def look_up(place, weight):
        return cond(place < 4, lambda i: table.take(i) * weight, lambda i: i * weight, (place,))

    places = torch.tensor([1, 9, 3, 100])
    weights = normal(1, 4)
    for g in (look_up, grad(look_up, 1)):
        assert_same(RUN[run](vmap(g))(places, weights), per_member(g, places, weights))


@pytest.mark.parametrize("run", RUN)
def test_keys_as_operands(run):
    def f(flag, key):
        return cond(
            flag, lambda k: random.normal(k, (2,)), lambda k: random.uniform(k, (2,)), (key,)
        )

    args = torch.tensor([True, False, True]), random.split(random.key(0), 3)
    assert_same(RUN[run](vmap(f))(*args), per_member(f, *args))


@pytest.mark.parametrize("run", RUN)
def test_complex_numbers(run):
    def f(z):
        return cond(z.real > 0, lambda z: z * z, lambda z: 3j * z, (z,)).abs()

    def plain(z):
        return torch.where(z.real > 0, z * z, 3j * z).abs()

    z = torch.tensor([1 + 2j, -3 - 1j], dtype=torch.complex128)
    assert_same(RUN[run](grad(f))(z[0]), grad(plain)(z[0]))
    assert_same(RUN[run](vmap(grad(f)))(z), vmap(grad(plain))(z))


# --- branches of every kind --------------------------------------------------------------------


@pytest.mark.parametrize("run", ["eager", "compiled", "aot_eager"])
@pytest.mark.parametrize("flag", [True, False])
def test_gradients_reach_whatever_a_branch_closes_over(flag, run):
    x = normal(0, 2)

    def loss(params, x, flag):
        def scaled(y, scale=params["default"], *, shift=params["keyword"]):
            return y * scale + shift

        def nested(y):
            return scaled(y) * params["inner"]["w"]

        extra = [params["listed"]]
        branches = functools.partial(torch.mul, params["partial"]), lambda y: nested(y) * extra[0]
        return cond(flag, *branches, (x,)).sin().sum()

    names = ("default", "keyword", "listed", "partial")
    for kind in (dict, TensorDict):
        inner = kind({"w": normal(9, 2)})
        params = kind({**{n: normal(i, 2) for i, n in enumerate(names)}, "inner": inner})

        def plain(params, x):
            if flag:
                return (params["partial"] * x).sin().sum()
            y = x * params["default"] + params["keyword"]
            return (y * params["inner"]["w"] * params["listed"]).sin().sum()

        f = grad(loss, (0, 1))
        if run != "eager":
            f = compile(f, backend="eager" if run == "compiled" else run)
        assert_same(f(params, x, torch.tensor(flag)), grad(plain, (0, 1))(params, x))


@pytest.mark.parametrize("run", RUN)
def test_a_model_as_a_branch(run):
    model, other = mlp(3, 2, widths=(4,)), mlp(3, 2, widths=(5, 5))
    params = {"a": model.init(random.key(0)), "b": other.init(random.key(1))}
    params = tree.cast(params, torch.float64)
    x = normal(2, 7, 3)

    def loss(params, flag):
        y = cond(
            flag, lambda p: model.apply(p["a"], x), lambda p: other.apply(p["b"], x), (params,)
        )
        return y.square().sum()

    for flag in (TRUE, FALSE):
        taken, m = ("a", model) if flag else ("b", other)
        expected = grad(lambda p, m=m: m.apply(p, x).square().sum())(params[taken])
        got = RUN[run](grad(loss))(params, flag)
        assert_same(got[taken], expected)
        assert all((leaf == 0).all() for leaf in tree.leaves(got["b" if flag else "a"]))
    got = RUN[run](vmap(grad(loss), (None, 0)))(params, torch.tensor([True, False]))
    assert_same(got, per_member(grad(loss), params, torch.tensor([True, False]), in_dims=(None, 0)))
    # The method itself, with the operands that it takes.
    assert_same(
        RUN[run](lambda p, flag: cond(flag, model.apply, lambda p, x: x[:, :2], (p, x)))(
            params["a"], TRUE
        ),
        model.apply(params["a"], x),
    )


UNUSUAL = {
    "identity": (lambda x, y: x, lambda x, y: y),
    "identity of all": (lambda x, y: (x, y), lambda x, y: (y, x)),
    "constants": (lambda x, y: torch.ones(2), lambda x, y: torch.zeros(2)),
    "the same tensor twice": (lambda x, y: (x, x), lambda x, y: (y, x * y)),
    "one result twice": (lambda x, y: [x.sin()] * 2, lambda x, y: [y.cos(), x.cos()]),
    "nothing": (lambda x, y: (), lambda x, y: ()),
    "None": (lambda x, y: None, lambda x, y: None),
    "views": (lambda x, y: x[:1], lambda x, y: y[1:]),
    "expanded": (lambda x, y: x[:1].expand(2), lambda x, y: y.flip(0)),
    "integers": (lambda x, y: (x.argmax(), x), lambda x, y: (y.argmin(), y)),
    "a named tuple of torch": (lambda x, y: x.max(0), lambda x, y: y.max(0)),
}
# How the operands x and y are made of one tensor.
OPERANDS = {
    "twice": lambda x: (x, x),
    "views of one memory": lambda x: (x[:2], x[:2].view(2)),
    "overlapping": lambda x: (x[:2], x[1:]),
    "apart": lambda x: (x[:2], x[1:] * 2),
}


@pytest.mark.parametrize("operands", OPERANDS)
@pytest.mark.parametrize("case", UNUSUAL)
def test_unusual_branches_and_operands(case, operands):
    branches = UNUSUAL[case]

    def take(x):
        made = OPERANDS[operands](x)
        return made if operands != "twice" else tuple(part[:2] for part in made)

    def f(flag, x):
        return cond(flag, *branches, take(x))

    def loss(result):
        floating = [leaf for leaf in tree.leaves(result) if leaf.is_floating_point()]
        return sum((leaf * (i + 1)).sum() for i, leaf in enumerate(floating))

    x = normal(0, 3, dtype=torch.float32)
    for flag in (TRUE, FALSE):
        expected = branches[0 if flag else 1](*take(x))
        for run in RUN.values():
            assert_same(run(f)(flag, x), expected)
        if not any(leaf.is_floating_point() for leaf in tree.leaves(expected)):
            continue
        plain = grad(lambda x, i=0 if flag else 1: loss(branches[i](*take(x))) + 0 * x.sum())
        for run in RUN.values():
            got = run(grad(lambda x, flag: loss(f(flag, x)) + 0 * x.sum()))(x, flag)
            assert_same(got, plain(x))


@pytest.mark.parametrize("run", RUN)
def test_a_derivative_of_integer_outputs_is_none(run):
    def f(x):
        return cond(x.sum() > 0, torch.argmax, torch.argmin, (x,))

    x = torch.tensor([1.0, 3.0])
    assert RUN[run](pushed(f))(x)[0] == 1


def test_tangents_have_the_dtype_of_what_they_belong_to():
    """torch's own of a float32 number times a Python float is float64; other branches' are not."""

    def f(flag, x):
        return pushed(lambda x: cond(flag, lambda x: x * 0.5, torch.sin, (x,)))(x)

    x = torch.tensor(2.0)
    assert_same(compiled(f)(TRUE, x), (x * 0.5, torch.tensor(0.5)))
    assert_same(compiled(f)(FALSE, x), (x.sin(), x.cos()))


@pytest.mark.parametrize("run", RUN)
def test_no_operands(run):
    f = RUN[run](lambda flag: cond(flag, lambda: torch.ones(2), lambda: torch.zeros(2)))
    assert f(TRUE).sum() == 2
    assert f(FALSE).sum() == 0


def test_operands_that_are_no_tensors():
    def f(flag, x, power):
        return cond(flag, lambda x, n: x**n, lambda x, n: x * n, (x, power))

    x = torch.tensor([2.0, 3.0])
    for run in RUN.values():
        assert_same(run(f)(TRUE, x, 3), x**3)
    assert_same(vmap(f, (0, 0, None))(torch.tensor([True, False]), x, 3), torch.tensor([8.0, 9.0]))


# --- plain torch.compile -----------------------------------------------------------------------


def plainly(f, *args):
    """f and its gradient by plain torch.compile, and without."""
    results = []
    torch._dynamo.reset()
    for g in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        given = [a.clone().requires_grad_() if a.is_floating_point() else a for a in args]
        result = g(*given)
        wanted = [a for a in given if a.requires_grad]
        found = torch.autograd.grad(result, wanted, allow_unused=True, materialize_grads=True)
        results.append((result, found))
    assert_same(results[1], results[0])


PLAIN = {
    "operands": lambda flag, w, x: cond(flag, torch.mul, torch.add, (w, x)).sum(),
    "closures": lambda flag, w, x: cond(flag, lambda: w * x, lambda: w + x).sum(),
    "identity": lambda flag, w, x: cond(flag, lambda w, x: w, lambda w, x: x * w, (w, x)).sum(),
    "dicts": lambda flag, w, x: cond(
        flag, lambda d: {"y": d["w"] * d["x"]}, lambda d: {"y": d["w"]}, ({"w": w, "x": x},)
    )["y"].sum(),
    "TensorDict": lambda flag, w, x: cond(
        flag, lambda d: d["w"] * d["x"], lambda d: d["x"], (TensorDict({"w": w, "x": x}),)
    ).sum(),
    "a number": lambda flag, w, x: cond(
        flag, lambda w, n: w * n, lambda w, n: w - n, (w * x, 2.0)
    ).sum(),
    "switch": lambda flag, w, x: switch(
        flag.long() + 1, [torch.add, torch.sub, torch.mul], (w, x)
    ).sum(),
}


@pytest.mark.dynamo
@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("case", PLAIN)
def test_plain_torch_compile(case, flag):
    plainly(PLAIN[case], torch.tensor(flag), normal(0, 2), normal(1, 2))


@pytest.mark.parametrize("operands", [torch.ones(2), {"x": torch.ones(2)}, None, iter(())])
def test_operands_that_are_no_sequence(operands):
    with pytest.raises(TypeError, match=r"cond: operands: expected a sequence of trees"):
        unchecked(cond)(TRUE, torch.sin, torch.cos, operands)
    with pytest.raises(TypeError, match=r"switch: operands: expected a sequence of trees"):
        unchecked(switch)(torch.tensor(0), [torch.sin, torch.cos], operands)
    with pytest.raises(TypeError, match=r"while_loop: carried_inputs: expected a sequence"):
        unchecked(while_loop)(lambda x: x.sum() < 0, lambda x: (x,), operands)

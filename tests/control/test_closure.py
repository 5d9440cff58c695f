"""lift: every tensor that a function reaches is found, and replaced, once."""

import functools

import pytest
import torch
from control_cases import assert_same, compiled, normal
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch.func import grad, vmap

from funcnets.control import cond, remat
from funcnets.control.closure import Opaque, lift

GLOBAL = torch.tensor(100.0)


def in_a_closure(w):
    return lambda x: w * x


def in_a_nested_closure(w):
    def inner(x):
        return w * x

    return lambda x: inner(x)


def in_a_default(w):
    def f(x, w=w):
        return w * x

    return f


def in_a_keyword_default(w):
    def f(x, *, unused=None, w=w):
        return w * x

    return f


def in_a_partial(w):
    return functools.partial(torch.mul, w)


def in_a_partial_by_name(w):
    return functools.partial(lambda x, w, n: w * x * n, w=w, n=1)


def in_a_partial_of_a_closure(w):
    return functools.partial(lambda n, x: w * x * n, 1)


def in_a_tree(w):
    held = {"a": [w, None, 3], "b": ("name", torch.sin)}
    return lambda x: held["a"][0] * x


def in_a_tensordict(w):
    held = TensorDict({"a": TensorDict({"w": w})})
    return lambda x: held["a", "w"] * x


def in_a_tree_of_functions(w):
    layers = [lambda x: w * x, lambda x: x + 0]
    return lambda x: layers[1](layers[0](x))


def in_a_decorated_function(w):
    @functools.wraps(in_a_closure)
    def f(x):
        return w * x

    return f


def in_a_recursive_function(w):
    def power(x, n):
        return x if n == 0 else torch.pow(w, 1 / 3) * power(x, n - 1)

    return lambda x: power(x, 3)


def in_mutually_recursive_functions(w):
    def even(x, n):
        return x if n == 0 else odd(x, n - 1)

    def odd(x, n):
        return torch.pow(w, 0.5) * even(x, n - 1)

    return functools.partial(even, n=4)


class Times:
    def __init__(self, factor):
        self.factor = factor


def in_a_method(w):
    def times(self, x):
        return w * x * self.factor

    Times.times = times
    return Times(1).times


def twice_in_one(w):
    again = w
    return lambda x: w.sqrt() * again.sqrt() * x


PLACES = [value for name, value in list(globals().items()) if name.startswith(("in_", "twice_"))]


@pytest.mark.parametrize("place", PLACES)
def test_tensors_are_found_and_replaced_wherever_they_are(place):
    w, other, x = torch.tensor(3.0), torch.tensor(5.0), torch.tensor(2.0)
    f = place(w)
    tensors, build = lift(f)
    assert [id(t) for t in tensors] == [id(w)]
    torch.testing.assert_close(build([other])(x), place(other)(x))
    torch.testing.assert_close(f(x), torch.tensor(6.0))
    # And so they are differentiated, by what differentiates operands alone.
    expected = grad(lambda w: place(w)(x))(w)
    assert_same(grad(lambda w: remat(place(w))(x))(w), expected)
    g = compiled(grad(lambda w, flag: cond(flag, place(w), torch.neg, (x,))))
    torch.testing.assert_close(g(w, torch.tensor(True)), expected)
    assert g(w, torch.tensor(False)) == 0


def test_what_is_a_constant():
    times = Times(GLOBAL)
    for f in (lambda x: GLOBAL * x, lambda x: times.factor * x, torch.sin, Times, times):
        tensors, build = lift(f)
        assert tensors == []
        assert build([]) is f
    w = torch.ones(1)
    assert lift(Opaque(lambda x: w * x))[0] == []
    assert Opaque(lambda x, y: x + w * y)(1, 2) == 3


def test_a_recursive_function_of_nothing_is_itself():
    def count(n):
        return 0 if n == 0 else 1 + count(n - 1)

    assert lift(count)[1]([]) is count


def test_a_variable_that_is_not_set_yet_stays_so():
    def make(w):
        def f(x):
            return w * x if x.sum() > 0 else later

        _, build = lift(f)
        again = build([w + 1])
        assert again(torch.ones(1)) == w + 1
        with pytest.raises(NameError):
            again(-torch.ones(1))
        later = w
        return f(-torch.ones(1)) + later

    make(torch.tensor(2.0))


def test_the_original_is_left_alone():
    w = torch.tensor(2.0)

    def f(x, scale=w, *, shift=w):
        return x * scale + shift * w

    _, build = lift(f)
    assert build([torch.tensor(10.0)])(1) == 10 + 100
    assert f(1) == 2 + 4
    copy = build([w])
    assert (copy.__name__, copy.__defaults__, copy.__kwdefaults__) == ("f", (w,), {"shift": w})


@given(st.lists(st.integers(0, 3), max_size=8))
def test_a_tree_of_functions_and_tensors_has_each_tensor_once(places):
    pool = [normal(i) for i in range(4)]
    functions = [lambda x, w=pool[place]: w + x for place in places]
    tensors, build = lift((functions, [pool[place] for place in places], "name"))
    order = list(dict.fromkeys(places))
    assert [id(t) for t in tensors] == [id(pool[place]) for place in order]
    made, again, name = build([t + 10 for t in tensors])
    assert name == "name"
    for place, f, tensor in zip(places, made, again, strict=True):
        assert_same(f(0), pool[place] + 10)
        assert_same(tensor, pool[place] + 10)


def test_functions_that_share_many_functions_are_walked_once():
    """Forty levels of two references each: 2 ** 40 ways to the innermost."""
    w = torch.tensor(1.0)
    f = in_a_closure(w)
    for _ in range(40):
        f = (lambda g, h: lambda x: g(x) if x is not None else h(x))(f, f)
    tensors, build = lift(f)
    assert len(tensors) == 1
    assert build([torch.tensor(7.0)])(1) == 7


def test_batched_tensors_in_a_closure():
    ws, flags = normal(0, 3), torch.tensor([True, False, True])
    f = vmap(lambda w, flag: cond(flag, lambda: w.abs().log(), lambda: w * 2))
    assert_same(f(ws, flags), torch.where(flags, ws.abs().log(), ws * 2))

"""Taps: what flows through a network, read and replaced by name."""

from __future__ import annotations

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, jacrev, vmap
from torchvision.models.feature_extraction import create_feature_extractor

from funcnets import compile, models, random
from funcnets.model import Model, bind
from funcnets.taps import Taps

KEY = random.key(2)
MODEL = models.resnet("basic", (1, 2), 4, width=4, stem="small")
PARAMS = MODEL.init(KEY)
X = random.normal(KEY, (2, 3, 6, 6))
PLACES = ("relu", "layer1.0", "layer1", "layer2.0", "layer2.1", "layer2", "avgpool")


@given(places=st.lists(st.sampled_from(PLACES), min_size=1, unique=True))
def test_taps_change_nothing_and_come_in_the_order_of_the_network(places):
    outputs, found = MODEL.apply(PARAMS, X, taps=places)
    assert torch.equal(outputs, MODEL.apply(PARAMS, X))
    assert list(found) == [place for place in PLACES if place in places]
    (trained, same), buffers = MODEL.apply(PARAMS, X, train=True, taps=places)
    expected, expected_buffers = MODEL.apply(PARAMS, X, train=True)
    assert torch.equal(trained, expected)
    assert list(same) == list(found)
    assert (buffers == expected_buffers).all()


def test_the_places_have_the_values_of_torchvision():
    places = ["relu", "maxpool", "layer1.1", "layer2", "layer3.0", "layer4", "avgpool"]
    with torch.random.fork_rng():
        module = torchvision.models.resnet18().eval()
    model = models.resnet18()
    found = model.apply(model.from_torchvision(module), X, taps=places)[1]
    names = {place: f"{place}.relu_1" if "." in place else place for place in places}
    names |= {"layer2": "layer2.1.relu_1", "layer4": "layer4.1.relu_1"}
    expected = create_feature_extractor(module, {node: place for place, node in names.items()})(X)
    for place in places:
        torch.testing.assert_close(found[place], expected[place].reshape(found[place].shape))


@given(place=st.sampled_from(PLACES), scale=st.floats(-2, 2))
def test_a_replacement_flows_on(place, scale):
    outputs, found = MODEL.apply(PARAMS, X, taps={place: lambda h: scale * h, "relu": None})
    plain = MODEL.apply(PARAMS, X, taps=[place])[1][place]
    if place != "relu":  # there the later entry of the two holds
        torch.testing.assert_close(found[place], scale * plain)
    if place == "avgpool":
        expected = scale * plain @ PARAMS["fc", "weight"].mT + PARAMS["fc", "bias"]
        torch.testing.assert_close(outputs, expected)


def test_the_gradient_at_a_place_by_a_perturbation():
    def outputs(change):
        return MODEL.apply(PARAMS, X, taps={"avgpool": lambda h: h + change})[0]

    found = MODEL.apply(PARAMS, X, taps=["avgpool"])[1]["avgpool"]
    jacobian = jacrev(lambda change: outputs(change).sum(0))(torch.zeros_like(found))
    expected = PARAMS["fc", "weight"][:, None].expand(-1, 2, -1)
    torch.testing.assert_close(jacobian, expected)


def test_under_vmap_grad_and_compile():
    def loss(params, x):
        outputs, found = MODEL.apply(params, x[None], taps=["layer1"])
        return outputs.square().sum() + found["layer1"].square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))
    expected = torch.stack([grad(loss)(PARAMS, x) for x in X])
    for function in (each, compile(each, backend="aot_eager")):
        found = function(PARAMS, X)
        torch.testing.assert_close(
            found["conv1", "weight"], expected["conv1", "weight"], rtol=1e-4, atol=1e-5
        )


def test_submodels_have_their_places_below_their_name():
    inner = models.mlp(3, 3, (5,))

    def forward(params, x, config, *, train=False, key=None, taps=()):
        tap, new = Taps("twice", taps), {}
        for name in ("first", "second"):
            x, new[name] = tap.run(name, inner, params[name], x, train=train, key=key)
        return tap.finish(x, new, train)

    def init(key, config):
        from tensordict import TensorDict

        return TensorDict({"first": inner.init(key), "second": inner.init(key)})

    model = bind("twice", 0, init, forward)
    params, x = model.init(KEY), X[0, 0, :3, :3]
    places = ["first.hidden.0", "first", "second.hidden.0", "second"]
    for train in (False, True):
        result = model.apply(params, x, train=train, taps=places)
        outputs, found = result[0] if train else result
        assert list(found) == places
        first, hidden = inner.apply(params["first"], x, taps=["hidden.0"])
        assert torch.equal(found["first"], first)
        assert torch.equal(found["first.hidden.0"], hidden["hidden.0"])
        assert torch.equal(found["second"], outputs)
        assert torch.equal(outputs, inner.apply(params["second"], first))
    with pytest.raises(ValueError, match=r"mlp: taps: expected names among hidden\.0; got other"):
        model.apply(params, x, taps=["second.other"])


@pytest.mark.parametrize(
    ("tap", "error", "message"),
    [
        (
            lambda h: h[:, :3],
            ValueError,
            r"expected float32\[2, 8, 3, 3\] .*, got float32\[2, 3, 3, 3\]",
        ),
        (
            lambda h: h[:1],
            ValueError,
            r"expected float32\[2, 8, 3, 3\] .*, got float32\[1, 8, 3, 3\]",
        ),
        (lambda h: h.double(), ValueError, ".* got float64"),
        (lambda h: None, ValueError, ".* got NoneType"),
        (torch.ones(1), TypeError, "expected a function or None, got float32"),
    ],
)
def test_a_tap_that_puts_something_else_there(tap, error, message):
    with pytest.raises(error, match=f"resnet: taps: layer2: {message}"):
        MODEL.apply(PARAMS, X, taps={"layer2": tap})


def test_names_that_no_place_has():
    with pytest.raises(ValueError, match=r"resnet: taps: expected names among relu, .*layer9"):
        MODEL.apply(PARAMS, X, taps=["layer1", "layer9"])
    with pytest.raises(TypeError, match="resnet: taps: expected a list of names, got 'layer1'"):
        MODEL.apply(PARAMS, X, taps="layer1")


def test_a_function_of_ones_own_needs_no_taps():
    model = Model(init=lambda key: {}, apply=lambda params, x: x)
    assert model.apply({}, 3) == 3
    bound = bind("own", 0, lambda key, config: {}, lambda params, x, config, train, key: x)
    assert bound.apply({}, 3) == 3


def test_errors_of_a_submodel_keep_their_kind():
    for kind in (ValueError, TypeError):

        def fails(params, x, kind=kind, **options):
            raise kind("x: no")

        with pytest.raises(kind, match="chain: first: x: no"):
            Taps("chain", ()).run("first", Model(None, fails), {}, X, train=False)

"""What is the residual MLP's own: heads by name, blocks stacked and shared, its errors."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_cases import NoArithmetic
from tensordict import TensorDict
from torch.func import grad

from funcnets import compile, models, random, tree
from funcnets.models.residual_mlp import Config

KEY = random.key(4)
X = random.normal(KEY, (5, 3), dtype=torch.float64)


def drawn(model):
    return tree.cast(model.init(KEY), torch.float64)


@given(st.integers(1, 4), st.sampled_from(["mlp", "glu"]))
def test_stacked_blocks_are_the_blocks(depth, block):
    """The same numbers in one tree or in several, and the same gradients."""
    apart = models.residual_mlp(3, 2, 4, depth, block=block)
    stacked = models.residual_mlp(3, 2, 4, depth, block=block, share="stacked")
    params = drawn(apart)

    def together(params):
        blocks = tree.stack([params["blocks", str(i)] for i in range(depth)])
        return TensorDict({**dict(params.items()), "blocks": blocks})

    def loss(model):
        return lambda params: model.apply(params, X).square().sum()

    torch.testing.assert_close(stacked.apply(together(params), X), apart.apply(params, X))
    expected = together(grad(loss(apart))(params))
    for step in (grad(loss(stacked)), compile(grad(loss(stacked)), backend="eager")):
        found = step(together(params))
        tree.map(torch.testing.assert_close, found, expected)


@given(st.integers(1, 4))
def test_a_shared_block_has_the_sum_of_the_gradients_of_its_uses(depth):
    shared = models.residual_mlp(3, 2, 4, depth, share="all")
    apart = models.residual_mlp(3, 2, 4, depth)
    params = drawn(shared)
    copies = TensorDict({str(i): params["blocks"] for i in range(depth)})
    unshared = TensorDict({**dict(params.items()), "blocks": copies})
    torch.testing.assert_close(shared.apply(params, X), apart.apply(unshared, X))
    found = grad(lambda p: shared.apply(p, X).square().sum())(params)["blocks"]
    each = grad(lambda p: apart.apply(p, X).square().sum())(unshared)["blocks"]
    expected = tree.map(lambda *parts: sum(parts), *(each[str(i)] for i in range(depth)))
    tree.map(torch.testing.assert_close, found, expected)


def test_compiling_stacked_blocks_makes_a_graph_of_one_size():
    sizes = []

    def backend(graph, inputs):
        parts = [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
        sizes.append(sum(len(part.graph.nodes) for part in parts))
        return graph

    for depth in (2, 12):
        model = models.residual_mlp(3, 2, 4, depth, share="stacked")
        step = grad(lambda params, model=model: model.apply(params, X).square().sum())
        compile(step, backend=backend)(drawn(model))
    assert sizes[0] == sizes[1]


def test_one_head_of_several_by_its_name():
    model = models.residual_mlp(3, {"kind": 2, "age": 1}, 4, 2)
    params = drawn(model)
    outputs = model.apply(params, X)
    assert list(outputs) == ["kind", "age"]
    assert torch.equal(model.apply(params, X, "age"), outputs["age"])
    assert torch.equal(model.apply(params, X, head="age"), outputs["age"])
    with pytest.raises(TypeError, match="heads"):
        model.apply(params, X, heads="age")
    gradients = grad(lambda p: model.apply(p, X, "age").sum())(params)
    assert not gradients["heads", "kind", "weight"].any()
    assert gradients["heads", "age", "weight"].all()
    for head in ("other", ""):
        message = f"residual_mlp: head: expected one of kind, age, got {head!r}"
        with NoArithmetic(), pytest.raises(ValueError, match=re.escape(message)):
            model.apply(params, X, head)
    single = models.residual_mlp(3, 2, 4, 0)
    with pytest.raises(ValueError, match=r"head: expected one of None \(the model has one head"):
        single.apply(drawn(single), X, "kind")


@pytest.mark.parametrize("share", ["none", "stacked", "all"])
def test_stochastic_depth_grows_to_its_rate_and_dropout_draws_at_each_depth(share):
    model = models.residual_mlp(
        3, 2, 64, 2, share=share, stochastic_depth=1.0, activation="identity"
    )
    params, x = drawn(model), random.normal(KEY, (400, 3), dtype=torch.float64)
    one = models.residual_mlp(3, 2, 64, 1, activation="identity")
    blocks = params["blocks"] if share != "none" else params["blocks", "0"]
    first = tree.map(lambda leaf: leaf[0], blocks) if share == "stacked" else blocks
    alone = TensorDict({**dict(params.items()), "blocks": {"0": first}})
    none = models.residual_mlp(3, 2, 64, 0)
    bare = TensorDict({k: v for k, v in params.items() if k != "blocks"})
    # The last block is always left out; the first for half of the samples, doubled for the rest.
    outputs, buffers = model.apply(params, x, train=True, key=KEY)
    assert buffers.is_empty()
    skipped = (outputs - none.apply(bare, x)).abs().amax(1) < 1e-9
    assert abs(skipped.double().mean() - 0.5) < 5 * (0.25 / 400) ** 0.5
    doubled = TensorDict(alone.to_dict())
    doubled["blocks", "0", "fc2"] = doubled["blocks", "0", "fc2"].apply(lambda leaf: 2 * leaf)
    torch.testing.assert_close(outputs[~skipped], one.apply(doubled, x)[~skipped])
    with pytest.raises(ValueError, match="residual_mlp: key: expected a key"):
        model.apply(params, x, train=True)


def test_dropout_in_every_block_with_a_key_of_its_own():
    model = models.residual_mlp(3, 2, 4, 2, share="all", dropout=1.0, activation="tanh")
    params, bias = drawn(model), models.residual_mlp(3, 2, 4, 0)
    # Nothing is left of the blocks but their last bias.
    outputs, _ = model.apply(params, X, train=True, key=KEY)
    moved = TensorDict({k: v for k, v in params.items() if k != "blocks"})
    moved["stem"] = moved["stem"].clone()
    moved["stem", "bias"] = moved["stem", "bias"] + 2 * params["blocks", "fc2", "bias"]
    torch.testing.assert_close(outputs, bias.apply(moved, X))

    half = models.residual_mlp(
        3, 2, 400, 2, share="all", expansion=1, dropout=0.5, activation="identity"
    )
    params = drawn(half)
    # A block that adds what dropout leaves of ones.
    params["blocks", "fc1"] = params["blocks", "fc1"].apply(torch.zeros_like)
    params["blocks", "fc1", "bias"] += 1
    params["blocks", "fc2", "weight"] = torch.eye(400, dtype=torch.float64)
    params["blocks", "fc2", "bias"] *= 0
    taps = half.apply(params, X, train=True, key=KEY, taps=["stem", "blocks.0", "blocks.1"])[0][1]
    first, second = taps["blocks.0"] - taps["stem"], taps["blocks.1"] - taps["blocks.0"]
    both = torch.stack([first, second]) > 1
    assert (both.double().mean((1, 2)) - 0.5).abs().max() < 5 * (0.25 / 2000) ** 0.5
    assert abs((both[0] == both[1]).double().mean() - 0.5) < 5 * (0.25 / 2000) ** 0.5


def test_each_option_arrives_in_its_field():
    options = {
        "expansion": 3,
        "block": ("mlp", "glu"),
        "share": "none",
        "activation": "tanh",
        "dropout": 0.1,
        "stochastic_depth": 0.2,
    }
    config = models.residual_mlp(3, {"a": 1}, 8, 2, **options).config
    assert config == Config(3, (("a", 1),), 8, 2, **options)
    deeper = dataclasses.replace(config, depth=3, block="glu")
    assert len(models.residual_mlp(**vars(deeper) | {"heads": 1}).init(KEY)["blocks"].keys()) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": -1}, "residual_mlp: depth: expected 0 or more, got -1"),
        ({"share": "some"}, "residual_mlp: share: expected one of"),
        ({"block": "conv"}, "residual_mlp: block: expected one of"),
        ({"block": ("mlp",)}, "residual_mlp: block: expected 2 kinds (as depth), got 1"),
        (
            {"block": ("mlp", "glu"), "share": "all"},
            "residual_mlp: block: expected one kind with share='all'",
        ),
        ({"heads": ()}, "residual_mlp: heads: expected at least one, got none"),
        ({"heads": (("a", 0),)}, "residual_mlp: heads.a: expected a positive integer, got 0"),
        ({"dropout": 2.0}, "residual_mlp: dropout: expected a rate"),
        ({"activation": "sine"}, "sine"),
    ],
)
def test_configurations_that_make_no_sense(options, message, unchecked):
    with pytest.raises((ValueError, KeyError), match=re.escape(message)):
        Config(**({"in_features": 3, "heads": 2, "depth": 2} | options))


def test_inputs_that_do_not_fit():
    model = models.residual_mlp(3, 2, 4, 1)
    params, x = drawn(model), torch.empty(5, 4)
    message = "residual_mlp: x: expected [..., 3], got [5, 4]"
    with NoArithmetic(), pytest.raises(ValueError, match=re.escape(message)):
        model.apply(params, x)

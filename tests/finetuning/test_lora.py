import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch.func import grad, vmap

import funcnets
from funcnets import finetuning, models, optim, random, training, tree

MODELS = {
    "mlp": (models.mlp(6, 4, (8,)), (6,), "*.weight"),
    "cnn": (models.cnn(1, 4, (4, 6)), (1, 8, 8), ["features.*.0.weight", "classifier.weight"]),
    "vit": (
        models.vit(8, 4, 1, 2, 8, 4, in_channels=1),
        (1, 8, 8),
        ["*.in_proj_weight", "*.out_proj.weight", "conv_proj.weight"],
    ),
}


def made(name, rank=2, seed=0, zero=True):
    """A network in float64, an overlay (of normal numbers, unless zero), and inputs."""
    model, shape, where = MODELS[name]
    # Of normal numbers: a new ViT has a head of zeros, which nothing gets through.
    weights, buffers = tree.partition(tree.cast(model.init(random.key(seed)), torch.float64))
    params = tree.merge(drawn(weights, seed + 3), buffers)
    overlay = finetuning.init_lora(random.key(seed + 1), params, where, rank)
    if not zero:
        overlay = drawn(overlay, seed + 2)
    return model, params, overlay, random.normal(random.key(9), (5, *shape), dtype=torch.float64)


def drawn(overlay, seed):
    numbers = iter(range(1000))
    return tree.map(
        lambda leaf: random.normal(
            random.fold_in(random.key(seed), next(numbers)), leaf.shape, dtype=leaf.dtype
        ),
        overlay,
    )


def equal(a, b):
    tree.check(a, b)
    return all(torch.equal(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


@given(
    outputs=st.integers(1, 6),
    rest=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    pick=st.data(),
)
def test_a_new_overlay_has_two_thin_matrices_and_changes_no_bit(outputs, rest, dtype, pick):
    rank = pick.draw(st.integers(1, min(outputs, math.prod(rest))))
    weight = random.normal(random.key(0), (outputs, *rest), dtype=dtype)
    params = TensorDict({"conv": {"weight": weight, "bias": torch.ones(outputs)}})
    overlay = finetuning.init_lora(random.key(1), params, "conv.weight", rank)
    found = dict(tree.leaves_with_path(overlay))
    assert found.keys() == {("conv", "weight", "a"), ("conv", "weight", "b")}
    assert found["conv", "weight", "a"].shape == (rank, math.prod(rest))
    assert found["conv", "weight", "b"].shape == (outputs, rank)
    assert {leaf.dtype for leaf in found.values()} == {dtype}
    assert found["conv", "weight", "a"].abs().min() > 0
    assert equal(finetuning.apply_lora(params, overlay, scale=3.0), params)


@pytest.mark.parametrize("name", MODELS)
def test_a_network_under_a_new_overlay_computes_the_same_bits(name):
    model, params, overlay, x = made(name)
    merged = finetuning.apply_lora(params, overlay)
    assert equal(merged, params)
    assert torch.equal(model.apply(merged, x), model.apply(params, x))
    other = finetuning.apply_lora(params, drawn(overlay, 3))
    assert not torch.allclose(model.apply(other, x), model.apply(params, x))


def test_first_factors_are_normal_and_all_different():
    params = TensorDict({name: torch.zeros(20, 400) for name in "xy"})
    overlay = finetuning.init_lora(random.key(0), params, "*", 20)
    x, y = overlay["x", "a"], overlay["y", "a"]
    assert x.std() == pytest.approx(400**-0.5, rel=0.03)
    assert abs(torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1]) < 0.05
    keys = random.split(random.key(0), 3)
    several = vmap(lambda key: finetuning.init_lora(key, params, "*", 2))(keys)
    for key, one in zip(keys.unbind(), tree.unstack(several), strict=True):
        assert equal(one, finetuning.init_lora(key, params, "*", 2))


@given(rank=st.integers(1, 3), scale=st.floats(-2, 2), tensor=st.booleans())
def test_a_linear_layer_is_the_weight_and_two_thin_layers_beside_it(rank, scale, tensor):
    params = TensorDict({"weight": random.normal(random.key(0), (3, 5), dtype=torch.float64)})
    overlay = drawn(finetuning.init_lora(random.key(1), params, "weight", rank), 2)
    x = random.normal(random.key(3), (4, 5), dtype=torch.float64)
    given_scale = torch.tensor(scale) if tensor else scale  # float32, which leaves float64 alone
    found = F.linear(x, finetuning.apply_lora(params, overlay, given_scale)["weight"])
    a, b = overlay["weight", "a"], overlay["weight", "b"]
    exact = float(given_scale)
    expected = F.linear(x, params["weight"]) + exact * F.linear(F.linear(x, a), b)
    torch.testing.assert_close(found, expected)


def test_a_scale_leaves_the_dtype_alone():
    params = TensorDict({"weight": torch.ones(3, 5, dtype=torch.bfloat16)})
    overlay = drawn(finetuning.init_lora(random.key(1), params, "weight", 2), 2)
    scales = torch.tensor([0.5, 2.0], dtype=torch.float64)
    found = vmap(lambda scale: finetuning.apply_lora(params, overlay, scale))(scales)
    assert found["weight"].dtype == torch.bfloat16
    assert torch.equal(found["weight"][1], finetuning.apply_lora(params, overlay, 2)["weight"])


@given(groups=st.sampled_from([1, 2]), kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)))
def test_a_convolution_is_the_weight_and_two_convolutions_beside_it(groups, kernel):
    weight = random.normal(random.key(0), (6, 4 // groups, *kernel), dtype=torch.float64)
    params = TensorDict({"weight": weight})
    overlay = drawn(finetuning.init_lora(random.key(1), params, "weight", 2), 2)
    x = random.normal(random.key(3), (2, 4, 5, 5), dtype=torch.float64)
    found = F.conv2d(x, finetuning.apply_lora(params, overlay)["weight"], groups=groups)
    thin = overlay["weight", "a"].reshape(2, *weight.shape[1:])
    parts = zip(x.chunk(groups, 1), overlay["weight", "b"].chunk(groups), strict=True)
    beside = [F.conv2d(F.conv2d(part, thin), b[:, :, None, None]) for part, b in parts]
    torch.testing.assert_close(found, F.conv2d(x, weight, groups=groups) + torch.cat(beside, 1))


@pytest.mark.parametrize("name", MODELS)
def test_merged_and_unmerged_but_for_rounding_while_the_base_keeps_its_bits(name):
    _, params, overlay, _ = made(name, zero=False)
    kept = tree.map(torch.clone, params)
    merged = finetuning.apply_lora(params, overlay, 0.7)
    again = finetuning.unmerge_lora(merged, overlay, 0.7)
    assert not equal(merged, params)
    tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13), again, params)
    assert equal(params, kept)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_the_overlay_are_those_of_the_chain_rule(name):
    model, params, overlay, x = made(name, zero=False)

    def loss(params):
        return model.apply(params, x).square().mean()

    found = grad(lambda one: loss(finetuning.apply_lora(params, one, 0.5)))(overlay)
    weights, buffers = tree.partition(finetuning.apply_lora(params, overlay, 0.5))
    slopes = dict(
        tree.leaves_with_path(grad(lambda weights: loss(tree.merge(weights, buffers)))(weights))
    )
    factors = dict(tree.leaves_with_path(overlay))
    for path, gradient in tree.leaves_with_path(found):
        slope = slopes[path[:-1]].flatten(1)
        a, b = factors[*path[:-1], "a"], factors[*path[:-1], "b"]
        expected = b.mT @ slope if path[-1] == "a" else slope @ a.mT
        torch.testing.assert_close(gradient, 0.5 * expected)


@pytest.mark.parametrize("name", MODELS)
def test_an_ensemble_of_overlays_over_one_network(name):
    model, params, _, x = made(name)
    members = [made(name, seed=0)[2], *(drawn(made(name)[2], seed) for seed in (5, 6))]
    overlays = tree.stack(members)

    def loss(overlay, scale):
        return model.apply(finetuning.apply_lora(params, overlay, scale), x).square().mean()

    scales = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    for f in (loss, grad(loss)):
        found = vmap(f)(overlays, scales)
        expected = [f(one, scale) for one, scale in zip(members, scales.unbind(), strict=True)]
        together = torch.stack(expected) if f is loss else tree.stack(expected)
        tree.map(torch.testing.assert_close, found, together)
    outputs = vmap(lambda p, o: model.apply(finetuning.apply_lora(p, o), x), in_dims=(None, 0))(
        params, overlays
    )
    torch.testing.assert_close(outputs[0], model.apply(params, x))


def trainer(where=("lora", "base.classifier")):
    model, _, adapted = MODELS["cnn"]
    adapted = finetuning.lora(model, adapted[0], rank=2, scale=0.5)
    step = training.make_step(adapted, F.cross_entropy, optim.adam(0.1), trainable=where)
    x = random.normal(random.key(3), (6, 1, 8, 8))
    return adapted, step, (x, torch.arange(6) % 4)


def test_training_moves_the_overlay_and_the_head_alone():
    model, step, batch = trainer()
    params = model.init(random.key(0))
    state = step.init(params, random.key(1))
    for _ in range(8):
        state, metrics = step(state, batch)
    last = training.parameters(state)
    moved = {
        tree.join(path)
        for path, leaf in tree.leaves_with_path(last)
        if not torch.equal(leaf, params[path])
    }
    assert {name.partition(".")[0] for name in moved} == {"lora", "base"}
    below = {name for name in moved if name.startswith("base") and "running" not in name}
    assert below == {"base.classifier.weight", "base.classifier.bias"}
    assert any("running" in name for name in moved)  # of the norms, which train as ever
    assert len([name for name in moved if name.startswith("lora")]) == len(
        tree.leaves(last["lora"])
    )
    assert metrics["loss"] < F.cross_entropy(model.apply(params, batch[0]), batch[1])
    whole = finetuning.apply_lora(last["base"], last["lora"], 0.5)
    plain = MODELS["cnn"][0].apply(whole, batch[0])
    torch.testing.assert_close(model.apply(last, batch[0]), plain, rtol=0, atol=0)


def test_training_compiled_is_training():
    model, step, batch = trainer()
    state = again = step.init(model.init(random.key(0)), random.key(1))
    compiled = funcnets.compile(step, backend="aot_eager")
    for _ in range(2):
        state, _ = step(state, batch)
        again, _ = compiled(again, batch)
    tree.map(torch.testing.assert_close, training.parameters(again), training.parameters(state))


def test_inputs_are_checked_as_those_of_the_network():
    model = MODELS["cnn"][0]
    assert finetuning.lora(model, where="classifier", rank=1).check == model.check


def test_errors_say_what_does_not_fit():
    params = MODELS["cnn"][0].init(random.key(0))
    key = random.key(1)
    with pytest.raises(ValueError, match=r"'conv9': expected leaves that match, got none"):
        finetuning.init_lora(key, params, "conv9", 1)
    with pytest.raises(ValueError, match=r"classifier\.bias: expected .* got float32\[4\]"):
        finetuning.init_lora(key, params, "classifier", 1)
    with pytest.raises(ValueError, match=r"rank: expected at most 4, .* \[4, 6\], got 5"):
        finetuning.init_lora(key, params, "classifier.weight", 5)
    for rank in (0, True):
        with pytest.raises(ValueError, match="rank: expected an int of at least 1"):
            finetuning.init_lora(key, params, "classifier.weight", rank)

    a, b = torch.ones(1, 6), torch.ones(4, 1)
    wrong = [
        ({"classifier": {"weight": {"a": a}}}, "expected a and b, got a"),
        ({"head": {"weight": {"a": a, "b": b}}}, "head.weight: expected a weight there"),
        ({"classifier": {"weight": {"a": b, "b": b}}}, r"weight \[4, 6\], got a \[4, 1\]"),
        ({"classifier": {"weight": {"a": a, "b": b[1:]}}}, r"b \[3, 1\]"),
        ({"classifier": {"bias": {"a": a, "b": b}}}, r"weight \[4\]"),
        ({"classifier": {"weight": {"a": a.double(), "b": b}}}, "in its dtype"),
    ]
    for overlay, message in wrong:
        for f in (finetuning.apply_lora, finetuning.unmerge_lora):
            with pytest.raises(ValueError, match=message):
                f(params, TensorDict(overlay))

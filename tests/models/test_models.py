"""What holds of every model: it equals its torch module, is pure, and bears every transform."""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
import re
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import CASES, DTYPE, FAMILIES, NoArithmetic, differentiable
from scipy.stats import ks_2samp
from tensordict import TensorDict
from torch.func import grad, vjp, vmap

from funcnets import load, models, random, save, testing, tree

# The first case of each family, and those of another way through it: compiling takes seconds.
COMPILED = {case.model.family: name for name, case in reversed(CASES.items())}
OTHERS = ["residual_mlp_stacked", "densenet_remat", "gpt_rotary", "seq2seq_tokens", "swin_v2"]
EVERY_WAY = [*COMPILED.values(), *OTHERS]

every_way = pytest.mark.parametrize("name", EVERY_WAY)
every_model = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
modes = pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
KEY = random.key(7)


def close(actual, expected, tolerance=1e-10):
    tree.map(
        lambda a, b: torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance),
        actual,
        expected,
    )


def identical(actual, expected):
    close(actual, expected, tolerance=0)


def smooth(outputs):
    """The outputs that have a gradient."""
    return [leaf for leaf in tree.leaves(outputs) if leaf.is_floating_point()]


def loss_of(case):
    """``loss(params, inputs, key)``: of the training mode, with the new buffers."""

    def loss(params, inputs, key):
        outputs, buffers = case.model.apply(params, *inputs, train=True, key=key)
        return sum((y + 0.3 * y.square()).sum() for y in smooth(outputs)), buffers

    return loss


# Samples enough that a path which some of them do not take is taken by others.
AXES = {"gated": {"batch": 8}, "gated_gumbel": {"batch": 8}}
THOROUGH = settings.default.max_examples > 10


def checks():
    for name, case in CASES.items():
        skip = [] if name in EVERY_WAY else ["compiled_equals_eager"]  # which takes seconds
        found = testing.properties(
            case.model,
            case.declared,
            also=["shares_no_memory"],
            draws=case.draws,
            examples=10 if THOROUGH else 2,
            axes=AXES.get(name),
            skip=skip,
        )
        for invariant, check in found.items():
            yield pytest.param(check, id=f"{name}-{invariant}")


@pytest.mark.parametrize("check", checks())
def test_property(check):
    check()


def test_the_properties_see_the_mode_of_training():
    """Which the checks of signatures would hide."""
    for case in CASES.values():
        subject = testing.Subject(case.model, case.declared)
        assert subject.trains
        assert subject.keyed


def test_every_family_is_tested():
    names = [module.name for module in pkgutil.iter_modules(models.__path__)]
    modules = {name: importlib.import_module(f"funcnets.models.{name}") for name in names}
    families = {name for name, module in modules.items() if hasattr(module, "Config")}
    assert {case.model.family for case in CASES.values()} == families == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
@modes
@given(data=st.data(), seed=st.integers(0, 2**16))
def test_equals_the_torch_module(family, train, data, seed):
    case, key = data.draw(FAMILIES[family]), random.key(seed)
    params, inputs = case.params(random.fold_in(key, 0)), case.inputs(random.fold_in(key, 1))
    module = case.reference(params).train(train)

    points, rebuild = differentiable(inputs)

    def outputs_of(params, points):
        outputs = case.model.apply(params, *rebuild(points), train=train)
        outputs = outputs[0] if train else outputs
        return smooth(outputs), outputs

    tracked = [x.clone().requires_grad_() for x in points]
    expected = module(*rebuild(tracked))
    outputs, pull_back, all_outputs = vjp(outputs_of, params, points, has_aux=True)
    close(all_outputs, tree.map(torch.detach, expected))

    keys = iter(random.split(random.fold_in(key, 2), len(outputs)).unbind())
    cotangent = [random.normal(next(keys), y.shape, dtype=DTYPE) for y in outputs]
    tree.map(lambda y, g: y.backward(g, retain_graph=True), smooth(expected), cotangent)
    param_grads, input_grads = pull_back(cotangent)
    close(input_grads, [x.grad for x in tracked])
    wanted = {name: parameter.grad for name, parameter in module.named_parameters()}
    for name, gradient in tree.to_state_dict(param_grads).items():
        # None for a buffer, and for a path that no sample took.
        close(gradient, torch.zeros_like(gradient) if wanted.get(name) is None else wanted[name])
    if train:
        buffers = case.model.apply(params, *inputs, train=True)[1]
        close(buffers, tree.partition(tree.from_module(module))[1])


@every_model
def test_initial_values_are_distributed_as_in_torch(case):
    n = 400
    held = tree.to_state_dict(vmap(case.model.init)(random.split(KEY, n)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reference = tree.stack([tree.from_module(case.module()) for _ in range(100)])
    firsts = []
    for name, drawn in tree.to_state_dict(reference).items():
        if (drawn == drawn.flatten()[0]).all():  # the same for every key, as in a norm
            identical(held[name], drawn[:1].expand_as(held[name]))
            continue
        assert ks_2samp(held[name].flatten(), drawn.flatten()).pvalue > 1e-4, name
        if case.model.family in ("mlp", "cnn"):  # torch.nn's own draws, whose law is known
            weight = held[f"{name.rpartition('.')[0]}.weight"][0]
            bound = 1 / math.sqrt(weight[0].numel())
            assert drawn.abs().max() <= bound
            # Kolmogorov's distance from the uniform distribution.
            ranked = held[name].flatten().sort().values / bound / 2 + 0.5
            distance = (ranked - torch.linspace(0, 1, len(ranked))).abs().max()
            assert distance < 1.7 / math.sqrt(len(ranked))
        firsts.append(held[name].reshape(n, -1)[:, 0])
    if len(firsts) > 1:  # no two leaves are drawn alike
        correlation = torch.corrcoef(torch.stack(firsts)) - torch.eye(len(firsts))
        assert correlation.abs().max() < 5 / math.sqrt(n)


@pytest.mark.parametrize("case", [case for case in CASES.values() if case.draws])
def test_training_without_the_key_it_draws_by(case):
    params, inputs = case.params(KEY), case.inputs(KEY)
    with pytest.raises(ValueError, match=r"key: expected a key .*, got None"), NoArithmetic():
        case.model.apply(params, *inputs, train=True)


@pytest.mark.dynamo
@every_way
def test_plain_torch_compile_forward_and_backward(name):
    torch.compiler.reset()
    case = CASES[name]
    params, inputs, key = case.params(KEY), case.inputs(KEY), random.key(0)
    model = case.model
    compiled = torch.compile(model.apply, fullgraph=True, backend="aot_eager")
    close(compiled(params, *inputs), model.apply(params, *inputs))
    tracked = tree.map_with_path(
        lambda path, leaf: leaf.clone().requires_grad_(tree.is_trainable(path, leaf)), params
    )
    points, rebuild = differentiable(inputs)
    tracked_points = [x.clone().requires_grad_() for x in points]

    def loss(apply, params, points):
        outputs, buffers = apply(params, *rebuild(points), train=True, key=key)
        close(
            tree.map(torch.detach, (outputs, buffers)),
            model.apply(params.detach(), *inputs, train=True, key=key),
        )
        return sum(y.square().sum() for y in smooth(outputs))

    loss(compiled, tracked, tracked_points).backward()
    wanted, wanted_points = grad(partial(loss, model.apply), (0, 1))(params, points)
    close([x.grad for x in tracked_points], wanted_points)
    trainable, _ = tree.partition(tracked)
    close(tree.map(lambda leaf: leaf.grad, trainable), tree.partition(wanted)[0])


@every_model
def test_an_ensemble_saved_and_loaded(case, tmp_path):
    params, inputs = vmap(case.model.init)(random.split(KEY, 3)), case.inputs(KEY, torch.float32)
    assert params.batch_size == (3,)
    save(tmp_path / "params", params, case.model)
    model, loaded = load(tmp_path / "params")
    assert (model.family, model.config) == (case.model.family, case.model.config)
    assert loaded.batch_size == (3,)
    identical(loaded, params)
    outputs, expected = (
        vmap(apply, (0, *[None] * len(inputs)))(loaded, *inputs)
        for apply in (model.apply, case.model.apply)
    )
    identical(outputs, expected)


@every_model
def test_the_config_makes_the_model_again(case):
    config = case.model.config
    again = getattr(models, case.model.family)(**vars(config))
    assert again.config == config
    assert hash(again.config) == hash(config)
    identical(again.init(KEY), case.model.init(KEY))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.dropout = 0.5


@every_model
def test_parameters_that_do_not_fit(case):
    params, inputs = case.params(KEY), case.inputs(KEY)
    path, leaf = tree.leaves_with_path(params)[-1]
    name, size = tree.join(path), list(leaf.shape)

    def refused(changed, message):
        for train in (False, True):
            with pytest.raises(ValueError, match=message), NoArithmetic():
                case.model.apply(changed, *inputs, train=train, key=KEY)

    wrong = params.clone()
    wrong[path] = torch.ones(*size, 2, dtype=DTYPE)
    refused(wrong, re.escape(f"{name}: expected {size}, got {[*size, 2]}"))
    missing = params.clone()
    del missing[path]
    refused(missing, re.escape(f"{name}: missing; expected {size}"))
    extra = params.clone()
    extra["more", "weight"] = torch.ones(2)
    refused(extra, re.escape("more: unexpected; got weight [2]"))
    ensemble = vmap(case.model.init)(random.split(KEY, 3))
    refused(ensemble, r"params: expected one network, got an ensemble of batch size \[3\].*vmap")
    refused(TensorDict({}), "missing; expected")
    trainable, buffers = tree.partition(params)
    if tree.leaves(buffers):
        refused(trainable, r"running_mean: missing; expected \[\d\]")


@every_model
def test_inputs_of_another_dtype(case):
    params, inputs = case.params(KEY), case.inputs(KEY, torch.float32)
    if not differentiable(inputs)[0]:
        pytest.skip("its inputs are integers")
    message = r": x: expected float64 \(as weight\), got float32\["
    with pytest.raises(ValueError, match=message), NoArithmetic():
        case.model.apply(params, *inputs)


def misshapen(x):
    """An input like x that no model takes which takes x."""
    if isinstance(x, dict):
        return {name: misshapen(each) for name, each in x.items()}
    return x[..., None, None] if x.is_floating_point() else x.double()


@every_model
def test_the_check_says_what_apply_says(case, unchecked):
    params, inputs = case.params(KEY), case.inputs(KEY)
    case.model.check(*inputs)
    wrong = [misshapen(x) for x in inputs]
    with pytest.raises(ValueError, match=r"expected") as said, NoArithmetic():
        case.model.apply(params, *wrong, key=KEY)
    if case.model.family in {"seq2seq", "transformer"}:  # which have none
        return case.model.check(*wrong)
    with pytest.raises(ValueError, match=re.escape(str(said.value))), NoArithmetic():
        case.model.check(*wrong)


@pytest.mark.parametrize("case", [case for case in CASES.values() if case.draws])
@pytest.mark.parametrize("shape", [(1, 2), (3,)])
def test_keys_of_a_wrong_shape(case, shape, unchecked):
    params, inputs, key = case.params(KEY), case.inputs(KEY), torch.ones(shape, dtype=torch.uint64)
    message = re.escape(f"key: expected uint64[2], got uint64{list(shape)}")
    with pytest.raises(ValueError, match=message), NoArithmetic():
        case.model.apply(params, *inputs, train=True, key=key)

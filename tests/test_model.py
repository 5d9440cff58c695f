from __future__ import annotations

import dataclasses

import pytest
import torch
import torchvision
from tensordict import TensorDict
from torch.func import grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from funcnets import models, random, tree
from funcnets.model import Model, bind, parameter_specs


@dataclasses.dataclass(frozen=True)
class Config:
    width: int = 3
    slope: float = 2.0


def init(key, config):
    first, second = random.split(key)
    return TensorDict(
        {
            "fc1": {"weight": random.normal(first, (config.width, 2))},
            "fc2": {"weight": random.normal(second, (1, config.width))},
            "norm": {"running_mean": torch.zeros(config.width, device=key.device)},
        }
    )


def forward(params, x, config, *, train=False, key=None):
    hidden = config.slope * torch.tanh(params["fc1", "weight"] @ x)
    outputs = params["fc2", "weight"] @ (hidden - params["norm", "running_mean"])
    if not train:
        return outputs
    noise = random.normal(key, outputs.shape)
    return outputs + noise, TensorDict({"norm": {"running_mean": hidden}})


@pytest.fixture
def model():
    """A new one for each test, for it looks at init once."""
    return bind("toy", Config(), init, forward)


PARAMS = init(random.key(0), Config())
X = torch.tensor([0.5, -1.0])


def test_the_pair(model):
    assert torch.equal(model.init(random.key(0))["fc1", "weight"], PARAMS["fc1", "weight"])
    assert torch.equal(model.apply(PARAMS, X), forward(PARAMS, X, Config()))
    outputs, buffers = model.apply(PARAMS, X, train=True, key=random.key(1))
    assert torch.equal(outputs, forward(PARAMS, X, Config(), train=True, key=random.key(1))[0])
    assert tree.leaves_with_path(buffers)[0][0] == ("norm", "running_mean")
    assert (model.family, model.config) == ("toy", Config())
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.family = "other"


def test_init_runs_once_and_computes_nothing():
    calls = []

    def counted(key, config):
        calls.append(key.device.type)
        return init(key, config)

    model = bind("toy", Config(), counted, forward)
    for _ in range(3):
        model.apply(PARAMS, X)
    assert calls == ["meta"]


def test_any_pair_of_functions_makes_a_model():
    model = Model(init=lambda key: {"w": 1.0}, apply=lambda params, x: params["w"] * x)
    assert model.apply({"v": 0, "w": 3}, 2) == 6
    assert model.family is model.config is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc1": {"weight": torch.ones(2, 3)}}, r"fc1\.weight: expected \[3, 2\], got \[2, 3\]"),
        ({"fc2": torch.ones(3)}, r"fc2: expected weight \[1, 3\], got \[3\]"),
        ({"fc3": {"weight": torch.ones(3)}}, r"fc3: unexpected; got weight \[3\]"),
        ({"norm": {}}, r"norm\.running_mean: missing; expected \[3\]|norm: missing"),
    ],
)
@pytest.mark.parametrize("kind", [TensorDict, dict])
def test_parameters_that_do_not_fit(model, change, message, kind):
    changed = kind({**PARAMS.to_dict(), **change})
    for call in (
        model.apply,
        lambda p, x: model.apply(p, x, train=True, key=random.key(0)),
        lambda p, x: grad(lambda x: model.apply(p, x).sum())(x),
    ):
        with pytest.raises(ValueError, match=message):
            call(changed, X)
    model.apply(PARAMS.clone(), X)


def test_what_is_no_difference(model):
    params = TensorDict({name: PARAMS[name] for name in ("norm", "fc2", "fc1")})
    params["unused"] = TensorDict({})
    assert torch.equal(model.apply(params, X), model.apply(PARAMS, X))
    model.apply(tree.cast(params, torch.float64), X.double())


def test_missing_buffers_are_named(model):
    trainable, buffers = tree.partition(PARAMS)
    with pytest.raises(ValueError, match=r"norm: missing; expected running_mean \[3\]"):
        model.apply(trainable, X)
    model.apply(tree.merge(trainable, buffers), X)


def test_no_tree(model):
    with pytest.raises(ValueError, match=r"\(root\): expected .* got \[3\]"):
        model.apply(torch.ones(3), X)


def test_an_ensemble_without_vmap(model):
    ensemble = vmap(model.init)(random.split(random.key(0), 4))
    for params in (ensemble, ensemble.to_dict(), tree.stack([ensemble, ensemble])):
        with pytest.raises(ValueError, match=r"ensemble of batch size \[(4|2, 4)\].*vmap"):
            model.apply(params, X)
    assert vmap(model.apply, (0, None))(ensemble, X).shape == (4, 1)


def loss(model, params, x):
    return model.apply(params, x).square().sum()


def test_first_called_inside_transforms():
    ensemble = vmap(lambda key: init(key, Config()))(random.split(random.key(0), 4))
    fresh = [bind("toy", Config(), init, forward) for _ in range(5)]
    wanted = torch.stack([forward(p, X, Config()) for p in tree.unstack(ensemble)])
    torch.testing.assert_close(vmap(fresh[0].apply, (0, None))(ensemble, X), wanted)
    gradient = vmap(grad(lambda p: loss(fresh[1], p, X)))(ensemble)
    alone = grad(lambda p: loss(fresh[2], p, X))(tree.unstack(ensemble)[2])
    torch.testing.assert_close(gradient["fc1", "weight"][2], alone["fc1", "weight"])
    jvp(lambda x: fresh[3].apply(PARAMS, x), (X,), (X,))
    bad = ensemble.clone()
    bad["fc1", "weight"] = torch.ones(4, 2, 3)
    with pytest.raises(ValueError, match=r"fc1\.weight: expected \[3, 2\], got \[2, 3\]"):
        vmap(fresh[4].apply, (0, None))(bad, X)


@pytest.mark.parametrize("mode", ["real", "fake"])
def test_first_called_inside_a_trace(model, mode):
    leaves, structure = tree.flatten(PARAMS)

    def flat(*leaves):
        return model.apply(tree.unflatten(structure, list(leaves)), X)

    traced = make_fx(flat, tracing_mode=mode, _allow_non_fake_inputs=True)(*leaves)
    assert torch.equal(traced(*leaves), forward(PARAMS, X, Config()))
    assert not [node for node in traced.graph.nodes if "random" in str(node.target)]


def test_errors_of_init_come_through():
    def broken(key, config):
        raise RuntimeError("no such width")

    with pytest.raises(RuntimeError, match="no such width"):
        bind("toy", Config(), broken, forward).apply(PARAMS, X)


def test_parameter_specs():
    specs = parameter_specs(lambda key: init(key, Config()))
    assert tree.leaves_with_path(specs) == [
        (path, tree.Spec(leaf.shape, leaf.dtype)) for path, leaf in tree.leaves_with_path(PARAMS)
    ]


@pytest.mark.dynamo
def test_compiled(model):
    torch.compiler.reset()
    compiled = torch.compile(model.apply, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(PARAMS, X), model.apply(PARAMS, X))
    key = random.key(3)
    outputs, buffers = compiled(PARAMS, X, train=True, key=key)
    expected, expected_buffers = model.apply(PARAMS, X, train=True, key=key)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(
        buffers["norm", "running_mean"], expected_buffers["norm", "running_mean"]
    )

    trained = PARAMS.clone()
    trained["fc1", "weight"].requires_grad_()
    compiled(trained, X).sum().backward()
    wanted = grad(lambda p: model.apply(p, X).sum())(PARAMS)["fc1", "weight"]
    torch.testing.assert_close(trained["fc1", "weight"].grad, wanted)


@pytest.mark.parametrize(
    ("family", "inputs"),
    [
        (models.resnet("basic", (1,), 3, width=4, stem="small"), (torch.ones(2, 3, 6, 6),)),
        (models.cnn(3, 3, (4,), norm=None), (torch.ones(2, 3, 6, 6),)),
        (models.residual_mlp(3, 3, width=4, depth=2), (torch.ones(2, 3),)),
        (models.gated(models.mlp(3, 4, ()), *[models.mlp(4, 3, ())] * 2), (torch.ones(2, 3), True)),
    ],
)
def test_plain_dicts_are_trees(family, inputs):
    params = family.init(random.key(0))
    held = params.to_dict()

    def value(params):
        return family.apply(params, *inputs).square().sum()

    assert value(held) == value(params)
    slope = grad(value)(held)
    assert type(slope) is dict
    for a, b in zip(tree.leaves_like(slope, params), tree.leaves(grad(value)(params)), strict=True):
        assert torch.equal(a, b)
    name = next(iter(held))
    with pytest.raises(ValueError, match=f"{name}.*missing"):
        value({other: child for other, child in held.items() if other != name})


@pytest.mark.parametrize("inputs", [2, 3])
def test_more_inputs_than_there_are(inputs):
    family = models.mlp(2, 1)
    params = family.init(random.key(0))
    with pytest.raises(TypeError, match=f"mlp: expected 1 inputs at most, got {inputs}"):
        family.apply(params, *[torch.zeros(1, 2)] * inputs)


def test_equality_is_that_of_family_and_configuration(model):
    again = bind("toy", Config(), init, forward)
    assert again == model
    assert hash(again) == hash(model)
    assert again != bind("toy", Config(width=4), init, forward)
    assert again != bind("other", Config(), init, forward)
    own = Model(init=init, apply=forward)
    assert own == Model(init=init, apply=forward)
    assert own != Model(init=init, apply=init)
    assert own != model
    assert model != "toy"


@pytest.mark.dynamo
def test_more_models_than_dynamo_compiles_of_one_code_object():
    for width in range(1, 12):
        model = bind("toy", Config(width), init, forward)
        params = model.init(random.key(0))
        compiled = torch.compile(model.apply, fullgraph=True, backend="eager")
        assert torch.equal(compiled(params, X), model.apply(params, X))


def test_a_state_dict_as_torch_gives_it_will_do():
    with torch.random.fork_rng():
        module = torchvision.models.resnet18(num_classes=3).eval()
    model = models.resnet18(num_classes=3)
    raw = TensorDict(module.state_dict()).unflatten_keys(".")
    assert raw["bn1", "num_batches_tracked"].shape == ()
    x = random.normal(random.key(0), (2, 3, 32, 32))
    expected = model.apply(tree.from_module(module), x)
    torch.testing.assert_close(model.apply(raw, x), expected, rtol=0, atol=0)
    buffers = model.apply(raw, x, train=True)[1]
    assert not tree.compare(buffers, tree.partition(tree.from_module(module))[1])
    torch.testing.assert_close(expected, module(x).detach())

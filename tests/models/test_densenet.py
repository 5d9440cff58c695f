"""What is the dense network's own: channels that add up, old names, and memory that is given up."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from model_cases import NoArithmetic
from torch.func import grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from funcnets import models, random, tree
from funcnets.models import densenet, densenet121, densenet161
from funcnets.models.densenet import Config

KEY = random.key(3)
X = random.normal(KEY, (2, 3, 8, 8), dtype=torch.float64)
SMALL = {"growth_rate": 4, "width": 6, "bottleneck": 2, "stem": "small"}


def made(*args, **options):
    model = densenet(*args, **options)
    return model, tree.cast(model.init(KEY), torch.float64)


@given(
    depths=st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple),
    growth_rate=st.integers(1, 4),
    width=st.integers(2, 6),
    compression=st.sampled_from([0.5, 0.75, 1.0]),
)
def test_each_layer_adds_as_many_channels_as_the_growth_rate(
    depths, growth_rate, width, compression
):
    model, params = made(
        depths,
        5,
        growth_rate=growth_rate,
        width=width,
        compression=compression,
        stem="small",
    )
    names, sizes, channels, side = [], [], width, 8
    for block, depth in enumerate(depths, start=1):
        if block > 1:
            channels, side = int(channels * compression), side // 2
            names.append(f"features.transition{block - 1}")
            sizes.append((2, channels, side, side))
        for layer in range(1, depth + 1):
            names.append(f"features.denseblock{block}.denselayer{layer}")
            sizes.append((2, growth_rate, side, side))
        channels += depth * growth_rate
        names.append(f"features.denseblock{block}")
        sizes.append((2, channels, side, side))
    names += ["features.norm5", "avgpool"]
    sizes += [(2, channels, side, side), (2, channels)]
    found = model.apply(params, X, taps=names)[1]
    assert [(name, tuple(value.shape)) for name, value in found.items()] == list(
        zip(names, sizes, strict=True)
    )


def test_a_block_passes_on_what_it_read_and_what_each_layer_added():
    model, params = made((3,), 5, **SMALL)
    parts = ["features.relu0", *(f"features.denseblock1.denselayer{i}" for i in (1, 2, 3))]
    found = model.apply(params, X, taps=[*parts, "features.denseblock1"])[1]
    together = torch.cat([found[name] for name in parts], 1)
    assert torch.equal(found["features.denseblock1"], together)
    # A layer reads all before it: a change of the first reaches the third, past the second.
    place = "features.denseblock1.denselayer2"
    changed = model.apply(
        params,
        X,
        taps={parts[1]: lambda h: h + 1, place: lambda h: found[place], parts[3]: None},
    )[1]
    assert not torch.equal(changed[parts[3]], found[parts[3]])


def test_the_places_have_the_values_of_torchvision():
    with torch.random.fork_rng():
        module = torchvision.models.densenet121().eval()
    found, places = {}, ["relu0", "pool0", "denseblock1", "transition1", "denseblock2", "norm5"]
    for name in places:
        # Cloned, for the module's next activation writes over some of them.
        getattr(module.features, name).register_forward_hook(
            lambda _, inputs, output, name=name: found.update({f"features.{name}": output.clone()})
        )
    x = random.normal(KEY, (1, 3, 32, 32))
    logits = module(x)
    model = densenet121()
    names = [f"features.{name}" for name in places]
    outputs, taps = model.apply(model.from_torchvision(module), x, taps=names)
    torch.testing.assert_close(outputs, logits)
    for name in names:
        torch.testing.assert_close(taps[name], found[name])


def test_the_old_names_of_torchvisions_files():
    with torch.random.fork_rng():
        state = torchvision.models.densenet121().state_dict()
    old = {re.sub(r"(denselayer\d+\.(norm|conv))([12])", r"\1.\3", k): v for k, v in state.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    assert "features.transition1.norm.weight" in old
    assert not old.keys() & {"features.denseblock1.denselayer1.norm1.weight"}
    model = densenet121()
    assert not tree.compare(model.from_torchvision(old), model.from_torchvision(state))
    for name, leaf in tree.to_state_dict(model.from_torchvision(old)).items():
        assert torch.equal(leaf, state[name]), name
    params = densenet121(7).from_torchvision(old, KEY, fresh="classifier")
    assert params["classifier", "weight"].shape == (7, 1024)


def loss_of(model):
    def loss(params, x, key):
        outputs, buffers = model.apply(params, x, train=True, key=key)
        return outputs.square().sum(), (outputs, buffers)

    return loss


@given(
    depths=st.lists(st.integers(1, 2), min_size=1, max_size=2).map(tuple),
    stem=st.sampled_from(["small", "imagenet"]),
    dropout=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 99),
)
def test_rematerialised_the_numbers_are_the_same(depths, stem, dropout, seed):
    options = {**SMALL, "stem": stem, "dropout": dropout}
    plain, params = made(depths, 5, **options)
    again, same = made(depths, 5, remat=True, **options)
    assert torch.equal(same["classifier", "weight"], params["classifier", "weight"])
    torch.testing.assert_close(again.apply(params, X), plain.apply(params, X), rtol=0, atol=0)
    key = random.key(seed)
    results = [grad(loss_of(m), (0, 1), has_aux=True)(params, X, key) for m in (plain, again)]
    keys = random.split(key, 2)
    results += [
        vmap(grad(loss_of(m), has_aux=True), (None, None, 0))(params, X, keys)
        for m in (plain, again)
    ]
    for wanted, found in (results[:2], results[2:]):
        tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9), wanted, found)


def kept_by_backward(model, params, x):
    """The bytes of what the backward pass holds, parameters and input apart."""
    trainable, buffers = tree.partition(params)
    tracked = tree.map(lambda leaf: leaf.clone().requires_grad_(), trainable)
    given = {leaf.untyped_storage().data_ptr() for leaf in [x, *tree.leaves([tracked, buffers])]}
    held = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            held[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive, so that none is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.apply(tree.merge(tracked, buffers), x, train=True)[0].sum()
    return sum(size for size, _ in held.values())


def test_rematerialised_the_memory_grows_with_depth_and_not_with_its_square():
    def kept(depth, remat):
        model, params = made((depth,), 5, growth_rate=4, width=4, stem="small", remat=remat)
        return kept_by_backward(model, params, X)

    # What each layer keeps more than the one before it, without and with rematerialisation.
    more = {remat: (kept(12, remat) - kept(11, remat)) - (kept(3, remat) - kept(2, remat))
            for remat in (False, True)}  # fmt: skip
    pixels = X[:, 0].numel() * X.element_size()
    assert more[False] >= 9 * 4 * pixels
    assert more[True] < 0.5 * 4 * pixels * 9
    assert kept(12, True) < 0.55 * kept(12, False)


class Counter(TorchDispatchMode):
    """Counts the concatenations."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.cat.default
        return func(*args, **(kwargs or {}))


def test_inference_computes_nothing_twice():
    counts = []
    for remat in (False, True):
        model, params = made((2, 2), 5, remat=remat, **SMALL)
        with Counter() as counter:
            model.apply(params, X)
        counts.append(counter.count)
    assert counts == [6, 6]


def test_dropout_is_that_of_each_layer():
    model, params = made((2,), 5, dropout=0.5, **SMALL)
    names = [f"features.denseblock1.denselayer{i}" for i in (1, 2)]
    x = random.normal(KEY, (50, 3, 8, 8), dtype=torch.float64)
    (_, found), _ = model.apply(params, x, train=True, key=KEY, taps=names)
    zero = [found[name] == 0 for name in names]
    for mask in zero:
        assert abs(mask.double().mean() - 0.5) < 5 * (0.25 / mask.numel()) ** 0.5
    both = (zero[0] & zero[1]).double().mean()  # drawn apart: a quarter
    assert abs(both - 0.25) < 0.02
    with pytest.raises(ValueError, match="densenet: key: expected a key"):
        model.apply(params, x, train=True)


def test_each_option_arrives_in_its_field():
    options = {
        "in_channels": 1,
        "growth_rate": 5,
        "width": 7,
        "bottleneck": 3,
        "compression": 0.25,
        "dropout": 0.125,
        "stem": "small",
        "remat": True,
    }
    assert densenet([1, 2], 9, **options).config == Config((1, 2), 9, **options)
    assert densenet161(9, width=64).config == Config((6, 12, 36, 24), 9, growth_rate=48)
    config = dataclasses.replace(models.densenet169(9).config, depths=(1, 1))
    assert list(densenet(**vars(config)).init(KEY)["features"].keys()) == [
        "conv0",
        "norm0",
        "denseblock1",
        "transition1",
        "denseblock2",
        "norm5",
    ]


def check(options):
    """The checks of a configuration without those of its annotations, which users do not have."""
    config = Config()
    for name, value in options.items():
        object.__setattr__(config, name, value)
    config.__post_init__()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": ()}, "densenet: depths: expected at least one block, got none"),
        ({"depths": (2, 0)}, "densenet: depths[1]: expected a positive integer, got 0"),
        ({"stem": "large"}, "densenet: stem: expected one of 'imagenet', 'small', got 'large'"),
        ({"growth_rate": 0}, "densenet: growth_rate: expected a positive integer, got 0"),
        ({"bottleneck": 0}, "densenet: bottleneck: expected a positive integer, got 0"),
        ({"dropout": -0.1}, "densenet: dropout: expected a rate between 0 and 1, got -0.1"),
        ({"compression": 1.5}, "densenet: compression: expected a rate between 0 and 1, got 1.5"),
        ({"compression": 0.001}, "densenet: compression: expected a share that leaves a channel"),
    ],
)
def test_configurations_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check(options)


@pytest.mark.parametrize("stem", ["imagenet", "small"])
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_the_smallest_image(stem, blocks):
    model, params = made((1,) * blocks, 5, growth_rate=2, width=2, stem=stem)
    smallest = model.config.smallest()
    x = torch.zeros(1, 3, smallest, smallest + 3, dtype=torch.float64)
    place = f"features.denseblock{blocks}"
    assert model.apply(params, x, taps=[place])[1][place].shape[2] == 1
    if smallest > 1:
        x = x[:, :, 1:]
        message = f"x: expected [batch, 3, {smallest} or more, {smallest} or more], got [1, 3, "
        with NoArithmetic(), pytest.raises(ValueError, match=re.escape(message)):
            model.apply(params, x)
        # One pixel less would have left nothing.
        object.__setattr__(model.config, "smallest", lambda: 1)
        with pytest.raises(RuntimeError):
            model.apply(params, x)


def test_the_smallest_image_of_torchvision():
    least = torchvision.models.DenseNet121_Weights.DEFAULT.meta["min_size"]
    assert (densenet121().config.smallest(),) * 2 == least

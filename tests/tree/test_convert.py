import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import nn
from trees import params, same

from funcnets import tree


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embed.weight
        self.again = self.head


MODULES = {
    "linear": lambda: nn.Linear(3, 2),
    "without bias": lambda: nn.Linear(3, 2, bias=False),
    "without parameters": lambda: nn.ReLU(),
    "sequence": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
    "no statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "transformer": lambda: nn.TransformerEncoderLayer(8, 2, 16),
    "lstm": lambda: nn.LSTM(3, 4, num_layers=2),
    "tied": Tied,
    "resnet18": lambda: torchvision.models.resnet18(num_classes=7),
    "swin": lambda: torchvision.models.SwinTransformer([4, 4], 8, [2], [2], [4, 4], num_classes=3),
}


def build(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = MODULES[name]()
        with torch.no_grad():
            for tensor in module.state_dict().values():
                if tensor.is_floating_point():
                    tensor.add_(torch.randn_like(tensor))
                elif not tensor.ndim:
                    tensor.fill_(17)
    return module


@pytest.fixture(params=MODULES)
def module(request):
    return build(request.param)


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def test_names_are_those_of_the_module(module):
    whole = tree.from_module(module)
    state = module.state_dict()
    trainable, _ = tree.partition(whole)
    names = {tree.join(path) for path, _ in tree.leaves_with_path(trainable)}
    assert names == {name for name, _ in module.named_parameters()}
    for path, leaf in tree.leaves_with_path(whole):
        assert torch.equal(leaf, state[tree.join(path)])
        assert type(leaf) is torch.Tensor
        assert not leaf.requires_grad
        assert path[-1] != "num_batches_tracked"


def test_there_and_back(module, request):
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    whole = tree.from_module(module)
    assert equal(tree.to_state_dict(whole, module), before)
    assert equal(tree.to_state_dict(whole, module.state_dict()), before)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if not name.endswith(("num_batches_tracked", "relative_position_index")):
                tensor.zero_()
    tree.to_module(whole, module)
    assert equal(module.state_dict(), before)
    assert same(tree.from_module(module), whole)


def test_copies(module):
    whole = tree.from_module(module)
    kept = tree.map(torch.clone, whole)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.zero_()
    assert same(whole, kept)
    tree.to_module(whole, module)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.zero_()
    assert same(whole, kept)


def test_a_state_dict_loads_into_the_module(module):
    state = tree.to_state_dict(tree.from_module(module), module)
    fresh = build("linear") if not state else module
    fresh.load_state_dict(state or fresh.state_dict(), strict=True)


def test_without_a_target_torch_accepts_missing_counters():
    module = build("sequence")
    state = tree.to_state_dict(tree.from_module(module))
    assert "1.num_batches_tracked" not in state
    module.load_state_dict(state, strict=True)


def test_counters_are_those_of_the_target():
    source, target = build("sequence"), build("sequence")
    target[1].num_batches_tracked.fill_(3)
    tree.to_module(tree.from_module(source), target)
    assert target[1].num_batches_tracked == 3
    assert tree.to_state_dict(tree.from_module(source), source)["1.num_batches_tracked"] == 17


def test_tied_weights_are_held_once():
    module = build("tied")
    whole = tree.from_module(module)
    assert ("head", "weight") not in whole.keys(include_nested=True)
    assert "again" not in whole
    assert tree.count(tree.partition(whole)[0]) == sum(p.numel() for p in module.parameters())
    whole["embed", "weight"] = torch.ones(5, 3)
    tree.to_module(whole, module)
    assert module.head.weight is module.embed.weight
    assert module.head.weight.sum() == 15
    state = tree.to_state_dict(whole, module)
    assert state["head.weight"] is state["embed.weight"]


def test_integer_buffers_stay_but_for_counters_and_constants():
    module = build("swin")
    for part in module.modules():
        part.register_buffer("table", torch.arange(3))
    whole = tree.from_module(module)
    names = [path[-1] for path, _ in tree.leaves_with_path(whole)]
    indices = [leaf for path, leaf in tree.leaves_with_path(whole) if path[-1] == "table"]
    assert indices
    assert len(indices) == sum(1 for _ in module.modules())
    assert all(leaf.dtype == torch.int64 for leaf in indices)
    assert "relative_position_index" in {n.rpartition(".")[2] for n in module.state_dict()}
    assert "relative_position_index" not in names


def test_meta_modules_have_no_ties():
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert tree.count(tree.from_module(module)) == 12


@given(params())
def test_state_dicts_of_any_tree(whole):
    state = tree.to_state_dict(whole)
    again = tree.from_state_dict(state)
    counters = [name for name, leaf in state.items() if not leaf.ndim and leaf.dtype == torch.int64]
    assert sorted(tree.to_state_dict(again)) == sorted(set(state) - set(counters))
    assert equal(tree.to_state_dict(again, state), state)


def test_the_module_is_left_alone_when_something_does_not_fit():
    module = build("sequence")
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    whole = tree.map(torch.zeros_like, tree.from_module(module))
    whole["1", "bias"] = torch.zeros(9)
    with pytest.raises(ValueError, match=r"1\.bias: expected \[4\], got \[9\]"):
        tree.to_module(whole, module)
    del whole["1"]
    whole["2"] = TensorDict({"weight": torch.ones(2)})
    with pytest.raises(ValueError) as caught:
        tree.to_module(whole, module)
    assert str(caught.value).splitlines() == [
        "1: missing; expected weight [4], bias [4], running_mean [4], running_var [4]",
        "2: unexpected; got weight [2]",
    ]
    assert equal(module.state_dict(), before)


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ({"a": torch.ones(1), "a.b": torch.ones(1)}, ValueError, r"a\.b: expected no entry"),
        ({"a.b": torch.ones(1), "a": torch.ones(1)}, ValueError, "a: expected no entry"),
        ({"a": {"b": 1}}, TypeError, "a: expected a tensor, got dict"),
    ],
)
def test_bad_state_dicts(state, error, message):
    with pytest.raises(error, match=message):
        tree.from_state_dict(state)


def test_lazy_modules():
    with pytest.raises(ValueError, match="weight: not initialised"):
        tree.from_module(nn.LazyLinear(3))


def test_two_leaves_of_one_name():
    with pytest.raises(ValueError, match=r"a\.b: expected one leaf"):
        tree.to_state_dict({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}})


@given(params(), st.data())
def test_transfer(into, data):
    chosen = data.draw(
        st.lists(st.sampled_from([path for path, _ in tree.leaves_with_path(into)]), unique=True)
    )
    source, _ = tree.partition(
        tree.map(lambda leaf: torch.ones_like(leaf, dtype=torch.float64), into),
        lambda path, leaf: path in chosen,
    )
    result, report = tree.transfer(source, into)
    assert not report.unexpected
    assert len(report.missing) == len(tree.leaves(into)) - len(chosen)
    for path, leaf in tree.leaves_with_path(result):
        old = into[path]
        assert leaf.dtype == old.dtype
        assert (leaf == 1).all() if path in chosen else leaf is old


def test_transfer_of_a_backbone():
    source = tree.from_module(build("resnet18"))
    with torch.random.fork_rng():
        into = tree.from_module(torchvision.models.resnet18(num_classes=3))
    source["extra"] = TensorDict({"weight": torch.ones(1)})
    source["bn1"] = torch.ones(2)
    result, report = tree.transfer(source, into)
    assert report.missing == ()
    assert report.unexpected == ("extra.weight",)
    assert report.mismatched == ("bn1", "fc.weight", "fc.bias")
    assert torch.equal(result["conv1", "weight"], source["conv1", "weight"])
    assert result["fc", "weight"] is into["fc", "weight"]
    assert result["bn1", "weight"] is into["bn1", "weight"]

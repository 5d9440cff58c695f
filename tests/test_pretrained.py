"""Parameters from torchvision: modules, state_dicts, files and downloads, whole and in part."""

from __future__ import annotations

import re

import pytest
import safetensors.torch
import torch
import torchvision
from torchvision.models import resnet18

from funcnets import models, random, tree

KEY = random.key(0)
X = random.normal(KEY, (2, 3, 32, 32))
MODEL = models.resnet18()
with torch.random.fork_rng():
    MODULE = resnet18().eval()
    STATE = MODULE.state_dict()


class Download:
    """In the place of a member of torchvision's enum of weights."""

    def get_state_dict(self, progress, check_hash):
        assert check_hash
        return STATE


def sources(folder):
    torch.save(STATE, folder / "weights.pth")
    safetensors.torch.save_file(STATE, folder / "weights.safetensors")
    return {
        "module": MODULE,
        "state_dict": STATE,
        "download": Download(),
        "file": folder / "weights.pth",
        "name of a file": str(folder / "weights.pth"),
        "safetensors": folder / "weights.safetensors",
    }


def test_every_source_gives_the_same(tmp_path):
    expected = MODULE(X).detach()
    for weights in sources(tmp_path).values():
        params = MODEL.from_torchvision(weights)
        torch.testing.assert_close(MODEL.apply(params, X), expected)


def test_the_real_enum_has_what_is_asked_of_it():
    member = torchvision.models.ResNet18_Weights.DEFAULT
    assert callable(member.get_state_dict)


def test_the_parameters_are_copies():
    before = STATE["conv1.weight"].clone()
    MODEL.from_torchvision(MODULE)["conv1", "weight"].zero_()
    assert torch.equal(MODULE.conv1.weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_new_head(dtype):
    model = models.resnet18(num_classes=7)
    weights = {
        name: leaf.to(dtype) if leaf.is_floating_point() else leaf for name, leaf in STATE.items()
    }
    params = model.from_torchvision(weights, KEY, fresh="fc")
    assert {leaf.dtype for leaf in tree.leaves(params)} == {dtype}
    drawn = tree.cast(model.init(KEY), dtype)
    assert torch.equal(params["fc", "weight"], drawn["fc", "weight"])
    for name, leaf in tree.to_state_dict(params).items():
        if not name.startswith("fc"):
            assert torch.equal(leaf, weights[name]), name
    assert model.apply(params, X.to(dtype)).shape == (2, 7)


def test_fresh_parts_need_not_be_in_the_weights():
    model = models.resnet18(squeeze_excitation=True)
    params = model.from_torchvision(MODULE, KEY, fresh="*.se.*")
    assert torch.equal(params["layer1", "0", "conv1", "weight"], STATE["layer1.0.conv1.weight"])
    assert "se" in params["layer1", "0"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            models.resnet18(num_classes=7),
            "fc.weight: expected [7, 512], got [1000, 512]\n"
            "fc.bias: expected [7], got [1000]\n"
            "to draw these anew, pass a key and fresh=['fc']",
        ),
        (models.resnet18(squeeze_excitation=True), "layer1.0.se: missing; expected fc1.weight"),
        (models.resnet("basic", (2, 2, 2)), "layer4: unexpected; got"),
    ],
)
def test_weights_that_do_not_fit(model, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        model.from_torchvision(MODULE)


def test_fresh_parts_that_there_are_not():
    with pytest.raises(ValueError, match="fresh: 'head': expected leaves, matched none"):
        MODEL.from_torchvision(MODULE, KEY, fresh="head")


def test_fresh_parts_ask_for_a_key():
    with pytest.raises(ValueError, match="from_torchvision: key: expected a key"):
        MODEL.from_torchvision(MODULE, fresh="fc")


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("left", [0, 10, 0.5, 0.99])
def test_files_that_are_cut_short(tmp_path, name, left):
    path = sources(tmp_path)["file"].with_name(name)
    whole = path.read_bytes()
    path.write_bytes(whole[: left if isinstance(left, int) else int(left * len(whole))])
    with pytest.raises(ValueError, match=rf"{name}: expected the file of a state_dict, got"):
        MODEL.from_torchvision(path)


class Hostile:
    """Runs code where it is loaded carelessly."""

    def __reduce__(self):
        return (pytest.fail, ("code of the file was run",))


def test_files_that_hold_something_else(tmp_path):
    torch.save({"fc.weight": Hostile()}, tmp_path / "hostile.pth")
    with pytest.raises(ValueError, match=r"hostile\.pth: expected the file of a state_dict"):
        MODEL.from_torchvision(tmp_path / "hostile.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(TypeError, match=r"weights: expected a module, .* got list"):
        MODEL.from_torchvision(tmp_path / "list.pth")
    with pytest.raises(FileNotFoundError):
        MODEL.from_torchvision(tmp_path / "absent.pth")
    with pytest.raises(TypeError, match=r"from_torchvision: weights: .* got int"):
        MODEL.from_torchvision(3)

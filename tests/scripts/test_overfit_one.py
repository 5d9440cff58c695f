"""scripts/overfit_one.py: sound networks get through, planted mistakes stop at their stage."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict

from funcnets import Model, models, random, tree

SCRIPT = Path(__file__).parents[2] / "scripts" / "overfit_one.py"
script = SimpleNamespace(**runpy.run_path(str(SCRIPT), run_name="overfit_one"))

MLP = models.mlp(6, 3, (32,))
KEY = random.key(0)
INPUTS = random.normal(random.key(1), (128, 6))
LABELS = INPUTS[:, :3].argmax(1)


def stages(model=MLP, inputs=INPUTS, labels=LABELS, **options):
    options = {"rate": 0.02, "steps": 150, "epochs": 100, **options}
    return script.overfit(model, inputs, labels, KEY, **options)


def said(found):
    return " ".join(script.findings(found))


@pytest.mark.parametrize("name", ["cnn", "recurrent"])
def test_a_short_run(name, tmp_path, monkeypatch, capsys):
    arguments = ["--model", name, "--steps", "60", "--epochs", "1", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments, "--rate", "0.01"])
    script.main()
    printed = capsys.readouterr().out
    for stage in ("one sample", "one batch", "first loss", "gradient / parameters"):
        assert stage in printed
    figure = (tmp_path / f"{name}.png").read_bytes()
    assert figure.startswith(b"\x89PNG")
    assert len(figure) > 10_000


@pytest.mark.parametrize("name", script.FAMILIES)
def test_every_family_reads_the_digits(name):
    make, pattern = script.FAMILIES[name]
    images = random.uniform(random.key(1), (2, 1, 8, 8))
    model = make()
    norms = script.relative(
        model, model.init(KEY), (script.rearrange(images, pattern), torch.tensor([3, 4]))
    )
    assert len(norms) > 1
    assert max(norms.values()) > 0


def test_a_sound_network_gets_through():
    found = stages()
    assert [stage.name for stage in found] == ["one sample", "one batch", "training set"]
    for stage in found:
        assert len(stage.losses) == stage.steps
        assert stage.before.keys() == stage.after.keys() == {"0", "3"}
    for stage in found[:2]:
        assert stage.losses[-1] < script.NEAR_ZERO <= stage.losses[-2]
        assert sum(stage.after.values()) < sum(stage.before.values())
    assert sum(found[2].losses[-4:]) / 4 < script.NEAR_ZERO  # of an epoch
    assert "All three are learned" in said(found)


def test_the_training_set_is_learned_after_an_epoch_at_the_earliest():
    def knowing(key):
        params = MLP.init(key)
        params["3", "bias"] = torch.tensor([30.0, 0.0, 0.0])
        return params

    found = stages(Model(knowing, MLP.apply), labels=0 * LABELS)
    assert [stage.steps for stage in found] == [1, 1, 4]


def test_a_rate_of_zero_stops_at_one_sample():
    found = stages(rate=0.0, steps=5)
    assert [stage.steps for stage in found] == [None]
    assert len(found[0].losses) == 5
    assert "Not even one sample" in said(found)


def test_inputs_that_are_lost_stop_at_one_batch():
    blind = Model(MLP.init, lambda params, x: MLP.apply(params, 0 * x))
    trained = Model(
        MLP.init,
        lambda params, x, train=False, key=None: (
            (blind.apply(params, x), TensorDict({})) if train else blind.apply(params, x)
        ),
    )
    found = stages(trained)
    assert [stage.steps is None for stage in found] == [False, True]
    assert "not a batch" in said(found)


def test_labels_that_contradict_stop_at_the_training_set():
    # The samples of a batch differ; elsewhere the same ones come with other labels.
    order = random.permutation(random.split(KEY, 3)[2], 128)
    inputs, labels = INPUTS.clone(), LABELS.clone()
    first, second = order[32:80], order[80:]
    inputs[second], labels[second] = inputs[first], (labels[first] + 1) % 3
    found = stages(inputs=inputs, labels=labels, epochs=20)
    assert [stage.steps is None for stage in found] == [False, False, True]
    assert len(found[2].losses) == 20 * 4
    assert "A batch is learned, but not the training set" in said(found)


def test_layers_without_a_gradient_are_named():
    def init(key):
        return TensorDict({"used": MLP.init(key), "cut": MLP.init(key)["0"]})

    def apply(params, x, train=False, key=None):
        outputs = MLP.apply(params["used"], x) + 0 * params["cut", "weight"].sum()
        return (outputs, TensorDict({})) if train else outputs

    assert "No gradient reaches cut" in said(stages(Model(init, apply)))


def test_a_head_that_begins_with_zeros_is_no_fault():
    def init(key):
        params = MLP.init(key)
        params["3"] = params["3"].apply(torch.zeros_like)
        return params

    found = stages(Model(init, MLP.apply))
    assert found[1].before == {"0": 0.0, "3": float("inf")}
    assert said(found).startswith("All three are learned")
    assert "gradient reaches" not in said(found)


def test_gradients_that_vanish_are_named():
    deep = models.mlp(6, 3, (16,) * 12, activation="sigmoid")
    assert "least at 0" in said(stages(deep, steps=3))


def test_numbers_that_are_not_finite_end_the_stage():
    found = stages(inputs=INPUTS * torch.inf)
    assert len(found[0].losses) == 1
    assert "one sample: the loss is not finite in step 1" in said(found)


def test_norms_are_relative_to_the_layers():
    params = MLP.init(KEY)
    batch = INPUTS[:8], LABELS[:8]
    trainable, _ = tree.partition(params)
    leaves = dict(tree.leaves_with_path(trainable))
    for leaf in leaves.values():
        leaf.requires_grad_()
    torch.nn.functional.cross_entropy(MLP.apply(params, batch[0]), batch[1]).backward()
    for layer, norm in script.relative(MLP, tree.map(torch.detach, params), batch).items():
        pair = [leaves[layer, name] for name in ("weight", "bias")]
        slope = torch.cat([leaf.grad.flatten() for leaf in pair]).norm()
        size = torch.cat([leaf.detach().flatten() for leaf in pair]).norm()
        assert norm == pytest.approx(float(slope / size), rel=1e-5)

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk
from torch.func import vmap

import funcnets
from funcnets import losses, random, training

SCORES = {
    "accuracy": training.accuracy,
    "matrix": training.confusion_matrix,
    "classes": training.precision_recall,
    "nll": training.nll,
    "calibration": training.calibration_error,
}


def draw(seed, samples, classes):
    logits = random.normal(random.key(seed), (samples, classes), dtype=torch.float64)
    return logits, random.randint(random.fold_in(random.key(seed), 1), (samples,), 0, classes)


@given(seed=st.integers(0, 99), samples=st.integers(1, 30), classes=st.integers(2, 6))
def test_as_scikit_learn(seed, samples, classes):
    logits, labels = draw(seed, samples, classes)
    predicted, names = logits.argmax(-1), np.arange(classes)
    assert training.accuracy(logits, labels) == pytest.approx(sk.accuracy_score(labels, predicted))
    matrix = sk.confusion_matrix(labels, predicted, labels=names)
    assert np.array_equal(training.confusion_matrix(logits, labels), matrix)
    expected = sk.log_loss(labels, logits.softmax(-1), labels=names)
    assert training.nll(logits, labels) == pytest.approx(expected)
    found = training.precision_recall(logits, labels)
    for average in (None, "micro", "macro", "weighted"):
        both = sk.precision_recall_fscore_support(
            labels, predicted, labels=names, average=average, zero_division=0
        )
        prefix = f"{average}_" if average else ""
        for name, value in zip(("precision", "recall"), both, strict=False):
            assert getattr(found, prefix + name).numpy() == pytest.approx(value), prefix + name
    a, b = logits[:, 0], logits[:, 1]
    assert training.mse(a, b) == pytest.approx(sk.mean_squared_error(a, b))
    expected = losses.expected_calibration_error(logits.softmax(-1), labels)
    assert training.calibration_error(logits, labels) == expected


@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4))
def test_evaluation_does_not_depend_on_the_batches(sizes):
    logits, labels = draw(1, sum(sizes), 3)
    batches = list(zip(logits.split(sizes), labels.split(sizes), strict=True))
    found = training.evaluate(lambda params, x: params * x, 2.0, batches, SCORES)
    for name, score in SCORES.items():
        torch.testing.assert_close(found[name], score(2 * logits, labels))


def test_evaluation_of_an_ensemble_is_a_vmap_and_compiles():
    logits, labels = draw(2, 9, 3)
    scales = torch.tensor([-1.0, 2.0], dtype=torch.float64)

    def scores(params):
        batches = list(zip(logits.split(4), labels.split(4), strict=True))
        return training.evaluate(lambda params, x: params * x, params, batches, SCORES)

    together = vmap(scores)(scales)
    compiled = funcnets.compile(vmap(scores), backend="aot_eager")(scales)
    for i, scale in enumerate(scales):
        alone = scores(scale)
        for name in SCORES:
            for several in (together, compiled):
                one = several[name]
                one = type(one)(*(leaf[i] for leaf in one)) if isinstance(one, tuple) else one[i]
                torch.testing.assert_close(one, alone[name])


def test_several_inputs_and_objects_that_count():
    class Seen:  # as torchmetrics' objects are used
        def __init__(self):
            self.count = 99

        def reset(self):
            self.count = 0

        def update(self, outputs, targets):
            self.count += len(targets)

        def compute(self):
            return self.count

    x = torch.ones(5)
    batches = [((x, x), 2 * x), ((x, x), 2 * x)]
    metrics = {"mse": training.mse, "seen": Seen()}
    found = training.evaluate(lambda params, a, b: a + b, {}, batches, metrics)
    assert found == {"mse": 0, "seen": 10}
    with pytest.raises(ValueError, match="expected at least one, got none"):
        training.evaluate(lambda params, x: x, {}, [], metrics)


def test_a_class_without_samples_scores_zero():
    logits = F.one_hot(torch.tensor([0, 0, 1]), 3).double()
    found = training.precision_recall(logits, torch.tensor([0, 1, 1]))
    assert found.recall.tolist() == [1.0, 0.5, 0.0]
    assert found.precision.tolist() == [0.5, 1.0, 0.0]


@pytest.mark.parametrize("label", [-1, 3, -100])
def test_a_label_that_is_no_class_is_named(label):
    logits, labels = draw(3, 5, 3)
    labels[2] = label
    for name in ("accuracy", "confusion_matrix", "precision_recall", "nll"):
        with pytest.raises(ValueError, match=f"labels: expected 0 to 2, got {label} at 2"):
            getattr(training, name)(logits, labels)


@pytest.mark.usefixtures("unchecked")
def test_shapes_that_do_not_fit():
    logits, labels = draw(3, 5, 3)
    for wrong in ((logits[:4], labels), (logits[:0], labels[:0])):
        with pytest.raises(ValueError, match=r"expected logits \[samples, classes\]"):
            training.precision_recall(*wrong)

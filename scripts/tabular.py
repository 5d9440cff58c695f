"""Is this water fit to drink? An ensemble of MLPs, found by population search, and scikit-learn.

Nine measurements with gaps, and a label (``--data``). In each of five stratified folds many
settings are tried at once by vmap, judged on a part of the training samples, and halved twice;
those that are left are trained again on all training samples, twice each, and their mean is
compared with scikit-learn's classifiers on the same folds. Gaps are filled and columns standardised
by what the training samples say; the test samples are not looked at before the end. ``--time`` also
measures what it saves to train the members together. Run it with
``uv run scripts/tabular.py --data water_potability.csv``; ``--help`` lists the flags.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.model_selection import StratifiedKFold
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from tensordict import TensorDict
from torch import Tensor
from torch.func import vmap

from funcnets import Model, data, ensembles, layers, metrics, optim, random, training

WIDTH, BATCH = 48, 64
SPACES: dict[str, ensembles.Space] = {
    "learning_rate": ensembles.LogUniform(1e-3, 1e-2),
    "weight_decay": ensembles.LogUniform(0.03, 3.0),
    "dropout": ensembles.Uniform(0.0, 0.4),
}
Hyper = dict[str, Tensor]


class Samples(NamedTuple):
    """Prepared features [samples, features] and labels [samples]."""

    x: Tensor
    y: Tensor


class Fold(NamedTuple):
    """What one fold gave: the search, and the final logits [members, samples, 2]."""

    found: ensembles.Found
    logits: Tensor


def network(features: int, dropout: float | Tensor = 0.0) -> Model:
    """Two hidden layers; the rate may be a tensor, one for each member of an ensemble."""
    sizes = (features, WIDTH, WIDTH, 2)

    def init(key: random.Key) -> TensorDict:
        keys = random.split(key, 3).unbind()
        return TensorDict(
            {str(i): layers.init_linear(keys[i], *sizes[i : i + 2]) for i in range(3)}
        )

    def apply(params: TensorDict, x: Tensor, *, train: bool = False, key: Any = None) -> Any:
        h = layers.linear(params["0"], x).relu()
        h = layers.linear(params["1"], h).relu()
        h = layers.dropout(key, h, dropout) if train else h
        return layers.finish(layers.linear(params["2"], h), {}, train)

    return Model(init, apply)


def prepare(values: Tensor, rows: Tensor) -> Tensor:
    """Gaps filled and columns standardised by what these rows say."""
    filled = data.impute(data.fit_imputation(values[rows]), values)
    return data.standardise(data.fit_standardisation(filled[rows]), filled)


def step_of(features: int, steps: int) -> Callable[[Hyper], training.Step]:
    """From hyperparameters to a training step."""

    def make(hyper: Hyper) -> training.Step:
        rate = optim.schedules.cosine(hyper["learning_rate"], steps)
        optimizer = optim.adamw(rate, weight_decay=hyper["weight_decay"])
        model = network(features, hyper["dropout"])
        # A member that diverges hurts nobody, and its score is not a number.
        return training.make_step(model, F.cross_entropy, optimizer, nonfinite=None)

    return make


def auc(logits: Tensor, labels: Tensor) -> Tensor:
    """The area under the ROC curve, under vmap as well."""
    return metrics.area_under(metrics.roc(logits[:, 0] - logits[:, 1], labels))


def population(
    known: Samples, held: Samples, hyper: Hyper, steps: int, key: random.Key, advance: Any = None
) -> ensembles.Found:
    """A network for each setting, halved by AUC on held samples after a half and three quarters."""
    features = known.x.shape[1]
    apply = network(features).apply

    def score(state: training.State) -> Tensor:
        return auc(apply(training.parameters(state), held.x), held.y)

    half, quarter = steps - steps // 2, steps // 4
    return ensembles.search(
        key,
        step_of(features, steps),
        hyper,
        network(features).init,
        training.minibatches(tuple(known), BATCH, drop_last=True),
        score,
        rounds=(half, quarter, steps - half - quarter),
        own_order=True,
        advance=advance,
    )


def train(known: Samples, hyper: Hyper, steps: int, key: random.Key) -> TensorDict:
    """An ensemble with these settings."""
    features = known.x.shape[1]
    make, init = step_of(features, steps), network(features).init

    def begin(setting: Hyper, own: Tensor) -> training.State:
        first, second = random.split(own).unbind()
        return make(setting).init(init(first), second)

    over = vmap(lambda setting, state, batch: make(setting)(state, batch))
    members = len(hyper["dropout"])
    state, _ = training.fit(
        lambda state, batch: over(hyper, state, batch),
        vmap(begin)(hyper, random.split(key, members)),
        training.minibatches(tuple(known), BATCH, drop_last=True),
        steps=steps,
        progress=False,
    )
    return training.parameters(state)


def one_fold(
    values: Tensor,
    labels: Tensor,
    rows: Tensor,
    test: Tensor,
    flags: Any,
    key: random.Key,
    advance: Callable[[int], None],
) -> Fold:
    """The search within the training rows, and what the final ensemble says of the test rows."""
    split_key, draw_key, search_key, train_key = random.split(key, 4).unbind()
    inner = data.folds(split_key, data.group(labels[rows]), 5)
    fit, hold = rows[inner > 0], rows[inner == 0]
    x = prepare(values, fit)
    hyper = ensembles.draw(draw_key, SPACES, flags.members)
    found = population(
        *(Samples(x[fit], labels[fit]), Samples(x[hold], labels[hold]), hyper, flags.steps),
        *(search_key, advance),
    )
    x = prepare(values, rows)
    twice = {name: value.repeat(2) for name, value in found.hyper.items()}
    params = train(Samples(x[rows], labels[rows]), twice, flags.steps, train_key)
    with torch.no_grad():
        logits = vmap(network(x.shape[1]).apply, (0, None))(params, x[test])
    return Fold(found, logits)


def rivals(seed: int) -> dict[str, Any]:
    """scikit-learn's classifiers as they come, gaps filled by the mean."""
    found = {
        "majority class": DummyClassifier(),
        "random forest": RandomForestClassifier(random_state=seed),
        "gradient boosting": GradientBoostingClassifier(random_state=seed),
        "MLP": MLPClassifier(early_stopping=True, random_state=seed),
        "SVC": SVC(),
    }
    return {
        name: make_pipeline(SimpleImputer(), StandardScaler(), model)
        for name, model in found.items()
    }


def scores(model: Any, x: Any) -> Any:
    """What a classifier of scikit-learn sorts the samples by."""
    if hasattr(model, "decision_function"):
        return model.decision_function(x)
    return model.predict_proba(x)[:, 1]


def time_ratio(known: Samples, hyper: Hyper, steps: int, key: random.Key) -> tuple[float, float]:
    """Seconds for so many steps of all members together, and of one after another, interleaved."""
    features, members = known.x.shape[1], len(hyper["dropout"])
    make, init = step_of(features, steps), network(features).init
    keys = random.split(key, members)
    states = vmap(lambda setting, own: make(setting).init(init(own), own))(hyper, keys)
    alone = [make({name: value[i] for name, value in hyper.items()}) for i in range(members)]
    own = [step.init(init(one), one) for step, one in zip(alone, keys.unbind(), strict=True)]
    over = vmap(lambda setting, state, batch: make(setting)(state, batch)[0], (0, 0, None))
    epoch = training.minibatches(tuple(known), BATCH, drop_last=True)(key)
    together = apart = 0.0
    for i in range(steps + 1):
        batch = epoch[i % len(epoch)]
        begin = time.perf_counter()
        states = over(hyper, states, batch)
        middle = time.perf_counter()
        own = [step(state, batch)[0] for step, state in zip(alone, own, strict=True)]
        if i:  # the first warms up
            together += middle - begin
            apart += time.perf_counter() - middle
    return together, apart


def draw(path: Path, folds: list[Fold], curves: dict[str, Any], labels: list[Tensor]) -> None:
    """The search, the ROC curves, and how accurate the ensemble is where it is sure."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 4.5), layout="constrained")
    records = [record for fold in folds for record in fold.found.records]
    for rounds in (1, 2, 3):
        chosen = [record for record in records if record["rounds"] == rounds]
        rates = [record["learning_rate"] for record in chosen]
        values = [record["scores"][0] for record in chosen]
        left.scatter(
            rates, values, s=12, label=f"dropped after round {rounds}" * (rounds < 3) or "kept"
        )
    left.set(xscale="log", xlabel="learning rate", ylabel="AUC on held samples, first round")
    left.legend(fontsize="small")
    for name, (false, true) in curves.items():
        middle.plot(false, true, linewidth=1, label=name)
    middle.plot([0, 1], [0, 1], color="grey", linewidth=0.5)
    middle.set(xlabel="false positive rate", ylabel="true positive rate")
    middle.legend(fontsize="small")
    shares = torch.linspace(0.1, 1, 19)
    for name, doubt in (
        ("entropy", ensembles.entropy),
        ("mutual information", ensembles.mutual_information),
    ):
        unsure = torch.cat([doubt(fold.logits) for fold in folds])
        right_ones = torch.cat(
            [
                ensembles.mean(fold.logits).argmax(1) == y
                for fold, y in zip(folds, labels, strict=True)
            ]
        )
        ordered = right_ones[unsure.argsort()].double()
        accuracy = [float(ordered[: int(share * len(ordered))].mean()) for share in shares]
        right.plot(shares, accuracy, label=f"by {name}")
    right.set(xlabel="share of the samples, the surest first", ylabel="accuracy")
    right.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Searches, trains, compares and draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    # The file (Kadiwal 2021, "Water Quality") wants an account to be downloaded.
    parser.add_argument("--data", type=Path, required=True, help="water_potability.csv")
    parser.add_argument("--members", type=int, default=64, help="settings tried in each fold")
    parser.add_argument("--steps", type=int, default=600, help="of each network's training")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the folds and of the networks")
    parser.add_argument("--time", action="store_true", help="measure together and one by one")
    parser.add_argument("--output", type=Path, default=Path("outputs/tabular"))
    flags = parser.parse_args()
    console, begin = Console(), time.perf_counter()

    values, columns, labels, _ = data.read_csv(flags.data, label="Potability")
    assert labels is not None
    gaps = int(values.isnan().any(1).sum())
    console.print(f"{len(values)} samples of {len(columns)} features, {gaps} of them with gaps")

    key = random.key(flags.seed)
    splits = StratifiedKFold(flags.folds, shuffle=True, random_state=flags.seed)
    folds: list[Fold] = []
    tests: list[Tensor] = []
    said: dict[str, list[Tensor]] = {}  # by method the accuracy and the AUC in each fold
    sorted_by: dict[str, list[Tensor]] = {}

    def note(name: str, predicted: Tensor, value: Tensor, truth: Tensor) -> None:
        area = float(roc_auc_score(truth, value))
        accuracy = float((predicted == truth).double().mean())
        said.setdefault(name, []).append(torch.tensor([accuracy, area]))
        # Ranks, so that the folds can be shown as one curve.
        sorted_by.setdefault(name, []).append(value.argsort().argsort() / len(value))

    with Progress(console=console) as progress:
        bar = progress.add_task("", total=flags.folds * flags.steps)
        for i, (train_rows, test_rows) in enumerate(splits.split(values, labels)):
            rows, test = torch.from_numpy(train_rows), torch.from_numpy(test_rows)
            truth = labels[test]
            progress.update(bar, description=f"fold {i + 1}, scikit-learn")
            for name, model in rivals(flags.seed).items():
                model.fit(values[rows].numpy(), labels[rows].numpy())
                x = values[test].numpy()
                predicted = torch.from_numpy(model.predict(x))
                note(name, predicted, torch.from_numpy(scores(model, x)), truth)
            progress.update(bar, description=f"fold {i + 1}, population")
            fold = one_fold(
                *(values, labels, rows, test, flags, random.fold_in(key, i)),
                lambda _: progress.advance(bar),
            )
            folds.append(fold)
            tests.append(truth)
            single = fold.logits[0]
            note("best setting alone", single.argmax(1), single[:, 1] - single[:, 0], truth)
            mean = ensembles.mean(fold.logits)
            note("ensemble of MLPs", mean.argmax(1), mean[:, 1], truth)

    table = Table(title=f"mean of {flags.folds} folds")
    for column in ("", "accuracy", "AUC", "of which the worst fold"):
        table.add_column(column, justify="right" if table.columns else "left")
    for name, rows_of in said.items():
        each = torch.stack(rows_of)
        cells = (*each.mean(0).tolist(), float(each[:, 1].min()))
        table.add_row(name, *(f"{cell:.3f}" for cell in cells))
    console.print(table)

    best = Table(title="the best settings of the last fold, by AUC on held samples")
    for column in ("learning rate", "weight decay", "dropout", "AUC after each round"):
        best.add_column(column, justify="right")
    for record in folds[-1].found.records[:5]:
        numbers = [f"{record[name]:.2g}" for name in SPACES]
        best.add_row(*numbers, ", ".join(f"{score:.3f}" for score in record["scores"]))
    console.print(best)

    flags.output.mkdir(parents=True, exist_ok=True)
    truth = torch.cat(tests)
    curves = {
        name: roc_curve(truth, torch.cat(ranks))[:2]
        for name, ranks in sorted_by.items()
        if name != "majority class"  # which sorts nothing
    }
    draw(flags.output / "tabular.png", folds, curves, tests)
    console.print(f"figure in {flags.output}; {time.perf_counter() - begin:.0f} s")

    if flags.time:
        everything = Samples(prepare(values, torch.arange(len(values))), labels)
        hyper = ensembles.draw(key, SPACES, flags.members)
        together, apart = time_ratio(everything, hyper, 20, key)
        console.print(
            f"20 steps of {flags.members} members: {together:.1f} s together, {apart:.1f} s one "
            f"after another, a ratio of {together / apart:.3f}"
        )


if __name__ == "__main__":
    main()

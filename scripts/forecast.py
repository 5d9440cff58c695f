"""Forecasts of the oil temperature of a transformer station, hours to weeks ahead (ETTh1).

From the last two weeks of hourly values to the next day, week or two weeks (``--horizon``), by a
GRU, an LSTM and a small Transformer, each an ensemble trained at once by vmap, against ridge
regression and persistence. All but persistence see the window less its last value and forecast the
difference from it; the networks read the window day by day, beside a linear map of its hours.

The split is the usual one of 12, 4 and 4 months; nothing of the test months is used before the end.
Each member of an ensemble draws a dropout rate and a penalty of its own, and in validation the
better half is kept. There the interval is calibrated, too: what the errors were, in units of the
deviation of the window (split conformal prediction, Vovk et al. 2005).

Run it with ``uv run scripts/forecast.py``; ``--help`` lists the flags.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from rich.console import Console
from rich.table import Table
from tensordict import TensorDict
from torch import Tensor
from torch.func import vmap
from torchvision.datasets.utils import download_url

from funcnets import Model, ensembles, layers, optim, random, training, tree
from funcnets.data import Windows, windows

URL = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/ETTh1.csv"
DAY, MONTH = 24, 30 * 24
# The hours at which training, validation and test end.
ENDS = 12 * MONTH, 16 * MONTH, 20 * MONTH
WIDTH, BATCH = 16, 128
COVERAGE = 0.9
PENALTIES = [10.0**power for power in range(5)]


class Settings(NamedTuple):
    """What a member has drawn: the rate of dropout, and the penalty on its linear map."""

    dropout: Tensor
    penalty: Tensor


def draw_settings(key: random.Key) -> Settings:
    """A rate from 0.1 to 0.7, and a penalty from 0.0003 to 0.03 whose logarithm is uniform."""
    rate_key, penalty_key = random.split(key).unbind()
    exponent = random.uniform(penalty_key, (), -3.5, -1.5)
    return Settings(random.uniform(rate_key, (), 0.1, 0.7), 10.0**exponent)


def read(path: Path) -> Tensor:
    """The oil temperature at each hour, standardised by its first twelve months."""
    with path.open(newline="") as file:
        values = torch.tensor([float(row["OT"]) for row in csv.DictReader(file)])
    training = values[: ENDS[0]]
    return (values - training.mean()) / training.std()


def ridge(train: Windows, penalty: float) -> Callable[[Tensor], Tensor]:
    """Linear regression of the difference from the last value, in float64."""
    last = train.past[:, -1:]
    past, future = (train.past - last).double(), (train.future - last).double()
    centre, mean = past.mean(0), future.mean(0)
    gram = (past - centre).T @ (past - centre) + penalty * torch.eye(past.shape[1])
    weight = torch.linalg.solve(gram, (past - centre).T @ (future - mean))

    def forecast(past: Tensor) -> Tensor:
        last = past[:, -1:]
        return (((past - last).double() - centre) @ weight + mean).float() + last

    return forecast


def recurrent(horizon: int, cell: str) -> Model:
    """A GRU or an LSTM over the days, [batch, days, 24] to [batch, horizon]."""
    kinds: dict[str, tuple[Callable[..., TensorDict], Callable[..., Any]]] = {
        "GRU": (layers.init_gru, layers.gru),
        "LSTM": (partial(layers.init_lstm, forget_bias=1.0), layers.lstm),
    }
    init_layer, run = kinds[cell]

    def init(key: random.Key) -> TensorDict:
        layer_key, head_key = random.split(key).unbind()
        head = layers.init_linear(head_key, WIDTH, horizon)
        return TensorDict({"layer": init_layer(layer_key, DAY, WIDTH), "head": head})

    def apply(params: TensorDict, x: Tensor, rate: float | Tensor = 0.0, key: Any = None) -> Tensor:
        outputs, _ = run(params["layer"], x)
        x = outputs[:, -1]
        x = x if key is None else layers.dropout(key, x, rate)
        return layers.linear(params["head"], x)

    return Model(init, apply)


def transformer(horizon: int, days: int) -> Model:
    """One encoder layer over the days, [batch, days, 24] to [batch, horizon]."""
    width, heads = 2 * WIDTH, 2

    def init(key: random.Key) -> TensorDict:
        embed_key, position_key, layer_key, head_key = random.split(key, 4).unbind()
        return TensorDict(
            {
                "embed": layers.init_linear(embed_key, DAY, width),
                "positions": layers.init_embedding(position_key, days, width),
                "layer": layers.init_encoder_layer(layer_key, width, heads, 2 * width),
                "head": layers.init_linear(head_key, width, horizon),
            }
        )

    def apply(params: TensorDict, x: Tensor, rate: float | Tensor = 0.0, key: Any = None) -> Tensor:
        layer_key, head_key = (None, None) if key is None else random.split(key).unbind()
        x = layers.linear(params["embed"], x) + params["positions", "weight"]
        x = layers.encoder_layer(
            params["layer"], x, heads=heads, norm_first=True, dropout=rate, key=layer_key
        )
        x = reduce(x, "batch days width -> batch width", "mean")
        x = x if head_key is None else layers.dropout(head_key, x, rate)
        return layers.linear(params["head"], x)

    return Model(init, apply)


def networks(horizon: int, days: int) -> dict[str, Model]:
    """What is compared, each from days [batch, days, 24] to [batch, horizon]."""
    return {
        "GRU": recurrent(horizon, "GRU"),
        "LSTM": recurrent(horizon, "LSTM"),
        "Transformer": transformer(horizon, days),
    }


def forecaster(network: Model, window: int, horizon: int) -> Model:
    """The network beside a linear map, both of which begin at zero: at persistence."""

    def init(key: random.Key) -> TensorDict:
        params = TensorDict(
            {"network": network.init(key), "linear": layers.init_linear(key, window, horizon)}
        )
        nothing = tree.map(torch.zeros_like, (params["network", "head"], params["linear"]))
        params["network", "head"], params["linear"] = nothing
        return params

    def apply(
        params: TensorDict, past: Tensor, rate: float | Tensor = 0.0, key: Any = None
    ) -> Tensor:
        last = past[:, -1:]
        days = rearrange(past - last, "batch (days hours) -> batch days hours", hours=DAY)
        outputs = network.apply(params["network"], days, rate, key)
        return outputs + layers.linear(params["linear"], past - last) + last

    return Model(init, apply)


def train(
    model: Model, known: Windows, validation: Windows, *, members: int, epochs: int, key: random.Key
) -> TensorDict:
    """The better half of an ensemble, each member as it was after its best epoch in validation."""
    steps = len(known.past) // BATCH * epochs
    init_key, order_key, step_key, settings_key = random.split(key, 4).unbind()
    settings = vmap(draw_settings)(random.split(settings_key, members))
    optimizer = optim.adamw(optim.schedules.cosine(1e-3, steps=steps), weight_decay=1.0)

    def loss(
        params: TensorDict, batch: tuple[Windows, Settings], key: random.Key
    ) -> tuple[Tensor, dict[str, Tensor], TensorDict]:
        (past, future), settings = batch
        outputs = model.apply(params, past, settings.dropout, key)
        penalty = settings.penalty * params["linear", "weight"].square().sum()
        return F.huber_loss(outputs, future, delta=0.5) + penalty, {}, TensorDict({})

    def batches() -> Iterator[tuple[tuple[Windows, Settings], Tensor]]:
        """For every step the members' batches, each in an order of its own, and their keys."""
        number = itertools.count()
        for epoch in range(epochs):
            orders = random.split(random.fold_in(order_key, epoch), members)
            for samples in training.minibatches(known, BATCH, drop_last=True)(orders):
                keys = random.split(random.fold_in(step_key, next(number)), members)
                yield (samples, settings), keys

    def evaluate(state: training.State) -> dict[str, Tensor]:
        forecasts = predict(model, training.parameters(state), validation.past)
        errors = (forecasts - validation.future).square()
        return {"error": reduce(errors, "members windows hours -> members", "mean")}

    step = training.make_step(None, loss, optimizer, nonfinite=None)
    params = vmap(model.init)(random.split(init_key, members))
    state, _ = training.fit(
        lambda state, batch: vmap(step)(state, *batch),
        vmap(step.init)(params, random.split(step_key, members)),
        batches(),
        steps=steps,
        every=steps // epochs,
        evaluate=evaluate,
        early_stopping=training.EarlyStopping("error", patience=epochs),
    )
    kept = state.stopping.value.argsort()[: (members + 1) // 2]
    return ensembles.members(training.parameters(state), kept)


def deviation(past: Tensor) -> Tensor:
    """Of each window, [windows, 1]: errors are larger in months of unsteady weather."""
    return past.std(1, keepdim=True)


def calibrate(forecast: Tensor, windows: Windows) -> Tensor:
    """Half the width of the interval at each hour, in units of the deviation of a window."""
    errors = (forecast - windows.future).abs() / deviation(windows.past)
    count = len(errors)
    return errors.quantile(min(1.0, COVERAGE * (count + 1) / count), dim=0)


def predict(model: Model, params: TensorDict, past: Tensor) -> Tensor:
    """The forecasts of every member, [members, windows, horizon]."""
    with torch.no_grad():
        parts = [vmap(model.apply, (0, None))(params, part) for part in past.split(1024)]
    return torch.cat(parts, 1)


def draw(
    path: Path,
    series: Tensor,
    start: int,
    window: int,
    forecasts: dict[str, Tensor],
    mean: Tensor,
    width: Tensor,
) -> None:
    """Four windows of the test months: what was, the forecasts, and the networks' interval."""
    horizon, count = mean.shape[1], len(mean)
    figure, axes = plt.subplots(2, 2, figsize=(13, 7), layout="constrained")
    shown = min(window, 2 * horizon)
    for i, plot in enumerate(axes.flat):
        at = (2 * i + 1) * count // 8
        before, ahead = range(-shown, 0), range(horizon)
        now = start + at
        plot.plot(before, series[now - shown : now], color="black", linewidth=1)
        plot.plot(ahead, series[now : now + horizon], color="black", linewidth=1, label="what came")
        for name, forecast in forecasts.items():
            plot.plot(ahead, forecast[at], linewidth=1, label=name)
        low, high = mean[at] - width[at], mean[at] + width[at]
        plot.fill_between(ahead, low, high, alpha=0.2, label=f"{100 * COVERAGE:.0f} % interval")
        plot.set(xlabel="hours from now", ylabel="oil temperature, standardised")
    axes[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Trains, compares and draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="ETTh1.csv; by default it is downloaded")
    parser.add_argument("--horizon", type=int, default=24, help="hours ahead: 24, 168, 336, ...")
    parser.add_argument("--days", type=int, default=14, help="how many the forecast is made from")
    parser.add_argument("--members", type=int, default=8, help="half of them are kept")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/forecast"))
    flags = parser.parse_args()
    console, begin = Console(), time.perf_counter()

    path = flags.data
    if path is None:
        path = Path("data/ETTh1.csv")
        download_url(URL, str(path.parent), path.name)
    series, window = read(path), flags.days * DAY
    starts = (window, *ENDS[:2])
    known, validation, test = (
        windows(series, window, flags.horizon, start=start, end=end)
        for start, end in zip(starts, ENDS, strict=True)
    )
    console.print(
        f"{len(known.past)} windows of {window} hours to train on, {len(validation.past)} for "
        f"validation, {len(test.past)} for the test; {flags.horizon} hours ahead"
    )

    def error(forecast: Tensor, truth: Tensor) -> float:
        return float((forecast - truth).square().mean())

    fits = [ridge(known, penalty) for penalty in PENALTIES]
    fit = min(fits, key=lambda fit: error(fit(validation.past), validation.future))
    forecasts = {"persistence": test.past[:, -1:].expand_as(test.future), "ridge": fit(test.past)}
    at_validation: list[Tensor] = []
    alone: dict[str, tuple[float, float]] = {}
    chosen = networks(flags.horizon, flags.days)
    for i, (name, network) in enumerate(chosen.items()):
        console.print(f"{name}:")
        model = forecaster(network, window, flags.horizon)
        params = train(
            model,
            known,
            validation,
            members=flags.members,
            epochs=flags.epochs,
            key=random.fold_in(random.key(flags.seed), i),
        )
        at_validation.append(predict(model, params, validation.past).mean(0))
        members = predict(model, params, test.past)
        forecasts[name] = members.mean(0)
        alone[name] = (
            float((members - test.future).square().mean()),
            float((members - test.future).abs().mean()),
        )
    expected = torch.stack(at_validation).mean(0)
    forecasts["all networks"] = torch.stack([forecasts[name] for name in chosen]).mean(0)

    table = Table(title=f"errors in the test, {flags.horizon} hours ahead")
    for column in ("", "squared", "absolute", "one alone", "one alone, absolute"):
        table.add_column(column, justify="right" if table.columns else "left")
    for name, forecast in forecasts.items():
        absolute = float((forecast - test.future).abs().mean())
        cells = [f"{each:.4f}" for each in alone.get(name, ())]
        cells = [f"{error(forecast, test.future):.5f}", f"{absolute:.4f}", *(cells or ("", ""))]
        table.add_row(name, *cells)
    console.print(table)

    best = forecasts["all networks"]
    width = calibrate(expected, validation) * deviation(test.past)
    inside = float(((best - test.future).abs() <= width).float().mean())
    gain = 1 - error(best, test.future) / error(forecasts["ridge"], test.future)
    console.print(
        f"the mean of all networks: its squared error is {100 * gain:.1f} % below that of ridge "
        f"regression, and {100 * inside:.1f} % of what came lies in its {100 * COVERAGE:.0f} % "
        "interval"
    )
    flags.output.mkdir(parents=True, exist_ok=True)
    figure = flags.output / f"forecast_{flags.horizon}.png"
    draw(
        figure,
        series,
        ENDS[1],
        window,
        {name: forecasts[name] for name in ("ridge", "all networks")},
        best,
        width,
    )
    console.print(f"figure in {figure}; {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()

import builtins
import functools
import json

import pytest
import torch
import torch.nn.functional as F
from networks import SAMPLES, assert_close, assert_equal, data, make, mlp, start
from torch.func import vmap

import funcnets
from funcnets import optim, random, training, tree


def test_fit_is_the_loop_written_out():
    model, step = mlp(dropout=0.2), make(mlp(dropout=0.2))
    state = start(step, model)
    batches = training.minibatches(data(), 10)
    got, history = training.fit(step, state, batches, epochs=2)
    losses = []
    for epoch in range(2):
        for batch in batches(training.order_key(state.key, epoch)):
            state, metrics = step(state, batch, training.step_key(state.key, state.step))
            losses.append(metrics["loss"].item())
    assert_equal(got, state)
    assert [record["step"] for record in history] == [3, 6]
    assert [record["epoch"] for record in history] == [0, 1]
    assert history[1]["training"]["loss"] == pytest.approx(sum(losses[3:]) / 3)


def test_a_resumed_run_that_went_on_for_longer_is_done(tmp_path):
    step = make()
    batches = training.minibatches(data(), 10)  # three an epoch
    checkpoints = training.Checkpoints(tmp_path, keep=9)
    last, history = training.fit(
        step, start(step, mlp()), batches, epochs=3, checkpoints=checkpoints
    )
    for shorter in ({"epochs": 2}, {"steps": 4}, {"steps": 0}, {"epochs": 3}):
        options = {"checkpoints": checkpoints, "resume": True, **shorter}
        state, again = training.fit(step, start(step, mlp()), batches, **options)
        assert_equal(state, last)
        assert again == history
    assert checkpoints.steps() == [3, 6, 9]


def test_scores_that_are_none(tmp_path):
    step = make()
    run = functools.partial(
        training.fit, step, start(step, mlp()), training.minibatches(data(), 8), steps=1
    )
    with pytest.raises(TypeError, match="fit: evaluate: expected a dict of scores, got float"):
        run(evaluate=lambda state: 1.0)
    with pytest.raises(KeyError, match="checkpoints: expected a score auc, got loss"):
        run(checkpoints=training.Checkpoints(tmp_path, best="auc"))


@pytest.mark.parametrize("name", ["steps", "epochs"])
def test_fewer_than_no_steps(name):
    step = make()
    with pytest.raises(ValueError, match=f"fit: {name}: expected at least 0, got -1"):
        training.fit(step, start(step, mlp()), training.minibatches(data(), 8), **{name: -1})


@pytest.mark.parametrize("every", [1, 2, 5, None])
def test_a_record_every_so_many_steps(every):
    step = make()
    calls = []
    _, history = training.fit(
        step,
        start(step, mlp()),
        training.minibatches(data(), 8),
        steps=7,
        every=every,
        evaluate=lambda state: {"number": state.step},
        callbacks=[lambda state, record: calls.append((int(state.step), record["step"]))],
    )
    expected = {1: [1, 2, 3, 4, 5, 6, 7], 2: [2, 4, 6, 7], 5: [5, 7], None: [3, 6, 7]}[every]
    assert [record["step"] for record in history] == expected
    assert [record["evaluation"]["number"] for record in history] == expected
    assert calls == [(number, number) for number in expected]
    json.dumps(history)


def test_the_means_are_over_the_steps_in_which_a_metric_is_finite():
    def step(state, batch):
        number = state.step.float()
        lost = torch.where(state.step % 3 == 0, torch.nan, number)
        return state._replace(step=state.step + 1), {"loss": lost, "number": number}

    _, history = training.fit(step, start(make(), mlp()), [0], steps=250, every=220)
    for record, steps in zip(history, (range(220), range(220, 250)), strict=True):
        finite = [number for number in steps if number % 3]
        assert record["training"]["loss"] == pytest.approx(sum(finite) / len(finite))
        assert record["training"]["number"] == pytest.approx(sum(steps) / len(steps))


def test_a_callback_may_change_the_state():
    step = make()

    def zero(state, record):
        return state._replace(params=tree.map(torch.zeros_like, state.params))

    state, _ = training.fit(step, start(step, mlp()), [data()], epochs=2, callbacks=[zero])
    assert all((leaf == 0).all() for leaf in tree.leaves(state.params))


@pytest.mark.parametrize("compiled", [False, True])
def test_an_ensemble(compiled):
    model, step = mlp(dropout=0.3), make(mlp(dropout=0.3))
    keys = random.split(random.key(5), 2)
    params = vmap(lambda key: tree.cast(model.init(key), torch.float64))(keys)
    states = vmap(step.init)(params, keys)
    alone = [step.init(tree.map(lambda leaf, i=i: leaf[i], params), keys[i]) for i in range(2)]
    together = vmap(step)
    if compiled:
        together = funcnets.compile(together, donate="state", backend="aot_eager")
    batches = training.minibatches(data(), 8)
    stopping = training.EarlyStopping(patience=3)
    states, history = training.fit(
        together, states, batches, epochs=2, early_stopping=stopping, every=2
    )
    assert len(history[0]["training"]["loss"]) == 2
    for i in range(2):
        own, _ = training.fit(step, alone[i], batches, epochs=2, early_stopping=stopping, every=2)
        assert_close(own, tree.map(lambda leaf, i=i: leaf[i], states))


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    model = mlp(dropout=0.3)
    step = make(model, average=training.ema(0.9), nonfinite="restore", accumulate=2)
    state = start(step, model)
    batches = training.minibatches(data(), 8)
    stopping = training.EarlyStopping("score", patience=20)
    log = training.JsonLines(tmp_path / "log.jsonl")

    def evaluate(state):
        return {
            "score": training.evaluate(
                model.apply,
                training.parameters(state, average=True),
                [data(1)],
                {"nll": training.nll},
            )["nll"]
        }

    def run(folder, steps, resume, like=state):
        return training.fit(
            step,
            like,
            batches,
            steps=steps,
            every=2,
            evaluate=evaluate,
            early_stopping=stopping,
            checkpoints=training.Checkpoints(tmp_path / folder, best="score"),
            resume=resume,
            callbacks=[log],
        )

    whole, history = run("whole", 11, False)
    run("parts", 5, True)
    with pytest.raises(FileExistsError, match="resume=True"):
        run("parts", 11, False)
    for steps in (5, 7, 11, 11):
        # Whatever the state that it is begun with: only its structure counts.
        again, resumed = run("parts", steps, True, start(step, model, seed=50))
    assert_equal(again, whole)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == resumed
    # The pieces ended at steps 5 and 7, and wrote a record there.
    expected = {record["step"]: record["evaluation"] for record in history}
    found = {record["step"]: record["evaluation"] for record in resumed}
    assert found.keys() == expected.keys() | {5, 7}
    assert all(found[number] == expected[number] for number in expected)
    assert training.Checkpoints(tmp_path / "parts").steps() == [8, 10, 11]


def test_what_is_over_is_not_trained_on(tmp_path):
    step = make()
    calls = []

    def counted(state, batch):
        calls.append(1)
        return step(state, batch)

    for resume in (False, True):
        state, _ = training.fit(
            counted,
            start(step, mlp()),
            [data()],
            epochs=3,
            evaluate=lambda state: {"loss": torch.tensor(1.0)},
            early_stopping=training.EarlyStopping(patience=1),
            checkpoints=training.Checkpoints(tmp_path),
            resume=resume,
        )
    assert len(calls) == 2
    assert int(state.step) == 2


def test_it_works_without_rich(monkeypatch):
    true_import = builtins.__import__

    def without(name, *rest, **named):
        if name.startswith("rich"):
            raise ImportError(name)
        return true_import(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    step = make()
    assert int(training.fit(step, start(step, mlp()), [data()], epochs=1)[0].step) == 1


def test_the_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    step = make()
    training.fit(step, start(step, mlp()), [data()], steps=2)
    assert "loss" in capsys.readouterr().out
    training.fit(step, start(step, mlp()), [data()], steps=2, progress=False)
    assert capsys.readouterr().out == ""


def test_training_lowers_the_loss_and_a_schedule_is_followed():
    x, _ = data(dtype=torch.float32)
    y = (x[:, 0] > 0).long()
    model = mlp()
    schedule = optim.schedules.cosine(0.05, 60)
    step = training.make_step(model, F.cross_entropy, optim.adamw(schedule))
    batches = training.minibatches((x, y), 12)
    state, history = training.fit(
        step, step.init(model.init(random.key(0)), random.key(0)), batches, epochs=SAMPLES
    )
    assert history[-1]["training"]["loss"] < 0.1 * history[0]["training"]["loss"]
    scores = training.evaluate(
        model.apply, training.parameters(state), [(x, y)], {"accuracy": training.accuracy}
    )
    assert scores["accuracy"] == 1


def test_errors():
    step = make()
    state = start(step, mlp())
    for options, message in (
        ({}, "either steps or epochs"),
        ({"steps": 1, "epochs": 1}, "either steps or epochs"),
        ({"steps": 1, "every": 0}, "every"),
    ):
        with pytest.raises(ValueError, match=message):
            training.fit(step, state, [data()], **options)
    with pytest.raises(ValueError, match="expected at least one batch"):
        training.fit(step, state, [], epochs=1)

import builtins
import json

import pytest

from funcnets import training

HISTORY = [
    {
        "step": step,
        "epoch": 0,
        "seconds": 0.1,
        "training": {"loss": [1.0 / step, 2.0]},
        "evaluation": {"accuracy": 0.1 * step, "classes": {"recall": [0.5, 0.25 * step]}},
    }
    for step in (1, 2, 3)
]


def test_lines_of_json_begin_anew_where_the_history_ends(tmp_path):
    log = training.JsonLines(tmp_path / "folder" / "log.jsonl")
    log.start([])
    for record in HISTORY:
        log(None, record)
    log.start(HISTORY[:2])
    log(None, HISTORY[2])
    lines = (tmp_path / "folder" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == HISTORY


def test_tensorboard_is_needed_only_where_it_is_asked_for(tmp_path, monkeypatch):
    true_import = builtins.__import__

    def without(name, *rest, **named):
        if "tensorboard" in name:
            raise ImportError(name)
        return true_import(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="needs the package tensorboard"):
        training.TensorBoard(tmp_path)


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    board = training.TensorBoard(tmp_path)
    board.start([])
    for record in HISTORY:
        board(None, record)
    assert list(tmp_path.glob("events*"))


def test_curves(tmp_path):
    pytest.importorskip("matplotlib")
    training.draw_curves(tmp_path / "all.png", HISTORY)
    training.draw_curves(tmp_path / "one.png", HISTORY, "evaluation/accuracy")
    assert (tmp_path / "all.png").stat().st_size > (tmp_path / "one.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="expected some of step"):
        training.draw_curves(tmp_path / "none.png", HISTORY, "f1")

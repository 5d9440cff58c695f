"""Tables from CSV: gaps, labels, and errors that name the line."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from funcnets import data

DATA = os.environ.get("FUNCNETS_DATA")
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False) | st.none()


@given(st.lists(st.lists(FLOATS, min_size=3, max_size=3), min_size=1, max_size=6))
def test_what_is_written_is_read(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("csv") / "table.csv"
    lines = [",".join("" if value is None else repr(value) for value in row) for row in rows]
    path.write_text("\n".join(["a,b,c", *lines]) + "\n")
    values, columns, labels, classes = data.read_csv(path)
    expected = [[float("nan") if value is None else value for value in row] for row in rows]
    torch.testing.assert_close(values, torch.tensor(expected), equal_nan=True, atol=0, rtol=0)
    assert (columns, labels, classes) == (("a", "b", "c"), None, ())


def write(path, text, **options):
    path = path / "table.csv"
    path.write_text(text, encoding=options.pop("encoding", "utf-8"))
    return data.read_csv(path, **options)


def test_labels_gaps_and_quotes(tmp_path):
    text = ' x ,"kind, of water",y\n 1.5 ,10,NA\n\n-2e3, 9 ,?\n"0",10,7\n'
    table = write(tmp_path, text, label="kind, of water", encoding="utf-8-sig")
    assert table.columns == ("x", "y")
    assert table.classes == ("9", "10")  # as numbers, not as text
    assert table.labels.tolist() == [1, 0, 1]
    assert table.values.nan_to_num(99).tolist() == [[1.5, 99], [-2000, 99], [0, 7]]
    text = "kind;x\nb;1\na;-\n"
    table = write(tmp_path, text, label="kind", gaps={"-"}, delimiter=";", dtype=torch.float64)
    assert table.classes == ("a", "b")
    assert table.values.dtype == torch.float64


@pytest.mark.skipif(DATA is None, reason="needs water_potability.csv in FUNCNETS_DATA")
def test_the_water():
    table = data.read_csv(Path(f"{DATA}/water_potability.csv"), label="Potability")
    assert table.values.shape == (3275, 9)
    assert table.values.isnan().sum(0).tolist() == [491, 0, 0, 0, 781, 0, 0, 162, 0]
    assert table.labels.bincount().tolist() == [1998, 1277]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "table.csv: expected a line of names, got nothing"),
        ("a,b\n", "table.csv: expected at least one line of values, got none"),
        ("a,b,a\n1,2,3\n", "line 1: expected different names, got 'a' twice"),
        ("a,b\n1,0\n1\n", "table.csv: line 3: expected 2 values, got 1"),
        ("a,b\n1,0,3\n", "line 2: expected 2 values, got 3"),
        ("a,b\n1,0\n\nx,1\n", "line 4: column 'a': expected a number, got 'x'"),
        ("a,b\ninf,0\n", "line 2: column 'a': expected a finite number, got 'inf'"),
        ("a,b\n1_0,0\n", "line 2: column 'a': expected a number, got '1_0'"),
        ("a,b\n1,\n", "line 2: column 'b': expected a label, got none"),
        ("a,b\n1e39,0\n", "line 2: column 'a': expected a finite number, got '1e39'"),
    ],
)
def test_errors(tmp_path, text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        write(tmp_path, text, label="b" if "b" in text else None)


def test_no_such_column(tmp_path):
    with pytest.raises(KeyError, match="expected a column 'c', got a, b"):
        write(tmp_path, "a,b\n1,2\n", label="c")

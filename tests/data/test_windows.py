"""Windows of a series know nothing of what comes, and leave none out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap

from funcnets import data

SMALL = st.integers(1, 5)


@given(SMALL, SMALL, st.integers(1, 3), st.integers(0, 4), st.integers(0, 9), st.booleans())
def test_windows_as_a_loop_would_cut_them(length, horizon, stride, later, more, features):
    start = length + later
    end = start + horizon + more
    series = torch.arange(end + 2)
    series = torch.stack([series, -series], 1) if features else series
    past, future = data.windows(series, length, horizon, start=start, end=end, stride=stride)
    starts = range(start, end - horizon + 1, stride)
    assert len(past) == len(future) == len(starts)
    for i, now in enumerate(starts):
        assert torch.equal(past[i], series[now - length : now])
        assert torch.equal(future[i], series[now : now + horizon])
    assert past.untyped_storage().data_ptr() == series.untyped_storage().data_ptr()  # a view


def test_by_default_the_whole_series_and_vmap():
    series = torch.arange(12).reshape(2, 6)
    past, future = vmap(lambda one: data.windows(one, 3, 2))(series)
    assert past[1].tolist() == [[6, 7, 8], [7, 8, 9]]
    assert future[0].tolist() == [[3, 4], [4, 5]]


@pytest.mark.parametrize(
    "options",
    [
        {"length": 0},
        {"horizon": 0},
        {"stride": 0},
        {"start": 2},
        {"end": 11},
        {"start": 9, "end": 10},
        {"length": 9},
    ],
)
def test_errors(options):
    with pytest.raises(ValueError, match=r"windows: (length|horizon|stride|expected)"):
        data.windows(torch.arange(10), **{"length": 3, "horizon": 2, **options})

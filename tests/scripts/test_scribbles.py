"""scripts/scribbles.py: strokes as they are asked for, held together, and drawn alike."""

from __future__ import annotations

import math

import pytest
import scribbles
import torch
from hypothesis import given
from hypothesis import strategies as st

from funcnets import random


@given(seed=st.integers(0, 999), n=st.integers(1, 5))
def test_strokes_have_their_length_and_their_own_centre(seed, n):
    strokes = scribbles.draw_strokes(random.key(seed), (n, 3))
    points = strokes.points()
    assert points.shape == (n, 3, scribbles.POINTS, 2)
    torch.testing.assert_close(points.mean(-2), torch.zeros(n, 3, 2), atol=1e-5, rtol=0)
    steps = points.diff(dim=-2).norm(dim=-1)
    expected = (strokes.length / scribbles.POINTS)[..., None].expand_as(steps)
    torch.testing.assert_close(steps, expected, atol=1e-5, rtol=0)


def test_a_straight_stroke_and_a_corner():
    one = torch.ones(())
    straight = scribbles.Strokes(0.3 * one, torch.zeros(2), 0 * one, 0.5 * one, one)
    heading = straight.points().diff(dim=0)
    torch.testing.assert_close(torch.atan2(*heading.flip(-1).unbind(-1)), 0.3 * torch.ones(39))
    turned = straight._replace(corner=math.pi / 2 * one).points().diff(dim=0)
    angles = torch.atan2(*turned.flip(-1).unbind(-1))
    expected = torch.tensor([0.3] * 19 + [0.3 + math.pi / 2] * 20)
    torch.testing.assert_close(angles, expected)


@given(st.integers(0, 999))
def test_joined_strokes_touch_and_others_lie_at_their_place(seed):
    key = random.key(seed)
    strokes = scribbles.draw_strokes(key, (6, scribbles.STROKES))
    joints = scribbles.draw_joints(random.fold_in(key, 1), (6, scribbles.STROKES))
    points = scribbles.compose(strokes, joints)
    for i in range(1, scribbles.STROKES):
        distances = torch.cdist(points[:, i], points[:, :i].flatten(1, 2)).amin((1, 2))
        centres = points[:, i].mean(1)
        for n in range(6):
            if joints.joined[n, i]:
                assert distances[n] < 0.01
            else:
                torch.testing.assert_close(centres[n], joints.place[n, i], atol=1e-5, rtol=0)


def test_ink_of_a_line_is_one_on_it_and_none_far_from_it():
    side = scribbles.SIDE
    x = (torch.arange(4 * side) + 0.5) / (2 * side) - 1
    points = torch.stack([x, torch.full_like(x, 0.25)], -1)[None]
    drawn = scribbles.ink(points, torch.full((1, 4 * side), 0.25))[0, 0]
    row = int((0.25 + 1) * side / 2)
    assert drawn.shape == (side, side)
    assert drawn[row - 1 : row + 1, 8:-8].mean() == pytest.approx(1.0, abs=0.1)
    assert drawn[: row - 8].abs().max() < 1e-3
    outside = scribbles.ink(points + 3, torch.ones(1, 4 * side))
    assert not outside.any()


def test_ink_lies_where_its_points_are():
    side = scribbles.SIDE
    points = random.uniform(random.key(0), (20, 1, 2), -0.7, 0.7)
    drawn = scribbles.ink(points, torch.ones(20, 1))[:, 0]
    pixels = torch.arange(side).float()
    middles = [(drawn.sum(axis) @ pixels) / drawn.sum((1, 2)) for axis in (1, 2)]
    expected = (points[:, 0] + 1) * side / 2 - 0.5
    torch.testing.assert_close(torch.stack(middles, 1), expected, atol=1e-3, rtol=0)


@given(seed=st.integers(0, 999), groups=st.integers(1, 2), classes=st.integers(1, 4))
def test_drawings_fill_their_frame(seed, groups, classes):
    drawn = scribbles.scribbles(random.key(seed), groups, classes, 3)
    side = scribbles.SIDE
    assert drawn.shape == (groups * classes * 3, 1, side, side)
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    again, other = (scribbles.scribbles(random.key(k), groups, classes, 3) for k in (seed, -1))
    assert torch.equal(drawn, again)
    assert not torch.equal(drawn, other)
    for picture in drawn[:, 0]:
        sizes, middles = [], []
        for axis in (0, 1):
            inked = (picture.amax(axis) > 0.3).nonzero().flatten()
            sizes.append(float(inked[-1] - inked[0]))
            middles.append(float(inked[-1] + inked[0]) / 2)
        assert side / 1.25 - 8 < max(sizes) <= side
        assert all(abs(middle - (side - 1) / 2) < 5 for middle in middles)


def test_drawings_of_a_character_are_more_alike_than_those_of_others():
    drawn = scribbles.scribbles(random.key(0), 4, 4, 4)[:, 0].flatten(1)
    apart = torch.cdist(drawn, drawn)
    same = torch.block_diag(*[torch.ones(4, 4)] * 16).bool()
    own = apart[same & ~torch.eye(64, dtype=torch.bool)]
    assert own.min() > 1  # yet no copies
    assert own.median() < 0.8 * apart[~same].median()

"""Characters that nobody has written: a few strokes each, drawn by several hands.

What a small set of alphabets lacks is variety of characters. Here a character is one to four
strokes, most of them joined to one before, as in the model of Lake et al. 2015; another hand draws
each stroke a little otherwise and joins it at a slightly other place, as no bending of the whole
drawing would have it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor

from funcnets import random

STROKES, POINTS, SIDE = 4, 40, 64
PEN = 1.5  # the standard deviation of a line across it, in pixels
ALONG = (torch.arange(POINTS) + 0.5) / POINTS


class Strokes(NamedTuple):
    """Of each stroke the direction, turning, a corner and where it is, and the length."""

    direction: Tensor  # [...], in radians
    turning: Tensor  # [..., 2], over the whole stroke, and more at its ends than in its middle
    corner: Tensor  # [...], in radians
    corner_at: Tensor  # [...], from 0 to 1
    length: Tensor  # [...]

    def points(self) -> Tensor:
        """Points along the strokes, [..., POINTS, 2], about their own centres."""
        direction, turning, corner, corner_at, length = (
            rearrange(column, "... -> ... 1") for column in self
        )
        heading = direction + turning[..., 0, :] * (ALONG - 0.5)
        heading = heading + turning[..., 1, :] * (2 * (ALONG - 0.5) ** 2 - 1 / 6)
        heading = heading + corner * (corner_at < ALONG)
        steps = torch.stack([heading.cos(), heading.sin()], -1) * length[..., None] / POINTS
        points = steps.cumsum(-2)
        return points - reduce(points, "... points j -> ... 1 j", "mean")


class Joints(NamedTuple):
    """How a character holds each of its strokes: joined to one before, or at a place of its own."""

    joined: Tensor  # [...], whether
    other: Tensor  # [...], to which of those before, from 0 to 1
    there: Tensor  # [...], where on that one, from 0 to 1
    here: Tensor  # [...], where on this one
    place: Tensor  # [..., 2], of the centre of what is not joined


def draw_strokes(key: random.Key, shape: tuple[int, ...]) -> Strokes:
    """Random strokes: a third of them straight, a third with a corner."""
    keys = random.split(key, 8).unbind()
    bent = random.uniform(keys[0], shape) > 0.35
    turning = random.normal(keys[1], (*shape, 2)) * torch.tensor([2.2, 2.5])
    cornered = random.uniform(keys[2], shape) < 0.3
    side = torch.where(random.uniform(keys[3], shape) < 0.5, -1.0, 1.0)
    return Strokes(
        random.uniform(keys[4], shape, 0.0, 2 * math.pi),
        turning * torch.where(bent, 1.0, 0.05)[..., None],
        torch.where(cornered, side * random.uniform(keys[5], shape, 1.2, 2.4), 0.0),
        random.uniform(keys[6], shape, 0.25, 0.75),
        random.uniform(keys[7], shape, 0.5, 1.6),
    )


def draw_joints(key: random.Key, shape: tuple[int, ...]) -> Joints:
    """Random joints; half of the strokes are joined at one of their ends."""
    keys = random.split(key, 6).unbind()
    anywhere = random.uniform(keys[3], shape)
    end = torch.where(random.uniform(keys[4], shape) < 0.5, anywhere, anywhere.round())
    return Joints(
        random.uniform(keys[0], shape) < 0.6,
        random.uniform(keys[1], shape),
        random.uniform(keys[2], shape),
        end,
        random.uniform(keys[5], (*shape, 2), -0.8, 0.8),
    )


def by_another_hand(key: random.Key, strokes: Strokes, joints: Joints) -> tuple[Strokes, Joints]:
    """The same strokes and joints, drawn a little otherwise."""
    keys = iter(random.split(key, 8).unbind())

    def near(column: Tensor, deviation: float) -> Tensor:
        return column + deviation * random.normal(next(keys), column.shape)

    direction, turning, corner, corner_at, length = strokes
    joined, other, there, here, place = joints
    return Strokes(
        near(direction, 0.13),
        near(turning, 0.25),
        corner * near(torch.ones_like(corner), 0.1),
        near(corner_at, 0.06),
        length * near(torch.zeros_like(length), 0.13).exp(),
    ), Joints(joined, other, near(there, 0.05), near(here, 0.05), near(place, 0.09))


def compose(strokes: Strokes, joints: Joints) -> Tensor:
    """The points of characters [n, STROKES, POINTS, 2]."""
    points, n = strokes.points(), torch.arange(len(joints.joined))

    def at(points: Tensor, share: Tensor) -> Tensor:
        """The points at a share of the way along strokes [n, POINTS, 2]."""
        return points[n, (share.clamp(0, 1) * (POINTS - 1)).round().long()]

    placed = [points[:, 0]]
    for i in range(1, STROKES):
        joined, other, there, here, place = (column[:, i] for column in joints)
        before = torch.stack(placed, 1)[n, (other * i).long().clamp(max=i - 1)]
        joint = at(before, there) - at(points[:, i], here)
        start = torch.where(joined[:, None], joint, place)
        placed.append(points[:, i] + start[:, None])
    return torch.stack(placed, 1)


def ink(points: Tensor, amounts: Tensor) -> Tensor:
    """Drawings [n, 1, SIDE, SIDE] of points [n, points, 2], from -1 to 1: amounts 1 make a line.

    Each point is shared among the four pixels about it; then all is blurred.
    """
    pixel = (points + 1) * SIDE / 2 - 0.5
    low = pixel.floor()
    part = pixel - low
    canvas = torch.zeros(len(points), SIDE * SIDE)
    for right in (0, 1):
        for down in (0, 1):
            x, y = (low + torch.tensor([right, down])).unbind(-1)
            inside = (x >= 0) & (x < SIDE) & (y >= 0) & (y < SIDE)
            shares = (1 - torch.tensor([right, down]) - part).abs()
            place = (y * SIDE + x).clamp(0, SIDE * SIDE - 1).long()
            canvas = canvas.scatter_add(1, place, amounts * shares.prod(-1) * inside)
    canvas = rearrange(canvas, "n (h w) -> n 1 h w", h=SIDE)
    return blur(canvas, PEN) * PEN * math.sqrt(2 * math.pi)


def blur(ink: Tensor, sigma: float) -> Tensor:
    """Ink [n, 1, height, width] as through a Gaussian of that many pixels."""
    reach = math.ceil(3 * sigma)
    bell = torch.exp(-(torch.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    bell = bell / bell.sum()
    rows, columns = rearrange(bell, "w -> 1 1 1 w"), rearrange(bell, "h -> 1 1 h 1")
    return F.conv2d(F.conv2d(ink, rows, padding=(0, reach)), columns, padding=(reach, 0))


def frame(half: Tensor, smallest: float = 0.0) -> Tensor:
    """Half the sizes [n, 2] of the frames about drawings of which half the sizes are given.

    A frame is between a square and the shape of the drawing, so that wide and high ones fill more
    of a view (an adaptive aspect ratio, Liu et al. 2004). The longer half counts for the smallest
    at least.
    """
    longest = half.amax(1, keepdim=True).clamp(min=smallest)
    return 1.25 * (longest * half.clamp(min=longest / 4)).sqrt()


def scribbles(key: random.Key, groups: int, classes: int, samples: int) -> Tensor:
    """Drawings [groups * classes * samples, 1, SIDE, SIDE] of characters, from 0 to 1.

    A group's characters are made of the same four strokes, held together in other ways. Each
    drawing fills what `siamese.look` shows of a drawing with the frame -1 to 1.
    """
    keys = random.split(key, 6).unbind()
    characters = groups * classes
    pool = draw_strokes(keys[0], (groups, STROKES))
    order = random.uniform(keys[1], (groups, classes, STROKES)).argsort(-1)
    group = rearrange(torch.arange(groups), "groups -> groups 1 1")
    strokes = (repeat(x[group, order], "g c ... -> (g c s) ...", s=samples) for x in pool)
    joints = draw_joints(keys[2], (characters, STROKES))
    held = (repeat(x, "c ... -> (c s) ...", s=samples) for x in joints)
    drawn, joined = by_another_hand(keys[3], Strokes(*strokes), Joints(*held))
    points = compose(drawn, joined)

    # Of the characters 15 % have one stroke, 40 % two, 30 % three, and 15 % four.
    share = random.uniform(keys[4], (characters, 1))
    count = 1 + (share > torch.tensor([0.15, 0.55, 0.85])).sum(1)
    count = repeat(count, "c -> (c s) 1", s=samples)
    there = rearrange(torch.arange(STROKES) < count, "n strokes -> n strokes 1 1")

    first = torch.where(there, points, torch.inf).amin((1, 2))
    last = torch.where(there, points, -torch.inf).amax((1, 2))
    sizes = frame((last - first) / 2), (first + last) / 2
    half, middle = (rearrange(x, "n j -> n 1 1 j") for x in sizes)
    framed = (points - middle) / half

    apart = rearrange(drawn.length, "n strokes -> n strokes 1") / POINTS / half.mean(-1)
    weight = torch.exp(0.35 * random.normal(keys[5], (len(points), 1, 1)) + 0.45)
    amounts = apart * SIDE / 2 * weight.clamp(1.1, 3) * there[..., 0]
    lines = ink(
        rearrange(framed, "n strokes points j -> n (strokes points) j"),
        rearrange(amounts.expand(-1, -1, POINTS), "n strokes points -> n (strokes points)"),
    )
    return lines.clamp(max=1.0)

"""One-shot recognition of handwritten characters, learned from one small set of alphabets.

An embedding is trained on one of Omniglot's two "minimal" sets (five alphabets of 20 drawers each)
and tried on alphabets it has never seen: given one drawing of each of 20 characters by one person,
which of them did another person draw (Lake et al. 2015)? Run it with ``uv run scripts/siamese.py``;
``--help`` lists the flags. ``--embed FOLDER`` embeds images with a file that an earlier run saved.
"""

from __future__ import annotations

import argparse
import collections
import functools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import scribbles
import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce, repeat
from rich.console import Console
from rich.table import Table
from tensordict import TensorDict
from torch import Tensor
from torchvision.datasets.omniglot import Omniglot as Downloads
from torchvision.datasets.utils import download_url

import funcnets
from funcnets import data, layers, losses, metrics, models, optim, random, training

SETS = ("small1", "small2")
SIZE, WIDTH, CHANNELS = 48, 32, 64
GROUPS, PAIRED, HALVED, MADE_UP, SAMPLES, TEMPERATURE = (8, 8) + 8 * (1,), 2, 1, 2, 4, 1 / 16
PLACES, STRIDES = SIZE // 8, {"layer1": 2, "layer2": 2, "layer3": 1}  # an embedding is a map
STIFFNESS = 0.15  # the price of holding a place against its neighbour

# The symmetries of the square, as matrices [8, 2, 2]: quarter turns, and those of the mirror image.
TURN, MIRROR = torch.tensor([[0.0, -1.0], [1.0, 0.0]]), torch.diag(torch.tensor([-1.0, 1.0]))
SYMMETRIES = torch.stack(
    [torch.linalg.matrix_power(TURN, n) @ side for side in (torch.eye(2), MIRROR) for n in range(4)]
)


# The encoder: from views [batch, 1, 48, 48] to embeddings [batch, 6 * 6 * 64].


def init_encoder(key: random.Key) -> TensorDict:
    """A small residual network whose last map is not averaged: where a stroke is counts.

    The stem has a stride, so that the finer views cost little.
    """
    keys = random.split(key, 5).unbind()
    widths = [WIDTH, 2 * WIDTH, 4 * WIDTH, 4 * WIDTH]
    tree = {
        f"layer{i}": layers.init_residual_block(keys[i], widths[i - 1], widths[i])
        for i in (1, 2, 3)
    }
    tree["stem"] = layers.init_conv_norm(keys[0], 1, WIDTH, kernel_size=5)
    tree["head"] = layers.init_conv(keys[4], widths[-1], CHANNELS, 1)
    return TensorDict(tree)


def encode(params: TensorDict, x: Tensor, *, train: bool = False, key: Any = None) -> Any:
    """Embeddings of views; in training with the new running statistics."""
    new = {}
    with torch.autocast(x.device.type, torch.bfloat16):
        x = x.to(memory_format=torch.channels_last)
        x, new["stem"] = layers.with_buffers(
            layers.conv_norm, params["stem"], x, stride=2, train=train
        )
        for name, stride in STRIDES.items():
            x, new[name] = layers.with_buffers(
                layers.residual_block, params[name], x, stride=stride, train=train
            )
        x = layers.conv(params["head"], x)
    return layers.finish(rearrange(x.float(), "b c h w -> b (h w c)"), new, train)


def similarities(one: Tensor, other: Tensor) -> Tensor:
    """How alike embeddings [m, features] and [n, features] are, [m, n], at most one.

    As cosines, but each place of a map may be held against a neighbour of its place in the other
    map, at a price: no two people put a stroke at quite the same place. Embeddings may be those of
    several views, side by side.
    """
    there = _stretched(one, other)
    back = there if other is one else _stretched(other, one)
    return (there + back.mT) / 2


def _stretched(one: Tensor, other: Tensor) -> Tensor:
    size = {"h": PLACES, "w": PLACES, "c": CHANNELS}
    at = rearrange(one, "m (views h w c) -> views h w m c", **size)
    maps = rearrange(other, "n (views h w c) -> n c views h w", **size)
    maps = rearrange(F.pad(maps, (1, 1, 1, 1)), "n c views h w -> views h w c n").contiguous()
    price = STIFFNESS / math.prod(at.shape[:3])
    moves = [(down, right) for down in range(3) for right in range(3)]
    near = (maps[:, y : y + PLACES, x : x + PLACES] for y, x in moves)
    found = [
        at @ there - price * ((y - 1) ** 2 + (x - 1) ** 2)
        for (y, x), there in zip(moves, near, strict=True)
    ]
    best = functools.reduce(torch.maximum, found)
    return reduce(best.float(), "views h w m n -> m n", "sum")


model = models.siamese(funcnets.Model(init_encoder, encode), normalize=True)


# Drawings, and how they are looked at.


class Drawings(NamedTuple):
    """Ink, and the frame that holds it, in the coordinates of `grid_sample` (-1 to 1)."""

    ink: Tensor  # [n, 1, height, width]
    centre: Tensor  # [n, 2], x and y
    half: Tensor  # [n, 2], half the width and the height

    def at(self, chosen: Any) -> Drawings:
        """Some of the drawings."""
        return Drawings(*(column[chosen] for column in self))


def drawings_of(ink: Tensor) -> Drawings:
    """Of ink [n, 1, side, side], from 0 to 1; blurred, as `look` will make it smaller."""
    side = ink.shape[-1]
    inked = rearrange((ink > 0.5).float(), "n 1 h w -> n h w")
    edges = []
    for profile in (inked.amax(1), inked.amax(2)):  # over rows: x, over columns: y
        first, last = profile.argmax(1), side - 1 - profile.flip(1).argmax(1)
        edges.append(torch.stack([first, last], 1))
    first, last = torch.stack(edges, 1).float().unbind(-1)  # [n, 2] each
    half = scribbles.frame((last - first) / side, smallest=0.3)
    ink = torch.cat([scribbles.blur(part, 0.36 * side / SIZE) for part in ink.split(256)])
    dark = rearrange(ink, "n 1 h w -> n (h w)").quantile(0.985, dim=1).clamp(min=0.05)
    ink = (ink / rearrange(dark, "n -> n 1 1 1")).clamp(max=1.3)
    return Drawings(ink, (first + last + 1) / side - 1, half)


AXIS = (torch.arange(SIZE) + 0.5) * 2 / SIZE - 1
GRID = torch.stack(torch.meshgrid(AXIS, AXIS, indexing="xy"), -1)  # [SIZE, SIZE, 2]

# From 5 knots to all rows or columns, bicubic: a matrix [SIZE, 5].
KNOTS = rearrange(torch.eye(5), "columns y -> 1 columns y 1")
BETWEEN = F.interpolate(KNOTS, (SIZE, 1), mode="bicubic", align_corners=True)[0, :, :, 0].T


def look(drawings: Drawings, matrix: Tensor, bent: Tensor | float = 0.0) -> Tensor:
    """Views [n, 1, SIZE, SIZE] of the drawings under linear maps [n, 2, 2] of a (bent) grid."""
    ink, centre, half = drawings
    grid = einsum(GRID + bent, matrix, "... h w j, ... i j -> ... h w i")
    grid = rearrange(centre, "n j -> n 1 1 j") + rearrange(half, "n j -> n 1 1 j") * grid
    return F.grid_sample(ink, grid, align_corners=False)


def linear_maps(key: random.Key, n: int, turn: float, shear: float, scale: float) -> Tensor:
    """Random maps [n, 2, 2] near the identity: scaling of either axis, shear, rotation."""
    draws = random.normal(key, (n, 5))
    angle, slant, both = draws[:, 0] * turn, draws[:, 1] * shear, draws[:, 2:3]
    zero, one = torch.zeros(n), torch.ones(n)

    def matrices(*entries: Tensor) -> Tensor:
        return rearrange(torch.stack(entries, 1), "n (i j) -> n i j", i=2)

    rotation = matrices(angle.cos(), -angle.sin(), angle.sin(), angle.cos())
    sizes = torch.exp(0.6 * scale * (draws[:, 3:] + both))
    return rotation @ matrices(one, slant, zero, one) * rearrange(sizes, "n j -> n 1 j")


def redraw(
    key: random.Key, drawings: Drawings, matrix: Tensor, size: Tensor, offset: Tensor
) -> Tensor:
    """Views as other hands might have drawn them: tilted, stretched, shifted, and bent.

    The drawing takes up ``size`` [n, 2] of the view's width and height, ``offset`` from its middle.
    """
    maps, shift, bend = random.split(key, 3).unbind()
    n = len(matrix)
    knots = 0.06 * random.normal(bend, (n, 2, 5, 5))
    bent = einsum(BETWEEN, BETWEEN, knots, "h y, w x, n j y x -> n h w j")
    shift = 0.08 * random.normal(shift, (n, 2)) - offset
    bent = bent + rearrange(shift, "n j -> n 1 1 j")
    # No more tilt than hands have: by it alone some characters differ (katakana shi and tsu).
    matrix = matrix @ linear_maps(maps, n, math.radians(6), 0.08, 0.2)
    return look(drawings, matrix / rearrange(size, "n j -> n 1 j"), bent)


def join(first: Tensor, second: Tensor, cut: Tensor, shift: Tensor) -> Tensor:
    """Two views [n, 1, SIZE, SIZE] as one: of each its side of a line, or both as they are.

    The line has the normal ``cut`` [n, 2], zeros for none, and is ``shift`` [n] from the middle.
    """
    line = einsum(GRID, cut, "h w j, n j -> n h w")
    line = line + rearrange(shift * cut.norm(dim=1), "n -> n 1 1")
    line = rearrange(line, "n h w -> n 1 h w")
    return torch.maximum(first * (line >= 0), second * (line <= 0))


# Training.


class Batch(NamedTuple):
    """Parts of views: which drawings, and how they are placed; and the classes of the views.

    First come the plain views of one part, then the first parts of the paired views, and then
    their second parts.
    """

    places: Tensor  # [parts, samples], among all drawings
    matrix: Tensor  # [parts, 2, 2]
    size: Tensor  # [parts, 2]
    offset: Tensor  # [parts, 2]
    cut: Tensor  # [pairs, 2], the normal of the line that parts meet at, or zeros
    labels: Tensor  # [classes]


def make_batches(known: data.Omniglot) -> Callable[[random.Key], Batch]:
    """``batch(key)`` draws some groups of classes.

    A class is a character as seen in one of the eight symmetries, under one more map, so that
    hardly a class is met twice. A group is what the test asks for: characters of one alphabet, by
    the same drawers, and seen alike, so that only the character tells them apart. The groups of
    one character are there for variety; and for more of it, some groups have four classes that
    are made of two characters each, one of two and one of two others: side by side or crossing, or
    on either side of a line of which there is a half of each.
    """
    n = len(known.character_names)
    places = torch.zeros(n, 20, dtype=torch.long)
    places[known.characters, known.drawers] = torch.arange(len(known.characters))
    alphabet = torch.zeros(n, dtype=torch.long)
    alphabet[known.characters] = known.alphabets

    plain, groups = len(GROUPS), len(GROUPS) + PAIRED
    alone = torch.arange(plain).repeat_interleave(torch.tensor(GROUPS))
    paired = torch.arange(plain, groups).repeat_interleave(4)
    group = torch.cat([alone, paired, paired])
    slot = torch.cat([alone, paired, paired + PAIRED])  # whose parts are placed alike
    members = [torch.arange(size) for size in GROUPS]
    members += PAIRED * [torch.tensor([0, 0, 1, 1])] + PAIRED * [torch.tensor([2, 3, 2, 3])]
    member = torch.cat(members)

    def batch(key: random.Key) -> Batch:
        keys = random.split(key, 8).unbind()
        leaders = random.permutation(keys[0], n)[:groups]
        strange = rearrange(alphabet[leaders], "g -> g 1") != alphabet
        order = random.uniform(keys[1], (groups, n)).masked_fill(strange, 2.0)
        order = order.scatter(1, rearrange(leaders, "g -> g 1"), -1.0).argsort(1)
        characters = order[group, member]
        drawers = random.uniform(keys[2], (groups, 20)).topk(SAMPLES, dim=1).indices[group]
        symmetry = random.randint(keys[3], (groups + PAIRED,), 0, 8)[slot]
        maps = linear_maps(keys[4], groups + PAIRED, 0.0, 0.25, 0.25)[slot]
        angle = random.normal(keys[5], (PAIRED,), 0.0, 0.2)
        angle = angle + math.pi / 2 * random.randint(keys[6], (PAIRED,), 0, 4)
        direction = torch.stack([angle.cos(), angle.sin()], 1)
        halved = rearrange(torch.arange(PAIRED) < HALVED, "groups -> groups 1")
        cut = repeat(direction * halved, "groups j -> (groups classes) j", classes=4)
        apart = direction * ~halved * random.uniform(keys[7], (PAIRED, 1), 0.2, 1.0)
        offset = torch.cat([torch.zeros(plain, 2), apart / 2, -apart / 2])[slot]
        labels = characters * 8 + symmetry  # one may have come twice
        labels = torch.cat([labels[: len(alone)], 8 * n + torch.arange(len(paired))])
        return Batch(
            places[rearrange(characters, "parts -> parts 1"), drawers],
            maps @ SYMMETRIES[symmetry],
            1 - 0.9 * offset.abs(),
            offset,
            cut,
            labels,
        )

    return batch


def made_up(key: random.Key) -> Tensor:
    """Views of groups of four characters that are in no alphabet."""
    scribble_key, map_key, redraw_key = random.split(key, 3).unbind()
    ink = scribbles.scribbles(scribble_key, MADE_UP, 4, SAMPLES)
    none, whole = torch.zeros(len(ink), 2), torch.ones(len(ink), 2)
    maps = linear_maps(map_key, MADE_UP, 0.0, 0.25, 0.25)
    maps = repeat(maps, "groups i j -> (groups drawings) i j", drawings=4 * SAMPLES)
    return redraw(redraw_key, Drawings(ink, none, whole), maps, whole, none)


def make_views(known: data.Omniglot) -> Callable[[random.Key], tuple[Tensor, Tensor]]:
    """``views(key)``: a batch as drawn by other hands, [batch, 1, SIZE, SIZE], and its labels.

    Last come characters that are made up (`scribbles`), for variety.
    """
    drawings, batches = drawings_of(known.images), make_batches(known)

    def views(key: random.Key) -> tuple[Tensor, Tensor]:
        batch_key, redraw_key, line_key, made_up_key = random.split(key, 4).unbind()
        places, *placing, cut, labels = batches(batch_key)
        parts = drawings.at(rearrange(places, "p s -> (p s)"))
        placed = (repeat(column, "p ... -> (p s) ...", s=SAMPLES) for column in placing)
        seen = redraw(redraw_key, parts, *placed)
        count = len(cut) * SAMPLES
        alone, first, second = seen.split([len(seen) - 2 * count, count, count])
        cut = repeat(cut, "pairs j -> (pairs s) j", s=SAMPLES)
        shift = 0.08 * random.normal(line_key, (count,))
        seen = torch.cat([alone, join(first, second, cut, shift), made_up(made_up_key)])
        labels = torch.cat([labels, labels.max() + 1 + torch.arange(4 * MADE_UP)])
        return seen, repeat(labels, "classes -> (classes s)", s=SAMPLES)

    return views


def loss(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss; and for how many the nearest of the batch, by cosine, is of their class."""
    value = losses.supervised_contrastive(embeddings.bfloat16(), labels, TEMPERATURE, similarities)
    near = embeddings.detach()
    nearest = (near @ near.mT).fill_diagonal_(-1.0).argmax(1)
    accuracy = (labels[nearest] == labels).float().mean()
    return value, {"accuracy": accuracy}


def as_matrices(inner: optim.Optimizer) -> optim.Optimizer:
    """An optimizer to which a convolution's weight is a matrix with a row for each channel."""

    def flat(params: TensorDict) -> TensorDict:
        return params.apply(lambda leaf: leaf.flatten(1) if leaf.ndim > 2 else leaf)

    def update(grads: TensorDict, state: Any, params: TensorDict, value: Any = None) -> Any:
        updates, state = inner.update(flat(grads), state, flat(params), value)
        return params.apply(lambda leaf, change: change.reshape(leaf.shape), updates), state

    return optim.Optimizer(lambda params: inner.init(flat(params)), update)


def make_optimizer(steps: int) -> optim.Optimizer:
    """Muon for the convolutions of the blocks, which it trains in fewer steps; AdamW elsewhere."""
    slow, fast = (optim.schedules.one_cycle(x, steps, warmup_fraction=0.1) for x in (3e-3, 8e-3))
    adamw = optim.adamw(slow, weight_decay=0.05, where=lambda path, leaf: leaf.ndim > 1)
    muon = optim.muon(fast, weight_decay=0.05, adjust="match_rms_adamw")
    return as_matrices(optim.by_path({is_block_matrix: muon}, default=adamw))


def is_block_matrix(path: tuple[str, ...], leaf: Tensor) -> bool:
    """Whether a leaf is the (flattened) weight of a convolution in a residual block."""
    return leaf.ndim == 2 and any(name.startswith("layer") for name in path)


def train(
    known: data.Omniglot, steps: int, seed: int, compiled: bool
) -> tuple[TensorDict, np.ndarray]:
    """The averaged parameters, and loss and accuracy of each batch, [steps, 2]."""
    init_key, step_key = random.split(random.key(seed)).unbind()
    views = make_views(known)
    step = training.make_step(
        model, loss, make_optimizer(steps), average=training.ema(0.99), nonfinite=None
    )
    state = step.init(model.init(init_key), step_key)
    state, history = training.fit(
        funcnets.compile(step, donate="state") if compiled else step,
        state,
        (views(random.fold_in(step_key, i)) for i in range(steps)),
        steps=steps,
        every=1,
    )
    curve = [(record["training"]["loss"], record["training"]["accuracy"]) for record in history]
    return training.parameters(state, average=True), np.array(curve)


# What the embedding is good for.


def embeddings_of(params: TensorDict, drawings: Drawings) -> Tensor:
    """Embeddings [n, 8 * 2304] of length one: those of the eight symmetries, side by side."""

    def parts() -> Iterator[Tensor]:
        for start in range(0, len(drawings.half), 256):
            part = drawings.at(slice(start, start + 256))
            views = [look(part, matrix.expand(len(part.half), 2, 2)) for matrix in SYMMETRIES]
            yield torch.cat(model.apply(params, *views), dim=1) / len(SYMMETRIES) ** 0.5

    return torch.cat(list(parts()))


def embed(file: str | Path, folder: str | Path) -> tuple[tuple[str, ...], Tensor]:
    """Names and embeddings [n, 18432] of all images of a folder (or zip file), with a saved file.

    Images are dark on a light ground, of any size. The higher the `similarities` of two embeddings,
    the more likely they show one character. Cosines, for which all have length one, do not forgive
    a stroke that is a little out of place: of 20 characters a third more are taken for another.
    """
    _, params = funcnets.load(file, model)
    found = data.image_folder(folder, size=(105, 105))
    return found.names, embeddings_of(params, drawings_of(1 - found.images))


class Trials(NamedTuple):
    """The runs of the one-shot test: 20 drawings to tell apart, each one's match among 20."""

    tests: Tensor  # [runs, 20], places among all drawings
    given: Tensor  # [runs, 20], by another drawer, in the same order
    distances: Tensor  # [runs, 20 tests, 20 given]

    @property
    def wrong(self) -> Tensor:
        """[runs, 20]: where another character's drawing is nearest."""
        return self.distances.argmin(2) != torch.arange(self.distances.shape[2])


def try_out(
    params: TensorDict, held: data.Omniglot, name: str, runs: int, key: random.Key
) -> Trials:
    """Runs as those of Lake et al. 2015: one alphabet, 20 of its characters, two drawers."""
    within = (held.alphabets == held.alphabet_names.index(name)).nonzero().flatten()
    order = within[(held.characters[within] * 20 + held.drawers[within]).argsort()]
    embeddings = embeddings_of(params, drawings_of(held.images[order]))
    tests, given = [], []
    for run_key in random.split(key, runs).unbind():
        drawer_key, character_key = random.split(run_key).unbind()
        chosen = random.permutation(character_key, len(order) // 20)[:20]
        first, second = random.permutation(drawer_key, 20)[:2]
        tests.append(chosen * 20 + first)
        given.append(chosen * 20 + second)
    pairs = zip(tests, given, strict=True)
    distances = [1 - similarities(embeddings[a], embeddings[b]) for a, b in pairs]
    return Trials(order[torch.stack(tests)], order[torch.stack(given)], torch.stack(distances))


def unseen_alphabets(known: data.Omniglot, other: data.Omniglot) -> list[str]:
    """Those that only the other has, of 20 characters or more (Tagalog has 17)."""
    sizes = collections.Counter(name.partition("/")[0] for name in other.character_names)
    return [n for n, size in sizes.items() if size >= 20 and n not in known.alphabet_names]


def draw(
    path: Path, curve: np.ndarray, curves: dict[str, metrics.Roc], trials: Trials, ink: Tensor
) -> None:
    """The learning curve, the verification of pairs, and the drawings most wrongly told apart."""
    figure = plt.figure(figsize=(14, 4.2), layout="constrained")
    left, middle, right = figure.subfigures(1, 3)

    axes = left.subplots()
    window = max(1, len(curve) // 100)
    smooth = curve[: len(curve) // window * window].reshape(-1, window, 2).mean(1)
    steps = (np.arange(len(smooth)) + 0.5) * window
    axes.plot(steps, smooth[:, 0], color="tab:blue")
    axes.set(xlabel="step", ylabel="loss", title="training batches")
    other = axes.twinx()
    other.plot(steps, 100 * (1 - smooth[:, 1]), color="tab:orange")
    other.set(ylabel="nearest is of another class / %", yscale="log")

    axes = middle.subplots()
    for name, roc in curves.items():
        rate = 100 * metrics.equal_error_rate(roc).rate
        rates = 100 * roc.false_accept, 100 * (1 - roc.true_accept)
        axes.plot(*rates, label=f"{name}: equal error {rate:.1f} %")
    axes.plot([0.1, 100], [0.1, 100], color="black", lw=0.5, ls="--")
    axes.set(xlabel="false accepts / %", ylabel="false rejects / %", title="same character?")
    axes.set(xscale="log", yscale="log", xlim=(0.1, 100), ylim=(0.1, 100))
    axes.legend(fontsize=8)

    right.suptitle("another drawing was nearer than the true one", fontsize=10)
    own = rearrange(torch.diagonal(trials.distances, dim1=1, dim2=2), "r t -> (r t)")
    nearest, taken = rearrange(trials.distances, "r t g -> (r t) g").min(1)
    tests, given = trials.tests.flatten(), trials.given.flatten()
    rows: dict[int, tuple[int, int, int]] = {}  # the worst for each of the true ones
    for place in (own - nearest).argsort(descending=True).tolist():
        if own[place] <= nearest[place] or len(rows) == 8:
            break
        run = place // trials.given.shape[1] * trials.given.shape[1]
        row = int(tests[place]), int(given[place]), int(given[run + taken[place]])
        rows.setdefault(row[1], row)
    grid = right.subplots(4, 7, squeeze=False, width_ratios=(1, 1, 1, 0.3, 1, 1, 1))
    for axes in grid.flat:
        axes.axis("off")
    for i, row in enumerate(rows.values()):
        for j, (title, drawing) in enumerate(zip(("drawn", "true", "taken"), row, strict=True)):
            axes = grid[i // 2, 4 * (i % 2) + j]
            axes.imshow(ink[drawing, 0], cmap="gray_r")
            if i < 2:
                axes.set_title(title, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def read(folder: Path, name: str) -> data.Omniglot:
    """One of the small sets, downloaded where it is not there."""
    file = f"images_background_{name}.zip"
    if not (folder / file).exists():
        download_url(f"{Downloads.download_url_prefix}/{file}", folder)
    return data.omniglot(folder / file)


def main() -> None:
    """Trains, tries, draws and saves; or embeds a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("outputs/omniglot"), help="of the zips")
    parser.add_argument("--train-set", choices=SETS, default="small1")
    parser.add_argument("--steps", type=int, default=5500, help="of training")
    parser.add_argument("--runs", type=int, default=400, help="of the test, for each alphabet")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/siamese"))
    parser.add_argument("--embed", type=Path, help="a folder of images to embed instead")
    flags = parser.parse_args()
    console = Console()
    file = flags.output / f"{flags.train_set}.safetensors"
    if flags.embed is not None:
        names, embeddings = embed(file, flags.embed)
        target = flags.output / f"{flags.embed.name}.npz"
        np.savez(target, names=names, embeddings=embeddings)
        console.print(f"{len(names)} embeddings of {flags.embed} in {target}")
        return

    known = read(flags.data, flags.train_set)
    other = read(flags.data, SETS[1 - SETS.index(flags.train_set)])
    begin = time.perf_counter()
    params, curve = train(known, flags.steps, flags.seed, flags.compile)
    minutes = (time.perf_counter() - begin) / 60
    flags.output.mkdir(parents=True, exist_ok=True)
    record = {"train_set": flags.train_set, "steps": flags.steps, "seed": flags.seed}
    funcnets.save(file, params, metadata=record)

    trials = {}
    for i, name in enumerate(unseen_alphabets(known, other)):
        trials[name] = try_out(params, other, name, flags.runs, random.fold_in(random.key(1), i))
    trials["all"] = Trials(*(torch.cat(columns) for columns in zip(*trials.values(), strict=True)))
    table = Table(title=f"trained on {flags.train_set} for {minutes:.1f} min; alphabets never seen")
    for column in ("alphabet", "runs", "20-way error %", "standard error", "equal error %"):
        table.add_column(column, justify="left" if column == "alphabet" else "right")
    curves = {}
    for name, found in trials.items():
        errors = found.wrong.float().mean(1)
        same = torch.eye(20).expand_as(found.distances)
        curves[name] = metrics.roc(found.distances.flatten(), same.flatten())
        equal = metrics.equal_error_rate(curves[name]).rate
        cells = 100 * torch.stack([errors.mean(), errors.std() / len(errors) ** 0.5, equal])
        style = "bold" if name == "all" else None
        table.add_row(name, str(len(errors)), *(f"{x:.2f}" for x in cells), style=style)
    console.print(table)
    console.print("people: 4.5 % (Lake et al. 2015)")
    draw(flags.output / f"{flags.train_set}.png", curve, curves, trials["all"], other.images)
    console.print(f"embedding and figure in {flags.output}")


if __name__ == "__main__":
    main()

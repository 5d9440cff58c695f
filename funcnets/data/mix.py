"""Two samples mixed to one, label and all: mixup and CutMix, as pure functions of a key."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from funcnets import _torch, random
from funcnets.tree.flatten import describe

ATTEMPTS = 24  # of which each fails with a probability below 0.05


def mixup(
    key: random.Key,
    x: Float[Tensor, " batch *features"],
    targets: Shaped[Tensor, " batch *classes"],
    alpha: float | Float[Tensor, ""] = 1.0,
    classes: int | None = None,
) -> tuple[Float[Tensor, " batch *features"], Float[Tensor, "batch ..."]]:
    """Every sample mixed with another of the batch, and so their targets (Zhang et al. 2018).

    ``share * x + (1 - share) * x[other]`` with one share a batch, drawn from Beta(alpha, alpha),
    and the others in random order. As `torchvision.transforms.v2.MixUp`, but that each is mixed
    with its neighbour there.

    Args:
        targets: labels, or shares of the classes, or any numbers.
        classes: how many there are; for labels only, which become shares.

    Returns:
        The mixed samples and targets; `torch.nn.functional.cross_entropy` takes shares.

    >>> x, shares = mixup(random.key(0), torch.eye(2), torch.tensor([0, 1]), classes=2)
    >>> torch.equal(x, shares)
    True
    """
    shares = _shares("mixup", x, targets, classes)
    draw, order = random.split(key)
    share, other = beta(draw, alpha), random.permutation(order, len(x))
    return _mixed(x, other, share), _mixed(shares, other, share)


def cutmix(
    key: random.Key,
    images: Float[Tensor, "batch channels height width"],
    targets: Shaped[Tensor, " batch *classes"],
    alpha: float | Float[Tensor, ""] = 1.0,
    classes: int | None = None,
) -> tuple[Float[Tensor, "batch channels height width"], Float[Tensor, "batch ..."]]:
    """A box of every image pasted from another of the batch, the targets mixed (Yun et al. 2019).

    The share of the box is ``1 - share``, ``share`` from Beta(alpha, alpha), its centre uniform. Of
    the box what lies outside of the image is lost, and the targets are mixed by the pixels that are
    left. As `torchvision.transforms.v2.CutMix`, but for the order of the others: see `mixup`.

    Args:
        targets: labels, or shares of the classes, or any numbers.
        classes: how many there are; for labels only, which become shares.

    >>> images = torch.arange(2.0)[:, None, None, None].expand(2, 1, 8, 8)
    >>> x, shares = cutmix(random.key(4), images, torch.tensor([0, 1]), classes=2)
    >>> torch.equal(x.mean((1, 2, 3)), shares[:, 1])
    True
    """
    if images.ndim != 4:
        raise ValueError(
            f"cutmix: images: expected [batch, channels, height, width], got {describe(images)}"
        )
    shares = _shares("cutmix", images, targets, classes)
    draw, order, down, across = random.split(key, 4).unbind()
    other, side = random.permutation(order, len(images)), (1 - beta(draw, alpha)).sqrt() / 2
    rows = _between(down, side, images.shape[2])
    columns = _between(across, side, images.shape[3])
    box = rearrange(rows, "height -> height 1") & columns
    share = 1 - box.to(torch.float64).mean()
    return torch.where(box, images[other], images), _mixed(shares, other, share)


def beta(key: random.Key, alpha: float | Float[Tensor, ""]) -> Float[Tensor, ""]:
    """A number from Beta(alpha, alpha), in float64.

    By two gamma variates (Marsaglia and Tsang 2000), in logarithms: for a small alpha both would
    round to zero.
    """
    if isinstance(alpha, Tensor):
        shape = alpha.to(torch.float64)
    elif alpha > 0:
        shape = torch.tensor(alpha, dtype=torch.float64, device=key.device)
    else:
        raise ValueError(f"alpha: expected more than 0, got {alpha}")
    first, second = (_log_gamma_variate(one, shape) for one in random.split(key).unbind())
    return torch.sigmoid(first - second)


def _log_gamma_variate(key: Tensor, shape: Tensor) -> Tensor:
    # Of shape + 1, for which rejection works, times u ** (1 / shape).
    normal, accept, power = random.split(key, 3).unbind()
    d = shape + 2 / 3
    x = random.normal(normal, (ATTEMPTS,), dtype=torch.float64)
    v = (1 + x / (9 * d).sqrt()) ** 3
    positive = v > 0
    log_v = torch.where(positive, v, 1.0).log()
    u = random.uniform(accept, (ATTEMPTS,), dtype=torch.float64)
    accepted = positive & (u.log() < x.square() / 2 + d * (1 - v + log_v))
    first = accepted.to(torch.int64).argmax()  # of several largest, the first
    chosen = rearrange(log_v.gather(0, rearrange(first, "-> 1")), "1 ->")
    return d.log() + chosen + (1 - random.uniform(power, (), dtype=torch.float64)).log() / shape


def _between(key: Tensor, side: Tensor, size: int) -> Bool[Tensor, " size"]:
    """The places within half a side, a share of the size, of a centre drawn uniformly."""
    place = torch.arange(size, device=key.device)
    centre, half = random.randint(key, (), 0, size), (side * size).to(torch.int64)
    return (place >= centre - half) & (place < centre + half)


def _shares(name: str, x: Tensor, targets: Tensor, classes: int | None) -> Tensor:
    if not x.ndim or targets.shape[:1] != x.shape[:1]:
        raise ValueError(
            f"{name}: targets: expected {len(x) if x.ndim else 'batch'} (as the samples), "
            f"got {describe(targets)}"
        )
    if not x.is_floating_point():
        raise ValueError(f"{name}: samples: expected a floating dtype, got {describe(x)}")
    if targets.is_floating_point():
        return targets
    if classes is None or targets.ndim != 1:
        raise ValueError(
            f"{name}: targets: expected labels [batch] and the number of classes, or shares in a "
            f"floating dtype, got {describe(targets)} and classes={classes}"
        )
    labels: Int64[Tensor, " batch"] = targets
    if not _torch.inlining() and not bool(((labels >= 0) & (labels < classes)).all()):
        raise ValueError(
            f"{name}: targets: expected labels from 0 to {classes - 1}, "
            f"got {int(labels.min())} to {int(labels.max())}"
        )
    one_hot = rearrange(labels, "batch -> batch 1") == torch.arange(classes, device=labels.device)
    return one_hot.to(x.dtype)


def _mixed(x: Tensor, other: Tensor, share: Tensor) -> Tensor:
    return torch.lerp(x[other], x, share.to(x.dtype))

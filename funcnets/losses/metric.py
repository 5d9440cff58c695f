"""Losses that make distances between embeddings mean something, and the mining of triplets.

All are pure and take whole batches: no shape depends on the values, so they work under vmap, grad
and compiled. Labels are integers; which ones is of no account, only which are equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from funcnets.layers.norm import normalize
from funcnets.tree.flatten import describe


def pairwise_distances(
    x: Float[Tensor, "rows features"], y: Float[Tensor, "columns features"]
) -> Float[Tensor, "rows columns"]:
    """Euclidean distances between all rows of x and all of y.

    Where two rows are equal, the gradient is zero (that of the root alone would be infinite).

    Raises:
        ValueError: where x and y have other than equally many features.

    >>> pairwise_distances(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[5., 0.]])
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(
            "pairwise_distances: expected [rows, features] and [columns, features], "
            f"got {describe(x)} and {describe(y)}"
        )
    # Not by the inner products, whose rounding would drown the distances of near rows.
    difference = rearrange(x, "rows features -> rows 1 features") - y
    return _root(reduce(difference.square(), "rows columns features -> rows columns", "sum"))


def contrastive(
    first: Float[Tensor, "batch features"],
    second: Float[Tensor, "batch features"],
    similar: Shaped[Tensor, " batch"],
    margin: float | Float[Tensor, ""] = 2.0,
) -> Float[Tensor, ""]:
    """Draws similar pairs together and pushes others apart, up to a margin (Hadsell et al. 2006).

    The mean over the pairs of ``d ** 2`` where they are similar and of ``max(0, margin - d) ** 2``
    where they are not, with the Euclidean distance d. (The paper has half of this.)

    Args:
        similar: 1 or True for a similar pair, 0 or False for one that is not; between them for a
            share of each.

    Raises:
        ValueError: where the shapes or dtypes do not fit.

    >>> x, y = torch.tensor([[0.0], [0.0]]), torch.tensor([[3.0], [0.5]])
    >>> contrastive(x, y, torch.tensor([1, 0]))  # the mean of 3 ** 2 and (2 - 0.5) ** 2
    tensor(5.6250)
    """
    _check_rows("contrastive", first=first, second=second)
    if similar.shape != first.shape[:1]:
        raise ValueError(
            f"contrastive: similar: expected {list(first.shape[:1])} (as the pairs), "
            f"got {list(similar.shape)}"
        )
    square = reduce((first - second).square(), "batch features -> batch", "sum")
    short = (margin - _root(square)).clamp(min=0).square()
    return torch.lerp(short, square, similar.to(square.dtype)).mean()


def triplet_margin(
    anchor: Float[Tensor, "batch features"],
    positive: Float[Tensor, "batch features"],
    negative: Float[Tensor, "batch features"],
    margin: float | Float[Tensor, ""] = 1.0,
    p: float = 2.0,
    swap: bool = False,
    eps: float = 1e-6,
    where: Bool[Tensor, " batch"] | None = None,
) -> Float[Tensor, ""]:
    """Wants the positive nearer to the anchor than the negative by a margin.

    As `torch.nn.functional.triplet_margin_loss`, the mean over the batch; here the margin may be a
    tensor, and triplets may be left out.

    Args:
        p: of the norm.
        swap: take the distance from positive to negative where it is the smaller one (Balntas et
            al. 2016).
        eps: added to each difference, as torch does.
        where: the triplets that count, by default all; without any the loss is zero.

    Raises:
        ValueError: where the shapes or dtypes do not fit.

    >>> anchor, positive, negative = torch.tensor([[[0.0]], [[1.0]], [[1.5]]])
    >>> triplet_margin(anchor, positive, negative)
    tensor(0.5000)
    """
    _check_rows("triplet_margin", anchor=anchor, positive=positive, negative=negative)
    if where is not None:
        if where.shape != anchor.shape[:1]:
            raise ValueError(
                f"triplet_margin: where: expected {list(anchor.shape[:1])} (as the triplets), "
                f"got {list(where.shape)}"
            )
        # Whatever stands in those that are left out, not a number even, has no gradient.
        anchor, positive, negative = (
            torch.where(where[:, None], x, 0.0) for x in (anchor, positive, negative)
        )
    far = F.pairwise_distance(anchor, negative, p, eps)
    if swap:
        far = torch.minimum(far, F.pairwise_distance(positive, negative, p, eps))
    loss = (margin + F.pairwise_distance(anchor, positive, p, eps) - far).clamp(min=0)
    if where is None:
        return loss.mean()
    return torch.where(where, loss, 0.0).sum() / where.sum().clamp(min=1)


class Triplets(NamedTuple):
    """Triplets of a batch, by place; those not ``valid`` are fillers, for the shape to be fixed.

    ``triplet_margin(x[t.anchor], x[t.positive], x[t.negative], where=t.valid)`` is their loss.
    """

    anchor: Int[Tensor, " triplets"]
    positive: Int[Tensor, " triplets"]
    negative: Int[Tensor, " triplets"]
    valid: Bool[Tensor, " triplets"]


def batch_hard(
    embeddings: Float[Tensor, "batch features"], labels: Int[Tensor, " batch"]
) -> Triplets:
    """For each sample the farthest of its class and the nearest of another (Hermans et al. 2017).

    One triplet a sample; it is valid where its class has a second sample and there is another
    class.

    >>> t = batch_hard(torch.tensor([[0.0], [1.0], [3.0], [5.0]]), torch.tensor([7, 7, 8, 8]))
    >>> t.positive.tolist(), t.negative.tolist(), t.valid.all().item()
    ([1, 0, 3, 2], [2, 2, 1, 1], True)
    """
    distances, same, other = _compared("batch_hard", embeddings, labels)
    infinity = float("inf")
    return Triplets(
        torch.arange(len(embeddings), device=embeddings.device),
        distances.masked_fill(~same, -infinity).argmax(1),
        distances.masked_fill(~other, infinity).argmin(1),
        same.any(1) & other.any(1),
    )


def semi_hard(
    embeddings: Float[Tensor, "batch features"], labels: Int[Tensor, " batch"]
) -> Triplets:
    """For each pair of one class the nearest negative beyond the positive (Schroff et al. 2015).

    Where no negative is farther from the anchor than the positive is, it is the farthest one. All
    pairs of samples have a place, batch ** 2 triplets, of which those of one class are valid.

    >>> t = semi_hard(torch.tensor([[0.0], [2.0], [1.0], [3.0]]), torch.tensor([7, 7, 8, 8]))
    >>> [(a, p, n) for a, p, n, valid in zip(*(v.tolist() for v in t)) if valid]
    [(0, 1, 3), (1, 0, 2), (2, 3, 0), (3, 2, 0)]
    """
    distances, same, other = _compared("semi_hard", embeddings, labels)
    infinity = float("inf")
    # [anchor, positive, negative]
    beyond = rearrange(distances, "a n -> a 1 n") > rearrange(distances, "a p -> a p 1")
    beyond = beyond & rearrange(other, "a n -> a 1 n")
    nearest = rearrange(distances, "a n -> a 1 n").masked_fill(~beyond, infinity).argmin(2)
    farthest = rearrange(distances.masked_fill(~other, -infinity).argmax(1), "a -> a 1")
    negative = torch.where(beyond.any(2), nearest, farthest)
    place = torch.arange(len(embeddings), device=embeddings.device)
    anchor, positive = torch.meshgrid(place, place, indexing="ij")
    valid = same & rearrange(other.any(1), "a -> a 1")
    return Triplets(*(t.flatten() for t in (anchor, positive, negative, valid)))


def info_nce(
    queries: Float[Tensor, "batch features"],
    keys: Float[Tensor, "batch features"],
    temperature: float | Float[Tensor, ""] = 0.1,
    symmetric: bool = False,
) -> Float[Tensor, ""]:
    """Picks the key of each query among all keys of the batch (van den Oord et al. 2018).

    The cross-entropy of the cosine similarities over the temperature; the key of a query is the one
    at its place.

    Args:
        symmetric: the mean of this and of picking the query of each key (Radford et al. 2021).

    Raises:
        ValueError: where the shapes or dtypes do not fit.

    >>> x = torch.eye(2)
    >>> info_nce(x, x, temperature=1.0)  # log(1 + exp(-1))
    tensor(0.3133)
    """
    _check_rows("info_nce", queries=queries, keys=keys)
    logits = _cosines(queries, keys) / temperature
    # log_softmax and the diagonal rather than cross_entropy: labels by place need no tensor.
    loss = -logits.log_softmax(1).diagonal().mean()
    if symmetric:
        loss = (loss - logits.log_softmax(0).diagonal().mean()) / 2
    return loss


def supervised_contrastive(
    embeddings: Float[Tensor, "batch features"],
    labels: Int[Tensor, " batch"],
    temperature: float | Float[Tensor, ""] = 0.1,
    similarity: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Float[Tensor, ""]:
    """Picks each sample's fellows among the samples of other classes (Khosla et al. 2020).

    The mean over all pairs of one class of the cross-entropy of the second among it and all samples
    of other classes than the first's, by similarity over the temperature. (Unlike in the paper, the
    fellows do not compete with one another.) Without such pairs the loss is zero.

    Args:
        similarity: from embeddings [m, features] and [n, features] to a number for each pair,
            [m, n]; by default the cosine.

    Raises:
        ValueError: where the shapes do not fit.

    >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> supervised_contrastive(x, torch.tensor([0, 0, 1]), temperature=1.0)  # log(1 + exp(-1))
    tensor(0.3133)
    """
    same, fellows = _same("supervised_contrastive", embeddings, labels)
    logits = (similarity or _cosines)(embeddings, embeddings) / temperature
    if logits.shape != same.shape:
        raise ValueError(
            f"supervised_contrastive: similarity: expected {list(same.shape)}, "
            f"got {list(logits.shape)}"
        )
    # A finite number for minus infinity: of a row of those, logsumexp would have no gradient.
    lowest = torch.finfo(logits.dtype).min / 2
    others = torch.logsumexp(logits.masked_fill(same, lowest), dim=1, keepdim=True)
    loss = F.softplus(others - logits)
    return torch.where(fellows, loss, 0.0).sum() / fellows.sum().clamp(min=1)


def prototypical_logits(
    support: Float[Tensor, "support features"],
    labels: Int[Tensor, " support"],
    queries: Float[Tensor, "queries features"],
    classes: int,
) -> Float[Tensor, "queries classes"]:
    """Minus the squared distances of the queries to the means of the classes (Snell et al. 2017).

    Args:
        support: the samples of the classes.
        labels: theirs, from 0 to classes - 1; a sample of any other label is of no class. A class
            that has no sample gets minus infinity.

    Raises:
        ValueError: where the shapes do not fit, or labels are no integers.

    >>> support, labels = torch.tensor([[0.0], [2.0], [5.0]]), torch.tensor([0, 0, 1])
    >>> prototypical_logits(support, labels, torch.tensor([[2.0]]), classes=2)
    tensor([[-1., -9.]])
    """
    if support.ndim != 2 or queries.ndim != 2 or support.shape[1] != queries.shape[1]:
        raise ValueError(
            "prototypical: expected support [support, features] and queries [queries, features], "
            f"got {describe(support)} and {describe(queries)}"
        )
    if labels.shape != support.shape[:1]:
        raise ValueError(
            f"prototypical: labels: expected {list(support.shape[:1])} (as support), "
            f"got {list(labels.shape)}"
        )
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"prototypical: labels: expected integers, got {describe(labels)}")
    if classes < 1:
        raise ValueError(f"prototypical: classes: expected at least 1, got {classes}")
    member = rearrange(labels, "s -> s 1") == torch.arange(classes, device=labels.device)
    count = member.sum(0)
    sums = einsum(member.to(support.dtype), support, "s classes, s features -> classes features")
    means = sums / rearrange(count.clamp(min=1), "classes -> classes 1")
    difference = rearrange(queries, "queries features -> queries 1 features") - means
    square = reduce(difference.square(), "queries classes features -> queries classes", "sum")
    return (-square).masked_fill(count == 0, float("-inf"))


def prototypical(
    support: Float[Tensor, "support features"],
    support_labels: Int[Tensor, " support"],
    queries: Float[Tensor, "queries features"],
    query_labels: Int[Tensor, " queries"],
    classes: int,
) -> Float[Tensor, ""]:
    """The cross-entropy of the `prototypical_logits`: one episode of a prototypical network.

    Raises:
        ValueError: where the shapes do not fit.

    >>> support, labels = torch.tensor([[0.0], [1.0]]), torch.tensor([0, 1])
    >>> prototypical(support, labels, support, labels, classes=2)  # log(1 + exp(-1))
    tensor(0.3133)
    """
    logits = prototypical_logits(support, support_labels, queries, classes)
    if query_labels.shape != queries.shape[:1]:
        raise ValueError(
            f"prototypical: query_labels: expected {list(queries.shape[:1])} (as queries), "
            f"got {list(query_labels.shape)}"
        )
    return F.cross_entropy(logits, query_labels)


def _same(
    name: str, embeddings: Tensor, labels: Tensor
) -> tuple[Bool[Tensor, "batch batch"], Bool[Tensor, "batch batch"]]:
    """Who is of the same class, and who of these is another sample."""
    if embeddings.ndim != 2 or not len(embeddings) or labels.shape != embeddings.shape[:1]:
        raise ValueError(
            f"{name}: expected embeddings [batch, features] and labels [batch], "
            f"got {describe(embeddings)} and {describe(labels)}"
        )
    place = torch.arange(len(labels), device=labels.device)
    same = rearrange(labels, "a -> a 1") == labels
    return same, same & (rearrange(place, "a -> a 1") != place)


def _compared(
    name: str, embeddings: Tensor, labels: Tensor
) -> tuple[Float[Tensor, "batch batch"], Bool[Tensor, "batch batch"], Bool[Tensor, "batch batch"]]:
    """Distances, and who is another sample of the same class, and who of another class."""
    same, fellows = _same(name, embeddings, labels)
    # Which samples are picked has no gradient.
    detached = embeddings.detach()
    return pairwise_distances(detached, detached), fellows, ~same


def _root(square: Tensor) -> Tensor:
    """The square root, with the derivative zero at zero."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)


def _cosines(x: Tensor, y: Tensor) -> Tensor:
    return einsum(normalize(x), normalize(y), "rows f, columns f -> rows columns")


def _check_rows(name: str, **embeddings: Tensor) -> None:
    shapes, dtypes = ([getattr(x, a) for x in embeddings.values()] for a in ("shape", "dtype"))
    if any(len(shape) != 2 or shape != shapes[0] for shape in shapes) or not shapes[0][0]:
        expected = "equal shapes [batch, features]"
    elif len(set(dtypes)) > 1 or not dtypes[0].is_floating_point:
        expected = "floats of one dtype"
    else:
        return
    got = ", ".join(f"{key} {describe(x)}" for key, x in embeddings.items())
    raise ValueError(f"{name}: expected {expected}, got {got}")

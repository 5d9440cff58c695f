"""A gradient for each sample, and what it tells: norms, the noise of a batch, influence.

Losses here are ``loss(params, batch) -> value``, a mean over the samples of a batch: any tree of
tensors [samples, ...]. They are called with batches of one, so ``loss`` may be that of training as
long as it treats samples apart (batch norm in training does not). ``chunk`` is how many samples are
computed at once: memory for so many gradients is all that is taken where their sums will do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, vmap

from funcnets import tree
from funcnets.ensembles.chunks import chunked
from funcnets.tree.flatten import Tree

Loss = Callable[[Any, Any], Tensor]


def gradients(loss: Loss, params: Tree, batch: Tree, chunk: int | None = None) -> Tree:
    """The gradient of each sample's loss: a tree like ``params`` of [samples, ...].

    Raises:
        ValueError: where the batch has no samples, or its tensors not one number of them.

    >>> loss = lambda params, x: (params["w"] * x).square().mean()
    >>> gradients(loss, {"w": torch.tensor(1.0)}, torch.tensor([1.0, 2.0, 3.0]))
    {'w': tensor([ 2.,  8., 18.])}
    """
    _count("gradients", batch)
    _check_chunk(chunk)
    return _each(loss, params, chunk)(batch)


def norms(
    loss: Loss, params: Tree, batch: Tree, chunk: int | None = None
) -> Float[Tensor, " samples"]:
    """The Euclidean norm of each sample's gradient, all parameters taken as one vector.

    >>> loss = lambda params, x: (params["w"] * x).square().mean()
    >>> norms(loss, {"w": torch.tensor(1.0)}, torch.tensor([1.0, -2.0, 3.0]))
    tensor([ 2.,  8., 18.])
    """
    _count("norms", batch)
    _check_chunk(chunk)

    def norm(sample: Any) -> Tensor:
        return tree.global_norm(_gradient(loss, params, sample))

    return chunked(norm, chunk)(batch)


class NoiseScale(NamedTuple):
    """How noisy the gradient of a sample is.

    Attributes:
        scale: ``trace / square``; infinite where no more than noise was found.
        trace: of the covariance of the samples' gradients.
        square: the squared norm of their expectation, an estimate that may fall below zero.
    """

    scale: Float[Tensor, ""]
    trace: Float[Tensor, ""]
    square: Float[Tensor, ""]


def noise_scale(loss: Loss, params: Tree, batch: Tree, chunk: int | None = None) -> NoiseScale:
    """The simple noise scale (McCandlish et al. 2018): about the largest batch that still pays.

    Both of its parts are without bias, so over several batches average those, and divide then.

    Raises:
        ValueError: for fewer than two samples.

    >>> loss = lambda params, x: (params["w"] * x).mean()  # of gradient x
    >>> noise_scale(loss, {"w": torch.tensor(1.0)}, torch.tensor([1.0, 3.0]))
    NoiseScale(scale=tensor(0.6667), trace=tensor(2.), square=tensor(3.))
    """
    count = _count("noise_scale", batch)
    if count < 2:
        raise ValueError(f"noise_scale: batch: expected 2 or more samples, got {count}")
    total, squares = None, []
    for part in _parts(batch, count, chunk):
        found = _each(loss, params, None)(part)
        summed = tree.map(lambda leaf: leaf.sum(0), found)
        total = summed if total is None else tree.map(torch.add, total, summed)
        squares.append(vmap(tree.global_norm)(found).square())
    mean_square = torch.cat(squares).mean()
    square_mean = tree.global_norm(total).square() / count**2
    trace = (mean_square - square_mean).clamp(min=0) * count / (count - 1)
    square = square_mean - trace / count
    # The inner where keeps the quotient finite where it is not taken.
    scale = torch.where(square > 0, trace / torch.where(square > 0, square, 1.0), torch.inf)
    return NoiseScale(scale, trace, square)


def influence(
    loss: Loss,
    checkpoints: Tree | Sequence[Tree],
    train: Tree,
    test: Tree,
    rates: float | Sequence[float] = 1.0,
    chunk: int | None = None,
) -> Float[Tensor, "train test"]:
    """How much each training sample lowered the loss of each test sample (Pruthi et al. 2020).

    This is TracIn: the sum over checkpoints of the learning rate times the product of the two
    samples' gradients, to first order the change of the test loss by a step of SGD on that training
    sample. Above zero it helped; a mislabelled sample helps itself and few others.

    Args:
        checkpoints: the parameters, or those of several moments of the training.
        train: a batch, any tree of tensors [train, ...].
        test: a batch, whose gradients are all held in memory at once.
        rates: the learning rates at the checkpoints.
        chunk: how many training samples are computed at once, by default all.

    >>> loss = lambda params, x: (params["w"] * x).mean()
    >>> influence(loss, {"w": torch.tensor(1.0)}, torch.tensor([1.0, -2.0]), torch.tensor([3.0]))
    tensor([[ 3.],
            [-6.]])
    """
    moments = list(checkpoints) if isinstance(checkpoints, (list, tuple)) else [checkpoints]
    weights = [rates] * len(moments) if isinstance(rates, (int, float)) else list(rates)
    if not moments or len(weights) != len(moments):
        raise ValueError(
            f"influence: rates: expected one for each of {len(moments)} checkpoints, "
            f"got {len(weights)}"
        )
    count = _count("influence", train)
    _count("influence", test)
    total: Tensor | None = None
    for rate, params in zip(weights, moments, strict=True):
        held = _flat(loss, params, test)
        rows = [
            einsum(_flat(loss, params, part), held, "train p, test p -> train test")
            for part in _parts(train, count, chunk)
        ]
        found = rate * torch.cat(rows)
        total = found if total is None else total + found
    assert total is not None
    return total


def _gradient(loss: Loss, params: Tree, sample: Any) -> Tree:
    one = tree.map(lambda leaf: rearrange(leaf, "... -> 1 ..."), sample)
    return grad(lambda params: loss(params, one))(params)


def _each(loss: Loss, params: Tree, chunk: int | None) -> Callable[[Any], Tree]:
    return chunked(lambda sample: _gradient(loss, params, sample), chunk)


def _flat(loss: Loss, params: Tree, batch: Any) -> Tensor:
    found = tree.leaves(_each(loss, params, None)(batch))
    return torch.cat([rearrange(leaf, "samples ... -> samples (...)") for leaf in found], 1)


def _count(name: str, batch: Tree) -> int:
    found = tree.leaves_with_path(batch)
    sizes = {leaf.shape[0] if leaf.ndim else 0 for _, leaf in found}
    if len(sizes) != 1 or 0 in sizes:
        shapes = ", ".join(f"{tree.join(path)} {list(leaf.shape)}" for path, leaf in found)
        raise ValueError(
            f"{name}: batch: expected tensors of one number of samples, got {shapes or 'none'}"
        )
    return sizes.pop()


def _check_chunk(chunk: int | None) -> None:
    if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
        # No "auto": what it has measured would be forgotten with the call.
        raise ValueError(f"chunk: expected None or at least 1, got {chunk!r}")


def _parts(batch: Tree, count: int, chunk: int | None) -> Iterator[Tree]:
    _check_chunk(chunk)
    size = count if chunk is None else chunk
    for start in range(0, count, size):
        yield tree.map(lambda leaf, start=start: leaf[start : start + size], batch)

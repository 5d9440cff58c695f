"""One loss of several: sums of named losses, and what gives each its weight.

The losses come in a dict by name, as the outputs of a model do. Each function is pure and works
under vmap (a weight may be a tensor, one per member of an ensemble), grad and compiled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from funcnets.random import Key
from funcnets.tree.flatten import describe, entries


def weighted_sum(
    losses: Mapping[str, Float[Tensor, ...]],
    weights: Mapping[str, int | float | Tensor] | None = None,
    *,
    normalize: bool = False,
) -> Float[Tensor, ...]:
    """The sum of named losses, each times its weight.

    Args:
        losses: of one shape, [] or one value per sample.
        weights: one for each loss, a number or a tensor of shape []; by default 1.
        normalize: divide the weights by their sum, so that they sum to one and the rate of
            learning does not depend on how many losses there are.

    Raises:
        ValueError: naming the losses without a weight and the weights without a loss, or the loss
            of another shape; or where the weights to normalize are negative or all zero.

    >>> losses = {"character": torch.tensor(3.0), "alphabet": torch.tensor(1.0)}
    >>> weighted_sum(losses), weighted_sum(losses, {"character": 1, "alphabet": 3}, normalize=True)
    (tensor(4.), tensor(1.5000))
    """
    first = _check_losses("weighted_sum", losses)
    weights = dict.fromkeys(losses, 1.0) if weights is None else weights
    _check_named("weighted_sum", "weights", weights)
    _check_names("weighted_sum", "weights", weights.keys(), losses)
    for name, loss in losses.items():
        if loss.shape != first.shape:
            raise ValueError(
                f"weighted_sum: losses.{name}: expected shape {list(first.shape)} (as "
                f"{next(iter(losses))}), got {list(loss.shape)}"
            )
    for name, weight in weights.items():
        if isinstance(weight, Tensor) and weight.ndim:
            raise ValueError(
                f"weighted_sum: weights.{name}: expected a number or a tensor of shape [], "
                f"got {describe(weight)}; map over several with vmap"
            )
    factors = [weights[name] for name in losses]
    if normalize:
        numbers = [factor for factor in factors if not isinstance(factor, Tensor)]
        if any(not number >= 0 for number in numbers):
            raise ValueError(f"weighted_sum: weights: expected none below 0, got {dict(weights)}")
        if len(numbers) == len(factors) and not sum(numbers) > 0:
            raise ValueError("weighted_sum: weights: expected a positive sum, got 0")
        total = sum(factors)
        factors = [factor / total for factor in factors]
    products = [w * loss for w, loss in zip(factors, losses.values(), strict=True)]
    return torch.stack(products).sum(0)


def scale_by_largest(
    losses: Mapping[str, Float[Tensor, " batch"]],
) -> dict[str, Float[Tensor, ""]]:
    """For each named loss the mean over the batch, in units of its largest value there.

    Losses of whatever unit lie between 0 and 1 so, and `weighted_sum` can weigh them on equal
    terms. The scale is a constant to the gradient. A loss that is zero everywhere stays as it is.

    Args:
        losses: one value per sample, as ``reduction="none"`` gives them; the largest is that of
            the absolute values.

    Raises:
        ValueError: naming a loss that has no samples.

    >>> losses = {"metres": torch.tensor([1.0, 3.0]), "millimetres": torch.tensor([1e3, 3e3])}
    >>> scale_by_largest(losses)
    {'metres': tensor(0.6667), 'millimetres': tensor(0.6667)}
    """
    _check_losses("scale_by_largest", losses)
    scaled = {}
    for name, loss in losses.items():
        if not loss.ndim or not loss.numel():
            raise ValueError(
                f"scale_by_largest: losses.{name}: expected one value per sample, "
                f"got {describe(loss)}"
            )
        largest = loss.detach().abs().amax()
        scaled[name] = (loss / torch.where(largest > 0, largest, 1)).mean()
    return scaled


def init_uncertainty(
    key: Key, names: Sequence[str], *, dtype: torch.dtype = torch.float32
) -> TensorDict:
    """Parameters of `uncertainty`: for each loss the logarithm of a variance, [], zero at first.

    They are trained with those of the network, and best without weight decay.

    Args:
        key: draws nothing; the parameters are on its device.
        names: of the losses.
    """
    if isinstance(names, str) or not names or len(set(names)) < len(names):
        raise ValueError(f"init_uncertainty: names: expected each name once, got {names!r}")
    zeros = {name: torch.zeros((), dtype=dtype, device=key.device) for name in names}
    return TensorDict({"log_variance": zeros})


def uncertainty(params: TensorDict, losses: Mapping[str, Float[Tensor, ""]]) -> Float[Tensor, ""]:
    """The sum of named losses, weighted by learned uncertainties (Kendall et al. 2018).

    With the logarithm s of a variance, each loss L counts as ``exp(-s) * L + s / 2``: the more
    uncertain a task the less it weighs, and the second term keeps s from growing for ever. At the
    best s, the variance is twice the loss. L is a negative log-likelihood: a cross-entropy (eq. 10
    of the paper), or half a squared error (eq. 7).

    Args:
        params: of `init_uncertainty`.
        losses: one for each of the names there.

    Raises:
        ValueError: naming the losses without a parameter and the parameters without a loss, or
            what is not of shape [].

    >>> from funcnets import random
    >>> losses = {"character": torch.tensor(3.0), "alphabet": torch.tensor(1.0)}
    >>> uncertainty(init_uncertainty(random.key(0), list(losses)), losses)
    tensor(4.)
    """
    _check_losses("uncertainty", losses)
    held = entries(params["log_variance"]) or {}
    _check_names("uncertainty", "params.log_variance", held.keys(), losses)
    for field, found in (("params.log_variance", held), ("losses", losses)):
        for name, value in found.items():
            if value.ndim:
                raise ValueError(
                    f"uncertainty: {field}.{name}: expected shape [], got {list(value.shape)}"
                )
    return weighted_sum(
        {name: (-held[name]).exp() * loss + held[name] / 2 for name, loss in losses.items()}
    )


def _check_losses(function: str, losses: Mapping[str, Tensor]) -> Tensor:
    """The first loss; raises where there is none."""
    _check_named(function, "losses", losses)
    if not losses:
        raise ValueError(f"{function}: losses: expected at least one, got none")
    for name, loss in losses.items():
        if not isinstance(loss, Tensor):
            raise TypeError(f"{function}: losses.{name}: expected a tensor, got {describe(loss)}")
    return next(iter(losses.values()))


def _check_named(function: str, field: str, named: object) -> None:
    if not isinstance(named, (Mapping, TensorDictBase)):
        raise TypeError(f"{function}: {field}: expected a dict by name, got {describe(named)}")


def _check_names(
    function: str, field: str, names: Iterable[str], losses: Mapping[str, Tensor]
) -> None:
    held = list(names)
    missing = [name for name in losses if name not in held]
    unknown = [name for name in held if name not in losses]
    if missing or unknown:
        found = [f"missing {', '.join(missing)}"] if missing else []
        found += [f"unknown {', '.join(unknown)}"] if unknown else []
        raise ValueError(f"{function}: {field}: expected {', '.join(losses)}; {', '.join(found)}")

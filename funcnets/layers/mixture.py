"""A mixture of experts: each token is sent to the few feed-forward networks its router picks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, overload

import torch
from einops import einsum, rearrange, reduce, repeat
from jaxtyping import Bool, Float, Int
from tensordict import TensorDict
from torch import Tensor
from torch.func import vmap

from funcnets import _torch, random, tree
from funcnets.control.route import route
from funcnets.layers.attention import check_padding
from funcnets.layers.feed_forward import FeedForward, feed_forward, init_feed_forward
from funcnets.layers.linear import init_linear, linear
from funcnets.layers.params import check_positive, entries
from funcnets.random import Key


class Routing(NamedTuple):
    """Which experts a router sends its tokens to; the losses and statistics of it need no more."""

    logits: Float[Tensor, "*batch experts"]
    experts: Int[Tensor, "*batch top_k"]
    gates: Float[Tensor, "*batch top_k"]


def init_mixture(
    key: Key,
    width: int,
    hidden: int,
    experts: int,
    *,
    activation: FeedForward = "relu",
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
) -> TensorDict:
    """Parameters of `mixture`: ``router`` [experts, width], without bias, and ``experts``.

    The latter is one tree of batch size [experts], each `init_feed_forward`'s.
    """
    check_positive("init_mixture", width=width, hidden=hidden, experts=experts)
    router_key, experts_key = random.split(key)
    made = [
        init_feed_forward(one, width, hidden, activation=activation, bias=bias, dtype=dtype)
        for one in random.split(experts_key, experts).unbind()
    ]
    return TensorDict(
        {
            "router": init_linear(router_key, width, experts, bias=False, dtype=dtype),
            "experts": tree.stack(made),
        }
    )


@overload
def mixture(
    params: TensorDict,
    x: Tensor,
    *,
    routing: Literal[False] = False,
    **options: Any,
) -> Tensor: ...


@overload
def mixture(
    params: TensorDict,
    x: Tensor,
    *,
    routing: Literal[True],
    **options: Any,
) -> tuple[Tensor, Routing]: ...


@overload
def mixture(
    params: TensorDict,
    x: Tensor,
    *,
    routing: bool,
    **options: Any,
) -> Tensor | tuple[Tensor, Routing]: ...


def mixture(  # type: ignore[misc]
    params: TensorDict,
    x: Float[Tensor, "*batch width"],
    *,
    top_k: int = 2,
    activation: FeedForward = "relu",
    normalize: bool | None = None,
    noise: float = 0.0,
    key: Key | None = None,
    dense: bool | None = None,
    routing: bool = False,
) -> Float[Tensor, "*batch width"] | tuple[Float[Tensor, "*batch width"], Routing]:
    """The sum of what the ``top_k`` likeliest experts of each token make of it, weighted.

    The weights are the router's softmax probabilities (Shazeer et al. 2017). Eager, `route` gives
    each expert the tokens that picked it, and no others. Under vmap and compiled, every expert
    computes every token, all in one batched product, and the same sum is taken.

    Args:
        top_k: how many experts a token is sent to.
        activation: of the experts, as given to `init_mixture`.
        normalize: whether the weights of a token are divided by their sum. By default they are but
            for one expert, whose weight would be one, so that the router had no gradient (Fedus et
            al. 2021, "Switch").
        noise: the deviation of normal numbers that are added to the router's logits, if ``key`` is
            given as well.
        dense: whether every expert computes every token; by default as said above.
        routing: whether to return the `Routing`, too, for `balance_loss`, `importance_loss` and
            `router_z_loss`.

    Raises:
        ValueError: where there are fewer than ``top_k`` experts.

    >>> params = init_mixture(random.key(0), width=4, hidden=8, experts=3)
    >>> outputs, routing = mixture(params, torch.ones(2, 5, 4), routing=True)
    >>> outputs.shape, routing.experts.shape
    (torch.Size([2, 5, 4]), torch.Size([2, 5, 2]))
    """
    found = entries(params)
    logits = linear(found["router"], x)
    count = logits.shape[-1]
    if not 1 <= top_k <= count:
        raise ValueError(f"mixture: top_k: expected from 1 to {count} (as router), got {top_k}")
    if key is not None and noise > 0:
        logits = logits + noise * random.normal(key, logits.shape, dtype=logits.dtype)
    gates, chosen = _probabilities(logits).topk(top_k, -1)
    if top_k > 1 if normalize is None else normalize:
        gates = gates / reduce(gates, "... k -> ... 1", "sum")
    gates = gates.to(x.dtype)
    if dense is None:
        dense = _torch.vmapping() or _torch.abstract()
    combine = _dense if dense else _routed
    outputs = combine(found["experts"], x, chosen, gates, count, activation)
    return (outputs, Routing(logits, chosen, gates)) if routing else outputs


def balance_loss(routing: Routing, padding: Bool[Tensor, ...] | None = None) -> Float[Tensor, ""]:
    """How unevenly tokens are spread over the experts: 1 where they are spread evenly, or more.

    ``experts * sum(share of the tokens * mean probability)`` over the experts (Fedus et al. 2021,
    "Switch Transformers"); differentiable through the probabilities.

    Args:
        padding: True for the tokens that count, [*batch]; by default all.

    >>> even = Routing(torch.zeros(2, 2), torch.tensor([[0], [1]]), torch.ones(2, 1) / 2)
    >>> balance_loss(even)
    tensor(1.)
    """
    picked = _picked(routing)
    shares = reduce(picked.to(routing.logits.dtype), "... k experts -> ... experts", "mean")
    shares, probabilities = (
        _token_mean(x, padding) for x in (shares, _probabilities(routing.logits))
    )
    return (shares * probabilities).sum() * routing.logits.shape[-1]


def importance_loss(
    routing: Routing, padding: Bool[Tensor, ...] | None = None
) -> Float[Tensor, ""]:
    """The squared coefficient of variation of the weight that each expert gets in all.

    Shazeer et al. 2017, equation 6; 0 where all get the same. For ``padding`` see `balance_loss`.

    >>> even = Routing(torch.zeros(2, 2), torch.tensor([[0], [1]]), torch.ones(2, 1) / 2)
    >>> importance_loss(even)
    tensor(0.)
    """
    weights = torch.where(_picked(routing), rearrange(routing.gates, "... k -> ... k 1"), 0.0)
    mean = _token_mean(reduce(weights, "... k experts -> ... experts", "sum"), padding)
    relative = mean / mean.mean()
    return (relative - 1).square().mean()


def router_z_loss(routing: Routing, padding: Bool[Tensor, ...] | None = None) -> Float[Tensor, ""]:
    """The mean square of the logits' logsumexp, which keeps the logits small.

    Zoph et al. 2022, "ST-MoE". For ``padding`` see `balance_loss`.

    >>> router_z_loss(Routing(torch.zeros(3, 1), torch.zeros(3, 1).long(), torch.ones(3, 1)))
    tensor(0.)
    """
    squares = routing.logits.logsumexp(-1, keepdim=True).square()
    return _token_mean(squares, padding).sum()


def _probabilities(logits: Tensor) -> Tensor:
    """In at least float32: which experts are the likeliest should not hang on rounding."""
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _picked(routing: Routing) -> Tensor:
    """Which expert each choice of each token is: [*batch, top_k, experts]."""
    count = routing.logits.shape[-1]
    every = torch.arange(count, device=routing.experts.device)
    return rearrange(routing.experts, "... k -> ... k 1") == every


def _token_mean(x: Tensor, padding: Tensor | None) -> Tensor:
    """The mean over the tokens of [*batch, features]."""
    if padding is None:
        return reduce(x, "... features -> features", "mean")
    check_padding("mixture", padding, tuple(x.shape[:-1]))
    real = rearrange(padding, "... -> ... 1")
    total = reduce(torch.where(real, x, 0.0), "... features -> features", "sum")
    return total / padding.sum().clamp(min=1)


def _dense(
    experts: TensorDict,
    x: Tensor,
    chosen: Tensor,
    gates: Tensor,
    count: int,
    activation: FeedForward,
) -> Tensor:
    outputs = vmap(partial(feed_forward, activation=activation), (0, None))(experts, x)
    picked = _picked(Routing(gates.new_empty(count), chosen, gates))
    weights = torch.where(picked, rearrange(gates, "... k -> ... k 1"), 0.0)
    weights = reduce(weights, "... k experts -> ... experts", "sum")
    return einsum(weights, outputs, "... experts, experts ... width -> ... width")


def _routed(
    experts: TensorDict,
    x: Tensor,
    chosen: Tensor,
    gates: Tensor,
    count: int,
    activation: FeedForward,
) -> Tensor:
    # unbind, whose gradient is one stack; that of an index is zeros as large as all experts.
    leaves, structure = tree.flatten(experts)
    parts = zip(*(leaf.unbind() for leaf in leaves), strict=True)
    each = [tree.unflatten(structure, list(part)) for part in parts]

    def branch(place: int) -> Callable[..., Tensor]:
        return lambda each, tokens: feed_forward(each[place], tokens, activation=activation)

    tokens = repeat(x, "... width -> (... k) width", k=chosen.shape[-1])
    index = rearrange(chosen, "... k -> (... k)")
    outputs = route(index, [branch(i) for i in range(count)], each, tokens)
    outputs = outputs.reshape(*gates.shape, x.shape[-1])
    return einsum(gates, outputs, "... k, ... k width -> ... width")

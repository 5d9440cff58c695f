"""Attention in time linear in the length, by a feature map in place of the softmax."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from tensordict import TensorDict
from torch import Tensor

from funcnets.layers.attention import Positions, attention_inputs, attention_outputs, check_padding
from funcnets.layers.params import check_positive, fail, shape

# The sum over the keys seen of features(key) x (value, 1): all that is kept of them.
State = Float[Tensor, "*batch groups head_width value_width_and_1"]


def elu_features(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """``elu(x) + 1``: positive features, computed so that they stay positive far below zero.

    >>> elu_features(torch.tensor([-30.0, 0.0, 2.0]))
    tensor([9.3576e-14, 1.0000e+00, 3.0000e+00])
    """
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


@overload
def linear_attention(
    params: TensorDict,
    queries: Tensor,
    keys: Tensor | None = None,
    values: Tensor | None = None,
    *,
    state: None = None,
    **options: Any,
) -> Tensor: ...


@overload
def linear_attention(
    params: TensorDict,
    queries: Tensor,
    keys: Tensor | None = None,
    values: Tensor | None = None,
    *,
    state: Tensor | Literal[0],
    **options: Any,
) -> tuple[Tensor, Tensor]: ...


def linear_attention(  # type: ignore[misc]
    params: TensorDict,
    queries: Float[Tensor, "*batch queries width"],
    keys: Float[Tensor, "*batch keys key_width"] | None = None,
    values: Float[Tensor, "*batch keys value_width"] | None = None,
    *,
    heads: int,
    causal: bool = False,
    padding: Bool[Tensor, ...] | None = None,
    positions: Positions | None = None,
    state: State | Literal[0] | None = None,
    chunk: int = 64,
) -> Float[Tensor, "*batch queries width"] | tuple[Float[Tensor, "*batch queries width"], State]:
    """Attention whose weights are products of features, ``elu + 1`` (Katharopoulos et al. 2020).

    With parameters of `init_attention` and in the place of `attention`: the weight of a key is
    ``features(q) . features(k)``, divided by the sum of them. Sums over keys then come first, so
    that time and memory grow with the length, not with its square.

    Args:
        heads, padding, positions: as in `attention`. Positions are applied to the projections,
            before the features.
        causal: a query attends to no later key; then there are as many queries as keys.
        state: what an earlier part of a causal sequence left, 0 for none: the outputs are those of
            the parts together, and the new state is returned with them.
        chunk: how many tokens of a causal sequence are taken together; of it, not of the results,
            depends how fast they come.

    >>> from funcnets import random
    >>> from funcnets.layers import init_attention
    >>> params = init_attention(random.key(0), width=8, heads=2)
    >>> x = torch.ones(3, 5, 8)
    >>> outputs, state = linear_attention(params, x, heads=2, causal=True, state=0)
    >>> outputs.shape, state.shape
    (torch.Size([3, 5, 8]), torch.Size([3, 2, 4, 5]))
    """
    q, k, v = attention_inputs(params, queries, keys, values, heads)
    if positions is not None:
        q, k = positions(q, k)
    found = linear_dot_product_attention(
        q, k, v, causal=causal, padding=padding, state=state, chunk=chunk
    )
    if isinstance(found, tuple):
        return attention_outputs(params, found[0]), found[1]
    return attention_outputs(params, found)


def linear_dot_product_attention(
    q: Float[Tensor, "*batch heads queries head_width"],
    k: Float[Tensor, "*batch groups keys head_width"],
    v: Float[Tensor, "*batch groups keys value_width"],
    *,
    causal: bool = False,
    padding: Bool[Tensor, ...] | None = None,
    state: State | Literal[0] | None = None,
    chunk: int = 64,
) -> (
    Float[Tensor, "*batch heads queries value_width"]
    | tuple[Float[Tensor, "*batch heads queries value_width"], State]
):
    """What `linear_attention` computes between its projections; options are explained there.

    Half precision is summed up in float32, which is then the dtype of the state.

    >>> q = torch.ones(1, 3, 2)
    >>> v = torch.arange(3.0).reshape(1, 3, 1)
    >>> linear_dot_product_attention(q, q, v, causal=True)[0, :, 0]
    tensor([0.0000, 0.5000, 1.0000])
    """
    _check(q, k, v, causal, padding, state, chunk)
    exact = torch.promote_types(q.dtype, torch.float32)
    shared = q.shape[-3] // k.shape[-3]
    # The queries of the heads that share keys as queries of one head.
    features = rearrange(elu_features(q.to(exact)), "... (g n) q d -> ... g n q d", n=shared)
    seen = elu_features(k.to(exact))
    if padding is not None:
        seen = torch.where(rearrange(padding, "... keys -> ... 1 keys 1"), seen, 0.0)
    # The column of ones sums the weights themselves.
    v = F.pad(v.to(exact), (0, 1), value=1.0)
    if causal:
        sums, last = _causal(features, seen, v, state, min(chunk, q.shape[-2]))
    else:
        memory = rearrange(seen, "... keys d -> ... d keys") @ v
        sums, last = features @ rearrange(memory, "... d e -> ... 1 d e"), None
    sums = rearrange(sums, "... g n q e -> ... (g n) q e")
    total = sums[..., -1:]
    # No key, no weight: zeros.
    outputs = (sums[..., :-1] / torch.where(total > 0, total, 1.0)).to(q.dtype)
    return outputs if state is None or last is None else (outputs, last)


def _causal(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor | Literal[0] | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """Sums within each chunk under a mask, and what all chunks before it sum up to."""
    time = q.shape[-2]
    missing = -time % chunk
    if missing:  # features of zero add nothing
        q, k, v = (F.pad(x, (0, 0, 0, missing)) for x in (q, k, v))
    q = rearrange(q, "... n (chunks i) d -> ... chunks n i d", i=chunk)
    k, v = (rearrange(x, "... (chunks j) d -> ... chunks j d", j=chunk) for x in (k, v))
    parts = rearrange(k, "... j d -> ... d j") @ v
    first = torch.zeros_like(parts[..., :1, :, :])
    if isinstance(state, Tensor):
        first = rearrange(state, "... d e -> ... 1 d e").to(parts.dtype)
    before = torch.cat([first, parts], -3).cumsum(-3)
    past = rearrange(before[..., :-1, :, :], "... d e -> ... 1 d e")
    scores = (q @ rearrange(k, "... j d -> ... 1 d j")).tril()
    sums = scores @ rearrange(v, "... j e -> ... 1 j e") + q @ past
    sums = rearrange(sums, "... chunks n i e -> ... n (chunks i) e")
    return sums[..., :time, :], before[..., -1, :, :]


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    padding: Tensor | None,
    state: Tensor | Literal[0] | None,
    chunk: int,
) -> None:
    layer = "linear_attention"
    check_positive(layer, chunk=chunk)
    if q.ndim < 3 or not q.shape[-2]:
        fail(layer, "q", "[..., heads, queries, head_width] with at least one query", q.shape)
    batch, width = q.shape[:-3], q.shape[-1]
    if k.ndim != q.ndim or k.shape[:-3] != batch or k.shape[-1] != width or not k.shape[-2]:
        expected = shape(*batch, "heads", "keys", width)
        fail(layer, "k", f"{expected} with at least one key (as q)", k.shape)
    if q.shape[-3] % k.shape[-3]:
        fail(layer, "k", f"heads that divide {q.shape[-3]} (as q)", k.shape)
    if v.shape[:-1] != k.shape[:-1]:
        fail(layer, "v", f"{shape(*k.shape[:-1], 'value_width')} (as k)", v.shape)
    if causal and q.shape[-2] != k.shape[-2]:
        fail(layer, "k", f"{q.shape[-2]} keys (as many as queries, for it is causal)", k.shape)
    if padding is not None:
        check_padding(layer, padding, (*batch, k.shape[-2]))
    if state is not None and not causal:
        raise ValueError(f"{layer}: state: expected with causal=True alone")
    if isinstance(state, Tensor):
        expected_state = (*k.shape[:-2], width, v.shape[-1] + 1)
        if state.shape != expected_state:
            fail(layer, "state", str(list(expected_state)), state.shape)
    elif state is not None and state != 0:
        raise ValueError(f"{layer}: state: expected a state or 0, got {state!r}")

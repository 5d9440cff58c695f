"""Sequence to sequence, and one to many: a recurrent decoder that goes on from a first state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Float, Int
from tensordict import TensorDict
from torch import Tensor

from funcnets import layers, random, tree
from funcnets.control import scan
from funcnets.layers.dropout import Rate
from funcnets.layers.key_value_cache import new_places
from funcnets.layers.params import check_dtype, entries
from funcnets.model import Model, bind
from funcnets.models import blocks
from funcnets.models.recurrent import (
    CELLS,
    CellName,
    Merge,
    State,
    check_sequence,
    init_layers,
    run,
)
from funcnets.taps import Taps, TapsLike
from funcnets.tree.flatten import tensordict


@dataclass(frozen=True)
class Config:
    """What the network is made of; see `seq2seq`."""

    in_features: int
    out_features: int
    steps: int = 1
    hidden_size: int = 64
    num_layers: int = 1
    cell: CellName = "gru"
    encoder: bool = True
    bidirectional: bool = False
    merge: Merge = "concat"
    tokens: bool = False
    num_embeddings: int | None = None
    sampling: float = 0.0
    dropout: float = 0.0
    unroll: bool = True

    def __post_init__(self) -> None:
        blocks.check_sizes(
            "seq2seq",
            in_features=self.in_features,
            out_features=self.out_features,
            steps=self.steps,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            **({} if self.num_embeddings is None else {"num_embeddings": self.num_embeddings}),
        )
        blocks.check_choice("seq2seq", "cell", self.cell, CELLS)
        blocks.check_choice("seq2seq", "merge", self.merge, ("concat", "add"))
        blocks.check_rate("seq2seq", "sampling", self.sampling)
        blocks.check_rate("seq2seq", "dropout", self.dropout)
        if not self.encoder and (self.bidirectional or self.num_embeddings is not None):
            raise ValueError(
                "seq2seq: encoder: expected True with bidirectional or num_embeddings, got False"
            )

    @property
    def width(self) -> int:
        """Of the decoder's state."""
        return self.hidden_size * (2 if self.bidirectional and self.merge == "concat" else 1)

    @property
    def inner(self) -> int:
        """The width of what the decoder is given at each step."""
        return self.hidden_size if self.tokens else self.out_features


def seq2seq(
    in_features: int,
    out_features: int,
    steps: int = 1,
    hidden_size: int = 64,
    num_layers: int = 1,
    *,
    cell: CellName = "gru",
    encoder: bool = True,
    bidirectional: bool = False,
    merge: Merge = "concat",
    tokens: bool = False,
    num_embeddings: int | None = None,
    sampling: float = 0.0,
    dropout: float = 0.0,
    unroll: bool = True,
) -> Model:
    """An encoder and a decoder (Sutskever et al. 2014), or with ``encoder=False`` one to many.

    ``apply(params, x, targets=None, lengths=None, *, steps=None, sampling=None, draw=False)``
    encodes x [batch, time, in_features] (``lengths`` [batch] says how long each is), and from the
    last state decodes [batch, steps, out_features]. Without an encoder x is [batch, in_features],
    and a linear map makes the first state of it.

    At each step the decoder is given the element before: that of ``targets`` where there are some
    (teacher forcing; the outputs are as many as they), and otherwise its own. Scheduled sampling
    (Bengio et al. 2015) lies between: in training, at a rate, and for each sample and step on its
    own, the decoder is given its own although there are targets.

    Elements are vectors [out_features] (targets [batch, steps, out_features]), or with ``tokens``
    integers below ``out_features`` (targets [batch, steps]), of which the outputs are the logits;
    the decoder's own is then the likeliest, or with ``draw=True`` and a key drawn.

    ``apply(params, None, targets, cache=cache)`` gives ``(outputs, cache)`` for elements that
    follow those in the cache, which begins as `seq2seq_cache`: the outputs are what comes after
    each of them. The first element of all stands for the beginning: ``start`` takes its place,
    whatever it is. With ``lengths`` [batch], only that many elements of each row are real, and go
    into the state. So ``partial(model.apply, params, None)`` is what `funcnets.generation` writes
    with.

    Parameters are ``encoder`` and ``decoder`` (named as in torch.nn; without an encoder ``state``),
    ``start`` (what the decoder is given first), ``head``, and for integers ``embedding`` and
    ``targets_embedding``. Taps are ``embedding``, ``encoder`` and ``state``, the decoder's first.

    Args:
        steps: how many outputs there are where neither targets nor the call's ``steps`` say so.
        encoder: whether x is a sequence.
        bidirectional: whether the encoder runs in both directions.
        merge: how the last states of the two directions become one: "concat" (the decoder is then
            twice as wide) or "add".
        num_embeddings: where given, x holds integers [batch, time] below it.
        sampling: the rate of scheduled sampling; the call may give another, such as a tensor that
            grows with the step of the training.
        dropout: the rate between layers, after an embedding and before the head, in training.
        unroll: whether `funcnets.compile` lays the steps out; see `funcnets.scan`.

    >>> model = seq2seq(3, 2, hidden_size=8)
    >>> params = model.init(random.key(0))
    >>> model.apply(params, torch.ones(5, 7, 3), steps=4).shape
    torch.Size([5, 4, 2])
    """
    config = Config(
        in_features,
        out_features,
        steps,
        hidden_size,
        num_layers,
        cell,
        encoder,
        bidirectional,
        merge,
        tokens,
        num_embeddings,
        sampling,
        dropout,
        unroll,
    )
    return bind("seq2seq", config, init, forward)


def seq2seq_cache(
    params: TensorDict,
    config: Config,
    x: Float[Tensor, "batch *time in_features"] | Int[Tensor, "batch time"],
    lengths: Int[Tensor, " batch"] | None = None,
) -> TensorDict:
    """The cache with which the decoder begins: the state that x leaves, and no element yet.

    ``h`` [batch, num_layers, width], for an LSTM also ``c``, and ``length`` [batch].

    Args:
        x, lengths: as `seq2seq` takes them.

    >>> from functools import partial
    >>> from funcnets.generation import greedy
    >>> model = seq2seq(3, 10, tokens=True, hidden_size=8)
    >>> params, x = model.init(random.key(0)), torch.ones(5, 7, 3)
    >>> cache, begin = seq2seq_cache(params, model.config, x), torch.zeros(5, 1, dtype=torch.int64)
    >>> written = greedy(partial(model.apply, params, None), begin, 4, cache=cache)
    >>> torch.equal(written.tokens[:, 1:], model.apply(params, x, steps=4).argmax(-1))
    True
    """
    _check(params, x, None, 1, config)
    state = _encode(params, x, lengths, config, None, Taps("seq2seq_cache", ()))
    return _cache(state, torch.zeros(len(x), dtype=torch.int64, device=x.device))


def init(key: random.Key, config: Config) -> TensorDict:
    """The parameters."""
    encoder_key, decoder_key, head_key, in_key, out_key = random.split(key, 5).unbind()
    params: dict[str, Any] = {}
    if not config.encoder:
        states = config.num_layers * (2 if config.cell == "lstm" else 1)
        params["state"] = layers.init_linear(
            encoder_key, config.in_features, states * config.hidden_size
        )
    else:
        if config.num_embeddings is not None:
            params["embedding"] = layers.init_embedding(
                in_key, config.num_embeddings, config.in_features
            )
        params["encoder"] = init_layers(
            encoder_key,
            config.cell,
            config.in_features,
            config.hidden_size,
            config.num_layers,
            bidirectional=config.bidirectional,
        )
    if config.tokens:
        params["targets_embedding"] = layers.init_embedding(
            out_key, config.out_features, config.inner
        )
    params["start"] = torch.zeros(config.inner, device=key.device)
    params["decoder"] = init_layers(
        decoder_key, config.cell, config.inner, config.width, config.num_layers
    )
    params["head"] = layers.init_linear(head_key, config.width, config.out_features)
    return TensorDict(params)


def forward(
    params: TensorDict,
    x: Float[Tensor, "batch *time in_features"] | Int[Tensor, "batch time"] | None,
    targets: Float[Tensor, "batch steps out_features"] | Int[Tensor, "batch steps"] | None = None,
    lengths: Int[Tensor, " batch"] | None = None,
    *,
    config: Config,
    cache: TensorDict | None = None,
    steps: int | None = None,
    sampling: Rate | None = None,
    draw: bool = False,
    train: bool = False,
    key: random.Key | None = None,
    taps: TapsLike = (),
) -> Any:
    """The outputs, with a cache also the new one; in training with (no) new buffers."""
    drops, tap = train and config.dropout > 0, Taps("seq2seq", taps)
    if cache is not None:
        _check_cached(params, x, targets, cache, config)
        assert targets is not None
        keys = blocks.draw_keys("seq2seq", key, drops, 1)
        result = _go_on(params, targets, lengths, cache, config, None if keys is None else keys[0])
        return tap.finish(result, {}, train)
    if x is None:
        raise ValueError("seq2seq: x: expected a tensor without a cache, got None")
    count = _check(params, x, targets, steps, config)
    rate = config.sampling if sampling is None else sampling
    samples = train and targets is not None and (isinstance(rate, Tensor) or rate > 0)
    alone = targets is None or samples
    keys = blocks.draw_keys("seq2seq", key, drops or samples or (draw and alone), 2)
    state = _encode(params, x, lengths, config, keys[0] if drops else None, tap)
    given = repeat(params["start"], "inner -> batch 1 inner", batch=x.shape[0])
    if targets is not None and not samples:
        given = torch.cat([given, _embed(params, targets[:, :-1], config)], 1)
        outputs, _ = _decode(params, given, state, config, keys[1] if drops else None)
        return tap.finish(outputs, {}, train)

    def turn(carry: tuple[Tensor, State], now: Any) -> tuple[tuple[Tensor, State], Tensor]:
        drop_key, sample_key, draw_key = None, None, None
        if "key" in now:
            drop_key, sample_key, draw_key = random.split(now["key"], 3).unbind()
        outputs, new = _decode(params, *carry, config, drop_key if drops else None)
        own = _own(outputs, draw_key if draw else None, config)
        if samples and sample_key is not None:
            shape = (len(own), *(1,) * (own.ndim - 1))
            own = torch.where(random.bernoulli(sample_key, shape, rate), own, now["target"])
        # Under autocast outputs may be of another dtype than what went in.
        new = tree.map(lambda n, o: n.to(o.dtype), (_embed(params, own, config), new), carry)
        return new, outputs

    xs = {}
    if samples and targets is not None:
        xs["target"] = rearrange(targets, "batch steps ... -> steps batch 1 ...")
    if keys is not None:
        xs["key"] = random.split(keys[1], count)
    _, outputs = scan(turn, (given, state), xs, length=count, unroll=config.unroll)
    outputs = rearrange(outputs, "steps batch 1 features -> batch steps features")
    return tap.finish(outputs, {}, train)


def _go_on(
    params: TensorDict,
    targets: Tensor,
    lengths: Tensor | None,
    cache: TensorDict,
    config: Config,
    key: random.Key | None,
) -> tuple[Tensor, TensorDict]:
    """The outputs after each of the elements that follow those in the cache, and the new one."""
    places = new_places(cache["length"], targets.shape[1])
    begins = rearrange(places == 0, "batch time -> batch time 1")
    given = torch.where(begins, params["start"], _embed(params, targets, config))
    held = {name: part for name, part in cache.items() if name != "length"}
    pattern = "batch layers width -> layers batch width"
    parts = tuple(rearrange(part, pattern).contiguous() for part in held.values())
    state = parts if config.cell == "lstm" else parts[0]
    outputs, new = _decode(params, given, state, config, key, lengths)
    # Under autocast the state may be of another dtype than what went in.
    new = tree.map(lambda n, o: n.to(o.dtype), new, state)
    return outputs, _cache(
        new, cache["length"] + (targets.shape[1] if lengths is None else lengths)
    )


def _cache(state: State, length: Tensor) -> TensorDict:
    parts = state if isinstance(state, tuple) else (state,)
    pattern = "layers batch width -> batch layers width"
    held = {name: rearrange(part, pattern) for name, part in zip("hc", parts, strict=False)}
    return tensordict({**held, "length": length})


def _encode(
    params: TensorDict,
    x: Tensor,
    lengths: Tensor | None,
    config: Config,
    key: random.Key | None,
    tap: Taps,
) -> State:
    """The first state of the decoder, each part [num_layers, batch, width]."""
    if not config.encoder:
        made = layers.linear(params["state"], x).tanh()
        pattern = "batch (parts layers width) -> parts layers batch width"
        parts = rearrange(made, pattern, layers=config.num_layers, width=config.width).unbind()
        return tap("state", parts if config.cell == "lstm" else parts[0])
    drop_key = layer_key = None
    if key is not None:
        drop_key, layer_key = random.split(key).unbind()
    if config.num_embeddings is not None:
        x = tap("embedding", layers.embedding(params["embedding"], x))
        if drop_key is not None:
            x = layers.dropout(drop_key, x, config.dropout)
    options: dict[str, Any] = {"dropout": config.dropout, "unroll": config.unroll}
    outputs, last = run(config.cell, params["encoder"], x, None, lengths, key=layer_key, **options)
    tap("encoder", outputs)
    return tap("state", tree.map(lambda part: _merge(part, config), last))


def _merge(part: Tensor, config: Config) -> Tensor:
    if not config.bidirectional:
        return part
    if config.merge == "add":
        return reduce(part, "(layers two) batch width -> layers batch width", "sum", two=2)
    return rearrange(part, "(layers two) batch width -> layers batch (two width)", two=2)


def _decode(
    params: TensorDict,
    given: Tensor,
    state: State,
    config: Config,
    key: random.Key | None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, State]:
    """Outputs [batch, time, out_features] of a decoder given [batch, time, inner]."""
    layer_key = head_key = None
    if key is not None:
        layer_key, head_key = random.split(key).unbind()
    options: dict[str, Any] = {"dropout": config.dropout, "unroll": config.unroll}
    hidden, state = run(
        config.cell, params["decoder"], given, state, lengths, key=layer_key, **options
    )
    if head_key is not None:
        hidden = layers.dropout(head_key, hidden, config.dropout)
    return layers.linear(params["head"], hidden), state


def _own(outputs: Tensor, key: random.Key | None, config: Config) -> Tensor:
    """The element that the decoder has made, [batch, 1] or [batch, 1, out_features]."""
    if not config.tokens:
        return outputs
    if key is None:
        return outputs.argmax(-1)
    return random.categorical(key, outputs.shape[:-1], outputs)


def _embed(params: TensorDict, elements: Tensor, config: Config) -> Tensor:
    """Elements as the decoder is given them, [batch, time, inner]."""
    return layers.embedding(params["targets_embedding"], elements) if config.tokens else elements


def _check(
    params: TensorDict, x: Tensor, targets: Tensor | None, steps: int | None, config: Config
) -> int:
    """Raises where shapes or dtypes do not fit; the number of outputs."""
    if config.encoder:
        weight = params["encoder", "weight_ih_l0"]
        check_sequence("seq2seq", x, weight.shape[1], config.num_embeddings)
    else:
        weight = params["state", "weight"]
        if x.ndim != 2 or x.shape[1] != weight.shape[1]:
            expected = f"[batch, {weight.shape[1]}]"
            raise ValueError(f"seq2seq: x: expected {expected}, got {list(x.shape)}")
    if config.num_embeddings is None:
        check_dtype("seq2seq", x, weight, "weight")
    if targets is None:
        count = config.steps if steps is None else steps
        if count < 1:
            raise ValueError(f"seq2seq: steps: expected at least 1, got {count}")
        return count
    _check_targets(targets, weight.dtype, config)
    if targets.shape[0] != x.shape[0]:
        raise ValueError(
            f"seq2seq: targets: expected {x.shape[0]} samples (as x), got {targets.shape[0]}"
        )
    if steps is not None and steps != targets.shape[1]:
        raise ValueError(f"seq2seq: steps: expected {targets.shape[1]} (as targets), got {steps}")
    return targets.shape[1]


def _check_targets(targets: Tensor, dtype: torch.dtype, config: Config) -> None:
    if config.tokens == targets.is_floating_point():
        kind = "integers" if config.tokens else f"{dtype}"
        raise ValueError(f"seq2seq: targets: expected {kind}, got {targets.dtype}")
    axes = () if config.tokens else (config.out_features,)
    if targets.ndim != 2 + len(axes) or targets.shape[2:] != axes or not targets.shape[1]:
        expected = ", ".join(["batch", "steps of at least 1", *map(str, axes)])
        raise ValueError(f"seq2seq: targets: expected [{expected}], got {list(targets.shape)}")


def _check_cached(
    params: TensorDict, x: Tensor | None, targets: Tensor | None, cache: TensorDict, config: Config
) -> None:
    if x is not None:
        raise ValueError("seq2seq: x: expected None with a cache, which holds what it left")
    if targets is None:
        raise ValueError("seq2seq: targets: expected some with a cache, got None")
    _check_targets(targets, params["start"].dtype, config)
    names = ("h", "c", "length") if config.cell == "lstm" else ("h", "length")
    found = entries(cache)
    if set(found) != set(names):
        raise KeyError(
            f"seq2seq: cache: expected one of seq2seq_cache, {', '.join(names)}, "
            f"got {', '.join(found)}"
        )
    for name in names:
        size = (len(targets), config.num_layers, config.width)[: 1 if name == "length" else 3]
        if found[name].shape != size:
            raise ValueError(
                f"seq2seq: cache: {name}: expected {list(size)}, got {list(found[name].shape)}"
            )

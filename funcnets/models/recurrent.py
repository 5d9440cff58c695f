"""Recurrent networks over sequences: any cell, both directions, one output or one for each time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from einops import rearrange, reduce
from jaxtyping import Float, Int
from tensordict import TensorDict
from torch import Tensor

from funcnets import layers, random
from funcnets.layers.params import check_dtype
from funcnets.model import Model, bind
from funcnets.models import blocks
from funcnets.taps import Taps, TapsLike

CellName: TypeAlias = Literal["rnn_tanh", "rnn_relu", "lstm", "gru"]
Merge: TypeAlias = Literal["concat", "add"]
Output: TypeAlias = Literal["last", "mean", "attention", "each"]
# (h, c) of an LSTM, h of the others: [num_layers * directions, batch, hidden_size].
State: TypeAlias = Any

CELLS = ("rnn_tanh", "rnn_relu", "lstm", "gru")


@dataclass(frozen=True)
class Config:
    """What the network is made of; see `recurrent`."""

    in_features: int
    out_features: int
    hidden_size: int = 64
    num_layers: int = 1
    cell: CellName = "gru"
    bidirectional: bool = False
    merge: Merge = "concat"
    output: Output = "last"
    num_embeddings: int | None = None
    dropout: float = 0.0
    orthogonal: bool = False
    forget_bias: float | None = None
    unroll: bool = True

    def __post_init__(self) -> None:
        blocks.check_sizes(
            "recurrent",
            in_features=self.in_features,
            out_features=self.out_features,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            **({} if self.num_embeddings is None else {"num_embeddings": self.num_embeddings}),
        )
        blocks.check_choice("recurrent", "cell", self.cell, CELLS)
        blocks.check_choice("recurrent", "merge", self.merge, ("concat", "add"))
        outputs = ("last", "mean", "attention", "each")
        blocks.check_choice("recurrent", "output", self.output, outputs)
        blocks.check_rate("recurrent", "dropout", self.dropout)
        if self.forget_bias is not None and self.cell != "lstm":
            raise ValueError(f"recurrent: forget_bias: expected with cell lstm, got {self.cell}")

    @property
    def width(self) -> int:
        """Of what the layers give after the directions are merged."""
        return self.hidden_size * (2 if self.bidirectional and self.merge == "concat" else 1)


def recurrent(
    in_features: int,
    out_features: int,
    hidden_size: int = 64,
    num_layers: int = 1,
    *,
    cell: CellName = "gru",
    bidirectional: bool = False,
    merge: Merge = "concat",
    output: Output = "last",
    num_embeddings: int | None = None,
    dropout: float = 0.0,
    orthogonal: bool = False,
    forget_bias: float | None = None,
    unroll: bool = True,
) -> Model:
    """A recurrent network: ``apply(params, x, lengths=None, state=None)``.

    From sequences x [batch, time, in_features] to [batch, out_features], or with output "each" to
    [batch, time, out_features]. ``lengths`` [batch] says how long each is: what lies beyond changes
    nothing. ``state`` is the first state, as `funcnets.layers.lstm` and the others take it; the tap
    "state" reads the last, so that a sequence may come in chunks:
    ``outputs, taps = apply(params, chunk, state=state, taps=["state"])``.

    Parameters are ``rnn`` (named as in torch.nn), ``head``, and where asked for ``embedding`` and
    ``pool``. Taps are ``embedding``, ``rnn`` (the merged outputs at every time), ``state`` and
    ``pool``.

    Args:
        cell: "rnn_tanh", "rnn_relu", "lstm" or "gru".
        bidirectional: whether each layer runs in both directions.
        merge: how the outputs of the two directions of the last layer become one.
        output: what the head is given: "last" the outputs at the end (for the reverse direction at
            the beginning), "mean" and "attention" a mean over time, plain or with learned weights,
            "each" the outputs at every time.
        num_embeddings: where given, inputs are integers [batch, time] below it, which an embedding
            maps to ``in_features``.
        dropout: the rate between the layers, before the head and after an embedding, in training.
        orthogonal: whether the recurrent weights begin as orthogonal matrices, one for each gate.
        forget_bias: where the bias of an LSTM's forget gate begins.
        unroll: whether `funcnets.compile` lays the steps out; see `funcnets.scan`.

    >>> import torch
    >>> model = recurrent(3, 2, hidden_size=8, num_layers=2, bidirectional=True)
    >>> params = model.init(random.key(0))
    >>> model.apply(params, torch.ones(5, 7, 3), lengths=torch.tensor([7, 3, 1, 2, 7])).shape
    torch.Size([5, 2])
    """
    config = Config(
        in_features,
        out_features,
        hidden_size,
        num_layers,
        cell,
        bidirectional,
        merge,
        output,
        num_embeddings,
        dropout,
        orthogonal,
        forget_bias,
        unroll,
    )
    return bind("recurrent", config, init, forward, check)


def init(key: random.Key, config: Config) -> TensorDict:
    """The parameters."""
    embedding_key, rnn_key, pool_key, head_key = random.split(key, 4).unbind()
    params = {}
    if config.num_embeddings is not None:
        params["embedding"] = layers.init_embedding(
            embedding_key, config.num_embeddings, config.in_features
        )
    params["rnn"] = init_layers(
        rnn_key,
        config.cell,
        config.in_features,
        config.hidden_size,
        config.num_layers,
        bidirectional=config.bidirectional,
        orthogonal=config.orthogonal,
        forget_bias=config.forget_bias,
    )
    if config.output == "attention":
        params["pool"] = layers.init_attention_pooling(pool_key, config.width)
    params["head"] = layers.init_linear(head_key, config.width, config.out_features)
    return TensorDict(params)


def check(x: Tensor, config: Config) -> None:
    """Raises unless x is a batch of sequences of the features, or of integers."""
    check_sequence("recurrent", x, config.in_features, config.num_embeddings)


def forward(
    params: TensorDict,
    x: Float[Tensor, "batch time in_features"] | Int[Tensor, "batch time"],
    lengths: Int[Tensor, " batch"] | None = None,
    state: State = None,
    *,
    config: Config,
    train: bool = False,
    key: random.Key | None = None,
    taps: TapsLike = (),
) -> Any:
    """The outputs; in training with (no) new buffers."""
    check(x, config)
    if config.num_embeddings is None:
        check_dtype("recurrent", x, params["rnn", "weight_ih_l0"], "weight")
    keys = blocks.draw_keys("recurrent", key, train and config.dropout > 0, 3)
    tap = Taps("recurrent", taps)
    if config.num_embeddings is not None:
        x = tap("embedding", layers.embedding(params["embedding"], x))
        if keys is not None:
            x = layers.dropout(keys[0], x, config.dropout)
    outputs, last = run(
        config.cell,
        params["rnn"],
        x,
        state,
        lengths,
        dropout=config.dropout,
        key=None if keys is None else keys[1],
        unroll=config.unroll,
    )
    directions = 2 if config.bidirectional else 1
    outputs = tap("rnn", _merge(outputs, config))
    last = tap("state", last)
    if config.output == "last":
        h = last[0] if config.cell == "lstm" else last
        pooled = rearrange(h[-directions:], "directions batch width -> batch (directions width)")
        pooled = _merge(pooled, config)
    elif config.output == "each":
        pooled = outputs
    else:
        pooled = _pool(params, outputs, lengths, config)
    pooled = tap("pool", pooled)
    if keys is not None:
        pooled = layers.dropout(keys[2], pooled, config.dropout)
    return tap.finish(layers.linear(params["head"], pooled), {}, train)


def init_layers(
    key: random.Key,
    cell: CellName,
    input_size: int,
    hidden_size: int,
    num_layers: int,
    *,
    bidirectional: bool = False,
    orthogonal: bool = False,
    forget_bias: float | None = None,
) -> TensorDict:
    """The parameters of recurrent layers of a kind that is named."""
    inits = {"lstm": layers.init_lstm, "gru": layers.init_gru}
    make = inits.get(cell, layers.init_rnn)
    options: dict[str, Any] = {"bidirectional": bidirectional}
    if orthogonal:
        options["recurrent_init"] = layers.initializers.orthogonal()
    if forget_bias is not None:
        options["forget_bias"] = forget_bias
    return make(key, input_size, hidden_size, num_layers, **options)


def run(
    cell: CellName, params: TensorDict, x: Tensor, state: State, lengths: Any = None, **options: Any
) -> tuple[Tensor, State]:
    """The outputs and the last state of recurrent layers of a kind that is named."""
    if cell == "lstm":
        return layers.lstm(params, x, state, lengths, **options)
    if cell == "gru":
        return layers.gru(params, x, state, lengths, **options)
    nonlinearity: Any = cell.removeprefix("rnn_")
    return layers.rnn(params, x, state, lengths, nonlinearity=nonlinearity, **options)


def check_sequence(family: str, x: Tensor, features: int, num_embeddings: int | None) -> None:
    """Raises unless x is [batch, time, features], or integers [batch, time] for an embedding."""
    if num_embeddings is not None:
        if x.is_floating_point() or x.is_complex():
            raise ValueError(f"{family}: x: expected integers, got {x.dtype}")
        if x.ndim != 2 or not x.shape[1]:
            expected = "[batch, time of at least 1]"
            raise ValueError(f"{family}: x: expected {expected}, got {list(x.shape)}")
        return
    if x.ndim != 3 or not x.shape[1] or x.shape[2] != features:
        expected = f"[batch, time of at least 1, {features}]"
        raise ValueError(f"{family}: x: expected {expected}, got {list(x.shape)}")


def _merge(outputs: Tensor, config: Config) -> Tensor:
    """Outputs [..., directions * hidden_size] to [..., width]."""
    if not config.bidirectional or config.merge == "concat":
        return outputs
    return reduce(outputs, "... (directions width) -> ... width", "sum", directions=2)


def _pool(params: TensorDict, outputs: Tensor, lengths: Tensor | None, config: Config) -> Tensor:
    padding = None
    if lengths is not None:
        steps = torch.arange(outputs.shape[1], device=outputs.device)
        padding = steps < rearrange(lengths, "batch -> batch 1")
    if config.output == "attention":
        return layers.attention_pooling(params["pool"], outputs, padding)
    if lengths is None:
        return reduce(outputs, "batch time width -> batch width", "mean")
    total = reduce(outputs, "batch time width -> batch width", "sum")  # zeros beyond the lengths
    return total / rearrange(lengths, "batch -> batch 1")

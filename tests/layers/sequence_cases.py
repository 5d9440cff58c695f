"""The layers of sequences: the strategies of their cases, as in layer_cases."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import recurrent_cases
import torch
from hypothesis import strategies as st
from layer_cases import Case, batches, no_params, sizes
from tensordict import TensorDict
from torch import Tensor

from funcnets import layers, random

yes_no = st.booleans()
keys = st.integers(0, 2**16).map(random.key)
activations = st.sampled_from(["relu", "gelu", "squared_relu", "swiglu", "geglu"])


def some(key: random.Key, *shape: int) -> Tensor:
    """More than half are true; all of a row may be false."""
    return random.bernoulli(key, shape, 0.6)


@st.composite
def scaled_dot_product(draw: Any, linear: bool = False) -> Case:
    batch, groups, shared = draw(batches), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    heads, queries, causal = groups * shared, draw(sizes), draw(yes_no)
    places = queries if linear and causal else draw(sizes)
    width, value_width, key = draw(sizes), draw(sizes), draw(keys)
    inputs = [(*batch, heads, queries, width)]
    inputs += [(*batch, groups, places, size) for size in (width, value_width)]
    options: dict[str, Any] = {"causal": causal}
    if linear:
        options["chunk"] = draw(st.integers(1, 5))
        if draw(yes_no):
            options["padding"] = some(key, *batch, places)
        return Case(
            no_params,
            lambda params, *x: layers.linear_dot_product_attention(*x, **options),
            tuple(inputs),
        )
    options["window"] = draw(st.none() | sizes)
    if draw(yes_no):
        options["mask"] = some(key, draw(st.sampled_from([1, heads])), queries, places)
    if draw(yes_no):
        options |= {"dropout": draw(st.sampled_from([0.0, 0.4, 1.0])), "key": key}
    cut = None
    if draw(yes_no):
        inputs.append((heads, queries, places))
        share = draw(st.sampled_from([0.0, 0.3]))
        cut = random.bernoulli(random.fold_in(key, 1), inputs[-1], share)

    def apply(params: TensorDict, *x: Tensor) -> Tensor:
        bias = None if cut is None else torch.where(cut, -math.inf, x[3])
        return layers.scaled_dot_product_attention(*x[:3], bias=bias, **options)

    return Case(no_params, apply, tuple(inputs))


@st.composite
def attention(draw: Any, linear: bool = False) -> Case:
    groups, shared, head_width = draw(st.integers(1, 2)), draw(st.integers(1, 2)), 2
    heads, batch, time = groups * shared, draw(st.integers(1, 2)), draw(sizes)
    causal, key = draw(yes_no), draw(keys)
    memory = None if causal else draw(st.none() | sizes)
    options: dict[str, Any] = {"heads": heads, "causal": causal}
    if draw(yes_no):
        options["padding"] = some(key, batch, memory or time)
    if linear:
        options |= {"chunk": draw(sizes)} | ({"state": 0} if causal and draw(yes_no) else {})
    else:
        options["normalize"] = draw(yes_no)
        if memory is None and draw(yes_no):
            options |= {"window": draw(sizes), "dropout": 0.4, "key": key}
        if memory is None and draw(yes_no):
            options["positions"] = layers.rotary_positions(time, head_width, dtype=torch.float64)
    width = heads * head_width
    tokens = (time,) if memory is None else (time, memory)
    return Case(
        partial(
            layers.init_attention,
            width=width,
            heads=heads,
            key_value_heads=groups,
            bias=draw(yes_no),
        ),
        partial(layers.linear_attention if linear else layers.attention, **options),
        tuple((batch, n, width) for n in tokens),
    )


@st.composite
def attention_pooling(draw: Any) -> Case:
    batch, time, width = draw(st.integers(1, 3)), draw(sizes), draw(sizes)
    padding = draw(st.none() | keys.map(lambda key: some(key, batch, time)))
    return Case(
        partial(layers.init_attention_pooling, width=width, hidden=draw(st.none() | sizes)),
        lambda params, x: layers.attention_pooling(params, x, padding),
        ((batch, time, width),),
    )


@st.composite
def feed_forward(draw: Any, mixture: bool = False) -> Case:
    width, hidden, activation = draw(sizes), draw(sizes), draw(activations)
    shared = {"activation": activation, "bias": draw(yes_no)}
    inputs = ((*draw(batches), width),)
    key = draw(keys)
    if not mixture:
        options = draw(st.sampled_from([{}, {"dropout": 0.4, "key": key}]))
        return Case(
            partial(layers.init_feed_forward, width=width, hidden=hidden, **shared),
            partial(layers.feed_forward, activation=activation, **options),
            inputs,
        )
    experts = draw(sizes)
    options = draw(st.sampled_from([{}, {"noise": 0.5, "key": key}]))
    return Case(
        partial(layers.init_mixture, width=width, hidden=hidden, experts=experts, **shared),
        partial(
            layers.mixture,
            top_k=draw(st.integers(1, experts)),
            activation=activation,
            normalize=draw(st.none() | yes_no),
            **options,
        ),
        inputs,
    )


@st.composite
def transformer_layer(draw: Any, decoder: bool) -> Case:
    heads, time, memory, batch = draw(st.integers(1, 2)), draw(sizes), draw(sizes), 2
    width, key = 4 * heads, draw(keys)
    shared = {"activation": draw(activations)}
    options: dict[str, Any] = {"heads": heads, "norm_first": draw(yes_no), "causal": draw(yes_no)}
    if draw(yes_no):
        options |= {"dropout": 0.4, "key": key}
    if draw(yes_no):
        options["memory_padding" if decoder else "padding"] = some(
            key, batch, memory if decoder else time
        )
    return Case(
        partial(
            layers.init_decoder_layer if decoder else layers.init_encoder_layer,
            width=width,
            heads=heads,
            hidden=draw(sizes),
            bias=draw(yes_no),
            **shared,
        ),
        partial(layers.decoder_layer if decoder else layers.encoder_layer, **options, **shared),
        tuple((batch, n, width) for n in ((time, memory) if decoder else (time,))),
    )


@st.composite
def recurrent(draw: Any, kind: str) -> Case:
    case = draw(recurrent_cases.cases().filter(lambda case: case.kind == kind))
    _, x, state = case.draw(random.key(0))
    states = state if isinstance(state, tuple) else (state,)

    def apply(params: TensorDict, x: Tensor, *states: Tensor) -> Any:
        state = states if kind == "lstm" or not states else states[0]
        outputs, last = case.apply(params, x, state)
        return outputs, last

    return Case(case.init, apply, tuple(tuple(each.shape) for each in (x, *states)))


CELLS = {
    "rnn_cell": (layers.init_rnn_cell, layers.rnn_cell, 1),
    "lstm_cell": (layers.init_lstm_cell, layers.lstm_cell, 2),
    "gru_cell": (layers.init_gru_cell, layers.gru_cell, 1),
}


@st.composite
def cell(draw: Any, name: str) -> Case:
    init, layer, states = CELLS[name]
    n, hidden, batch = draw(sizes), draw(sizes), draw(sizes)

    def apply(params: TensorDict, x: Tensor, *state: Tensor) -> Any:
        return layer(params, x, state if states > 1 else state[0])

    return Case(
        partial(init, input_size=n, hidden_size=hidden, bias=draw(yes_no)),
        apply,
        ((batch, n), *states * ((batch, hidden),)),
    )


@st.composite
def positions(draw: Any) -> Case:
    """All that tells a token its place, in one."""
    interleaved, causal = draw(yes_no), draw(yes_no)

    def init(key: random.Key, dtype: torch.dtype = torch.float32) -> TensorDict:
        own = {
            "bias": layers.init_relative_bias(key, 2, 8, dtype=dtype),
            "places": layers.init_learned_positions(key, 5, 8, dtype=dtype),
        }
        return TensorDict(own)

    def apply(params: TensorDict, x: Tensor) -> Tensor:
        bias = layers.relative_bias(params["bias"], 4, causal=causal)
        bias = bias + layers.alibi_bias(2, 4, dtype=x.dtype)
        x = x + layers.learned_positions(params["places"], 4)
        x = x + layers.sinusoidal(4, 8, dtype=x.dtype)
        x = x + layers.sincos_2d(2, 2, 8, dtype=x.dtype).flatten(0, 1)
        turned = layers.rotary(x, 3) * layers.rotary(x, interleaved=interleaved)
        return turned + bias.sin().sum()

    return Case(init, apply, ((draw(sizes), 4, 8),))


CASES: dict[str, st.SearchStrategy[Case]] = {
    "scaled_dot_product_attention": scaled_dot_product(),
    "linear_dot_product_attention": scaled_dot_product(linear=True),
    "attention": attention(),
    "linear_attention": attention(linear=True),
    "attention_pooling": attention_pooling(),
    "feed_forward": feed_forward(),
    "mixture": feed_forward(mixture=True),
    "encoder_layer": transformer_layer(decoder=False),
    "decoder_layer": transformer_layer(decoder=True),
    **{kind: recurrent(kind) for kind in recurrent_cases.LAYERS},
    **{name: cell(name) for name in CELLS},
    "positions": positions(),
}
WITH_PARAMS = [name for name in CASES if "dot_product" not in name]

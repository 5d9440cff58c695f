"""Small models of every family, drawn with their inputs; and options that a family refuses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from funcnets import models as library
from funcnets.model import Model
from funcnets.testing.declared import floats, integers

# The options of a constructor, and its inputs as they are declared.
Drawn = tuple[dict[str, Any], tuple[Any, ...]]
Rates = SearchStrategy[float]

SIZES, WIDTHS, DEPTHS = st.integers(1, 4), st.integers(2, 4), st.integers(1, 2)
ACTIVATIONS = st.sampled_from(["relu", "gelu_tanh", "silu", "tanh"])
FEED_FORWARDS = st.sampled_from(["relu", "gelu", "swiglu", "geglu", "squared_relu"])
POSITIONS = st.sampled_from(["learned", "sinusoidal", "rotary", "alibi", "none"])
SHARES = st.sampled_from(["none", "stacked", "all"])
CELLS = st.sampled_from(["rnn_tanh", "lstm", "gru"])
NORMS = (None, "batch", "group")
BATCH_OR_GROUP = st.sampled_from(NORMS)
# Two groups of one channel each would be zeros where the map has one place.
CHANNELS = {norm: st.sampled_from([4, 6] if norm == "group" else [2, 4]) for norm in NORMS}
STEMS = st.sampled_from(["imagenet", "small"])
POOLS = st.sampled_from([None, "max", "avg"])
MERGES = st.sampled_from(["concat", "add"])


def models(family: str | None = None, *, draws: bool = True) -> SearchStrategy[Any]:
    """Small models with their inputs: pairs ``(model, inputs)``, as `check_model` takes them.

    The inputs are a tuple of declarations, or of dicts of them where they have names; the batch is
    an axis of the name ``batch``, all others have sizes.

    Args:
        family: a module of funcnets.models; by default any.
        draws: whether there may be dropout and the like, so that training takes a key.

    Raises:
        ValueError: for an unknown family.

    >>> from hypothesis import given, settings
    >>> from funcnets import testing
    >>> @settings(max_examples=3, database=None, derandomize=True)
    ... @given(models("cnn"))
    ... def test_of_mine(drawn):
    ...     testing.check_model(*drawn, only=["repeats_itself"], examples=1)
    >>> test_of_mine()
    """
    if family is None:
        return st.sampled_from(list(FAMILIES)).flatmap(lambda name: models(name, draws=draws))
    options = _of(family)(st.sampled_from([0.0, 0.4]) if draws else st.just(0.0))
    return options.map(lambda drawn: (getattr(library, family)(**drawn[0]), drawn[1]))


@st.composite
def _invalid(draw: Any, family: str) -> tuple[dict[str, Any], str]:
    model, _ = draw(models(family))
    return draw(st.sampled_from(list(wrong_options(model))))


def invalid_options(family: str) -> SearchStrategy[tuple[dict[str, Any], str]]:
    """Options that a family refuses, for tests of errors: pairs ``(options, name)``.

    ``getattr(funcnets.models, family)(**options)`` raises a ValueError or TypeError that names the
    option, or, in a table of blocks, the entry.

    Args:
        family: a module of funcnets.models.

    Raises:
        ValueError: for an unknown family.
    """
    _of(family)
    return _invalid(family)


def wrong_options(model: Model) -> Iterator[tuple[dict[str, Any], str]]:
    """All that `invalid_options` knows for a model: its options with one made wrong, and which.

    >>> found = dict((name, options) for options, name in wrong_options(library.embedding(5, 2)))
    >>> found["padding_idx"]
    {'num_embeddings': 5, 'embedding_dim': 2, 'padding_idx': 5}
    """
    family = str(model.family)
    options = dict(vars(model.config))
    for option, value in options.items():
        for name, wrong in _spoilt(family, option, value):
            yield options | {option: wrong}, name
    for change in UNFIT.get(family, lambda options: [])(options):
        yield options | change, list(change)[-1]


def _of(family: str) -> Callable[[Rates], SearchStrategy[Drawn]]:
    if family not in FAMILIES:
        raise ValueError(f"family: expected one of {', '.join(FAMILIES)}, got {family!r}")
    return FAMILIES[family]


# Vectors.


def _list(elements: SearchStrategy[Any], least: int, most: int) -> SearchStrategy[tuple[Any, ...]]:
    return st.lists(elements, min_size=least, max_size=most).map(tuple)


def _mlp(rate: Rates) -> SearchStrategy[Drawn]:
    options = st.fixed_dictionaries(
        {
            "in_features": SIZES,
            "out_features": SIZES,
            # An RMS norm of one feature is its sign: no derivative to compare there.
            "widths": _list(WIDTHS, 0, 3),
            "activation": ACTIVATIONS,
            "norm": st.sampled_from([None, "batch", "layer", "rms"]),
            "bias": st.booleans(),
            "dropout": rate,
        }
    )
    return options.map(lambda drawn: (drawn, (floats(f"batch {drawn['in_features']}"),)))


@st.composite
def _residual_mlp(draw: Any, rate: Rates) -> Drawn:
    depth, share = draw(st.integers(0, 3)), draw(SHARES)
    kinds = st.sampled_from(["mlp", "glu"])
    options = {
        "in_features": draw(SIZES),
        "heads": draw(SIZES | st.just({"first": 2, "second": 1})),
        "width": draw(WIDTHS),
        "depth": depth,
        "expansion": draw(DEPTHS),
        "block": draw(kinds | _list(kinds, depth, depth) if share == "none" else kinds),
        "share": share,
        "activation": draw(st.sampled_from(["silu", "tanh"])),
        "dropout": draw(rate),
        "stochastic_depth": draw(rate),
    }
    return options, (floats(f"batch {options['in_features']}"),)


@st.composite
def _embedding(draw: Any, rate: Rates) -> Drawn:
    size = draw(SIZES)
    # A row that stands for nothing should not be the only one.
    padding = draw(st.sampled_from([None, 0, -1])) if size > 1 else None
    options = {"num_embeddings": size, "embedding_dim": draw(SIZES), "padding_idx": padding}
    return options, (integers("batch", size),)


# Images.


def _images(size: SearchStrategy[int], /, **options: Any) -> SearchStrategy[Drawn]:
    """Options of a network that classifies images, with square images."""
    options = {"in_channels": SIZES, "num_classes": SIZES, **options}
    drawn = st.tuples(st.fixed_dictionaries(options), size)
    return drawn.map(lambda pair: (pair[0], (_square(pair[0]["in_channels"], pair[1]),)))


def _square(channels: int, size: int) -> Any:
    return floats(f"batch {channels} height={size} width={size}")


@st.composite
def _cnn(draw: Any, rate: Rates) -> Drawn:
    norm, pool = draw(BATCH_OR_GROUP), draw(POOLS)
    widths = draw(_list(CHANNELS[norm], 1, 2))
    least, dims = 2 ** len(widths) if pool else 1, draw(st.integers(1, 3))
    space = [draw(st.integers(least, least + 2)) for _ in range(dims)]
    options = {
        "in_channels": draw(SIZES),
        "num_classes": draw(SIZES),
        "widths": widths,
        "depth": draw(DEPTHS),
        "kernel_size": draw(st.sampled_from([1, 3, 5])),
        "dims": dims,
        "activation": draw(ACTIVATIONS),
        "norm": norm,
        "groups": 2,
        "pool": pool,
        "dropout": draw(rate),
    }
    axes = [f"axis_{i}={size}" for i, size in enumerate(space)]
    return options, (floats(" ".join(["batch", str(options["in_channels"]), *axes])),)


@st.composite
def _unet(draw: Any, rate: Rates) -> Drawn:
    norm = draw(BATCH_OR_GROUP)
    widths = draw(_list(CHANNELS[norm], 2, 3))
    least = 2 ** (len(widths) - 1)
    height, width = (draw(st.integers(least, 2 * least + 1)) for _ in range(2))
    options = {
        "in_channels": draw(SIZES),
        "num_classes": draw(SIZES),
        "widths": widths,
        "convolutions": draw(DEPTHS),
        "norm": norm,
        "groups": 2,
        "upsample": draw(st.sampled_from(["transposed", "bilinear", "nearest"])),
        "activation": draw(ACTIVATIONS),
        "dropout": draw(rate),
    }
    return options, (floats(f"batch {options['in_channels']} height={height} width={width}"),)


@st.composite
def _resnet(draw: Any, rate: Rates) -> Drawn:
    bottleneck = draw(st.booleans())
    return draw(
        _images(
            st.integers(4, 8),
            block=st.just("bottleneck" if bottleneck else "basic"),
            depths=_list(DEPTHS, 1, 2),
            width=st.just(4),
            groups=st.sampled_from([1, 2]) if bottleneck else st.just(1),
            width_per_group=st.sampled_from([32, 64]) if bottleneck else st.just(64),
            stem=STEMS,
            squeeze_excitation=st.booleans(),
            stochastic_depth=rate,
        )
    )


def _densenet(rate: Rates) -> SearchStrategy[Drawn]:
    return _images(
        st.integers(5, 8),
        depths=_list(DEPTHS, 1, 2),
        growth_rate=st.integers(1, 3),
        width=WIDTHS,
        bottleneck=st.integers(1, 3),
        compression=st.sampled_from([0.4, 0.5, 1.0]),
        dropout=rate,
        stem=STEMS,
        remat=st.booleans(),
    )


def _lenet(rate: Rates) -> SearchStrategy[Drawn]:
    return st.integers(8, 10).flatmap(
        lambda size: _images(
            st.just(size),
            size=st.just(size),
            widths=_list(WIDTHS, 2, 2),
            hidden=_list(WIDTHS, 0, 2),
            kernel_size=st.just(3),
            padding=st.sampled_from([1, 2]),
            activation=st.sampled_from(["relu", "tanh"]),
            pool=st.sampled_from(["max", "avg"]),
        )
    )


def _alexnet(rate: Rates) -> SearchStrategy[Drawn]:
    widths = _list(WIDTHS, 5, 5)
    return _images(st.integers(63, 66), widths=widths, hidden=WIDTHS, dropout=rate)


def _vgg(rate: Rates) -> SearchStrategy[Drawn]:
    return _images(
        st.integers(4, 7),
        depths=_list(DEPTHS, 2, 2),
        widths=_list(WIDTHS, 2, 2),
        batch_norm=st.booleans(),
        hidden=WIDTHS,
        dropout=rate,
    )


def _mobilenet_v2(rate: Rates) -> SearchStrategy[Drawn]:
    return _images(
        st.integers(5, 8),
        width=WIDTHS,
        width_mult=st.sampled_from([0.5, 1.0, 1.5]),
        stages=_list(st.tuples(DEPTHS, WIDTHS, SIZES, DEPTHS), 1, 2),
        last_width=WIDTHS,
        round_nearest=DEPTHS,
        dropout=rate,
    )


def _mobilenet_v3(rate: Rates) -> SearchStrategy[Drawn]:
    kernel_sizes, activations = st.sampled_from([3, 5]), st.sampled_from(["relu", "hardswish"])
    row = st.tuples(kernel_sizes, WIDTHS, WIDTHS, st.booleans(), activations, DEPTHS, DEPTHS)
    rows = _list(row, 1, 3)
    return _images(st.integers(5, 8), width=WIDTHS, blocks=rows, hidden=WIDTHS, dropout=rate)


def _efficientnet(rate: Rates) -> SearchStrategy[Drawn]:
    row = st.tuples(
        st.sampled_from(["mbconv", "fused"]),
        st.sampled_from([1, 4]),
        st.sampled_from([3, 5]),
        DEPTHS,
        st.sampled_from([3, 8]),
        DEPTHS,
    )
    return _images(
        st.integers(5, 8),
        width=WIDTHS,
        stages=_list(row, 1, 2),
        last_width=st.sampled_from([None, 5]),
        dropout=rate,
        stochastic_depth=rate,
        momentum=st.sampled_from([0.1, 0.01]),
        eps=st.sampled_from([1e-5, 1e-3]),
    )


def _convnext(rate: Rates) -> SearchStrategy[Drawn]:
    return _images(
        st.integers(8, 11),
        depths=_list(DEPTHS, 2, 2),
        # Layer norms of two channels are signs: no derivative to compare there.
        widths=_list(st.integers(3, 5), 2, 2),
        layer_scale=st.sampled_from([1e-6, 0.5]),
        stochastic_depth=rate,
    )


@st.composite
def _vit(draw: Any, rate: Rates) -> Drawn:
    patch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    size = patch * draw(st.integers(1, 3))
    return draw(
        _images(
            st.just(size),
            image_size=st.just(size),
            patch_size=st.just(patch),
            depth=DEPTHS,
            heads=st.just(heads),
            width=st.integers(3, 4).map(lambda width: heads * width),
            mlp_width=st.none() | WIDTHS,
            pool=st.sampled_from(["token", "mean"]),
            representation_size=st.none() | WIDTHS,
            dropout=rate,
            attention_dropout=rate,
        )
    )


@st.composite
def _swin(draw: Any, rate: Rates) -> Drawn:
    heads, depths = draw(_list(DEPTHS, 2, 2)), draw(st.sampled_from([(1, 1), (2,), (2, 1)]))
    patch = draw(DEPTHS)
    return draw(
        _images(
            st.integers(1, 7).map(lambda patches: patch * patches),
            depths=st.just(depths),
            heads=st.just(heads[: len(depths)]),
            width=st.integers(3, 4).map(lambda width: heads[0] * width),
            patch_size=st.just(patch),
            window=WIDTHS,
            mlp_ratio=st.sampled_from([0.5, 1.0, 2.5]),
            version=st.sampled_from([1, 2]),
            dropout=rate,
            attention_dropout=rate,
            stochastic_depth=rate,
        )
    )


# Sequences.


@st.composite
def _recurrent(draw: Any, rate: Rates) -> Drawn:
    options = {
        "in_features": draw(SIZES),
        "out_features": draw(SIZES),
        "hidden_size": draw(WIDTHS),
        "num_layers": draw(DEPTHS),
        "cell": draw(CELLS),
        "bidirectional": draw(st.booleans()),
        "merge": draw(MERGES),
        "output": draw(st.sampled_from(["last", "mean", "attention", "each"])),
        "num_embeddings": draw(st.sampled_from([None, 3])),
        "dropout": draw(rate),
    }
    # In one step of time the recurrent weights have no use.
    time, features = draw(st.integers(2, 4)), options["in_features"]
    return options, (_sequence(f"time={time}", features, options["num_embeddings"]),)


@st.composite
def _seq2seq(draw: Any, rate: Rates) -> Drawn:
    encoder, tokens = draw(st.booleans()), draw(st.booleans())
    # In one step the decoder is given nothing but the start.
    features, outputs, steps = draw(SIZES), draw(WIDTHS), draw(st.integers(2, 3))
    options = {
        "in_features": features,
        "out_features": outputs,
        "steps": steps,
        "hidden_size": 3,
        "num_layers": draw(DEPTHS),
        "cell": draw(CELLS),
        "encoder": encoder,
        "bidirectional": encoder and draw(st.booleans()),
        "merge": draw(MERGES),
        "tokens": tokens,
        "num_embeddings": draw(st.sampled_from([None, 3])) if encoder else None,
        "sampling": draw(rate),
        "dropout": draw(rate),
    }
    source = floats(f"batch {features}")
    if encoder:
        source = _sequence("time=3", features, options["num_embeddings"])
    targets = (_sequence(f"steps={steps}", outputs, outputs if tokens else None),)
    return options, (source, *(targets if draw(st.booleans()) else ()))


def _sequence(time: str, features: int, high: int | None = None) -> Any:
    """Vectors over time, or where there are so many tokens, those."""
    return floats(f"batch {time} {features}") if high is None else integers(f"batch {time}", high)


def _blocks(draw: Any, rate: Rates, heads: int, vocabulary: int, time: int) -> dict[str, Any]:
    """What gpt and bert have in common."""
    return {
        "vocabulary": vocabulary,
        "context": time + 1,
        "width": heads * draw(st.sampled_from([2, 4])),
        "depth": draw(st.integers(1, 3)),
        "heads": heads,
        "positions": draw(POSITIONS),
        "norm": draw(st.sampled_from(["layer", "rms"])),
        "activation": draw(FEED_FORWARDS),
        "share": draw(SHARES),
        "dropout": draw(rate),
        "init_std": 0.2,
    }


@st.composite
def _gpt(draw: Any, rate: Rates) -> Drawn:
    heads, groups = draw(st.sampled_from([(1, None), (2, None), (2, 1), (4, 2)]))
    vocabulary, time = draw(SIZES), draw(st.integers(1, 5))
    options = _blocks(draw, rate, heads, vocabulary, time) | {
        "key_value_heads": groups,
        "hidden": draw(st.sampled_from([None, 3])),
        "normalize": draw(st.booleans()),
        "window": draw(st.sampled_from([None, 2])),
        "bias": draw(st.booleans()),
        "tied": draw(st.booleans()),
        "soft_cap": draw(st.sampled_from([None, 3.0])),
    }
    return options, (integers(f"batch time={time}", vocabulary),)


@st.composite
def _bert(draw: Any, rate: Rates) -> Drawn:
    heads, vocabulary, time = draw(DEPTHS), draw(SIZES), draw(st.integers(1, 5))
    options = _blocks(draw, rate, heads, vocabulary, time) | {
        "norm_first": draw(st.booleans()),
        "head": draw(st.booleans()),
    }
    return options, (integers(f"batch time={time}", vocabulary),)


@st.composite
def _transformer(draw: Any, rate: Rates) -> Drawn:
    heads, vocabulary = draw(DEPTHS), draw(st.sampled_from([None, 5]))
    encoder, decoder = draw(st.sampled_from([(1, 1), (2, 1), (0, 2), (2, 0)]))
    whole = vocabulary is not None and encoder and decoder
    target = draw(st.sampled_from([None, 3])) if whole else None
    options = {
        "vocabulary": vocabulary,
        "target_vocabulary": target,
        "context": 5,
        "width": heads * draw(st.sampled_from([2, 4])),
        "heads": heads,
        "encoder_depth": encoder,
        "decoder_depth": decoder,
        "hidden": draw(st.sampled_from([None, 3])),
        "positions": draw(st.sampled_from(["learned", "sinusoidal", "none"])),
        "norm_first": draw(st.booleans()),
        "activation": draw(st.sampled_from(["relu", "gelu"])),
        "bias": draw(st.booleans()),
        "tied": draw(st.booleans()),
        "share": draw(SHARES),
        "dropout": draw(rate),
    }
    times, width = st.integers(1, 5), options["width"]
    # A decoder alone reads what an encoder elsewhere has made of its inputs.
    inputs = [_sequence(f"source={draw(times)}", width, vocabulary if encoder else None)]
    if decoder:
        inputs.append(_sequence(f"target={draw(times)}", width, target or vocabulary))
    return options, tuple(inputs)


# Networks of networks.


@st.composite
def _siamese(draw: Any, rate: Rates) -> Drawn:
    family = draw(st.sampled_from(["mlp", "cnn"]))
    options, inputs = draw(FAMILIES[family](rate))
    encoder = getattr(library, family)(**options)
    return {"encoder": encoder, "normalize": draw(st.booleans())}, inputs


@st.composite
def _gated(draw: Any, rate: Rates) -> Drawn:
    size, m, dropout = draw(WIDTHS), draw(SIZES), draw(rate)
    norm, gates = draw(st.sampled_from([None, "batch"])), ["straight_through", "gumbel"]
    options = {
        "base": library.mlp(3, size, (2,), norm=norm, dropout=dropout),
        "shallow": library.mlp(size, m, ()),
        "deep": library.mlp(size, m, (3, 2), norm=norm),
        # The second draws.
        "gate": gates[dropout > 0],
    }
    return options, (floats("batch 3"),)


@st.composite
def _early_exit(draw: Any, rate: Rates) -> Drawn:
    sizes = draw(_list(st.integers(2, 3), 2, 4))
    norm, dropout = draw(st.sampled_from([None, "batch"])), draw(rate)
    options = {
        "stages": tuple(
            library.mlp(n, m, (2,), norm=norm, dropout=dropout) for n, m in pairwise(sizes)
        ),
        "exits": tuple(library.mlp(m, 3, ()) for m in sizes[1:]),
        "threshold": draw(st.sampled_from([0.0, 0.4, 0.6, 1.0])),
    }
    return options, (floats(f"batch {sizes[0]}"),)


@st.composite
def _multimodal(draw: Any, rate: Rates) -> Drawn:
    fusion = draw(st.sampled_from(["concat", "sum", "gated", "attention"]))
    size, dropout = draw(st.sampled_from([2, 4])), draw(rate)
    known: dict[str, tuple[Model, Any]] = {
        "mlp": (library.mlp(3, size, (4,), dropout=dropout), floats("batch 3")),
        "mlp_batch": (library.mlp(2, size, (4,), norm="batch"), floats("batch 2")),
        "cnn": (library.cnn(1, size, (2,), activation="tanh"), floats("batch 1 height=5 width=4")),
        "embedding": (library.embedding(4, size), integers("batch", 4)),
    }
    # Attention to one part has nothing to choose.
    kinds = draw(_list(st.sampled_from(list(known)), 1 + (fusion == "attention"), 3))
    encoders: dict[str, Model | str] = {f"{n}{i}": known[n][0] for i, n in enumerate(kinds)}
    inputs = {f"{kind}{i}": known[kind][1] for i, kind in enumerate(kinds)}
    if draw(st.booleans()):
        again = draw(st.sampled_from(list(encoders)))
        encoders["again"], inputs["again"] = again, inputs[again]
    fused = size * (len(encoders) if fusion == "concat" else 1)
    heads: dict[str, Model | int] = {"linear": draw(SIZES)}
    if draw(st.booleans()):
        heads["mlp"] = library.mlp(fused, draw(SIZES), (4,), norm="batch")
    options = {
        "encoders": encoders,
        "heads": heads,
        "fusion": fusion,
        "attention_heads": draw(DEPTHS),
        "activation": draw(st.sampled_from(["identity", "tanh", "relu"])),
    }
    return options, (inputs,)


FAMILIES: dict[str, Callable[[Rates], SearchStrategy[Drawn]]] = {
    "mlp": _mlp,
    "residual_mlp": _residual_mlp,
    "embedding": _embedding,
    "cnn": _cnn,
    "unet": _unet,
    "lenet": _lenet,
    "alexnet": _alexnet,
    "vgg": _vgg,
    "resnet": _resnet,
    "densenet": _densenet,
    "mobilenet_v2": _mobilenet_v2,
    "mobilenet_v3": _mobilenet_v3,
    "efficientnet": _efficientnet,
    "convnext": _convnext,
    "vit": _vit,
    "swin": _swin,
    "recurrent": _recurrent,
    "seq2seq": _seq2seq,
    "gpt": _gpt,
    "bert": _bert,
    "transformer": _transformer,
    "siamese": _siamese,
    "gated": _gated,
    "early_exit": _early_exit,
    "multimodal": _multimodal,
}

# What is wrong for an option, or for each number in it, by its name; tables of blocks as well.

SIZE, COUNT, RATE, SCALE, CHOICE, KIND = (
    (0, -1, 2.5),
    (-1, 2.5),  # may be none
    (-0.1, 1.5, math.nan),
    (0.0, -1.0, math.nan),
    ("unheard of",),
    (3,),  # no model and no row of a table
)
WRONG: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("in_features", "out_features", "in_channels", "num_classes"), SIZE),
    **dict.fromkeys(("widths", "width", "hidden", "last_width", "mlp_width", "hidden_size"), SIZE),
    **dict.fromkeys(("depths", "num_layers", "steps", "convolutions", "inner"), SIZE),
    **dict.fromkeys(("kernel_size", "stride", "dilation", "groups", "width_per_group"), SIZE),
    **dict.fromkeys(("size", "image_size", "patch_size", "window", "representation_size"), SIZE),
    **dict.fromkeys(("vocabulary", "target_vocabulary", "num_embeddings", "context"), SIZE),
    **dict.fromkeys(("embedding_dim", "growth_rate", "bottleneck", "round_nearest"), SIZE),
    **dict.fromkeys(("key_value_heads", "attention_heads"), SIZE),
    **dict.fromkeys(("depth", "encoder_depth", "decoder_depth", "segments", "padding"), COUNT),
    **dict.fromkeys(("dropout", "attention_dropout", "stochastic_depth", "sampling"), RATE),
    **dict.fromkeys(("compression", "momentum", "threshold"), RATE),
    **dict.fromkeys(("layer_scale", "width_mult", "mlp_ratio", "eps", "temperature"), SCALE),
    **dict.fromkeys(("rotary_base", "init_std", "soft_cap"), SCALE),
    **dict.fromkeys(("activation", "norm", "pool", "stem", "block", "upsample", "cell"), CHOICE),
    **dict.fromkeys(("merge", "output", "positions", "share", "fusion", "gate"), CHOICE),
    **dict.fromkeys(("encoder", "base", "shallow", "deep", "encoders"), KIND),
    **dict.fromkeys(("stages", "exits", "blocks"), KIND),
    "heads": SIZE,
    "expansion": (0, -1),
    "dims": (0, 4),
    "version": (0, 3),
}
# Lists that may be empty.
EMPTY = {("mlp", "widths"), ("lenet", "hidden")}


def _spoilt(family: str, name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Wrong values of an option, each with the name of what is wrong in it."""
    if isinstance(value, bool):
        return
    if not isinstance(value, tuple):
        yield from ((name, wrong) for wrong in WRONG.get(name, ()))
        return
    if not value:
        yield from ((name, (wrong,)) for wrong in WRONG.get(name, ()))
    elif (family, name) not in EMPTY:
        yield name, ()
    for i, part in enumerate(value):
        found: list[tuple[str, Any]] = [(name, wrong) for wrong in WRONG.get(name, ())]
        if hasattr(part, "_fields"):  # a row of a table
            for field, old in part._asdict().items():
                spoilt = _spoilt(family, field, old)
                found += [(entry, part._replace(**{field: wrong})) for entry, wrong in spoilt]
        elif isinstance(part, tuple):  # a name and what it stands for
            found = [(name, (part[0], wrong)) for _, wrong in found]
        yield from ((entry, (*value[:i], wrong, *value[i + 1 :])) for entry, wrong in found)


def _divisors(options: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"heads": options["width"] + 1}]


def _groups(options: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"norm": "group", "groups": max(options["widths"]) + 1}]


def _stages(options: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"depths": (*options["depths"], 1)}]


# Options each of which would be right with others, by family: the last is the one to blame.
UNFIT: dict[str, Callable[[dict[str, Any]], list[dict[str, Any]]]] = {
    "embedding": lambda o: [{"padding_idx": o["num_embeddings"]}],
    "residual_mlp": lambda o: [{"share": "none", "block": ("mlp",) * (o["depth"] + 1)}],
    "cnn": lambda o: [*_groups(o), {"kernel_size": 2}],
    "unet": lambda o: [*_groups(o), {"widths": (4,)}],
    "lenet": lambda o: [{"size": 1}],
    "alexnet": lambda o: [{"widths": o["widths"][1:]}],
    "vgg": _stages,
    "convnext": _stages,
    "resnet": lambda o: [{"width_per_group": 1}, {"block": "basic", "groups": 2}],
    "densenet": lambda o: [{"depths": (1, 1), "compression": 0.01}],
    "vit": lambda o: [*_divisors(o), {"patch_size": o["image_size"] + 1}],
    "swin": lambda o: [
        *_stages(o),
        {"heads": (o["width"] + 1, *o["heads"][1:])},
        {"version": 2, "window": 1},
    ],
    "gpt": lambda o: [*_divisors(o), {"key_value_heads": o["heads"] + 1}],
    "bert": _divisors,
    "transformer": lambda o: [
        *_divisors(o),
        {"vocabulary": None, "target_vocabulary": 3},
        {"encoder_depth": 0, "decoder_depth": 0},
    ],
    "recurrent": lambda o: [{"cell": "gru", "forget_bias": 1.0}],
    "seq2seq": lambda o: [{"bidirectional": True, "encoder": False}],
    "early_exit": lambda o: [{"exits": o["exits"][1:]}],
    "multimodal": lambda o: [
        {"encoders": (*o["encoders"], ("more", "nowhere"))},
        {"fusion": "attention", "attention_heads": 5},
    ],
}

"""What is particular to recurrent networks: lengths, states that are handed on, pooling."""

import dataclasses
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import DTYPE, NoArithmetic, recurrents
from torch.func import grad, jvp

from funcnets import compile, models, random, tree

KEY = random.key(5)
OUTPUTS = ["last", "mean", "attention", "each"]


def close(actual, expected, tolerance=1e-10):
    tree.map(
        lambda a, b: torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance),
        actual,
        expected,
    )


def made(**options):
    model = models.recurrent(3, 2, 4, **options)
    return model, tree.map(lambda leaf: 2 * leaf, tree.cast(model.init(KEY), DTYPE))


@settings(max_examples=15)
@given(case=recurrents(), seed=st.integers(0, 99))
def test_a_sequence_in_a_batch_is_what_it_would_be_alone(case, seed):
    key, lengths, sizes = random.key(seed), torch.tensor([2, 4, 1]), case.shapes[0]
    params = case.params(key)
    case = dataclasses.replace(
        case, shapes=(sizes._replace(shape=(3, 4)) if hasattr(sizes, "high") else (3, 4, sizes[2]),)
    )
    (x,) = case.inputs(key)
    outputs = case.model.apply(params, x, lengths)
    for i, length in enumerate(lengths.tolist()):
        alone = case.model.apply(params, x[i : i + 1, :length])[0]
        own = outputs[i, :length] if case.model.config.output == "each" else outputs[i]
        close(own, alone)


@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "lstm", "gru"])
def test_a_stream_in_chunks(cell):
    model, params = made(cell=cell, num_layers=2, output="each")
    x = random.normal(KEY, (5, 7, 3), dtype=DTYPE)
    whole, state, outputs = model.apply(params, x), None, []
    for chunk in x.split([3, 1, 3], 1):
        y, taps = model.apply(params, chunk, state=state, taps=["state"])
        outputs.append(y)
        state = taps["state"]
    close(torch.cat(outputs, 1), whole)
    # In training too; and cut between the chunks, no gradient comes through.
    (_, taps), _ = model.apply(params, x, state=state, train=True, taps=["state"])
    close(taps["state"], model.apply(params, x, state=state, taps=["state"])[1]["state"])

    def loss(x, cut):
        _, taps = model.apply(params, x[:, :3], taps=["state"])
        first = tree.map(torch.detach, taps["state"]) if cut else taps["state"]
        return model.apply(params, x[:, 3:], state=first).sum()

    assert (grad(loss)(x, True)[:, :3] == 0).all()
    assert (grad(loss)(x, False)[:, :3] != 0).all()


def test_options_of_the_parameters():
    params = models.recurrent(3, 2, 4, cell="lstm", orthogonal=True, forget_bias=1.0).init(KEY)
    blocks = params["rnn", "weight_hh_l0"].reshape(4, 4, 4)
    close(blocks @ blocks.mT, torch.eye(4).expand(4, 4, 4), 1e-5)
    assert ((params["rnn", "bias_ih_l0"] + params["rnn", "bias_hh_l0"])[4:8] == 1).all()
    with pytest.raises(ValueError, match="forget_bias: expected with cell lstm, got gru"):
        models.recurrent(3, 2, forget_bias=1.0)


@pytest.mark.parametrize("output", OUTPUTS)
def test_hessian_vector_product(output):
    model, params = made(cell="lstm", bidirectional=True, merge="add", output=output)
    x, lengths = random.normal(KEY, (3, 4, 3), dtype=DTYPE), torch.tensor([4, 1, 2])

    def loss(params):
        return model.apply(params, x, lengths).square().sum()

    direction = tree.map(torch.sin, params)
    _, product = jvp(grad(loss), (params,), (direction,))
    step = 1e-5
    ahead, behind = (
        grad(loss)(tree.map(lambda p, d, s=s: p + s * d, params, direction)) for s in (step, -step)
    )
    close(product, tree.map(lambda a, b: (a - b) / (2 * step), ahead, behind), 1e-6)


def test_rolled_and_compiled():
    model, params = made(output="attention", unroll=False)
    x, lengths = random.normal(KEY, (3, 5, 3), dtype=DTYPE), torch.tensor([4, 5, 2])
    step = grad(lambda params, x, lengths: model.apply(params, x, lengths).square().sum())
    close(compile(step, backend="aot_eager")(params, x, lengths), step(params, x, lengths))


def test_taps():
    model, params = made(bidirectional=True, output="mean", num_embeddings=4)
    indices = torch.tensor([[1, 2, 3], [0, 0, 1]])
    _, taps = model.apply(params, indices, taps=["embedding", "rnn", "state", "pool"])
    shapes = {name: tuple(value.shape) for name, value in taps.items()}
    assert shapes == {"embedding": (2, 3, 3), "rnn": (2, 3, 8), "state": (2, 2, 4), "pool": (2, 8)}
    close(taps["pool"], taps["rnn"].mean(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cell": "elman"}, "cell: expected one of 'rnn_tanh', 'rnn_relu', 'lstm', 'gru', got 'e"),
        ({"merge": "max"}, "merge: expected one of 'concat', 'add', got 'max'"),
        ({"output": "all"}, "output: expected one of 'last', 'mean', 'attention', 'each', got"),
        ({"hidden_size": 0}, "hidden_size: expected a positive integer, got 0"),
        ({"num_embeddings": 0}, "num_embeddings: expected a positive integer, got 0"),
        ({"dropout": 1.5}, "dropout: expected a rate between 0 and 1, got 1.5"),
    ],
)
def test_a_config_that_makes_no_sense(options, message, unchecked):
    with pytest.raises(ValueError, match=re.escape(message)):
        models.recurrent(3, 2, **options)


def test_inputs_of_a_wrong_shape(unchecked):
    model, params = made()
    for shape in ([5, 3], [5, 0, 3], [5, 4, 2]):
        x = torch.ones(shape, dtype=DTYPE)
        message = re.escape(f"recurrent: x: expected [batch, time of at least 1, 3], got {shape}")
        with pytest.raises(ValueError, match=message), NoArithmetic():
            model.apply(params, x)
    x = torch.ones(5, 4, 3, dtype=DTYPE)
    with pytest.raises(ValueError, match=r"gru: state: expected \[1, 5, 4\], got \[1, 4, 4\]"):
        model.apply(params, x, state=torch.ones(1, 4, 4, dtype=DTYPE))
    with pytest.raises(ValueError, match="gru: lengths: expected 1 to 4, got 5"):
        model.apply(params, x, torch.tensor([1, 2, 3, 4, 5]))
    model, params = made(num_embeddings=4)
    with pytest.raises(ValueError, match="x: expected integers, got"):
        model.apply(params, x)
    with pytest.raises(ValueError, match=r"x: expected \[batch, time of at least 1\], got \[5\]"):
        model.apply(params, torch.ones(5, dtype=torch.int64))

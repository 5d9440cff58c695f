import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, jvp

from funcnets import layers, random

KEY = random.key(0)


@given(n=st.integers(1, 6), data=st.data())
def test_the_padding_row_is_zero_and_stays_so(n, data):
    padding = data.draw(st.integers(-n, n - 1))
    params = layers.init_embedding(KEY, n, 3, padding_idx=padding)
    assert (params["weight"] == 0).all(1).nonzero().flatten().tolist() == [padding % n]
    indices = torch.arange(n).repeat(2)

    for loss in (
        lambda params: (layers.embedding(params, indices, padding_idx=padding) + 1).square().sum(),
        lambda params: (
            (layers.embedding_bag(params, indices[:, None], padding_idx=padding) + 1).square().sum()
        ),
    ):
        gradient = grad(loss)(params)["weight"]
        assert (gradient == 0).all(1).nonzero().flatten().tolist() == [padding % n]
        only_padding = params.apply(lambda weight: (weight == 0).float())
        assert jvp(loss, (params,), (only_padding,))[1] == 0


def test_tied_projection_adds_its_gradient():
    params = layers.init_embedding(KEY, 5, 3, dtype=torch.float64)
    indices = torch.tensor([1, 4])

    def loss(first, second):
        return layers.unembed(second, layers.embedding(first, indices)).logsumexp(-1).sum()

    tied = grad(lambda params: loss(params, params))(params)["weight"]
    first, second = grad(lambda pair: loss(*pair))((params, params))
    torch.testing.assert_close(tied, first["weight"] + second["weight"])
    assert (first["weight"] != 0).any()
    assert (second["weight"] != 0).all()


def test_max_over_a_bag_shares_the_gradient_once():
    params = layers.init_embedding(KEY, 3, 2)
    indices = torch.tensor([1, 1, 1])

    def loss(params, *arguments):
        return layers.embedding_bag(params, *arguments, mode="max").sum()

    expected = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    for arguments in ((indices[None],), (indices, torch.tensor([0]))):
        gradient = grad(loss)(params, *arguments)["weight"]
        torch.testing.assert_close(gradient, expected)


def test_no_indices_give_zeros():
    params = layers.init_embedding(KEY, 3, 2)
    empty = torch.zeros(0, dtype=torch.int64)
    for mode in ("sum", "mean", "max"):
        bags = layers.embedding_bag(params, empty, torch.tensor([0, 0]), mode=mode)
        assert torch.equal(bags, torch.zeros(2, 2))


def test_errors():
    params = layers.init_embedding(KEY, 3, 2)
    index = torch.tensor([0])
    with pytest.raises(ValueError, match="padding_idx: expected an index of 3 rows, got 3"):
        layers.init_embedding(KEY, 3, 2, padding_idx=3)
    with pytest.raises(ValueError, match="padding_idx: expected an index of 3 rows, got -4"):
        layers.embedding(params, index, padding_idx=-4)
    with pytest.raises(ValueError, match="offsets: expected with indices"):
        layers.embedding_bag(params, index)
    with pytest.raises(ValueError, match="offsets: expected with indices"):
        layers.embedding_bag(params, index[None], index)
    with pytest.raises(ValueError, match="per_sample_weights: expected with mode sum, got mean"):
        layers.embedding_bag(params, index, index, per_sample_weights=torch.ones(1))
    with pytest.raises(ValueError, match=r"unembed: x: expected \[\.\.\., 2\], got \[3\]"):
        layers.unembed(params, torch.zeros(3))
    with pytest.raises(ValueError, match="num_embeddings: expected at least 1, got 0"):
        layers.init_embedding(KEY, 0, 2)

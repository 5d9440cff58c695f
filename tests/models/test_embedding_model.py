"""What is the embedding's own as a model: its errors and its padding."""

from __future__ import annotations

import re

import pytest
import torch
from model_cases import NoArithmetic
from torch.func import grad

from funcnets import random
from funcnets.models import embedding
from funcnets.models.embedding import Config

KEY = random.key(3)


def test_rows():
    model = embedding(5, 3)
    params = model.init(KEY)
    indices = torch.tensor([[4, 0], [1, 4]])
    torch.testing.assert_close(model.apply(params, indices), params["weight"][indices])
    outputs, buffers = model.apply(params, indices, train=True)
    torch.testing.assert_close(outputs, params["weight"][indices])
    assert buffers.is_empty()
    assert model.config == Config(5, 3, None)


@pytest.mark.parametrize("padding_idx", [0, -1])
def test_padding_begins_and_stays_zero(padding_idx):
    model = embedding(5, 3, padding_idx=padding_idx)
    params = model.init(KEY)
    assert not params["weight"][padding_idx].any()
    gradient = grad(lambda p: (model.apply(p, torch.arange(5)) + 1).square().sum())(params)
    touched = gradient["weight"].any(-1)
    assert touched.sum() == 4
    assert not touched[padding_idx]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_embeddings": 0}, "num_embeddings: expected a positive integer, got 0"),
        ({"embedding_dim": -1}, "embedding_dim: expected a positive integer, got -1"),
        ({"padding_idx": 5}, "padding_idx: expected an index of 5 rows, got 5"),
        ({"padding_idx": -6}, "padding_idx: expected an index of 5 rows, got -6"),
    ],
)
def test_configs_that_cannot_be(change, message):
    for make in (embedding, Config):
        with pytest.raises(ValueError, match=re.escape(f"embedding: {message}")):
            make(**{"num_embeddings": 5, "embedding_dim": 3} | change)


def test_inputs_that_are_no_integers(unchecked):
    model = embedding(5, 3)
    params, x = model.init(KEY), torch.ones(2)
    message = r"embedding: x: expected integers, got torch.float32"
    with pytest.raises(ValueError, match=message), NoArithmetic():
        model.apply(params, x)

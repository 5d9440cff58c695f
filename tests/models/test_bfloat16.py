"""Sequence models in bfloat16: the numbers of float32, as far as bfloat16 has them."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, vmap

import funcnets
from funcnets import models, random, tree

KEY = random.key(12)
TOKENS = random.randint(KEY, (3, 6), 0, 7)
VECTORS = random.normal(KEY, (3, 6, 4))
SMALL = {"width": 16, "heads": 2}
TEXT = SMALL | {"vocabulary": 7, "context": 8, "depth": 2, "init_std": 0.2}
MODELS = {
    "gpt": (models.gpt(**TEXT, positions="rotary", norm="rms", normalize=True), TOKENS),
    "gpt, alibi": (models.gpt(**TEXT, positions="alibi", activation="swiglu"), TOKENS),
    "gpt, stacked": (models.gpt(**TEXT, share="stacked", window=2, soft_cap=5.0), TOKENS),
    "bert": (models.bert(**TEXT, positions="sinusoidal"), TOKENS),
    "vit": (models.vit(8, 4, 2, 2, 16, 5), random.normal(KEY, (3, 3, 8, 8))),
    "transformer": (
        # No ReLU: rounding may turn one off, and a gradient with it.
        models.transformer(7, **SMALL, encoder_depth=1, decoder_depth=1, activation="gelu"),
        TOKENS,
        TOKENS,
    ),
    "rnn_tanh": (models.recurrent(4, 5, 8, cell="rnn_tanh", bidirectional=True), VECTORS),
    "gru": (models.recurrent(4, 5, 8, cell="gru", num_layers=2), VECTORS),
    "lstm": (models.recurrent(4, 5, 8, cell="lstm", output="each"), VECTORS),
    "seq2seq": (models.seq2seq(4, 5, hidden_size=8, cell="lstm"), VECTORS),
}


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients(name):
    model, *inputs = MODELS[name]
    # No zeros, as the head of a ViT begins with.
    half = tree.map(lambda leaf: leaf + 0.1 * random.normal(KEY, leaf.shape), model.init(KEY))
    half = tree.cast(half, torch.bfloat16)
    halves = tree.map(lambda x: x.bfloat16() if x.is_floating_point() else x, tuple(inputs))

    def both(f):
        whole = tree.cast((half, halves), torch.float32)
        return f(half, *halves), f(*whole[:1], *whole[1])

    def close(found, expected):
        assert found.dtype == torch.bfloat16
        scale = expected.abs().max().clamp(min=1e-3)
        assert (found.float() - expected).abs().max() <= 0.05 * scale

    def loss(params, *inputs):
        return model.apply(params, *inputs).float().square().mean()

    close(*both(model.apply))
    for slope in (grad(loss), funcnets.grad(loss)):
        tree.map(close, *both(slope))
    each = vmap(grad(lambda p, *xs: loss(p, *(x[None] for x in xs))), (None, *(0 for _ in inputs)))
    tree.map(close, *both(each))


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary", "alibi"])
def test_places_far_from_the_ends_of_a_cache(positions):
    model = models.gpt(7, 4000, 16, 1, 4, positions=positions, init_std=0.3)
    half = tree.cast(model.init(KEY), torch.bfloat16)
    tokens = random.randint(KEY, (1, 40), 0, 7)
    expected = model.apply(tree.cast(half, torch.float32), tokens)
    cache, parts = models.gpt_cache(half, model.config, 1), []
    for part in tokens.split(20, 1):
        found, cache = model.apply(half, part, cache=cache)
        parts.append(found.float())
    assert (torch.cat(parts, 1) - expected).abs().max() <= 0.05 * expected.abs().max()

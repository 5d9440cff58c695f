"""Sharing: one subtree read several times, and its gradient, the sum over the uses."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from model_cases import DTYPE, NoArithmetic, cnn, cnns, mlp, mlps
from tensordict import TensorDict
from torch import nn
from torch.func import grad, vmap

from funcnets import Model, compile, layers, load, losses, models, random, save, tree

KEY = random.key(5)
SEEDS = st.integers(0, 2**16)


def close(actual, expected, tolerance=1e-10):
    tree.map(
        lambda a, b: torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance),
        actual,
        expected,
    )


def inputs_of(case, key, num):
    return [case.inputs(k)[0] for k in random.split(key, num).unbind()]


def flat(embeddings):
    return [e.reshape(-1, e.shape[-1]) for e in embeddings]


def contrastive(embeddings):
    first, *rest = flat(embeddings)
    similar = torch.arange(len(first)) % 2
    return sum((losses.contrastive(first, other, similar) for other in rest), first.square().sum())


def triplet(embeddings):
    first, *rest = flat(embeddings)
    negative = first.roll(1, 0) + 1
    return sum(
        (losses.triplet_margin(first, other, negative) for other in rest), first.square().sum()
    )


def info_nce(embeddings):
    first, *rest = flat(embeddings)
    # Of more than one feature: the direction of one is its sign, which has no derivative.
    wide = F.pad(first, (0, 1), value=1.0)
    return sum(
        (losses.info_nce(wide, F.pad(other, (0, 1), value=1.0)) for other in rest), first.sum()
    )


def prototypical(embeddings):
    support = torch.cat(flat(embeddings))
    labels = torch.arange(len(support)) % 2
    return losses.prototypical(support, labels, support.flip(0), labels, 2)


LOSSES = {f.__name__: f for f in (contrastive, triplet, info_nce, prototypical)}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@given(case=st.one_of(mlps(), cnns()), uses=st.integers(1, 4), seed=SEEDS)
def test_the_gradient_of_a_shared_subtree_is_the_sum_over_its_uses(loss, case, uses, seed):
    key = random.key(seed)
    encoder = case.params(random.fold_in(key, 0))
    inputs = inputs_of(case, random.fold_in(key, 1), uses)
    model = models.siamese(case.model)

    def shared(params):
        found = model.apply(params, *inputs)
        return loss([found] if uses == 1 else list(found))

    def unshared(copies):
        pairs = zip(copies.values(), inputs, strict=True)
        return loss([case.model.apply(copy, x) for copy, x in pairs])

    gradient = grad(shared)(TensorDict({"encoder": encoder}))["encoder"]
    copies = grad(unshared)({str(i): encoder for i in range(uses)})
    total = tree.map(lambda *leaves: sum(leaves), *copies.values())
    close(gradient, total)


@given(depth=st.integers(1, 4), seed=SEEDS)
def test_one_block_at_every_depth(depth, seed):
    """A layer applied to what it gave, as in a recurrent network or a universal transformer."""
    key = random.key(seed)
    block = layers.init_linear(random.fold_in(key, 0), 3, 3, dtype=DTYPE)
    x = random.normal(random.fold_in(key, 1), (2, 3), dtype=DTYPE)

    def through(blocks):
        h = x
        for params in blocks:
            h = h + torch.tanh(layers.linear(params, h))
        return h.square().sum()

    gradient = grad(lambda params: through([params] * depth))(block)
    copies = grad(lambda copies: through(list(copies.values())))(
        {str(i): block for i in range(depth)}
    )
    close(gradient, tree.map(lambda *leaves: sum(leaves), *copies.values()))


@given(vocabulary=st.integers(2, 5), width=st.integers(1, 4), seed=SEEDS)
def test_tied_embeddings(vocabulary, width, seed):
    """The table that reads the tokens is the projection that predicts them."""
    key = random.key(seed)
    table = layers.init_embedding(random.fold_in(key, 0), vocabulary, width, dtype=DTYPE)
    tokens = random.randint(random.fold_in(key, 1), (2, 4), 0, vocabulary)
    targets = random.randint(random.fold_in(key, 2), (8,), 0, vocabulary)

    def loss(inner, outer):
        hidden = torch.tanh(layers.embedding(inner, tokens))
        return F.cross_entropy(layers.unembed(outer, hidden).flatten(0, 1), targets)

    gradient = grad(lambda params: loss(params, params))(table)
    parts = grad(loss, argnums=(0, 1))(table, table)
    close(gradient, tree.map(torch.add, *parts))
    assert all(leaf.abs().sum() > 0 for part in parts for leaf in tree.leaves(part))


class Twins(nn.Module):
    """What people write with modules: the encoder is called once for each input."""

    def __init__(self, encoder, normalize):
        super().__init__()
        self.encoder, self.normalize = encoder, normalize

    def forward(self, *inputs):
        found = [self.encoder(x) for x in inputs]
        return tuple(F.normalize(x, dim=-1) if self.normalize else x for x in found)


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@given(
    case=st.one_of(mlps(), cnns()),
    uses=st.integers(2, 4),
    normalize=st.booleans(),
    seed=SEEDS,
)
def test_equals_a_module_called_several_times(train, case, uses, normalize, seed):
    key = random.key(seed)
    encoder = case.params(random.fold_in(key, 0))
    inputs = inputs_of(case, random.fold_in(key, 1), uses)
    module = Twins(case.reference(encoder), normalize).train(train)
    model = models.siamese(case.model, normalize=normalize)
    params = tree.from_module(module)
    assert not tree.compare(params, model.init(key))
    expected = module(*inputs)
    found = model.apply(params, *inputs, train=train)
    if train:
        found, buffers = found
        close(buffers, tree.partition(tree.from_module(module))[1])
    assert isinstance(found, tuple)
    close(list(found), [x.detach() for x in expected])


BATCH = mlp(widths=(5, 4), norm="batch", dropout=0.4)


def test_each_input_has_a_key_of_its_own():
    case = mlp(widths=(200,), dropout=0.5)
    model = models.siamese(case.model)
    params, x = TensorDict({"encoder": case.params(KEY)}), case.inputs(KEY)[0]
    (first, second), buffers = model.apply(params, x, x, train=True, key=KEY)
    assert buffers.is_empty()
    assert not torch.allclose(first, second)
    again = model.apply(params, x, x, train=True, key=KEY)[0]
    close(list(again), [first, second], tolerance=0)
    for key, y in zip(random.split(KEY, 2).unbind(), (first, second), strict=True):
        close(case.model.apply(params["encoder"], x, train=True, key=key)[0], y, tolerance=0)
    with pytest.raises(ValueError, match=r"key: expected a key .* got None"):
        model.apply(params, x, x, train=True)


def test_inputs_of_different_batches():
    case = cnn(widths=(2,), norm="batch")
    model = models.siamese(case.model)
    params, x = TensorDict({"encoder": case.params(KEY)}), case.inputs(KEY)[0]
    one, three = model.apply(params, x[:1], x)
    assert (len(one), len(three)) == (1, 3)
    close(one, three[:1])
    single = model.apply(params, x)
    assert isinstance(single, torch.Tensor)


def test_taps_give_what_flowed_for_each_input():
    case = cnn(widths=(2, 4), norm="batch")
    sub = cnn(widths=(2,), norm=None)

    def init(key):
        first, second = random.split(key)
        return TensorDict({"sub": sub.model.init(first), "head": layers.init_linear(second, 3, 2)})

    def apply(params, x, *, train=False, key=None, taps=()):
        from funcnets.taps import Taps

        tapped = Taps("own", taps)
        h, _ = tapped.run("sub", sub.model, params["sub"], x, train=train)
        h = tapped("hidden", h.relu())
        return tapped.finish(layers.linear(params["head"], h), {}, train)

    model = models.siamese(Model(init=init, apply=apply), normalize=True)
    params = model.init(KEY)
    x, y = (x.float() for x in inputs_of(case, KEY, 2))
    (a, b), found = model.apply(params, x, y, taps=["encoder.hidden", "encoder"])
    assert found["encoder.hidden"][0].shape == (3, 3)
    close([a, b], [F.normalize(e, dim=-1) for e in found["encoder"]], 1e-6)
    assert not torch.equal(*found["encoder.hidden"])
    # One input: the tap is no tuple.
    _, found = model.apply(params, x, taps=["encoder.hidden"])
    assert isinstance(found["encoder.hidden"], torch.Tensor)
    # A replacement holds for each input.
    (a, b), _ = model.apply(params, x, y, taps={"encoder.hidden": lambda h: 0 * h})
    close(a, b)
    ((a, b), found), buffers = model.apply(params, x, y, train=True, taps=["encoder.sub"])
    assert buffers.is_empty()
    assert len(found["encoder.sub"]) == 2
    with pytest.raises(ValueError, match=r"taps: expected names among .*encoder; got hidden"):
        model.apply(params, x, y, taps=["hidden"])


def test_an_ensemble_of_pairs_and_per_sample_gradients():
    model = models.siamese(BATCH.model, normalize=True)
    keys = random.split(KEY, 3)
    singles = [TensorDict({"encoder": BATCH.params(key)}) for key in keys.unbind()]
    x, y = inputs_of(BATCH, KEY, 2)
    similar = torch.tensor([1, 0, 1, 0])

    def loss(params, key):
        (a, b), buffers = model.apply(params, x, y, train=True, key=key)
        return losses.contrastive(a, b, similar), buffers

    step = grad(loss, has_aux=True)
    together = vmap(step)(tree.stack(singles), keys)
    for i, (params, key) in enumerate(zip(singles, keys.unbind(), strict=True)):
        for got, expected in zip(together, step(params, key), strict=True):
            close(tree.map(lambda leaf, i=i: leaf[i], got), expected)
    compiled = compile(step, backend="aot_eager")
    for params, key in zip(singles, keys.unbind(), strict=True):
        close(compiled(params, key), step(params, key))

    def pair_loss(params, a, b, s):
        return losses.contrastive(*model.apply(params, a[None], b[None]), s[None])

    each = vmap(grad(pair_loss), (None, 0, 0, 0))(singles[0], x, y, similar)
    mean = tree.map(lambda leaf: leaf.mean(0), each)
    whole = grad(lambda p: losses.contrastive(*model.apply(p, x, y), similar))(singles[0])
    close(mean, whole)


@pytest.mark.dynamo
def test_plain_torch_compile_of_a_pair():
    model = models.siamese(BATCH.model, normalize=True)
    params = TensorDict({"encoder": BATCH.params(KEY)})
    x, y = inputs_of(BATCH, KEY, 2)
    compiled = torch.compile(model.apply, fullgraph=True, backend="aot_eager")
    close(list(compiled(params, x, y)), list(model.apply(params, x, y)))
    found, buffers = compiled(params, x, y, train=True, key=KEY)
    expected, new = model.apply(params, x, y, train=True, key=KEY)
    close(list(found), list(expected))
    close(buffers, new)


def test_saved_with_its_encoder(tmp_path):
    model = models.siamese(models.mlp(3, 2, widths=(4,)), normalize=True)
    params = model.init(KEY)
    save(tmp_path / "file", params, model)
    again, loaded = load(tmp_path / "file")
    assert again == model
    close(loaded, params, tolerance=0)
    # An encoder of one's own has no name to go into the file.
    own = models.siamese(Model(init=model.init, apply=model.apply))
    with pytest.raises(TypeError, match="save the parameters without a model"):
        save(tmp_path / "own", own.init(KEY), own)


def test_errors(unchecked):
    with pytest.raises(TypeError, match="siamese: encoder: expected a Model, got int"):
        models.siamese(3)
    model = models.siamese(BATCH.model)
    params = TensorDict({"encoder": BATCH.params(KEY)})
    with pytest.raises(ValueError, match="siamese: expected at least one input, got none"):
        model.apply(params)
    x = torch.ones(4, 2, dtype=DTYPE)
    fits = torch.ones(4, 3, dtype=DTYPE)
    message = re.escape("siamese: inputs[1]: mlp: x: expected [batch, 3], got [4, 2]")
    with pytest.raises(ValueError, match=message), NoArithmetic():
        model.apply(params, fits, x)
    with pytest.raises(ValueError, match=r"encoder\.0: missing"), NoArithmetic():
        model.apply(TensorDict({"encoder": params["encoder"].exclude("0")}), x)


def test_what_the_encoder_refuses_has_a_place(unchecked):
    model = models.siamese(models.mlp(3, 2, dropout=0.5))
    x = torch.ones(4, 3)
    with pytest.raises(ValueError, match="siamese: encoder: mlp: key: expected a key"):
        model.apply(model.init(KEY), x, train=True)
    several = models.multimodal({"x": models.mlp(3, 4)}, {"y": 2})
    twins = models.siamese(several, normalize=True)
    with pytest.raises(TypeError, match="siamese: normalize: expected embeddings that are one"):
        twins.apply(twins.init(KEY), {"x": x})

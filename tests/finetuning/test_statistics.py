import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from funcnets import finetuning, models, optim, random, training, tree

PLAIN = models.resnet("basic", (1, 1), 3, in_channels=1, width=4, stem="small")
STILL = finetuning.frozen_statistics(PLAIN)


def trained():
    """Parameters whose running statistics are not those that they begin with."""
    params = PLAIN.init(random.key(0))
    x = 2 + random.normal(random.key(1), (16, 1, 8, 8))
    return tree.merge(tree.partition(params)[0], PLAIN.apply(params, x, train=True)[1])


def run(model, trainable=None):
    step = training.make_step(model, F.cross_entropy, optim.adam(0.01), trainable=trainable)
    state = step.init(trained(), random.key(2))
    batch = random.normal(random.key(3), (6, 1, 8, 8)), torch.arange(6) % 3
    for _ in range(3):
        state, _ = step(state, batch)
    return state


def same(a, b):
    return [torch.equal(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True)]


def test_the_statistics_stay_while_the_rest_is_trained():
    before, buffers = tree.partition(trained())
    state = run(STILL)
    assert all(same(state.buffers, buffers))
    assert not any(same(run(PLAIN).buffers, buffers))
    assert not any(same(state.params, before))  # weights and biases of the norms among them


def test_features_are_frozen_below_a_new_head():
    state = run(STILL, "fc")
    last = training.parameters(state)
    for path, leaf in tree.leaves_with_path(trained()):
        assert torch.equal(leaf, last[path]) == (path[0] != "fc")


@given(size=st.integers(1, 4), seed=st.integers(0, 99))
def test_each_sample_is_normalised_by_the_running_statistics(size, seed):
    params = trained()
    x = random.normal(random.key(seed), (size, 1, 8, 8))
    outputs, buffers = STILL.apply(params, x, train=True, key=random.key(0))
    assert buffers.is_empty()
    assert torch.equal(outputs, PLAIN.apply(params, x))
    alone = STILL.apply(params, x[:1], train=True)[0]
    torch.testing.assert_close(outputs[:1], alone, rtol=1e-4, atol=1e-5)
    if size > 1:
        assert not torch.allclose(outputs, PLAIN.apply(params, x, train=True)[0], atol=1e-3)


def test_taps_and_inference_go_through():
    params, x = trained(), torch.ones(2, 1, 8, 8)
    outputs, taps = STILL.apply(params, x, taps=["avgpool"])
    assert torch.equal(outputs, PLAIN.apply(params, x))
    assert taps["avgpool"].shape == (2, 8)
    assert STILL.check == PLAIN.check

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch.utils.data import DataLoader, TensorDataset

from funcnets import data, random, training

KEY = random.key(3)


@given(samples=st.integers(1, 20), size=st.integers(1, 8), drop_last=st.booleans())
def test_every_sample_once_an_epoch(samples, size, drop_last):
    inputs = torch.arange(samples), {"y": 10 * torch.arange(samples)}
    if drop_last and size > samples:
        with pytest.raises(ValueError, match="minibatches: batch_size"):
            training.minibatches(inputs, size, drop_last=True)
        return
    epoch = training.minibatches(inputs, size, drop_last=drop_last)(KEY)
    batches = list(epoch)
    assert [len(x) for x, _ in batches][:-1] == [size] * (len(epoch) - 1)
    seen = torch.cat([x for x, _ in batches])
    assert len(seen.unique()) == len(seen) == (samples - samples % size if drop_last else samples)
    assert all(torch.equal(y["y"], 10 * x) for x, y in batches)
    assert torch.equal(epoch[-1][0], batches[-1][0])
    with pytest.raises(IndexError, match="batches"):
        epoch[len(epoch)]


def test_any_other_order():
    labels = torch.arange(30) % 3
    groups = data.group(labels)
    batches = training.minibatches(
        (torch.arange(30), labels), lambda key: data.stratified_batches(key, groups, 6)
    )
    for keys in (KEY, random.split(KEY, 2)):
        for samples, found in batches(keys):
            assert torch.equal(found, samples % 3)
            assert ((found == 0).sum(-1) >= 1).all()


def test_members_have_orders_of_their_own():
    batches = training.minibatches(torch.arange(12), 5)
    keys = random.split(KEY, 2)
    together = list(batches(keys))
    assert [batch.shape for batch in together] == [(2, 5), (2, 5), (2, 2)]
    for i, key in enumerate(keys):
        assert torch.equal(torch.cat([b[i] for b in together]), torch.cat(list(batches(key))))


def loader():
    return DataLoader(TensorDataset(torch.arange(10)), batch_size=4)


ways = {
    "by key": lambda: training.minibatches(torch.arange(10), 4),
    "list": lambda: list(torch.arange(10).split(4)),
    "loader": loader,
    "generators": lambda: lambda key: iter(torch.arange(10).split(4)),
    "uneven": lambda: lambda key: [torch.arange(i + 1) for i in range(1 + key[0].item() % 4)],
}


@pytest.mark.parametrize("way", ways)
@given(start=st.integers(0, 11))
def test_a_run_is_entered_anywhere(way, start):
    with torch.random.fork_rng():  # a DataLoader draws from it
        every = list(itertools.islice(training.turns(ways[way](), KEY), 14))
        rest = list(itertools.islice(training.turns(ways[way](), KEY, start), 14 - start))
    assert [turn.step for turn in every] == list(range(14))
    assert len(rest) == 14 - start
    for a, b in zip(every[start:], rest, strict=True):
        assert a[:3] == b[:3]
        assert torch.equal(a.batch[0], b.batch[0])
    ends = [turn.epoch for turn in every if turn.last]
    assert ends == list(range(len(ends)))


def test_orders_differ_from_epoch_to_epoch():
    run = training.turns(training.minibatches(torch.arange(50), 50), KEY)
    first, second = (next(run).batch for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("empty", [[], lambda key: [], lambda key: iter(())])
def test_an_empty_loader_is_an_error(empty):
    with pytest.raises(ValueError, match="epoch 0: expected at least one batch, got none"):
        next(training.turns(empty, KEY))


@pytest.mark.parametrize("batches", [{"x": torch.ones(2)}, "abc", 3, None])
def test_what_is_no_batches_is_an_error(batches, unchecked):
    with pytest.raises(TypeError, match=r"batches: expected a function of a key, .* got"):
        next(training.turns(batches, KEY))


class Indexed:
    """Batches as torch.utils.data.Dataset has its samples: by number alone."""

    def __len__(self):
        return 2

    def __getitem__(self, place):
        return torch.full((3,), float(place))


@pytest.mark.parametrize(
    "batches",
    [
        Indexed(),
        torch.tensor([[0.0] * 3, [1.0] * 3]),
        TensorDict({"x": torch.tensor([[0.0] * 3, [1.0] * 3])}, [2]),
    ],
)
def test_whatever_has_a_number_of_batches_is_a_sequence(batches, unchecked):
    turns = list(itertools.islice(training.turns(batches, KEY), 3))
    found = [turn.batch["x"] if isinstance(batches, TensorDict) else turn.batch for turn in turns]
    assert [batch.tolist() for batch in found] == [[0.0] * 3, [1.0] * 3, [0.0] * 3]
    assert [(turn.epoch, turn.step, turn.last) for turn in turns[1:]] == [
        (0, 1, True),
        (1, 2, False),
    ]


def test_data_that_do_not_fit():
    with pytest.raises(ValueError, match=r"one number of samples, got 0 \[3\], 1 \[4\]"):
        training.minibatches((torch.ones(3), torch.ones(4)), 2)
    with pytest.raises(ValueError, match="one number of samples"):
        training.minibatches(torch.ones(0), 2)

import errno
import json
import os
import resource
import signal
import warnings

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import assert_equal, data, make, mlp, start
from tensordict import TensorDict
from torch.func import vmap

import funcnets
from funcnets import models, optim, random, training, tree

LEAVES = st.sampled_from(
    [
        torch.ones(2, 3),
        torch.tensor(2.5, dtype=torch.float64),
        torch.tensor([2**63, 1], dtype=torch.uint64),
        torch.tensor(True),
        torch.zeros(0, 2),
        torch.arange(3),
        torch.ones(2, dtype=torch.bfloat16),
        None,
        (),
    ]
)
NAMES = st.text("ab_0", min_size=1, max_size=3)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(NAMES, inner, max_size=3),
    ),
    max_leaves=6,
)


@given(state=TREES)
def test_any_tree_comes_back(tmp_path_factory, state):
    path = tmp_path_factory.mktemp("any") / "state.safetensors"
    state = {"state": state}
    training.save_checkpoint(path, state, {"note": [1, None]})
    like = tree.map(torch.zeros_like, state)
    loaded, metadata = training.load_checkpoint(path, like)
    assert metadata == {"note": [1, None]}
    assert_equal(loaded, state)


def trained(**options):
    step = make(**options)
    state = start(step, mlp())
    return step, step(state, data())[0]


@pytest.mark.parametrize(
    "options",
    [
        {"average": training.ema(0.9), "nonfinite": "restore"},
        {"optimizer": optim.by_path({"*.bias": optim.sgd(0.1)}, optim.adamw(0.1))},
        {"precision": training.float16(8.0), "trainable": "3"},
    ],
    ids=["average", "by path", "float16"],
)
def test_a_state_comes_back(tmp_path, options):
    step, state = trained(**options)
    state = training.EarlyStopping().init(state)
    training.save_checkpoint(tmp_path / "one", state)
    like = training.EarlyStopping().init(start(step, mlp(), seed=9))
    assert_equal(training.load_checkpoint(tmp_path / "one", like)[0], state)
    keys = random.split(random.key(0), 3)
    states = vmap(step.init)(vmap(lambda k: tree.cast(mlp().init(k), torch.float64))(keys), keys)
    training.save_checkpoint(tmp_path / "many", states)
    assert_equal(
        training.load_checkpoint(tmp_path / "many", tree.map(torch.zeros_like, states))[0], states
    )


def test_a_checkpoint_of_something_else_names_the_places(tmp_path):
    _, state = trained()
    path = tmp_path / "state.safetensors"
    training.save_checkpoint(path, state)
    wider = models.mlp(6, 3, (9,))
    deeper = models.mlp(6, 3, (8, 8))
    step = make()
    for like, message in (
        (start(step, wider), r"params\.0\.weight: expected float64\[9, 6\], got float64\[8, 6\]"),
        (start(step, deeper), r"params\.6: missing"),
        (start(step, mlp(), dtype=torch.float32), r"expected float32\[8, 6\], got float64\[8, 6\]"),
        (start(make(optimizer=optim.sgd(0.1)), mlp()), r"optimizer\.\w+: unexpected"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            training.load_checkpoint(path, like)
        assert str(path) in str(caught.value)


def files(folder):
    """Files that are no checkpoints, by what is wrong with them."""
    state = {"w": torch.ones(1000)}
    training.save_checkpoint(folder / "good", state)
    whole = (folder / "good").read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])

    def with_header(text):
        return len(text).to_bytes(8, "little") + text + whole[8 + size :]

    record = json.loads(header["__metadata__"]["funcnets"])
    deep = {**header, "__metadata__": {"funcnets": "[" * 100_000}}
    version = {**record, "metadata": {**record["metadata"]}}
    version["metadata"] = dict.fromkeys(record["metadata"], 2)
    versioned = {**header, "__metadata__": {"funcnets": json.dumps(version)}}
    moved = {**header, "w": {**header["w"], "data_offsets": [0, 2**60]}}
    yield "empty", b""
    yield "short", whole[:5]
    for share in (0.1, 0.5, 0.999):
        yield f"cut at {share}", whole[: int(share * len(whole))]
    yield "huge header", b"\xff" * 8 + whole[8:]
    yield "text", b"hello, this is no checkpoint at all, whatever it says"
    yield "pickle", b"\x80\x04cos\nsystem\n(S'exit 1'\ntR."
    yield "deep", with_header(json.dumps(deep).encode())
    yield "version", with_header(json.dumps(versioned).encode())
    yield "offsets", with_header(json.dumps(moved).encode())
    yield "list", with_header(b"[1, 2]" + b" " * 10)
    yield "foreign", safetensors.torch.save({"w": torch.ones(1000)})
    funcnets.save(folder / "params", TensorDict(state))
    yield "parameters alone", (folder / "params").read_bytes()


def test_what_is_no_checkpoint_is_a_clear_error(tmp_path):
    like = {"w": torch.zeros(1000)}
    for name, content in files(tmp_path):
        path = tmp_path / "bad"
        path.write_bytes(content)
        with pytest.raises(ValueError, match="expected") as caught:
            training.load_checkpoint(path, like)
        assert str(path) in str(caught.value), name
    with pytest.raises(FileNotFoundError):
        training.load_checkpoint(tmp_path / "none", like)


@settings(max_examples=50)
@given(place=st.integers(0, 600), value=st.integers(0, 255))
def test_no_changed_byte_of_the_header_leads_elsewhere(tmp_path_factory, place, value):
    path = tmp_path_factory.mktemp("bytes") / "state"
    state = {"w": torch.ones(3), "n": torch.tensor(3)}
    training.save_checkpoint(path, state)
    content = bytearray(path.read_bytes())
    content[place % len(content)] = value
    path.write_bytes(content)
    try:
        loaded, _ = training.load_checkpoint(path, state)
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017
    else:
        assert tree.flatten(loaded)[1] == tree.flatten(state)[1]
        assert loaded["w"].dtype == torch.float32


def write(folder, scores, **options):
    checkpoints = training.Checkpoints(folder, **options)
    for step, score in enumerate(scores):
        checkpoints.save({"w": torch.tensor(step)}, step, {"scores": {"loss": score}})
    return checkpoints


@given(
    scores=st.lists(st.sampled_from([0.1, 0.2, 0.3, torch.nan]), min_size=1, max_size=8),
    keep=st.integers(1, 4),
    mode=st.sampled_from(["min", "max"]),
)
def test_the_last_and_the_best_are_kept(tmp_path_factory, scores, keep, mode):
    folder = tmp_path_factory.mktemp("kept") / "checkpoints"
    checkpoints = write(folder, scores, keep=keep, best="loss", mode=mode)
    numbers = [score for score in scores if score == score]
    last = set(range(len(scores))[-keep:])
    best = {scores.index((min if mode == "min" else max)(numbers))} if numbers else set()
    assert set(checkpoints.steps()) == last | best
    like = {"w": torch.tensor(0)}
    state, _ = checkpoints.restore(like)
    assert int(state["w"]) == len(scores) - 1
    if best:
        assert int(checkpoints.restore(like, "best")[0]["w"]) in best
    assert len(list(folder.iterdir())) == len(checkpoints.steps())


def test_a_checkpoint_that_is_not_whole(tmp_path):
    checkpoints = write(tmp_path, [1.0, 2.0, 3.0])
    like = {"w": torch.tensor(0)}
    for step in (2, 1):
        content = checkpoints.path(step).read_bytes()
        checkpoints.path(step).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"step-0000000002.*cut short") as caught:
        checkpoints.restore(like)
    assert "earlier ones, of steps [0, 1]" in caught.value.__notes__[0]
    with pytest.warns(UserWarning, match="going back to step"):
        assert int(checkpoints.restore(like, fall_back=True)[0]["w"]) == 0
    # Another model's is whole, and no reason to look further.
    others = write(tmp_path / "others", [1.0, 2.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"step-0000000001.*\n(.*\n)?v: missing"):
            others.restore({"v": torch.ones(1)}, fall_back=True)


def test_restoring_what_is_not_there(tmp_path):
    checkpoints = training.Checkpoints(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        checkpoints.restore({})
    write(tmp_path, [1.0])
    with pytest.raises(FileNotFoundError, match=r"\(7\), got those of steps \[0\]"):
        training.Checkpoints(tmp_path).restore({}, 7)
    (tmp_path / "step-x.safetensors").write_bytes(b"")
    assert training.Checkpoints(tmp_path).steps() == [0]
    for options in ({"keep": 0}, {"mode": "best"}):
        with pytest.raises(ValueError, match="Checkpoints"):
            training.Checkpoints(tmp_path, **options)


def test_a_full_disk_leaves_what_there_was(tmp_path):
    """As far as a process may write no file larger than so much: each write comes to its end."""
    checkpoints = write(tmp_path, [1.0, 2.0], keep=1)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    state = {"w": torch.ones(100_000)}
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"step-0000000002\.safetensors: .*File too large"):
            checkpoints.save(state, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_failed_replacement_leaves_what_there_was(tmp_path, monkeypatch):
    checkpoints = write(tmp_path, [1.0, 2.0], keep=1)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    for place in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, place, full)
            with pytest.raises(OSError, match="No space left"):
                checkpoints.save({"w": torch.tensor(9)}, 2)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    left = tmp_path / ".step-0000000003.safetensors.0123.tmp"
    left.write_bytes(b"half")
    assert write(tmp_path, [1.0]).steps() == [0]
    assert not left.exists()


def test_leaves_that_no_file_can_hold(tmp_path):
    with pytest.raises(TypeError, match=r"a\.0: expected a tensor, got float"):
        training.save_checkpoint(tmp_path / "x", {"a": [1.0]})
    with pytest.raises(ValueError, match="without dots"):
        training.save_checkpoint(tmp_path / "x", {"a.b": torch.ones(1)})
    assert not list(tmp_path.iterdir())

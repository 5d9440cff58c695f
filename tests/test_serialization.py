from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import signal
import sys
import time

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from funcnets import models, random, serialization, tree
from funcnets.model import Model, bind
from funcnets.serialization import load, read_metadata, save

FAMILY = """
from dataclasses import dataclass
import torch
from tensordict import TensorDict
from funcnets import random

@dataclass(frozen=True)
class Config:
    widths: tuple[int, ...] = (2, 3)
    slope: float = 1.0
    name: str = "toy"
    bias: bool = False

def init(key, config):
    return TensorDict({
        str(i): {"weight": random.normal(random.fold_in(key, i), (b, a))}
        for i, (a, b) in enumerate(zip(config.widths, config.widths[1:], strict=False))
    })

def forward(params, x, config, *, train=False, key=None):
    for i in range(len(config.widths) - 1):
        x = config.slope * params[str(i), "weight"] @ x
    return x
"""


@pytest.fixture
def family(tmp_path_factory, monkeypatch):
    """A module funcnets.models.toy, there for one test."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "toy.py").write_text(FAMILY)
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(folder)])
    import importlib

    importlib.invalidate_caches()
    module = importlib.import_module("funcnets.models.toy")
    yield module
    del sys.modules["funcnets.models.toy"]
    del models.toy


def make(family, **config):
    config = family.Config(**config)
    return bind("toy", config, family.init, family.forward)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "params.safetensors"


def bits(leaf):
    return bytes(leaf.contiguous().reshape(-1).view(torch.uint8).numpy())


def assert_identical(first, second):
    ours, theirs = tree.leaves_with_path(first), tree.leaves_with_path(second)
    assert [path for path, _ in ours] == [path for path, _ in theirs]
    for (_, a), (_, b) in zip(ours, theirs, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert bits(a) == bits(b)


DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.uint64,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
]
BYTES = st.builds(
    lambda dtype, shape, seed: (
        (
            random.randint(random.key(seed), (*shape, dtype.itemsize), 0, 2, torch.uint8)
            if dtype == torch.bool
            else random.randint(random.key(seed), (*shape, dtype.itemsize), 0, 256, torch.uint8)
        )
        .view(dtype)
        .reshape(shape)
    ),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    st.integers(0, 2**32),
)
NAMES = st.text(st.characters(exclude_characters=".", exclude_categories=["Cs"]), max_size=5)
TREES = st.dictionaries(
    NAMES.filter(lambda name: name != "__metadata__"),
    st.recursive(
        BYTES, lambda inner: st.dictionaries(NAMES, inner, min_size=1, max_size=3), max_leaves=6
    ),
    max_size=4,
).map(lambda held: TensorDict(held))


@given(params=TREES, extra=st.dictionaries(st.text(max_size=3), st.integers() | st.text()))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bit_for_bit(path, params, extra):
    save(path, params, metadata=extra)
    model, loaded = load(path)
    assert model is None
    assert_identical(loaded, params)
    assert loaded.batch_size == ()
    assert read_metadata(path) == extra


def test_shared_and_strided_memory(path):
    base = torch.arange(12.0)
    params = TensorDict(
        {
            "whole": base,
            "same": base,
            "part": base[3:7],
            "strided": base[::2],
            "turned": base.reshape(3, 4).T,
            "expanded": torch.ones(1).expand(5),
            "trained": torch.nn.Parameter(torch.ones(2)),
        }
    )
    save(path, params)
    _, loaded = load(path)
    assert_identical(loaded, params)
    assert len({leaf.untyped_storage().data_ptr() for leaf in tree.leaves(loaded)}) == 7
    assert not any(leaf.requires_grad for leaf in tree.leaves(loaded))


def test_memory_of_its_own(path):
    save(path, TensorDict({"w": torch.ones(1000), "v": torch.zeros(10)}))
    _, loaded = load(path)
    with open(path, "r+b") as file:
        file.write(b"\xff" * os.path.getsize(path))
    assert loaded["w"].sum() == 1000
    path.unlink()
    loaded["w"].zero_()
    assert loaded["v"].sum() == 0


def test_ensembles(family, path):
    model = make(family)
    ensemble = tree.stack([model.init(random.key(i)) for i in range(8)])
    for params in (ensemble, tree.stack([ensemble, ensemble])):
        save(path, params, model)
        _, loaded = load(path)
        assert_identical(loaded, params)
        assert loaded.batch_size == loaded["0"].batch_size == params.batch_size
    pair = TensorDict({"many": ensemble, "one": model.init(random.key(0))})
    save(path, pair)
    _, loaded = load(path)
    assert (loaded.batch_size, loaded["many", "0"].batch_size) == ((), (8,))
    assert loaded["one"].batch_size == ()


def test_the_model_comes_back(family, path):
    model = make(family, widths=(2, 4, 1), slope=0.5, name="é", bias=True)
    params = model.init(random.key(3))
    save(path, params, model, {"epoch": 3})
    again, loaded = load(path)
    assert again.config == model.config
    assert again.config.widths == (2, 4, 1)
    assert again.family == "toy"
    x = torch.tensor([1.0, 2.0])
    assert torch.equal(again.apply(loaded, x), model.apply(params, x))
    assert read_metadata(path) == {"epoch": 3}
    assert load(str(path), model)[0] is model


def test_a_model_of_ones_own(path):
    def init(key):
        assert key.device.type == "cpu", "needs real values"
        return TensorDict({"w": random.normal(key, (3,))})

    model = Model(init=init, apply=lambda params, x: params["w"] * x)
    params = model.init(random.key(0))
    save(path, params, model)
    assert load(path)[0] is None
    again, loaded = load(path, model=model)
    assert again is model
    assert_identical(loaded, params)
    other = Model(init=lambda key: TensorDict({"w": torch.ones(4)}), apply=model.apply)
    with pytest.raises(ValueError, match=r"params.safetensors: w: expected \[4\], got \[3\]"):
        load(path, model=other)


def test_device(path):
    save(path, TensorDict({"w": torch.ones(3)}))
    assert load(path, device="meta")[1]["w"].device.type == "meta"


class TestRefusedOnSaving:
    def test_names(self, path):
        for params, error in [
            ({"a.b": torch.ones(1)}, ValueError),
            ({"a": {"b.c": torch.ones(1)}}, ValueError),
            ({"__metadata__": torch.ones(1)}, ValueError),
            ({"a": 1}, TypeError),
            ({"a": [torch.ones(1)]}, TypeError),
            ({"a": {"b": torch.ones(1, dtype=torch.complex128)}}, TypeError),
            (torch.ones(1), TypeError),
            (None, TypeError),
            ({"a": None}, TypeError),
            ({"a": {"b": torch.ones(1, device="meta")}}, TypeError),
            ({"a": {"b": torch.eye(2).to_sparse()}}, TypeError),
        ]:
            with pytest.raises(error, match=r"expected|a\.b: safetensors cannot"):
                save(path, params)
        assert not list(path.parent.iterdir())

    def test_metadata_and_configurations_that_json_changes(self, family, path):
        with pytest.raises(TypeError):
            save(path, TensorDict({}), metadata={"a": torch.ones(1)})

        @dataclasses.dataclass(frozen=True)
        class Odd:
            value: object

        for value in (math.nan, [1], {1: 2}, torch.float32):
            model = bind("toy", Odd(value), lambda key, config: TensorDict({}), family.forward)
            with pytest.raises(TypeError, match=r"config|JSON"):
                save(path, TensorDict({}), model)
        assert not list(path.parent.iterdir())

    def test_a_model_of_ones_own_within_a_configuration(self, family, path):
        @dataclasses.dataclass(frozen=True)
        class Outer:
            parts: object

        own = Model(init=lambda key: TensorDict({}), apply=lambda params, x: x)
        outer = bind(
            "toy", Outer((("a", own),)), lambda key, config: TensorDict({}), family.forward
        )
        with pytest.raises(TypeError, match=r"config: .* got one of your own: .*load\(path, model"):
            save(path, TensorDict({}), outer)

    def test_parameters_of_another_model(self, family, path):
        params = make(family, widths=(2, 5)).init(random.key(0))
        with pytest.raises(ValueError, match=r"0\.weight: expected \[3, 2\], got \[5, 2\]"):
            save(path, params, make(family))


@pytest.fixture
def good(family, path):
    model = make(family)
    save(path, model.init(random.key(0)), model, {"a": 1})
    return path


def refused(path, match, **arguments):
    with pytest.raises(ValueError, match=match) as caught:
        load(path, **arguments)
    assert str(path) in str(caught.value)


class TestRefusedOnLoading:
    def test_missing(self, path):
        for function in (load, read_metadata):
            with pytest.raises(FileNotFoundError, match=r"params\.safetensors"):
                function(path)

    def test_cut_short_anywhere(self, good):
        data = good.read_bytes()
        for size in range(len(data)):
            good.write_bytes(data[:size])
            refused(good, "expected a whole safetensors file")
            with pytest.raises(ValueError, match="expected a whole safetensors file"):
                read_metadata(good)

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"\xff" * 8,
            b"\xff" * 7 + b"\x7f{}",
            (2**40).to_bytes(8, "little") + b"{}",
            b"\2" + b"\0" * 7 + b"[]",
            b"\2" + b"\0" * 7 + b"\xff\xfe",
            b"PK\x03\x04 a zip file of torch.save",
            b"\x80\x04\x95 a pickle",
            b'\x22\0\0\0\0\0\0\0{"a":{"dtype":"F32","shape":[4]}}',
        ],
    )
    def test_foreign(self, path, data):
        path.write_bytes(data)
        refused(path, "expected a whole safetensors file")

    def test_longer_than_it_says(self, good):
        good.write_bytes(good.read_bytes() + b"x")
        refused(good, "expected a whole safetensors file")

    def test_another_safetensors_file(self, path):
        for metadata in (None, {"format": "pt"}):
            safetensors.torch.save_file({"w": torch.ones(1)}, path, metadata)
            refused(path, r"expected a file written by funcnets\.save")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"version": 2}, "expected format version 1, got 2"),
            ({"version": None}, "format version"),
            ({"family": "../../evil"}, r"family: expected one of .*toy.*, got \.\./\.\./evil"),
            ({"family": "os"}, "family: expected one of"),
            ({"family": "toy.os"}, "family: expected one of"),
            ({"family": 3}, "family: missing or of a wrong type"),
            ({"config": {"widths": [2, 3], "depth": 1}}, "config: expected .*toy.Config.*depth"),
            ({"config": {"widths": 3}}, "config: expected"),
            ({"config": {"widths": ["a", "b"]}}, "config: expected"),
            ({"config": [1]}, "config: missing or of a wrong type"),
            ({"config": {"widths": [2, 7]}}, r"0\.weight: expected \[7, 2\], got \[3, 2\]"),
            ({"config": {"widths": [2, 3, 4]}}, r"1: missing; expected weight \[4, 3\]"),
            ({"names": ["0.weight", "1.weight"]}, "the names that the header lists"),
            ({"names": []}, "the names that the header lists"),
            ({"names": [3]}, "the names that the header lists"),
            ({"batch_sizes": [[[], [8]]]}, r"expected a batch of \[8\], got shape"),
            ({"batch_sizes": [3]}, "params.safetensors"),
            ({"batch_sizes": [[[], "a"]]}, "params.safetensors"),
            ({"batch_sizes": {}}, "batch_sizes: missing or of a wrong type"),
            ({"metadata": 3}, "metadata: missing or of a wrong type"),
        ],
    )
    def test_changed_headers(self, good, change, message):
        self.rewrite(good, lambda record: json.dumps({**record, **change}))
        refused(good, message)

    @pytest.mark.parametrize("record", ["{", "[]", "3", "null", "[" * 100_000])
    def test_headers_that_are_no_records(self, good, record):
        self.rewrite(good, lambda _: record)
        refused(good, r"params\.safetensors")

    @staticmethod
    def rewrite(path, change):
        data = path.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        record = json.loads(header["__metadata__"]["funcnets"])
        safetensors.torch.save_file(
            safetensors.torch.load(data), path, {"funcnets": change(record)}
        )

    def test_names_within_names(self, path):
        tensors = {"a": torch.ones(1), "a.b": torch.ones(1)}
        record = {
            "version": 1,
            "names": list(tensors),
            "batch_sizes": [],
            "family": None,
            "config": None,
            "metadata": {},
        }
        safetensors.torch.save_file(tensors, path, {"funcnets": json.dumps(record)})
        refused(path, r"a\.b: expected no entry")
        deep = ".".join("a" * 100_000)
        record["names"] = [deep]
        safetensors.torch.save_file({deep: tensors["a"]}, path, {"funcnets": json.dumps(record)})
        refused(path, "recursion")

    def test_another_model(self, family, good):
        refused(
            good,
            r"expected parameters of toy with .*'slope': 2\.0.*, got toy with .*'slope': 1\.0",
            model=make(family, slope=2.0),
        )
        other = Model(init=lambda key: TensorDict({"w": torch.ones(1)}), apply=lambda params: 0)
        refused(good, r"w: missing; expected \[1\]", model=other)


class TestAtomic:
    @pytest.mark.parametrize("where", ["safetensors.torch.save_file", "os.fsync", "os.replace"])
    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
    def test_a_write_that_fails(self, good, monkeypatch, where, error):
        before = good.read_bytes()

        def fail(*arguments):
            if where.startswith("safetensors"):  # half of it is written then
                with open(arguments[1], "wb") as file:
                    file.write(b"half")
            raise error

        module, name = where.rsplit(".", 1)
        monkeypatch.setattr(sys.modules[module], name, fail)
        with pytest.raises(type(error)):
            save(good, TensorDict({"w": torch.ones(3)}))
        monkeypatch.undo()
        assert good.read_bytes() == before
        assert [file.name for file in good.parent.iterdir()] == [good.name]

    def test_a_folder_that_is_not_there(self, tmp_path):
        with pytest.raises(Exception, match=r"[Nn]o such file"):
            save(tmp_path / "none" / "params", TensorDict({}))

    def test_a_link_stays_a_link(self, good, tmp_path):
        link = tmp_path / "latest"
        link.symlink_to(good)
        save(link, TensorDict({"w": torch.ones(3)}))
        assert link.is_symlink()
        assert load(good)[1]["w"].shape == (3,)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_killed_at_any_moment(self, path):
        # Leaves small enough for torch to copy them without threads, which a fork does not have.
        trees = [
            TensorDict({str(leaf): torch.full((20_000,), float(i)) for leaf in range(80)})
            for i in range(2)
        ]
        save(path, trees[0])
        context = multiprocessing.get_context("fork")
        for attempt in range(20):
            before = os.stat(path).st_mtime_ns
            child = context.Process(target=_save_for_ever, args=(str(path), trees))
            child.start()
            deadline = time.monotonic() + 30
            while os.stat(path).st_mtime_ns == before:  # until it has begun to save
                assert time.monotonic() < deadline
                time.sleep(0.001)
            time.sleep(float(random.uniform(random.key(attempt))) * 0.05)
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            assert child.exitcode == -signal.SIGKILL
            value = torch.cat(tree.leaves(load(path)[1]))
            assert len(value) == 80 * 20_000
            assert (value == value[0]).all()


def _save_for_ever(path, trees):
    while True:
        for params in trees:
            serialization.save(path, params)

"""scripts/benchmark.py: a few rows to the end, and who has other results is not timed."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from funcnets import random, tree


@pytest.fixture(scope="module")
def script():
    import benchmark

    return benchmark


def test_quick_rows_end_in_a_table_a_file_and_a_figure(script, tmp_path, capsys):
    with torch.random.fork_rng():
        script.main(
            ["--quick", "--rounds", "2", "--output", str(tmp_path), "--only", "GRU", "MLPs"]
        )
    record = json.loads((tmp_path / "benchmark.json").read_text())
    assert record["machine"]["versions"]["torch"] == torch.__version__.partition("+")[0]
    rows = {row["workload"]: row for row in record["rows"]}
    assert list(rows) == ["ensemble of 32 MLPs", "GRU step, hidden 32, length 96"]
    printed = capsys.readouterr().out
    for row in rows.values():
        assert row["workload"] in printed
        assert row["low"] <= row["value"] <= row["high"]
        assert row["holds"] == (row["value"] <= row["target"])
        assert row["ours"].startswith("funcnets")
        assert not row["rival"].startswith("funcnets")
        assert row["floor"]["operations"] > 0
        assert not any("compiled" in name for name in row["contenders"])
        assert all("other results" not in why for why in row["reported"].values())
    assert {"funcnets, eager", "nn.Module one by one, eager", "EnsembleModule, eager"} <= set(
        rows["ensemble of 32 MLPs"]["contenders"]
    )
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")


def test_the_workloads_of_a_gpu_in_small(script):
    for name, measure in script.steps.GPU_WORKLOADS.items():
        with torch.random.fork_rng():
            rows = measure(script.Settings(1, True))
        assert rows
        for row in rows:
            assert row.workload.startswith(name)
            assert all(why.startswith("not here") for why in row.reported.values())
            taken = row.contenders[row.ours]["median"]
            reached = row.floor["operations"] / taken
            assert row.share == pytest.approx(reached / script.machine.rates()[0])


def test_a_call_is_measured_in_a_process_of_its_own(script):
    rows = script.overhead.call(script.Settings(2, True))
    assert [row.workload for row in rows] == [
        "call of a compiled step, one tree of 120 leaves",
        "call of a compiled step, three trees, Adam",
    ]
    for row in rows:
        assert row.holds == (row.value <= row.target == 0.2)
        assert set(row.contenders) == {row.ours, row.rival}
        ours, flat = (row.contenders[name]["median"] for name in (row.ours, row.rival))
        assert min(ours, flat) > 0
        assert row.value == pytest.approx(1e3 * (ours - flat))  # of two rounds medians are means


def test_a_call_does_more_than_its_graph(script, monkeypatch):
    """In calls of Python functions, which unlike seconds are the same every time."""

    def calls(f):
        count = 0

        def note(frame, event, argument):
            nonlocal count
            count += event == "call"

        sys.setprofile(note)
        try:
            f()
        finally:
            sys.setprofile(None)
        return float(count)

    monkeypatch.setattr(script.machine, "seconds", calls)
    for row in script.overhead.measure(script.Settings(1, True)):
        ours, flat = (row.contenders[name]["median"] for name in (row.ours, row.rival))
        assert 0 < flat < ours


@pytest.mark.parametrize("family", ["mobilenet_v3_small", "efficientnet_b0"])
def test_families_make_what_torchvisions_make(script, family):
    for kind in ("forward", "training step"):
        with torch.random.fork_rng():
            (row,) = script.families.WORKLOADS[f"{family}, {kind}"](script.Settings(1, True))
        assert not row.reported
        assert len(row.contenders) == (2 if kind == "forward" else 3)
        assert row.rival == "nn.Module, eager"
        assert row.target == 1.05


def test_the_families_have_torchvisions_parameters(script):
    for family in script.families.FAMILIES:
        with torch.device("meta"):
            theirs = script.families.network(family)
        params = script.families.model(family).init(random.key(0, device="meta"))
        assert {".".join(path): leaf.shape for path, leaf in tree.leaves_with_path(params)} == {
            name: leaf.shape for name, leaf in theirs.state_dict().items() if leaf.ndim
        }


def test_the_floor_counts_products_and_what_they_move(script):
    a, b = torch.ones(8, 4), torch.ones(4, 2)
    found = script.machine.floor(lambda: (a @ b).relu(), 3)
    assert found["operations"] == 2 * 8 * 4 * 2
    assert found["bytes"] == 4 * (8 * 4 + 4 * 2 + 8 * 2) + 8 * 4 * 3
    assert found["seconds"] > 0


def contender(script, values, calls):
    from benchmarks.race import Contender

    return lambda: Contender(lambda: calls.append(1), lambda: values)


def test_other_results_are_reported_and_not_timed(script):
    from benchmarks.race import Case, Settings, race

    ones, near = torch.ones(4), torch.ones(4) + 1e-3
    wrong: list[int] = []
    case = Case(
        {"w": torch.full((4,), 0.5)},
        {
            "funcnets, eager": contender(script, {"w": ones}, []),
            "rival, eager": contender(script, {"w": near}, []),
            "half the change, eager": contender(script, {"w": ones * 0.75}, wrong),
            "another name, eager": contender(script, {"v": ones}, wrong),
            "no number, eager": contender(script, {"w": ones * torch.nan}, wrong),
        },
    )
    (row,) = race("made up", {"": 1e9}, lambda quick: case, Settings(3, True))
    assert set(row.contenders) == {"funcnets, eager", "rival, eager"}
    assert row.rival == "rival, eager"
    assert row.holds
    assert len(wrong) == 3 * 2  # the steps before the comparison, and none after it
    assert "0.5 of the change" in row.reported["half the change, eager"]
    assert "w" in row.reported["another name, eager"]
    assert set(row.reported) == {n for n in case.contenders if n not in row.contenders}


def test_a_rival_that_fails_or_is_missing_is_reported(script):
    from benchmarks.race import Case, MissingError, Settings, race

    def missing():
        raise MissingError("no jax")

    def failing():
        raise RuntimeError("it broke\nat length")

    made = {
        "funcnets, eager": contender(script, {"w": torch.ones(2)}, []),
        "absent, eager": missing,
        "broken, eager": failing,
    }
    (row,) = race("made up", {"": 1.0}, lambda quick: Case({}, made), Settings(1, True))
    assert row.value is None  # no rival is left
    assert not row.holds
    assert row.reported == {
        "absent, eager": "not here: no jax",
        "broken, eager": "fails: RuntimeError: it broke",
    }


def test_the_exponent_is_that_of_the_larger_sizes(script):
    sizes = [1, 2, 4, 8, 16, 32]
    assert script.growth.exponent(sizes, [5, 5, 5, 64, 256, 1024]) == pytest.approx(2)


@pytest.mark.parametrize("name", ["members, MLP", "members, conv net", "depth", "parameters"])
def test_all_whose_growth_is_measured_make_the_same_step(script, name):
    with torch.random.fork_rng():
        made = [build() for build in script.growth.curves(True)[name].contenders(4).values()]
    results = []
    for one in made:
        one.step()
        results.append(one.result())
    assert len(results) > 1
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        for key, value in results[0].items():
            torch.testing.assert_close(other[key], value, rtol=1e-3, atol=1e-5)


def test_growth_over_members_names_where_vmap_stops_paying(script):
    with torch.random.fork_rng():
        rows = script.growth.measure("members, MLP", script.Settings(1, True))
    assert rows[0].notes["vmap"].startswith("stops paying ")
    assert set(rows[0].notes) - {"vmap"} == {"funcnets, chunk chosen", "nn.Module one by one"}
    assert set(rows[1].notes) == {"funcnets, chunk chosen"}
    for row in rows:
        assert not row.reported
        assert row.holds == (row.value <= script.growth.LINEAR)
    # The memory is that of one member as many times, whatever was held of the sizes before.
    each = [found["bytes"] / found["size"] for found in rows[1].contenders.values()]
    assert max(each) < 1.05 * min(each)


def test_growth_says_how_everybodys_time_and_memory_grow(script):
    with torch.random.fork_rng():
        rows = script.growth.measure("depth", script.Settings(1, True))
    assert [row.workload for row in rows] == ["time against depth", "memory against depth"]
    assert rows[0].notes["nn.Module"].startswith("exponent ")
    for row, expected in zip(rows, ({"funcnets", "nn.Module"}, {"funcnets"}), strict=True):
        assert row.value is not None
        assert {label.rpartition(",")[0] for label in row.contenders} == expected


def test_what_it_refuses(script, tmp_path, capsys):
    for arguments in (["--only", "nothing"], ["--rounds", "0"]):
        with pytest.raises(SystemExit):
            script.main([*arguments, "--output", str(tmp_path)])
    assert "peak memory, ResNet-18; got nothing" in capsys.readouterr().err.replace("\n", " ")


def test_it_makes_one_table_at_a_time(script, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main(["--growth", "--families", "--only", "nothing", "--output", str(tmp_path)])
    assert "--families: not allowed with argument --growth" in capsys.readouterr().err

"""Our time beside that of what people would write instead: one table, one figure, one JSON file.

    uv run --group bench scripts/benchmark.py

Without the group, Equinox and Opacus are left out, and the table says so. Each workload is a file
in scripts/benchmarks. Its contenders begin with the same parameters and data and make the same
steps: two before anything is timed, after which whoever has other results than the first is
reported instead of timed. Then each takes its turn once a round, in an order that changes from
round to round: one step that is not counted and three of which the least counts. The ratio of the
best of ours to the best rival is taken within each round; the table gives medians over the rounds
and quartiles, ratios first, and whether the target is reached; beside it the floor, which is what
the arithmetic of a step would take at the rates this machine was measured to have, and which share
of the rate of a product of matrices the best of ours reaches. What happens once in a process, as
importing and compiling, has processes of its own, and so has JAX. Where there is a GPU, all compute
in bfloat16 and channels last, and there are larger workloads, too. Compiling takes most of an hour
on two cores; ``--quick`` takes a minute, has small sizes and leaves out what is compiled, so that
its ratios mean nothing. ``--growth`` and ``--families`` have tables of their own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from benchmarks import (
    compile_time,
    conditional,
    digits,
    ensembles,
    families,
    growth,
    imports,
    machine,
    memory,
    overhead,
    per_sample,
    recurrent,
    steps,
)
from benchmarks.race import Row, Settings, Workloads
from rich.console import Console
from rich.table import Table

PARTS = (
    steps,
    ensembles,
    digits,
    per_sample,
    recurrent,
    conditional,
    compile_time,
    imports,
    overhead,
    memory,
)
WORKLOADS: Workloads = {name: measure for part in PARTS for name, measure in part.WORKLOADS.items()}
if machine.GPU:
    WORKLOADS |= steps.GPU_WORKLOADS | ensembles.GPU_WORKLOADS


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what was asked for, and prints and saves it."""
    summary, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts of the workloads' names")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="small, and nothing compiled")
    tables = parser.add_mutually_exclusive_group()
    tables.add_argument("--growth", action="store_true", help="time and memory against sizes")
    tables.add_argument("--families", action="store_true", help="torchvision's networks, eager")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark"))
    flags = parser.parse_args(arguments)
    if flags.rounds < 1:
        parser.error(f"--rounds: expected 1 or more, got {flags.rounds}")
    stem, known = "benchmark", WORKLOADS
    if flags.growth:
        stem, known = "growth", growth.WORKLOADS
    elif flags.families:
        stem, known = "families", families.WORKLOADS
    chosen = [
        name
        for name in known
        if not flags.only or any(part.lower() in name.lower() for part in flags.only)
    ]
    if not chosen:
        parser.error(f"--only: expected parts of {', '.join(known)}; got {' '.join(flags.only)}")
    flags.output.mkdir(parents=True, exist_ok=True)
    # As wide as the table, where what is printed goes to a file.
    console = Console(width=max(Console().width, 120))
    described, rows = machine.describe(), []
    for name in chosen:
        console.print(f"{name} ...", style="dim")
        rows += known[name](Settings(flags.rounds, flags.quick))
        save(flags.output / f"{stem}.json", described, flags, rows)  # so far
    console.print(table(described, rows))
    for row in rows:
        for contender, why in (row.reported | row.notes).items():
            console.print(f"{row.workload}: {contender}: {why}", markup=False)
    path = flags.output / f"{stem}.png"
    (growth.draw if flags.growth else draw)(rows, path)
    console.print(f"{path}, {path.with_suffix('.json')}")


def save(path: Path, described: dict[str, Any], flags: Any, rows: list[Row]) -> None:
    """All that was measured."""
    record = {"machine": described, "rounds": flags.rounds, "quick": flags.quick}
    held = [{"holds": row.holds, "share": row.share} | asdict(row) for row in rows]
    path.write_text(json.dumps(record | {"rows": held}, indent=1))


def table(described: dict[str, Any], rows: list[Row]) -> Table:
    """The line of each row, and below it everybody's time."""
    versions = ", ".join(f"{name} {version}" for name, version in described["versions"].items())
    found = Table(
        title=f"{described['device']}, {described['threads']} threads, {described['dtype']}, "
        f"{described['gflops']:.0f} Gflop/s, {described['gbytes']:.0f} GB/s\n{versions}"
    )
    columns = ("ratio", "quartiles", "target", "holds", "workload", "ms", "quartiles", "floor")
    for column in (*columns, "of peak"):
        text = column in ("workload", "holds")
        found.add_column(column, justify="left" if text else "right", no_wrap=column != "workload")
    for row in rows:
        unit = "" if row.unit == "ratio" else f" {row.unit}"
        found.add_row(
            "?" if row.value is None else f"{row.value:.2f}{unit}",
            "" if row.low is None or row.high is None else f"{row.low:.2f} {row.high:.2f}",
            f"{row.target:.2f}",
            "yes" if row.holds else "NO",
            row.workload,
            "",
            "",
            "" if row.floor is None else f"{1e3 * row.floor['seconds']:.1f}",
            "" if row.share is None else f"{100 * row.share:.0f} %",
            style="bold" if row.holds else "bold red",
        )
        for name, measured in row.contenders.items():
            mark = "*" if name in (row.ours, row.rival) else " "
            if "bytes" in measured:
                times = (f"{measured['bytes'] / 1e6:.2f} MB", "")
            else:
                low, median, high = (1e3 * measured[k] for k in ("low", "median", "high"))
                times = f"{median:.2f}", f"{low:.2f} {high:.2f}"
            found.add_row("", "", "", "", f" {mark} {name}", *times, "", "")
        found.add_section()
    return found


def draw(rows: list[Row], path: Path) -> None:
    """How much of its target each row takes: what is left of the line holds."""
    shown = [row for row in rows if row.value is not None]
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.36 * len(shown)), constrained_layout=True)
    for y, row in enumerate(reversed(shown)):
        assert row.value is not None
        share = max(row.value / row.target, 1e-3)
        axes.barh(y, share, color="tab:blue" if row.holds else "tab:red", height=0.6)
        if row.low is not None and row.high is not None:
            ends = [max(share - row.low / row.target, 0)], [max(row.high / row.target - share, 0)]
            axes.errorbar(share, y, xerr=ends, color="black", capsize=2, linewidth=1)
        unit = "" if row.unit == "ratio" else f" {row.unit}"
        axes.text(0.02, y, f"{row.value:.2f}{unit}", va="center", fontsize=8, color="white")
    axes.set_yticks(range(len(shown)), [f"{r.workload} ({r.target:.3g})" for r in reversed(shown)])
    axes.axvline(1, color="black", linewidth=1)
    axes.set(xlabel="of the target (in brackets); left of the line it is reached")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()

"""How long `import funcnets` takes once torch and tensordict are there."""

from __future__ import annotations

from benchmarks.processes import answer
from benchmarks.race import Row, Settings, Workloads, spread

# User and system time of the process, which other processes disturb less than the time of day.
PROGRAM = """
import json, time
def taken(*names):
    begin = time.process_time()
    for name in names:
        __import__(name)
    return time.process_time() - begin
print(json.dumps([taken("torch"), taken("tensordict"), taken("funcnets"), taken(
    "funcnets.models", "funcnets.training", "funcnets.ensembles", "funcnets.data")]))
"""
NAMES = ("torch", "tensordict", "funcnets", "funcnets' models, training, ensembles and data")


def imports(settings: Settings) -> list[Row]:
    """Seconds of CPU time, over several processes."""
    found = [answer("-c", PROGRAM) for _ in range(1 if settings.quick else 9)]
    each = {
        f"import {n}": spread(list(t)) for n, t in zip(NAMES, zip(*found, strict=True), strict=True)
    }
    ours = each["import funcnets"]
    row = Row("import beyond torch and tensordict", 0.2, ours["median"], "s")
    row.low, row.high, row.contenders, row.ours = ours["low"], ours["high"], each, "import funcnets"
    return [row]


WORKLOADS: Workloads = {"import": imports}

"""Programs in processes of their own, for what happens once in a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parents[1]


def answer(*arguments: str) -> Any:
    """What a Python program with these arguments prints in its last line, read as JSON.

    Nothing that was compiled before is found again.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = os.pathsep.join(filter(None, (str(SCRIPTS), os.environ.get("PYTHONPATH"))))
        run = subprocess.run(
            [sys.executable, *arguments],
            env=os.environ | {"PYTHONPATH": path, "TORCHINDUCTOR_CACHE_DIR": folder},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return json.loads(run.stdout.strip().splitlines()[-1])

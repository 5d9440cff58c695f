"""The tests marked ``dynamo``, in a process of their own: see conftest.py."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def test_in_a_process_without_signature_checks():
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "dynamo",
            "-q",
            "-n0",
            "-p",
            "no:cacheprovider",
            TESTS,
        ],
        cwd=TESTS.parent,
        env=os.environ | {"FUNCNETS_UNCHECKED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if run.returncode or not re.search(r"^\d+ passed", run.stdout, re.MULTILINE):
        pytest.fail(run.stdout, pytrace=False)

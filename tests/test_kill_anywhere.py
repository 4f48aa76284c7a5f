"""SIGKILL at random moments of a three-candidate run with fine-tuning; the benchmark does the same 50 times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "kill_anywhere.py"


def test_killed_three_times_a_run_ends_as_an_unbroken_one(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    command = [
        sys.executable,
        str(SCRIPT),
        "--times",
        "3",
        "--seed",
        "1",
        "--only",
        "Net finetune",
        "--no-tampering",
        "--record",
        str(record),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(record.read_text())
    assert (found["kills"], found["candidates"], found["half_written_files"]) == (3, 3, 0)
    assert found["fine_tuned"] > 0 and found["temporary_files_left"] == 0
    assert all(trial["same"] for trial in found["trials"])

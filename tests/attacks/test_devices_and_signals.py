"""Devices that hang or lie, and commands that are stopped."""

from __future__ import annotations

import base64
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import hostile_files as hostile
import numpy as np
import onnx
import pytest
from scripted import HOST, Scripted

from mm_edge.bench import session
from mm_edge.bench.transport import run_bounded
from mm_edge.bench.worker import describe_machine
from mm_edge.errors import BenchError


def test_the_limit_holds_when_the_child_closes_its_streams() -> None:
    child = "import os, time; os.close(0); os.close(1); os.close(2); time.sleep(60)"
    start = time.monotonic()
    finished = run_bounded([sys.executable, "-c", child], b"", 1.0)
    assert (finished.stopped, finished.returncode, finished.limit_s) == ("timeout", None, 1.0)
    assert time.monotonic() - start < 30


def test_a_child_that_ends_after_it_closed_its_streams_is_fine() -> None:
    child = "import os, time; os.close(1); os.close(2); time.sleep(0.2); os._exit(3)"
    assert run_bounded([sys.executable, "-c", child], b"", 60.0).returncode == 3


def test_nan_from_a_device_is_not_a_drop_of_nothing(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 3, 4, 4), np.float32))
    onnx.save(hostile.make_onnx(), tmp_path / "net.onnx")
    outputs = np.array([[1, 2], [np.nan, 0]], "<f4")
    reply = {"shape": [2, 2], "data": base64.b64encode(outputs.tobytes()).decode()}
    with pytest.raises(BenchError, match=r"the board sent NaN for 1 of 2 images: net\.onnx does not run right there"):
        session.run_model(tmp_path / "net.onnx", tmp_path / "x.npy", HOST, transport=Scripted(reply))


@pytest.mark.parametrize(("key", "value"), [("cores", 10**400), ("cores", -1), ("memory_bytes", 1 << 61)])
def test_a_machine_of_absurd_size_is_refused(key: str, value: Any) -> None:
    with pytest.raises(BenchError, match=f"the board sent {key} "):
        session.read_info(Scripted({**describe_machine(), key: value}))


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_end_a_run_with_one_sentence(tmp_path: Path, kind: signal.Signals) -> None:
    code = (
        "import os, signal, sys, click\n"
        # Started in the background, as under nohup, a process ignores these.
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from mm_edge.cli.main import main\n"
        "@click.command()\n"
        f"def wait():\n    os.kill(os.getpid(), {int(kind)})\n    __import__('time').sleep(60)\n"
        "main.commands['demo'] = wait\n"
        "main(['demo'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "mm-edge: interrupted; what was made is kept, the same command goes on from there\n"

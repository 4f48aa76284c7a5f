"""Kills a run of three candidates, fine-tuned for two epochs, at random moments, and finishes it each time.

A trial starts the run in a process of its own, sends it SIGKILL after a random share of the processor time an unbroken
run takes (under other load clock time would tell little of where it is), opens every file that lies in the run
directory then, and runs the same again until it finishes. Its report must equal that of an unbroken run (seconds
apart), and its artifacts must be the same byte for byte. A file under its own name that cannot be read to its end
counts as half-written.

The network is a few convolutions and the images are 32 pixels wide, so that a run takes seconds. Processes are forked
from one that has imported everything and exported once: what is killed is work, not the start of Python.

    python benchmarks/kill_anywhere.py --times 50

Writes benchmarks/results/kill_anywhere.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mm_edge

# isort: split
import numpy as np
import onnx
import safetensors
import torch
from PIL import Image
from torch import nn

from mm_edge.api import run_job
from mm_edge.graph.export import export_raw
from mm_edge.load.models import wrap_module
from mm_edge.progress import Stages
from mm_edge.run.request import make_request
from mm_edge.store import hash_file

ROOT = Path(__file__).resolve().parent.parent
CLASSES, SIDE, PER_CLASS = 3, 32, 16


class Net(nn.Module):
    """Two convolutions with BatchNorm, one of them residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16)
        self.body, self.norm1 = nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.tail, self.norm2 = nn.Conv2d(32, 32, 1), nn.BatchNorm2d(32)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(images)).relu()
        x = self.norm1(self.body(x)).relu()
        x = x + self.norm2(self.tail(x)).relu()
        return self.head(x.mean((2, 3)))


def write_images(folder: Path) -> Path:
    """Write images of classes told apart by their colour."""
    generator = np.random.default_rng(0)
    for label in range(CLASSES):
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(PER_CLASS):
            pixels = generator.integers(0, 200, (SIDE, SIDE, 3))
            pixels[..., label] += 50
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"class{label}" / f"{number}.png")
    return folder


def job(images: Path, out: Path) -> None:
    """Run the whole job: three candidates, recovered in closed form, those on the front fine-tuned for two epochs."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    setting = {"out": out, "data": str(images), "bench": False}
    request = make_request(**setting, strategies=("balanced",), recover="finetune", epochs=2, input_sizes="none")
    run_job(
        lambda: wrap_module(Net(), torch.zeros(1, 3, SIDE, SIDE), name="net", mean=(0.5,), std=(0.25,)),
        request,
        Stages(),
    )


def spawn(work: Callable[[], None]) -> int:
    """Run `work` in a fork, in a process group of its own; return its id."""
    process = os.fork()
    if process:
        # Both sides ask for the group: whichever comes first, it is there before a kill. Too late is no matter.
        with contextlib.suppress(OSError):
            os.setpgid(process, process)
        return process
    code = 1
    try:
        os.setpgid(0, 0)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def finish(process: int) -> tuple[int, float]:
    """Wait for the end; return the exit code, negative for a signal, and the seconds of processor time it took."""
    _, status, usage = os.wait4(process, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime


def busy_seconds(process: int, since: float) -> float:
    """Return the processor time a process has taken; where no /proc tells, the clock's since `since`."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return time.monotonic() - since
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def kill_after(process: int, seconds: float) -> bool:
    """SIGKILL the process group once it was busy for `seconds`; return False if it was done before."""
    started = time.monotonic()
    while busy_seconds(process, started) < seconds:
        if os.waitpid(process, os.WNOHANG)[0]:
            return False
        time.sleep(0.002)
    os.killpg(process, signal.SIGKILL)
    return finish(process)[0] == -signal.SIGKILL


def half_written(out: Path) -> list[str]:
    """Return the files under their own names that cannot be read to the end; what is being written starts with '.'."""
    broken = []
    for path in sorted(out.rglob("*")):
        if path.is_dir() or any(part.startswith(".") and part != ".mm-edge" for part in path.relative_to(out).parts):
            continue
        try:
            READERS.get(path.suffix, Path.read_bytes)(path)
        except Exception as error:  # whatever a reader says of a file cut short
            broken.append(f"{path.relative_to(out)}: {type(error).__name__}")
    return broken


def read_onnx(path: Path) -> None:
    onnx.checker.check_model(onnx.load(path))


def read_safetensors(path: Path) -> None:
    with safetensors.safe_open(path, framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            file.get_tensor(name)


READERS: dict[str, Callable[[Path], Any]] = {
    ".json": lambda path: json.loads(path.read_text()),
    ".onnx": read_onnx,
    ".safetensors": read_safetensors,
}


def outcome(out: Path) -> dict[str, Any]:
    """Return the report without its seconds and command, and the digests of every artifact it names."""
    report = json.loads((out / "report.json").read_text())
    report.pop("seconds")
    report.pop("command")  # it names the run directory
    names = [row[field] for row in report["candidates"] for field in ("artifact", "masked_state_dict")]
    return {"report": report, "files": {name: hash_file(out / name) for name in ["dense.onnx", *filter(None, names)]}}


def trial(images: Path, out: Path, share: float, seconds: float, unbroken: dict[str, Any]) -> dict[str, Any]:
    """Kill one run after `share` of `seconds`, finish it, and compare."""
    killed = kill_after(spawn(lambda: job(images, out)), share * seconds)
    broken = half_written(out) if out.exists() else []
    kept = [path for path in (out / ".mm-edge").rglob("*") if path.suffix in (".json", ".safetensors")]
    newest = max(kept, key=lambda path: path.stat().st_mtime_ns, default=None)
    code = finish(spawn(lambda: job(images, out)))[0] if killed else 0
    same = code == 0 and outcome(out) == unbroken
    left = [str(path.relative_to(out)) for path in out.rglob(".*.tmp")]
    return {
        "share": round(share, 4),
        "killed": killed,
        "stages_kept": len(kept),
        "newest_stage": None if newest is None else newest.relative_to(out / ".mm-edge").parts[0].split(".")[0],
        "half_written": broken,
        "exit_code": code,
        "same": same,
        "temporary_files_left": left,
    }


def measure(work: Path, times: int, seed: int, record: Path) -> dict[str, Any]:
    """Return what `times` kills did, and write it to `record` after each; the shares come from `seed`."""
    images = write_images(work / "images")
    export_raw(Net(), torch.zeros(1, 3, SIDE, SIDE))  # the exporter imports for seconds when it is first used
    code, seconds = finish(spawn(lambda: job(images, work / "unbroken")))
    if code:
        raise SystemExit(f"the unbroken run failed with exit code {code}")
    unbroken = outcome(work / "unbroken")
    generator = np.random.default_rng(seed)
    trials: list[dict[str, Any]] = []
    found = summarise(trials, unbroken, seed, seconds)
    while found["kills"] < times and len(trials) < 2 * times:
        out = work / f"trial{len(trials)}"
        trials.append(trial(images, out, float(generator.random()), seconds, unbroken))
        shutil.rmtree(out)
        print(f"{len(trials)}: {json.dumps(trials[-1])}", file=sys.stderr, flush=True)
        found = summarise(trials, unbroken, seed, seconds)
        record.write_text(json.dumps(found, indent=1) + "\n")
    return found


def summarise(trials: list[dict[str, Any]], unbroken: dict[str, Any], seed: int, seconds: float) -> dict[str, Any]:
    rows = [row for row in unbroken["report"]["candidates"] if row["kind"] != "dense"]
    kills = sum(item["killed"] for item in trials)
    return {
        "command": f"python benchmarks/kill_anywhere.py --times {kills} --seed {seed}",
        "kills": kills,
        "finished_before_the_kill": sum(not item["killed"] for item in trials),
        "same_report_and_artifacts": sum(item["same"] for item in trials),
        "killed_after_stage": dict(Counter(item["newest_stage"] or "none kept yet" for item in trials)),
        "half_written_files": sum(len(item["half_written"]) for item in trials),
        "temporary_files_left": sum(len(item["temporary_files_left"]) for item in trials),
        "candidates": len(rows),
        "fine_tuned": sum(row["epochs"] is not None for row in rows),
        "cpu_seconds_unbroken": round(seconds, 2),
        "machine": f"{platform.system()} {platform.machine()}, under other load",
        "version": mm_edge.__version__,
        "trials": list(trials),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, default=ROOT / "benchmarks" / "results" / "kill_anywhere.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), args.times, args.seed, args.record)
    whole = found["same_report_and_artifacts"] == len(found["trials"]) and not found["half_written_files"]
    print(json.dumps({name: value for name, value in found.items() if name != "trials"}, indent=1))
    if not whole:
        sys.exit(1)


if __name__ == "__main__":
    main()

"""Kills small runs at random moments and finishes each: closed form, tune, fine-tune and measuring, on two networks.

A trial starts the run in a process of its own, sends it SIGKILL after a random share of the processor time an unbroken
run takes (under other load clock time would tell little of where it is), opens every file that lies in the run
directory then, and runs the same again until it finishes. Its report must equal that of an unbroken run (seconds
apart), and its artifacts must be the same byte for byte. Where times are measured, they and what depends on them are
not compared. A file under its own name that cannot be read to its end counts as half-written.

After the kills, finished runs of TAMPERED_KINDS are tampered with: each file that a run reads again is changed by one
byte or cut short, in turn, and the same run is started. It must notice: end in the same report and artifacts with
another content in that file's place, or refuse in one line. The report and the bundle, which every run writes anew, are
tampered with all at once.

The networks are a few convolutions, and attention on patches; the images are 32 pixels wide, so that a run takes
seconds. Processes are forked from one that has imported everything and exported once: what is killed is work, not the
start of Python.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from mm_edge.run import reuse
from mm_edge.run.request import make_request
from mm_edge.store import hash_file

ROOT = Path(__file__).resolve().parent.parent
CLASSES, SIDE, PER_CLASS = 3, 32, 16
REFUSED = 2  # the exit code of a process whose run ended with one line


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


class Attention(nn.Module):
    """One block of attention with two heads on patches of 8 pixels, and a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, stride=8)
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.norm1, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).reshape(-1, 16, 3, 2, 8).permute(2, 0, 3, 1, 4)
        mixed = torch.softmax(q @ k.transpose(-2, -1) / 8**0.5, dim=-1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(-1, 16, 16))
        x = x + self.down(nn.functional.gelu(self.up(self.norm1(x))))
        return self.head(x.mean(1))


@dataclass(frozen=True)
class Kind:
    """What a run does: the recovery, whether it measures, and the network."""

    recover: str
    bench: bool
    network: type[nn.Module]

    def __str__(self) -> str:
        return f"{self.network.__name__} {self.recover}{' measured' if self.bench else ''}"


KINDS = [
    Kind(recover, bench, network)
    for network in (Net, Attention)
    for recover, bench in (("closed-form", False), ("tune", False), ("finetune", False), ("closed-form", True))
]
TAMPERED_KINDS = ("Net tune", "Net finetune", "Attention closed-form measured")
# Starts of the names of files that every run writes and none reads.
WRITTEN_ANEW = ("report.", "bundle/", ".mm-edge/lock")
Tampered = dict[str, Any]
# What times decide, in the report and in each of its candidates.
TIMED = ("environment", "chosen", "warnings", "layers", "dense")
TIMED_OF_CANDIDATE = ("latency_ms", "dense_latency_ms", "speedup", "speedup_ci", "peak_memory_bytes", "pareto")


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


def job(kind: Kind, images: Path, out: Path) -> None:
    """Run the whole job: one strategy by every signal."""
    reuse.KEEP_SECONDS = 0.0  # a stage that is stored part by part takes less than a second here
    torch.set_num_threads(1)
    torch.manual_seed(0)
    setting = {"out": out, "data": str(images), "bench": kind.bench}
    strategies = {"strategies": ("balanced",), "select": "signal", "input_sizes": "none"}
    trained = {"epochs": 2} if kind.recover == "finetune" else {}
    request = make_request(**setting, **strategies, **trained, recover=kind.recover)
    shape = torch.zeros(1, 3, SIDE, SIDE)
    run_job(lambda: wrap_module(kind.network(), shape, name="net", mean=(0.5,), std=(0.25,)), request, Stages())


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
    except mm_edge.errors.MMEdgeError as error:
        code = REFUSED
        print(f"refused: {error}", file=sys.stderr)
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


def outcome(kind: Kind, out: Path) -> dict[str, Any]:
    """Return the report without its seconds and command, and the digests of every artifact it names."""
    report = json.loads((out / "report.json").read_text())
    report.pop("seconds")
    report.pop("command")  # it names the run directory
    if kind.bench:
        report = {name: value for name, value in report.items() if name not in TIMED}
        for row in report["candidates"]:
            for name in TIMED_OF_CANDIDATE:
                row.pop(name)
    names = [row[field] for row in report["candidates"] for field in ("artifact", "masked_state_dict")]
    return {"report": report, "files": {name: hash_file(out / name) for name in ["dense.onnx", *filter(None, names)]}}


@dataclass(frozen=True)
class Unbroken:
    """How a run that nothing stops ends, and the processor time it takes."""

    seconds: float
    outcome: dict[str, Any]


def run_unbroken(kind: Kind, images: Path, out: Path) -> Unbroken:
    """Run once without a kill."""
    code, seconds = finish(spawn(lambda: job(kind, images, out)))
    if code:
        raise SystemExit(f"the unbroken run of {kind} failed with exit code {code}")
    return Unbroken(seconds, outcome(kind, out))


def trial(kind: Kind, images: Path, out: Path, share: float, unbroken: Unbroken) -> dict[str, Any]:
    """Kill one run after `share` of an unbroken run's time, finish it, and compare."""
    killed = kill_after(spawn(lambda: job(kind, images, out)), share * unbroken.seconds)
    broken = half_written(out) if out.exists() else []
    kept = [path for path in (out / ".mm-edge").rglob("*") if path.suffix in (".json", ".safetensors")]
    newest = max(kept, key=lambda path: path.stat().st_mtime_ns, default=None)
    code = finish(spawn(lambda: job(kind, images, out)))[0] if killed else 0
    same = code == 0 and outcome(kind, out) == unbroken.outcome
    left = [str(path.relative_to(out)) for path in out.rglob(".*.tmp")]
    return {
        "run": str(kind),
        "share": round(share, 4),
        "killed": killed,
        "stages_kept": len(kept),
        "newest_stage": None if newest is None else newest.relative_to(out / ".mm-edge").parts[0].split(".")[0],
        "half_written": broken,
        "exit_code": code,
        "same": same,
        "temporary_files_left": left,
    }


def alter(path: Path, *, cut: bool) -> bytes:
    """Cut a file short, or change one byte: a digit of JSON, which can be read. Return what the file holds then."""
    content = path.read_bytes()
    if cut:
        changed = content[: len(content) * 2 // 3]
    else:
        digits = [at for at, byte in enumerate(content) if chr(byte).isdecimal()]
        at = digits[-1] if path.suffix == ".json" else len(content) // 2
        changed = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    path.write_bytes(changed)
    return changed


def tamper(kind: Kind, images: Path, finished: Path, names: Sequence[str], unbroken: Unbroken, cut: bool) -> Tampered:
    """Alter the files called `names` in a copy of a finished run, run the same again there, and compare."""
    out = finished.with_name("tampered")
    shutil.copytree(finished, out)
    altered = {name: alter(out / name, cut=cut) for name in names}
    code = finish(spawn(lambda: job(kind, images, out)))[0]
    same = code == 0 and outcome(kind, out) == unbroken.outcome
    taken = [name for name, content in altered.items() if same and (out / name).read_bytes() == content]
    shutil.rmtree(out)
    what = ", ".join(names) if len(names) == 1 else f"{len(names)} files that every run writes anew"
    return {"run": str(kind), "file": what, "cut": cut, "exit_code": code, "same": same, "taken": taken}


def tamper_with_all(kind: Kind, images: Path, finished: Path, unbroken: Unbroken) -> Iterator[Tampered]:
    """Tamper with every file of a finished run, one after the other."""
    names = sorted(str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file())
    anew = [name for name in names if name.startswith(WRITTEN_ANEW)]
    yield tamper(kind, images, finished, anew, unbroken, cut=False)
    for number, name in enumerate(name for name in names if name not in anew):
        yield tamper(kind, images, finished, [name], unbroken, cut=bool((number + TAMPERED_KINDS.index(str(kind))) % 2))


def is_noticed(item: Tampered) -> bool:
    """Whether a run with an altered file ended as an unbroken one without it, or was refused in one line."""
    return item["exit_code"] == REFUSED or (item["same"] and not item["taken"])


def measure(work: Path, kinds: Sequence[Kind], times: int, seed: int, record: Path, tampering: bool) -> dict[str, Any]:
    """Return what `times` kills and the tampering did, and write it to `record` after each; shares come from `seed`."""
    images = write_images(work / "images")
    for network in (Net, Attention):  # the exporter imports for seconds when it is first used
        export_raw(network(), torch.zeros(1, 3, SIDE, SIDE))
    folders = {kind: work / str(kind).replace(" ", "-") for kind in kinds}
    unbroken = {kind: run_unbroken(kind, images, folders[kind]) for kind in kinds}
    generator = np.random.default_rng(seed)
    trials: list[dict[str, Any]] = []
    tampered: list[Tampered] = []
    found = summarise(trials, tampered, unbroken, seed)
    while found["kills"] < times and len(trials) < 2 * times:
        kind = kinds[len(trials) % len(kinds)]
        out = work / f"trial{len(trials)}"
        trials.append(trial(kind, images, out, float(generator.random()), unbroken[kind]))
        shutil.rmtree(out)
        print(f"{len(trials)}: {json.dumps(trials[-1])}", file=sys.stderr, flush=True)
        found = summarise(trials, tampered, unbroken, seed)
        record.write_text(json.dumps(found, indent=1) + "\n")
    for kind in [kind for kind in kinds if tampering and str(kind) in TAMPERED_KINDS]:
        for item in tamper_with_all(kind, images, folders[kind], unbroken[kind]):
            tampered.append(item)
            print(json.dumps(item), file=sys.stderr, flush=True)
            found = summarise(trials, tampered, unbroken, seed)
            record.write_text(json.dumps(found, indent=1) + "\n")
    return found


def summarise(
    trials: list[dict[str, Any]], tampered: list[Tampered], unbroken: Mapping[Kind, Unbroken], seed: int
) -> dict[str, Any]:
    rows = [row for item in unbroken.values() for row in item.outcome["report"]["candidates"]]
    kills = sum(item["killed"] for item in trials)
    return {
        "command": f"python benchmarks/kill_anywhere.py --times {kills} --seed {seed}",
        "kills": kills,
        "finished_before_the_kill": sum(not item["killed"] for item in trials),
        "same_report_and_artifacts": sum(item["same"] for item in trials),
        "killed_after_stage": dict(Counter(item["newest_stage"] or "none kept yet" for item in trials)),
        "half_written_files": sum(len(item["half_written"]) for item in trials),
        "temporary_files_left": sum(len(item["temporary_files_left"]) for item in trials),
        "files_tampered_with": len(tampered),
        "tampering_noticed": sum(map(is_noticed, tampered)),
        "refused_in_one_line": sum(item["exit_code"] == REFUSED for item in tampered),
        "killed_runs": dict(Counter(item["run"] for item in trials if item["killed"])),
        "candidates": len(rows),
        "fine_tuned": sum(row["epochs"] is not None for row in rows),
        "recovered_by": dict(Counter(row["recovered_by"] for row in rows)),
        "cpu_seconds_unbroken": {str(kind): round(item.seconds, 2) for kind, item in unbroken.items()},
        "machine": f"{platform.system()} {platform.machine()}, under other load",
        "version": mm_edge.__version__,
        "trials": list(trials),
        "tampered": list(tampered),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", metavar="NAME", help="only runs with this in their name: Net finetune")
    parser.add_argument("--tampering", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--record", type=Path, default=ROOT / "benchmarks" / "results" / "kill_anywhere.json")
    args = parser.parse_args()
    kinds = [kind for kind in KINDS if args.only in str(kind)]
    if not kinds:
        parser.error(f"--only names none of {', '.join(map(str, KINDS))}")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), kinds, args.times, args.seed, args.record, args.tampering)
    whole = found["same_report_and_artifacts"] == len(found["trials"]) and not found["half_written_files"]
    whole = whole and found["tampering_noticed"] == found["files_tampered_with"]
    print(json.dumps({name: value for name, value in found.items() if name not in ("trials", "tampered")}, indent=1))
    if not whole:
        sys.exit(1)


if __name__ == "__main__":
    main()

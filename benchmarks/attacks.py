"""Gives mm-edge damaged and hostile files, options and devices, and counts what must not happen.

A case is made from its seed and number by tests/hostile_files.py, in a folder of its own beside files of "the user".
The command runs in a fork of a process that has imported everything, under caps on memory and file size, CASES_PER_FORK
of them one after the other; one case in --whole-every runs as a process of its own, from the start of Python. Each is
watched (attack_watch.py), its output is read, and the folder is compared with what it was. Counted by area:

    executed    a program was started, or a pickle's payload ran
    network     an address was used
    traceback   a traceback was printed, or the process died of a signal
    slow        it took more than 60 s, waiting for a processor not counted; three times that for one that runs from
                the start of Python
    memory      it took over 2 GiB more than the same command on an honest file, or reached the cap
    touched     a file outside --out, or the user's inside it, was changed
    code        an exit code that the case does not allow, or an error that is not one line of at most 500 characters
    escape      a control character or a mark of text direction was printed raw

    python benchmarks/attacks.py --cases 10000 --seed 0

Writes benchmarks/results/attacks.json: the counts by area, and every case that was counted. --go-on takes the counts
there as those of the first cases, and runs the others.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import hashlib
import importlib
import json
import os
import pkgutil
import platform
import random
import re
import resource
import select
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import mm_edge

# isort: split
import click
import numpy as np
import onnx
import torch
from safetensors.torch import save

from mm_edge.bench import session
from mm_edge.bench.transport import LocalTransport
from mm_edge.bench.worker import RESULT_MARK, describe_machine
from mm_edge.load.annotations import BoxLabels, open_labels, require_photos
from mm_edge.load.models import LoadOptions, load_model
from mm_edge.load.presets import IMAGENET_MEAN, IMAGENET_STD
from mm_edge.records import InputSpec, to_json

ROOT = Path(__file__).resolve().parent.parent
# The command as it is installed.
(COMMAND,) = entry_points(group="console_scripts", name="mm-edge")
cli = COMMAND.load()
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT / "benchmarks"))

import hostile_files as hostile  # noqa: E402
from attack_watch import watch  # noqa: E402
from reports import candidate, make_report  # noqa: E402
from scripted import HOST  # noqa: E402

LIMIT_S = int(os.environ.get("ATTACK_LIMIT_S", "60"))
MEMORY_BYTES = 2 << 30
STARTS = 3  # times as long for a whole process: on a loaded machine the imports alone take most of a minute
CASES_PER_FORK = 25
RECORDED_EVERY = 100
CAP_BYTES = 6 << 30  # of address space, beyond what the process has when a case starts
KINDS = ("executed", "network", "traceback", "slow", "memory", "touched", "code", "escape")
LONGEST = 500
DEVICE = "device.sh"
_RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_MEMORY = re.compile(r"MemoryError|not enough memory|bad_alloc|DefaultCPUAllocator|Unable to allocate")
FILE_CODES = frozenset((0, 2))


@dataclass(frozen=True)
class Case:
    """A command line, run in a folder; `codes` are the exit codes it may end with."""

    argv: list[str]
    codes: frozenset[int] = FILE_CODES


@dataclass
class Ended:
    """How a command ended: its exit code (negative for a signal), its peak of memory, whether it had to be stopped."""

    code: int
    peak_bytes: int
    slow: bool


@dataclass
class Found:
    """What was seen of a case."""

    counted: list[str]
    seconds: float
    code: int
    peak_bytes: int
    output: str
    events: list[str] = field(default_factory=list)


# ---- commands that exist for the benchmark: functions behind the command line's own handling of errors


@click.command("load")
@click.argument("model")
@click.option("--arch")
def load_command(model: str, arch: str | None) -> None:
    """Load a model, as every command does first."""
    loaded = load_model(model, LoadOptions(arch=arch, input_size=(3, 16, 16) if arch else None))
    for warning in loaded.warnings:
        click.echo(f"warning: {warning}")


@click.command("labels")
@click.argument("path")
def labels_command(path: str) -> None:
    """Read labels and place them in an input, as a run does."""
    labels = open_labels(path)
    names = [f"class{label}/{label}{n}.png" for label in range(2) for n in range(3)]
    require_photos(labels, path, names)
    spec = InputSpec((3, 16, 16), IMAGENET_MEAN, IMAGENET_STD)
    for name in labels.photos if isinstance(labels, BoxLabels) else names:
        labels.in_input(name, spec)


@click.command("device")
@click.argument("command", type=click.Choice(("info", "measure", "memory", "null", "evaluate")))
def device_command(command: str) -> None:
    """Ask the device whose answers DEVICE prints."""
    transport = LocalTransport(["/bin/sh", DEVICE])
    model = Path("net.onnx")
    if command == "info":
        click.echo(json.dumps(to_json(session.environment(HOST, transport))))
    elif command == "measure":
        click.echo(str(session.measure_pair(model, model, HOST, transport=transport, pairs=20)))
    elif command == "memory":
        click.echo(str(session.measure_footprint(model, HOST, transport=transport)))
    elif command == "null":
        click.echo(str(session.measure_null(HOST, transport=transport, runs=20)))
    else:
        np.save("images.npy", np.zeros((2, 3, 16, 16), np.float32))
        session.run_model(model, Path("images.npy"), HOST, transport=transport)


COMMANDS = {"load": load_command, "labels": labels_command, "device": device_command}


# ---- what every case starts from


class Honest:
    """The contents of honest files, made once."""

    def __init__(self, folder: Path) -> None:
        state = hostile.state_of_net()
        self.zip = hostile.save_bytes(state)
        self.legacy = hostile.save_bytes(state, legacy=True)
        self.checkpoint = hostile.save_bytes(
            {"arch": "test_resnet", "state_dict": state, "args": {"model": "test_resnet"}}
        )
        self.safetensors = save({name: tensor.contiguous() for name, tensor in state.items()})
        program = torch.export.export(hostile.Net().eval(), (torch.zeros(1, 3, 16, 16),))
        torch.export.save(program, folder / "net.pt2")
        self.pt2 = (folder / "net.pt2").read_bytes()
        self.onnx = hostile.make_onnx().SerializeToString()
        self.photos = hostile.write_photos(folder / "photos")
        self.photo = (self.photos / "class0" / "00.png").read_bytes()
        self.boxes = hostile.make_boxes([str(p.relative_to(self.photos)) for p in sorted(self.photos.rglob("*.*g"))])
        self.config = json.loads((ROOT / "mm_edge" / "demo" / "model" / "config.json").read_text())
        self.target = (ROOT / "targets" / "arm64.toml").read_text()
        self.report = to_json(make_report(candidate("a", 1.0), candidate("b", 0.9)))
        self.info = describe_machine()
        times = [1_000_000 + i for i in range(24)]
        state_of_clock = {"frequency_khz": 1_000_000, "temperature_c": 40.0, "throttled": 0}
        self.answers: dict[str, Any] = {
            "info": self.info,
            "measure": {
                "dense_ns": times, "candidate_ns": times, "disturbed": [0] * 24, "sittings": [12, 12], "clocks_khz": [],
                "load": {"cores": 4, "others": 0.1, "stolen": 0.0}, "block": 4, "threads": 1, "warm_up_stable": True,
                "before": state_of_clock, "after": state_of_clock,
            },
            "memory": {"peak_rss_bytes": 10**6, "session_ns": 10**6, "first_run_ns": 10**6, "file_bytes": 5000},
            "null": {"null_ns": times, "threads": 1},
            "evaluate": {"shape": [2, 2], "data": "AAAAAAAAAAAAAAAAAAAAAA=="},
        }  # fmt: skip


Area = Callable[[random.Random, Path, Honest], Case]


def _write(folder: Path, name: str, content: bytes) -> str:
    (folder / name).write_bytes(content)
    return name


def _load(folder: Path, name: str, content: bytes) -> Case:
    (folder / "net.py").write_text(hostile.NETWORK)
    return Case(["load", _write(folder, name, content), "--arch", "net.py:Net"])


def checkpoint_bytes(rng: random.Random, folder: Path, honest: Honest) -> Case:
    content = rng.choice((honest.zip, honest.legacy, honest.checkpoint))
    return _load(folder, rng.choice(("net.pt", "net.pth.tar", "net")), hostile.damage(content, rng))


def checkpoint_members(rng: random.Random, folder: Path, honest: Honest) -> Case:
    return _load(folder, "net.pt", hostile.damage_zip(honest.zip, rng))


def checkpoint_pickles(rng: random.Random, folder: Path, honest: Honest) -> Case:
    kind = rng.randrange(4)
    if kind == 0:
        content = hostile.raw_pickle(rng)
    elif kind == 1:
        content = hostile.rezip(
            honest.zip, lambda n, d: [(n, hostile.raw_pickle(rng) if n.endswith("data.pkl") else d)]
        )
    else:
        state: dict[str, Any] = {**hostile.state_of_net(), "x": hostile.Payload(rng)}
        content = hostile.save_bytes({"state_dict": state, "arch": "net.py:Net"}, legacy=kind == 2)
    return _load(folder, rng.choice(("net.pt", "net.bin")), content)


def checkpoint_tensors(rng: random.Random, folder: Path, honest: Honest) -> Case:
    return _load(folder, "net.pt", hostile.save_bytes(hostile.odd_state(rng)))


def checkpoint_arguments(rng: random.Random, folder: Path, honest: Honest) -> Case:
    arguments = hostile.hostile_arguments(rng)
    held: dict[str, Any] = {"arch": "test_resnet", "state_dict": {"conv1.weight": torch.zeros(2, 3, 3, 3)}}
    if rng.random() < 0.3:
        held |= {"arch": rng.choice(hostile.TEXTS)}
    if rng.random() < 0.5:
        held |= {"input_size": rng.choice(([3, 30_000, 30_000], [0, 1, 1], "x", [10**400] * 3)), "mean": [float("nan")]}
    held[rng.choice(("model_args", "model_kwargs", "args"))] = arguments
    return Case(["load", _write(folder, "net.pt", hostile.save_bytes(held))])


def exported_program(rng: random.Random, folder: Path, honest: Honest) -> Case:
    kind = rng.randrange(3)
    if kind == 0:
        content = hostile.damage(honest.pt2, rng)
    elif kind == 1:
        content = hostile.damage_zip(honest.pt2, rng)
    else:

        def change(name: str, data: bytes) -> list[tuple[str, bytes]]:
            if "models/" in name and name.endswith(".json"):
                return [(name, hostile.damage_json(json.loads(data), rng).encode("utf-8", "surrogatepass"))]
            return [(name, data)]

        content = hostile.rezip(honest.pt2, change)
    return Case(["load", _write(folder, "net.pt2", content)])


def safetensors_file(rng: random.Random, folder: Path, honest: Honest) -> Case:
    content = hostile.damage(honest.safetensors, rng) if rng.random() < 0.5 else hostile.hostile_safetensors(rng)
    return _load(folder, "net.safetensors", content)


def hub_folder(rng: random.Random, folder: Path, honest: Honest) -> Case:
    (folder / "hub").mkdir()
    config = {**honest.config, "model_args": hostile.hostile_arguments(rng)} if rng.random() < 0.3 else honest.config
    (folder / "hub" / "config.json").write_bytes(hostile.damage_json(config, rng).encode("utf-8", "surrogatepass"))
    (folder / "hub" / "model.safetensors").write_bytes(honest.safetensors)
    return Case(["load", "hub"])


def _onnx_case(rng: random.Random, folder: Path, name: str) -> Case:
    kind = rng.randrange(8)
    if kind == 0:
        return Case(["inspect", name])
    if kind == 1:
        hostile.write_photos(folder / "photos", 1)
        return Case(["evaluate", name, "--data", "photos"], frozenset((0, 1, 2)))
    return Case(["load", name])


def onnx_bytes(rng: random.Random, folder: Path, honest: Honest) -> Case:
    return _onnx_case(rng, folder, _write(folder, "net.onnx", hostile.damage(honest.onnx, rng)))


def onnx_fields(rng: random.Random, folder: Path, honest: Honest) -> Case:
    _write(folder, "w.bin", bytes(864))
    _write(folder, "short.bin", bytes(10))
    os.mkfifo(folder / "fifo")
    (folder / "zero").symlink_to("/dev/zero")
    return _onnx_case(rng, folder, _write(folder, "net.onnx", hostile.hostile_onnx(rng)))


def arrays(rng: random.Random, folder: Path, honest: Honest) -> Case:
    _write(folder, "net.onnx", honest.onnx)
    name = rng.choice(("x.npy", "x.npz"))
    _write(folder, name, hostile.hostile_array(rng) if name == "x.npy" else hostile.hostile_npz(rng))
    return Case(["evaluate", "net.onnx", "--data", name])


def photos(rng: random.Random, folder: Path, honest: Honest) -> Case:
    _write(folder, "net.onnx", honest.onnx)
    if rng.random() < 0.5:
        _write(folder, "x.tar", hostile.hostile_tar(rng, honest.photo))
        return Case(["evaluate", "net.onnx", "--data", "x.tar"])
    place = hostile.write_photos(folder / "photos", 1) / "class0"
    name = rng.choice(("a.png", "a.jpg", "b\x1b[31m.png", "c\u202egnp.png", "d\n.png"))
    (place / name).write_bytes(hostile.hostile_photo(rng, honest.photo))
    if rng.random() < 0.3:
        (folder / "photos" / os.fsdecode(rng.choice((b"class\xff", b"\x1b[2J", b"x\ny")))).mkdir()
    if rng.random() < 0.3:
        os.mkfifo(place / "fifo.png")
    if rng.random() < 0.3:
        (place / "zero.png").symlink_to("/dev/zero")
    return Case(["evaluate", "net.onnx", "--data", "photos"])


def coco_labels(rng: random.Random, folder: Path, honest: Honest) -> Case:
    text = hostile.damage_json(honest.boxes, rng).encode("utf-8", "surrogatepass")
    return Case(["labels", _write(folder, "boxes.json", text if rng.random() < 0.8 else hostile.damage(text, rng))])


def target_profile(rng: random.Random, folder: Path, honest: Honest) -> Case:
    text = honest.target
    if rng.random() < 0.5:
        content = hostile.damage(text.encode(), rng)
    else:
        key = rng.choice(("name", "description", "threads", "features", "n_m", "fp32", "affinity", "python"))
        value = rng.choice(
            (json.dumps(rng.choice(hostile.TEXTS)), "9" * 5000, "[" * 5000, "nan", "-1", "1979-05-27", "{}")
        )
        lines = [f"{key} = {value}" if line.startswith(f"{key} =") else line for line in text.splitlines()]
        content = "\n".join(lines).encode("utf-8", "surrogatepass")
    return Case(["targets", "show", _write(folder, "arm64.toml", content)])


def reports(rng: random.Random, folder: Path, honest: Honest) -> Case:
    (folder / "out").mkdir()
    text = hostile.damage_json(honest.report, rng).encode("utf-8", "surrogatepass")
    (folder / "out" / "report.json").write_bytes(text if rng.random() < 0.8 else hostile.damage(text, rng))
    if rng.random() < 0.3:
        return Case(["report", "out", "--html", "out/new.html"])
    return Case(["report", "out"])


def device_answers(rng: random.Random, folder: Path, honest: Honest) -> Case:
    command = rng.choice(list(honest.answers))
    reply: dict[str, Any] = {"schema_version": 1, "result": honest.answers[command]}
    if rng.random() < 0.15:
        reply = {"schema_version": 1, "error": {"kind": "x", "message": rng.choice(hostile.TEXTS)}}
    text = RESULT_MARK + hostile.damage_json(reply, rng)
    data = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.2:
        data = hostile.damage(data, rng)
    _write(folder, "net.onnx", honest.onnx)
    _write(folder, "answer", data + b"\n")
    script = rng.choice(("cat answer", "cat answer", "cat answer answer", "cat answer; exit 3", "kill -9 $$",
                         "cat answer >&2", "head -c 70000000 /dev/zero", "printf '\\033[2J' >&2; exit 1"))  # fmt: skip
    _write(folder, DEVICE, f"cat >/dev/null; {script}\n".encode())
    return Case(["device", command], frozenset((0, 1)))


_OPTIONS = (
    "--target --data --labels --split --signals --strategies --ranges --kinds --input-sizes --recover --select --macs "
    "--max-drop --latency --speedup --size --host --precision --formats --seed --keep --judge --mean --std "
    "--preprocess --scale --layout --input --input-size --arch --metric --epochs"
).split()


def options(rng: random.Random, folder: Path, honest: Honest) -> Case:
    _write(folder, "net.onnx", honest.onnx)
    argv = ["prune-export", "net.onnx", "--out", "out", "--no-bench", "--data", "missing"]
    for name in rng.sample(_OPTIONS, rng.choice((1, 2))):
        value = rng.choice(
            (rng.choice(hostile.TEXTS)[:3000], str(rng.choice(hostile.NUMBERS)), "9" * 4000, "1," * 500, "1e999")
        )
        argv += [name, value.replace("\x00", "")]
    return Case(argv)


def paths(rng: random.Random, folder: Path, honest: Honest) -> Case:
    """What is no plain file, and names that lie, where a model, images, labels, a profile or a report is expected."""
    _write(folder, "net.onnx", honest.onnx)
    name = rng.choice(("a", "a\x1b[2J", "a\u202e", "a\nb", os.fsdecode(b"a\xff")))
    suffix = rng.choice((".pt", ".pt2", ".onnx", ".safetensors", "", ".npz", ".npy", ".tar", ".json", ".toml"))
    path = folder / (name + suffix)
    kind = rng.randrange(8)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.symlink_to("/dev/zero")
    elif kind == 2:
        path.mkdir()
    elif kind == 3:
        path.symlink_to(path)
    elif kind == 4:
        path.write_bytes(b"")
    elif kind == 5:
        path.write_bytes(rng.randbytes(100))
    elif kind == 6:
        path.symlink_to(rng.choice(("/dev/random", "/dev/stdin", "/proc/self/mem", "/proc/kcore", "/", "/proc")))
    given = path.name
    if rng.random() < 0.1:
        given = rng.choice(("", "a" * 5000, "a\x1b]0;x\x07", "..", ".", "timm:" + "x" * 1000, "timm:\x1b[2J", "timm:"))
    return Case(rng.choice((
        ["load", given], ["load", given], ["inspect", given], ["evaluate", "net.onnx", "--data", given],
        ["labels", given], ["targets", "show", given], ["report", given], ["bench", given],
        ["prune-export", given, "--out", "out", "--no-bench"],
        ["prune-export", "net.onnx", "--out", given, "--no-bench", "--data", "missing"],
        ["prune-export", "net.onnx", "--out", "out", "--no-bench", "--data", given, "--metric", "missing.py:f"],
    )))  # fmt: skip


def folders(rng: random.Random, folder: Path, honest: Honest) -> Case:
    """A folder of the user's as --out: with their files, links, or damaged files of ours."""
    _write(folder, "net.onnx", honest.onnx)
    out = folder / "out"
    (out / ".mm-edge").mkdir(parents=True)
    _write(out, "mine.txt", b"precious")
    kind = rng.randrange(5)
    if kind == 0:
        (out / ".mm-edge" / "run.json").write_bytes(
            hostile.damage_json({"tool": "mm-edge", "layout": 1}, rng).encode("utf-8", "surrogatepass")
        )
    elif kind == 1:
        (out / ".mm-edge" / "lock").symlink_to(folder / "user" / "notes.txt")
    elif kind == 2:
        (out / ".mm-edge" / "run.json").write_text('{"tool": "mm-edge", "layout": 1}')
        (out / ".mm-edge" / "owned.json").write_bytes(
            hostile.damage_json({"files": ["mine.txt", "../user/notes.txt", "/etc/hostname"]}, rng).encode(
                "utf-8", "surrogatepass"
            )
        )
        (out / "samples").symlink_to(folder / "user")
    elif kind == 3:
        _write(out, "report.json", b"{}")
        (out / ".mm-edge" / "run.json").write_text('{"tool": "mm-edge", "layout": 1}')
    argv = ["prune-export", "net.onnx", "--out", "out", "--no-bench", "--strategies", "balanced"]
    argv += [] if kind == 2 and rng.random() < 0.3 else ["--data", "missing"]  # some go on to the lock and the files
    return Case([*argv, *(["--fresh"] if rng.random() < 0.5 else [])], frozenset((2,)))


# Areas with their share of the cases.
AREAS: dict[str, tuple[Area, int]] = {
    "checkpoint: bytes": (checkpoint_bytes, 10),
    "checkpoint: members": (checkpoint_members, 6),
    "checkpoint: pickles": (checkpoint_pickles, 6),
    "checkpoint: tensors": (checkpoint_tensors, 5),
    "checkpoint: arguments": (checkpoint_arguments, 4),
    "exported program": (exported_program, 7),
    "safetensors": (safetensors_file, 7),
    "hub folder": (hub_folder, 2),
    "onnx: bytes": (onnx_bytes, 8),
    "onnx: fields": (onnx_fields, 9),
    "arrays": (arrays, 5),
    "photos and tars": (photos, 5),
    "boxes": (coco_labels, 4),
    "target profile": (target_profile, 4),
    "report": (reports, 5),
    "device answers": (device_answers, 7),
    "options": (options, 6),
    "paths": (paths, 6),
    "run folders": (folders, 3),
}


# ---- one case


def run_case(case: Case, folder: Path, runner: Runner, *, whole: bool) -> Found:
    """Run one case in its folder and return what was seen."""
    (folder / "user").mkdir()
    _write(folder / "user", "notes.txt", b"precious")
    (folder / "tmp").mkdir()
    before = _snapshot(folder)
    runner.events.write_bytes(b"")
    start = time.monotonic()
    ended = runner.run_whole(case) if whole else runner.run(case)
    seconds = time.monotonic() - start
    text = runner.output.read_bytes().decode("utf-8", "replace")
    seen = runner.events.read_text(errors="replace").splitlines()
    counted = _judge(case, ended, text, seen)
    counted += ["memory"] * (ended.peak_bytes > runner.honest_bytes + MEMORY_BYTES or _MEMORY.search(text) is not None)
    counted += ["executed"] * ((folder / hostile.CANARY).exists() or (folder / "user" / hostile.CANARY).exists())
    after = _snapshot(folder)
    counted += ["touched"] * any(after.get(name) != digest for name, digest in before.items())
    return Found(sorted(set(counted)), seconds, ended.code, ended.peak_bytes, text[-1500:], seen)


class Runner:
    """Runs command lines in the folder `case`, in a fork that serves CASES_PER_FORK of them and is under the caps."""

    def __init__(self, work: Path, honest_bytes: int) -> None:
        self.honest_bytes = honest_bytes
        self.folder, self.events, self.output = work / "case", work / "case.events", work / "case.output"
        self._process = 0
        self._served = 0
        self._ask, self._answers = -1, -1

    def run(self, case: Case) -> Ended:
        if not self._process or self._served == CASES_PER_FORK:
            self.stop()
            self._start()
        self._served += 1
        os.write(self._ask, json.dumps(case.argv).encode() + b"\n")
        slow = not is_ready(self._answers, self._process, LIMIT_S)
        answer = b"" if slow else os.read(self._answers, 4096)
        if answer:
            code, peak = json.loads(answer)
            return Ended(code, peak, False)
        return self._kill(slow)

    def run_whole(self, case: Case) -> Ended:
        """Run a command from the start of Python."""
        self.stop()
        process = os.fork()
        if not process:
            self._become(case)
        handle = os.pidfd_open(process)
        slow = not is_ready(handle, process, STARTS * LIMIT_S)
        os.close(handle)
        self._process = process
        return self._kill(slow)

    def stop(self) -> None:
        """End the fork, if there is one."""
        if self._process:
            self._kill(False)

    def _kill(self, slow: bool) -> Ended:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process, signal.SIGKILL)  # with what it left running
        _, status, usage = os.wait4(self._process, 0)
        for number in (self._ask, self._answers):
            if number >= 0:
                os.close(number)
        self._process, self._ask, self._answers = 0, -1, -1
        return Ended(os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024, slow)

    def _start(self) -> None:
        asked, self._ask = os.pipe()
        self._answers, answering = os.pipe()
        self._served = 0
        self._process = os.fork()
        if not self._process:
            try:
                self._serve(asked, answering)
            finally:
                os._exit(71)
        os.close(asked)
        os.close(answering)

    def _prepare(self) -> None:
        """Set this process's caps and surroundings."""
        os.setpgid(0, 0)
        place = str(self.folder / "tmp")
        os.environ.update(TMPDIR=place, TORCHINDUCTOR_CACHE_DIR=place, HOME=place, COLUMNS="200")
        tempfile.tempdir = None
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        limits = {resource.RLIMIT_AS: used + CAP_BYTES, resource.RLIMIT_FSIZE: 1 << 30, resource.RLIMIT_CORE: 0}
        for kind, limit in limits.items():
            resource.setrlimit(kind, (limit, limit))
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    def _redirect(self) -> None:
        file = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)
        os.chdir(self.folder)

    def _become(self, case: Case) -> None:
        try:
            self._prepare()
            self._redirect()
            places = os.pathsep.join((str(ROOT / "benchmarks" / "attack_start"), str(ROOT)))
            told = {"ATTACK_EVENTS": str(self.events), "ATTACK_ALLOWED": str(self.folder), "ATTACK_PROGRAM": DEVICE}
            argv = [sys.executable, "-m", "mm_edge.cli", *case.argv]
            os.execve(sys.executable, argv, {**os.environ, **told, "PYTHONPATH": places})
        finally:
            os._exit(71)

    def _serve(self, asked: int, answering: int) -> None:
        self._prepare()
        self._redirect()
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        requests = os.fdopen(asked)
        watch(os.open(self.events, os.O_WRONLY | os.O_APPEND), str(self.folder), DEVICE)
        while line := requests.readline():
            self._redirect()
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            code = run_command(json.loads(line))
            found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
            os.write(answering, json.dumps([code, int(found[1]) * 1024 if found else 0]).encode())


def is_ready(handle: int, process: int, limit_s: float) -> bool:
    """Wait until `handle` can be read; return False after `limit_s` in which `process` ran or did not ask to."""
    start, waited = time.monotonic(), seconds_in_queue(process)
    while (left := limit_s - (time.monotonic() - start) + seconds_in_queue(process) - waited) > 0:
        if select.select([handle], [], [], max(left, 0.1))[0]:
            return True
    return False


def seconds_in_queue(process: int) -> float:
    """Return how long a process has waited for a processor; 0 where the system does not tell."""
    try:
        return int(Path(f"/proc/{process}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def run_command(argv: list[str]) -> int:
    """Run the command line in this process; return its exit code, 70 for an exception that it let out."""
    faulthandler.dump_traceback_later(LIMIT_S - 2, file=sys.stderr)  # says where a slow case is
    try:
        cli.main(argv, prog_name="mm-edge", standalone_mode=True)
        return 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
        return 70
    finally:
        faulthandler.cancel_dump_traceback_later()
        sys.stdout.flush()
        sys.stderr.flush()


def _judge(case: Case, ended: Ended, text: str, events: list[str]) -> list[str]:
    counted = [line.partition(" ")[0] for line in events]
    code = ended.code
    if ended.slow:
        return [*counted, "slow"]
    died = code < 0 or code == 71
    if "Traceback (most recent call last)" in text or died or code == 70:
        counted.append("traceback")
    elif code not in case.codes:
        counted.append("code")
    if code:
        lines = [line for line in text.splitlines() if line.startswith("mm-edge: error:")]
        if len(lines) != 1 or len(lines[0]) > LONGEST + 20 or text.rstrip("\n").splitlines()[-1] != lines[0]:
            counted.append("code")
    if _RAW.search(text):
        counted.append("escape")
    return counted


def _snapshot(folder: Path) -> dict[str, str]:
    """Return what every file outside tmp/ is, so that a change of it shows."""
    found = {}
    for place, folders_, files in os.walk(folder):
        if Path(place) == folder:
            folders_.remove("tmp")
        for name in (*files, *folders_):
            path = Path(place) / name
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                found[str(path)] = str(path.readlink())
            elif stat.S_ISREG(mode):
                found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                found[str(path)] = str(stat.S_IFMT(mode))
    return found


# ---- all of them


def make_case(area: str, rng: random.Random, folder: Path, honest: Honest) -> Case:
    return AREAS[area][0](rng, folder, honest)


def is_whole(case: Case, number: int, every: int) -> bool:
    """Whether the case runs from the start of Python; commands of the benchmark do not exist there."""
    return number % every == every - 1 and case.argv[0] not in COMMANDS


def show(number: int, area: str, case: Case, found: Found, longest: int) -> dict[str, Any]:
    """Return what is printed and recorded of a case."""
    return {
        "number": number,
        "area": area,
        "argv": [item[:80] for item in case.argv],
        "counted": found.counted,
        "code": found.code,
        "seconds": round(found.seconds, 2),
        "events": found.events[:3],
        "output": found.output[-longest:],
    }


@dataclass
class Tally:
    """What was counted so far."""

    command: str
    began: float
    tried: Counter[str] = field(default_factory=Counter)
    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    codes: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    failures: list[dict[str, Any]] = field(default_factory=list)
    slowest_s: float = 0.0
    largest_bytes: int = 0
    wholes: int = 0

    def add(self, area: str, found: Found, whole: bool, honest_bytes: int) -> None:
        self.tried[area] += 1
        self.wholes += whole
        self.counts[area].update(found.counted)
        self.codes[area][found.code] += 1
        self.slowest_s = max(self.slowest_s, found.seconds)
        self.largest_bytes = max(self.largest_bytes, found.peak_bytes - honest_bytes)

    def go_on(self, found: dict[str, Any]) -> None:
        """Start from what `summarise` returned earlier."""
        if found["command"] != self.command:
            raise SystemExit(f"the record is of '{found['command']}'")
        for area, row in found["by_area"].items():
            self.tried[area] = row["cases"]
            self.counts[area].update({kind: row[kind] for kind in KINDS})
            self.codes[area].update({int(code): count for code, count in row["exit_codes"].items()})
        self.failures, self.wholes = found["failures"], found["as_whole_processes"]
        self.slowest_s, self.largest_bytes = found["slowest_s"], found["largest_bytes_above_start"]
        self.began -= found["seconds"]

    def summarise(self) -> dict[str, Any]:
        total = Counter[str]()
        for counter in self.counts.values():
            total.update(counter)
        return {
            "command": self.command,
            "cases": sum(self.tried.values()),
            "as_whole_processes": self.wholes,
            "counted": {kind: total[kind] for kind in KINDS},
            "by_area": {
                area: {
                    "cases": self.tried[area],
                    **{kind: self.counts[area][kind] for kind in KINDS},
                    "exit_codes": {str(code): count for code, count in sorted(self.codes[area].items())},
                }
                for area in AREAS
            },
            "slowest_s": round(self.slowest_s, 1),
            "largest_bytes_above_start": self.largest_bytes,
            "seconds": round(time.monotonic() - self.began),
            "machine": f"{platform.system()} {platform.machine()}, under other load",
            "versions": {"mm_edge": mm_edge.__version__, "torch": torch.__version__, "onnx": onnx.__version__},
            "failures": self.failures[:200],
        }


def run(work: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run every case; the counts so far are written each RECORDED_EVERY cases."""
    honest = Honest(work)
    cli.commands.update(COMMANDS)
    warm_up(work, honest)
    gc.collect()
    gc.freeze()  # a collection in a fork would copy every page
    runner = Runner(work, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    names = [name for name, (_, share) in AREAS.items() for _ in range(share)]
    tally = Tally(f"python benchmarks/attacks.py --cases {args.cases} --seed {args.seed}", time.monotonic())
    if args.go_on:
        tally.go_on(json.loads(args.record.read_text()))
    for number in args.only or range(sum(tally.tried.values()), args.cases):
        rng = random.Random(f"{args.seed}:{number}")
        area = names[rng.randrange(len(names))]
        if args.area is not None and args.area not in area:
            continue
        folder = work / "case"
        folder.mkdir()
        case = make_case(area, rng, folder, honest)
        whole = is_whole(case, number, args.whole_every)
        found = run_case(case, folder, runner, whole=whole)
        shutil.rmtree(folder)
        tally.add(area, found, whole, runner.honest_bytes)
        if found.counted or args.show:
            shown = show(number, area, case, found, args.keep_output)
            tally.failures += [shown] if found.counted else []
            print(json.dumps(shown), file=sys.stderr, flush=True)
        if number % RECORDED_EVERY == RECORDED_EVERY - 1:
            print(f"{number + 1} cases, {len(tally.failures)} counted", file=sys.stderr, flush=True)
            args.record.write_text(json.dumps(tally.summarise(), indent=1) + "\n")
    runner.stop()
    return tally.summarise()


def warm_up(work: Path, honest: Honest) -> None:
    """Run the honest files once in this process, so that forks have everything imported."""
    torch.set_num_threads(1)
    for module in pkgutil.walk_packages(mm_edge.__path__, "mm_edge."):
        if not module.name.endswith("__main__") and ".formats.bundle." not in module.name:
            importlib.import_module(module.name)
    place = work / "honest"
    place.mkdir()
    (place / "net.py").write_text(hostile.NETWORK)
    contents = {
        "net.pt": honest.zip,
        "net.safetensors": honest.safetensors,
        "net.pt2": honest.pt2,
        "net.onnx": honest.onnx,
    }
    for name, content in contents.items():
        (place / name).write_bytes(content)
        arch = f"{place}/net.py:Net" if name in ("net.pt", "net.safetensors") else None
        load_model(str(place / name), LoadOptions(arch=arch, input_size=(3, 16, 16)))
    for argv in (
        ["inspect", str(place / "net.onnx")],
        ["evaluate", str(place / "net.onnx"), "--data", str(honest.photos)],
    ):
        cli.main(argv, prog_name="mm-edge", standalone_mode=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--whole-every", type=int, default=250, help="One case in this many runs from the start of Python."
    )
    parser.add_argument("--go-on", action="store_true", help="Go on from the cases that are recorded.")
    parser.add_argument("--area", help="Only areas whose name holds this.")
    parser.add_argument("--only", type=int, nargs="+", help="Only cases of these numbers.")
    parser.add_argument("--show", action="store_true", help="Print every case.")
    parser.add_argument("--keep-output", type=int, default=400)
    parser.add_argument("--record", type=Path, default=ROOT / "benchmarks" / "results" / "attacks.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run(Path(folder).resolve(), args)
    args.record.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({name: value for name, value in found.items() if name != "failures"}, indent=1))
    if any(found["counted"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()

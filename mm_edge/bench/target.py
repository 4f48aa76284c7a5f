"""Target profiles: what a device can do, and at which channel counts it is fast.

A profile is one TOML file. The packaged profiles are in `targets/` at the top of the repository, and in
`mm_edge/targets/` when mm-edge is installed. A user gives the path of another one, or keeps it in the `targets` folder
of mm-edge's configuration directory. Parsing validates the whole file once, and an error names the line.

    name = "my-board"                     # the file's stem
    description = "one line"
    isa = "aarch64"                       # x86_64, aarch64, or host (this machine, filled in when used)
    features = ["asimddp"]                # flags of /proc/cpuinfo the profile relies on
    cpu_parts = ["0x41/0xd0b"]            # optional: ARM implementer/part, for a profile of one board
    data_types = ["fp32", "int8"]         # the types that have fast kernels there
    n_m = ["2:4"]                         # n:m patterns the runtime has kernels for
    threads = "auto"                      # or a number; auto is one fewer than the physical cores, at most four
    affinity = []                         # core numbers, empty for any
    provider = "CPUExecutionProvider"
    python = ["python3"]                  # the command that starts Python there, for ssh
    transport = "local"                   # how to reach it without --host: a name of transports.TRANSPORTS
    [session_options]                     # ONNX Runtime configuration entries, all strings
    [multiples.conv]                      # one table for each of OP_CLASSES: channel multiple per data type
    fp32 = 8
    int8 = 16
    [budget]                              # optional: memory_bytes, storage_bytes
    [sources]                             # where each claim comes from
    multiples = "..."
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import click

from mm_edge.bench import worker  # reads the features of this machine; it imports nothing from mm_edge
from mm_edge.bench.transports import TRANSPORTS
from mm_edge.errors import TargetError, reading, unknown_name

OP_CLASSES = ("conv", "pointwise", "depthwise", "grouped", "matmul")
DATA_TYPES = ("fp32", "int8", "fp16", "bf16")
REQUIRED_DATA_TYPES = ("fp32", "int8")
ISAS = ("x86_64", "aarch64", "host")
SOURCED_CLAIMS = ("multiples", "data_types", "n_m", "threads")
MAX_MULTIPLE = 256
MAX_THREADS = 256
LONGEST_PROFILE = 1 << 20  # bytes

_PACKAGE = Path(__file__).parent.parent
# An installed package holds the profiles as mm_edge/targets; in a checkout they lie beside the package.
_PACKAGED = next((path for path in (_PACKAGE / "targets", _PACKAGE.parent / "targets") if path.is_dir()), _PACKAGE)


@dataclass(frozen=True)
class Target:
    """One device profile; see the module's text for the meaning of each field."""

    name: str
    description: str
    isa: str
    features: tuple[str, ...]
    data_types: tuple[str, ...]
    multiples: dict[str, dict[str, int]]
    sources: dict[str, str]
    cpu_parts: tuple[str, ...] = ()
    n_m: tuple[str, ...] = ()
    threads: int | str = "auto"
    affinity: tuple[int, ...] = ()
    provider: str = "CPUExecutionProvider"
    python: tuple[str, ...] = ("python3",)
    transport: str = "local"
    session_options: dict[str, str] = field(default_factory=dict)
    memory_bytes: int | None = None
    storage_bytes: int | None = None

    def multiple(self, op_class: str, data_type: str) -> int:
        """Return the channel multiple of `op_class` in `data_type`; a type without an entry has that of fp32.

        Raises:
            TargetError: `op_class` is not in OP_CLASSES.
        """
        if op_class not in OP_CLASSES:
            raise TargetError(unknown_name("operator class", op_class, OP_CLASSES))
        table = self.multiples[op_class]
        return table.get(data_type, table["fp32"])


def pattern_options(target: Target) -> dict[str, str]:
    """Return the options that make ONNX Runtime's provider use 2:4 kernels on `target`; empty where it has none.

    TensorRT has sparse kernels for fp16 and int8 only, so fp16 is allowed, for the dense model too.
    """
    if not target.n_m or target.provider != "TensorrtExecutionProvider":
        return {}
    return {"trt_fp16_enable": "1", "trt_sparsity_enable": "1"}


def user_folder() -> Path:
    """Return the folder where a user's own profiles are looked for."""
    return Path(click.get_app_dir("mm-edge")) / "targets"


def list_targets() -> list[str]:
    """Return the names of every profile, packaged and the user's own, sorted."""
    return sorted(_profile_paths())


def load_target(name_or_path: str) -> Target:
    """Return the profile of that name, or of that .toml file.

    Raises:
        TargetError: no such profile (the nearest names are given), or the file is invalid (the line is given).
    """
    paths = _profile_paths()
    if name_or_path in paths:
        return parse_target(paths[name_or_path])
    path = Path(name_or_path)
    if path.suffix == ".toml" or len(path.parts) > 1:
        if not path.is_file():
            raise TargetError(f"target file '{name_or_path}' does not exist; see 'mm-edge targets list'")
        return parse_target(path)
    raise TargetError(unknown_name("target", name_or_path, sorted(paths)))


def profile_path(name: str) -> Path:
    """Return the file of the profile called `name`; TargetError if there is none."""
    paths = _profile_paths()
    if name not in paths:
        raise TargetError(unknown_name("target", name, sorted(paths)))
    return paths[name]


def _profile_paths() -> dict[str, Path]:
    paths = {path.stem: path for path in sorted(_PACKAGED.glob("*.toml"))}
    own = user_folder()
    for path in sorted(own.glob("*.toml")) if own.is_dir() else ():
        if path.stem in paths:
            raise TargetError(f"{path} has the name of a packaged target; rename it (and its 'name')")
        paths[path.stem] = path
    return paths


def resolve_host(target: Target, isa: str | None = None, flags: Iterable[str] | None = None) -> Target:
    """Return the profile `host` with the ISA filled in, from this machine or from a device's `isa` and `flags`.

    Multiples, data types and sources are taken from the most specific generic profile whose ISA and features the
    machine has (AVX-512 VNNI, AVX-512, AVX2, arm64); if there is none, they stay as `host` states them. A profile of
    any other name is returned unchanged.
    """
    if target.isa != "host":
        return target
    isa = isa or worker.isa()
    have = set(_machine_flags() if flags is None else flags)
    best = _most_specific(isa, have)
    if best is None:
        return dataclasses.replace(target, isa=isa)
    return dataclasses.replace(
        target,
        isa=isa,
        features=best.features,
        data_types=best.data_types,
        multiples=best.multiples,
        sources={**best.sources, "profile": f"channel multiples of {best.name}, chosen by this machine's ISA flags"},
    )


def unfit_multiples(target: Target, machine: Mapping[str, Any]) -> str | None:
    """Return a sentence on the multiples of `target` that leave part of the CPU of `machine` unused, or None.

    `machine` is an info record. A profile that names the machine's own core is not questioned, because it is more
    precise than the generic profiles.
    """
    best = _most_specific(machine["isa"], set(machine["flags"])) if target.provider == Target.provider else None
    if best is None or set(machine["cpu_parts"]) & set(target.cpu_parts):
        return None
    found = [
        f"{op_class} {data_type} {best.multiple(op_class, data_type)}, not {target.multiple(op_class, data_type)}"
        for op_class in OP_CLASSES
        for data_type in REQUIRED_DATA_TYPES
        if target.multiple(op_class, data_type) % best.multiple(op_class, data_type)
    ]
    return f"this CPU rewards other channel multiples ({best.name}): {'; '.join(found)}" if found else None


def _most_specific(isa: str, flags: set[str]) -> Target | None:
    fitting = [p for p in _generic_profiles() if p.isa == isa and flags.issuperset(p.features)]
    return max(fitting, key=lambda profile: len(profile.features), default=None)


def matches_this_machine(target: Target) -> bool:
    """Return whether this machine is a `target`, so that latency can be measured here.

    ISA, features, core type and provider must fit. A profile with another transport than "local" must name its core:
    the ISA alone does not tell, for example, a board from a server.
    """
    if target.transport != "local" and not target.cpu_parts:
        return False
    return not mismatches(target, this_machine())


def this_machine() -> dict[str, Any]:
    """Return the worker's record of this machine."""
    return _this_machine()


def mismatches(target: Target, machine: Mapping[str, Any]) -> list[str]:
    """Return one sentence for each way in which `machine` (an info record) differs from `target`."""
    found = []
    if target.isa not in ("host", machine["isa"]):
        found.append(f"the machine is {machine['isa']}, the profile {target.name} describes {target.isa}")
        return found
    missing = [flag for flag in target.features if flag not in machine["flags"]]
    if missing:
        found.append(f"the CPU lacks {', '.join(missing)}, which the profile {target.name} relies on")
    parts = machine["cpu_parts"]
    if target.cpu_parts and not set(parts) & set(target.cpu_parts):
        seen = ", ".join(parts) or "not reported"
        found.append(f"the cores are {seen}, those of {target.name} are {', '.join(target.cpu_parts)}")
    if target.provider not in machine["providers"]:
        have = ", ".join(machine["providers"]) or "none"
        found.append(f"onnxruntime there lacks {target.provider} (it has {have})")
    return found


@cache
def _this_machine() -> dict[str, Any]:
    return worker.describe_machine()


def _machine_flags() -> list[str]:
    return list(this_machine()["flags"])


@cache
def _generic_profiles() -> tuple[Target, ...]:
    profiles = [parse_target(path) for path in sorted(_PACKAGED.glob("*.toml"))]
    return tuple(p for p in profiles if p.isa != "host" and p.transport == "local" and not p.cpu_parts)


# --- parsing --------------------------------------------------------------------------------------------------------


def parse_target(path: Path) -> Target:
    """Parse and validate one profile file.

    Raises:
        TargetError: the file cannot be read or is not TOML, or a field is unknown, missing or wrong; the message
            gives file and line.
    """
    try:
        if path.stat().st_size > LONGEST_PROFILE:
            raise TargetError(
                f"{path}: {path.stat().st_size} bytes are no profile; they have at most {LONGEST_PROFILE}"
            )
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TargetError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    with reading(str(path), TargetError):
        return _Parser(path, text).parse()


class _Parser:
    """Turns one file's text into a Target; keeps the line of every key for the error messages."""

    def __init__(self, path: Path, text: str) -> None:
        self._path = path
        self._lines = _key_lines(text)
        try:
            self._data: dict[str, Any] = tomllib.loads(text)
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, or lists a thousand deep
            reason = "nested too deep" if isinstance(error, RecursionError) else error
            raise TargetError(f"{path}: not valid TOML: {reason}") from error

    def parse(self) -> Target:
        known = {f.name for f in dataclasses.fields(Target)} - {"memory_bytes", "storage_bytes"} | {"budget"}
        for key in self._data:
            if key not in known:
                raise self._error(key, unknown_name("key", key, sorted(known)))
        budget = self._table("budget", ("memory_bytes", "storage_bytes"), int)
        target = Target(
            name=self._string("name"),
            description=self._string("description"),
            isa=self._choice("isa", ISAS),
            features=self._strings("features"),
            data_types=self._strings("data_types", DATA_TYPES),
            multiples=self._multiples(),
            sources=self._table("sources", None, str),
            cpu_parts=self._strings("cpu_parts", default=()),
            n_m=self._strings("n_m", default=()),
            threads=self._threads(),
            affinity=self._affinity(),
            provider=self._string("provider", Target.provider),
            python=self._strings("python", default=Target.python),
            transport=self._choice("transport", tuple(TRANSPORTS), Target.transport),
            session_options=self._table("session_options", None, str),
            memory_bytes=budget.get("memory_bytes"),
            storage_bytes=budget.get("storage_bytes"),
        )
        self._check_whole(target)
        return target

    def _check_whole(self, target: Target) -> None:
        if target.name != self._path.stem:
            raise self._error("name", f"name is '{target.name}', but the file is called {self._path.name}")
        for claim in SOURCED_CLAIMS:
            if not target.sources.get(claim, "").strip():
                raise self._error("sources", f"sources.{claim} is missing: say where the claim comes from")
        if not target.python:
            raise self._error("python", "python is empty: name the command that starts Python there")
        for pattern in target.n_m:
            if not re.fullmatch(r"[1-9]\d*:[1-9]\d*", pattern) or not _is_n_of_m(pattern):
                raise self._error("n_m", f"n_m '{pattern}' is not N:M with N below M, such as 2:4")

    def _error(self, key: str, message: str) -> TargetError:
        line = self._lines.get(key)
        while line is None and "." in key:
            key = key.rpartition(".")[0]
            line = self._lines.get(key)
        return TargetError(f"{self._path}:{line or 1}: {message}")

    def _get(self, key: str, kind: type, default: Any) -> Any:
        value = self._data.get(key, default)
        if value is None:
            raise self._error(key, f"{key} is missing")
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self._error(key, f"{key} must be {_KIND_NAMES[kind]}, not {value!r}")
        return value

    def _string(self, key: str, default: str | None = None) -> str:
        value = str(self._get(key, str, default))
        if not value.strip():
            raise self._error(key, f"{key} is empty")
        return value

    def _choice(self, key: str, allowed: tuple[str, ...], default: str | None = None) -> str:
        value = self._string(key, default)
        if value not in allowed:
            raise self._error(key, unknown_name(key, value, allowed))
        return value

    def _strings(
        self, key: str, allowed: tuple[str, ...] | None = None, default: tuple[str, ...] | None = None
    ) -> tuple[str, ...]:
        values = self._get(key, list, None if default is None else list(default))
        for value in values:
            if not isinstance(value, str):
                raise self._error(key, f"{key} must hold strings, not {value!r}")
            if allowed and value not in allowed:
                raise self._error(key, unknown_name(key, value, allowed))
        return tuple(values)

    def _threads(self) -> int | str:
        value = self._data.get("threads", "auto")
        good = value == "auto" or (type(value) is int and 1 <= value <= MAX_THREADS)
        if not good:
            raise self._error("threads", f"threads must be 'auto' or 1 to {MAX_THREADS}, not {value!r}")
        return int(value) if value != "auto" else "auto"

    def _affinity(self) -> tuple[int, ...]:
        values = self._get("affinity", list, [])
        if any(type(value) is not int or value < 0 for value in values):
            raise self._error("affinity", f"affinity must hold core numbers from 0, not {values!r}")
        return tuple(values)

    def _table(self, key: str, allowed: tuple[str, ...] | None, kind: type) -> dict[str, Any]:
        table = self._get(key, dict, {})
        for name, value in table.items():
            if allowed and name not in allowed:
                raise self._error(f"{key}.{name}", unknown_name(f"{key} key", name, allowed))
            if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and value <= 0):
                raise self._error(f"{key}.{name}", f"{key}.{name} must be {_KIND_NAMES[kind]}, not {value!r}")
        return dict(table)

    def _multiples(self) -> dict[str, dict[str, int]]:
        table = self._get("multiples", dict, None)
        for op_class in table:
            if op_class not in OP_CLASSES:
                raise self._error(f"multiples.{op_class}", unknown_name("operator class", op_class, OP_CLASSES))
        result = {}
        for op_class in OP_CLASSES:
            row = table.get(op_class)
            if not isinstance(row, dict):
                raise self._error("multiples", f"multiples.{op_class} is missing")
            result[op_class] = {key: self._multiple(op_class, key, value) for key, value in row.items()}
            for data_type in REQUIRED_DATA_TYPES:
                if data_type not in row:
                    raise self._error(f"multiples.{op_class}", f"multiples.{op_class}.{data_type} is missing")
        return result

    def _multiple(self, op_class: str, data_type: str, value: Any) -> int:
        key = f"multiples.{op_class}.{data_type}"
        if data_type not in DATA_TYPES:
            raise self._error(key, unknown_name("data type", data_type, DATA_TYPES))
        if type(value) is not int or not 1 <= value <= MAX_MULTIPLE:
            raise self._error(key, f"{key} must be a whole number from 1 to {MAX_MULTIPLE}, not {value!r}")
        return value


_KIND_NAMES: dict[type, str] = {str: "a string", list: "a list", dict: "a table", int: "a positive whole number"}


def _is_n_of_m(pattern: str) -> bool:
    n, m = pattern.split(":")
    return int(n) < int(m)


def _key_lines(text: str) -> dict[str, int]:
    """Return the line of each dotted key and table header; tomllib keeps no positions."""
    lines: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), start=1):
        header = re.match(r"\s*\[([^\[\]]+)\]", line)
        pair = re.match(r"""\s*(?:"([^"]*)"|([\w.-]+))\s*=""", line)
        if header:
            table = header.group(1).strip()
            lines.setdefault(table, number)
        elif pair:
            key = pair.group(1) or pair.group(2)
            lines.setdefault(f"{table}.{key}" if table else key, number)
    return lines

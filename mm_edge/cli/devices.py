"""The commands that measure and describe devices: `mm-edge bench` and `mm-edge targets`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mm_edge.bench import qemu, worker
from mm_edge.bench.audit import Audit, audit_model
from mm_edge.bench.connect import missing, open_transport
from mm_edge.bench.host import describe
from mm_edge.bench.pattern import PatternTime, time_pattern_layers
from mm_edge.bench.session import (
    EMULATED,
    MINIMUM_PAIRS,
    Measurement,
    compare_outputs,
    environment,
    measure_footprint,
    measure_null,
    measure_pair,
    merge_doubts,
    read_info,
)
from mm_edge.bench.target import (
    OP_CLASSES,
    Target,
    list_targets,
    load_target,
    matches_this_machine,
    mismatches,
    parse_target,
    profile_path,
    resolve_host,
    user_folder,
)
from mm_edge.bench.transport import LocalTransport, Transport
from mm_edge.errors import BenchError, TargetError, UsageError
from mm_edge.plan.n_m import pattern_options
from mm_edge.records import Parity, to_json

BENCH_SCHEMA_VERSION = 1
NOISE_INPUTS = 8


@dataclass(frozen=True)
class _Job:
    """One `bench` command: what to measure, on what, and what to keep."""

    models: tuple[Path, ...]
    target: Target
    transport: Transport
    pairs: int
    samples: Path | None
    audit: bool


@click.command("bench")
@click.argument(
    "models", metavar="MODEL.onnx [MORE.onnx ...]", nargs=-1, required=True, type=click.Path(path_type=Path)
)
@click.option("--target", "target_name", default="host", show_default=True, help="Profile: threads, provider, options.")
@click.option("--host", metavar="USER@HOST", help="Measure on this device, through ssh; 'qemu' emulates.")
@click.option("--pairs", default=MINIMUM_PAIRS, show_default=True, type=click.IntRange(20, 100_000))
@click.option("--samples", type=click.Path(path_type=Path, file_okay=False), help="Keep raw samples in this folder.")
@click.option("--audit", is_flag=True, help="Name the kernel of each convolution and matrix product, and why.")
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON document on standard output, the rest on standard error."
)
def bench(
    models: tuple[Path, ...],
    target_name: str,
    host: str | None,
    pairs: int,
    samples: Path | None,
    audit: bool,
    as_json: bool,
) -> None:
    """Measure latency and memory of ONNX models; the first is what the others are compared with.

    With --audit, the graphs as ONNX Runtime optimised them are kept in the --samples folder (default: mm-edge-audit).
    """
    for model in models:
        if not model.is_file():
            raise UsageError(f"model '{model}' does not exist")
    profile = load_target(target_name)
    with open_transport(profile, host, _tell) as transport:
        info = read_info(transport)
        target = resolve_host(profile, info["isa"], info["flags"])
        document = _measure_all(_Job(models, target, transport, pairs, samples, audit))
    if as_json:
        click.echo(json.dumps(to_json(document), indent=2))
    else:
        _print_bench(document)


def _measure_all(job: _Job) -> dict[str, Any]:
    machine = environment(job.target, job.transport)
    pairs = []
    with Console(stderr=True).status("measuring the harness itself") as status:
        null_ms = measure_null(job.target, transport=job.transport)
        others = job.models[1:] or job.models[:1]
        for index, model in enumerate(others, start=1):
            status.update(f"{escape(model.name)} ({index} of {len(others)})")
            pairs.append(_measure_one(job, model, index, machine["fingerprint"]))
        status.update("memory and cold start")
        rows = [_row(job, model) for model in job.models]
        status.update("kernels")
        audits = {model.name: _audit(job, model, machine) for model in job.models if job.audit}
        status.update("2:4 layer by layer")
        layers, why = _time_patterns(job)
    rows[0] |= {"latency_ms": pairs[0].dense_latency}
    for row, pair in zip(rows[1:], pairs if len(job.models) > 1 else (), strict=True):
        row |= {
            "latency_ms": pair.latency,
            "dense_latency_ms": pair.dense_latency,
            "speedup": pair.speedup,
            "speedup_ci": pair.speedup_ci,
            "samples_file": pair.samples_file,
        }
    return {
        "schema_version": BENCH_SCHEMA_VERSION,
        "target": job.target,
        "environment": machine,
        "harness_ms": null_ms,
        "pairs": job.pairs,
        "models": rows,
        "audit": audits if job.audit else None,
        "n_m_layers": layers,
        "warnings": [*machine["doubts"], *merge_doubts(pairs), *why],
    }


def _measure_one(job: _Job, model: Path, index: int, fingerprint: str) -> Measurement:
    raw = job.samples / f"{index:03}-{model.stem}.json" if job.samples else None
    return measure_pair(
        job.models[0],
        model,
        job.target,
        transport=job.transport,
        pairs=job.pairs,
        raw_samples=raw,
        fingerprint=fingerprint,
    )


def _time_patterns(job: _Job) -> tuple[dict[str, list[PatternTime]], list[str]]:
    """Return, by model, its 2:4 layers against dense ones where the target runs the pattern, and what to warn of."""
    found: dict[str, list[PatternTime]] = {}
    notes: list[str] = []
    for model in job.models if job.target.n_m else ():
        rows, why = time_pattern_layers(model, job.target, job.transport)
        if rows:
            found[model.name] = rows
        notes += [why] if why else []
    if pattern_options(job.target):
        notes.append("TensorRT may use fp16 for every model here, the dense one too: ratios show 2:4, not fp16")
    return found, list(dict.fromkeys(notes))


def _audit(job: _Job, model: Path, machine: dict[str, Any]) -> Audit:
    folder = job.samples or Path("mm-edge-audit")
    save_to = folder / f"{model.stem}.optimised.onnx"
    return audit_model(model, job.target, machine, transport=job.transport, save_to=save_to)


def _agreement(job: _Job, model: Path) -> Parity | None:
    """Compare an emulated device's outputs with this machine's on noise; None for a real device."""
    if job.transport.source != EMULATED.kind:
        return None
    with tempfile.TemporaryDirectory(prefix="mm-edge-noise-") as folder:
        session = worker.make_session(str(model), {"threads": 1})
        noise = [next(iter(worker.make_inputs(session, {"seed": seed}).values())) for seed in range(NOISE_INPUTS)]
        images = Path(folder) / "noise.npy"
        np.save(images, np.concatenate(noise))
        return compare_outputs(model, images, job.target, transport=job.transport, kind="noise")


def _row(job: _Job, model: Path) -> dict[str, Any]:
    on, off = (measure_footprint(model, job.target, transport=job.transport, arena=arena) for arena in (True, False))
    return {
        "model": str(model),
        "latency_ms": None,
        "dense_latency_ms": None,
        "speedup": None,
        "speedup_ci": None,
        "peak_memory_bytes": on.peak_rss_bytes,
        "peak_memory_no_arena_bytes": off.peak_rss_bytes,
        "load_ms": on.session_ms,
        "first_run_ms": on.first_run_ms,
        "file_bytes": on.file_bytes,
        "samples_file": None,
        "parity": _agreement(job, model),
    }


def _print_bench(document: dict[str, Any]) -> None:
    machine = document["environment"]
    console = Console()
    threads = document["models"][0]["latency_ms"].threads or "no measured"
    console.print(
        f"{escape(machine['cpu_model'])}, {machine['isa']}, onnxruntime {machine['onnxruntime']}, {threads} thread(s), "
        f"{document['pairs']} interleaved pairs"
    )
    latency = _table("latency, ms", ("model", "p50", "p90", "p99", "speed-up", "95 % interval"))
    footprint = _table(
        "in a fresh process", ("model", "load ms", "first run ms", "memory MB", "without arena", "file MB")
    )
    for row in document["models"]:
        name, times, interval = escape(Path(row["model"]).name), row["latency_ms"], row["speedup_ci"]
        latency.add_row(
            name,
            *(_number(value, 2) for value in (times.p50, times.p90, times.p99)),
            "1" if row["dense_latency_ms"] is None else _number(row["speedup"], 2, "x"),
            f"{interval[0]:.2f} to {interval[1]:.2f}" if interval else "",
        )
        footprint.add_row(
            name,
            *(_number(row[key], 1) for key in ("load_ms", "first_run_ms")),
            *(_megabytes(row[key]) for key in ("peak_memory_bytes", "peak_memory_no_arena_bytes", "file_bytes")),
        )
    console.print(latency, footprint)
    for row in document["models"]:
        if row["parity"] is not None:
            console.print(
                f"{escape(Path(row['model']).name)} on {document['environment']['transport']}: outputs within "
                f"{row['parity'].max_rel_err:.1e} of this machine's, top-1 agreement {row['parity'].top1_agreement:.0%}"
            )
    if document["harness_ms"] is not None:
        console.print(f"the harness itself costs {document['harness_ms'] * 1000:.1f} microseconds a run")
    for name, audit in (document["audit"] or {}).items():
        _print_audit(name, audit)
    for name, layers in document["n_m_layers"].items():
        _print_pattern(name, layers)
    for warning in document["warnings"]:
        Console(stderr=True).print(f"warning: {escape(warning)}")


def _print_audit(name: str, audit: Audit) -> None:
    table = _table(f"kernels of {name}", ("node", "kernel", "time", "weight", "why"))
    for use in audit.kernels:
        shape = " x ".join(map(str, use.weight_shape))
        table.add_row(escape(use.node), use.kernel, f"{use.share:.1%}", shape, use.reason or "")
    table.add_row("all other operators", "", f"{audit.other_share:.1%}", "", "")
    Console().print(table)
    click.echo(f"optimised graph: {audit.graph_file}")


def _print_pattern(name: str, layers: list[PatternTime]) -> None:
    table = _table(f"2:4 layers of {name}, fp16", ("node", "size", "dense us", "2:4 us", "speed-up", "why"))
    for row in layers:
        size = " x ".join("?" if part is None else str(part) for part in row.layer.size)
        times = (_number(row.dense_us, 1), _number(row.sparse_us, 1), _number(row.speedup, 2, "x"))
        table.add_row(escape(row.layer.name), size, *times, row.reason or "")
    Console().print(table)


def _table(title: str, headings: tuple[str, ...]) -> Table:
    table = Table(title=title, box=SIMPLE, title_justify="left")
    for heading in headings:
        table.add_column(
            heading, justify="left" if heading in ("model", "node", "kernel", "why") else "right", overflow="fold"
        )
    return table


def _number(value: float | None, digits: int, unit: str = "") -> str:
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def _megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:.1f}"


@click.group("targets")
def targets() -> None:
    """Device profiles: list them, show one, check a machine against one, start your own."""


@targets.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def list_command(as_json: bool) -> None:
    """List every profile and whether this machine is one."""
    profiles = [load_target(name) for name in list_targets()]
    if as_json:
        click.echo(json.dumps([{**to_json(p), "this_machine": matches_this_machine(p)} for p in profiles], indent=2))
        return
    table = Table(box=SIMPLE)
    for heading in ("target", "ISA", "threads", "transport", "here", "description"):
        table.add_column(heading, no_wrap=heading == "target")
    for profile in profiles:
        here = "yes" if matches_this_machine(profile) else ""
        table.add_row(
            profile.name, profile.isa, str(profile.threads), profile.transport, here, escape(profile.description)
        )
    Console().print(table)
    click.echo(f"your own profiles: {user_folder()}")


@targets.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def show_command(name: str, as_json: bool) -> None:
    """Show profile NAME (or a .toml file): multiples, threads, budget and where each claim comes from."""
    target = resolve_host(load_target(name))
    if as_json:
        click.echo(json.dumps(to_json(target), indent=2))
        return
    console = Console()
    console.print(f"[bold]{escape(target.name)}[/bold]: {escape(target.description)}")
    for label, values in _facts(target):
        console.print(f"  {label}: {escape(values)}")
    table = Table(title="channel multiples")
    data_types = list(dict.fromkeys(key for row in target.multiples.values() for key in row))
    for heading in ("operator", *data_types):
        table.add_column(heading)
    for op_class in OP_CLASSES:
        table.add_row(op_class, *(str(target.multiple(op_class, data_type)) for data_type in data_types))
    console.print(table)
    for claim, source in target.sources.items():
        console.print(f"  {escape(claim)}: {escape(source)}")


def _facts(target: Target) -> Iterable[tuple[str, str]]:
    yield "ISA", " ".join([target.isa, *target.features])
    yield "data types", ", ".join(target.data_types)
    yield "n:m kernels", ", ".join(target.n_m) or "none"
    yield "threads", str(target.threads) + (f" on cores {target.affinity}" if target.affinity else "")
    yield "provider", target.provider
    yield "transport", target.transport
    if target.memory_bytes:
        yield "memory for the model", f"{target.memory_bytes / 2**20:.0f} MiB"
    if target.storage_bytes:
        yield "storage for the model", f"{target.storage_bytes / 2**20:.0f} MiB"


@targets.command("check")
@click.argument("name")
@click.option("--host", metavar="USER@HOST", help="Check this device instead of this machine.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def check_command(name: str, host: str | None, as_json: bool) -> None:
    """Report what the machine is and whether profile NAME describes it; exit 1 if it does not."""
    profile = load_target(name)
    with LocalTransport() if host is None else open_transport(profile, host, _tell) as transport:
        info = read_info(transport)
        device = transport.name
    target = resolve_host(profile, info["isa"], info["flags"])
    record = describe(info, target, device)
    problems = [*missing(info), *mismatches(target, info)]
    if as_json:
        click.echo(json.dumps({"target": target.name, "environment": to_json(record), "problems": problems}, indent=2))
    else:
        _print_machine(record)
    if problems:
        raise BenchError(f"{target.name} does not describe {device}: {'; '.join(problems)}")


def _print_machine(record: dict[str, Any]) -> None:
    keys = (
        "cpu_model",
        "isa",
        "cores",
        "physical_cores",
        "threads_auto",
        "governors",
        "frequency_khz",
        "temperature_c",
        "memory_bytes",
        "os",
        "python",
        "numpy",
        "onnxruntime",
        "providers",
    )
    console = Console()
    for key in keys:
        value = record[key]
        text = ", ".join(value) if isinstance(value, list) else str(value)
        console.print(f"  {key}: {escape(text) if value not in (None, []) else 'not reported'}")
    for doubt in record["doubts"]:
        console.print(f"  [yellow]doubt[/yellow]: {escape(doubt)}")


@targets.command("setup")
@click.argument("what", type=click.Choice(["arm64-qemu"]))
def setup_command(what: str) -> None:
    """Build the arm64 emulator in your cache, without root: arm64 Debian packages and wheels, run by qemu-user."""
    click.echo(f"{what} is ready in {qemu.setup(_tell)}: use it with '--host qemu' and any arm64 target")


def _tell(line: str) -> None:
    click.echo(line, err=True)


@targets.command("new")
@click.argument("name")
@click.option("--like", default="arm64", show_default=True, help="Profile to start from.")
def new_command(name: str, like: str) -> None:
    """Start a profile of your own called NAME, as a copy of another, in your configuration folder."""
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name.startswith("."):
        raise TargetError(f"target name '{name}' may hold letters, digits, '-', '_' and '.' only")
    if name in list_targets():
        raise TargetError(f"target '{name}' exists already: see 'mm-edge targets show {name}'")
    source = profile_path(like)
    source_name = parse_target(source).name
    text = source.read_text(encoding="utf-8").replace(f'name = "{source_name}"', f'name = "{name}"', 1)
    path = user_folder() / f"{name}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".toml.part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    click.echo(f"wrote {path}: edit it, then 'mm-edge targets show {name}'")

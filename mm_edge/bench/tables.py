"""The tables of `mm-edge bench` on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mm_edge.bench.audit import Audit
from mm_edge.bench.pattern import PatternTime


def print_comparison(document: Mapping[str, Any]) -> None:
    """Print the document of comparison.compare_models: tables on standard output, warnings on standard error."""
    machine = document["environment"]
    console = Console()
    threads = document["models"][0]["latency_ms"].threads or "no measured"
    console.print(
        f"{escape(machine['cpu_model'])}, {machine['isa']}, onnxruntime {machine['onnxruntime']}, {threads} thread(s), "
        f"{document['pairs']} interleaved pairs"
    )
    latency = _table("latency, ms", ("model", "p50", "p90", "p99", "dense p50", "speed-up", "95 % interval", "verdict"))
    footprint = _table(
        "in a fresh process", ("model", "load ms", "first run ms", "memory MB", "without arena", "file MB")
    )
    for entry in document["models"]:
        name, times, interval = escape(Path(entry["model"]).name), entry["latency_ms"], entry["speedup_ci"]
        dense = entry["dense_latency_ms"]
        latency.add_row(
            name,
            *(_number(value, 2) for value in (times.p50, times.p90, times.p99)),
            "" if dense is None else _number(dense.p50, 2),
            "1" if dense is None else _number(entry["speedup"], 2, "x"),
            f"{interval[0]:.2f} to {interval[1]:.2f}" if interval else "",
            times.verdict or "-",
        )
        footprint.add_row(
            name,
            *(_number(entry[key], 1) for key in ("load_ms", "first_run_ms")),
            *(_megabytes(entry[key]) for key in ("peak_memory_bytes", "peak_memory_no_arena_bytes", "file_bytes")),
        )
    console.print(latency, footprint)
    for entry in document["models"]:
        parity = entry["parity"]
        if parity is not None:
            console.print(
                f"{escape(Path(entry['model']).name)} on {document['environment']['transport']}: outputs within "
                f"{parity.max_rel_err:.1e} of this machine's, top-1 agreement {parity.top1_agreement:.0%}"
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


def _print_pattern(name: str, layers: Sequence[PatternTime]) -> None:
    table = _table(f"2:4 layers of {name}, fp16", ("node", "size", "dense us", "2:4 us", "speed-up", "why"))
    for time in layers:
        size = " x ".join("?" if part is None else str(part) for part in time.layer.size)
        times = (_number(time.dense_us, 1), _number(time.sparse_us, 1), _number(time.speedup, 2, "x"))
        table.add_row(escape(time.layer.name), size, *times, time.reason or "")
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

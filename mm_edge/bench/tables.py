"""The tables of `mm-edge bench` on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mm_edge.bench.audit import Audit
from mm_edge.bench.pattern import PatternTime
from mm_edge.errors import visible


def print_comparison(document: Mapping[str, Any], console: Console, warnings: Console) -> None:
    """Print the document of comparison.compare_models: tables on `console`, and on `warnings` its warnings."""
    machine = document["environment"]
    threads = document["models"][0]["latency_ms"].threads or "no measured"
    console.print(
        f"{_shown(machine['cpu_model'])}, {_shown(machine['isa'])}, onnxruntime {_shown(machine['onnxruntime'])}, "
        f"{threads} thread(s), {document['pairs']} interleaved pairs"
    )
    latency = _table("latency, ms", ("model", "p50", "p90", "p99", "dense p50", "speed-up", "95 % interval", "verdict"))
    footprint = _table(
        "in a fresh process", ("model", "load ms", "first run ms", "memory MB", "without arena", "file MB")
    )
    for entry in document["models"]:
        name, times, interval = _shown(Path(entry["model"]).name), entry["latency_ms"], entry["speedup_ci"]
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
                f"{_shown(Path(entry['model']).name)} on {document['environment']['transport']}: outputs within "
                f"{parity.max_rel_err:.1e} of this machine's, top-1 agreement {parity.top1_agreement:.0%}"
            )
    if document["harness_ms"] is not None:
        console.print(f"the harness itself costs {document['harness_ms'] * 1000:.1f} microseconds a run")
    for name, audit in (document["audit"] or {}).items():
        _print_audit(name, audit, console)
    for name, layers in document["n_m_layers"].items():
        _print_pattern(name, layers, console)
    for warning in document["warnings"]:
        warnings.print(f"warning: {_shown(warning)}")


def _print_audit(name: str, audit: Audit, console: Console) -> None:
    table = _table(f"kernels of {_shown(name)}", ("node", "kernel", "time", "weight", "why"))
    for use in audit.kernels:
        shape = " x ".join(map(str, use.weight_shape))
        table.add_row(_shown(use.node), _shown(use.kernel), f"{use.share:.1%}", shape, _shown(use.reason or ""))
    table.add_row("all other operators", "", f"{audit.other_share:.1%}", "", "")
    console.print(table)
    console.print(f"optimised graph: {audit.graph_file}", markup=False, highlight=False, soft_wrap=True)


def _print_pattern(name: str, layers: Sequence[PatternTime], console: Console) -> None:
    table = _table(f"2:4 layers of {_shown(name)}, fp16", ("node", "size", "dense us", "2:4 us", "speed-up", "why"))
    for time in layers:
        size = " x ".join("?" if part is None else str(part) for part in time.layer.size)
        times = (_number(time.dense_us, 1), _number(time.sparse_us, 1), _number(time.speedup, 2, "x"))
        table.add_row(_shown(time.layer.name), size, *times, time.reason or "")
    console.print(table)


def _shown(text: str) -> str:
    return escape(visible(text))


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

"""The report as one Markdown document."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from mm_edge.records import Candidate, Report
from mm_edge.report.summary import count_skipped, find_chosen, write_headline
from mm_edge.report.values import (
    NOT_MEASURED,
    show_accuracy,
    show_bytes,
    show_count,
    show_latency,
    show_loss,
    show_ms,
    show_percent,
    show_ratio,
    show_shape,
    show_speedup,
)

_HEADER = (
    "",
    "candidate",
    "top-1 (validation)",
    "points",
    "p50",
    "p99",
    "speed-up",
    "MACs",
    "parameters",
    "sparsity",
    "file",
    "peak memory",
    "parity (relative)",
)


def write_markdown(report: Report) -> str:
    """Return the report as Markdown."""
    controls = any(report.is_control(c) for c in report.candidates)
    sections = [
        f"# {_escape(report.model.name)} on {_escape(str(report.target.get('name', 'unknown target')))}",
        _escape(write_headline(report)),
        _write_warnings(report),
        "## Candidates",
        _write_table(report),
        "`*` marks the Pareto front (nothing else is both as accurate and as fast), `>` the chosen one"
        + (", a control is the dense network on pictures of another size. " if controls else ". ")
        + "Points are top-1 against dense; a loss is negative. Brackets hold 95 % intervals. Speed-up is the ratio of "
        "the two networks' undisturbed times, measured in turn; that network's own dense time is `dense_latency_ms` in "
        "report.json, and the dense row has the median of these.",
        _write_other_names(report),
        _write_choice(report),
        _write_budgets(report),
        _write_sustained(report),
        _write_training(report),
        _write_skipped(report),
        "## How this was made",
        _write_facts(report),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _write_table(report: Report) -> str:
    dense = report.dense
    first = [
        "",
        "dense",
        show_accuracy(dense.accuracy_top1, dense.accuracy_ci),
        "",
        show_ms(dense.latency_ms.p50),
        show_ms(dense.latency_ms.p99),
        "",
        show_count(dense.macs),
        show_count(dense.params),
        "",
        show_bytes(dense.file_bytes),
        show_bytes(dense.peak_memory_bytes),
        "",
    ]
    chosen = find_chosen(report)
    rows = [_write_row(c, report.is_control(c), chosen is not None and c.id == chosen.id) for c in report.candidates]
    divider = ["---"] * 2 + ["---:"] * (len(_HEADER) - 2)
    return "\n".join(_join(cells) for cells in (_HEADER, divider, first, *rows))


def _write_row(c: Candidate, control: bool, chosen: bool) -> list[str]:
    parity = NOT_MEASURED if c.parity is None else f"{c.parity.max_rel_err:.1e}"
    return [
        ("\\>" if chosen else "") + ("\\*" if c.pareto else ""),
        _escape(c.id) + (" (control)" if control else ""),
        show_accuracy(c.accuracy_top1, c.accuracy_ci),
        show_loss(c),
        show_ms(c.latency_ms.p50),
        show_ms(c.latency_ms.p99),
        show_speedup(c) + ("" if c.latency_ms.verdict in (None, "stable") else f" ({c.latency_ms.verdict})"),
        show_count(c.macs),
        show_count(c.params),
        show_percent(c.sparsity),
        show_bytes(c.file_bytes),
        show_bytes(c.peak_memory_bytes),
        parity,
    ]


def _write_other_names(report: Report) -> str:
    """Write under which other ids a network was asked for."""
    lines = [f"- {_escape(c.id)}: {_escape(', '.join(c.also_ids))}" for c in report.candidates if c.also_ids]
    return "\n".join(["## Other names of the same networks", "", *lines]) if lines else ""


def _write_choice(report: Report) -> str:
    chosen = find_chosen(report)
    if chosen is None or report.chosen is None:
        return "## Choice\n\nNone."
    lines = [
        f"- chosen: {_escape(chosen.id)}",
        f"- why: {_escape(report.chosen.reason)}",
        f"- top-1 on test images: {show_percent(report.chosen.accuracy_top1_test)}",
        f"- dense top-1 on test images: {show_percent(report.chosen.dense_accuracy_top1_test)}",
        f"- latency: {show_latency(chosen.latency_ms)}",
        f"- dense latency, timed in turn with it: {show_latency(chosen.dense_latency_ms)}",
        f"- verdict on these times: {chosen.latency_ms.verdict or NOT_MEASURED}",
        f"- model: {_escape(chosen.artifact or 'none')}",
        f"- masked weights: {_escape(chosen.masked_state_dict or 'none')}",
    ]
    return "## Choice\n\n" + "\n".join(lines)


def _write_budgets(report: Report) -> str:
    """Write for each budget which candidate won, and how the candidates made for it were planned."""
    lines = [f"- {_escape(item.reason)}" for item in report.budgets]
    planned = [f"- {_escape(c.id)}: {_escape(c.planned_by)}" for c in report.candidates if c.planned_by is not None]
    if not lines:
        return ""
    sections = ["## Budgets", "\n".join(lines)]
    return "\n\n".join([*sections, "Planned by:", "\n".join(planned)] if planned else sections)


def _write_sustained(report: Report) -> str:
    """Write the first and the last point of a sustained run, and the slowest."""
    found = report.sustained
    if found is None or not found.points:
        return ""
    slowest = max(found.points, key=lambda point: point.candidate_ms)
    header = ("", "minutes", "dense", "candidate", "speed-up", "clock", "temperature")
    rows = [
        (
            name,
            f"{point.seconds / 60:.1f}",
            show_ms(point.dense_ms),
            show_ms(point.candidate_ms),
            show_ratio(point.dense_ms / point.candidate_ms),
            NOT_MEASURED if point.clock_mhz is None else f"{point.clock_mhz:.0f} MHz",
            NOT_MEASURED if point.temperature_c is None else f"{point.temperature_c:.0f} C",
        )
        for name, point in (("first", found.points[0]), ("slowest", slowest), ("last", found.points[-1]))
    ]
    lines = [_join(cells) for cells in (header, ["---"] + ["---:"] * (len(header) - 1), *rows)]
    text = f"{_escape(found.id)} and the dense network ran in turn for {found.minutes:g} minutes without pause."
    return "\n\n".join(["## Sustained", text, "\n".join(lines)])


def _write_warnings(report: Report) -> str:
    if not report.warnings:
        return ""
    return "## Warnings\n\n" + "\n".join(f"- {_escape(warning)}" for warning in report.warnings)


def _write_training(report: Report) -> str:
    """Write for every fine-tuned candidate its epochs, why training ended and which weights were kept."""
    trained = [c for c in report.candidates if c.epochs is not None]
    lines = [
        f"- {_escape(c.id)}: {c.epochs} epochs; {_escape(c.stopped or '')} (kept: {c.recovered_by})" for c in trained
    ]
    return "\n".join(["## Fine-tuning", "", *lines]) if lines else ""


def _write_skipped(report: Report) -> str:
    if not report.skipped_groups:
        return ""
    lines = [
        f"- {_escape(reason)}: {_plural(groups, 'group')}, {_plural(layers, 'layer')}"
        for reason, groups, layers in count_skipped(report)
    ]
    return "## What keeps its width\n\n" + "\n".join(lines)


def _write_facts(report: Report) -> str:
    model = report.model
    lines = [
        f"- model: {_escape(model.name)}, {_escape(model.source)}, input {show_shape(model.input_shape)}",
        f"- target: {_write_values(report.target)}",
        f"- environment: {_write_values(report.environment)}",
        f"- data: {_write_values(report.data)}",
        f"- seconds: {_write_values({name: round(value, 1) for name, value in report.seconds.items()})}",
    ]
    return "\n".join(lines)


def _write_values(values: dict[str, Any]) -> str:
    shown = (f"{key} {value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items())
    return _escape(", ".join(shown)) or "none"


def _join(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _escape(text: str) -> str:
    """Put text from a file or a device on one line, and escape Markdown and HTML in it."""
    text = " ".join(text.split())
    for mark in "\\`*_[]<>|":
        text = text.replace(mark, f"\\{mark}")
    return text


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"

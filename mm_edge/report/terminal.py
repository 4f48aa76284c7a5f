"""The report on a terminal: the headline, a table that fits, the choice and its reason."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mm_edge.records import Candidate, Report
from mm_edge.report.summary import count_skipped, find_chosen, name_candidates, pick_candidates, write_headline
from mm_edge.report.values import (
    NOT_MEASURED,
    show_bytes,
    show_count,
    show_drop,
    show_ms,
    show_percent,
    show_ratio,
)

_WIDE_COLUMNS = 110
_FIGURE_COLUMNS = len("measured")
_ONLY_WHERE_WIDE = ("file", "memory")


def print_report(report: Report, console: Console) -> None:
    """Print `report`: dense first, then every candidate; where they are many, those of pick_candidates."""
    candidates = pick_candidates(report)
    console.print(Text(_one_line(write_headline(report)), style="bold"))
    console.print()
    figures = (_list_dense_figures(report), *(_list_figures(c) for c in candidates))
    unmeasured = [title for title in figures[0] if all(cells[title] in ("", NOT_MEASURED) for cells in figures)]
    wide = console.width >= _WIDE_COLUMNS
    titles = [title for title in figures[0] if title not in unmeasured and (wide or title not in _ONLY_WHERE_WIDE)]
    table = Table(box=None, pad_edge=False, padding=(0, 2 if wide else 1, 0, 0), header_style="bold")
    _fill_table_(table, report, candidates, figures, titles)
    console.print(table)
    console.print(Text(_write_legend(report, candidates, unmeasured), style="dim"))
    if report.chosen is not None:
        _print_line(console, "chosen", f"{report.chosen.id}: {report.chosen.reason}")
    for outcome in report.budgets:
        _print_line(console, "budget", outcome.reason)
    for reason, groups, _ in count_skipped(report):
        _print_line(console, "full width", f"{groups} coupled group{'' if groups == 1 else 's'}: {reason}")
    for warning in report.warnings:
        _print_line(console, "warning", warning)


def _fill_table_(
    table: Table,
    report: Report,
    candidates: tuple[Candidate, ...],
    figures: tuple[dict[str, str], ...],
    titles: list[str],
) -> None:
    table.add_column("", no_wrap=True)
    table.add_column("candidate", no_wrap=True)
    for title in titles:
        table.add_column(title, justify="right", overflow="fold", min_width=_FIGURE_COLUMNS)
    names, chosen = name_candidates(report, candidates), find_chosen(report)
    table.add_row("", "dense", *(figures[0][title] for title in titles))
    for c, cells in zip(candidates, figures[1:], strict=True):
        is_chosen = chosen is not None and c.id == chosen.id
        mark = (">" if is_chosen else " ") + ("*" if c.pareto else " ")
        shown = [mark, _one_line(names[c.id]), *(cells[title] for title in titles)]
        table.add_row(*map(Text, shown), style="bold green" if is_chosen else None)


def _list_dense_figures(report: Report) -> dict[str, str]:
    dense = report.dense
    return {
        "top-1": show_percent(dense.accuracy_top1),
        "points": "",
        "p50": show_ms(dense.latency_ms.p50),
        "speed-up": "",
        "MACs": show_count(dense.macs),
        "file": show_bytes(dense.file_bytes),
        "memory": show_bytes(dense.peak_memory_bytes),
    }


def _list_figures(c: Candidate) -> dict[str, str]:
    return {
        "top-1": show_percent(c.accuracy_top1),
        "points": show_drop(c.accuracy_drop),
        "p50": show_ms(c.latency_ms.p50),
        "speed-up": show_ratio(c.speedup),
        "MACs": show_count(c.macs),
        "file": show_bytes(c.file_bytes),
        "memory": show_bytes(c.peak_memory_bytes),
    }


def _write_legend(report: Report, candidates: tuple[Candidate, ...], unmeasured: list[str]) -> str:
    lines = ["* Pareto front   > chosen   points: top-1 against dense, validation images"]
    if unmeasured:
        lines.append(f"{NOT_MEASURED}: {', '.join(unmeasured)}")
    if len(candidates) < len(report.candidates):
        lines.append(f"{len(report.candidates) - len(candidates)} more candidates in report.md and report.json")
    return "\n".join(lines)


def _print_line(console: Console, label: str, text: str) -> None:
    console.print(Text.assemble((f"{label}: ", "bold"), _one_line(text)))


def _one_line(text: str) -> str:
    """Replace control characters, because names come from files and could send commands to the terminal."""
    return "".join(char if char.isprintable() else " " for char in text)

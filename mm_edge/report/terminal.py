"""The report on a terminal: the headline, a table that fits, the choice and its reason."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mm_edge.errors import visible
from mm_edge.records import Candidate, Report
from mm_edge.report.compare import Comparison, show_change
from mm_edge.report.files import PAGE
from mm_edge.report.summary import count_skipped, find_chosen, name_candidates, pick_candidates, write_headline
from mm_edge.report.values import (
    NOT_MEASURED,
    show_bytes,
    show_count,
    show_drop,
    show_ms,
    show_number,
    show_percent,
    show_ratio,
)

_WIDE_COLUMNS = 110
_FIGURE_COLUMNS = len("measured")
_ONLY_WHERE_WIDE = ("file", "memory")
_INTERVAL = "interval"
# The columns before the figures, beside the candidate's name: the marks and the space after them.
_MARK_COLUMNS = 3


def print_report(report: Report, console: Console) -> None:
    """Print `report`: dense first, then every candidate; where they are many, those of pick_candidates."""
    candidates = pick_candidates(report)
    console.print(Text(visible(write_headline(report)), style="bold"))
    console.print()
    fastest = find_chosen(report) or max(candidates, key=lambda c: c.speedup or 0.0, default=None)
    figures = (_list_dense_figures(report), *(_list_figures(c, fastest) for c in candidates))
    unmeasured = [title for title in figures[0] if all(cells[title] in ("", NOT_MEASURED) for cells in figures)]
    wide = console.width >= _WIDE_COLUMNS
    titles = [title for title in figures[0] if title not in unmeasured and (wide or title not in _ONLY_WHERE_WIDE)]
    if not _fits(name_candidates(report, candidates).values(), figures, titles, console.width) and _INTERVAL in titles:
        # The interval says more than milliseconds of different moments.
        titles = [title for title in titles if title != "p50"]
    table = Table(box=None, pad_edge=False, padding=(0, 2 if wide else 1, 0, 0), header_style="bold")
    _fill_table_(table, report, candidates, figures, titles)
    console.print(table)
    console.print(Text(_write_legend(report, candidates, unmeasured), style="dim"))
    for name, others in _list_other_names(report, candidates):
        _print_line(console, name, f"also {others}")
    if report.chosen is not None:
        _print_line(console, "chosen", f"{report.chosen.id}: {report.chosen.reason}")
    for outcome in report.budgets:
        _print_line(console, "budget", outcome.reason)
    for reason, groups, _ in count_skipped(report):
        _print_line(console, "full width", f"{groups} coupled group{'' if groups == 1 else 's'}: {reason}")
    for warning in report.warnings:
        _print_line(console, "warning", warning)


def _fits(names: Iterable[str], figures: tuple[dict[str, str], ...], titles: list[str], width: int) -> bool:
    """Return whether a line of the table holds the longest name and all these figures."""
    return _MARK_COLUMNS + max(map(len, names), default=0) + sum(1 + _width(figures, t) for t in titles) <= width


def _width(figures: tuple[dict[str, str], ...], title: str) -> int:
    """Return the width of a column: what was not measured is folded after its first word."""
    shown = [cells[title] for cells in figures]
    return max(len(title), *(_FIGURE_COLUMNS if text == NOT_MEASURED else len(text) for text in shown))


def _list_other_names(report: Report, candidates: tuple[Candidate, ...]) -> list[tuple[str, str]]:
    """Return the other strategies of each candidate that has any; a warning says which signals change nothing."""
    names = name_candidates(report, candidates)
    return [(names[c.id], ", ".join(c.also_named)) for c in candidates if c.also_named]


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
        table.add_column(title, justify="right", overflow="fold", min_width=_width(figures, title))
    names, chosen = name_candidates(report, candidates), find_chosen(report)
    table.add_row("", "dense", *(figures[0][title] for title in titles))
    for c, cells in zip(candidates, figures[1:], strict=True):
        is_chosen = chosen is not None and c.id == chosen.id
        mark = (">" if is_chosen else " ") + ("*" if c.pareto else " ")
        shown = [mark, visible(names[c.id]), *(cells[title] for title in titles)]
        table.add_row(*map(Text, shown), style="bold green" if is_chosen else None)


def _list_dense_figures(report: Report) -> dict[str, str]:
    dense = report.dense
    return {
        "top-1": show_percent(dense.accuracy_top1),
        "points": "",
        "p50": show_ms(dense.latency_ms.p50),
        "speed-up": "",
        _INTERVAL: "",
        "MACs": show_count(dense.macs),
        "file": show_bytes(dense.file_bytes),
        "memory": show_bytes(dense.peak_memory_bytes),
    }


def _list_figures(c: Candidate, fastest: Candidate | None) -> dict[str, str]:
    same = "=" if fastest is not None and c.id != fastest.id and _are_alike(c, fastest) else ""
    return {
        "top-1": show_percent(c.accuracy_top1),
        "points": show_drop(c.accuracy_drop) + ("~" if _is_by_chance(c) else ""),
        "p50": show_ms(c.latency_ms.p50),
        "speed-up": show_ratio(c.speedup),
        _INTERVAL: "" if c.speedup_ci is None else f"{c.speedup_ci[0]:.2f}-{c.speedup_ci[1]:.2f}{same}",
        "MACs": show_count(c.macs),
        "file": show_bytes(c.file_bytes),
        "memory": show_bytes(c.peak_memory_bytes),
    }


def _are_alike(c: Candidate, other: Candidate) -> bool:
    """Return whether the intervals of two speed-ups overlap, so that neither can be called faster."""
    if c.speedup_ci is None or other.speedup_ci is None:
        return False
    return c.speedup_ci[0] <= other.speedup_ci[1] and other.speedup_ci[0] <= c.speedup_ci[1]


def _is_by_chance(c: Candidate) -> bool:
    """Return whether the interval of the loss holds 0: too few images tell the candidate from dense."""
    return c.drop_ci is not None and c.drop_ci[0] <= 0 <= c.drop_ci[1]


def print_paths(report: Report, folder: Path, console: Console) -> None:
    """Print where the model, the reports and the bundle of the run in `folder` are, as far as they are there."""
    chosen = find_chosen(report)
    places = {
        "chosen model": None if chosen is None or chosen.artifact is None else folder / chosen.artifact,
        "full report": folder / "report.md",
        "page": folder / PAGE,
        "bundle": folder / "bundle",
    }
    for label, path in places.items():
        if path is not None and path.exists():
            # A path may be longer than the terminal is wide; broken into lines it could not be copied.
            console.print(f"{label + ':':13} {visible(str(path))}", soft_wrap=True, highlight=False, markup=False)


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print several runs side by side, and their changes against the first."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("run", "network"):
        table.add_column(title, overflow="fold")
    for title in ("quality", "speed-up", "p50", "file"):
        table.add_column(title, justify="right", no_wrap=True)
    for run in comparison.runs:
        row, quality = run.row, run.overview.quality
        shown = show_percent(row.quality) if quality is None or quality.is_fraction else show_number(row.quality)
        cells = [run.name, row.id, shown, show_ratio(row.speedup), show_ms(row.p50), show_bytes(row.file_bytes)]
        table.add_row(*(Text(visible(cell)) for cell in cells))
    console.print(table)
    for run in comparison.runs:
        if run.row.same_as:
            _print_line(console, run.row.id, f"also {', '.join(run.row.same_as)}")
    for run, changes, differences in zip(comparison.runs[1:], comparison.changes, comparison.differences, strict=True):
        console.print()
        _print_line(console, run.name, f"against {comparison.runs[0].name}")
        for change in changes:
            _print_line(console, f"  {change.what}", show_change(change))
        for difference in differences:
            _print_line(console, "  different", difference)


def _write_legend(report: Report, candidates: tuple[Candidate, ...], unmeasured: list[str]) -> str:
    lines = ["* Pareto front   > chosen   points: top-1 against dense, validation images"]
    if any(_is_by_chance(c) for c in candidates):
        lines.append("~ the validation images cannot tell it from dense: the 95 % interval of the loss holds 0")
    intervals = [c.speedup_ci for c in candidates if c.speedup_ci is not None]
    if intervals:
        lines.append("interval: 95 % of the speed-up")
    if len(intervals) > 1:
        than = "the chosen one" if find_chosen(report) is not None else "the fastest"
        lines.append(f"= as fast as {than} as far as can be told: their intervals overlap; the others differ")
    if missing := [title for title in unmeasured if title != _INTERVAL]:
        lines.append(f"{NOT_MEASURED}: {', '.join(missing)}")
    if len(candidates) < len(report.candidates):
        lines.append(f"{len(report.candidates) - len(candidates)} more candidates in report.md and report.json")
    return "\n".join(lines)


def _print_line(console: Console, label: str, text: str) -> None:
    console.print(Text.assemble((f"{label}: ", "bold"), visible(text)))

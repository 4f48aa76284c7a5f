"""The page of several runs side by side."""

from __future__ import annotations

from typing import Any

from mm_edge.report.compare import Comparison, show_change
from mm_edge.report.figures import OTHER
from mm_edge.report.page import plots
from mm_edge.report.page.document import write_document
from mm_edge.report.page.markup import Html, Table, breakable, bullets, element, join, paragraph, text
from mm_edge.report.values import show_bytes, show_ms, show_number, show_percent, show_ratio


def write_comparison_page(comparison: Comparison) -> str:
    """Return the page of `comparison`, one HTML file without a network."""
    first = comparison.runs[0]
    points = _points(comparison)
    drawn: dict[str, plots.Spec] = {}
    figure = None
    if points:
        drawn["runs"] = plots.runs_plot(points, [run.name for run in comparison.runs])
        box = element("div", element("div", paragraph("This plot needs JavaScript.")), class_="plot", data_plot="runs")
        caption = (
            "The chosen network, the front and the dense network of every run. Points of one shape belong to one run."
        )
        figure = element("figure", box, element("figcaption", text(caption)))
    parts = [
        element("p", text(f"{len(comparison.runs)} runs"), class_="subject"),
        element("h1", breakable(f"Compared with {first.name}")),
        _runs_table(comparison),
        figure,
        _changes_table(comparison),
        *_what_differs(comparison),
    ]
    section = element("section", join(parts), aria_label="Comparison")
    return write_document("Comparison", [section], {"plots": drawn, "rows": [], "filters": []})


def _runs_table(comparison: Comparison) -> Html:
    numeric = ["quality", "speed-up", "p50", "file", "peak memory"]
    table = Table("The chosen network of every run", ["run", "network", "figure", *numeric], numeric)
    for run in comparison.runs:
        row, quality = run.row, run.overview.quality
        table.add(
            run.name,
            " = ".join((row.id, *row.same_as)),
            "" if quality is None else quality.name,
            show_percent(row.quality) if quality is None or quality.is_fraction else show_number(row.quality),
            show_ratio(row.speedup),
            show_ms(row.p50),
            show_bytes(row.file_bytes),
            show_bytes(row.memory_bytes),
        )
    return table.html()


def _changes_table(comparison: Comparison) -> Html:
    names = ["quality", "speed", "size"]
    table = Table(f"Changes against {comparison.runs[0].name}", ["run", *names], names)
    for run, changes in zip(comparison.runs[1:], comparison.changes, strict=True):
        table.add(run.name, *(show_change(change) for change in changes))
    return table.html()


def _what_differs(comparison: Comparison) -> list[Html]:
    found = []
    for run, differences in zip(comparison.runs[1:], comparison.differences, strict=True):
        if differences:
            found += [element("h2", breakable(f"What is different in {run.name}")), bullets(differences)]
    return found


def _points(comparison: Comparison) -> list[dict[str, Any]]:
    """Return the rows of all runs worth drawing; none where the runs have no quality of one name."""
    qualities = {run.overview.quality.name if run.overview.quality else None for run in comparison.runs}
    if len(qualities) != 1 or None in qualities:
        return []
    return [
        {**value, "run": run.name}
        for run in comparison.runs
        for value in plots.plot_values(run.overview)
        if value["role"] != OTHER and value["quality"] is not None and value["speedup"] is not None
    ]

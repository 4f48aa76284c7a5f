"""The sections of the page. Each returns None where the report has nothing to show."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mm_edge.records import LayerPicture, Report
from mm_edge.report.decision import decide, sentence_on_test
from mm_edge.report.figures import CHOSEN, CONTROL, DENSE, FRONT, Overview, Row, read_overview
from mm_edge.report.page import plots
from mm_edge.report.page.markup import (
    NOTHING,
    Html,
    Table,
    breakable,
    bullets,
    definitions,
    details,
    element,
    join,
    paragraph,
    text,
)
from mm_edge.report.page.samples import read_curves
from mm_edge.report.summary import count_skipped
from mm_edge.report.values import (
    NOT_MEASURED,
    show_bytes,
    show_count,
    show_latency,
    show_ms,
    show_percent,
    show_ratio,
    show_shape,
)

# The losses within which the largest speed-up of each value of a dimension is shown.
WITHIN = (1.0, 2.0, 5.0)
SHOWN_DOUBTS = 3
SHARES = ["time before", "time after"]


@dataclass
class Page:
    """A page while it is made: the report, its rows, and the plots that were placed so far, by name."""

    report: Report
    folder: Path
    overview: Overview
    drawn: dict[str, plots.Spec] = field(default_factory=dict)

    @classmethod
    def of(cls, report: Report, folder: Path) -> Page:
        """Return the page of `report`, whose samples lie in `folder`."""
        return cls(report, folder, read_overview(report))

    def place_(self, name: str, spec: plots.Spec, caption: str, table: Html | None) -> Html:
        """Return a figure that the page's script draws, with its table."""
        self.drawn[name] = spec
        drawing = element(
            "div", element("p", text("This plot needs JavaScript; its table follows."), class_="no-script")
        )
        box = element("div", drawing, class_="plot", data_plot=name)
        return element("figure", box, element("figcaption", text(caption)), table)

    def show_quality(self, value: float | None) -> str:
        """Return a quality as text."""
        quality = self.overview.quality
        if value is None or quality is None:
            return NOT_MEASURED
        return show_percent(value) if quality.is_fraction else f"{value:.4g}"

    def show_loss(self, row: Row) -> str:
        """Return how far a row is from dense; a loss is negative."""
        if row.loss is None:
            return "" if row.role == DENSE else NOT_MEASURED
        digits = ".2f" if self.overview.quality is not None and self.overview.quality.is_fraction else ".4g"
        shown = f"{0.0 - row.loss:+{digits}}"
        if row.loss_ci is not None:
            shown += f" [{0.0 - row.loss_ci[1]:+{digits}}, {0.0 - row.loss_ci[0]:+{digits}}]"
        return shown


def first_screen(page: Page) -> Html:
    """Return what to ship, why, its doubts, the picture and the headline table."""
    report, overview = page.report, page.overview
    decision = decide(report, overview)
    target = str(report.target.get("name", "unknown target"))
    parts = [
        element("p", text(f"{report.model.name} on {target}"), class_="subject"),
        element("h1", breakable(decision.ship)),
        paragraph(decision.because, class_="because"),
        paragraph(sentence_on_test(report)) if sentence_on_test(report) else None,
        paragraph(f"Why this one: {decision.reason}.") if decision.reason else None,
        _doubts(decision.doubts),
    ]
    answer = element("div", join(parts), class_="answer")
    return element("section", answer, _main_plot(page), _headline_table(page), aria_label="Decision", class_="first")


def _doubts(doubts: Sequence[str]) -> Html | None:
    if not doubts:
        return None
    more = doubts[SHOWN_DOUBTS:]
    rest = details(f"{len(more)} more", bullets(more)) if more else None
    return element("div", element("h2", text("Doubts")), bullets(doubts[:SHOWN_DOUBTS]), rest, class_="doubts")


def _main_plot(page: Page) -> Html | None:
    overview = page.overview
    if overview.quality is None or not any(row.quality is not None for row in overview.rows):
        return None
    caption = (
        f"{overview.quality.name} against {'measured speed-up' if overview.is_timed else 'multiply-adds'}. "
        "The line joins the Pareto front (nothing else is both as good and as fast), the dashed line the dense network "
        "at other input sizes. Bars are 95 % intervals, broken lines what was asked for."
    )
    if not overview.is_timed:
        caption += " Speed was not measured."
    return page.place_("decision", plots.quality_against_speed(overview, page.report.constraints), caption, None)


def _headline_table(page: Page) -> Html:
    named: set[str] = set()
    rows = []
    for row in sorted(page.overview.all, key=lambda row: row.role != CHOSEN):
        # Strategies that lead to the same network are listed once here, and all in the full table.
        if row.role in (DENSE, CHOSEN, CONTROL, FRONT) and row.id not in named:
            rows.append(row)
            named.update(row.same_as)
    return _rows_table(page, "Dense, the chosen network, the front and the controls", rows, sortable=False)


def all_candidates(page: Page) -> Html:
    """Return the table of every candidate."""
    return _section("all", "All candidates", _rows_table(page, "All candidates", page.overview.all, sortable=True))


Column = tuple[str, Callable[[Row], str], Callable[[Row], Any]]


def _rows_table(page: Page, caption: str, rows: Sequence[Row], sortable: bool) -> Html:
    columns = _columns(page, everything=sortable)
    numeric = [title for title, _, _ in columns]
    named = any(row.same_as for row in rows)
    table = Table(caption, ["network", "role", *numeric, *(["other names"] if named else [])], numeric, sortable)
    for row in rows:
        others = [", ".join(row.same_as)] if named else []
        cells = [row.id, row.role, *(show(row) for _, show, _ in columns), *others]
        sort = [row.id, row.role, *(value(row) for _, _, value in columns), *others]
        marks = {name: getattr(row, name) for name in plots.FILTERED} if row.role != DENSE else {}
        table.add(*cells, sort=sort, data=marks, class_=row.role)
    return table.html()


def _columns(page: Page, everything: bool) -> list[Column]:
    """Return title, shown text and sorting value of the columns that at least one row has a value for."""
    quality = page.overview.quality
    columns: list[Column] = [
        ("quality" if quality is None else quality.name, lambda r: page.show_quality(r.quality), lambda r: r.quality),
        ("against dense", page.show_loss, lambda r: r.loss),
        ("speed-up", _show_speedup, lambda r: r.speedup),
        ("p50", lambda r: show_ms(r.p50), lambda r: r.p50),
        ("file", lambda r: show_bytes(r.file_bytes), lambda r: r.file_bytes),
        ("peak memory", lambda r: show_bytes(r.memory_bytes), lambda r: r.memory_bytes),
    ]
    if everything:
        columns += [
            ("p99", lambda r: show_ms(r.p99), lambda r: r.p99),
            ("times are", lambda r: r.verdict or "", lambda r: r.verdict),
            ("multiply-adds", lambda r: show_count(r.macs), lambda r: r.macs),
            ("parameters", lambda r: show_count(r.params), lambda r: r.params),
            ("same answers", lambda r: show_percent(r.agreement), lambda r: r.agreement),
            ("divergence", lambda r: _number(r.divergence), lambda r: r.divergence),
            ("parity", lambda r: _number(r.parity, ".1e"), lambda r: r.parity),
        ]
    return [column for column in columns if any(column[2](row) is not None for row in page.overview.rows)]


def _number(value: float | None, form: str = ".3g") -> str:
    return "" if value is None else format(value, form)


def _show_speedup(row: Row) -> str:
    if row.role == DENSE:
        return ""
    shown = show_ratio(row.speedup)
    return shown if row.speedup_ci is None else f"{shown} [{row.speedup_ci[0]:.2f}, {row.speedup_ci[1]:.2f}]"


def what_dimensions_bought(page: Page) -> Html | None:
    """Return the largest speed-up within some losses, by every dimension with more than one value."""
    overview = page.overview
    if not overview.is_timed or overview.quality is None or not overview.quality.is_fraction:
        return None
    dimensions = {**plots.FILTERED, "strategy": "strategy"}
    found: list[tuple[str, list[Row]]] = []
    for name, title in dimensions.items():
        rows = [row for row in overview.rows if row.role != CONTROL or name == "size"]
        values = list(dict.fromkeys(getattr(row, name) for row in rows))
        if len(values) > 1:
            found += [(f"{title}: {value}", [row for row in rows if getattr(row, name) == value]) for value in values]
    if not found:
        return None
    steps = [f"{limit:g} point{'' if limit == 1 else 's'}" for limit in WITHIN]
    table = Table(
        "Largest measured speed-up that loses at most so much", ["what", "networks", *steps], ["networks", *steps]
    )
    points: list[dict[str, Any]] = []
    for name, rows in found:
        best = [_fastest_within(rows, limit) for limit in WITHIN]
        table.add(name, len(rows), *("none" if value is None else show_ratio(value) for value in best))
        points += [
            {"name": name, "within": step, "speedup": value}
            for step, value in zip(steps, best, strict=True)
            if value is not None
        ]
    if not points:
        return _section("dimensions", "What each dimension bought", table.html())
    caption = (
        "The fastest network of each kind that loses at most so much. A value without a point has no such network."
    )
    figure = page.place_("dimensions", plots.speed_by_dimension(points, steps), caption, table.html())
    return _section("dimensions", "What each dimension bought", figure)


def _fastest_within(rows: Sequence[Row], limit: float) -> float | None:
    fast = [row.speedup for row in rows if row.speedup is not None and row.loss is not None and row.loss <= limit]
    return max(fast, default=None)


def work_and_speed(page: Page) -> Html | None:
    """Return how much of the reduction of multiply-adds became speed."""
    rows = [row for row in page.overview.rows if row.speedup is not None and row.macs_share]
    if not rows:
        return None
    table = Table(
        "Fewer multiply-adds and speed-up", ["network", "multiply-adds", "speed-up"], ["multiply-adds", "speed-up"]
    )
    for row in rows:
        marks = {name: getattr(row, name) for name in plots.FILTERED}
        table.add(row.id, f"1/{1 / (row.macs_share or 1):.2f}", _show_speedup(row), data=marks)
    caption = "On the dotted line a network is faster by as much as it has fewer multiply-adds; below it, by less."
    figure = page.place_("work", plots.work_against_speed(page.overview), caption, details("Table", table.html()))
    return _section("work", "Multiply-adds and speed", figure)


def layers(page: Page) -> Html | None:
    """Return what became of every layer of the chosen network."""
    found = page.report.layers
    if not found:
        return None
    sensitive = any(layer.sensitivity is not None for layer in found)
    ranged = any(layer.hi is not None for layer in found)
    titles = ["layer", "role", "width", "kept", "weights removed"]
    numeric = titles[2:]
    titles += ["allowed"] if ranged else []
    titles += ["sensitivity"] if sensitive else []
    timed = any(layer.time_before is not None for layer in found)
    titles += SHARES if timed else []
    table = Table("Layers of the chosen network", titles, [*numeric, "sensitivity", *SHARES])
    for layer in found:
        cells: list[object] = [layer.fqn, layer.role, layer.width, layer.kept, show_percent(layer.sparsity)]
        if ranged:
            cells.append("" if layer.lo is None or layer.hi is None else f"{layer.lo:.0%} to {layer.hi:.0%}")
        if sensitive:
            cells.append("" if layer.sensitivity is None else f"{layer.sensitivity:.3g}")
        if timed:
            cells += [NOT_MEASURED if share is None else show_percent(share) for share in _shares(layer)]
        table.add(*cells)
    note = (
        "Sensitivity is the divergence from dense with a quarter of the layer's channels removed and nothing else: in "
        "nats for class scores, otherwise in shares of the outputs' variance."
    )
    caption = "Output channels of every layer of the chosen network: the part that is kept, before the whole width."
    figure = page.place_(
        "layers", plots.layer_widths(found), caption, details("Table: roles, ranges, sensitivity", table.html())
    )
    times = _layer_times(page) if timed else None
    return _section("layers", "Layers of the chosen network", figure, paragraph(note) if sensitive else None, times)


def _shares(layer: LayerPicture) -> tuple[float | None, float | None]:
    return layer.time_before, layer.time_after


def _layer_times(page: Page) -> Html:
    """Return the time of every layer before and after, from the profile of one run of each network."""
    found, chosen = page.report.layers, page.overview.chosen
    speedup = None if chosen is None else chosen.speedup
    caption = (
        "Time of every layer as a share of the dense network's: in the chosen network, before in the dense one. "
        "From one profile of each; what is not a convolution or a product is left out."
    )
    return page.place_("times", plots.layer_times(found, speedup), caption, None)


def sustained(page: Page) -> Html | None:
    """Return the times of dense and of the chosen network over minutes without pause."""
    found = page.report.sustained
    if found is None or not found.points:
        return None
    table = Table("Milliseconds without pause", ["minutes", DENSE, found.id, "MHz", "°C"], [DENSE, found.id])
    for point in found.points:
        clock = NOT_MEASURED if point.clock_mhz is None else f"{point.clock_mhz:.0f}"
        heat = NOT_MEASURED if point.temperature_c is None else f"{point.temperature_c:.0f}"
        table.add(f"{point.seconds / 60:.1f}", f"{point.dense_ms:.3g}", f"{point.candidate_ms:.3g}", clock, heat)
    caption = "Both networks in turn without pause: where a device slows down when it gets hot, the curves rise."
    spec = plots.sustained_curve(found.points, (DENSE, found.id))
    figure = page.place_("sustained", spec, caption, details("Table", table.html()))
    return _section("sustained", "Minutes without pause", figure)


def strategies(page: Page) -> Html | None:
    """Return the loss of every strategy under every signal."""
    overview = page.overview
    rows = [row for row in overview.rows if row.kind != DENSE and row.planned_by is None and row.loss is not None]
    signals = list(dict.fromkeys(row.signal for row in rows))
    names = list(dict.fromkeys(row.strategy for row in rows))
    if len(names) < 2 or overview.quality is None:
        return None
    table = Table("Least loss and largest speed-up by strategy and signal", ["strategy", *signals], signals)
    for name in names:
        cells = []
        for signal in signals:
            here = [row for row in rows if row.strategy == name and row.signal == signal]
            speeds = [row.speedup for row in here if row.speedup is not None]
            least = min((row.loss for row in here if row.loss is not None), default=None)
            shown = "" if least is None else f"{least:.2f}"
            cells.append(shown + (f" ({max(speeds):.2f}x)" if speeds else ""))
        table.add(name, *cells)
    caption = "What each strategy lost under each signal, in points. Strategies differ in speed too."
    figure = page.place_("strategies", plots.strategies_heat_map(overview), caption, table.html())
    return _section("strategies", "Strategies", figure)


def memory(page: Page) -> Html | None:
    """Return file sizes and peak memory; the table of all candidates has the same figures."""
    rows = [row for row in page.overview.rows if row.file_bytes is not None and row.memory_bytes is not None]
    if not rows:
        return None
    table = Table("File and peak memory", ["network", "file", "peak memory"], ["file", "peak memory"])
    for row in (page.overview.dense, *rows):
        marks = {name: getattr(row, name) for name in plots.FILTERED} if row.role != DENSE else {}
        table.add(row.id, show_bytes(row.file_bytes), show_bytes(row.memory_bytes), data=marks)
    caption = "Peak memory is that of the process that ran the network."
    figure = page.place_("memory", plots.size_against_memory(page.overview), caption, details("Table", table.html()))
    return _section("memory", "Memory and size", figure)


def kept_widths(page: Page) -> Html | None:
    """Return what kept its full width and why."""
    skipped = page.report.skipped_groups
    if not skipped:
        return None
    table = Table("Why", ["reason", "groups", "layers"], ["groups", "layers"])
    for reason, groups, count in count_skipped(page.report):
        table.add(reason, groups, count)
    names = Table("Groups that keep their width", ["group", "layers", "reason"])
    for group in skipped:
        names.add(group.group, ", ".join(group.layers), group.reason)
    return _section("kept", "What kept its full width", table.html(), details("Every group", names.html()))


def how_measured(page: Page) -> Html:
    """Return how it was measured, with the samples as a curve."""
    report, chosen = page.report, page.overview.chosen
    facts: dict[str, object] = {"dense": show_latency(report.dense.latency_ms)}
    named = next((c for c in report.candidates if chosen is not None and c.id == chosen.id), None)
    if named is not None:
        facts[named.id] = show_latency(named.latency_ms)
    for name in ("cpu_model", "isa", "cores", "os", "onnxruntime", "transport", "emulated", "host"):
        if report.environment.get(name) is not None:
            facts[name.replace("_", " ")] = _plain(report.environment[name])
    facts["seconds of the run"] = f"{sum(report.seconds.values()):.0f}"
    curves = None if chosen is None else read_curves(page.folder, chosen.artifact)
    figure = None
    if curves is not None and chosen is not None:
        caption = "Every sample of the measurement, sorted: a steep curve is a steady device. Both were timed in turn."
        named_curves = {DENSE: curves[0], chosen.id: curves[1]}
        table = Table("Milliseconds", ["network", "10 %", "50 %", "90 %", "99 %"], ["10 %", "50 %", "90 %", "99 %"])
        for name, times in named_curves.items():
            table.add(name, *(f"{times[round(share * (len(times) - 1))]:.3g}" for share in (0.1, 0.5, 0.9, 0.99)))
        figure = page.place_("samples", plots.latency_curves(named_curves), caption, details("Table", table.html()))
    stages = Table("Seconds of each stage", ["stage", "seconds"], ["seconds"])
    for name, seconds in report.seconds.items():
        stages.add(name, f"{seconds:.1f}")
    parts = [
        definitions(facts),
        figure,
        details("Target, environment and data", _everything(report)),
        details("Stages", stages.html()),
    ]
    return _section("measured", "How this was measured", *parts)


def _everything(report: Report) -> Html:
    model = report.model
    sections: dict[str, Mapping[str, Any]] = {
        "model": {
            "name": model.name,
            "source": model.source,
            "sha256": model.sha256,
            "input": show_shape(model.input_shape),
            "parameters": model.params,
            "multiply-adds": model.macs,
        },
        "target": report.target,
        "environment": report.environment,
        "data": report.data,
    }
    parts = []
    for title, values in sections.items():
        shown = {key: _plain(value) for key, value in values.items() if value not in (None, [], {})}
        parts += [element("h3", text(title)), definitions(shown)]
    return join(parts)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def again(page: Page) -> Html | None:
    """Return the command to do it again."""
    if page.report.command is None:
        return None
    return _section(
        "again",
        "Do it again",
        element("pre", element("code", text(page.report.command)), tabindex="0"),
        paragraph(f"MODEL is {page.report.model.source}."),
    )


def filters(page: Page) -> Html:
    """Return the filters; a dimension with a single value has none."""
    controls = []
    for name, title in plots.FILTERED.items():
        values = list(dict.fromkeys(getattr(row, name) for row in page.overview.rows))
        if len(values) < 2:
            continue
        options = [element("option", text("all"), value="")]
        options += [element("option", text(value), value=value) for value in values]
        select = element("select", *options, data_filter=name, id=f"filter-{name}")
        controls.append(element("label", element("span", text(title)), select, for_=f"filter-{name}"))
    if not controls:
        return NOTHING
    status = element("output", id="shown", aria_live="polite")
    return element("form", *controls, status, id="filters", aria_label="Filters", class_="filters")


def _section(name: str, title: str, *parts: Html | None) -> Html:
    heading = element("h2", text(title), id=f"{name}-title")
    return element("section", heading, *parts, id=name, aria_labelledby=f"{name}-title")


SECTIONS: tuple[Callable[[Page], Html | None], ...] = (
    what_dimensions_bought,
    work_and_speed,
    layers,
    strategies,
    memory,
    all_candidates,
    kept_widths,
    how_measured,
    sustained,
    again,
)

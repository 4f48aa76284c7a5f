"""The plots of the page as Vega-Lite specifications, https://vega.github.io/vega-lite/docs.

Colours are names of CSS variables, so that dark mode and print need no second drawing. Every role has a colour and a
shape: the palette is that of Okabe and Ito, which people with colour blindness can tell apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mm_edge.records import Constraints, LayerPicture, SustainedPoint
from mm_edge.report.figures import CHOSEN, CONTROL, DENSE, FRONT, OTHER, Overview, Quality, Row

Spec = dict[str, Any]

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
# What the page's filters change.
ROWS = "rows"
SHAPES = {CHOSEN: "diamond", FRONT: "circle", OTHER: "circle", CONTROL: "square", DENSE: "triangle-up"}
LOSS_STEPS = (0.5, 1.0, 2.0, 5.0, 10.0)


def quality_against_speed(overview: Overview, limits: Constraints) -> Spec:
    """Return quality against speed-up, with intervals, the front, dense, the controls and the constraints."""
    quality = overview.quality
    assert quality is not None
    timed = overview.is_timed
    x_field, x_title = ("speedup", "speed-up, dense = 1") if timed else ("macs_share", "share of dense multiply-adds")
    x = {"field": x_field, "type": "quantitative", "title": x_title, "scale": {"zero": False, "padding": 14}}
    y = {"field": "quality", "type": "quantitative", "title": _titled(quality), "scale": {"zero": False, "padding": 14}}
    layers: list[Spec] = [
        *_limit_lines(overview, limits, x_field),
        _curve(f"datum.on_front || datum.role === '{CHOSEN}'", FRONT, [1, 0], x, y),
        _curve(f"datum.role === '{CONTROL}' || datum.role === '{DENSE}'", CONTROL, [4, 3], x, y),
        *_intervals(overview, x, y, timed),
        {
            "mark": {"type": "point", "filled": True, "opacity": 1, "tooltip": True},
            "encoding": {
                "x": x,
                "y": y,
                "color": _role_colour(),
                "shape": _role_shape(),
                "size": {"condition": {"test": f"datum.role === '{CHOSEN}'", "value": 190}, "value": 70},
                "tooltip": _tooltip(quality),
                "description": {"field": "description"},
            },
        },
        _names(f"datum.role === '{DENSE}' || datum.role === '{CHOSEN}'", -13, x, y),
        _names(f"datum.role === '{CONTROL}'", 17, x, y),
    ]
    title = f"{quality.name} against {x_title}"
    return _spec(title, overview, layers, height=340)


def work_against_speed(overview: Overview) -> Spec:
    """Return the speed-up over the reduction of multiply-adds, with the line on which both are equal."""
    rows = [row for row in overview.all if row.speedup is not None and row.macs_share]
    end = max([1.0, *(1 / row.macs_share for row in rows if row.macs_share), *(row.speedup or 1 for row in rows)])
    x = {
        "field": "macs_reduction",
        "type": "quantitative",
        "title": "multiply-adds of dense / of the candidate",
        "scale": {"zero": False, "padding": 14},
    }
    y = {
        "field": "speedup",
        "type": "quantitative",
        "title": "measured speed-up",
        "scale": {"zero": False, "padding": 14},
    }
    ideal = {
        "data": {"values": [{"macs_reduction": 1, "speedup": 1}, {"macs_reduction": end, "speedup": end}]},
        "mark": {"type": "line", "strokeDash": [2, 3], "color": "var(--muted)", "aria": False},
        "encoding": {"x": x, "y": y},
    }
    return _spec(
        "measured speed-up against fewer multiply-adds", overview, [ideal, _points(overview, x, y)], height=280
    )


def _points(overview: Overview, x: Spec, y: Spec) -> Spec:
    """Return one point for each network, its colour and shape by role."""
    return {
        "mark": {"type": "point", "filled": True, "opacity": 1, "size": 70, "tooltip": True},
        "encoding": {
            "x": x,
            "y": y,
            "color": _role_colour(),
            "shape": _role_shape(),
            "tooltip": _tooltip(overview.quality),
            "description": {"field": "description"},
        },
    }


def size_against_memory(overview: Overview) -> Spec:
    """Return the peak memory over the file size."""
    x = {"field": "file_mb", "type": "quantitative", "title": "file, MB", "scale": {"zero": False, "padding": 14}}
    y = {
        "field": "memory_mb",
        "type": "quantitative",
        "title": "peak memory, MB",
        "scale": {"zero": False, "padding": 14},
    }
    return _spec("peak memory against file size", overview, [_points(overview, x, y)], height=240)


def strategies_heat_map(overview: Overview) -> Spec:
    """Return the loss of every strategy under every signal; one cell is the best of its kinds, precisions and sizes."""
    assert overview.quality is not None
    unit = "points lost" if overview.quality.is_fraction else f"loss of {overview.quality.name}"
    best = {"op": "min", "field": "loss", "as": "loss"}
    x = {"field": "signal", "type": "nominal", "title": None, "axis": {"labelAngle": 0, "orient": "top"}}
    y = {"field": "strategy", "type": "nominal", "title": None, "sort": None}
    colours = [f"var(--heat-{step})" for step in range(len(LOSS_STEPS) + 1)]
    cells = {
        "mark": {"type": "rect", "tooltip": True, "stroke": "var(--paper)", "strokeWidth": 2},
        "encoding": {
            "x": x,
            "y": y,
            "color": {
                "field": "loss",
                "type": "quantitative",
                "scale": {"type": "threshold", "domain": list(LOSS_STEPS), "range": colours},
                "legend": {"title": unit},
            },
            "tooltip": [
                {"field": "signal", "type": "nominal"},
                {"field": "strategy", "type": "nominal"},
                {"field": "loss", "type": "quantitative", "title": unit, "format": ".2f"},
                {"field": "speedup", "type": "quantitative", "title": "largest speed-up", "format": ".2f"},
            ],
        },
    }
    numbers = {
        "mark": {
            "type": "text",
            "fontSize": 11,
            "aria": False,
            "fill": {"expr": f"datum.loss > {LOSS_STEPS[-2]} ? 'var(--heat-ink-high)' : 'var(--heat-ink-low)'"},
        },
        "encoding": {"x": x, "y": y, "text": {"field": "loss", "type": "quantitative", "format": ".1f"}},
    }
    spec = _spec(f"{unit} by strategy and signal", overview, [cells, numbers], height=None)
    spec["transform"] = [
        {"filter": "datum.pruned && isValid(datum.loss) && !datum.planned"},
        {"aggregate": [best, {"op": "max", "field": "speedup", "as": "speedup"}], "groupby": ["signal", "strategy"]},
    ]
    return {**spec, **_height(26, len({row.strategy for row in overview.rows if row.planned_by is None}))}


def speed_by_dimension(values: Sequence[Mapping[str, Any]], steps: Sequence[str]) -> Spec:
    """Return the largest speed-up of each value of each dimension within some losses.

    Args:
        values: name, within (one of `steps`) and speedup of each point.
        steps: the losses in order.
    """
    colours = [f"var(--heat-{index + 1})" for index in range(len(steps))]
    return {
        "$schema": SCHEMA,
        "description": "largest measured speed-up by signal, kind, precision and size",
        "data": {"values": list(values)},
        **_height(22, len({value["name"] for value in values})),
        "mark": {"type": "point", "filled": True, "size": 90, "opacity": 1, "tooltip": True, "stroke": "var(--muted)"},
        "encoding": {
            "x": {"field": "speedup", "type": "quantitative", "title": "largest speed-up", "scale": {"zero": False}},
            "y": {"field": "name", "type": "nominal", "title": None, "sort": None, "axis": {"grid": True}},
            "color": {
                "field": "within",
                "type": "nominal",
                "sort": list(steps),
                "legend": {"title": "loses at most"},
                "scale": {"domain": list(steps), "range": colours},
            },
        },
    }


def layer_widths(layers: Sequence[LayerPicture]) -> Spec:
    """Return the width of every layer of the chosen network, before and after."""
    values = [_before_and_after(layer, layer.width, layer.kept) for layer in layers]
    return _bars_before_and_after("output channels", values)


def layer_times(layers: Sequence[LayerPicture], speedup: float | None) -> Spec:
    """Return the time of every layer, before and after, as a share of the dense network's time.

    Args:
        layers: the layers with their shares of the time of the network they are in.
        speedup: dense time over the chosen network's time; None leaves both shares as they are.
    """
    scale = 1.0 if speedup is None else 1.0 / speedup
    values = [_before_and_after(layer, layer.time_before or 0.0, (layer.time_after or 0.0) * scale) for layer in layers]
    return _bars_before_and_after("share of the dense network's time", values, ".0%")


def _before_and_after(layer: LayerPicture, before: float, after: float) -> dict[str, Any]:
    return {"layer": layer.fqn, "role": layer.role, "before": before, "after": after, "removed": before - after}


def _bars_before_and_after(title: str, values: list[dict[str, Any]], form: str | None = None) -> Spec:
    """Return bars of "after" over bars of "before", one pair for each layer."""
    y = {"field": "layer", "type": "nominal", "sort": None, "title": None, "axis": {"labelLimit": 150}}
    numbers = [{"field": name, "type": "quantitative"} for name in ("before", "after", "removed")]
    tooltip: list[Spec] = [{"field": name, "type": "nominal"} for name in ("layer", "role")]
    tooltip += [item if form is None else {**item, "format": ".1%"} for item in numbers]
    axis = {} if form is None else {"axis": {"format": form}}
    x = {"field": "before", "type": "quantitative", "title": title, **axis}
    bar = {"type": "bar", "height": 11, "tooltip": True}
    return {
        "$schema": SCHEMA,
        "description": f"{title} of every layer, before and after pruning",
        "data": {"values": values},
        **_height(15, len(values)),
        "layer": [
            {
                "mark": {**bar, "color": "var(--bar-before)", "aria": False},
                "encoding": {"y": y, "x": x, "tooltip": tooltip},
            },
            {
                "mark": {**bar, "color": "var(--front)"},
                "encoding": {"y": y, "x": {"field": "after", "type": "quantitative"}, "tooltip": tooltip},
            },
        ],
    }


def sustained_curve(points: Sequence[SustainedPoint], names: Sequence[str]) -> Spec:
    """Return the times of dense and of the chosen network against minutes of work; `names` are the two networks'."""
    values = [
        {"minutes": point.seconds / 60, "ms": time, "network": name}
        for point in points
        for name, time in zip(names, (point.dense_ms, point.candidate_ms), strict=True)
    ]
    colour = {"domain": list(names), "range": [f"var(--{role})" for role in (DENSE, CHOSEN)]}
    dash = {"domain": list(names), "range": [[4, 2], [1, 0]]}
    legend = {"title": None, "labelLimit": 260}
    return {
        "$schema": SCHEMA,
        "description": "milliseconds per input against minutes of work without pause",
        "data": {"values": values},
        "width": "container",
        "height": 220,
        "mark": {"type": "line", "strokeWidth": 2, "point": True, "tooltip": True},
        "encoding": {
            "x": {"field": "minutes", "type": "quantitative", "title": "minutes without pause"},
            "y": {"field": "ms", "type": "quantitative", "title": "milliseconds per input", "scale": {"zero": False}},
            "color": {"field": "network", "type": "nominal", "scale": colour, "legend": legend},
            "strokeDash": {"field": "network", "type": "nominal", "scale": dash, "legend": legend},
        },
    }


def layer_work(layers: Sequence[Mapping[str, Any]]) -> Spec:
    """Return the multiply-adds of every layer, coloured by its largest sparsity; layers are as `inspect` has them."""
    values = [{"layer": item["fqn"], "role": item["role"], "macs": item["macs"], "most": item["hi"]} for item in layers]
    colours = [f"var(--heat-{step})" for step in (1, 2, 3, 4, 5)]
    return {
        "$schema": SCHEMA,
        "description": "multiply-adds of every layer",
        "data": {"values": values},
        **_height(15, len(layers)),
        "mark": {"type": "bar", "tooltip": True, "stroke": "var(--muted)", "strokeWidth": 0.5},
        "encoding": {
            "y": {"field": "layer", "type": "nominal", "sort": None, "title": None, "axis": {"labelLimit": 150}},
            "x": {"field": "macs", "type": "quantitative", "title": "multiply-adds", "axis": {"format": "~s"}},
            "color": {
                "field": "most",
                "type": "quantitative",
                "scale": {"type": "threshold", "domain": [0.2, 0.4, 0.6, 0.8], "range": colours},
                "legend": {"title": "largest sparsity", "format": ".0%"},
            },
            "tooltip": [
                {"field": "layer", "type": "nominal"},
                {"field": "role", "type": "nominal"},
                {"field": "macs", "type": "quantitative", "title": "multiply-adds", "format": ","},
                {"field": "most", "type": "quantitative", "title": "largest sparsity", "format": ".0%"},
            ],
        },
    }


def layers_and_groups(layers: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> Spec:
    """Return a mark for every layer that is part of a coupled group; groups are numbered in their order."""
    names = [item["fqn"] for item in layers]
    known = set(names)
    values = [
        {"layer": tensor, "number": number, "group": group["id"], "width": group["size"]}
        for number, group in enumerate(groups, 1)
        for tensor in group["tensors"]
        if tensor in known
    ]
    return {
        "$schema": SCHEMA,
        "description": "layers and the coupled groups that they are part of",
        "data": {"values": values},
        **_height(15, len(names)),
        "mark": {"type": "square", "size": 60, "opacity": 1, "color": "var(--front)", "tooltip": True},
        "encoding": {
            "y": {
                "field": "layer",
                "type": "nominal",
                "scale": {"domain": names},
                "title": None,
                "axis": {"labelLimit": 150, "grid": True},
            },
            "x": {"field": "number", "type": "quantitative", "title": "group, by number", "axis": {"tickMinStep": 1}},
            "tooltip": [{"field": name, "type": "nominal"} for name in ("layer", "group", "width")],
        },
    }


def latency_curves(curves: Mapping[str, Sequence[float]]) -> Spec:
    """Return for each network the share of samples that took at most a time; `curves` holds sorted milliseconds."""
    values = [
        {"network": name, "ms": value, "share": (index + 1) / len(times)}
        for name, times in curves.items()
        for index, value in enumerate(times)
    ]
    names = list(curves)
    colours = [f"var(--{role})" for role in (DENSE, CHOSEN)]
    scale = {"domain": names, "range": colours[: len(names)]}
    return {
        "$schema": SCHEMA,
        "description": "share of the samples that took at most this time",
        "data": {"values": values},
        "width": "container",
        "height": 220,
        "mark": {"type": "line", "interpolate": "step-after", "strokeWidth": 2},
        "encoding": {
            "x": {"field": "ms", "type": "quantitative", "title": "milliseconds per input", "scale": {"zero": False}},
            "y": {"field": "share", "type": "quantitative", "title": "share of samples", "axis": {"format": ".0%"}},
            "color": {
                "field": "network",
                "type": "nominal",
                "scale": scale,
                "legend": {"title": None, "labelLimit": 260},
            },
            "strokeDash": {
                "field": "network",
                "type": "nominal",
                "scale": {"domain": names, "range": [[4, 2], [1, 0]]},
                "legend": {"title": None, "labelLimit": 260},
            },
        },
    }


def runs_plot(points: Sequence[Mapping[str, Any]], runs: Sequence[str]) -> Spec:
    """Return quality against speed-up of several runs; `points` are of `plot_values`, with the name of their run."""
    scale = {"domain": list(runs)}
    palette = [f"var(--{role})" for role in (FRONT, CHOSEN, CONTROL, "limit", OTHER)]
    colours = [palette[index % len(palette)] for index in range(len(runs))]
    tooltip = [
        {"field": "run", "type": "nominal"},
        {"field": "id", "type": "nominal", "title": "candidate"},
        {"field": "role", "type": "nominal"},
        {"field": "quality", "type": "quantitative", "format": ".2f"},
        {"field": "speedup", "type": "quantitative", "title": "speed-up", "format": ".2f"},
    ]
    return {
        "$schema": SCHEMA,
        "description": "quality against speed-up of several runs",
        "data": {"values": list(points)},
        "width": "container",
        "height": 320,
        "mark": {"type": "point", "filled": True, "opacity": 1, "tooltip": True},
        "encoding": {
            "x": {
                "field": "speedup",
                "type": "quantitative",
                "title": "speed-up",
                "scale": {"zero": False, "padding": 14},
            },
            "y": {
                "field": "quality",
                "type": "quantitative",
                "title": "quality",
                "scale": {"zero": False, "padding": 14},
            },
            "color": {
                "field": "run",
                "type": "nominal",
                "scale": {**scale, "range": colours},
                "legend": {"title": None, "labelLimit": 260},
            },
            "shape": {"field": "run", "type": "nominal", "scale": scale, "legend": {"title": None, "labelLimit": 260}},
            "size": {"condition": {"test": f"datum.role === '{CHOSEN}'", "value": 190}, "value": 60},
            "tooltip": tooltip,
            "description": {"field": "description"},
        },
    }


def plot_values(overview: Overview) -> list[dict[str, Any]]:
    """Return the rows as plots and filters read them."""
    # What is drawn last lies on top.
    ordered = sorted(overview.all, key=lambda row: row.role == CHOSEN)
    return [_value(overview, row) for row in ordered]


def _value(overview: Overview, row: Row) -> dict[str, Any]:
    quality_low, quality_high = row.quality_ci or (None, None)
    speed_low, speed_high = row.speedup_ci or (None, None)
    scale = 100 if overview.quality is not None and overview.quality.is_fraction else 1
    shown = _scaled(row.quality, scale)
    return {
        "id": row.id,
        "short": row.id.split("/structured/")[0],
        "role": row.role,
        "on_front": row.on_front,
        "pruned": row.kind not in (DENSE,),
        "planned": row.planned_by is not None,
        **{name: getattr(row, name) for name in FILTERED},
        "strategy": row.strategy,
        "quality": shown,
        "quality_low": _scaled(quality_low, scale),
        "quality_high": _scaled(quality_high, scale),
        "loss": row.loss,
        "speedup": row.speedup,
        "speed_low": speed_low,
        "speed_high": speed_high,
        "p50": row.p50,
        "macs_share": row.macs_share,
        "macs_reduction": None if not row.macs_share else 1 / row.macs_share,
        "file_mb": _scaled(row.file_bytes, 1e-6),
        "memory_mb": _scaled(row.memory_bytes, 1e-6),
        "description": _describe(overview, row, shown),
    }


# The fields of a row that the page filters by, with what the filter is called.
FILTERED = {"signal": "signal", "kind": "kind", "precision": "precision", "size": "input size"}


def _scaled(value: float | None, scale: float) -> float | None:
    return None if value is None else value * scale


def _describe(overview: Overview, row: Row, quality: float | None) -> str:
    """Return what a screen reader says of a point."""
    parts = [f"{row.id} ({row.role})"]
    if overview.quality is not None and quality is not None:
        parts.append(f"{overview.quality.name} {quality:.2f}")
    if row.speedup is not None:
        parts.append(f"speed-up {row.speedup:.2f}")
    return ", ".join(parts)


def _titled(quality: Quality) -> str:
    return f"{quality.name}, %" if quality.is_fraction else quality.name


def _tooltip(quality: Quality | None) -> list[Spec]:
    shown: list[Spec] = [{"field": "id", "type": "nominal", "title": "candidate"}, {"field": "role", "type": "nominal"}]
    if quality is not None:
        shown.append({"field": "quality", "type": "quantitative", "title": _titled(quality), "format": ".2f"})
        shown.append({"field": "loss", "type": "quantitative", "title": "lost", "format": ".2f"})
    for name, title, form in (
        ("speedup", "speed-up", ".2f"),
        ("speed_low", "at least", ".2f"),
        ("speed_high", "at most", ".2f"),
        ("p50", "p50, ms", ".3g"),
        ("macs_share", "share of dense multiply-adds", ".0%"),
        ("file_mb", "file, MB", ".3g"),
    ):
        shown.append({"field": name, "type": "quantitative", "title": title, "format": form})
    return shown


def _role_colour() -> Spec:
    roles = list(SHAPES)
    scale = {"domain": roles, "range": [f"var(--{role})" for role in roles]}
    return {"field": "role", "type": "nominal", "scale": scale, "legend": {"title": None}}


def _role_shape() -> Spec:
    scale = {"domain": list(SHAPES), "range": list(SHAPES.values())}
    return {"field": "role", "type": "nominal", "scale": scale, "legend": {"title": None}}


def _curve(condition: str, role: str, dash: list[int], x: Spec, y: Spec) -> Spec:
    return {
        "transform": [{"filter": condition}],
        "mark": {
            "type": "line",
            "color": f"var(--{role})",
            "strokeDash": dash,
            "strokeWidth": 1.5,
            "opacity": 0.7,
            "aria": False,
        },
        "encoding": {"x": x, "y": y, "order": {"field": x["field"], "type": "quantitative"}},
    }


def _names(condition: str, offset: int, x: Spec, y: Spec) -> Spec:
    """Return the names of some points, `offset` pixels below them."""
    return {
        "transform": [{"filter": condition}],
        "mark": {"type": "text", "dy": offset, "fontSize": 11, "fill": "var(--ink)", "aria": False, "limit": 190},
        "encoding": {"x": x, "y": y, "text": {"field": "short"}},
    }


def _intervals(overview: Overview, x: Spec, y: Spec, timed: bool) -> list[Spec]:
    mark = {"type": "rule", "strokeWidth": 1, "opacity": 0.55, "aria": False}
    marked = "datum.role !== 'candidate'"
    up = {
        "transform": [{"filter": f"isValid(datum.quality_low) && {marked}"}],
        "mark": mark,
        "encoding": {
            "x": x,
            "y": {**y, "field": "quality_low"},
            "y2": {"field": "quality_high"},
            "color": _role_colour(),
        },
    }
    across = {
        "transform": [{"filter": "isValid(datum.speed_low)"}],
        "mark": mark,
        "encoding": {"x": {**x, "field": "speed_low"}, "x2": {"field": "speed_high"}, "y": y, "color": _role_colour()},
    }
    layers = [up] if any(row.quality_ci is not None for row in overview.all) else []
    return [*layers, across] if timed else layers


def _limit_lines(overview: Overview, limits: Constraints, x_field: str) -> list[Spec]:
    """Return a line for every constraint that these axes can show."""
    quality, dense = overview.quality, overview.dense
    assert quality is not None
    scale = 100 if quality.is_fraction else 1
    lines: list[tuple[str, float, str]] = []
    if limits.max_drop is not None and dense.quality is not None:
        worst = dense.quality * scale - limits.max_drop * (1 if quality.higher_is_better else -1)
        lines.append(("y", worst, f"--max-drop {limits.max_drop:g}"))
    if limits.speedup is not None and x_field == "speedup":
        lines.append(("x", limits.speedup, f"--speedup {limits.speedup:g}"))
    if limits.latency_ms is not None and x_field == "speedup" and dense.p50 is not None:
        lines.append(("x", dense.p50 / limits.latency_ms, f"--latency {limits.latency_ms:g}"))
    return [layer for axis, at, label in lines for layer in _limit_line(axis, at, label)]


def _limit_line(axis: str, at: float, label: str) -> list[Spec]:
    place = {axis: {"datum": at, "type": "quantitative"}}
    edge: Spec = {"x": {"value": 4}} if axis == "y" else {"y": {"value": 4}}
    text = {
        "type": "text",
        "text": label,
        "align": "left",
        "dx": 4,
        "dy": -6 if axis == "y" else 8,
        "fill": "var(--limit)",
    }
    data: Spec = {"values": [{}]}
    return [
        {
            "data": data,
            "mark": {"type": "rule", "color": "var(--limit)", "strokeDash": [6, 4], "aria": False},
            "encoding": place,
        },
        {"data": data, "mark": {**text, "aria": False}, "encoding": {**place, **edge}},
    ]


def _height(pixels: int, names: int) -> Spec:
    """Return the size of a plot that has one line of so many pixels for every name."""
    return {"width": "container", "height": pixels * max(1, names)}


def _spec(title: str, overview: Overview, layers: list[Spec], height: int | None) -> Spec:
    spec: Spec = {
        "$schema": SCHEMA,
        "description": title,
        "data": {"name": ROWS},
        "width": "container",
        "layer": layers,
    }
    if height is not None:
        spec["height"] = height
    return spec

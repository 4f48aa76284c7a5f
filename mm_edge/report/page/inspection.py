"""The page of `mm-edge inspect --html`: the picture of a network with its groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mm_edge.report.page import plots
from mm_edge.report.page.document import write_document
from mm_edge.report.page.markup import Html, Table, breakable, bullets, element, join, text
from mm_edge.report.values import show_count

Document = Mapping[str, Any]


def write_inspection_page(document: Document) -> str:
    """Return the page of `document`, which plan.inspection.describe_model made, one HTML file without a network."""
    layers, groups, pinned = document["layers"], document["groups"], document["pinned"]
    drawn: dict[str, plots.Spec] = {}
    name = document["model"]["name"]
    parts = [
        element("p", text("What can be pruned"), class_="subject"),
        element("h1", breakable(name)),
        element("p", text(summarize(document))),
        bullets(document["warnings"]) if document["warnings"] else None,
    ]
    if layers:
        drawn["work"] = plots.layer_work(layers)
        drawn["groups"] = plots.layers_and_groups(layers, groups)
        parts += [
            _heading("Layers"),
            _figure("work", "Multiply-adds of every layer, coloured by the largest share of it that may be removed."),
            _layers_table(layers),
            bullets(list(dict.fromkeys(f"{layer['role']}: {layer['recognised']}" for layer in layers))),
            _heading("Groups"),
            _figure("groups", "A mark says that the layer is part of the group; channels of a group go together."),
        ]
    parts.append(_groups_table(groups))
    if pinned:
        parts += [_heading("What keeps its width"), _pinned_table(pinned)]
    section = element("section", join(parts), aria_label="Network")
    return write_document(name, [section], {"plots": drawn, "rows": [], "filters": []})


def summarize(document: Document) -> str:
    """Return the totals in one sentence."""
    model, layers = document["model"], document["layers"]
    work = sum(layer["macs"] for layer in layers)
    parameters = "" if model["params"] is None else f"{show_count(model['params'])} parameters, "
    groups, pinned = len(document["groups"]), len(document["pinned"])
    return (
        f"{parameters}{show_count(model['macs'])} multiply-adds; {len(layers)} prunable layers hold {show_count(work)} "
        f"of them; {groups} coupled groups can lose channels, {pinned} keep their width."
    )


def _heading(title: str) -> Html:
    return element("h2", text(title))


def _figure(name: str, caption: str) -> Html:
    box = element("div", element("div"), class_="plot", data_plot=name)
    return element("figure", box, element("figcaption", text(caption)))


def _layers_table(layers: Sequence[Document]) -> Html:
    numeric = ["multiply-adds", "sparsity range"]
    table = Table("Prunable layers", ["layer", "role", "shape", *numeric, "why this range"], numeric, sortable=True)
    for layer in layers:
        bounds = f"{layer['lo']:.0%} to {layer['hi']:.0%}"
        shape = "x".join(map(str, layer["shape"]))
        cells = [layer["fqn"], layer["role"], shape, show_count(layer["macs"]), bounds, layer["range"]]
        sort = [layer["fqn"], layer["role"], shape, layer["macs"], layer["hi"], layer["range"]]
        table.add(*cells, sort=sort)
    return table.html()


def _groups_table(groups: Sequence[Document]) -> Html:
    table = Table("Coupled groups that can lose channels", ["group", "width", "tensors"], ["width"])
    for group in groups:
        table.add(group["id"], group["size"], ", ".join(group["tensors"]))
    return table.html()


def _pinned_table(pinned: Sequence[Document]) -> Html:
    table = Table("Groups that keep their width", ["group", "width", "why", "tensors"], ["width"])
    for group in pinned:
        table.add(group["id"], group["size"], group["reason"], ", ".join(group["tensors"]))
    return table.html()

"""`mm-edge inspect`: what can be pruned in a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mm_edge.cli.options import RecordCommand, load
from mm_edge.errors import visible
from mm_edge.run.request import ModelOptions, make_model_options

if TYPE_CHECKING:
    from rich.table import Table


@click.command("inspect", cls=RecordCommand, record=ModelOptions)
@click.argument("model", type=click.Path(readable=False))
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
@click.option(
    "--html", type=click.Path(path_type=Path), metavar="FILE", help="Write a page with pictures to this file."
)
def inspect(model: str, as_json: bool, html: Path | None, **given: Any) -> None:
    """Show layers, roles, ranges and coupled groups, and what is pinned and why."""
    options = make_model_options(**given)

    from mm_edge.plan.inspection import describe_model
    from mm_edge.progress import Terminal

    with Terminal(stderr=True).status("exporting"):
        document = describe_model(load(model, options, guess_sizes=True), options.keep, options.judge)
    if html is not None:
        from mm_edge.report import save_page
        from mm_edge.report.page.inspection import write_inspection_page

        save_page(html, write_inspection_page(document))
    if as_json:
        click.echo(json.dumps(document, indent=2))
    else:
        _print(document)


def _print(document: dict[str, Any]) -> None:
    from mm_edge.progress import Terminal
    from mm_edge.report.page.inspection import summarize

    console = Terminal()
    for item in document["inputs"]:
        console.print(visible(_describe_input(item)), markup=False, highlight=False)
    for warning in document["warnings"]:
        console.print(f"warning: {visible(warning)}", markup=False, highlight=False)
    for line in _describe_compared(document["compared"]):
        console.print(visible(line), markup=False, highlight=False)
    console.print(summarize(document), markup=False, highlight=False)
    layers = _table(f"{len(document['layers'])} prunable layers", "layer", "role", "shape", "MACs", "sparsity", "row")
    for layer in document["layers"]:
        bounds = f"{layer['lo']:.0%} - {layer['hi']:.0%}"
        shape = "x".join(map(str, layer["shape"]))
        row = layer["range"].removeprefix("rule ")
        _add_row_(layers, layer["fqn"], layer["role"], shape, f"{layer['macs']:,}", bounds, row)
    console.print(layers)
    for role, how in {layer["role"]: layer["recognised"] for layer in document["layers"]}.items():
        console.print(f"role {role}: {how}", markup=False, highlight=False)
    title = f"{len(document['groups'])} coupled groups that can lose channels"
    groups = _table(title, "group", "width", "tensors")
    for group in document["groups"]:
        _add_row_(groups, group["id"], str(group["size"]), f"{len(group['tensors'])}: {', '.join(group['tensors'])}")
    console.print(groups)
    pinned = _table(f"{len(document['pinned'])} pinned", "group", "width", "why it keeps its width")
    for group in document["pinned"]:
        _add_row_(pinned, group["id"], str(group["size"]), group["reason"])
    console.print(pinned)


def _describe_compared(views: list[list[dict[str, Any]]]) -> list[str]:
    """Return one line for each kind of channels that is compared with the dense network."""
    lines = []
    for number, view in enumerate(views):
        for kind in view:
            first, end = kind["channels"]
            by = "class scores, by KL" if kind["divergence"] == "kl" else "by squared error over variance"
            where = f"channels {first} to {end - 1} of {', '.join(kind['values'])}"
            lines.append(f"compared with dense{f', view {number + 1}' if len(views) > 1 else ''}: {where} ({by})")
    return lines


def _table(title: str, *columns: str) -> Table:
    """Return a table whose cells are folded, so that every name stands there in full."""
    from rich.table import Table

    table = Table(title=title)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _add_row_(table: Table, *cells: str) -> None:
    from rich.text import Text

    table.add_row(*(Text(visible(cell)) for cell in cells))


def _describe_input(item: dict[str, Any]) -> str:
    """Return one line on an input: its sizes, and at which it was read where some are open."""
    sizes = ", ".join("?" if size is None else str(size) for size in item["shape"])
    text = f"input {item['name']}: {item['dtype']} ({sizes})"
    if None in item["shape"]:
        text += f", ? is open; read at {','.join(map(str, item['measured']))}"
    return text

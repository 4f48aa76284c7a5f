"""`mm-edge inspect`: what can be pruned in a model."""

from __future__ import annotations

import json
from typing import Any

import click

from mm_edge.cli.options import RecordCommand, load
from mm_edge.run.request import ModelOptions, make_model_options


@click.command("inspect", cls=RecordCommand, record=ModelOptions)
@click.argument("model", type=click.Path(readable=False))
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def inspect(model: str, as_json: bool, **given: Any) -> None:
    """Show layers, roles, ranges and coupled groups, and what is pinned and why."""
    options = make_model_options(**given)

    from rich.console import Console

    from mm_edge.plan.inspection import describe_model

    with Console(stderr=True).status("exporting"):
        document = describe_model(load(model, options, guess_sizes=True), options.keep)
    if as_json:
        click.echo(json.dumps(document, indent=2))
    else:
        _print(document)


def _print(document: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for item in document["inputs"]:
        console.print(_describe_input(item), markup=False, highlight=False)
    for warning in document["warnings"]:
        console.print(f"warning: {warning}", markup=False, highlight=False)
    layers = Table(
        "layer", "role", "shape", "MACs", "sparsity range", title=f"{len(document['layers'])} prunable layers"
    )
    for layer in document["layers"]:
        bounds = f"{layer['lo']:.0%} - {layer['hi']:.0%}"
        shape = "x".join(map(str, layer["shape"]))
        layers.add_row(layer["fqn"], layer["role"], shape, f"{layer['macs']:,}", bounds)
    console.print(layers)
    groups = Table(
        "group", "width", "tensors", title=f"{len(document['groups'])} coupled groups that can lose channels"
    )
    for group in document["groups"]:
        tensors = group["tensors"]
        groups.add_row(group["id"], str(group["size"]), f"{len(tensors)}: {', '.join(tensors[:3])}")
    console.print(groups)
    pinned = Table("group", "width", "why it keeps its width", title=f"{len(document['pinned'])} pinned")
    for group in document["pinned"]:
        pinned.add_row(group["id"], str(group["size"]), group["reason"])
    console.print(pinned)


def _describe_input(item: dict[str, Any]) -> str:
    """Return one line on an input: its sizes, and at which it was read where some are open."""
    sizes = ", ".join("?" if size is None else str(size) for size in item["shape"])
    text = f"input {item['name']}: {item['dtype']} ({sizes})"
    if None in item["shape"]:
        text += f", ? is open; read at {','.join(map(str, item['measured']))}"
    return text

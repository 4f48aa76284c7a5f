"""Writes docs/reference.md from the code: `python -m mm_edge.cli.reference > docs/reference.md`, or `make docs`."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

import click

from mm_edge import records
from mm_edge.cli.main import SUBCOMMANDS, main
from mm_edge.cli.options import OTHER, RecordOption

RECORDS = (
    records.Report,
    records.ModelInfo,
    records.DenseFigures,
    records.Candidate,
    records.Latency,
    records.Fidelity,
    records.OutputFidelity,
    records.MetricValue,
    records.Chosen,
    records.Constraints,
    records.Budget,
    records.BudgetOutcome,
    records.SkippedGroup,
    records.LayerPicture,
    records.Sustained,
    records.SustainedPoint,
)
METADATA = {
    "mm_edge.input": "shape, mean, std, scale, colours, layout and resizing of the input, and which were assumed",
    "mm_edge.labels": "names of the classes, in order; absent where nobody named them",
    "mm_edge.opset": "the ONNX opset of the file",
    "mm_edge.provenance": "the model it was made from with its hash, target, candidate, versions",
    "mm_edge.measured": "the shapes at which open sizes are measured; only where sizes are open",
}
INTRODUCTION = """\
# Reference

Written from the code by `make docs`; a test compares the two. For how to use it, see [tutorial.md](tutorial.md) and
[how-to.md](how-to.md).
"""
CODES = """\
## Exit codes

| code | meaning |
|---|---|
| 0 | done |
| 1 | the job ran and failed, or a limit of `report --fail-if-...` was exceeded; what was made is kept |
| 2 | refused before anything was made: a wrong option, model, data or folder |
"""


def write_reference() -> str:
    """Return the page."""
    parts = [INTRODUCTION, "## Commands\n", *_commands(), CODES, *_fields(), *_metadata()]
    return "\n".join(parts).rstrip() + "\n"


def _commands() -> Iterator[str]:
    context = main.context_class(main, info_name="mm-edge", **main.context_settings)
    for name in SUBCOMMANDS:
        command = main.get_command(context, name)
        assert command is not None
        yield from _command(command, click.Context(command, parent=context, info_name=name))


def _command(command: click.Command, context: click.Context) -> Iterator[str]:
    usage = " ".join(command.collect_usage_pieces(context))
    yield f"### {context.command_path}\n\n    {context.command_path} {usage}\n"
    yield f"{inspect.cleandoc(command.help or '')}\n"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            nested = command.get_command(context, name)
            assert nested is not None
            yield from _command(nested, click.Context(nested, parent=context, info_name=name))
        return
    sections: dict[str, list[str]] = {}
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context) if isinstance(parameter, click.Option) else None
        if record is not None:
            section = parameter.section if isinstance(parameter, RecordOption) else OTHER
            sections.setdefault(section, []).append(f"| `{_cell(record[0])}` | {_cell(record[1])} |")
    for section, rows in sections.items():
        title = f"{section}: " if len(sections) > 1 else ""
        yield "\n".join([f"| {title}option | |", "|---|---|", *rows, ""])


def _fields() -> Iterator[str]:
    yield (
        f"## report.json\n\nschema_version {records.SCHEMA_VERSION}. Fields are added under a raised version and never "
        "renamed. null means: not measured, or not asked for.\n"
    )
    for record in RECORDS:
        yield f"### {record.__name__}\n\n{_description(record)}\n"
        documented = _attributes(record)
        rows = [
            f"| `{item.name}` | {_cell(str(item.type))} | {_cell(documented.get(item.name, ''))} |"
            for item in dataclasses.fields(record)
        ]
        yield "\n".join(["| field | type | |", "|---|---|---|", *rows, ""])


def _description(record: type[Any]) -> str:
    return inspect.cleandoc(record.__doc__ or "").split("\n\nAttributes:")[0]


def _attributes(record: type[Any]) -> dict[str, str]:
    """Return the text of each field in the docstring's list of attributes."""
    _, _, listed = inspect.cleandoc(record.__doc__ or "").partition("Attributes:\n")
    found: dict[str, str] = {}
    name = ""
    for line in textwrap.dedent(listed).splitlines():
        if line and not line.startswith(" ") and ": " in line:
            name, _, text = line.partition(": ")
            found[name] = text
        elif name:
            found[name] += f" {line.strip()}"
    return found


def _metadata() -> Iterator[str]:
    rows = [f"| `{key}` | {text} |" for key, text in METADATA.items()]
    head = "## Metadata of artifacts\n\nKeys of the `.onnx` file's own metadata; each value is JSON.\n"
    yield "\n".join([head, "| key | |", "|---|---|", *rows, ""])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    print(write_reference(), end="")

"""`mm-edge report`: print the report of a run directory."""

from __future__ import annotations

from pathlib import Path

import click

from mm_edge.errors import UsageError


@click.command("report")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--open", "open_page", is_flag=True, help="Open the page in a browser.")
def report(folder: Path, open_page: bool) -> None:
    """Print the report of a run directory."""
    if open_page:
        raise UsageError("--open is not available yet; the report is in report.md beside report.json")

    from rich.console import Console

    from mm_edge.report import print_report, read_report

    print_report(read_report(folder), Console())

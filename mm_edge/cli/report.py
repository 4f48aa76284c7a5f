"""`mm-edge report`: print the report of a run directory, or compare several."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mm_edge.errors import JobError, UsageError, reading, visible

if TYPE_CHECKING:
    from mm_edge.records import Report

PATH = click.Path(path_type=Path)


@click.command("report")
@click.argument("folders", metavar="DIR...", nargs=-1, required=True, type=PATH)
@click.option("--open", "open_page", is_flag=True, help="Open the page in a browser.")
@click.option("--html", type=PATH, metavar="FILE", help="Write the page to this file.  [default: DIR/report.html]")
@click.option(
    "--fail-if-slower",
    type=click.FloatRange(min=0),
    metavar="PERCENT",
    help="End with 1 where a run is slower than the first by more than this.",
)
@click.option(
    "--fail-if-worse",
    type=click.FloatRange(min=0),
    metavar="POINTS",
    help="End with 1 where the quality of a run is below that of the first by more than this.",
)
def report(
    folders: tuple[Path, ...],
    open_page: bool,
    html: Path | None,
    fail_if_slower: float | None,
    fail_if_worse: float | None,
) -> None:
    """Print the report of a run directory, or compare several.

    Of several runs the later ones are compared with the first.
    """
    if len(folders) > 1:
        _compare(folders, open_page, html, fail_if_slower, fail_if_worse)
        return
    if fail_if_slower is not None or fail_if_worse is not None:
        raise UsageError("--fail-if-slower and --fail-if-worse compare runs; give at least two run directories")
    _show(folders[0], open_page, html)


def _show(folder: Path, open_page: bool, html: Path | None) -> None:
    from mm_edge.report import PAGE, read_report

    found = read_report(folder)
    place = folder if folder.is_dir() else folder.parent
    page = place / PAGE if html is None else html
    with reading(f"the report in '{folder}'", UsageError):
        _write_and_print(found, place, page, html is not None or (open_page and not page.exists()))
    if open_page:
        click.launch(str(page))


def _write_and_print(found: Report, place: Path, page: Path, write: bool) -> None:
    from mm_edge.progress import Terminal
    from mm_edge.report import print_paths, print_report, save_page

    if write:
        from mm_edge.report.page import write_page

        save_page(page, write_page(found, place))
    print_report(found, Terminal())
    print_paths(found, place, Terminal())


def _compare(
    folders: tuple[Path, ...],
    open_page: bool,
    html: Path | None,
    fail_if_slower: float | None,
    fail_if_worse: float | None,
) -> None:
    """Print the comparison.

    Raises:
        JobError: a run is slower or worse than allowed.
    """
    if open_page and html is None:
        raise UsageError("--open shows a page and a comparison has none yet; give --html FILE with it")

    from mm_edge.progress import Terminal
    from mm_edge.report import read_report
    from mm_edge.report.compare import compare_runs, find_regressions
    from mm_edge.report.terminal import print_comparison

    with reading("one of the reports", UsageError):
        comparison = compare_runs([(folder, read_report(folder)) for folder in folders])
    regressions = find_regressions(comparison, fail_if_slower, fail_if_worse)
    print_comparison(comparison, Terminal())
    if html is not None:
        from mm_edge.report import save_page
        from mm_edge.report.page.comparison import write_comparison_page

        save_page(html, write_comparison_page(comparison))
        click.echo(f"page:         {visible(str(html))}")
    if open_page:
        click.launch(str(html))
    if regressions:
        raise JobError("; ".join(regressions))

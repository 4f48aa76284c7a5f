"""report.json, report.md and report.html in a run directory."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mm_edge.errors import UsageError
from mm_edge.records import LONGEST_JSON, SCHEMA_VERSION, Report, from_json, parse_json, to_json
from mm_edge.report.markdown import write_markdown
from mm_edge.report.page import write_page
from mm_edge.store import write_atomically

PAGE = "report.html"
REPORT_FILES = ("report.json", "report.md", PAGE)


def write_report(report: Report, folder: Path) -> None:
    """Write report.json, report.md and report.html in `folder`, whose samples the page shows.

    Raises:
        ValueError: the report is not the same after it is read back (a defect: NaN, or a value of the wrong type).
        JobError: the disk is full, or the path cannot be written.
    """
    plain = to_json(report)
    where = _find_non_finite(plain, "Report")
    if where is not None:
        raise ValueError(f"{where} is not a finite number; what was not measured is None")
    text = json.dumps(plain, indent=2, allow_nan=False) + "\n"
    if to_json(from_json(Report, parse_json(text))) != parse_json(text):
        raise ValueError("the report does not come back from JSON as it went")
    write_atomically(folder / "report.json", text.encode())
    write_atomically(folder / "report.md", _encoded(write_markdown(report)))
    write_atomically(folder / PAGE, _encoded(write_page(report, folder)))


def save_page(path: Path, page: str) -> None:
    """Write a page, whole or not at all."""
    write_atomically(path, _encoded(page))


def _encoded(text: str) -> bytes:
    """Return text as UTF-8; file names that are no UTF-8 are escaped, for they must not lose a report."""
    return text.encode("utf-8", "backslashreplace")


def read_report(path: Path) -> Report:
    """Read a report from a run directory, or from the report.json itself.

    Raises:
        UsageError: there is none, it is not a report, or a newer mm-edge wrote it.
    """
    file = path / "report.json" if path.is_dir() else path
    if file.exists() and not file.is_file():
        raise UsageError(f"'{file}' is no file; give a folder that mm-edge prune-export or mm-edge demo wrote")
    try:
        if file.stat().st_size > LONGEST_JSON:
            raise ValueError("longer than any report")
        data = parse_json(file.read_bytes())
    except FileNotFoundError as error:
        raise UsageError(
            f"no report.json in '{path}'; give a folder that mm-edge prune-export or mm-edge demo wrote"
        ) from error
    except OSError as error:
        raise UsageError(f"cannot read '{file}': {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(f"'{file}' is not JSON; run mm-edge prune-export again to write it") from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if type(version) is int and version > SCHEMA_VERSION:
        raise UsageError(
            f"'{file}' has schema_version {version} and this mm-edge reads up to {SCHEMA_VERSION}; update mm-edge"
        )
    try:
        report = from_json(Report, data)
    except (ValueError, OverflowError, RecursionError) as error:
        raise UsageError(f"'{file}' is not a report of mm-edge: {error}") from error
    where = _find_non_finite(data, "Report")
    if where is not None:
        raise UsageError(f"'{file}' is not a report of mm-edge: {where} is not a finite number")
    return report


def _find_non_finite(value: Any, where: str) -> str | None:
    if isinstance(value, float):
        return None if math.isfinite(value) else where
    children: Any = ()
    if isinstance(value, dict):
        children = ((f"{where}.{key}", child) for key, child in value.items())
    elif isinstance(value, list):
        children = ((f"{where}[{i}]", child) for i, child in enumerate(value))
    return next((found for name, child in children if (found := _find_non_finite(child, name)) is not None), None)

"""report.html as one document: styles, data, sections and scripts, under a policy that forbids everything else.

The policy names the hashes of the scripts and styles that mm-edge wrote: markup that got in through a name of a file or
a class could run nothing, and no address can be asked for anything.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from mm_edge.records import Report
from mm_edge.report.page.markup import NOTHING, Html, element, join, text
from mm_edge.report.page.plots import FILTERED, plot_values
from mm_edge.report.page.sections import SECTIONS, Page, filters, first_screen


def write_page(report: Report, folder: Path) -> str:
    """Return report.html of `report`, whose samples are read from the run directory `folder`."""
    page = Page.of(report, folder)
    first = first_screen(page)
    parts = [section(page) for section in SECTIONS]
    title = f"{report.model.name} on {report.target.get('name', 'unknown target')}"
    data = {"plots": page.drawn, "rows": plot_values(page.overview), "filters": list(FILTERED)}
    return write_document(title, [first, filters(page), *parts], data)


def write_document(title: str, parts: Sequence[Html | None], data: Mapping[str, Any]) -> str:
    """Return a whole document; `data` is read by its script."""
    style, library, script = (_read(name) for name in ("page.css", "vega.js", "page.js"))
    policy = (
        f"default-src 'none'; script-src {_hash(library)} {_hash(script)}; style-src {_hash(style)}; "
        "base-uri 'none'; form-action 'none'"
    )
    head = [
        Html('<meta charset="utf-8">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html('<meta name="color-scheme" content="light dark">'),
        element("title", text(f"{title} - mm-edge")),
        Html(f"<style>{style}</style>"),
    ]
    has_plots = bool(data.get("plots"))
    body = [
        element("main", join(parts)),
        Html(f'<script type="application/json" id="data">{_escape_json(data)}</script>'),
        Html(f'<script type="module">{library}</script>') if has_plots else NOTHING,
        Html(f'<script type="module">{script}</script>'),
    ]
    return f'<!DOCTYPE html>\n<html lang="en"><head>\n{join(head)}\n</head>\n<body>\n{join(body)}\n</body></html>\n'


def _escape_json(data: Mapping[str, Any]) -> str:
    """Return JSON that cannot end the script element it stands in."""
    written = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return written.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(source: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def _read(name: str) -> str:
    return (files("mm_edge.report.page") / name).read_text(encoding="utf-8")

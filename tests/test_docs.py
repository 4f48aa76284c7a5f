"""What the documentation points at exists: files it names, pages and sections it links to."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
NAMED = re.compile(r"`((?:mm_edge|benchmarks|targets|tests|docs)/[\w./-]+\.\w+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and GitLab make them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    missing = [name for name in NAMED.findall(page.read_text()) if not (ROOT / name).is_file()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


def test_results_that_the_method_quotes_exist() -> None:
    named = re.findall(r"`([\w-]+\.json)`", (ROOT / "docs" / "method.md").read_text())
    results = {path.name for path in (ROOT / "benchmarks" / "results").glob("*.json")}
    assert set(named) - {"report.json"} <= results


def test_the_figures_of_detectors_are_those_of_the_benchmark() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "detect.json").read_text())
    measured = [
        f"| {model} | {name} | {row['macs_fraction']:.3f} | {row['map50']:.3f} | {row['map']:.3f} |"
        for model, entries in results.items()
        for name, entry in entries.items()
        for row in entry["rows"].values()
        if "map50" in row
    ]
    text = (ROOT / "docs" / "method.md").read_text()
    quoted = [line for line in text.splitlines() if line.startswith(tuple(f"| {model} |" for model in results))]
    assert quoted == measured

"""report.html: what it says, that nothing gets in through names, and that a browser shows it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import open_page
from reports import FAST, UNMEASURED, candidate, make_report

from mm_edge.records import (
    Candidate,
    Constraints,
    Fidelity,
    LayerPicture,
    OutputFidelity,
    Report,
    Sustained,
    SustainedPoint,
)
from mm_edge.report.decision import decide
from mm_edge.report.figures import CHOSEN, CONTROL, DENSE, OTHER, read_overview
from mm_edge.report.page import write_page
from mm_edge.report.page.inspection import write_inspection_page
from mm_edge.report.page.plots import quality_against_speed
from mm_edge.report.values import NOT_MEASURED

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&</style>\x1b[2J"
SLOW = candidate("uniform", 1.5, drop=0.2, pareto=True)
CONTROL_96 = dataclasses.replace(
    candidate("dense", 1.2, drop=3.0), id="dense@16", kind="dense", signal="none", input_shape=(1, 3, 16, 16)
)
LAYERS = (
    LayerPicture("a.weight", "stem", 16, 12, 0.25, 0.0, 0.5, 0.01),
    LayerPicture("b.weight", "expand", 32, 32, 0.0),
)


class Elements(HTMLParser):
    """Collects the elements and their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += attrs


def full_report(**changes: object) -> Report:
    report = make_report(FAST, SLOW, UNMEASURED, CONTROL_96, layers=LAYERS, command="mm-edge demo")
    return dataclasses.replace(report, **changes)  # type: ignore[arg-type]


def read_data(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    loaded: dict[str, Any] = json.loads(found.group(1))
    return loaded


def test_the_decision_says_what_it_brings_and_costs() -> None:
    report = full_report()
    decision = decide(report, read_overview(report))
    assert decision.ship == "Ship product/balanced/structured/fp32."
    assert decision.because == (
        "It runs at 2.00x the dense speed (95 % interval 1.95 to 2.05), 1 ms per input. It loses 0.50 points of top-1. "
        "Its file has 2 MB instead of 4 MB."
    )
    assert decision.doubts == ("two images were skipped",)


def test_doubts_come_from_intervals_and_verdicts() -> None:
    unsure = dataclasses.replace(FAST, speedup=1.02, speedup_ci=(0.9, 1.1))
    report = make_report(unsure)
    doubts = decide(report, read_overview(report)).doubts
    assert doubts[0] == ("The interval of the speed-up holds 1: the measurement cannot tell it from the dense network.")
    slower = make_report(dataclasses.replace(FAST, speedup=0.9, speedup_ci=(0.8, 0.95)))
    assert decide(slower, read_overview(slower)).doubts[0] == "It is no faster than the dense network."
    few = make_report(dataclasses.replace(FAST, fidelity=Fidelity({}, map50_to_dense=1.0, boxes=100)))
    assert decide(few, read_overview(few)).doubts[0] == (
        "Its boxes were compared with 100 boxes of the dense network: a loss below about 3 points would not show. "
        "Give more photos, or a larger validation share with --split."
    )
    outputs = {"y": OutputFidelity(0.25, 0.9)}
    fewer = make_report(dataclasses.replace(FAST, fidelity=Fidelity(outputs, map50_to_dense=1.0, boxes=10)))
    assert decide(fewer, read_overview(fewer)).doubts[0] == (
        "The dense network detects 10 boxes in the validation images: too few to compare candidates by. "
        "Give more photos, or a larger validation share with --split."
    )


def test_without_a_choice_the_dense_network_is_shipped() -> None:
    report = make_report(FAST, chosen=None)
    assert decide(report, read_overview(report)).ship == "Ship the dense network."


def test_rows_have_roles_and_losses() -> None:
    overview = read_overview(full_report())
    assert [row.role for row in overview.all] == [DENSE, CHOSEN, "front", OTHER, CONTROL]
    assert overview.quality is not None and overview.quality.name == "top-1"
    chosen = overview.chosen
    assert chosen is not None and chosen.loss == pytest.approx(0.5) and chosen.macs_share == 0.5
    assert overview.rows[2].quality is None and overview.rows[2].speedup is None


def test_without_labels_rows_are_compared_by_agreement_with_dense() -> None:
    alike = dataclasses.replace(FAST, accuracy_top1=None, accuracy_drop=None, agreement_top1=0.97)
    report = make_report(alike)
    report = dataclasses.replace(report, dense=dataclasses.replace(report.dense, accuracy_top1=None))
    overview = read_overview(report)
    assert overview.quality is not None and overview.quality.name == "agreement with dense"
    assert overview.dense.quality == 1.0 and overview.rows[0].loss == pytest.approx(3.0)


def test_the_same_network_under_two_names_knows_of_both() -> None:
    other = dataclasses.replace(FAST, id="magnitude/balanced/structured/fp32")
    rows = read_overview(make_report(FAST, other)).rows
    assert (rows[0].same_as, rows[1].same_as) == ((other.id,), (FAST.id,))


def test_the_page_shows_all_ids_of_a_network(tmp_path: Path) -> None:
    ids = ("gradient/balanced/structured/fp32", "product/balanced/structured/fp32")
    report = make_report(dataclasses.replace(FAST, also_ids=ids))
    assert read_overview(report).rows[0].same_as == ids
    assert "other names" in (page := write_page(report, tmp_path)) and "gradient/balanced" in page
    assert "other names" not in write_page(make_report(FAST), tmp_path)


def test_constraints_are_drawn_as_lines() -> None:
    spec = quality_against_speed(read_overview(full_report()), Constraints(max_drop=1.0, speedup=1.4, latency_ms=0.5))
    lines = [layer["encoding"] for layer in spec["layer"] if layer["mark"].get("type") == "rule" and "data" in layer]
    assert [next(iter(line.items())) for line in lines] == [
        ("y", {"datum": 89.0, "type": "quantitative"}),
        ("x", {"datum": 1.4, "type": "quantitative"}),
        ("x", {"datum": 4.0, "type": "quantitative"}),
    ]


def test_the_page_shows_every_section_the_report_has_data_for(tmp_path: Path) -> None:
    titles = re.findall(r"<h2[^>]*>([^<$]*)</h2>", write_page(full_report(), tmp_path))
    assert titles == [
        "Doubts",
        "What each dimension bought",
        "Multiply-adds and speed",
        "Layers of the chosen network",
        "Strategies",
        "All candidates",
        "What kept its full width",
        "How this was measured",
        "Do it again",
    ]


def test_the_page_shows_each_layers_share_of_the_time_before_and_after(tmp_path: Path) -> None:
    timed = (dataclasses.replace(LAYERS[0], time_before=0.5, time_after=0.4), *LAYERS[1:])
    page = write_page(full_report(layers=timed), tmp_path)
    assert "time before" in page and "50.00%" in page.replace(" ", "")
    speedup = read_overview(full_report()).chosen.speedup  # type: ignore[union-attr]
    assert speedup is not None
    values = read_data(page)["plots"]["times"]["data"]["values"]
    assert [item["before"] for item in values] == [0.5, 0.0]
    assert values[0]["after"] == pytest.approx(0.4 / speedup)
    assert "times" not in read_data(write_page(full_report(), tmp_path))["plots"]


def test_a_sustained_run_is_a_curve_with_its_table(tmp_path: Path) -> None:
    points = (SustainedPoint(60.0, 10.0, 6.0, 2400.0, 71.0), SustainedPoint(120.0, 12.0, 7.0))
    page = write_page(full_report(sustained=Sustained("a", 2.0, points)), tmp_path)
    values = read_data(page)["plots"]["sustained"]["data"]["values"]
    assert [(item["minutes"], item["ms"]) for item in values] == [(1.0, 10.0), (1.0, 6.0), (2.0, 12.0), (2.0, 7.0)]
    assert "2400" in page and NOT_MEASURED in page


def test_the_page_of_an_empty_report_leaves_out_what_is_unknown(tmp_path: Path) -> None:
    report = make_report(chosen=None, skipped_groups=(), warnings=())
    titles = re.findall(r"<h2[^>]*>([^<$]*)</h2>", write_page(report, tmp_path))
    assert titles == ["All candidates", "How this was measured"]


def write_samples(folder: Path) -> Path:
    samples = folder / "samples" / "balanced.json"
    samples.parent.mkdir()
    samples.write_text(json.dumps({"result": {"dense_ns": [3_000_000, 2_000_000], "candidate_ns": [1_000_000] * 200}}))
    return samples


def test_samples_become_a_curve_and_damaged_ones_are_left_out(tmp_path: Path) -> None:
    samples = write_samples(tmp_path)
    values = read_data(write_page(full_report(), tmp_path))["plots"]["samples"]["data"]["values"]
    assert [value["ms"] for value in values if value["network"] == "dense"] == [2.0, 3.0]
    assert len(values) == 82
    samples.write_text("[1]")
    assert "samples" not in read_data(write_page(full_report(), tmp_path))["plots"]


def hostile_report() -> Report:
    def spoil(c: Candidate) -> Candidate:
        return dataclasses.replace(c, id=HOSTILE + c.id, strategy=HOSTILE, signal=HOSTILE + c.signal, kind="structured")

    report = full_report(target={"name": HOSTILE, HOSTILE: HOSTILE}, environment={"os": HOSTILE}, warnings=(HOSTILE,))
    spoilt = tuple(spoil(c) for c in report.candidates)
    assert report.chosen is not None
    return dataclasses.replace(
        report,
        model=dataclasses.replace(report.model, name=HOSTILE, source=HOSTILE),
        candidates=spoilt,
        chosen=dataclasses.replace(report.chosen, id=spoilt[0].id, reason=HOSTILE),
        layers=(dataclasses.replace(LAYERS[0], fqn=HOSTILE, role=HOSTILE),),
        command=HOSTILE,
        seconds={HOSTILE: 1.0},
    )


def test_names_cannot_become_markup(tmp_path: Path) -> None:
    clean, spoilt = (Elements(write_page(report, tmp_path)) for report in (full_report(), hostile_report()))
    assert spoilt.names.count("script") == clean.names.count("script") == 3
    assert "img" not in spoilt.names
    assert not [key for key, _ in spoilt.attributes if key.startswith("on")]
    assert "\x1b" not in write_page(hostile_report(), tmp_path)


def test_the_page_is_one_file_of_at_most_three_megabytes(tmp_path: Path) -> None:
    page = write_page(full_report(), tmp_path)
    assert len(page.encode()) < 3_000_000
    addresses = [value for key, value in Elements(page).attributes if key in ("src", "href", "action")]
    assert addresses == []
    assert "default-src 'none'" in page and "unsafe" not in page.split("</head>")[0]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_draws_the_page_and_asks_for_nothing(tmp_path: Path, width: int, scheme: str) -> None:
    file = tmp_path / "report.html"
    write_samples(tmp_path)
    file.write_text(write_page(full_report(), tmp_path))
    with open_page(file, width, scheme) as opened:
        assert opened.said == [] and opened.asked == [file.as_uri()]
        plots = read_data(file.read_text())["plots"]
        assert opened.page.locator(".plot svg").count() == len(plots) > 3
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.slow
def test_filters_work_on_plots_and_tables(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(write_page(full_report(), tmp_path))
    with open_page(file) as opened:
        page = opened.page
        before = page.locator("#all tbody tr:visible").count()
        points = page.locator('[data-plot="decision"] path[aria-roledescription="point"]')
        drawn = points.count()
        page.select_option("#filter-signal", "none")
        page.wait_for_function("document.getElementById('shown').value.startsWith('1 of 4')")
        assert (before, page.locator("#all tbody tr:visible").count()) == (5, 2)
        assert points.count() < drawn
        page.select_option("#filter-signal", "")
        page.locator("#all thead button", has_text="speed-up").click()
        first = page.locator("#all tbody tr").first
        assert first.locator("th").inner_text() == "dense"
        assert opened.said == []


@pytest.mark.slow
def test_hostile_names_run_nothing_in_a_browser(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(write_page(hostile_report(), tmp_path))
    with open_page(file) as opened:
        point = opened.page.locator('[data-plot="decision"] path[aria-roledescription="point"]').last
        point.hover()
        opened.page.wait_for_selector("#vg-tooltip-element.visible")
        assert opened.page.locator("#vg-tooltip-element img, #vg-tooltip-element script").count() == 0
        assert opened.said == [] and opened.asked == [file.as_uri()]


@pytest.mark.slow
def test_axe_finds_no_serious_fault(tmp_path: Path) -> None:
    if importlib.util.find_spec("axe_playwright_python") is None:
        pytest.skip("axe-core is missing: pip install axe-playwright-python")
    import axe_playwright_python

    script = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text()
    file = tmp_path / "report.html"
    file.write_text(write_page(full_report(), tmp_path))
    with open_page(file) as opened:
        opened.page.evaluate(script)
        found = opened.page.evaluate("axe.run()")["violations"]
    assert [(item["impact"], item["id"]) for item in found if item["impact"] in ("serious", "critical")] == []


DOCUMENT: dict[str, Any] = {
    "model": {"name": "net/" + HOSTILE, "params": 1_000_000, "macs": 2_000_000},
    "inputs": [],
    "warnings": [HOSTILE],
    "layers": [
        {
            "fqn": "a.weight",
            "role": "stem",
            "shape": [8, 3, 3, 3],
            "macs": 1_500_000,
            "lo": 0,
            "hi": 0.3,
            "range": "stem",
            "recognised": "reads the model's input",
        }
    ],
    "groups": [{"id": "a.weight:0", "size": 8, "tensors": ["a.weight", "b.bias"]}],
    "pinned": [{"id": HOSTILE, "size": 3, "tensors": [HOSTILE], "reason": "input of the model"}],
}


def test_the_page_of_a_network_has_its_totals_layers_and_groups() -> None:
    page = write_inspection_page(DOCUMENT)
    assert (
        "1 M parameters, 2 M multiply-adds; 1 prunable layers hold 1.5 M of them; 1 coupled groups can lose channels, "
        "1 keep their width."
    ) in page
    assert Elements(page).names.count("script") == 3 and "img" not in Elements(page).names
    assert read_data(page)["plots"]["groups"]["data"]["values"] == [
        {"layer": "a.weight", "number": 1, "group": "a.weight:0", "width": 8}
    ]


@pytest.mark.slow
def test_a_browser_draws_the_page_of_a_network(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(write_inspection_page(DOCUMENT))
    with open_page(file) as opened:
        assert opened.page.locator(".plot svg").count() == 2
        assert opened.said == [] and opened.asked == [file.as_uri()]

"""--sustained: the curve is measured once, kept in the run directory, and shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_job import SIDE, save_checkpoint, write_images

from mm_edge.api import run_job
from mm_edge.errors import UsageError
from mm_edge.load.models import LoadOptions, load_model
from mm_edge.progress import Stages
from mm_edge.records import Report, SustainedPoint
from mm_edge.run.request import make_request

POINTS = (SustainedPoint(1.0, 2.0, 1.0, 1800.0, 50.0), SustainedPoint(2.0, 3.0, 2.0, 1500.0, 70.0))


def run(folder: Path) -> Report:
    request = make_request(
        data=str(folder / "images"),
        out=folder / "run",
        signals="magnitude",
        strategies="balanced",
        input_sizes="none",
        recover="none",
        sustained=0.01,
    )
    return run_job(
        lambda: load_model(str(folder / "net.pt"), LoadOptions(input_size=(3, SIDE, SIDE))), request, Stages()
    )


def test_the_curve_is_in_the_report_and_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path / "net.pt")
    write_images(tmp_path / "images")
    calls: list[float] = []

    def measure(*files: object, minutes: float, **rest: object) -> tuple[SustainedPoint, ...]:
        calls.append(minutes)
        return POINTS

    monkeypatch.setattr("mm_edge.run.sustain.measure_sustained", measure)
    first, second = run(tmp_path), run(tmp_path)
    assert calls == [0.01]
    for report in (first, second):
        assert report.chosen is not None and report.sustained is not None
        assert report.sustained.id == report.chosen.id and report.sustained.points == POINTS
        for item in report.candidates:
            assert item.latency_ms.verdict in ("stable", "noisy", "unusable")
            assert item.dense_latency_ms.verdict == item.latency_ms.verdict
            assert (item.speedup is None) == (item.latency_ms.verdict == "unusable")
    text = (tmp_path / "run" / "report.md").read_text()
    assert "ran in turn for 0.01 minutes without pause." in text
    assert "| first | 0.0 | 2 ms | 1 ms | 2.00x | 1800 MHz | 50 C |" in text
    assert "| last | 0.0 | 3 ms | 2 ms | 1.50x | 1500 MHz | 70 C |" in text
    document = json.loads((tmp_path / "run" / "report.json").read_text())
    assert document["sustained"]["points"][1]["clock_mhz"] == 1500.0


def test_it_needs_measuring() -> None:
    with pytest.raises(UsageError) as caught:
        make_request(sustained=5, bench=False)
    assert str(caught.value) == "--sustained measures for minutes and --no-bench measures nothing; leave one out"

"""A sustained run: the worker's points, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bench_models import save_convs
from scripted import HOST, Scripted

from mm_edge.bench import worker
from mm_edge.bench.sustained import measure_sustained
from mm_edge.bench.transport import LocalTransport
from mm_edge.errors import BenchError
from mm_edge.records import SustainedPoint


def point(**changes: Any) -> dict[str, Any]:
    return {
        "seconds": 1.5,
        "dense_ns": 2_000_000,
        "candidate_ns": 1_000_000,
        "frequency_khz": 1_800_000,
        "temperature_c": 61,
        **changes,
    }


def test_the_curve_here_runs_from_start_to_end(tmp_path: Path) -> None:
    models = save_convs(tmp_path / "dense.onnx", 16), save_convs(tmp_path / "small.onnx", 8)
    points = measure_sustained(*models, HOST, transport=LocalTransport(), minutes=0.005)
    assert 1 <= len(points) <= worker.SUSTAIN_POINTS
    assert [item.seconds for item in points] == sorted(item.seconds for item in points)
    assert points[-1].seconds >= 0.3
    assert min(item.candidate_ms for item in points) > 0


def test_points_are_read_in_their_units() -> None:
    board = Scripted({"points": [point(), point(frequency_khz=None, temperature_c=None)]})
    found = measure_sustained(Path("d"), Path("c"), HOST, transport=board, minutes=2)
    assert found == (SustainedPoint(1.5, 2.0, 1.0, 1800.0, 61.0), SustainedPoint(1.5, 2.0, 1.0))
    ((command, _, options),) = board.asked
    assert (command, options["seconds"]) == ("sustain", 120)


def test_an_emulated_device_is_not_asked() -> None:
    board = Scripted({}, source="emulated")
    assert measure_sustained(Path("d"), Path("c"), HOST, transport=board, minutes=2) == ()
    assert board.asked == []


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (None, "the board sent no points of a sustained run; the answer was refused"),
        ([], "the board sent no points of a sustained run"),
        ([7], "the board sent the point 7 of a sustained run"),
        ([point(dense_ns=0)], "the board sent the point .* of a sustained run"),
        ([point(seconds="soon")], "the board sent the point .* of a sustained run"),
        ([point(temperature_c="hot")], "the board sent the point .* of a sustained run"),
    ],
)
def test_points_that_are_none_are_refused(points: Any, message: str) -> None:
    with pytest.raises(BenchError, match=message):
        measure_sustained(Path("d"), Path("c"), HOST, transport=Scripted({"points": points}), minutes=1)

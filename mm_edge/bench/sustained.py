"""Times of two models that run in turn without pause for minutes, while the device heats up."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mm_edge.bench.session import MAX_SAMPLE_NS, run_options
from mm_edge.bench.target import Target
from mm_edge.bench.transport import DEFAULT_TIMEOUT_S, Transport
from mm_edge.errors import BenchError
from mm_edge.records import SustainedPoint

MOST_POINTS = 1000


def measure_sustained(
    dense: Path, candidate: Path, target: Target, *, transport: Transport, minutes: float
) -> tuple[SustainedPoint, ...]:
    """Run `dense` and `candidate` in turn for `minutes` and return their times along the way.

    The candidate gets half of the runs, so that the device heats up as it does under both. Empty when the device is
    emulated.

    Raises:
        BenchError: the worker could not measure, or its answer is malformed.
    """
    if transport.source == "emulated":
        return ()
    files = {"dense": dense, "candidate": candidate}
    options = {**run_options(target), "seconds": 60 * minutes}
    result = transport.ask("sustain", files, options, 120 * minutes + DEFAULT_TIMEOUT_S)
    points = result.get("points")
    if not isinstance(points, list) or not 0 < len(points) <= MOST_POINTS:
        raise BenchError(f"{transport.name} sent no points of a sustained run; the answer was refused")
    return tuple(_read_point(point, transport.name) for point in points)


def _read_point(point: Any, device: str) -> SustainedPoint:
    if not isinstance(point, Mapping):
        raise BenchError(f"{device} sent the point {point!r} of a sustained run; the answer was refused")
    times: list[Any] = [point.get(key) for key in ("dense_ns", "candidate_ns")]
    seconds: Any
    clock: Any
    heat: Any
    seconds, clock, heat = (point.get(key) for key in ("seconds", "frequency_khz", "temperature_c"))
    good = (
        all(type(time) is int and 0 < time < MAX_SAMPLE_NS for time in times)
        and type(seconds) in (int, float)
        and 0 <= seconds < MAX_SAMPLE_NS
        and (clock is None or type(clock) is int)
        and (heat is None or type(heat) in (int, float))
    )
    if not good:
        raise BenchError(f"{device} sent the point {dict(point)!r} of a sustained run; the answer was refused")
    mhz = None if clock is None else clock / 1000
    return SustainedPoint(float(seconds), times[0] / 1e6, times[1] / 1e6, mhz, None if heat is None else float(heat))

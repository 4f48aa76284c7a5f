"""Writes figures as text: fractions in percent, numbers with units, None as `not measured`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from mm_edge.records import Candidate, Latency

NOT_MEASURED = "not measured"

_SCALES = ((1e9, "G"), (1e6, "M"), (1e3, "k"))

N = TypeVar("N", int, float)


def _or_not_measured(value: N | None, show: Callable[[N], str]) -> str:
    return NOT_MEASURED if value is None else show(value)


def show_percent(fraction: float | None) -> str:
    """Return 0.8765 as "87.65 %"."""
    return _or_not_measured(fraction, lambda f: f"{100 * f:.2f} %")


def show_number(value: float | None) -> str:
    """Return a figure without a unit, with four significant digits."""
    return _or_not_measured(value, lambda number: f"{number:.4g}")


def show_drop(points: float | None) -> str:
    """Return a drop of 1.5 points as "-1.50" (a loss reads as negative) and a gain as "+0.20"."""
    return _or_not_measured(points, lambda p: f"{0.0 - p:+.2f}")


def show_accuracy(fraction: float | None, interval: tuple[float, float] | None) -> str:
    """Return "87.65 % [86.20, 89.00]", the interval where there is one."""
    text = show_percent(fraction)
    return text if interval is None else f"{text} [{100 * interval[0]:.2f}, {100 * interval[1]:.2f}]"


def show_loss(candidate: Candidate) -> str:
    """Return "-1.50 [-2.40, -0.60]": a loss reads as negative; the interval where there is one."""
    text = show_drop(candidate.accuracy_drop)
    if candidate.drop_ci is None:
        return text
    return f"{text} [{0.0 - candidate.drop_ci[1]:+.2f}, {0.0 - candidate.drop_ci[0]:+.2f}]"


def show_ms(milliseconds: float | None) -> str:
    """Return milliseconds with three significant digits, e.g. "0.821 ms" or "14.3 ms"."""
    return _or_not_measured(milliseconds, lambda ms: f"{ms:.3g} ms" if ms < 1000 else f"{ms:.0f} ms")


def show_ratio(ratio: float | None) -> str:
    """Return "1.85x"."""
    return _or_not_measured(ratio, lambda r: f"{r:.2f}x")


def show_speedup(candidate: Candidate) -> str:
    """Return "1.85x [1.80, 1.90]", the interval where there is one."""
    text = show_ratio(candidate.speedup)
    if candidate.speedup is None or candidate.speedup_ci is None:
        return text
    return f"{text} [{candidate.speedup_ci[0]:.2f}, {candidate.speedup_ci[1]:.2f}]"


def show_count(count: int | None) -> str:
    """Return a count with a decimal prefix, e.g. "64.2 M"."""
    return _or_not_measured(count, _scaled)


def show_bytes(size: int | None) -> str:
    """Return bytes with a decimal prefix, e.g. "1.51 MB"."""
    return _or_not_measured(size, lambda s: f"{_scaled(s)}B" if s >= 1000 else f"{s} B")


def show_latency(latency: Latency) -> str:
    """Return p50, p90 and p99, samples, threads and source, or `not measured`."""
    if latency.p50 is None:
        return NOT_MEASURED
    threads = "" if latency.threads is None else f", {latency.threads} thread{'s' if latency.threads != 1 else ''}"
    tail = f"p90 {show_ms(latency.p90)}, p99 {show_ms(latency.p99)}"
    return f"p50 {show_ms(latency.p50)}, {tail} ({latency.samples} samples{threads}, {latency.source})"


def show_shape(shape: tuple[int, ...]) -> str:
    """Return (1, 3, 224, 224) as "1x3x224x224"."""
    return "x".join(str(size) for size in shape)


def _scaled(count: int) -> str:
    for scale, prefix in _SCALES:
        if count >= scale:
            return f"{count / scale:.3g} {prefix}"
    return str(count)

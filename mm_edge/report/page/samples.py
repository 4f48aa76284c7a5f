"""The raw samples of a measurement, thinned for a curve."""

from __future__ import annotations

from pathlib import Path

from mm_edge.records import parse_json

CURVE_POINTS = 80


def read_curves(folder: Path, artifact: str | None) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return the sorted milliseconds of dense and of the candidate, timed in turn; None where no samples are there.

    Args:
        folder: the run directory.
        artifact: the candidate's file, relative to it.
    """
    if artifact is None:
        return None
    try:
        result = parse_json((folder / "samples" / f"{Path(artifact).stem}.json").read_bytes())["result"]
        return _thin(result["dense_ns"]), _thin(result["candidate_ns"])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def _thin(times: list[int]) -> tuple[float, ...]:
    """Return at most CURVE_POINTS quantiles in milliseconds."""
    ordered = sorted(float(time) / 1e6 for time in times)
    count = min(CURVE_POINTS, len(ordered))
    last = len(ordered) - 1
    return tuple(ordered[round(last * index / max(1, count - 1))] for index in range(count))

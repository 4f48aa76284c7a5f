"""Several runs side by side: what their chosen networks are and, against the first run, what got slower or worse.

Two figures are compared only where they mean the same:

    quality    the same figure on the same data: source, number of validation inputs, split and seed
    speed      speed-ups of the same dense network on the same device (each was timed in turn with dense), otherwise
               median times on the same device
    size       always

With X in percent, a run is slower than the first if its speed is below (1 - X / 100) of it; with X in points, it is
worse if its quality is more than X points below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mm_edge.errors import UsageError
from mm_edge.records import Report
from mm_edge.report.figures import Overview, Row, read_overview

_DATA = ("source", "validation", "split", "seed")
MATTERING = ("device", "target", "model", "versions", "data")


@dataclass(frozen=True)
class Run:
    """One run: a name, its report and its rows."""

    name: str
    report: Report
    overview: Overview

    @property
    def row(self) -> Row:
        """The chosen network, or the dense one where none was chosen."""
        return self.overview.chosen or self.overview.dense


@dataclass(frozen=True)
class Change:
    """One figure of a run against the first run's.

    Attributes:
        what: "quality", "speed" or "size".
        value: the change: points of quality, or the share by which speed or size changed; None where they are not
            compared.
        why_not: why they are not compared; empty where they are.
    """

    what: str
    value: float | None
    why_not: str = ""


@dataclass(frozen=True)
class Comparison:
    """Runs, and for each but the first its differences from it and its changes."""

    runs: tuple[Run, ...]
    differences: tuple[tuple[str, ...], ...]
    changes: tuple[tuple[Change, ...], ...]


def compare_runs(reports: Sequence[tuple[Path, Report]]) -> Comparison:
    """Return the comparison of some runs, given as (run directory, report).

    Raises:
        UsageError: one run is given twice, or the runs have no figure in common.
    """
    paths = [path.resolve() for path, _ in reports]
    for path, _ in reports:
        if paths.count(path.resolve()) > 1:
            raise UsageError(f"'{path}' is given twice; give different runs to compare")
    runs = tuple(
        Run(name, report, read_overview(report)) for name, (_, report) in zip(_names(reports), reports, strict=True)
    )
    first, others = runs[0], runs[1:]
    changes = tuple((_quality(first, run), _speed(first, run), _size(first, run)) for run in others)
    for run, found in zip(others, changes, strict=True):
        if all(change.value is None for change in found):
            reasons = "; ".join(change.why_not for change in found)
            raise UsageError(f"'{first.name}' and '{run.name}' cannot be compared: {reasons}")
    return Comparison(runs, tuple(_differences(first, run) for run in others), changes)


def find_regressions(comparison: Comparison, slower: float | None, worse: float | None) -> list[str]:
    """Return a sentence for every run that is slower or worse than the first by more than the limits.

    Args:
        comparison: the runs.
        slower: the largest loss of speed in percent; None looks for none.
        worse: the largest loss of quality in points; None looks for none.

    Raises:
        UsageError: a figure that has a limit cannot be compared.
    """
    found = []
    first = comparison.runs[0]
    for run, changes in zip(comparison.runs[1:], comparison.changes, strict=True):
        by_name = {change.what: change for change in changes}
        if slower is not None:
            speed = _required(by_name["speed"], "--fail-if-slower", first, run)
            if speed < -slower / 100:
                found.append(f"{run.name} is {-100 * speed:.1f} % slower than {first.name} (allowed: {slower:g} %)")
        if worse is not None:
            quality = _required(by_name["quality"], "--fail-if-worse", first, run)
            if quality < -worse:
                found.append(f"{run.name} is {-quality:.2f} points worse than {first.name} (allowed: {worse:g})")
    return found


def show_change(change: Change) -> str:
    """Return a change as text."""
    if change.value is None:
        return f"not compared: {change.why_not}"
    return f"{change.value:+.2f} points" if change.what == "quality" else f"{100 * change.value:+.1f} %"


def _required(change: Change, option: str, first: Run, run: Run) -> float:
    if change.value is None:
        raise UsageError(f"{option} cannot be judged for '{first.name}' and '{run.name}': {change.why_not}")
    return change.value


def _names(reports: Sequence[tuple[Path, Report]]) -> list[str]:
    """Return the folders' names, with as many of their parents as tell them apart."""
    parts = [[*path.resolve().parts] for path, _ in reports]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]).removeprefix("//") for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path, _ in reports]


def _quality(first: Run, run: Run) -> Change:
    mine, other = first.overview.quality, run.overview.quality
    if mine is None or other is None or first.row.quality is None or run.row.quality is None:
        return Change("quality", None, "quality was not measured in both")
    if mine.name != other.name:
        return Change("quality", None, f"one has {mine.name}, the other {other.name}")
    for key in _DATA:
        before, after = (_name_of_data(item.report.data.get(key)) for item in (first, run))
        if before != after:
            return Change("quality", None, f"the data differ in {key}: {before} and {after}")
    loss = mine.loss(first.row.quality, run.row.quality)
    return Change("quality", None if loss is None else 0.0 - loss)


def _name_of_data(value: object) -> object:
    """Return the last part of a path: the same data may lie elsewhere on another machine."""
    return Path(value).name if isinstance(value, str) else value


def _speed(first: Run, run: Run) -> Change:
    before, after = first.row, run.row
    same_network = first.report.model.sha256 is not None and first.report.model.sha256 == run.report.model.sha256
    same_target = _device(first) == _device(run)
    if same_network and same_target and before.speedup and after.speedup:
        return Change("speed", after.speedup / before.speedup - 1)
    if not same_target:
        return Change("speed", None, f"they were measured on different devices: {_device(first)} and {_device(run)}")
    if before.p50 is None or after.p50 is None:
        return Change("speed", None, "speed was not measured in both")
    return Change("speed", before.p50 / after.p50 - 1)


def _size(first: Run, run: Run) -> Change:
    before, after = first.row.file_bytes, run.row.file_bytes
    if not before or not after:
        return Change("size", None, "the size of the file is not known in both")
    return Change("size", after / before - 1)


def _device(run: Run) -> str:
    """Return what identifies the device that a run was measured on."""
    environment = run.report.environment
    device = environment.get("fingerprint") or environment.get("cpu_model") or "unknown device"
    return f"{run.report.target.get('name', 'unknown target')} ({device})"


def _differences(first: Run, run: Run) -> tuple[str, ...]:
    """Return what the runs were made with that is not the same."""
    facts = [_facts(item) for item in (first, run)]
    return tuple(f"{key}: {facts[0][key]} -> {facts[1][key]}" for key in MATTERING if facts[0][key] != facts[1][key])


def _facts(run: Run) -> dict[str, str]:
    report = run.report
    versions = report.environment.get("packages") or {}
    return {
        "device": str(report.environment.get("cpu_model", "unknown")),
        "target": str(report.target.get("name", "unknown")),
        "model": report.model.name,
        "versions": ", ".join(f"{name} {version}" for name, version in sorted(versions.items())) or "unknown",
        "data": str(report.data.get("source", "none")),
    }

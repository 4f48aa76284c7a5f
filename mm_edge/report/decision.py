"""What to ship, in one sentence, and what speaks against it: the first thing the page and the bundle say."""

from __future__ import annotations

from dataclasses import dataclass

from mm_edge.records import Candidate, Report
from mm_edge.report.figures import Overview, Row
from mm_edge.report.summary import control_sentence, find_chosen
from mm_edge.report.values import show_bytes, show_ms, show_percent, show_ratio


@dataclass(frozen=True)
class Decision:
    """What to ship.

    Attributes:
        ship: the network to ship, in one short sentence.
        because: what it brings and what it costs.
        reason: why it was chosen of all; empty where none was.
        doubts: what makes the figures or the choice less sure, each a sentence.
    """

    ship: str
    because: str
    reason: str
    doubts: tuple[str, ...]


def decide(report: Report, overview: Overview) -> Decision:
    """Return what to ship of `report`, why, and the doubts."""
    chosen = overview.chosen
    if chosen is None:
        return Decision("Ship the dense network.", "No candidate was chosen.", "", _doubts(report, overview))
    what = " ".join(
        part for part in (_speed(chosen), _loss(report, overview, chosen), _storage(overview, chosen)) if part
    )
    reason = "" if report.chosen is None else report.chosen.reason
    return Decision(f"Ship {chosen.id}.", what, reason, _doubts(report, overview))


def _speed(row: Row) -> str:
    if row.speedup is None:
        share = (
            "" if row.macs_share is None else f" It needs {show_percent(row.macs_share)} of the dense multiply-adds."
        )
        return f"Its speed was not measured.{share}"
    interval = "" if row.speedup_ci is None else f" (95 % interval {row.speedup_ci[0]:.2f} to {row.speedup_ci[1]:.2f})"
    return f"It runs at {show_ratio(row.speedup)} the dense speed{interval}, {show_ms(row.p50)} per input."


def _loss(report: Report, overview: Overview, row: Row) -> str:
    quality = overview.quality
    if quality is None or row.loss is None:
        return "How good its answers are was not measured."
    unit = " points" if quality.is_fraction else ""
    verb = "loses" if row.loss > 0 else "gains"
    amount = f"{abs(row.loss):.2f}" if quality.is_fraction else f"{abs(row.loss):.4g}"
    change = f"It {verb} {amount}{unit} of {quality.name}" if row.loss else f"It keeps its {quality.name}"
    interval = ""
    if row.loss_ci is not None:
        interval = f" (95 % interval of the loss {row.loss_ci[0]:.2f} to {row.loss_ci[1]:.2f})"
    images = report.data.get("validation")
    where = f" on {images} validation inputs" if isinstance(images, int) else ""
    return f"{change}{where}{interval}."


def _storage(overview: Overview, row: Row) -> str:
    before, after = overview.dense.file_bytes, row.file_bytes
    if before is None or after is None:
        return ""
    return f"Its file has {show_bytes(after)} instead of {show_bytes(before)}."


def _doubts(report: Report, overview: Overview) -> tuple[str, ...]:
    chosen = overview.chosen
    found: list[str] = []
    beaten = control_sentence(report)
    if beaten is not None:
        found.append(beaten)
    candidate = find_chosen(report)
    if chosen is not None and candidate is not None:
        found += [*_doubts_about(chosen), *_doubts_about_boxes(candidate)]
    found += report.warnings
    return tuple(dict.fromkeys(found))


def _doubts_about(row: Row) -> list[str]:
    found = []
    if row.speedup_ci is not None and row.speedup_ci[0] <= 1 <= row.speedup_ci[1]:
        found.append("The interval of the speed-up holds 1: the measurement cannot tell it from the dense network.")
    elif row.speedup is not None and row.speedup <= 1:
        found.append("It is no faster than the dense network.")
    if row.verdict in ("noisy", "unusable"):
        found.append(f"Its times are {row.verdict}: measure again on a quiet device before relying on them.")
    if row.loses_by_chance:
        found.append("The interval of the loss holds 0: there are too few images to tell it from the dense network.")
    return found


def _doubts_about_boxes(candidate: Candidate) -> list[str]:
    found = candidate.fidelity
    if found is None or found.map50_to_dense is None or candidate.metric is not None:
        return []
    boxes = f"{found.boxes} box{'' if found.boxes == 1 else 'es'}"
    more = "Give more photos, or a larger validation share with --split."
    if not found.has_enough_boxes:
        return [f"The dense network detects {boxes} in the validation images: too few to compare candidates by. {more}"]
    if found.invisible_loss is None:
        return []
    loss = f"a loss below about {found.invisible_loss:.0f} points would not show"
    return [f"Its boxes were compared with {boxes} of the dense network: {loss}. {more}"]


def sentence_on_test(report: Report) -> str | None:
    """Return the chosen candidate's accuracy on test images, which were read once; None where it was not measured."""
    if report.chosen is None or find_chosen(report) is None or report.chosen.accuracy_top1_test is None:
        return None
    images = report.data.get("test")
    count = f" {images}" if isinstance(images, int) else ""
    return (
        f"On{count} test images, read once at the end, its top-1 is {show_percent(report.chosen.accuracy_top1_test)}."
    )

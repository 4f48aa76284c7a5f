"""The summary of a report: its headline, the candidates of a short table, and the groups that keep their width.

Pruned candidates are compared with the controls, the dense network on images of other sizes. With t = 1 / speed-up, and
a(t) the accuracy of dense and controls in that time (linear between them, and beyond the slowest the best of them),

    margin(c) = accuracy(c) - a(t(c))

Candidates faster than every control have a margin only where they are at least as accurate as the fastest.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

from mm_edge.records import Candidate, Report
from mm_edge.report.values import show_ms, show_percent

SHORT_TABLE_ROWS = 20


def find_chosen(report: Report) -> Candidate | None:
    """Return the candidate that `chosen` names, or None."""
    return next((c for c in report.candidates if report.chosen is not None and c.id == report.chosen.id), None)


def write_headline(report: Report) -> str:
    """Return the outcome in a few sentences.

    First comes that nothing was compared with the dense network, or that times are unusable; then that no pruned
    candidate beats the controls.
    """
    chosen = find_chosen(report)
    sentences = [_uncompared_sentence(report), _unusable_sentence(report)]
    if chosen is None:
        sentences.append("No candidate was chosen; the dense model stands.")
    else:
        sentences += [control_sentence(report), _speed_sentence(report, chosen), _accuracy_sentence(report, chosen)]
    return " ".join(sentence for sentence in sentences if sentence)


def _uncompared_sentence(report: Report) -> str | None:
    if not report.candidates or any(c.was_compared for c in report.candidates):
        return None
    if report.data.get("validation"):
        return "Nothing was compared with the dense network, as the warnings explain, and no candidate is recommended."
    return (
        "Nothing was compared with the dense network, so these candidates may be unusable and none is recommended; to "
        "find out give --data PATH with photos."
    )


def _unusable_sentence(report: Report) -> str | None:
    unusable = sum(c.is_unusable for c in report.candidates)
    if not unusable:
        return None
    return (
        f"The times of {unusable} of {len(report.candidates)} candidates are unusable, and no speed-up is stated for "
        "them: stop other programs and run again."
    )


def control_sentence(report: Report) -> str | None:
    """Return the sentence that no pruned candidate beats the controls; None where one does.

    Also None where there is nothing to compare: no control, no accuracy or no measured speed.
    """
    curve = _control_curve(report)
    pruned = [c for c in report.candidates if c.is_pruned and c.precision == "fp32"]
    measured = [c for c in pruned if c.speedup is not None and c.accuracy_top1 is not None]
    if curve is None or not measured:
        return None
    margins = [(margin, c) for c in measured if (margin := _margin(curve, c)) is not None]
    best = max(margins, key=lambda item: item[0], default=None)
    if best is not None and best[0] > 0:
        return None
    sentence = "Nothing pruned beats the dense network on pictures of another size at the same measured latency"
    return (
        f"{sentence}."
        if best is None
        else f"{sentence}: the nearest, {best[1].id}, is {-100 * best[0]:.2f} points behind."
    )


def _control_curve(report: Report) -> list[tuple[float, float]] | None:
    """Return (1 / speed-up, accuracy) of dense and controls, fastest first; the slower and no better are left out."""
    controls = [c for c in report.candidates if report.is_control(c) and c.precision == "fp32"]
    points = [(1 / c.speedup, c.accuracy_top1) for c in controls if c.speedup and c.accuracy_top1 is not None]
    if not points or report.dense.accuracy_top1 is None:
        return None
    kept: list[tuple[float, float]] = []
    for time, accuracy in sorted([*points, (1.0, report.dense.accuracy_top1)]):
        if not kept or accuracy > kept[-1][1]:
            kept.append((time, accuracy))
    return kept


def _margin(curve: list[tuple[float, float]], c: Candidate) -> float | None:
    assert c.speedup is not None and c.accuracy_top1 is not None
    time = 1 / c.speedup
    if time < curve[0][0]:
        ahead = c.accuracy_top1 - curve[0][1]
        return ahead if ahead >= 0 else None
    for (t0, a0), (t1, a1) in pairwise(curve):
        if time <= t1:
            return c.accuracy_top1 - (a0 + (a1 - a0) * (time - t0) / (t1 - t0))
    return c.accuracy_top1 - curve[-1][1]


def pick_candidates(report: Report) -> tuple[Candidate, ...]:
    """Return all candidates where they are few; else controls, those on the front and the chosen one, in their order.

    Where none is on the front (accuracy was not measured), those of fewest MACs are returned instead. Of
    strategies that coincide only the first is listed.
    """
    first: dict[str, Candidate] = {}
    for c in report.candidates:
        first.setdefault(c.artifact or c.id, c)
    listed = tuple(first.values())
    if len(listed) <= SHORT_TABLE_ROWS:
        return listed
    chosen = find_chosen(report)
    wanted = {c.id for c in listed if c.pareto}
    if not wanted:
        wanted = {c.id for c in sorted(listed, key=lambda c: c.macs)[:SHORT_TABLE_ROWS]}
    if chosen is not None:
        wanted.add(chosen.id)
    wanted |= {c.id for c in listed if report.is_control(c)}
    return tuple(c for c in listed if c.id in wanted)


def name_candidates(report: Report, candidates: tuple[Candidate, ...]) -> dict[str, str]:
    """Return a name per candidate id: the id, without its kind and precision where all candidates share them.

    Controls are marked.
    """
    shared = len({(c.kind, c.precision) for c in candidates if not report.is_control(c)}) == 1
    names = {}
    for c in candidates:
        middle = f"/{c.kind}/{c.precision}"
        names[c.id] = c.id.replace(middle, "", 1) if shared else c.id
    if len(set(names.values())) < len(names):
        names = {c.id: c.id for c in candidates}
    return {c.id: f"{names[c.id]} (control)" if report.is_control(c) else names[c.id] for c in candidates}


def count_skipped(report: Report) -> list[tuple[str, int, int]]:
    """Return (reason, groups, layers) of what keeps its full width, most groups first."""
    groups = Counter(skipped.reason for skipped in report.skipped_groups)
    layers = {
        reason: len({fqn for skipped in report.skipped_groups if skipped.reason == reason for fqn in skipped.layers})
        for reason in groups
    }
    return [(reason, count, layers[reason]) for reason, count in groups.most_common()]


def _speed_sentence(report: Report, chosen: Candidate) -> str:
    if chosen.speedup is None:
        share = 100 * chosen.macs / max(report.dense.macs, 1)
        why = "could not be told" if chosen.is_unusable else "was not measured"
        return f"{chosen.id} needs {share:.0f} % of the dense MACs; its speed on the target {why}."
    # Its own dense time is of the same moments; reports of older versions do not have it.
    dense_ms = chosen.dense_latency_ms.p50 or report.dense.latency_ms.p50
    times = f"{show_ms(dense_ms)} -> {show_ms(chosen.latency_ms.p50)}"
    if chosen.speedup_ci is not None and chosen.speedup_ci[0] <= 1 <= chosen.speedup_ci[1]:
        lo, hi = chosen.speedup_ci
        return (
            f"The measurement is too noisy to tell a speed-up: {chosen.id} runs between {lo:.2f}x and {hi:.2f}x the "
            f"dense speed (95 % interval; {times})."
        )
    if chosen.speedup <= 1:
        if report.is_control(chosen):
            return f"{chosen.id} is no faster than dense ({chosen.speedup:.2f}x, {times})."
        return f"Pruning brought no speed-up: {chosen.id} runs at {chosen.speedup:.2f}x the dense speed ({times})."
    if chosen.latency_ms.verdict == "noisy" and chosen.speedup_ci is not None:
        times += f"; noisy, 95 % interval {chosen.speedup_ci[0]:.2f}x to {chosen.speedup_ci[1]:.2f}x"
    return f"{chosen.id} is {chosen.speedup:.2f}x faster than dense ({times})."


def _likeness_sentence(report: Report, chosen: Candidate) -> str:
    """Say how good or how like the dense network a candidate is where accuracy was not measured."""
    if chosen.metric is not None and report.dense.metric is not None:
        return f"Its {chosen.metric.name} is {chosen.metric.value:.4g} (dense {report.dense.metric.value:.4g})."
    if chosen.likeness is None:
        return "Its accuracy was not measured."
    value, what = chosen.likeness
    sentence = f"Its {what} is {value:.3f} on validation images; accuracy was not measured"
    test = None if report.chosen is None or report.chosen.fidelity_test is None else report.chosen.fidelity_test
    found = None if test is None else replace(chosen, fidelity=test).likeness
    if found is None:
        return f"{sentence}."
    return f"{sentence}. On the test images {'it' if found[1] == what else f'the {found[1]}'} is {found[0]:.3f}."


def _accuracy_sentence(report: Report, chosen: Candidate) -> str:
    if chosen.accuracy_drop is None:
        return _likeness_sentence(report, chosen)
    side = "costs" if chosen.accuracy_drop >= 0 else "gains"
    both = f"{show_percent(report.dense.accuracy_top1)} -> {show_percent(chosen.accuracy_top1)}"
    if chosen.drop_ci is not None:
        both += f"; 95 % interval of the loss {chosen.drop_ci[0]:.2f} to {chosen.drop_ci[1]:.2f}"
    sentence = f"It {side} {abs(chosen.accuracy_drop):.2f} points of top-1 on validation images ({both})"
    test = report.chosen.accuracy_top1_test if report.chosen is not None else None
    if test is None:
        return f"{sentence}."
    dense = report.chosen.dense_accuracy_top1_test if report.chosen is not None else None
    beside = "" if dense is None else f" (dense {show_percent(dense)})"
    return f"{sentence}, and reads {show_percent(test)} of the test images right{beside}."

"""The Pareto front and the choice, on candidates small enough to check by eye."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_edge.errors import ConstraintError
from mm_edge.records import (
    Budget,
    Candidate,
    Chosen,
    Constraints,
    DenseFigures,
    Fidelity,
    Latency,
    MetricValue,
    OutputFidelity,
)
from mm_edge.select import choose, doubt_boxes, doubt_loss, judge_budget, mark_pareto, quality

DENSE = DenseFigures(
    accuracy_top1=0.90,
    latency_ms=Latency(p50=10.0, p90=11.0, p99=12.0, samples=200, threads=1, source="host"),
    peak_memory_bytes=None,
    file_bytes=4000,
    params=1000,
    macs=100,
)


def candidate(
    name: str, accuracy: float | None, p50: float | None, macs: int = 50, size: int | None = 2000
) -> Candidate:
    return Candidate(
        id=name,
        signal="product",
        strategy=name,
        kind="structured",
        precision="fp32",
        sparsity=1 - macs / 100,
        params=500,
        macs=macs,
        input_shape=(1, 3, 8, 8),
        accuracy_top1=accuracy,
        accuracy_drop=None if accuracy is None else 100 * (0.90 - accuracy),
        latency_ms=Latency(p50=p50),
        speedup=None if p50 is None else 10.0 / p50,
        file_bytes=size,
    )


SLOW_GOOD = candidate("slow-good", 0.899, 8.0, 80, 3500)
MIDDLE = candidate("middle", 0.89, 6.0, 60, 3000)
BEATEN = candidate("beaten", 0.88, 7.0, 70, 3000)
FAST_BAD = candidate("fast-bad", 0.60, 3.0, 30, 1000)
CANDIDATES = (FAST_BAD, BEATEN, MIDDLE, SLOW_GOOD)


def found(candidates: Sequence[Candidate], asked: Constraints) -> Chosen:
    """Return what is chosen, which is not None."""
    chosen = choose(DENSE, candidates, asked)
    assert chosen is not None
    return chosen


def front(*candidates: Candidate, dense: DenseFigures | None = None) -> list[str]:
    return [c.id for c in mark_pareto(candidates, dense) if c.pareto]


def test_the_front_by_hand() -> None:
    assert front(*CANDIDATES) == ["fast-bad", "middle", "slow-good"]
    assert [c.id for c in mark_pareto(CANDIDATES)] == [c.id for c in CANDIDATES]


def test_equal_candidates_share_the_front_and_a_tie_in_one_is_beaten() -> None:
    assert front(
        candidate("a", 0.8, 5.0), candidate("b", 0.8, 5.0), candidate("c", 0.8, 6.0), candidate("d", 0.7, 5.0)
    ) == ["a", "b"]


def test_a_mark_from_before_does_not_stay() -> None:
    marked = mark_pareto([BEATEN])
    assert marked[0].pareto
    assert front(*marked, MIDDLE) == ["middle"]


def test_macs_stand_in_when_no_latency_was_measured() -> None:
    assert front(candidate("a", 0.8, None, 60), candidate("b", 0.8, None, 50), candidate("c", 0.9, None, 90)) == [
        "b",
        "c",
    ]


def test_a_candidate_without_latency_is_not_compared_with_measured_ones() -> None:
    assert front(candidate("a", 0.8, 5.0), candidate("unmeasured", 0.99, None, 1)) == ["a"]


def test_without_accuracy_nothing_is_marked() -> None:
    assert front(candidate("a", None, 5.0), candidate("b", None, 4.0)) == []


def test_what_dense_beats_is_not_on_the_front() -> None:
    slower = candidate("slower", 0.85, 11.0)
    assert front(slower) == ["slower"]
    assert front(slower, MIDDLE, dense=DENSE) == ["middle"]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6)), max_size=12))
def test_the_front_is_what_nothing_dominates(points: list[tuple[int, int]]) -> None:
    candidates = mark_pareto([candidate(str(i), a / 10, float(t)) for i, (a, t) in enumerate(points)])
    for (a, t), marked in zip(points, candidates, strict=True):
        beaten = any((b >= a and s < t) or (b > a and s <= t) for b, s in points)
        assert marked.pareto is not beaten


def test_nothing_asked_takes_the_fastest_within_one_point() -> None:
    chosen = found(CANDIDATES, Constraints())
    assert chosen.id == "middle"  # exactly one point below, which 100 * (0.90 - 0.89) overshoots
    assert chosen.reason == (
        "the fastest within 1 point of dense on validation images: "
        "speed-up 1.67x (p50 6 ms), accuracy 1.00 points below dense"
    )
    assert chosen.accuracy_top1_test is None


def test_nothing_asked_and_none_close_takes_the_most_accurate() -> None:
    chosen = found((FAST_BAD, BEATEN), Constraints())
    assert chosen.id == "beaten"
    assert chosen.reason.startswith("none is within 1 point of dense on validation images, so the most accurate: ")


def test_a_gain_reads_as_a_gain() -> None:
    assert found([candidate("up", 0.91, 5.0)], Constraints()).reason.endswith("accuracy 1.00 points above dense")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (Constraints(max_drop=2.0), "middle"),
        (Constraints(max_drop=0.5), "slow-good"),
        (Constraints(max_drop=50), "fast-bad"),
        (Constraints(latency_ms=7.5), "middle"),
        (Constraints(latency_ms=3.0), "fast-bad"),
        (Constraints(speedup=1.2), "slow-good"),
        (Constraints(speedup=2), "fast-bad"),
        (Constraints(size_bytes=3000), "middle"),
        (Constraints(max_drop=2.5, speedup=1.3), "middle"),
        (Constraints(latency_ms=9, size_bytes=2000), "fast-bad"),
    ],
)
def test_what_is_asked_decides(asked: Constraints, expected: str) -> None:
    assert found(CANDIDATES, asked).id == expected


def test_the_reason_names_what_was_asked() -> None:
    assert found(CANDIDATES, Constraints(max_drop=2.5, speedup=1.3)).reason == (
        "the most accurate that meets --max-drop 2.5 and --speedup 1.3: "
        "speed-up 1.67x (p50 6 ms), accuracy 1.00 points below dense"
    )


def test_a_limit_in_milliseconds_is_judged_by_the_speed_up_and_not_by_the_moment_it_was_measured_at() -> None:
    """Both took 5.5 ms; beside `late` the dense model took 11 ms, beside `early` 8 ms. Its p50 in all is 10 ms."""
    late = dataclasses.replace(candidate("late", 0.88, 5.5), speedup=11 / 5.5)
    early = dataclasses.replace(candidate("early", 0.89, 5.5), speedup=8 / 5.5)
    chosen = found((late, early), Constraints(latency_ms=5.2))
    assert chosen == Chosen(
        "late",
        "the most accurate that meets --latency 5.2: speed-up 2.00x (p50 5.5 ms), accuracy 2.00 points below dense; "
        "for --latency it takes 5 ms (dense p50 10 ms / 2.00)",
    )
    assert found((late, early), Constraints(latency_ms=7)).id == "early"
    with pytest.raises(ConstraintError) as caught:
        choose(DENSE, (late, early), Constraints(latency_ms=4))
    assert "the nearest is late: 5 ms (dense p50 10 ms / 2.00); relax" in str(caught.value)


def test_without_a_speed_up_a_limit_in_milliseconds_is_judged_by_the_p50() -> None:
    alone = dataclasses.replace(MIDDLE, speedup=None)
    assert found((alone,), Constraints(latency_ms=6)).id == "middle"
    with pytest.raises(ConstraintError, match="the nearest is middle: p50 6 ms; relax"):
        choose(DENSE, (alone,), Constraints(latency_ms=5))


def test_none_fits_names_the_nearest_miss() -> None:
    with pytest.raises(ConstraintError) as caught:
        choose(DENSE, CANDIDATES, Constraints(max_drop=1.5, speedup=1.8))
    assert str(caught.value) == (
        "no candidate meets --max-drop 1.5 and --speedup 1.8; the nearest is middle: "
        "accuracy 1.00 points below dense, speed-up 1.67x; relax what it misses, or keep dense"
    )
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("asked", "candidates", "message"),
    [
        (
            Constraints(latency_ms=5),
            [candidate("a", 0.9, None)],
            "--latency 5 cannot be checked: what it limits was not measured for any candidate",
        ),
        (
            Constraints(max_drop=1, size_bytes=5000),
            [candidate("a", None, 5.0)],
            "--max-drop 1 cannot be checked: what it limits was not measured for any candidate",
        ),
        (
            Constraints(latency_ms=2, size_bytes=500),
            CANDIDATES,
            "no candidate meets --latency 2 and --size 500; the nearest is fast-bad: 3 ms (dense p50 10 ms / 3.33), "
            "1000 bytes; relax what it misses, or keep dense",
        ),
        (Constraints(), [], "no candidate was made, so there is nothing to choose from"),
    ],
)
def test_other_refusals(asked: Constraints, candidates: list[Candidate], message: str) -> None:
    with pytest.raises(ConstraintError) as caught:
        choose(DENSE, candidates, asked)
    assert str(caught.value) == message


def timed(
    name: str, accuracy: float | None, speedup: float, ci: tuple[float, float], p50: float, macs: int
) -> Candidate:
    return dataclasses.replace(candidate(name, accuracy, p50, macs), speedup=speedup, speedup_ci=ci)


def test_paired_ratios_decide_and_times_of_different_moments_do_not() -> None:
    # "drifted" was timed when the machine was twice as fast: its own dense run was too.
    drifted = timed("drifted", 0.895, 1.5, (1.45, 1.55), 3.0, 60)
    faster = timed("faster", 0.895, 2.0, (1.95, 2.05), 5.0, 50)
    assert found((drifted, faster), Constraints()).id == "faster"
    assert front(drifted, faster) == ["faster"]
    # The dense model's ratio is 1, whatever its own milliseconds were.
    slower = timed("slower", 0.85, 0.9, (0.85, 0.95), 3.0, 60)
    assert front(slower, dense=DENSE) == []


def test_overlapping_speed_ups_are_equal_and_accuracy_then_macs_decide() -> None:
    a = timed("a", 0.893, 2.0, (1.8, 2.2), 5.0, 40)
    b = timed("b", 0.899, 1.9, (1.7, 2.1), 5.2, 60)
    c = timed("c", 0.900, 1.5, (1.4, 1.6), 6.0, 70)
    chosen = found((a, b, c), Constraints())
    assert chosen.id == "b"
    assert chosen.reason == (
        "the most accurate of the 2 fastest, whose speed-ups cannot be told apart, within 1 point of dense on "
        "validation images: speed-up 1.90x (p50 5.2 ms), accuracy 0.10 points below dense"
    )
    equal = dataclasses.replace(b, accuracy_top1=a.accuracy_top1, accuracy_drop=a.accuracy_drop)
    chosen = found((equal, a), Constraints(max_drop=2))
    assert chosen.id == "a"
    assert chosen.reason.startswith(
        "the one of fewest MACs of the 2 fastest, whose speed-ups cannot be told apart, that meets --max-drop 2: "
    )


@given(st.lists(st.tuples(st.floats(0.5, 3), st.floats(0, 0.5), st.integers(0, 4), st.integers(1, 9)), min_size=1))
def test_nothing_that_is_surely_slower_is_called_the_fastest(rows: list[tuple[float, float, int, int]]) -> None:
    made = [timed(str(i), 0.9 + a / 1000, s, (s - w, s + w), 1.0, m) for i, (s, w, a, m) in enumerate(rows)]
    chosen = next(c for c in made if c.id == found(made, Constraints()).id)
    top = max(made, key=lambda c: c.speedup or 0.0)
    assert chosen.speedup_ci is not None and top.speedup_ci is not None
    assert chosen.speedup_ci[1] >= top.speedup_ci[0]
    assert (chosen.accuracy_top1 or 0) >= (top.accuracy_top1 or 0)


def test_without_latency_macs_stand_in_and_the_reason_says_so() -> None:
    candidates = [candidate("a", 0.895, None, 60), candidate("b", 0.895, None, 50), candidate("c", 0.2, None, 10)]
    free = found(candidates, Constraints())
    assert free.id == "b"
    assert free.reason == (
        "the one of fewest MACs (latency was not measured) within 1 point of dense on validation images: "
        "50 % of the dense MACs (speed-up not measured), accuracy 0.50 points below dense"
    )
    asked = found(candidates, Constraints(speedup=1.5))
    assert asked.id == "b"
    assert "speed-up not measured" in asked.reason


def test_without_accuracy_the_choice_says_so() -> None:
    candidates = [candidate("a", None, 5.0, 60), candidate("b", None, 4.0, 50)]
    asked = found(candidates, Constraints(speedup=1.5))
    assert asked.id == "a"
    assert asked.reason == (
        "the least sparse (accuracy was not measured) that meets --speedup 1.5: speed-up 2.00x (p50 5 ms); it was not "
        "compared with the dense network and may be unusable; to find out give --data PATH"
    )


def test_where_nothing_was_compared_nothing_is_chosen_unless_a_constraint_asks() -> None:
    candidates = [candidate("a", None, 5.0, 60), candidate("b", None, 4.0, 50)]
    assert choose(DENSE, candidates, Constraints()) is None
    for asked in (Constraints(latency_ms=6), Constraints(size_bytes=3000)):
        assert "may be unusable; to find out give --data PATH" in found(candidates, asked).reason
    assert "may be unusable" not in found(CANDIDATES, Constraints(speedup=1.2)).reason


UNLABELLED = dataclasses.replace(DENSE, accuracy_top1=None)


def compared(name: str, p50: float, **more: Any) -> Candidate:
    return dataclasses.replace(candidate(name, None, p50), **more)


def test_without_labels_agreement_with_dense_decides() -> None:
    """Who answers as dense on 99 % of the images has lost at most a point on them."""
    rows = [
        compared("same", 8.0, agreement_top1=0.995, kl_to_dense=0.01),
        compared("close", 6.0, agreement_top1=0.99, kl_to_dense=0.02),
        compared("far", 3.0, agreement_top1=0.9, kl_to_dense=0.2),
    ]
    chosen = choose(UNLABELLED, rows, Constraints())
    assert chosen is not None and (chosen.id, chosen.reason) == (
        "close",
        "the fastest within 1 point of dense by agreement with dense, accuracy not measured: "
        "speed-up 1.67x (p50 6 ms), agreement with dense 0.990",
    )
    nearer = dataclasses.replace(rows[2], id="near", kl_to_dense=0.1)
    chosen = choose(UNLABELLED, [rows[2], nearer], Constraints())
    assert chosen is not None and chosen.id == "near"
    assert chosen.reason.startswith("none is within 1 point of dense by agreement with dense, so the best, accuracy")
    assert [c.pareto for c in mark_pareto(rows, UNLABELLED)] == [True, True, True]


def test_boxes_masks_and_outputs_decide_where_there_are_no_classes() -> None:
    def found_by(**figures: Any) -> Fidelity:
        return Fidelity({"y": OutputFidelity(0.25, 0.9)}, **figures)

    boxes = compared("boxes", 5.0, fidelity=found_by(map50_to_dense=0.97))
    assert boxes.likeness == (0.97, "mAP50 on the dense network's boxes")
    assert compared("m", 5.0, fidelity=found_by(miou_to_dense=0.9)).likeness == (
        0.9,
        "mIoU with the dense network's masks",
    )
    outputs = compared("outputs", 4.0, fidelity=found_by())
    assert outputs.likeness == (0.75, "likeness of the outputs")
    assert compared("lost", 4.0, fidelity=Fidelity({"y": OutputFidelity(None, None)})).merit is None
    better = compared("better", 6.0, fidelity=found_by(map50_to_dense=0.995))
    chosen = choose(UNLABELLED, [boxes, better], Constraints())
    assert chosen is not None and chosen.id == "better"
    chosen = choose(UNLABELLED, [boxes, better], Constraints(max_drop=5))
    assert chosen is not None and chosen.id == "boxes"


@pytest.mark.parametrize(
    ("boxes", "doubt"),
    [
        (1, "1 box there, too few to tell candidates apart by, so their outputs were compared"),
        (29, "29 boxes there, too few to tell candidates apart by, so their outputs were compared"),
        (30, "30 boxes there, which cannot show a loss below about 10 points"),
        (299, "299 boxes there, which cannot show a loss below about 1 points"),
        (300, None),
        (None, None),
    ],
)
def test_few_boxes_are_said_to_show_little(boxes: int | None, doubt: str | None) -> None:
    """With none of n boxes lost, up to 3 / n of all may be lost (95 %)."""
    outputs = {"y": OutputFidelity(0.01, 0.99)}
    row = compared("boxes", 5.0, fidelity=Fidelity(outputs, map50_to_dense=1.0, map_to_dense=0.6, boxes=boxes))
    chosen = choose(UNLABELLED, [row], Constraints())
    assert chosen is not None
    assert ("the dense network detects" in chosen.reason) == (doubt is not None)
    if doubt is not None:
        end = "; more photos, or a larger validation share with --split, would"
        assert chosen.reason.endswith(f"the dense network detects {doubt}{end}")
    metric = dataclasses.replace(row, metric=MetricValue("mAP", 0.5, is_fraction=True))
    assert doubt_boxes(metric) is None


def test_outputs_decide_where_the_boxes_are_too_few() -> None:
    """Six photos with five boxes preferred a face detector with twice the error of another."""

    def row(name: str, map50: float, error: float, boxes: int) -> Candidate:
        found = Fidelity({"y": OutputFidelity(error, 0.9)}, map50_to_dense=map50, map_to_dense=map50, boxes=boxes)
        return compared(name, 5.0, fidelity=found)

    def best(boxes: int) -> str:
        return max([row("lucky", 0.83, 0.30, boxes), row("near", 0.33, 0.13, boxes)], key=quality).id

    assert (best(5), best(30)) == ("near", "lucky")
    assert row("near", 0.33, 0.25, 5).likeness == (0.75, "likeness of the outputs")
    assert row("near", 0.33, 0.13, 30).likeness == (0.33, "mAP50 on the dense network's boxes")


def test_equal_boxes_at_half_overlap_are_told_apart_by_larger_overlaps() -> None:
    def boxes(name: str, mean: float) -> Candidate:
        return compared(name, 5.0, fidelity=Fidelity({}, map50_to_dense=1.0, map_to_dense=mean))

    assert max([boxes("loose", 0.8), boxes("tight", 0.9)], key=quality).id == "tight"
    assert quality(compared("classes", 5.0, agreement_top1=0.9, kl_to_dense=0.2)) == (0.9, -0.2)


def test_the_users_metric_decides_before_likeness() -> None:
    dense = dataclasses.replace(UNLABELLED, metric=MetricValue("error", 2.0, higher_is_better=False))

    def row(name: str, p50: float, error: float) -> Candidate:
        return compared(name, p50, metric=MetricValue("error", error, higher_is_better=False), agreement_top1=0.1)

    chosen = choose(dense, [row("a", 5.0, 2.5), row("b", 3.0, 4.0)], Constraints())
    assert chosen is not None and chosen.id == "a"
    assert chosen.reason.startswith("the fastest within 1 of dense by error, accuracy not measured: ")
    chosen = choose(dense, [row("a", 5.0, 2.5), row("b", 3.0, 4.0)], Constraints(max_drop=3))
    assert chosen is not None and chosen.id == "b"
    assert [c.pareto for c in mark_pareto([row("a", 5.0, 2.5), row("b", 3.0, 4.0), row("c", 6.0, 3.0)], dense)] == [
        True,
        True,
        False,
    ]


# --- what images and times can tell ----------------------------------------------------------------------------------


def judged(accuracy: float, interval: tuple[float, float]) -> Candidate:
    return dataclasses.replace(candidate("judged", accuracy, 5.0), drop_ci=interval)


def test_the_reason_says_when_the_images_cannot_tell() -> None:
    dense = dataclasses.replace(DENSE, accuracy_images=500)
    # The half-width is 1.5 points, the limit 0.5 away: 500 * 3^2.
    chosen = choose(dense, [judged(0.895, (-1.0, 2.0))], Constraints())
    assert chosen is not None and chosen.reason == (
        "the fastest within 1 point of dense on validation images: speed-up 2.00x (p50 5 ms), accuracy 0.50 points "
        "below dense; 500 images cannot tell whether the loss is within 1 point (95 % interval -1.00 to 2.00); "
        "about 4,500 would"
    )
    asked = choose(dense, [judged(0.895, (-1.0, 2.0))], Constraints(max_drop=1.5))
    assert asked is not None and asked.reason.endswith(
        "; 500 images cannot tell whether the loss is within 1.5 points (95 % interval -1.00 to 2.00); about "
        "1,200 would"
    )
    for drop, interval in ((0.5, (0.2, 0.9)), (2.0, (1.1, 3.0))):
        assert doubt_loss(drop, interval, 500, 1.0) is None
    assert doubt_loss(0.5, (-1.0, 2.0), None, 1.0) == (
        "the images cannot tell whether the loss is within 1 point (95 % interval -1.00 to 2.00)"
    )
    # A loss of exactly the limit is told from one a quarter of a point away.
    assert doubt_loss(1.0, (0.0, 2.0), 500, 1.0) == (
        "500 images cannot tell whether the loss is within 1 point (95 % interval 0.00 to 2.00); about 8,000 would"
    )


def unusable(name: str, accuracy: float | None, macs: int) -> Candidate:
    found = candidate(name, accuracy, None, macs)
    return dataclasses.replace(found, latency_ms=Latency(p50=1.0, verdict="unusable"))


def test_unusable_times_choose_nothing() -> None:
    rows = (unusable("fewer", 0.895, 40), unusable("more", 0.897, 60))
    chosen = found(rows, Constraints())
    assert chosen.reason == (
        "the one of fewest MACs (every time is unusable) within 1 point of dense on validation images: "
        "40 % of the dense MACs (speed-up unusable), accuracy 0.50 points below dense"
    )
    # One that was timed well is chosen before those that were not.
    assert found((*rows, candidate("slow", 0.895, 9.0, 90)), Constraints()).id == "slow"
    with pytest.raises(ConstraintError) as caught:
        choose(DENSE, rows, Constraints(latency_ms=5))
    assert str(caught.value) == (
        "--latency 5 cannot be checked: the times of every candidate that has any are unusable; stop other programs "
        "and run again"
    )


def test_a_candidate_that_was_not_measured_is_not_chosen_over_measured_ones() -> None:
    candidates = [candidate("unmeasured", 0.9, None, 1), candidate("measured", 0.9, 9.0, 90)]
    assert found(candidates, Constraints()).id == "measured"
    assert found(candidates, Constraints(max_drop=1)).id == "measured"


# --- which candidates win under a budget ----------------------------------------------------------------------------


def allocated(name: str, accuracy: float | None, p50: float, kl: float) -> Candidate:
    found = candidate(name, accuracy, p50)
    return dataclasses.replace(found, signal="sensitivity", kl_to_dense=kl)


def test_the_most_accurate_that_meets_a_budget_wins_and_the_best_of_the_others_is_named() -> None:
    speed = Budget("speedup", 1.5)
    candidates = (*CANDIDATES, allocated("a", 0.885, 6.0, 0.1), allocated("slow", 0.9, 9.0, 0.01))
    found = judge_budget(DENSE, candidates, speed)
    assert (found.asked, found.winner) == ("--speedup 1.5", "middle")
    assert found.reason == (
        "middle won under --speedup 1.5 (top-1 89.00 %); the best by measured sensitivity is a (top-1 88.50 %, KL 0.1)"
    )
    closer = (dataclasses.replace(MIDDLE, kl_to_dense=0.2), allocated("a", 0.89, 6.0, 0.1))
    assert judge_budget(DENSE, closer, speed).winner == "a"
    assert judge_budget(DENSE, CANDIDATES, speed).reason.endswith("; no candidate by measured sensitivity meets it")
    assert judge_budget(DENSE, candidates, Budget("macs", 0.4)).winner == "fast-bad"
    assert judge_budget(DENSE, candidates, Budget("size", 3000)).winner == "slow"
    assert judge_budget(DENSE, candidates, Budget("latency", 1)).reason == "no pruned candidate meets --latency 1"


def test_a_control_that_beats_the_winner_is_named_and_without_accuracy_nothing_wins() -> None:
    control = candidate("dense@6", 0.899, 5.0)
    control = dataclasses.replace(control, kind="dense", signal="none")
    found = judge_budget(DENSE, (*CANDIDATES, control), Budget("speedup", 1.5))
    assert found.winner == "middle"
    assert found.reason.endswith("; dense@6, where nothing is pruned, is better than both (top-1 89.90 %)")
    unknown = judge_budget(DENSE, (candidate("a", None, 5.0), candidate("b", None, 6.0)), Budget("speedup", 1.5))
    assert unknown.winner is None
    assert unknown.reason == "2 candidates meet --speedup 1.5; accuracy was not measured, so none is called better"


def test_the_reason_says_what_a_budgets_candidate_was_planned_by() -> None:
    planned = dataclasses.replace(MIDDLE, planned_by="multiply-adds, counted")
    assert found((planned,), Constraints(speedup=1.5)).reason.endswith("; planned by multiply-adds, counted")

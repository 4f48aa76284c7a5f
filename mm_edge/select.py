"""Marks the candidates on the Pareto front, and chooses one of them.

    cost(c)      1 / speedup where speed-ups were measured, else MACs      (less is better; the dense model's is 1)
    merit(c)     top-1 accuracy on validation images, else the user's metric, else how like the dense network it
                 answers: mAP50 on its boxes, mIoU with its masks, agreement, or 1 - nmse      (more is better)
    c is on the Pareto front  <=>  nothing else, the dense network included, is at least as good in both
                                   and better in one

The choice, in this order:
    no constraint       the fastest within 1 point of the dense network, else the most accurate
    --max-drop alone    the fastest within it
    --latency, --speedup, --size (with or without --max-drop)    the most accurate that meets them all
A speed-up is the ratio of times that the dense model and the candidate took in turn. Times in milliseconds were
taken at different moments and are not compared: for --latency a candidate's time is the dense model's p50 divided by
the candidate's speed-up. Candidates whose 95 % interval overlaps that of the largest speed-up
are as fast as it: accuracy decides among them, then MACs. Without speed-ups, also where every time is unusable, the
fewest MACs stand in for the fastest.

A loss is counted in points of 100 of the merit, or in the metric's own unit. Where nothing was compared with dense
there is no front and nothing is chosen without a constraint; with one that can be checked it is the least sparse that
meets it, and the reason says that it may be unusable.

"Within 1 point" is judged by the accuracies read. Where the 95 % interval of the loss holds the limit, the images
cannot tell: the reason says so, and that it takes about n (w / |limit - loss|)^2 of them, with n images and an
interval of half-width w (its width falls as 1 / sqrt(n)).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from mm_edge.errors import ConstraintError
from mm_edge.records import Budget, BudgetOutcome, Candidate, Chosen, Constraints, DenseFigures, constraint_budgets

FREE_DROP_POINTS = 1.0
UNCOMPARED = (
    "nothing was compared with the dense network, so these candidates may be unusable and none is recommended; to find "
    "out give --data PATH with photos"
)
# As UNCOMPARED, where there were images.
UNCOMPARABLE = (
    "nothing was compared with the dense network, because the sizes of its outputs depend on the image, as those of "
    "boxes after non-maximum suppression do; none is recommended: give the .onnx without that step, or --metric "
    "FILE.py:CALLABLE"
)
OTHER_SIZES = (
    "nothing was compared with the dense network, because its outputs have other shapes at other input sizes; none is "
    "recommended: leave --input-sizes out, or give --metric FILE.py:CALLABLE"
)
_ITSELF_UNCOMPARED = "it was not compared with the dense network and may be unusable; to find out give --data PATH"
_NEAREST_POINTS = 0.25  # a loss nearer to the limit than this is taken to be this far from it

# Rounding in floating point is no miss: 100 * (0.91 - 0.90) is slightly above 1.
_TOLERANCE = 1e-9


@dataclasses.dataclass(frozen=True)
class _Limit:
    """One constraint.

    Attributes:
        asked: the option as it was given.
        describe: returns what a candidate reaches, for messages.
        miss: returns the share by which a candidate misses it; 0 or less where it is met, None where it is not known.
    """

    asked: str
    describe: Callable[[Candidate], str]
    miss: Callable[[Candidate], float | None]


def mark_pareto(candidates: Sequence[Candidate], dense: DenseFigures | None = None) -> tuple[Candidate, ...]:
    """Return the candidates in their order with `pareto` set by merit against 1 / speedup (MACs without any).

    A candidate without merit, or without a speed-up where others have one, is not marked: it cannot be compared.
    With `dense`, a candidate that is no better than the dense network in both is not marked either.
    """
    measured = _speedups_measured(candidates)
    points = [_point(c.merit, _time_share(c) if measured else c.macs) for c in candidates]
    rivals = [point for point in points if point is not None]
    if dense is not None:
        rivals.append((dense.merit, 1.0 if measured else dense.macs))
    return tuple(
        dataclasses.replace(c, pareto=point is not None and not any(_dominates(rival, point) for rival in rivals))
        for c, point in zip(candidates, points, strict=True)
    )


def choose(dense: DenseFigures, candidates: Sequence[Candidate], constraints: Constraints) -> Chosen | None:
    """Return the chosen candidate and the reason. Test images are not used here.

    None where nothing was asked and nothing was compared with the dense network: any choice would be a guess.

    Raises:
        ConstraintError: none meets the constraints (the message names the nearest), or there is no candidate.
    """
    if not candidates:
        raise ConstraintError("no candidate was made, so there is nothing to choose from")
    limits = _limits(dense, candidates, constraints)
    if not limits:
        return _choose_freely(dense, candidates)
    fitting = [c for c in candidates if all(_met(limit.miss(c)) for limit in limits)]
    asked = " and ".join(limit.asked for limit in limits)
    if not fitting:
        raise ConstraintError(_nearest_miss(candidates, limits, asked))
    only_drop = constraints == Constraints(max_drop=constraints.max_drop)
    best = _fastest(fitting) if only_drop else _most_accurate(fitting)
    kind = _fastest_words(fitting) if only_drop else _most_accurate_words(fitting)
    reason = f"the {kind} that meets {asked}: {_explain(dense, best, constraints.max_drop)}"
    own = _usable_p50(best)
    if constraints.latency_ms is not None and own is not None and own > constraints.latency_ms:
        reason += f"; for --latency it takes {_describe_time(dense, best)}"
    return Chosen(best.id, reason)


def _choose_freely(dense: DenseFigures, candidates: Sequence[Candidate]) -> Chosen | None:
    drops = [c for c in candidates if c.accuracy_drop is not None]
    if not drops:
        return _choose_by_merit(dense, [c for c in candidates if dense.loss_of(c) is not None])
    close = [c for c in drops if _met(_over(c.accuracy_drop, FREE_DROP_POINTS))]
    if close:
        best = _fastest(close)
        kind = f"the {_fastest_words(close)} within 1 point of dense on validation images"
    else:
        best = _most_accurate(drops)
        kind = "none is within 1 point of dense on validation images, so the most accurate"
    return Chosen(best.id, f"{kind}: {_explain(dense, best, FREE_DROP_POINTS)}")


def _choose_by_merit(dense: DenseFigures, compared: Sequence[Candidate]) -> Chosen | None:
    """Choose among candidates that were compared with dense, but by no label; None of none."""
    if not compared:
        return None
    close = [c for c in compared if _met(_over(dense.loss_of(c), FREE_DROP_POINTS))]
    unit = "1 point" if dense.metric is None or dense.metric.is_fraction else "1"
    by = _merit_name(compared[0])
    if close:
        best = _fastest(close)
        kind = f"the {_fastest_words(close)} within {unit} of dense by {by}"
    else:
        best = max(compared, key=quality)
        kind = f"none is within {unit} of dense by {by}, so the best"
    return Chosen(best.id, f"{kind}, accuracy not measured: {_explain(dense, best, None)}")


def _merit_name(c: Candidate) -> str:
    """Return what a candidate's merit is."""
    if c.accuracy_top1 is not None:
        return "top-1 accuracy"
    if c.metric is not None:
        return c.metric.name
    return "nothing" if c.likeness is None else c.likeness[1]


def _explain(dense: DenseFigures, best: Candidate, limit: float | None) -> str:
    """Describe a choice, and say what is not known about it; `limit` is on its loss, in points."""
    doubt = doubt_boxes(best) if best.was_compared else _ITSELF_UNCOMPARED
    if limit is not None and best.drop_ci is not None and best.accuracy_drop is not None:
        doubt = doubt_loss(best.accuracy_drop, best.drop_ci, dense.accuracy_images, limit)
    described = _describe(dense, best)
    return described if doubt is None else f"{described}; {doubt}"


def doubt_boxes(c: Candidate) -> str | None:
    """Return what the few boxes that a detector was judged by cannot tell; None where they are enough."""
    found = c.fidelity
    if found is None or found.map50_to_dense is None or c.metric is not None:
        return None
    more = "more photos, or a larger validation share with --split, would"
    boxes = f"the dense network detects {found.boxes} box{'' if found.boxes == 1 else 'es'} there, "
    if not found.has_enough_boxes:
        return f"{boxes}too few to tell candidates apart by, so their outputs were compared; {more}"
    if found.invisible_loss is None:
        return None
    return f"{boxes}which cannot show a loss below about {found.invisible_loss:.0f} points; {more}"


def doubt_loss(drop: float, interval: tuple[float, float], images: int | None, limit: float) -> str | None:
    """Return that the images cannot tell whether a loss is within `limit`, and how many could; None where they can.

    Args:
        drop: the loss, in points.
        interval: its 95 % interval, in points.
        images: how many images it was read on; None where that is not known.
        limit: the largest loss allowed, in points.
    """
    lo, hi = interval
    if not lo <= limit < hi:
        return None
    found = f"cannot tell whether the loss is within {limit:g} point{'' if limit == 1 else 's'}"
    between = f"(95 % interval {lo:.2f} to {hi:.2f})"
    if images is None:
        return f"the images {found} {between}"
    return f"{images} images {found} {between}; about {_images_needed(drop, interval, images, limit):,} would"


def _images_needed(drop: float, interval: tuple[float, float], images: int, limit: float) -> int:
    """Return how many images would tell a loss of `drop` from `limit`, rounded up to two digits."""
    width = (interval[1] - interval[0]) / 2
    needed = images * (width / max(abs(limit - drop), _NEAREST_POINTS)) ** 2
    step = int(10 ** max(0, math.floor(math.log10(max(needed, 1))) - 1))
    return math.ceil(round(needed / step, 6)) * step  # 45.0000001 is 45


def _limits(dense: DenseFigures, candidates: Sequence[Candidate], asked: Constraints) -> list[_Limit]:
    limits = []
    if (drop := asked.max_drop) is not None:
        limits.append(_Limit(f"--max-drop {drop:g}", _describe_drop, lambda c: _over(dense.loss_of(c), drop)))
    return [*limits, *(_limit_of(dense, candidates, budget) for budget in constraint_budgets(asked))]


def _limit_of(dense: DenseFigures, candidates: Sequence[Candidate], budget: Budget) -> _Limit:
    value = budget.value
    if budget.kind == "latency":
        return _Limit(budget.asked, lambda c: _describe_time(dense, c), lambda c: _over(_time_of(dense, c), value))
    if budget.kind == "size":
        return _Limit(budget.asked, _describe_size, lambda c: _over(c.file_bytes, value))
    if budget.kind == "macs":
        return _Limit(budget.asked, lambda c: _describe_macs(dense, c), lambda c: _over(c.macs, value * dense.macs))
    by_macs = not _speedups_measured(candidates)
    return _Limit(
        budget.asked,
        (lambda c: _describe_macs(dense, c)) if by_macs else _describe_speedup,
        lambda c: _under(dense.macs / max(c.macs, 1) if by_macs else c.speedup, value),
    )


def judge_budget(dense: DenseFigures, candidates: Sequence[Candidate], budget: Budget) -> BudgetOutcome:
    """Return the most accurate structured fp32 candidate that meets a budget, and a sentence that says so.

    Candidates by measured sensitivity are compared with those of the strategies, scaled to the budget or not; the
    sentence names the best of both. Equal accuracy goes to the smaller divergence. A control that meets the budget and
    is more accurate is named too.
    """
    limit = _limit_of(dense, candidates, budget)
    fitting = [c for c in candidates if c.precision == "fp32" and _met(limit.miss(c))]
    pruned = [c for c in fitting if c.kind == "structured"]
    if not pruned:
        return BudgetOutcome(budget.asked, None, f"no pruned candidate meets {budget.asked}")
    if any(c.merit is None for c in pruned):
        reason = f"{len(pruned)} candidates meet {budget.asked}; accuracy was not measured, so none is called better"
        return BudgetOutcome(budget.asked, None, reason)
    best = max(pruned, key=quality)
    others = [c for c in pruned if (c.signal == "sensitivity") != (best.signal == "sensitivity")]
    sentence = f"{best.id} won under {budget.asked} ({_describe_quality(best)})"
    whose = "a Mix-and-Match strategy" if best.signal == "sensitivity" else "measured sensitivity"
    if others:
        second = max(others, key=quality)
        sentence += f"; the best by {whose} is {second.id} ({_describe_quality(second)})"
    else:
        sentence += f"; no candidate by {whose} meets it"
    # Of kind "dense" in fp32 there are controls alone: at its own size the dense network is no candidate.
    controls = [c for c in fitting if c.kind == "dense" and c.merit is not None and quality(c) > quality(best)]
    if controls:
        control = max(controls, key=quality)
        sentence += f"; {control.id}, where nothing is pruned, is better than both ({_describe_quality(control)})"
    return BudgetOutcome(budget.asked, best.id, sentence)


def quality(c: Candidate) -> tuple[float, float]:
    """Return the key that sorts candidates by merit, and at equal merit by smaller divergence from dense.

    Of boxes, mAP50-95 says what mAP50 leaves open: few photos hold few boxes, and many candidates find all of them.
    """
    found = c.fidelity
    if c.kl_to_dense is None and found is not None and found.map_to_dense is not None and found.has_enough_boxes:
        return (_merit(c), found.map_to_dense)
    return (_merit(c), -(c.kl_to_dense if c.kl_to_dense is not None else float("inf")))


def _merit(c: Candidate) -> float:
    return -math.inf if c.merit is None else c.merit


def _describe_quality(c: Candidate) -> str:
    kl = "" if c.kl_to_dense is None else f", KL {c.kl_to_dense:.3g}"
    return f"{_describe_merit(c)}{kl}"


def _describe_merit(c: Candidate) -> str:
    if c.accuracy_top1 is not None:
        return f"top-1 {100 * c.accuracy_top1:.2f} %"
    if c.metric is not None:
        return f"{c.metric.name} {c.metric.value:.4g}"
    return "compared with nothing" if c.likeness is None else f"{c.likeness[1]} {c.likeness[0]:.3f}"


def _nearest_miss(candidates: Sequence[Candidate], limits: Sequence[_Limit], asked: str) -> str:
    comparable = [(c, [limit.miss(c) for limit in limits]) for c in candidates]
    known = [(max(m for m in misses if m is not None), c) for c, misses in comparable if None not in misses]
    if not known:
        unmeasured = [
            limit.asked for i, limit in enumerate(limits) if all(misses[i] is None for _, misses in comparable)
        ]
        names = " and ".join(unmeasured) or asked
        why = "what it limits was not measured for any candidate"
        if any(c.is_unusable for c in candidates):
            why = "the times of every candidate that has any are unusable; stop other programs and run again"
        return f"{names} cannot be checked: {why}"
    nearest = min(known, key=lambda pair: pair[0])[1]
    values = ", ".join(limit.describe(nearest) for limit in limits)
    return f"no candidate meets {asked}; the nearest is {nearest.id}: {values}; relax what it misses, or keep dense"


def _over(value: float | None, limit: float) -> float | None:
    """Return the share of `limit` by which `value` exceeds it; limits below 1e-3 count as 1e-3."""
    return None if value is None else (value - limit) / max(abs(limit), 1e-3)


def _under(value: float | None, limit: float) -> float | None:
    return None if value is None else (limit - value) / max(abs(limit), 1e-3)


def _met(miss: float | None) -> bool:
    return miss is not None and miss <= _TOLERANCE


def _speedups_measured(candidates: Sequence[Candidate]) -> bool:
    return any(c.speedup is not None for c in candidates)


def _usable_p50(c: Candidate) -> float | None:
    return None if c.is_unusable else c.latency_ms.p50


def _time_of(dense: DenseFigures, c: Candidate) -> float | None:
    """Return the milliseconds it takes where the dense model takes its p50; its own p50 without a speed-up."""
    if c.speedup is None or dense.latency_ms.p50 is None:
        return _usable_p50(c)
    return dense.latency_ms.p50 / max(c.speedup, 1e-9)


def _time_share(c: Candidate) -> float | None:
    """Return which share of the dense model's time it takes."""
    return None if c.speedup is None else 1 / max(c.speedup, 1e-9)


def _interval(c: Candidate) -> tuple[float, float]:
    """Return the interval of the speed-up; of width 0 where only the speed-up is known."""
    assert c.speedup is not None
    return c.speedup_ci or (c.speedup, c.speedup)


def _as_fast_as_the_fastest(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return those of the largest speed-up and those whose interval overlaps its; of the fewest MACs without any."""
    timed = [c for c in candidates if c.speedup is not None]
    if not timed:
        return [c for c in candidates if c.macs == min(other.macs for other in candidates)]
    low, high = _interval(max(timed, key=lambda c: c.speedup or 0.0))
    return [c for c in timed if _interval(c)[0] <= high and _interval(c)[1] >= low]


def _fastest(candidates: Sequence[Candidate]) -> Candidate:
    """Return the fastest; among those as fast the most accurate, then that of the fewest MACs, then the first."""
    return min(_as_fast_as_the_fastest(candidates), key=lambda c: (-_merit(c), c.macs))


def _most_accurate(candidates: Sequence[Candidate]) -> Candidate:
    """Return the most accurate candidate (the least sparse where accuracy is not measured), at a tie the faster."""
    rated = [c for c in candidates if c.merit is not None]
    if not rated:
        least = min(c.sparsity for c in candidates)
        return _fastest([c for c in candidates if c.sparsity == least])
    best = max(map(_merit, rated))
    return _fastest([c for c in rated if c.merit == best])


def _fastest_words(candidates: Sequence[Candidate]) -> str:
    if not _speedups_measured(candidates):
        why = "every time is unusable" if any(c.is_unusable for c in candidates) else "latency was not measured"
        return f"one of fewest MACs ({why})"
    equal = _as_fast_as_the_fastest(candidates)
    if len(equal) == 1:
        return "fastest"
    differ = len({c.merit for c in equal}) > 1
    decides = _best_words(equal) if differ else "one of fewest MACs"
    return f"{decides} of the {len(equal)} fastest, whose speed-ups cannot be told apart,"


def _most_accurate_words(candidates: Sequence[Candidate]) -> str:
    rated = any(c.merit is not None for c in candidates)
    return _best_words(candidates) if rated else "least sparse (accuracy was not measured)"


def _best_words(candidates: Sequence[Candidate]) -> str:
    by_accuracy = any(c.accuracy_top1 is not None for c in candidates)
    return "most accurate" if by_accuracy else f"best by {_merit_name(candidates[0])}"


def _point(quality: float | None, cost: float | None) -> tuple[float, float] | None:
    return None if quality is None or cost is None else (quality, cost)


def _dominates(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a[0] >= b[0] and a[1] <= b[1] and a != b


def _describe(dense: DenseFigures, c: Candidate) -> str:
    speed = _describe_macs(dense, c)
    if c.speedup is not None and _usable_p50(c) is not None:
        speed = f"{_describe_speedup(c)} ({_describe_latency(c)})"
    elif _usable_p50(c) is not None:
        speed = _describe_latency(c)
    found = speed if c.merit is None else f"{speed}, {_describe_drop(c)}"
    return found if c.planned_by is None else f"{found}; planned by {c.planned_by}"


def _describe_drop(c: Candidate) -> str:
    if c.accuracy_drop is None:
        return "accuracy not measured" if c.merit is None else _describe_merit(c)
    side = "below" if c.accuracy_drop >= 0 else "above"
    return f"accuracy {abs(c.accuracy_drop):.2f} points {side} dense"


def _describe_latency(c: Candidate) -> str:
    if c.is_unusable:
        return "latency unusable"
    return "latency not measured" if c.latency_ms.p50 is None else f"p50 {c.latency_ms.p50:.3g} ms"


def _describe_time(dense: DenseFigures, c: Candidate) -> str:
    found = _time_of(dense, c)
    if found is None or c.speedup is None or dense.latency_ms.p50 is None:
        return _describe_latency(c)
    return f"{found:.3g} ms (dense p50 {dense.latency_ms.p50:.3g} ms / {c.speedup:.2f})"


def _describe_speedup(c: Candidate) -> str:
    if c.speedup is None:
        return "speed-up unusable" if c.is_unusable else "speed-up not measured"
    return f"speed-up {c.speedup:.2f}x"


def _describe_macs(dense: DenseFigures, c: Candidate) -> str:
    share = 100 * c.macs / max(dense.macs, 1)
    return f"{share:.0f} % of the dense MACs (speed-up {'unusable' if c.is_unusable else 'not measured'})"


def _describe_size(c: Candidate) -> str:
    return "file size not measured" if c.file_bytes is None else f"{c.file_bytes} bytes"

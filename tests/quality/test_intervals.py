"""Intervals of accuracies and losses: published values, cases by hand, and coverage by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mm_edge.quality.evaluation import Reference, judge_logits
from mm_edge.quality.intervals import Z, accuracy_interval, compare_right, drop_interval


def test_exact_intervals_of_accuracy() -> None:
    # Tables of the Clopper-Pearson interval have 0.4439 to 0.9748 for 8 of 10.
    assert accuracy_interval(8, 10) == pytest.approx((0.44390, 0.97479), abs=1e-5)
    # With none right, P(X = 0 | hi) = (1 - hi)^n = 0.025.
    assert accuracy_interval(0, 10) == pytest.approx((0.0, 1 - 0.025 ** (1 / 10)))
    assert accuracy_interval(10, 10) == pytest.approx((0.025 ** (1 / 10), 1.0))
    lo, hi = accuracy_interval(38_000, 50_000)
    assert hi - lo == pytest.approx(2 * Z * math.sqrt(0.76 * 0.24 / 50_000), rel=0.01)


@pytest.mark.parametrize(("right", "count"), [(-1, 5), (6, 5), (0, 0)])
def test_impossible_counts_are_refused(right: int, count: int) -> None:
    with pytest.raises(ValueError, match=f"{right} of {count} images cannot be right"):
        accuracy_interval(right, count)


def test_the_exact_interval_covers_at_least_95_of_100() -> None:
    for p in (0.5, 0.9, 0.99):
        outcomes = [accuracy_interval(k, 40) for k in range(41)]
        chances = [math.comb(40, k) * p**k * (1 - p) ** (40 - k) for k in range(41)]
        assert sum(c for c, (lo, hi) in zip(chances, outcomes, strict=True) if lo <= p <= hi) >= 0.95


def test_the_interval_of_a_loss_by_hand() -> None:
    # Two ratings by 1,600 people, 150 and 86 of whom changed their mind (Agresti, Categorical Data Analysis).
    assert drop_interval(150, 86, 1600) == pytest.approx((2.14, 5.90), abs=0.005)
    # With no difference at all z^2 = n D^2 / (1 - D^2 ...) has the closed form z^2 / (n + z^2).
    edge = 100 * Z**2 / (100 + Z**2)
    assert drop_interval(0, 0, 100) == pytest.approx((-edge, edge))
    lo, hi = drop_interval(14, 5, 500)
    assert (lo, hi) == pytest.approx(tuple(-value for value in reversed(drop_interval(5, 14, 500))))
    # McNemar: 9 / sqrt(19) = 2.06 is beyond 1.96, 9 / sqrt(25) = 1.8 is not.
    assert lo > 0 > drop_interval(17, 8, 500)[0]
    with pytest.raises(ValueError, match="4 lost and 2 gained of 5 images are impossible"):
        drop_interval(4, 2, 5)


@pytest.mark.parametrize(("lost", "gained", "count"), [(0.03, 0.02, 300), (0.05, 0.005, 200), (0.1, 0.1, 60)])
def test_the_interval_of_a_loss_covers_the_truth(lost: float, gained: float, count: int) -> None:
    generator = np.random.default_rng(0)
    trials, covered = 300, 0
    for b, c, _ in generator.multinomial(count, [lost, gained, 1 - lost - gained], size=trials):
        lo, hi = drop_interval(int(b), int(c), count)
        covered += lo <= 100 * (lost - gained) <= hi
    assert covered / trials >= 0.92


def test_judging_gives_both_intervals() -> None:
    labels = np.array([0, 0, 1, 1, 1])
    dense = np.eye(2, dtype=np.float32)[[0, 0, 1, 1, 0]]
    own = np.eye(2, dtype=np.float32)[[0, 1, 1, 0, 1]]
    assert compare_right(own, dense, labels) == (2, 1, 5)
    broken = own.copy()
    broken[4] = np.nan
    assert compare_right(broken, dense, labels) == (2, 0, 5)
    found = judge_logits(own, Reference(labels, dense, 0.8))
    assert found["accuracy_ci"] == accuracy_interval(3, 5)
    assert found["drop_ci"] == drop_interval(2, 1, 5)
    unlabelled = judge_logits(own, Reference(None, dense, None))
    assert unlabelled["accuracy_ci"] is None and unlabelled["drop_ci"] is None

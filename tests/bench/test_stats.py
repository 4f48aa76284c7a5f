"""Numbers from samples: worked by hand, and coverage of the interval by simulation."""

from __future__ import annotations

import numpy as np
import pytest

from mm_edge.bench import stats


def test_percentiles_need_samples() -> None:
    assert stats.percentile_ms([2_000_000] * 2, 50) == 2.0
    assert stats.percentile_ms([2_000_000], 50) is None
    assert stats.percentile_ms([1_000_000] * 9, 90) is None
    assert stats.percentile_ms([1_000_000] * 10, 90) == 1.0
    assert stats.percentile_ms([1_000_000] * 99, 99) is None
    assert stats.percentile_ms([1_000_000] * 100, 99) == 1.0


def test_latency_by_hand() -> None:
    latency = stats.summarise_latency([n * 1_000_000 for n in range(1, 102)], threads=2, source="host")
    assert (latency.p50, latency.p90, latency.p99) == (51.0, 91.0, 100.0)
    assert (latency.samples, latency.threads, latency.source) == (101, 2, "host")


def test_pair_ratios() -> None:
    assert stats.pair_ratios([4, 9], [2, 3]).tolist() == [2.0, 3.0]
    with pytest.raises(ValueError, match="got 2 and 1"):
        stats.pair_ratios([1, 2], [1])


def test_interval_is_deterministic_and_holds_the_median() -> None:
    ratios = np.random.default_rng(1).normal(1.5, 0.1, 200)
    lo, hi = stats.bootstrap_median(ratios, 4)
    assert (lo, hi) == stats.bootstrap_median(ratios, 4)
    assert lo < np.median(ratios) < hi
    assert hi - lo < 0.1
    assert stats.bootstrap_median(np.full(50, 2.0), 4) == (2.0, 2.0)


def test_interval_covers_the_truth() -> None:
    generator = np.random.default_rng(0)
    trials = 60
    covered = 0
    for _ in range(trials):
        # noise shared by four consecutive pairs, as load on a machine is
        noise = np.repeat(generator.normal(0, 0.05, 50), 4) + generator.normal(0, 0.02, 200)
        lo, hi = stats.bootstrap_median(2.0 + noise, 8)
        covered += lo <= 2.0 <= hi
    assert covered / trials > 0.85


def test_spread_and_drift() -> None:
    assert stats.spread([1, 2, 3, 4, 5]) == pytest.approx(2 / 3)
    assert stats.drift([100] * 30 + [110] * 30 + [120] * 30) == pytest.approx(0.2)
    assert stats.drift([5]) == 0.0

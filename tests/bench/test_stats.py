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


def test_ratios_of_sittings_by_hand() -> None:
    """The slow runs are above the low percentile, and the disturbed pair is left out."""
    dense, candidate = [20, 20, 90, 10, 30, 30], [10, 10, 10, 1, 15, 15]
    used = stats.usable_pairs([0, 0, 0, 1, 0, 0], [4, 2], asked=6)
    assert [piece.tolist() for piece in used] == [[True, True, True, False], [True, True]]
    ratios = stats.sitting_ratios(dense, candidate, [4, 2], used)
    assert ratios.tolist() == [2.0, 2.0]
    ratio, interval = stats.mean_ratio(ratios)
    assert ratio == pytest.approx(2) and interval == pytest.approx((2, 2))


def test_a_sitting_with_too_few_undisturbed_pairs_uses_all() -> None:
    # Half of the four asked for in each sitting is two.
    used = stats.usable_pairs([1, 1, 1, 0, 1, 0, 0, 1], [4, 4], asked=8)
    assert [piece.tolist() for piece in used] == [[True] * 4, [False, True, True, False]]


def test_the_interval_of_sittings_is_students() -> None:
    # The logs are -0.1, 0 and 0.1: their standard deviation is 0.1, and t is 4.303.
    ratio, interval = stats.mean_ratio(np.exp([-0.1, 0.0, 0.1]))
    half = 4.303 * 0.1 / 3**0.5
    assert ratio == pytest.approx(1) and interval == pytest.approx((np.exp(-half), np.exp(half)))
    _, wider = stats.mean_ratio(np.exp([-0.1, 0.0, 0.1]), busy=0.5)
    half = (half**2 + (stats.BUSY_SHIFT / 2) ** 2) ** 0.5
    assert wider == pytest.approx((np.exp(-half), np.exp(half)))
    assert stats.half_width(2.0, (1.9, 2.1)) == pytest.approx(0.05)
    assert stats.mean_ratio(np.array([2.0]))[1] is None
    assert stats.half_width(2.0, None) == float("inf")


def simulate(generator: np.random.Generator, slices: float) -> tuple[float, float, float, bool]:
    """Time 2 ms against 1 ms where other programs take a core for `slices` ms as often as they leave it.

    A run is stopped once at most, with a probability that grows with its length. Returns the true ratio of the
    sittings, the median of pair ratios, the speed-up, and whether its interval holds the true ratio of 2.
    """
    shifts = generator.normal(0, 0.01, 8)  # where the models lie in memory
    dense: list[int] = []
    candidate: list[int] = []
    disturbed: list[int] = []
    for shift in shifts:
        for _ in range(50):
            hit = False
            for length, samples in ((2e6 * np.exp(shift), dense), (1e6, candidate)):
                stopped = generator.random() < min(1.0, length / (slices * 1e6))
                noise = abs(generator.normal(0, 0.01))
                samples.append(round(length * (1 + noise) + stopped * generator.exponential(slices * 1e6)))
                hit |= bool(stopped)
            disturbed.append(int(hit))
    sittings = [50] * 8
    used = stats.usable_pairs(disturbed, sittings, 200)
    ratio, interval = stats.mean_ratio(stats.sitting_ratios(dense, candidate, sittings, used))
    assert interval is not None
    raw = float(np.median(stats.pair_ratios(dense, candidate)))
    return float(2 * np.exp(shifts.mean())), raw, ratio, interval[0] <= 2 <= interval[1]


def test_other_programs_push_the_median_of_ratios_and_not_the_speed_up() -> None:
    generator = np.random.default_rng(0)
    found = [simulate(generator, 3.0) for _ in range(60)]
    assert np.mean([raw / true for true, raw, _, _ in found]) > 1.04
    assert np.mean([ratio / true for true, _, ratio, _ in found]) == pytest.approx(1, abs=0.01)
    assert sum(covers for *_, covers in found) >= 54


def test_spread_and_drift() -> None:
    assert stats.spread([1, 2, 3, 4, 5]) == pytest.approx(2 / 3)
    assert stats.drift([100] * 30 + [110] * 30 + [120] * 30) == pytest.approx(0.2)
    assert stats.drift([5]) == 0.0

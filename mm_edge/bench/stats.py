"""From raw samples to the numbers that are reported.

    r_s       = q10(dense_ns of sitting s) / q10(candidate_ns of sitting s)       undisturbed pairs only
    speed-up  = exp(mean of log r_s)
    interval  = exp(mean of log r_s +- sqrt(a^2 + b^2))
                a = t * sd(log r_s) / sqrt(S)            Student's t with S - 1 degrees of freedom
                b = BUSY_SHIFT * share of the cores that others kept busy
    spread    = (q75 - q25) / q50                        of one model's samples
    drift     = median(last third) / median(first third) - 1

A sitting loads both models afresh. Its ratio is taken from low percentiles, because what other programs do to a run
only makes it slower: benchmarks/load.py compares this with the median of pair ratios and others (docs/measuring.md).
Sittings differ by where the models lie in memory and by what else the machine did, and both are in a. What a busy
machine does to all sittings alike is in b: caches, memory and clock are shared, and two networks do not suffer alike. A
sitting with fewer undisturbed pairs than a quarter of those asked for uses all of its pairs.

Verdict. With h the half-width of the interval as a share of the speed-up, and u the share of undisturbed pairs,

    unusable    h > UNUSABLE_WIDTH, or fewer than two sittings
    stable      h <= STABLE_WIDTH, u >= STABLE_SHARE, others and the hypervisor took at most STABLE_LOAD of the cores,
                no core was slowed down against heat, clock and dense time kept within DRIFT_LIMIT, warm-up settled
    noisy       anything else

A percentile is given only where enough samples lie beyond it: p needs 1 / (1 - p) samples, so p99 needs 100.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mm_edge.arrays import BoolArray, Float64Array
from mm_edge.records import Latency

LOW = 10  # the percentile that other programs hardly reach
BUSY_SHIFT = 0.08  # what fully busy cores shift a ratio by: read from a trial of benchmarks/load.py
STABLE_WIDTH = 0.03
UNUSABLE_WIDTH = 0.10
STABLE_SHARE = 0.75
STABLE_LOAD = 0.25
SPREAD_LIMIT = 0.10
DRIFT_LIMIT = 0.05
BOOTSTRAP_REPEATS = 2000
CONFIDENCE = 0.95
# Student's t: the quantile at 0.975 for 1, 2, 3, ... degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def percentile_ms(samples_ns: Sequence[int], percent: int) -> float | None:
    """Return the percentile in milliseconds, or None where there are too few samples for it."""
    if len(samples_ns) * (100 - percent) < 100:
        return None
    return float(np.percentile(np.asarray(samples_ns), percent)) / 1e6


def summarise_latency(samples_ns: Sequence[int], threads: int, source: str, verdict: str | None = None) -> Latency:
    """Return the percentiles of `samples_ns`; `source` is "device" or "host"."""
    return Latency(
        p50=percentile_ms(samples_ns, 50),
        p90=percentile_ms(samples_ns, 90),
        p99=percentile_ms(samples_ns, 99),
        samples=len(samples_ns),
        threads=threads,
        source=source,
        verdict=verdict,
    )


def usable_pairs(disturbed: Sequence[int], sittings: Sequence[int], asked: int) -> list[BoolArray]:
    """Return for each sitting which of its pairs are used: the undisturbed ones, or all where these are too few.

    Args:
        disturbed: 1 for each pair that was disturbed, sitting after sitting.
        sittings: the number of pairs of each.
        asked: how many undisturbed pairs were asked for in all sittings.
    """
    least = max(2, asked // (4 * len(sittings)))
    ends = np.cumsum(sittings)
    pieces = [np.asarray(disturbed[end - count : end]) == 0 for end, count in zip(ends, sittings, strict=True)]
    return [piece if piece.sum() >= least else np.ones_like(piece) for piece in pieces]


def sitting_ratios(
    dense_ns: Sequence[int], candidate_ns: Sequence[int], sittings: Sequence[int], used: Sequence[BoolArray]
) -> Float64Array:
    """Return dense / candidate for every sitting, by the LOW percentile of its used pairs."""
    ends = np.cumsum(sittings)
    found = []
    for end, count, keep in zip(ends, sittings, used, strict=True):
        low = [np.percentile(np.asarray(ns[end - count : end])[keep], LOW) for ns in (dense_ns, candidate_ns)]
        found.append(low[0] / low[1])
    return np.asarray(found, dtype=np.float64)


def mean_ratio(ratios: Float64Array, busy: float = 0.0) -> tuple[float, tuple[float, float] | None]:
    """Return the geometric mean of the sittings' ratios and its 95 % interval; None of fewer than two sittings.

    `busy` is the share of the cores that others kept busy, from 0 to 1.
    """
    logs = np.log(ratios)
    middle = float(np.exp(logs.mean()))
    if len(logs) < 2:
        return middle, None
    within = _T[min(len(logs) - 1, len(_T)) - 1] * float(logs.std(ddof=1)) / float(np.sqrt(len(logs)))
    half = float(np.hypot(within, BUSY_SHIFT * min(busy, 1.0)))
    return middle, (float(np.exp(logs.mean() - half)), float(np.exp(logs.mean() + half)))


def half_width(ratio: float, interval: tuple[float, float] | None) -> float:
    """Return half the width of the interval as a share of the ratio; infinite without an interval."""
    return float("inf") if interval is None else (interval[1] - interval[0]) / (2 * ratio)


def pair_ratios(dense_ns: Sequence[int], candidate_ns: Sequence[int]) -> Float64Array:
    """Return dense / candidate for every pair; ValueError if the lists differ in length or are empty."""
    if len(dense_ns) != len(candidate_ns) or not dense_ns:
        raise ValueError(f"expected as many dense as candidate samples, got {len(dense_ns)} and {len(candidate_ns)}")
    return np.asarray(dense_ns, dtype=np.float64) / np.asarray(candidate_ns, dtype=np.float64)


def bootstrap_median(values: Float64Array, block: int, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of the median of `values` by circular block bootstrap, blocks of `block` values.

    Blocks of consecutive values are drawn with replacement, because values timed in the same slow second are not
    independent (Politis and Romano, 1992).
    """
    generator = np.random.default_rng(seed)
    count = len(values)
    blocks = -(-count // block)
    starts = generator.integers(0, count, size=(BOOTSTRAP_REPEATS, blocks, 1))
    picks = ((starts + np.arange(block)) % count).reshape(BOOTSTRAP_REPEATS, -1)[:, :count]
    medians = np.median(values[picks], axis=1)
    tail = 50 * (1 - CONFIDENCE)
    lo, hi = np.percentile(medians, [tail, 100 - tail])
    return float(lo), float(hi)


def spread(samples_ns: Sequence[int]) -> float:
    """Return the interquartile range as a fraction of the median."""
    low, middle, high = np.percentile(np.asarray(samples_ns), [25, 50, 75])
    return float((high - low) / middle)


def drift(samples_ns: Sequence[int]) -> float:
    """Return how much slower the last third is than the first, as a fraction (negative: faster)."""
    third = max(1, len(samples_ns) // 3)
    return float(np.median(samples_ns[-third:]) / np.median(samples_ns[:third]) - 1)

"""From raw samples to the numbers that are reported.

    ratio_i   = dense_ns[i] / candidate_ns[i]            pairs taken close together in time
    speed-up  = median(ratio)
    interval  = circular block bootstrap of that median: blocks of consecutive pairs are drawn with replacement,
                because pairs timed in the same slow second are not independent (Politis and Romano, 1992)
    spread    = (q75 - q25) / q50                        of one model's samples
    drift     = median(last third) / median(first third) - 1

A percentile is given only where enough samples lie beyond it: p needs 1 / (1 - p) samples, so p99 needs 100.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mm_edge.arrays import Float64Array
from mm_edge.records import Latency

SPREAD_LIMIT = 0.10
DRIFT_LIMIT = 0.05
BOOTSTRAP_REPEATS = 2000
CONFIDENCE = 0.95


def percentile_ms(samples_ns: Sequence[int], percent: int) -> float | None:
    """Return the percentile in milliseconds, or None where there are too few samples for it."""
    if len(samples_ns) * (100 - percent) < 100:
        return None
    return float(np.percentile(np.asarray(samples_ns), percent)) / 1e6


def summarise_latency(samples_ns: Sequence[int], threads: int, source: str) -> Latency:
    """Return the percentiles of `samples_ns`; `source` is "device" or "host"."""
    return Latency(
        p50=percentile_ms(samples_ns, 50),
        p90=percentile_ms(samples_ns, 90),
        p99=percentile_ms(samples_ns, 99),
        samples=len(samples_ns),
        threads=threads,
        source=source,
    )


def pair_ratios(dense_ns: Sequence[int], candidate_ns: Sequence[int]) -> Float64Array:
    """Return dense / candidate for every pair; ValueError if the lists differ in length or are empty."""
    if len(dense_ns) != len(candidate_ns) or not dense_ns:
        raise ValueError(f"expected as many dense as candidate samples, got {len(dense_ns)} and {len(candidate_ns)}")
    return np.asarray(dense_ns, dtype=np.float64) / np.asarray(candidate_ns, dtype=np.float64)


def bootstrap_median(values: Float64Array, block: int, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of the median of `values` by circular block bootstrap, blocks of `block` values."""
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

"""Divergences: by hand, and that the last entry that fits takes over."""

from __future__ import annotations

import numpy as np
import pytest

from mm_edge.arrays import Float32Array, Float64Array
from mm_edge.quality.divergences import DIVERGENCES, Divergence, divergence_for, divergence_per_row
from mm_edge.quality.evaluation import Reference, judge_logits


def test_kl_by_hand() -> None:
    dense = np.log(np.array([[0.5, 0.5], [0.9, 0.1]], np.float32))
    found = np.log(np.array([[0.25, 0.75], [0.9, 0.1]], np.float32))
    expected = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    np.testing.assert_allclose(divergence_per_row(dense, found), [expected, 0], atol=1e-6)
    assert divergence_for((2, 1000)) is divergence_for((2, 3, 8, 8)) is DIVERGENCES["kl"]


def test_a_divergence_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    def squared(dense: Float32Array, found: Float32Array) -> Float64Array:
        return np.asarray(((dense - found).astype(np.float64) ** 2).mean(axis=(1, 2, 3)))

    maps = Divergence("the mean squared error of maps", "squared units", lambda shape: len(shape) == 4, squared)
    monkeypatch.setitem(DIVERGENCES, "maps", maps)
    assert divergence_for((2, 3, 8, 8)) is maps and divergence_for((2, 10)) is DIVERGENCES["kl"]
    ones = np.ones((2, 1, 3, 3), np.float32)
    assert divergence_per_row(ones, 3 * ones).tolist() == [4, 4]


def test_a_judgement_has_the_drop_in_points() -> None:
    logits = np.array([[2, 0], [0, 2]], np.float32)
    labels = np.array([0, 0])
    assert judge_logits(logits, Reference(labels, logits, 0.75)) == {
        "accuracy_top1": 0.5,
        "accuracy_drop": 25.0,
        "agreement_top1": 1.0,
        "kl_to_dense": 0.0,
    }
    assert judge_logits(logits, Reference(labels))["accuracy_drop"] is None

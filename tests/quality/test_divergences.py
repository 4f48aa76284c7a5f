"""Divergences: by hand, and that the last entry that fits takes over."""

from __future__ import annotations

import numpy as np
import pytest

from mm_edge.arrays import Float32Array, Float64Array
from mm_edge.quality.divergences import (
    DIVERGENCES,
    Divergence,
    channel_error,
    divergence_for,
    divergence_per_image,
    kl_per_image,
)
from mm_edge.quality.evaluation import Reference, judge_logits


def test_kl_by_hand() -> None:
    dense = np.log(np.array([[0.5, 0.5], [0.9, 0.1]], np.float32))
    found = np.log(np.array([[0.25, 0.75], [0.9, 0.1]], np.float32))
    expected = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    np.testing.assert_allclose(divergence_per_image(dense, found), [expected, 0], atol=1e-6)
    # One image with both rows as positions.
    np.testing.assert_allclose(kl_per_image(dense[None], found[None]), [expected / 2], atol=1e-6)
    assert divergence_for((2, 1000)) is DIVERGENCES["kl"]
    assert divergence_for((2, 3, 8, 8)) is DIVERGENCES["channels"]


def test_channel_error_by_hand() -> None:
    # Two images, two positions, two channels; the second channel varies a thousand times less and counts as much.
    dense = np.array([[[0, 0], [2, 0.002]], [[0, 0], [2, 0.002]]], np.float32)
    found = np.array([[[0, 0], [2, 0.002]], [[1, 0.001], [1, 0.001]]], np.float32)
    np.testing.assert_allclose(channel_error(dense, found), [0, 1], rtol=1e-5)
    constant = np.zeros((2, 2, 1), np.float32)
    assert channel_error(constant, constant).tolist() == [0, 0]


def test_maps_are_compared_channel_by_channel() -> None:
    dense = np.random.default_rng(0).standard_normal((4, 3, 5, 5)).astype(np.float32) * [[[[1]], [[100]], [[0.01]]]]
    worse = dense.astype(np.float32).copy()
    worse[:, 2] = 0  # the channel of the smallest numbers is lost
    assert divergence_per_image(dense.astype(np.float32), worse).mean() == pytest.approx(1 / 3, rel=0.05)


def test_a_divergence_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    def squared(dense: Float32Array, found: Float32Array) -> Float64Array:
        return np.asarray(((dense - found).astype(np.float64) ** 2).mean(axis=(1, 2)))

    maps = Divergence("the mean squared error of maps", "squared units", lambda shape: len(shape) == 4, squared)
    monkeypatch.setitem(DIVERGENCES, "maps", maps)
    assert divergence_for((2, 3, 8, 8)) is maps and divergence_for((2, 10)) is DIVERGENCES["kl"]
    ones = np.ones((2, 1, 3, 3), np.float32)
    assert divergence_per_image(ones, 3 * ones).tolist() == [4, 4]


def test_a_judgement_has_the_drop_in_points() -> None:
    logits = np.array([[2, 0], [0, 2]], np.float32)
    labels = np.array([0, 0])
    found = judge_logits(logits, Reference(labels, logits, 0.75))
    assert (found["accuracy_top1"], found["accuracy_drop"]) == (0.5, 25.0)
    assert (found["agreement_top1"], found["kl_to_dense"], found["fidelity"]) == (1.0, 0.0, None)
    assert judge_logits(logits, Reference(labels))["accuracy_drop"] is None

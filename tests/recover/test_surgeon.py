"""Iterative brain surgeon: against re-inversion, and by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mm_edge.arrays import Float64Array, IntArray
from mm_edge.recover.closed_form.surgeon import Surgeon, damped, order_of


def _problem(outputs: int = 5, inputs: int = 12) -> tuple[Float64Array, Float64Array]:
    generator = np.random.default_rng(0)
    mixing = generator.standard_normal((inputs, inputs))
    return generator.standard_normal((outputs, inputs)), mixing @ mixing.T / inputs


@pytest.mark.parametrize("per_index", [1, 3])
def test_downdating_equals_inverting_anew(per_index: int) -> None:
    weight, covariance = _problem()
    columns = np.arange(12).reshape(-1, per_index)
    surgeon = Surgeon(weight, covariance, columns, ridge=0.01)
    gone: list[int] = []
    for index in (2, 0, 3):
        expected = _error_without(weight, damped(covariance, 0.01), columns, [*gone, index])
        expected -= _error_without(weight, damped(covariance, 0.01), columns, gone)
        energy = np.einsum("ok,kl,ol->", weight, covariance, weight)
        assert surgeon.errors()[index] == pytest.approx(expected / energy, rel=1e-8)
        surgeon.remove(index)
        gone.append(index)
        assert surgeon.errors()[index] == np.inf


def _error_without(weight: Float64Array, gram: Float64Array, columns: IntArray, gone: list[int]) -> float:
    """Return min over W' on the kept columns of tr((W - W') gram (W - W')^T): the Schur complement."""
    removed = columns[gone].reshape(-1)
    kept = np.setdiff1d(np.arange(len(gram)), removed)
    if not len(removed):
        return 0.0
    cross = gram[np.ix_(removed, kept)]
    schur = gram[np.ix_(removed, removed)] - cross @ np.linalg.solve(gram[np.ix_(kept, kept)], cross.T)
    return float(np.trace(weight[:, removed] @ schur @ weight[:, removed].T))


def test_the_twin_of_a_channel_goes_first_and_costs_next_to_nothing() -> None:
    weight, covariance = _problem(inputs=4)
    twins = covariance[[0, 1, 2, 3, 1]][:, [0, 1, 2, 3, 1]]
    weight = np.concatenate([weight, weight[:, :1]], axis=1)
    order = order_of([Surgeon(weight, twins, np.arange(5)[:, None], ridge=1e-9)], 5)
    assert order.removed[0] in (1, 4)
    assert order.error[0] < 1e-6 < order.error[1]


def test_orders_are_nested_and_errors_grow() -> None:
    weight, covariance = _problem()
    order = order_of([Surgeon(weight, covariance, np.arange(12)[:, None])], 12)
    assert sorted(order.removed) == list(range(12))
    assert (np.diff(order.error) >= 0).all()
    for count in range(1, 12):
        assert order.keep(count).sum() == count
        assert (order.keep(count + 1) >= order.keep(count)).all()
    assert order.error_at(12) == 0


def test_a_group_with_two_readers_weighs_both() -> None:
    covariance = np.eye(3)
    first = Surgeon(np.array([[1.0, 2.0, 3.0]]), covariance, np.arange(3)[:, None])
    second = Surgeon(np.array([[9.0, 1.0, 1.0]]), covariance, np.arange(3)[:, None])
    # As fractions of each output's energy: [1, 4, 9] / 14 + [81, 1, 1] / 83.
    assert list(order_of([first, second], 3).removed) == [1, 2, 0]

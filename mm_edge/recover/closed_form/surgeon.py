"""The order in which a group's indices are removed: iterative optimal brain surgeon over everything that reads them.

For a consumer with weight W and inverse H = [Cov(h, h) + lambda mean(diag) I]^-1, removing the columns J and adjusting
the others costs the squared error

    e(J) = tr( W_J [H_JJ]^-1 W_J^T )         (E9 in docs/method.md; Hassibi and Stork 1993)

    W -= W_J H_JJ^-1 H_J,      H -= H^T_J H_JJ^-1 H_J

One index is removed at a time, the one with the least cost. A cost is summed over the consumers, each as a fraction of
its energy tr(W Cov W^T). Every width keeps the indices that the order removes last, so one order serves every width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mm_edge.arrays import BoolArray, Float64Array, IntArray

# The usual lambda, in parts of the mean diagonal. graph/widths.py has a ridge of its own, for another system.
USUAL_RIDGE = 0.03
# Removed columns are dropped from memory when no more than this share of the columns is left.
SHRINK_AT = 0.85


@dataclass(frozen=True)
class Order:
    """A group's indices in the order in which they are removed.

    Attributes:
        removed: all indices, the first to be removed first, (size,).
        error: the summed relative error after each removal, (size,).
    """

    removed: IntArray
    error: Float64Array

    def keep(self, count: int) -> BoolArray:
        """Return the mask (size,) that keeps `count` indices."""
        mask = np.ones(len(self.removed), dtype=np.bool_)
        mask[self.removed[: len(self.removed) - count]] = False
        return mask

    def error_at(self, count: int) -> float:
        """Return the relative error of keeping `count` indices."""
        gone = len(self.removed) - count
        return float(self.error[gone - 1]) if gone else 0.0


class Surgeon:
    """Removes indices from one consumer, one after the other, and adjusts the weights that are left."""

    def __init__(
        self, weight: Float64Array, covariance: Float64Array, columns: IntArray, ridge: float = USUAL_RIDGE
    ) -> None:
        """Invert the damped covariance.

        Args:
            weight: (O, K).
            covariance: of the inputs, (K, K).
            columns: which columns belong to an index, (indices, columns per index).
            ridge: lambda.
        """
        self._weight = weight.copy()
        self._inverse = np.linalg.inv(damped(covariance, ridge))
        self._columns = columns.copy()
        self._energy = max(float(np.einsum("ok,kl,ol->", weight, covariance, weight, optimize=True)), 1e-30)

    def errors(self) -> Float64Array:
        """Return the relative error that removing each index would add, (indices,); infinite for removed ones."""
        live = self._columns[:, 0] >= 0
        found = np.full(len(self._columns), np.inf)
        columns = self._columns[live]
        if columns.shape[1] == 1:
            flat = columns[:, 0]
            found[live] = (self._weight[:, flat] ** 2).sum(axis=0) / self._inverse[flat, flat]
        else:
            blocks = self._inverse[columns[:, :, None], columns[:, None, :]]
            rows = self._weight[:, columns].transpose(1, 2, 0)  # (indices, columns, O)
            found[live] = (rows * np.linalg.solve(blocks, rows)).sum(axis=(1, 2))
        return found / self._energy

    def remove(self, index: int) -> None:
        """Remove one index and adjust the columns that are left."""
        columns = self._columns[index]
        rows = self._inverse[columns]  # (J, K)
        share = np.linalg.solve(rows[:, columns], rows)
        self._weight -= self._weight[:, columns] @ share
        self._inverse -= rows.T @ share
        self._columns[index] = -1
        self._shrink()

    def _shrink(self) -> None:
        """Free the memory of removed rows and columns once there are many."""
        alive = np.zeros(len(self._inverse), dtype=np.bool_)
        reached = self._columns[self._columns[:, 0] >= 0].reshape(-1)
        alive[reached] = True
        if alive.sum() > SHRINK_AT * len(alive):
            return
        position = np.cumsum(alive) - 1
        self._inverse = np.ascontiguousarray(self._inverse[np.ix_(alive, alive)])
        self._weight = np.ascontiguousarray(self._weight[:, alive])
        self._columns = np.where(self._columns >= 0, position[self._columns], -1)


def damped(covariance: Float64Array, ridge: float) -> Float64Array:
    """Return covariance + ridge * mean(diag) * I, for blocks (..., K, K)."""
    scale = np.trace(covariance, axis1=-2, axis2=-1) / max(covariance.shape[-1], 1)
    floor = np.maximum(ridge * scale, 1e-12)
    return np.asarray(covariance + floor[..., None, None] * np.eye(covariance.shape[-1]))


def order_of(surgeons: Sequence[Surgeon], size: int) -> Order:
    """Return the order in which the `size` indices of a group are removed; removing the last one counts as error 1."""
    removed: list[int] = []
    errors: list[float] = []
    for _ in range(size - 1):
        cost = np.sum([surgeon.errors() for surgeon in surgeons], axis=0)
        index = int(np.argmin(cost))
        for surgeon in surgeons:
            surgeon.remove(index)
        removed.append(index)
        errors.append(float(cost[index]))
    (last,) = set(range(size)) - set(removed)
    return Order(np.array([*removed, last]), np.cumsum([*errors, 1.0]))

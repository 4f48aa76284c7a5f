"""The types of arrays, one name for each, and batches of inputs.

A batch of inputs of a network with one input is a plain array, examples first. That of a network with several is a
structured array (examples,) with one field per input, of the input's shape and type: it is cut, joined and stored as a
plain array is, and carries names, shapes and types with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]
# Arrays by name, a network's tensors for instance.
Arrays = dict[str, Array]
Float32Arrays = dict[str, Float32Array]


def by_input(batch: Array, names: Sequence[str]) -> Arrays:
    """Return the arrays of a batch by the inputs' `names`; those of a plain batch have one name.

    Raises:
        ValueError: a plain batch for several inputs, or an input without a field.
    """
    if batch.dtype.names is None:
        (name,) = names
        return {name: batch}
    return {name: np.ascontiguousarray(batch[name]) for name in names}


def in_order_of_fields(batch: Array) -> tuple[Array, ...]:
    """Return the arrays of a batch in the order of its fields; a plain batch alone."""
    fields = batch.dtype.names
    return (batch,) if fields is None else tuple(np.ascontiguousarray(batch[name]) for name in fields)

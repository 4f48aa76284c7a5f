"""The types of arrays, one name for each."""

from __future__ import annotations

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

"""The user's own figure of merit (--metric FILE.py:CALLABLE), measured on artifacts.

    def accuracy(run):                       # FILE.py, given as --metric FILE.py:accuracy
        outputs = run({"input": images})     # arrays by name in, arrays by name out
        return float(...)                    # or a dict of floats; its first entry decides

A metric is called with a `Runner` for one artifact. Higher is better, unless the callable has an attribute
`higher_is_better` that is False. It must return a finite number, or a dict from names to finite numbers. It is called
for the dense network first, before anything is made, so that what cannot work is refused at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mm_edge.arrays import Array
from mm_edge.errors import UsageError, first_line
from mm_edge.load.user_code import import_stated
from mm_edge.records import MetricValue
from mm_edge.runtime import open_session

_FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}


class Runner:
    """Runs one artifact: `run({"input": array})` returns its outputs by name.

    Attributes:
        inputs: the shape of every input by name; an open dimension is a name or None.
        outputs: the names of the outputs.
    """

    def __init__(self, model: Path, threads: int = 0) -> None:
        """Open the artifact; raises ModelError where ONNX Runtime cannot load it."""
        self._session = open_session(model, threads)
        self._types = {item.name: item.type for item in self._session.get_inputs()}
        self.inputs: dict[str, tuple[Any, ...]] = {item.name: tuple(item.shape) for item in self._session.get_inputs()}
        self.outputs: tuple[str, ...] = tuple(item.name for item in self._session.get_outputs())

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs by name. Floating-point inputs are cast to what the artifact takes."""
        feeds = {name: self._cast(name, np.asarray(array)) for name, array in inputs.items()}
        return dict(zip(self.outputs, self._session.run(None, feeds), strict=True))

    def _cast(self, name: str, array: Array) -> Array:
        wanted = _FLOATS.get(self._types.get(name, ""))
        return array.astype(wanted, copy=False) if wanted is not None and array.dtype.kind == "f" else array


@dataclass(frozen=True)
class UserMetric:
    """A callable of the user.

    Attributes:
        code: FILE.py:CALLABLE as it was given.
        function: takes a Runner and returns a number, or a dict of numbers.
        higher_is_better: whether a larger value is better.
        digest: the hash of the file.
    """

    code: str
    function: Callable[[Runner], Any]
    higher_is_better: bool
    digest: str

    @property
    def name(self) -> str:
        """The callable's name, which the figure has where it is a plain number."""
        return self.code.rpartition(":")[2]

    def measure(self, model: Path, what: str) -> MetricValue:
        """Return the figure of an artifact; `what` names it in messages.

        Raises:
            ModelError: ONNX Runtime cannot load the artifact.
            UsageError: the callable raises, or returns no finite number.
        """
        run = Runner(model)
        try:
            found = self.function(run)
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            raise UsageError(f"--metric {self.code} failed for {what}: {first_line(error)}") from error
        figures = _read_figures(self.name, found)
        if figures is None:
            raise UsageError(
                f"--metric {self.code} returned {_shown(found)} for {what}; "
                "return a finite number, or a dict from names to finite numbers"
            )
        (name, value), *others = figures.items()
        return MetricValue(name, value, self.higher_is_better, others=dict(others))


def open_metric(code: str) -> UserMetric:
    """Import the metric FILE.py:CALLABLE, which runs the file.

    Raises:
        UsageError: `code` is not written so, the file cannot be imported, or it has no such callable.
    """
    function, digest = import_stated(code, "--metric", "score.py:accuracy")
    higher = getattr(function, "higher_is_better", True)
    if not isinstance(higher, bool):
        raise UsageError(f"--metric {code}: its higher_is_better is {_shown(higher)}; give True or False")
    return UserMetric(code, function, higher, digest)


def _read_figures(name: str, found: Any) -> dict[str, float] | None:
    """Return the figures by name, that which decides first; None where one is no finite number."""
    figures = {name: found} if not isinstance(found, Mapping) else dict(found)
    numbers = {key: _to_number(value) for key, value in figures.items()}
    if not numbers or not all(isinstance(key, str) for key in numbers):
        return None
    finite = {key: value for key, value in numbers.items() if value is not None}
    return finite if len(finite) == len(numbers) else None


def _to_number(value: Any) -> float | None:
    """Return a number, or an array or tensor of one, as a float; None where it is none or not finite."""
    if isinstance(value, (str, bytes, bool)) or value is None or not hasattr(value, "__float__"):
        return None
    try:
        number = float(value)
    except Exception:  # arrays of several numbers, and whatever the user's own types raise
        return None
    return number if math.isfinite(number) else None


def _shown(value: Any) -> str:
    """Return a value in a few characters, on one line."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # the user's own types may raise anything
        text = type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."

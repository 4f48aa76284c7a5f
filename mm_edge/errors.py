"""The errors users see.

Each message says what was given, what is allowed and what to do next, in one line.
`exit_code` follows the command-line contract: 2 for what is refused before scoring starts,
1 for a job that ran and failed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MMEdgeError(Exception):
    """Base of every error that is a message to the user rather than a defect."""

    exit_code = 1


class UsageError(MMEdgeError):
    """A request refused before scoring starts."""

    exit_code = 2


class ModelError(UsageError):
    """The model file or name cannot be used as given."""


class DataError(UsageError):
    """The images cannot be used as given."""


class TargetError(UsageError):
    """The target profile is unknown or invalid."""


class ExportError(UsageError):
    """The network cannot be exported to ONNX, with the exporter's own reason."""


class JobError(MMEdgeError):
    """The job started and could not be completed."""


class ParityError(JobError):
    """A compact model does not agree with its masked model."""


class ConstraintError(JobError):
    """No candidate meets the constraints; the message names the nearest."""


class BenchError(JobError):
    """A measurement could not be made."""


def first_line(error: BaseException) -> str:
    """Return the kind and first line of an error, for messages of one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def cause_line(error: BaseException) -> str:
    """Return the `first_line` of what `error` was raised from, or its own where it was raised from nothing."""
    return first_line(error if error.__cause__ is None else error.__cause__)


def nearest(name: str, allowed: Iterable[str], count: int = 3) -> list[str]:
    """Return up to `count` of the `allowed` names most like `name`, best first."""
    return difflib.get_close_matches(name, list(allowed), n=count, cutoff=0.4)


def unknown_name(kind: str, name: str, allowed: Iterable[str]) -> str:
    """Return the one-line message for a `name` that is not among the `allowed` names."""
    names = list(allowed)
    close = nearest(name, names)
    if close:
        return f"unknown {kind} '{name}'; did you mean {' or '.join(close)}?"
    return f"unknown {kind} '{name}'; allowed: {', '.join(names)}"

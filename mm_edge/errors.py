"""The errors users see.

Each message says what was given, what is allowed and what to do next, in one line.
`exit_code` follows the command-line contract: 2 for what is refused before scoring starts,
1 for a job that ran and failed.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator

# The longest message that is shown, in characters.
LONGEST_MESSAGE = 500
# Names are compared with allowed ones up to this length; comparing takes the square of it.
_COMPARED = 100
_RUNTIME = re.compile(r"(?:\w+: )?\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : ")
_NODE_FAILED = re.compile(r"Non-zero status code returned while running (\w+) node\. Name:'[^']*' Status Message: ")


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


def visible(text: str) -> str:
    """Return `text` with everything that does not print written as an escape, such as \\x1b, \\n or \\u202e.

    Names come from files and devices: they could send commands to a terminal, forge lines, or turn text around.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def one_message(text: str) -> str:
    """Return `text` in one visible line of LONGEST_MESSAGE characters at most; the remedy at its end is kept."""
    shown = visible(text[: 4 * LONGEST_MESSAGE] + text[4 * LONGEST_MESSAGE :][-LONGEST_MESSAGE:])
    if len(shown) <= LONGEST_MESSAGE:
        return shown
    half = (LONGEST_MESSAGE - 5) // 2
    return f"{shown[:half]} ... {shown[-half:]}"


@contextlib.contextmanager
def reading(
    what: str, kind: type[MMEdgeError], remedy: str = "it is damaged, or not what it is taken for"
) -> Iterator[None]:
    """Turn whatever is raised while `what` is read into `kind`: libraries raise anything on a file made to harm.

    Raises:
        MMEdgeError: one was raised, or `kind` in place of any other exception, which is its cause.
    """
    try:
        yield
    except MMEdgeError:
        raise
    except OSError as error:
        raise kind(f"{what} cannot be read: {error.strerror or first_line(error)}") from error
    except Exception as error:
        raise kind(f"{what} cannot be used ({first_line(error)}); {remedy}") from error


def first_line(error: BaseException) -> str:
    """Return the kind and first line of an error, for messages of one line; of ONNX Runtime's only what it says."""
    text = str(error).strip().splitlines()
    if not text:
        return type(error).__name__
    if _RUNTIME.match(text[0]):
        return _NODE_FAILED.sub(r"\1: ", _RUNTIME.sub("", text[0], count=1), count=1)
    return f"{type(error).__name__}: {text[0]}"


def cause_line(error: BaseException) -> str:
    """Return the `first_line` of what `error` was raised from, or its own where it was raised from nothing."""
    return first_line(error if error.__cause__ is None else error.__cause__)


def nearest(name: str, allowed: Iterable[str], count: int = 3) -> list[str]:
    """Return up to `count` of the `allowed` names most like `name`, best first."""
    return difflib.get_close_matches(name[:_COMPARED], list(allowed), n=count, cutoff=0.4)


def unknown_name(kind: str, name: str, allowed: Iterable[str]) -> str:
    """Return the one-line message for a `name` that is not among the `allowed` names."""
    names = list(allowed)
    close = nearest(name, names)
    if close:
        return f"unknown {kind} '{name}'; did you mean {' or '.join(close)}?"
    return f"unknown {kind} '{name}'; allowed: {', '.join(names)}"

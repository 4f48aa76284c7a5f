"""Declares options; the command line, the Python function and the checks are made from the declarations.

    seed: int = option(0, Whole(0, 2**63 - 1), help="Seed of every random choice.", section="Files and runs")

`option` returns a dataclass field. Its kind reads a value, given as text on the command line or as a value in Python,
and refuses what it cannot read. Choices are dicts from the names users type to records with a `help`; entries may be
added until a value is read. This module imports nothing heavy.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from mm_edge.errors import UsageError, nearest, unknown_name

_KEY = "option"

Choices = Mapping[str, Any]
# Refuses a value that was read, with the option's spelling for the message.
Check = Callable[[Any, str], None]
# Returns a default from the values of the fields declared before.
DefaultBy = Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Choice:
    """One name of a small set of choices.

    Attributes:
        help: what it means, in a few words.
    """

    help: str


# --- kinds: how a value is read and shown ---------------------------------------------------------------------------


@dataclass(frozen=True)
class ValueKind:
    """How the value of an option is read."""

    def read(self, value: Any, spelling: str) -> Any:
        """Return the value of the option spelled `spelling`.

        Raises:
            UsageError: `value` cannot be read.
        """
        raise NotImplementedError

    def show(self, value: Any) -> str:
        """Return `value` as users type it."""
        return "none" if value is None else str(value)

    def explain(self) -> str:
        """Return the allowed names and what they mean, or nothing where any value is allowed."""
        return ""

    def suggest(self) -> list[tuple[str, str]]:
        """Return (name, help) of what shell completion offers."""
        return []


@dataclass(frozen=True)
class Text(ValueKind):
    """Text, or a path where `is_path`.

    Attributes:
        what: what is taken, for the message.
        is_path: whether shell completion offers files.
        names: returns the names that shell completion offers.
    """

    what: str = "text"
    is_path: bool = False
    names: Callable[[], Iterable[str]] | None = None

    def read(self, value: Any, spelling: str) -> str:
        """Return the text; a path becomes text."""
        if isinstance(value, PathLike):
            value = fspath(value)
        if not isinstance(value, str):
            raise UsageError(f"{spelling} takes {self.what}, not {type_name(value)}")
        return value

    def suggest(self) -> list[tuple[str, str]]:
        """Return the names offered, without help."""
        return [(name, "") for name in self.names()] if self.names is not None else []


@dataclass(frozen=True)
class Folder(ValueKind):
    """The path of a folder."""

    def read(self, value: Any, spelling: str) -> Path:
        """Return the path."""
        if not isinstance(value, (str, PathLike)):
            raise UsageError(f"{spelling} takes a path, not {type_name(value)}")
        return Path(value)


@dataclass(frozen=True)
class Flag(ValueKind):
    """Yes or no."""

    def read(self, value: Any, spelling: str) -> bool:
        """Return the truth value."""
        if not isinstance(value, bool):
            raise UsageError(f"{spelling} takes True or False, not {value!r}")
        return value

    def show(self, value: Any) -> str:
        """Return on or off."""
        return "on" if value else "off"


@dataclass(frozen=True)
class Whole(ValueKind):
    """A whole number from `least` to `most`; None is no limit.

    Attributes:
        example: a value to show in the message.
    """

    least: int | None = None
    most: int | None = None
    example: str = "1"

    def read(self, value: Any, spelling: str) -> int:
        """Return the number."""
        number = _to_int(value)
        if number is None:
            raise UsageError(f"{spelling} {value!r} is not a whole number; write for example {spelling} {self.example}")
        if (self.least is not None and number < self.least) or (self.most is not None and number > self.most):
            raise UsageError(f"{spelling} {number} is not in the range {self.least} to {self.most}")
        return number


@dataclass(frozen=True)
class Number(ValueKind):
    """A number.

    Attributes:
        example: a value to show in the message.
    """

    example: str = "1"

    def read(self, value: Any, spelling: str) -> float:
        """Return the number."""
        number = _to_float(value)
        if number is None:
            raise UsageError(f"{spelling} {value!r} is not a number; write for example {spelling} {self.example}")
        return number


@dataclass(frozen=True)
class Ratio(ValueKind):
    """A number, which text may write as a fraction such as 1/255.

    Attributes:
        example: a value to show in the message.
    """

    example: str = "1/255"

    def read(self, value: Any, spelling: str) -> float:
        """Return the number."""
        above, slash, below = value.partition("/") if isinstance(value, str) else (value, "", "")
        parts = [_to_float(part) for part in ((above, below) if slash else (above,))]
        if None in parts or (slash and not parts[1]):
            raise UsageError(f"{spelling} {value!r} is not a number; write for example {spelling} {self.example}")
        return float(parts[0] or 0.0) / float(parts[1] or 1.0 if slash else 1.0)


@dataclass(frozen=True)
class Numbers(ValueKind):
    """One or more finite numbers; text has commas between them.

    Attributes:
        example: a value to show in the message.
        parts: the names of the numbers where their count is fixed, such as "CAL,VAL,TEST".
    """

    example: str
    parts: str | None = None

    def read(self, value: Any, spelling: str) -> tuple[float, ...]:
        """Return the numbers."""
        numbers = [_to_float(part) for part in _list(value)]
        if any(number is None or not math.isfinite(number) for number in numbers):
            raise UsageError(
                f"{spelling} '{_shown(value)}' is not a list of numbers; write for example {spelling} {self.example}"
            )
        if self.parts is not None and len(numbers) != len(self.parts.split(",")):
            raise UsageError(
                f"{spelling} '{_shown(value)}' has {len(numbers)} parts; write {self.parts} such as {self.example}"
            )
        return tuple(number for number in numbers if number is not None)

    def show(self, value: Any) -> str:
        """Return the numbers with commas between them."""
        return ",".join(f"{number:g}" for number in value) if value else "none"


@dataclass(frozen=True)
class Shape(ValueKind):
    """The shape C,H,W of one image."""

    def read(self, value: Any, spelling: str) -> tuple[int, int, int]:
        """Return (channels, height, width)."""
        example = f"write for example {spelling} 3,224,224"
        parts = value.lower().replace("x", ",").split(",") if isinstance(value, str) else _list(value)
        try:
            channels, height, width = (Whole().read(part, spelling) for part in parts)
        except (ValueError, UsageError) as error:
            raise UsageError(f"{spelling} '{_shown(value)}' is not C,H,W; {example}") from error
        if min(channels, height, width) < 1:
            raise UsageError(f"{spelling} '{_shown(value)}' has a size below 1; {example}")
        return channels, height, width


@dataclass(frozen=True)
class InputShapes(ValueKind):
    """Shapes of inputs by name, batch included; the command line repeats the option."""

    def read(self, value: Any, spelling: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Return (name, shape) of each input, from a dict, or from texts such as images=1,3,640,640."""
        given = value.items() if isinstance(value, Mapping) else [value] if isinstance(value, str) else _list(value)
        found: dict[str, tuple[int, ...]] = {}
        for item in given:
            name, shape = self._read_one(item, spelling)
            if name in found:
                raise UsageError(f"{spelling} {name} is given twice; give each input one shape")
            found[name] = shape
        return tuple(found.items())

    def show(self, value: Any) -> str:
        """Return the shapes as users type them."""
        return " ".join(f"{name}={','.join(map(str, shape))}" for name, shape in value) or "none"

    def _read_one(self, item: Any, spelling: str) -> tuple[str, tuple[int, ...]]:
        example = f"write for example {spelling} images=1,3,640,640"
        if isinstance(item, str):
            name, _, text = item.rpartition("=")
            sizes: Any = text.lower().replace("x", ",").split(",") if text else []
        else:
            name, sizes = item if isinstance(item, (tuple, list)) and len(item) == 2 else ("", item)
        try:
            shape = tuple(Whole().read(size, spelling) for size in _list(sizes))
        except UsageError as error:
            raise UsageError(f"{spelling} '{_shown(item)}' is not NAME=SHAPE; {example}") from error
        if not isinstance(name, str) or not name:
            raise UsageError(f"{spelling} '{_shown(item)}' is not NAME=SHAPE; {example}")
        if any(size < 1 for size in shape):
            raise UsageError(f"{spelling} '{_shown(item)}' has a size below 1; {example}")
        return name, shape


@dataclass(frozen=True)
class Sides(ValueKind):
    """The words auto and none, or sides of square images in pixels; text has commas between them."""

    def read(self, value: Any, spelling: str) -> str | tuple[int, ...]:
        """Return the word, or the sides, each once."""
        if isinstance(value, str) and value in ("auto", "none"):
            return value
        try:
            sides = tuple(Whole().read(part, spelling) for part in _list(value))
        except UsageError as error:
            raise UsageError(
                f"{spelling} '{_shown(value)}' is not auto, none or sides in pixels such as 224,192"
            ) from error
        if not sides or min(sides) < 1:
            raise UsageError(f"{spelling} '{_shown(value)}': give sides of 1 pixel or more, such as 224,192")
        return tuple(dict.fromkeys(sides))

    def suggest(self) -> list[tuple[str, str]]:
        """Return the two words."""
        return [("auto", ""), ("none", "")]


@dataclass(frozen=True)
class Patterns(ValueKind):
    """Names or patterns of names; the command line repeats the option, and a comma belongs to the name."""

    what: str = "patterns of parameter names"

    def read(self, value: Any, spelling: str) -> tuple[str, ...]:
        """Return the patterns."""
        patterns = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (value,)
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise UsageError(f"{spelling} takes {self.what}, not {type_name(pattern)}")
        return patterns

    def show(self, value: Any) -> str:
        """Return the patterns with commas between them."""
        return ",".join(value) or "none"


@dataclass(frozen=True)
class Name(ValueKind):
    """One name out of `choices`."""

    choices: Choices

    def read(self, value: Any, spelling: str) -> str:
        """Return the name."""
        if not isinstance(value, str):
            allowed = ", ".join(self.choices)
            raise UsageError(f"{spelling} takes one name, not {type_name(value)}; allowed: {allowed}")
        if value not in self.choices:
            raise UsageError(unknown_name(spelling, value, self.choices))
        return value

    def explain(self) -> str:
        """Return every name with what it means."""
        return _explain(self.choices)

    def suggest(self) -> list[tuple[str, str]]:
        """Return every name with what it means."""
        return [(name, _help_of(record)) for name, record in self.choices.items()]


@dataclass(frozen=True)
class Names(ValueKind):
    """One or more names out of `choices`; text has commas between them.

    Attributes:
        choices: the allowed names.
        noun: what one of them is called in messages; the option's spelling without it.
        all: whether the word "all" means every name.
    """

    choices: Choices
    noun: str | None = None
    all: bool = False

    def read(self, value: Any, spelling: str) -> tuple[str, ...]:
        """Return the names, each once."""
        given = _list(value)
        for item in given:
            if not isinstance(item, str):
                raise UsageError(f"{spelling} takes names, not {type_name(item)}; allowed: {', '.join(self.choices)}")
        names = tuple(dict.fromkeys(name for part in given if (name := part.strip())))
        if self.all and names == ("all",):
            return tuple(self.choices)
        if not names:
            empty = f"no {self.noun} given" if self.noun else f"{spelling} is empty"
            allowed = ", ".join([*(["all"] if self.all else []), *self.choices])
            raise UsageError(f"{empty}; allowed: {allowed}")
        for name in names:
            if name not in self.choices:
                raise UsageError(unknown_name(self.noun or spelling, name, self.choices))
        return names

    def show(self, value: Any) -> str:
        """Return the names with commas between them, or "all"."""
        return "all" if self.all and tuple(value) == tuple(self.choices) else ",".join(value)

    def explain(self) -> str:
        """Return every name with what it means."""
        return f"{'all, or comma' if self.all else 'Comma'}-separated: {_explain(self.choices)}"

    def suggest(self) -> list[tuple[str, str]]:
        """Return every name with what it means."""
        names = [(name, _help_of(record)) for name, record in self.choices.items()]
        return [("all", "every one of them"), *names] if self.all else names


@dataclass(frozen=True)
class Flags(ValueKind):
    """Any number of names out of `choices`; each name is a flag on the command line."""

    choices: Choices
    noun: str

    def read(self, value: Any, spelling: str) -> tuple[str, ...]:
        """Return the names, each once, in the order of the choices."""
        given = _list(value)
        names = Names(self.choices, noun=self.noun).read(given, spelling) if given else ()
        return tuple(name for name in self.choices if name in names)

    def show(self, value: Any) -> str:
        """Return the names with commas between them."""
        return ",".join(value) or "none"

    def explain(self) -> str:
        """Return every name; the help of its flag says what it means."""
        return ", ".join(self.choices)

    def keywords(self) -> dict[str, str]:
        """Return the Python keyword of each flag, and the name it stands for."""
        return {name.replace("-", "_"): name for name in self.choices}


# --- options --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """The declaration of one option.

    Attributes:
        name: the field's name, which is the command-line name with underscores.
        kind: how its value is read.
        help: what it is for, one sentence.
        section: the title above it in --help.
        default: its value where nothing is given.
        metavar: the name of the value in --help.
        spelled: its spelling on the command line where that is not --NAME.
        shown: the default in words, where the value does not say it.
        python_help: the help for Python, where the spelling on the command line means the opposite.
        check: refuses a value that was read.
        default_by: returns the default from the values of the fields before, where it depends on them.
    """

    name: str
    kind: ValueKind
    help: str
    section: str
    default: Any
    metavar: str | None = None
    spelled: str | None = None
    shown: str | None = None
    python_help: str | None = None
    check: Check | None = None
    default_by: DefaultBy | None = None

    @property
    def flag(self) -> str:
        """Its spelling on the command line."""
        return self.spelled or f"--{self.name.replace('_', '-')}"

    @property
    def spelling(self) -> str:
        """Its name in messages. That of a flag is its keyword, because only Python can give it a wrong value."""
        return self.name if isinstance(self.kind, Flag) else self.flag

    @property
    def shown_default(self) -> str:
        """The default as --help shows it."""
        return self.shown if self.shown is not None else self.kind.show(self.default)

    @property
    def full_help(self) -> str:
        """The help with the allowed names and what they mean."""
        explained = self.kind.explain()
        return f"{self.help} {explained}." if explained else self.help

    def read(self, value: Any) -> Any:
        """Return the checked value.

        Raises:
            UsageError: the value cannot be read or is out of its bounds.
        """
        found = self.kind.read(value, self.spelling)
        if self.check is not None:
            self.check(found, self.spelling)
        return found


def option(
    default: Any,
    kind: ValueKind,
    *,
    help: str,
    section: str,
    metavar: str | None = None,
    spelled: str | None = None,
    shown: str | None = None,
    python_help: str | None = None,
    check: Check | None = None,
    default_by: DefaultBy | None = None,
) -> Any:
    """Return the dataclass field of an option; a `default` that can be called makes the default when it is needed."""
    rest = {
        "kind": kind,
        "help": help,
        "section": section,
        "metavar": metavar,
        "spelled": spelled,
        "shown": shown,
        "python_help": python_help,
        "check": check,
        "default_by": default_by,
    }
    if callable(default):
        return dataclasses.field(default_factory=default, metadata={_KEY: rest})
    return dataclasses.field(default=default, metadata={_KEY: rest})


def list_options(record: type) -> dict[str, Option]:
    """Return the options that `record`, a dataclass, declares, by name."""
    found = {}
    for field in dataclasses.fields(record):
        if _KEY in field.metadata:
            made = field.default_factory
            default = field.default if made is dataclasses.MISSING else made()
            found[field.name] = Option(name=field.name, default=default, **field.metadata[_KEY])
    return found


def read_options(record: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the value of every field of `record`: what is given, read and checked, else the default.

    None stands for an option that is not given. Flags of a set (`Flags`) may be given by their own keywords.

    Raises:
        UsageError: an option is unknown, or a value cannot be read or is out of its bounds.
    """
    options = list_options(record)
    rest = merge_flags(options, given)
    for name in rest:
        if name not in options:
            raise UsageError(unknown_option(name, keywords(options)))
    values: dict[str, Any] = {}
    for name, item in options.items():
        if rest.get(name) is not None:
            values[name] = item.read(rest[name])
        else:
            values[name] = item.default if item.default_by is None else item.default_by(values)
    return values


def merge_flags(options: Mapping[str, Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return `given` with the keywords of single flags (ort=True) gathered in their option (formats=("ort",)).

    Raises:
        UsageError: a flag is neither True nor False.
    """
    rest = dict(given)
    for name, item in options.items():
        if not isinstance(item.kind, Flags):
            continue
        flags = {keyword: rest.pop(keyword) for keyword in item.kind.keywords() if keyword in rest}
        wanted = [item.kind.keywords()[key] for key, on in flags.items() if on is not None and Flag().read(on, key)]
        if wanted:
            rest[name] = [*_list(rest[name] if rest.get(name) is not None else ()), *wanted]
    return rest


def keywords(options: Mapping[str, Option]) -> list[str]:
    """Return every keyword by which the options can be given in Python."""
    flags = [keyword for item in options.values() if isinstance(item.kind, Flags) for keyword in item.kind.keywords()]
    return [*options, *flags]


def unknown_option(name: str, allowed: Iterable[str]) -> str:
    """Return the one-line message for an option that does not exist."""
    close = nearest(name, allowed, count=1)
    if close:
        return f"unknown option '{name}'; did you mean {close[0]}?"
    return f"unknown option '{name}'; help(mm_edge.prune_export) lists the options"


def type_name(value: Any) -> str:
    """Return the name of the type of `value` with its article."""
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def _list(value: Any) -> list[Any]:
    """Return the items of a comma-separated text or of a sequence; a single value is a list of one."""
    if isinstance(value, str):
        return value.split(",")
    try:
        return list(value)
    except TypeError:
        return [value]


def _shown(value: Any) -> str:
    """Return a given value as text for the command line."""
    return value if isinstance(value, str) else ",".join(map(str, _list(value)))


def _to_int(value: Any) -> int | None:
    if isinstance(value, bool) or not (isinstance(value, str) or hasattr(type(value), "__index__")):
        return None
    try:
        return int(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def _to_float(value: Any) -> float | None:
    if isinstance(value, bool) or not (isinstance(value, str) or hasattr(value, "__float__")):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def _help_of(record: Any) -> str:
    found = getattr(record, "help", "")
    return found if isinstance(found, str) else ""


def _explain(choices: Choices) -> str:
    """Return "a (what it is), b (what it is)"."""
    texts = ((name, _help_of(record)) for name, record in choices.items())
    return ", ".join(f"{name} ({text})" if text else name for name, text in texts)

"""Click options made from the fields of a record, such as `Request`, in which each option is declared once."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from mm_edge.errors import MMEdgeError
from mm_edge.run.options import (
    Flag,
    Flags,
    Folder,
    InputShapes,
    Names,
    Number,
    Option,
    Patterns,
    Sides,
    Text,
    Whole,
    list_options,
)
from mm_edge.run.request import SECTIONS

if TYPE_CHECKING:
    from click.types import OptionHelpExtra

    from mm_edge.load.models import LoadedModel
    from mm_edge.run.request import ModelOptions

OTHER = "Other options"
_NEGATION = "--no-"


class RecordCommand(click.Command):
    """A command whose options are the fields of a record; --help shows them in their sections."""

    def __init__(self, *args: Any, record: type, only: Collection[str] | None = None, **kwargs: Any) -> None:
        """Take the options of `record`, or those of its fields that `only` names."""
        super().__init__(*args, **kwargs)
        self._record = record
        self._only = only

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return all parameters; choices are read from the registries at the first call for a context."""
        key = f"{__name__}.{self.name}"
        if key not in ctx.meta:
            ctx.meta[key] = [made for item in self._options() for made in _make(item)]
        return [*ctx.meta[key], *super().get_params(ctx)]

    def _options(self) -> list[Option]:
        return [item for name, item in list_options(self._record).items() if self._only is None or name in self._only]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, then return every option by the name of its field: --no-bench becomes bench=False."""
        rest = super().parse_args(ctx, args)
        for item in self._options():
            if item.flag.startswith(_NEGATION):
                ctx.params[item.name] = not ctx.params.pop(f"no_{item.name}")
        return rest

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options section by section; those that are no field of the record come last."""
        lines: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                section = parameter.section if isinstance(parameter, RecordOption) else OTHER
                lines.setdefault(section, []).append(record)
        for section in (*SECTIONS, OTHER):
            if section in lines:
                with formatter.section(section):
                    formatter.write_dl(lines[section])


class RecordOption(click.Option):
    """The option of one field; shell completion offers what its kind allows."""

    def __init__(self, item: Option, *args: Any, **kwargs: Any) -> None:
        """Make the click option of `item`."""
        super().__init__(*args, **kwargs)
        self.section = item.section
        self._kind = item.kind

    def get_help_extra(self, ctx: click.Context) -> OptionHelpExtra:
        """Return nothing: the help says the default already."""
        return {}

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Return the completions of `incomplete`, which in a list are names after the last comma."""
        if isinstance(self._kind, Text) and self._kind.is_path:
            return [CompletionItem(incomplete, type="file")]
        try:
            names = self._kind.suggest()
        except MMEdgeError:
            return []
        if not names:
            return super().shell_complete(ctx, incomplete)
        before, comma, start = (
            incomplete.rpartition(",") if isinstance(self._kind, (Names, Sides)) else ("", "", incomplete)
        )
        given = before.split(",")
        return [
            CompletionItem(f"{before}{comma}{name}", help=text or None)
            for name, text in names
            if name.startswith(start) and name not in given
        ]


def _make(item: Option) -> Iterator[RecordOption]:
    """Make the click options of one field: one, or one for each flag of a set."""
    kind = item.kind
    if isinstance(kind, Flags):
        for keyword, name in kind.keywords().items():
            text = f"{kind.choices[name].help}  [default: off]"
            yield RecordOption(item, [f"--{name}", keyword], is_flag=True, help=text)
        return
    text = f"{item.full_help}  [default: {item.shown_default}]"
    if isinstance(kind, Flag):
        negated = item.flag.startswith(_NEGATION)
        name = f"no_{item.name}" if negated else item.name
        yield RecordOption(item, [item.flag, name], is_flag=True, default=item.default and not negated, help=text)
        return
    multiple = isinstance(kind, (Patterns, InputShapes))
    # The default None distinguishes an option that was left out from one that was given its default.
    yield RecordOption(
        item,
        [item.flag, item.name],
        type=_type_of(item),
        multiple=multiple,
        default=None,
        metavar=item.metavar,
        help=text,
    )


def _type_of(item: Option) -> click.ParamType[Any]:
    """Return the click type that reads the numbers and folders; the record reads the rest from text."""
    kind = item.kind
    if isinstance(kind, Whole):
        return click.INT if kind.least is None and kind.most is None else click.IntRange(kind.least, kind.most)
    if isinstance(kind, Number):
        return click.FLOAT
    if isinstance(kind, Folder):
        return click.Path(path_type=Path, file_okay=False)
    return click.STRING


def load(model: str, options: ModelOptions, *, guess_sizes: bool = False, only_run: bool = False) -> LoadedModel:
    """Load the model that a command was given; `guess_sizes` and `only_run` are those of LoadOptions."""
    from dataclasses import fields

    from mm_edge.load.models import LoadOptions, load_model

    own = {item.name: getattr(options, item.name) for item in fields(LoadOptions) if hasattr(options, item.name)}
    return load_model(model, LoadOptions(**own, guess_sizes=guess_sizes, only_run=only_run))

"""The command `mm-edge`: its subcommands, and how errors are shown."""

from __future__ import annotations

import contextlib
import errno
import importlib
import logging
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import click
from click.exceptions import NoArgsIsHelpError

from mm_edge import __version__
from mm_edge.errors import MMEdgeError, UsageError, one_message


@dataclass(frozen=True)
class Entry:
    """The location of a subcommand, which is imported when it is used, so that --help and --version start at once.

    Attributes:
        module: the module that defines it.
        name: the click command there.
        help: its line in `mm-edge --help`.
    """

    module: str
    name: str
    help: str

    def load(self) -> click.Command:
        """Import the command."""
        command: click.Command = getattr(importlib.import_module(self.module), self.name)
        return command


# Commands that keep what they make in a run folder.
RUNS = ("prune-export", "demo")

SUBCOMMANDS = {
    "prune-export": Entry(
        "mm_edge.cli.prune_export", "prune_export", "Prune MODEL for a target, export ONNX, measure, and report."
    ),
    "inspect": Entry(
        "mm_edge.cli.inspect", "inspect", "Show layers, roles, ranges and coupled groups, and what is pinned and why."
    ),
    "bench": Entry("mm_edge.cli.bench", "bench", "Measure latency and memory of ONNX models."),
    "evaluate": Entry(
        "mm_edge.cli.evaluate", "evaluate", "Measure the top-1 accuracy of an ONNX model on every image of a data set."
    ),
    "report": Entry("mm_edge.cli.report", "report", "Print the report of a run directory, or compare several."),
    "targets": Entry(
        "mm_edge.cli.targets",
        "targets",
        "Device profiles: list them, show one, check a machine against one, start your own.",
    ),
    "demo": Entry("mm_edge.cli.demo", "demo", "Run the whole job on a small network that comes with the package."),
}


class LazyCommands(MutableMapping[str, click.Command]):
    """The subcommands by name; one is imported when it is looked up."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        """Start with `entries`; commands may be added later."""
        self._commands: dict[str, Entry | click.Command] = dict(entries)

    def __getitem__(self, name: str) -> click.Command:
        """Return the command, which may import it."""
        found = self._commands[name]
        if isinstance(found, Entry):
            found = self._commands[name] = found.load()
        return found

    def __setitem__(self, name: str, command: click.Command) -> None:
        """Add a command."""
        self._commands[name] = command

    def __delitem__(self, name: str) -> None:
        """Remove a command."""
        del self._commands[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._commands)

    def __len__(self) -> int:
        """Count the commands."""
        return len(self._commands)


class Commands(click.Group):
    """Imports subcommands when they are used, and turns errors into one line and their exit code."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Start with every subcommand of the package."""
        super().__init__(*args, **kwargs)
        self.commands = LazyCommands(SUBCOMMANDS)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the table."""
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the subcommands with their help, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in SUBCOMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        # Libraries log what they cannot do, with tracebacks; without a handler Python would print it on stderr.
        logging.getLogger().addHandler(logging.NullHandler())
        try:
            with _stopping_signals():
                return super().invoke(ctx)
        except MMEdgeError as error:
            _say(f"error: {error}")
            ctx.exit(error.exit_code)
        except click.UsageError as error:
            if isinstance(error, NoArgsIsHelpError):
                raise
            path = error.ctx.command_path if error.ctx is not None else "mm-edge"
            message = error.format_message().rstrip(".")
            _say(f"error: {message[:1].lower()}{message[1:]}; see: {path} --help")
            ctx.exit(error.exit_code)
        except OSError as error:
            where = f" '{error.filename}'" if error.filename else ""
            _say(f"error: the system refused{where}: {error.strerror or error}")
            ctx.exit(UsageError.exit_code if error.errno == errno.ENAMETOOLONG else 1)
        except (KeyboardInterrupt, click.Abort):
            _say(_interruption(ctx))
            ctx.exit(1)


def _say(line: str) -> None:
    click.echo(f"mm-edge: {one_message(line)}", err=True)


def _interruption(ctx: click.Context) -> str:
    """Return what is true of a command that was stopped: runs go on, unless they were told to start anew."""
    if ctx.invoked_subcommand not in RUNS:
        return "interrupted"
    anew = " without --fresh" if "--fresh" in sys.argv else ""
    return f"interrupted; what was made is kept, the same command{anew} goes on from there"


@contextlib.contextmanager
def _stopping_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the command as Ctrl-C does, where Python may change that."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():
        kinds = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
        # One that the parent has set to be ignored, as nohup does, stays ignored.
        before = {kind: signal.signal(kind, stop) for kind in kinds if signal.getsignal(kind) == signal.SIG_DFL}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


COMPLETION = """\b
Completion of commands, options and names, for this shell:
  bash  eval "$(_MM_EDGE_COMPLETE=bash_source mm-edge)"
  zsh   eval "$(_MM_EDGE_COMPLETE=zsh_source mm-edge)"
  fish  _MM_EDGE_COMPLETE=fish_source mm-edge | source
"""


@click.group(
    "mm-edge",
    cls=Commands,
    epilog=COMPLETION,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="mm-edge")
def main() -> None:
    """Prune a trained vision model for a named device, and measure what that gains and costs."""

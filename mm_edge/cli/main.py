"""The command `mm-edge`: its subcommands, and what errors look like."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import click
from click.exceptions import NoArgsIsHelpError

from mm_edge import __version__
from mm_edge.errors import MMEdgeError


@dataclass(frozen=True)
class Entry:
    """Where a subcommand is found; it is imported when it is used, so that --help and --version start at once.

    Attributes:
        module: the module that defines it.
        name: the click command there.
        help: what `mm-edge --help` says of it.
    """

    module: str
    name: str
    help: str


COMMANDS = {
    "prune-export": Entry(
        "mm_edge.cli.prune_export", "prune_export", "Prune MODEL for a target, export ONNX, measure, and report."
    ),
    "inspect": Entry(
        "mm_edge.cli.inspect", "inspect", "Show layers, roles, ranges and coupled groups, and what is pinned and why."
    ),
    "bench": Entry("mm_edge.cli.devices", "bench", "Measure latency and memory of ONNX models."),
    "evaluate": Entry(
        "mm_edge.cli.evaluate", "evaluate", "Measure the top-1 accuracy of an ONNX model on every image of a data set."
    ),
    "report": Entry("mm_edge.cli.report", "report", "Print the report of a run directory."),
    "targets": Entry("mm_edge.cli.devices", "targets", "List, show, check and make device profiles."),
    "demo": Entry("mm_edge.cli.demo", "demo", "Run the whole job on a small network that comes with the package."),
}


class Commands(click.Group):
    """Imports subcommands when they are used, and turns errors into one line and the exit code of the contract."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all subcommands."""
        return [*COMMANDS, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the subcommand of that name; None where there is none."""
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return super().get_command(ctx, cmd_name)
        command: click.Command = getattr(importlib.import_module(entry.module), entry.name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the subcommands with their help, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except MMEdgeError as error:
            click.echo(f"mm-edge: error: {error}", err=True)
            ctx.exit(error.exit_code)
        except click.UsageError as error:
            if isinstance(error, NoArgsIsHelpError):
                raise
            path = error.ctx.command_path if error.ctx is not None else "mm-edge"
            message = error.format_message().rstrip(".")
            click.echo(f"mm-edge: error: {message[:1].lower()}{message[1:]}; see: {path} --help", err=True)
            ctx.exit(error.exit_code)
        except OSError as error:
            where = f" '{error.filename}'" if error.filename else ""
            click.echo(f"mm-edge: error: the system refused{where}: {error.strerror or error}", err=True)
            ctx.exit(1)
        except (KeyboardInterrupt, click.Abort):
            click.echo("mm-edge: interrupted; what was made is kept, the same command goes on from there", err=True)
            ctx.exit(1)


EPILOG = """\b
Completion of commands, options and names, for this shell:
  bash  eval "$(_MM_EDGE_COMPLETE=bash_source mm-edge)"
  zsh   eval "$(_MM_EDGE_COMPLETE=zsh_source mm-edge)"
  fish  _MM_EDGE_COMPLETE=fish_source mm-edge | source
"""


@click.group(
    "mm-edge",
    cls=Commands,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="mm-edge")
def main() -> None:
    """Prune a trained vision model for a named device, and measure what that gains and costs."""

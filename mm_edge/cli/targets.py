"""The commands `mm-edge targets ...`: device profiles. Importing this module imports click only."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from mm_edge.errors import BenchError, visible

if TYPE_CHECKING:
    from mm_edge.bench.target import Target


@click.group("targets")
def targets() -> None:
    """Device profiles: list them, show one, check a machine against one, start your own."""


@targets.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def list_command(as_json: bool) -> None:
    """List every profile and whether this machine is one."""
    from mm_edge.bench.target import list_targets, load_target, matches_this_machine, user_folder
    from mm_edge.records import to_json

    profiles = [load_target(name) for name in list_targets()]
    if as_json:
        click.echo(json.dumps([{**to_json(p), "this_machine": matches_this_machine(p)} for p in profiles], indent=2))
        return

    from rich.box import SIMPLE
    from rich.table import Table

    from mm_edge.progress import Terminal

    table = Table(box=SIMPLE)
    for heading in ("target", "ISA", "threads", "transport", "here", "description"):
        table.add_column(heading, no_wrap=heading == "target")
    for profile in profiles:
        here = "yes" if matches_this_machine(profile) else ""
        table.add_row(
            _shown(profile.name),
            profile.isa,
            str(profile.threads),
            profile.transport,
            here,
            _shown(profile.description),
        )
    Terminal().print(table)
    click.echo(f"your own profiles: {user_folder()}")


@targets.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def show_command(name: str, as_json: bool) -> None:
    """Show profile NAME (or a .toml file): multiples, threads, budget and where each claim comes from."""
    from mm_edge.bench.target import OP_CLASSES, load_target, resolve_host
    from mm_edge.records import to_json

    target = resolve_host(load_target(name))
    if as_json:
        click.echo(json.dumps(to_json(target), indent=2))
        return

    from rich.table import Table

    from mm_edge.progress import Terminal

    console = Terminal()
    console.print(f"[bold]{_shown(target.name)}[/bold]: {_shown(target.description)}")
    for label, values in _facts(target):
        console.print(f"  {label}: {_shown(values)}")
    table = Table(title="channel multiples")
    data_types = list(dict.fromkeys(key for by_type in target.multiples.values() for key in by_type))
    for heading in ("operator", *data_types):
        table.add_column(heading)
    for op_class in OP_CLASSES:
        table.add_row(op_class, *(str(target.multiple(op_class, data_type)) for data_type in data_types))
    console.print(table)
    for claim, source in target.sources.items():
        console.print(f"  {_shown(claim)}: {_shown(source)}")


def _shown(text: str) -> str:
    """Return text of a profile or a device as rich prints it: visible, and no markup."""
    from rich.markup import escape

    return escape(visible(text))


def _tell(line: str) -> None:
    click.echo(visible(line), err=True)


def _facts(target: Target) -> Iterator[tuple[str, str]]:
    yield "ISA", " ".join([target.isa, *target.features])
    yield "data types", ", ".join(target.data_types)
    yield "n:m kernels", ", ".join(target.n_m) or "none"
    yield "threads", str(target.threads) + (f" on cores {target.affinity}" if target.affinity else "")
    yield "provider", target.provider
    yield "transport", target.transport
    if target.memory_bytes:
        yield "memory for the model", f"{target.memory_bytes / 2**20:.0f} MiB"
    if target.storage_bytes:
        yield "storage for the model", f"{target.storage_bytes / 2**20:.0f} MiB"


@targets.command("check")
@click.argument("name")
@click.option("--host", metavar="USER@HOST", help="Check this device instead of this machine.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def check_command(name: str, host: str | None, as_json: bool) -> None:
    """Report what the machine is and whether profile NAME describes it; exit 1 if it does not."""
    from mm_edge.bench.connect import open_transport
    from mm_edge.bench.host import describe_machine
    from mm_edge.bench.readiness import missing
    from mm_edge.bench.session import read_info
    from mm_edge.bench.target import load_target, mismatches, resolve_host
    from mm_edge.bench.transport import LocalTransport
    from mm_edge.records import to_json

    profile, tell = load_target(name), _tell
    with LocalTransport() if host is None else open_transport(profile, host, tell) as transport:
        info = read_info(transport)
        device = transport.name
    target = resolve_host(profile, info["isa"], info["flags"])
    record = describe_machine(info, target, device)
    problems = [*missing(info), *mismatches(target, info)]
    if as_json:
        click.echo(json.dumps({"target": target.name, "environment": to_json(record), "problems": problems}, indent=2))
    else:
        _print_machine(record)
    if problems:
        raise BenchError(f"{target.name} does not describe {device}: {'; '.join(problems)}")


def _print_machine(record: Mapping[str, Any]) -> None:
    from mm_edge.progress import Terminal

    keys = (
        "cpu_model",
        "isa",
        "cores",
        "physical_cores",
        "threads_auto",
        "governors",
        "frequency_khz",
        "temperature_c",
        "memory_bytes",
        "os",
        "python",
        "numpy",
        "onnxruntime",
        "providers",
    )
    console = Terminal()
    for key in keys:
        value = record[key]
        text = ", ".join(value) if isinstance(value, list) else str(value)
        console.print(f"  {key}: {_shown(text) if value not in (None, []) else 'not reported'}")
    for doubt in record["doubts"]:
        console.print(f"  [yellow]doubt[/yellow]: {_shown(doubt)}")


@targets.command("setup")
@click.argument("what", type=click.Choice(["arm64-qemu"]))
def setup_command(what: str) -> None:
    """Build the arm64 emulator in your cache, without root: arm64 Debian packages and wheels, run by qemu-user."""
    from mm_edge.bench import qemu

    folder = qemu.setup(_tell)
    click.echo(f"{what} is ready in {folder}: use it with '--host qemu' and any arm64 target")


@targets.command("new")
@click.argument("name")
@click.option("--like", default="arm64", show_default=True, help="Profile to start from.")
def new_command(name: str, like: str) -> None:
    """Start a profile of your own called NAME, as a copy of another, in your configuration folder."""
    from mm_edge.bench.new_target import write_profile

    path = write_profile(name, like)
    click.echo(f"wrote {path}: edit it, then 'mm-edge targets show {name}'")

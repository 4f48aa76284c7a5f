"""`mm-edge demo`: the whole job on the network and images that come with the package."""

from __future__ import annotations

from pathlib import Path

import click

from mm_edge.cli.prune_export import run
from mm_edge.run.request import make_request


@click.command("demo")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("mm-edge-demo"),
    show_default=True,
    help="Run directory.",
)
def demo(out: Path) -> None:
    """Run the whole job on a small network that comes with the package.

    The network was trained on Fashion-MNIST; its images come with it, and the target is this machine.
    """
    from mm_edge.demo import IMAGES, MODEL

    click.echo(
        f"demo: a small network trained on Fashion-MNIST, {IMAGES.name} for data, this machine as target", err=True
    )
    run(str(MODEL), make_request(target="host", data=str(IMAGES), out=out))

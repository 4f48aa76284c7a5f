"""The command `mm-edge bench`: measure ONNX models on a device. Importing this module imports click only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mm_edge.bench import MINIMUM_PAIRS
from mm_edge.errors import UsageError, reading, visible

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from mm_edge.bench.pattern import PatternLayer
    from mm_edge.records import Parity


@click.command("bench")
@click.argument(
    "models", metavar="MODEL.onnx [MORE.onnx ...]", nargs=-1, required=True, type=click.Path(path_type=Path)
)
@click.option("--target", "target_name", default="host", show_default=True, help="Profile: threads, provider, options.")
@click.option("--host", metavar="USER@HOST", help="Measure on this device, through ssh; 'qemu' emulates.")
@click.option("--pairs", default=MINIMUM_PAIRS, show_default=True, type=click.IntRange(20, 100_000))
@click.option("--samples", type=click.Path(path_type=Path, file_okay=False), help="Keep raw samples in this folder.")
@click.option("--audit", is_flag=True, help="Name the kernel of each convolution and matrix product, and why.")
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON document on standard output, the rest on standard error."
)
def bench(
    models: tuple[Path, ...],
    target_name: str,
    host: str | None,
    pairs: int,
    samples: Path | None,
    audit: bool,
    as_json: bool,
) -> None:
    """Measure latency and memory of ONNX models; the first is what the others are compared with.

    With --audit, the graphs as ONNX Runtime optimised them are kept in the --samples folder (default: mm-edge-audit).
    """
    for model in models:
        if not model.is_file():
            raise UsageError(f"model '{model}' does not exist")
        if not model.stat().st_size:
            raise UsageError(f"model '{model}' is empty; write it again")
        _refuse_foreign(model)

    from rich.markup import escape

    from mm_edge.bench.comparison import Comparison, compare_models
    from mm_edge.bench.connect import open_transport
    from mm_edge.bench.session import read_info
    from mm_edge.bench.tables import print_comparison
    from mm_edge.bench.target import load_target, resolve_host
    from mm_edge.progress import Terminal
    from mm_edge.records import to_json

    profile = load_target(target_name)
    with open_transport(profile, host, _tell) as transport:
        info = read_info(transport)
        target = resolve_host(profile, info["isa"], info["flags"])
        comparison = Comparison(models, target, transport, pairs, samples, audit)
        with Terminal(stderr=True).status("reading what the device is") as status:
            document = compare_models(
                comparison,
                compare=_compare,
                find_layers=_find_layers,
                tell=lambda step: status.update(escape(step)),
            )
    if as_json:
        click.echo(json.dumps(to_json(document), indent=2))
    else:
        print_comparison(document, Terminal(), Terminal(stderr=True))


def _refuse_foreign(model: Path) -> None:
    """Raise UsageError unless a file is an ONNX model, before a device is asked for anything."""
    import onnx

    with reading(f"model '{model}'", UsageError, "bench takes .onnx files"):
        proto = onnx.load(model, load_external_data=False)
    if not proto.graph.output:
        raise UsageError(f"model '{model}' is no ONNX model: it has no output; bench takes .onnx files")


def _tell(line: str) -> None:
    click.echo(visible(line), err=True)


def _compare(model: Path, outputs: npt.NDArray[np.float32], inputs: npt.NDArray[np.float32], kind: str) -> Parity:
    from mm_edge.quality.parity import compare_with_outputs

    return compare_with_outputs(model, outputs, inputs, kind)


def _find_layers(model: Path, pattern: str) -> list[PatternLayer]:
    from mm_edge.plan.n_m import parse_pattern, pattern_layers

    return pattern_layers(model, parse_pattern(pattern))

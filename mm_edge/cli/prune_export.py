"""`mm-edge prune-export`: the whole job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mm_edge.cli.options import RecordCommand, load
from mm_edge.errors import UsageError
from mm_edge.run.request import Request, make_request

EXAMPLES = """\b
Examples:
  mm-edge prune-export model.pt --target arm64
  mm-edge prune-export model.pt --data images/ --max-drop 1 --precision fp32,int8
  mm-edge prune-export weights.safetensors --arch resnet18 --data images.tar --speedup 1.5 --host pi@board
"""


@click.command("prune-export", cls=RecordCommand, record=Request, epilog=EXAMPLES)
@click.argument("model", type=click.Path(readable=False))
@click.option("--dynamic-batch", is_flag=True, hidden=True)
def prune_export(model: str, dynamic_batch: bool, **given: Any) -> None:
    """Prune MODEL for a target, export ONNX, measure, and report.

    MODEL is a checkpoint, a state_dict, a .safetensors, a Hugging Face folder, a .pt2, an .onnx or timm:NAME.
    """
    if dynamic_batch:
        raise UsageError("--dynamic-batch is not available yet; leave it out")
    if given["out"] is None:
        given["out"] = Path(f"mm-edge-{Path(model.removeprefix('timm:')).stem}")
    run(model, make_request(**given))


def run(model: str, request: Request) -> None:
    """Run the job on the model at that path, and print its report."""
    from mm_edge.api import run_job
    from mm_edge.progress import Stages, Terminal
    from mm_edge.report import print_paths, print_report

    result = run_job(lambda: load(model, request), request, Stages(Terminal(stderr=True)))
    print_report(result, Terminal())
    print_paths(result, result.folder, Terminal())

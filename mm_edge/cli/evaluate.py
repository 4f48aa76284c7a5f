"""`mm-edge evaluate`: the accuracy of an ONNX model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from mm_edge.cli.options import RecordCommand, load
from mm_edge.errors import UsageError, visible
from mm_edge.run.request import ModelOptions, make_model_options

PHOTOS = ("mean", "std", "preprocess", "scale", "colours", "resize", "layout")


@click.command("evaluate", cls=RecordCommand, record=ModelOptions, only=("input_size", "inputs", *PHOTOS))
@click.argument("model", metavar="MODEL.onnx", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--data",
    required=True,
    metavar="PATH",
    type=click.Path(path_type=str),
    help="Folder or tar of class folders, .npz with labels, or FILE.py:CALLABLE.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def evaluate(model: Path, data: str, as_json: bool, **given: Any) -> None:
    """Measure the top-1 accuracy of an ONNX model on every image of a data set.

    Images without labels are run all the same: a model that fails on one of them is found.
    """
    if model.suffix != ".onnx":
        raise UsageError(f"'{model}' is not an .onnx; evaluate takes what prune-export or another exporter wrote")
    options = make_model_options(**given)

    from mm_edge.load.data import open_data
    from mm_edge.progress import Terminal
    from mm_edge.quality.evaluation import compare_logits, run_onnx

    loaded = load(str(model), options, only_run=True)
    splits = open_data(data, loaded.input, loaded.info.num_classes, (0.0, 0.0, 1.0), inputs=loaded.inputs)
    with Terminal(stderr=True).status("evaluating"):
        logits = run_onnx(model, splits.test.batches(32), 2)
    labels = splits.test.labels
    accuracy = None if labels is None else compare_logits(logits, labels, None).accuracy_top1
    for warning in (*loaded.warnings, *splits.warnings):
        click.echo(f"warning: {visible(warning)}", err=True)
    if not len(logits):
        raise UsageError(f"'{data}' has no images to evaluate on")
    if as_json:
        click.echo(json.dumps({"model": str(model), "accuracy_top1": accuracy, "images": len(logits)}))
    elif accuracy is None:
        click.echo(f"no accuracy: the images have no labels; the model ran on {len(logits)} of them")
    else:
        click.echo(f"top-1 accuracy {accuracy:.2%} on {len(logits)} images")

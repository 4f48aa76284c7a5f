"""The command line: parse, call, print. One command per job."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.exceptions import NoArgsIsHelpError
from rich.console import Console
from rich.table import Table

from mm_edge import __version__
from mm_edge.errors import MMEdgeError, UsageError
from mm_edge.plan.strategies import STRATEGIES

if TYPE_CHECKING:
    from mm_edge.api import Setting
    from mm_edge.load.models import LoadedModel
    from mm_edge.records import Report
    from mm_edge.run.job import Request

SIGNALS_HELP = "Comma-separated: magnitude, gradient, product."
STRATEGIES_HELP = f"all, or comma-separated: {', '.join(STRATEGIES)}."


class Commands(click.Group):
    """Turns the package's errors into one line and the exit code of the contract."""

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


@click.group(
    "mm-edge", cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="mm-edge")
def main() -> None:
    """Prune a trained vision model for a named device, and measure what it bought and what it cost."""


def _floats(text: str, option: str, example: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
        if all(math.isfinite(value) for value in values):
            return values
    except ValueError:
        pass
    raise UsageError(f"{option} '{text}' is not a list of numbers; write for example {option} {example}")


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _shape(text: str | None) -> tuple[int, int, int] | None:
    if text is None:
        return None
    try:
        channels, height, width = (int(part) for part in text.lower().replace("x", ",").split(","))
    except ValueError as error:
        raise UsageError(f"--input-size '{text}' is not C,H,W; write for example --input-size 3,224,224") from error
    if min(channels, height, width) < 1:
        raise UsageError(f"--input-size '{text}' has a size below 1; write for example --input-size 3,224,224")
    return channels, height, width


def input_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say how a model's input is prepared."""
    command = click.option("--std", metavar="R,G,B", help="Standard deviation of the normalisation.")(command)
    command = click.option("--mean", metavar="R,G,B", help="Mean of the normalisation.")(command)
    return click.option("--input-size", metavar="C,H,W", help="Input shape, where the file does not say.")(command)


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say how to read a model."""
    for option in (
        click.option("--keep", multiple=True, metavar="PATTERN", help="Never prune parameters this names; repeatable."),
        click.option("--trust-pickle", is_flag=True, help="Load a pickled module: this runs the code in it."),
        input_options,
        click.option("--arch", metavar="TIMM_NAME", help="Architecture of a bare state_dict; or FILE.py:CALLABLE."),
    ):
        command = option(command)
    return command


def _load(model: str, options: dict[str, Any]) -> LoadedModel:
    from mm_edge.load.models import LoadOptions, load_model

    mean, std = options["mean"], options["std"]
    return load_model(
        model,
        LoadOptions(
            arch=options.get("arch"),
            input_size=_shape(options["input_size"]),
            mean=None if mean is None else _floats(mean, "--mean", "0.485,0.456,0.406"),
            std=None if std is None else _floats(std, "--std", "0.229,0.224,0.225"),
            trust_pickle=options.get("trust_pickle", False),
        ),
    )


@main.command("prune-export")
@click.argument("model")
@click.option("--target", default="host", show_default=True, help="Device profile; see 'mm-edge targets list'.")
@click.option("--data", metavar="PATH", help="Folder or tar of class folders, or a data set as timm names it.")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Run directory.  [default: mm-edge-MODEL]"
)
@click.option("--signals", default="magnitude,gradient,product", show_default=True, help=SIGNALS_HELP)
@click.option("--strategies", default="all", show_default=True, help=STRATEGIES_HELP)
@click.option("--ranges", default="rules", show_default=True, help="Source of the sparsity ranges: rules or observed.")
@click.option("--split", default="0.5,0.25,0.25", show_default=True, help="Calibration, validation, test.")
@click.option(
    "--kinds", default="structured", show_default=True, help="Comma-separated: structured, n:m (2:4), unstructured."
)
@click.option(
    "--recover",
    default=None,
    help="none, bn, closed-form, tune or finetune.  [default: closed-form with data, else none]",
)
@click.option("--epochs", type=int, metavar="N", help="Longest fine-tuning, in passes over the calibration images.")
@click.option(
    "--select", default=None, help="Which channels stay: signal, obs or auto.  [default: auto with closed-form]"
)
@click.option("--macs", metavar="FRACTION,...", help="Add candidates at these fractions of the dense MACs.")
@click.option(
    "--allocate-by",
    default="macs",
    show_default=True,
    help="What budgets of time take widths by: macs, or latency, a table measured per group on the device.",
)
@click.option(
    "--input-sizes",
    metavar="auto|none|PX,...",
    help="Also prune at these sides of the input; auto: down to 0.7 of it.  [default: only dense controls, with data]",
)
@click.option(
    "--precision",
    default="fp32",
    show_default=True,
    help="Comma-separated: fp32; int8, fp16 of the dense model and the rows on the front.",
)
@click.option("--prune-norms", is_flag=True, help="Let LayerNorm lose channels: exact, but it runs slower than fused.")
@click.option("--ort", is_flag=True, help="Also write the chosen model in ONNX Runtime's .ort format.")
@click.option("--bake-preprocess", is_flag=True, help="Also write it with preprocessing inside, for raw uint8 images.")
@click.option("--max-drop", type=float, metavar="POINTS", help="Largest loss of top-1 accuracy, in points.")
@click.option("--latency", type=float, metavar="MS", help="Largest median latency.")
@click.option("--speedup", type=float, metavar="X", help="Smallest measured speed-up.")
@click.option("--size", type=int, metavar="BYTES", help="Largest file.")
@click.option("--host", metavar="USER@HOST[:PORT]", help="Measure on this device, through ssh.")
@click.option(
    "--accuracy-on",
    default="host",
    show_default=True,
    help="Where accuracy is measured: host (this machine) or device.",
)
@click.option("--no-bench", is_flag=True, help="Make the artifacts without measuring.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of every random choice.")
@click.option("--resume/--fresh", default=True, show_default=True, help="Reuse finished stages, or start over.")
@click.option("--dynamic-batch", is_flag=True, hidden=True)
@model_options
def prune_export_command(model: str, **options: Any) -> None:
    """Prune MODEL for a target, export ONNX, measure, and report."""
    from mm_edge.report import print_report

    report = _run(model, options)
    print_report(report, Console())
    _print_end(report, _out(model, options))


def _out(model: str, options: dict[str, Any]) -> Path:
    out: Path | None = options["out"]
    return out if out is not None else Path(f"mm-edge-{Path(model.removeprefix('timm:')).stem}")


def _print_end(report: Report, folder: Path) -> None:
    if report.chosen is not None:
        row = next(c for c in report.candidates if c.id == report.chosen.id)
        if row.artifact is not None:
            click.echo(f"chosen model: {folder / row.artifact}")
        for path in sorted((folder / "bundle").glob("[!.]*")):
            click.echo(f"for the device: {path}")
    click.echo(f"full report:  {folder / 'report.md'}")


def _refuse_pending(options: dict[str, Any]) -> None:
    """Refuse the options of the contract whose work has not landed, by name."""
    if options["dynamic_batch"]:
        raise UsageError("--dynamic-batch is not available yet; leave it out")


def _request(setting: Setting, options: dict[str, Any]) -> Request:
    from mm_edge.api import make_request
    from mm_edge.graph.sizes import parse_input_sizes
    from mm_edge.records import Constraints

    _refuse_pending(options)
    chosen = {name: options[name] for name in ("recover", "select", "epochs") if options[name] is not None}
    return make_request(
        setting,
        signals=_names(options["signals"]),
        strategies=_names(options["strategies"]),
        ranges=options["ranges"],
        kinds=_names(options["kinds"]),
        macs=() if options["macs"] is None else _floats(options["macs"], "--macs", "0.5,0.25"),
        allocate_by=options["allocate_by"],
        input_sizes=None if options["input_sizes"] is None else parse_input_sizes(options["input_sizes"]),
        keep=options["keep"],
        precisions=_names(options["precision"]),
        prune_norms=options["prune_norms"],
        ort=options["ort"],
        bake_preprocess=options["bake_preprocess"],
        constraints=Constraints(options["max_drop"], options["latency"], options["speedup"], options["size"]),
        accuracy_on=options["accuracy_on"],
        seed=options["seed"],
        **chosen,
    )


def _run(model: str, options: dict[str, Any]) -> Report:
    from mm_edge.api import Setting, run_job
    from mm_edge.progress import Stages

    split = _floats(options["split"], "--split", "0.5,0.25,0.25")
    if len(split) != 3:
        raise UsageError(
            f"--split '{options['split']}' has {len(split)} parts; write CAL,VAL,TEST such as 0.5,0.25,0.25"
        )
    setting = Setting(
        out=_out(model, options),
        target=options["target"],
        data=options["data"],
        split=(split[0], split[1], split[2]),
        host=options["host"],
        bench=not options["no_bench"],
        resume=options["resume"],
    )
    request = _request(setting, options)
    return run_job(lambda: _load(model, options), setting, request, Stages(Console(stderr=True)))


@main.command("demo")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=Path("mm-edge-demo"), show_default=True
)
@click.pass_context
def demo(ctx: click.Context, out: Path) -> None:
    """Run the whole job on the small trained network and the images shipped with the package."""
    from mm_edge.demo import IMAGES, MODEL

    click.echo(
        f"demo: a small network trained on Fashion-MNIST, {IMAGES.name} for data, this machine as target", err=True
    )
    job = {"model": str(MODEL), "data": str(IMAGES), "out": out, "target": "host", "recover": "closed-form"}
    ctx.invoke(prune_export_command, **job)


@main.command("inspect")
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
@model_options
def inspect(model: str, as_json: bool, **options: Any) -> None:
    """Show layers, roles, ranges and coupled groups, and what is pinned and why."""
    from mm_edge.plan.inspection import describe_model

    with Console(stderr=True).status("exporting"):
        document = describe_model(_load(model, options), tuple(options["keep"]))
    if as_json:
        click.echo(json.dumps(document, indent=2))
    else:
        _print_inspection(document)


def _print_inspection(document: dict[str, Any]) -> None:
    console = Console()
    layers = Table(
        "layer", "role", "shape", "MACs", "sparsity range", title=f"{len(document['layers'])} prunable layers"
    )
    for row in document["layers"]:
        bounds = f"{row['lo']:.0%} - {row['hi']:.0%}"
        layers.add_row(row["fqn"], row["role"], "x".join(map(str, row["shape"])), f"{row['macs']:,}", bounds)
    console.print(layers)
    groups = Table(
        "group", "width", "tensors", title=f"{len(document['groups'])} coupled groups that can lose channels"
    )
    for row in document["groups"]:
        groups.add_row(row["id"], str(row["size"]), f"{len(row['tensors'])}: {', '.join(row['tensors'][:3])}")
    console.print(groups)
    pinned = Table("group", "width", "why it keeps its width", title=f"{len(document['pinned'])} pinned")
    for row in document["pinned"]:
        pinned.add_row(row["id"], str(row["size"]), row["reason"])
    console.print(pinned)


@main.command("evaluate")
@click.argument("model", metavar="MODEL.onnx", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--data", required=True, metavar="PATH", help="Folder or tar of class folders.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
@input_options
def evaluate(model: Path, data: str, as_json: bool, **options: Any) -> None:
    """Measure the top-1 accuracy of an ONNX model on every image of a data set."""
    from mm_edge.load.data import open_data
    from mm_edge.quality.evaluation import compare_logits, run_onnx

    if model.suffix != ".onnx":
        raise UsageError(f"'{model}' is not an .onnx; evaluate takes what prune-export or another exporter wrote")
    loaded = _load(str(model), options)
    splits = open_data(data, loaded.input, loaded.info.num_classes, (0.0, 0.0, 1.0))
    with Console(stderr=True).status("evaluating"):
        logits = run_onnx(model, splits.test.batches(32), 2)
    result = compare_logits(logits, splits.test.labels, None)
    for warning in (*loaded.warnings, *splits.warnings):
        click.echo(f"warning: {warning}", err=True)
    if result.accuracy_top1 is None:
        raise UsageError(f"'{data}' has no images to evaluate on")
    if as_json:
        click.echo(json.dumps({"model": str(model), "accuracy_top1": result.accuracy_top1, "images": result.count}))
    else:
        click.echo(f"top-1 accuracy {result.accuracy_top1:.2%} on {result.count} images")


@main.command("report")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--open", "open_page", is_flag=True, help="Open the page in a browser.")
def report(folder: Path, open_page: bool) -> None:
    """Print the report of a run directory."""
    from mm_edge.report import print_report, read_report

    if open_page:
        raise UsageError("--open is not available yet; the report is in report.md beside report.json")
    print_report(read_report(folder), Console())


def _add_bench_commands() -> None:
    from mm_edge.cli.bench import bench
    from mm_edge.cli.targets import targets

    main.add_command(bench)
    main.add_command(targets)


_add_bench_commands()

"""The options of a run. Each is declared here once, as a field of `Request`.

The command line's options and --help, the keywords and the docstring of `mm_edge.prune_export`, and the checks are
made from these fields. This module imports nothing heavy, so that a wrong option is refused at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_edge.errors import UsageError
from mm_edge.formats.precisions import PRECISIONS
from mm_edge.formats.registry import FORMATS
from mm_edge.load.presets import COLOURS, LAYOUTS, PRESETS, RESIZES
from mm_edge.plan.kinds import KINDS
from mm_edge.plan.signals import SIGNALS, need_gradient
from mm_edge.plan.strategies import STRATEGIES
from mm_edge.records import Constraints
from mm_edge.recover.closed_form.selections import SELECTIONS
from mm_edge.run.options import (
    Choice,
    Flag,
    Flags,
    Folder,
    InputShapes,
    Name,
    Names,
    Number,
    Numbers,
    Patterns,
    Ratio,
    Shape,
    Sides,
    Text,
    Whole,
    option,
    read_options,
    type_name,
)
from mm_edge.run.recoveries import RECOVERIES

MODEL, DATA, PRUNING, RECOVERY, BUDGETS, MEASURING, FILES = SECTIONS = (
    "Model",
    "Data",
    "What to prune",
    "Recovery",
    "Budgets and choice",
    "Measuring",
    "Files and runs",
)

# "auto", "none" or the sides asked for; None where the option was not given.
InputSizes = str | tuple[int, ...] | None

RANGES: dict[str, Choice] = {
    "rules": Choice("by the role of the layer"),
    "observed": Choice("from the scores"),
}
EFFORTS: dict[str, Choice] = {
    "quick": Choice("leaves out the closed form's second, slower step"),
    "normal": Choice("takes it for the front and the budgets: seconds to minutes for each candidate"),
}
ALLOCATIONS: dict[str, Choice] = {
    "macs": Choice("multiply-adds"),
    "latency": Choice("a table measured per group on the device"),
}
ACCURACY_ON: dict[str, Choice] = {
    "host": Choice("this machine"),
    "device": Choice("the target"),
}


def _list_targets() -> list[str]:
    from mm_edge.bench.target import list_targets

    return list_targets()


# --- checks of one value --------------------------------------------------------------------------------------------


def _check_fractions(values: tuple[float, ...], spelling: str) -> None:
    for value in values:
        if not 0 < value < 1:
            raise UsageError(f"{spelling} {value:g} is not a fraction of the dense MACs; give values between 0 and 1")


def _check_points(value: float, spelling: str) -> None:
    if not math.isfinite(value):
        raise UsageError(f"{spelling} {value:g} is not a number of points; write for example {spelling} 1")


def _check_scale(value: float, spelling: str) -> None:
    if not 0 < value < math.inf:
        raise UsageError(f"{spelling} {value:g} leaves nothing of a pixel; give a number above 0 such as 1/255")


def _check_limit(value: float, spelling: str) -> None:
    if not 0 < value < math.inf:
        raise UsageError(f"{spelling} {value:g} can never be met or missed; give a number above 0")


def _check_epochs(value: int, spelling: str) -> None:
    if value < 1:
        raise UsageError(f"{spelling} {value} trains nothing; give at least 1")


# --- the options ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelOptions:
    """How to read a model: what prune-export, inspect and evaluate share; None where an option was not given."""

    arch: str | None = option(
        None,
        Text("a name of timm or FILE.py:CALLABLE"),
        help="Architecture of a bare state_dict; or FILE.py:CALLABLE.",
        section=MODEL,
        metavar="TIMM_NAME",
        shown="what the file says",
    )
    input_size: tuple[int, int, int] | None = option(
        None,
        Shape(),
        help="Input shape, where the file does not say.",
        section=MODEL,
        metavar="C,H,W",
        shown="what the file says",
    )
    inputs: tuple[tuple[str, tuple[int, ...]], ...] = option(
        (),
        InputShapes(),
        help="Shape of an input of an .onnx, batch included; sizes it leaves open stay open. Repeatable.",
        python_help="Shapes by the names of the module's arguments, which example_input is checked against.",
        section=MODEL,
        metavar="NAME=SHAPE",
        spelled="--input",
        shown="what the file says",
    )
    mean: tuple[float, ...] | None = option(
        None,
        Numbers("0.485,0.456,0.406"),
        help="Mean of the normalisation.",
        section=MODEL,
        metavar="R,G,B",
        shown="what the file says, else ImageNet's",
    )
    std: tuple[float, ...] | None = option(
        None,
        Numbers("0.229,0.224,0.225"),
        help="Standard deviation of the normalisation.",
        section=MODEL,
        metavar="R,G,B",
        shown="what the file says, else ImageNet's",
    )
    preprocess: str | None = option(
        None,
        Name(PRESETS),
        help="How photos become inputs, by the network's family; the options beside override parts of it.",
        section=MODEL,
        metavar="NAME",
        shown="what the file says, else as classifiers have it",
    )
    scale: float | None = option(
        None,
        Ratio(),
        help="What pixels in 0..255 are multiplied by before mean and std.",
        section=MODEL,
        metavar="X",
        shown="what the file says, else 1/255",
        check=_check_scale,
    )
    colours: str | None = option(
        None,
        Name(COLOURS),
        help="Order of the channels:",
        section=MODEL,
        metavar="NAME",
        shown="what the file says, else RGB",
    )
    resize: str | None = option(
        None,
        Name(RESIZES),
        help="How a photo gets the input's size:",
        section=MODEL,
        metavar="NAME",
        shown="what the file says, else crop",
    )
    layout: str | None = option(
        None,
        Name(LAYOUTS),
        help="Order of the axes of an .onnx file's input:",
        section=MODEL,
        metavar="NAME",
        shown="by the size of the axes",
    )
    trust_pickle: bool = option(False, Flag(), help="Load a pickled module: this runs the code in it.", section=MODEL)
    keep: tuple[str, ...] = option(
        (),
        Patterns(),
        help="Never prune parameters this names; repeatable.",
        section=PRUNING,
        metavar="PATTERN",
    )
    judge: tuple[str, ...] = option(
        (),
        Patterns("names of the network's values"),
        help="Compare this value of the network with the dense one's; repeatable.",
        section=RECOVERY,
        metavar="NAME",
        shown="outputs, and what they are decoded from; see 'mm-edge inspect'",
    )


@dataclass(frozen=True)
class Request(ModelOptions):
    """The options of a run: one field for each option of `mm-edge prune-export`."""

    target: str = option(
        "host",
        Text("the name or file of a device profile", names=_list_targets),
        help="Device profile; see 'mm-edge targets list'.",
        section=MEASURING,
        metavar="NAME",
    )
    data: str | None = option(
        None,
        Text("a path or the name of a data set", is_path=True),
        help="Folder or tar of photos or class folders, .npz of inputs, FILE.py:CALLABLE, or a data set of timm's.",
        section=DATA,
        metavar="PATH",
    )
    labels: str | None = option(
        None,
        Text("a path", is_path=True),
        help="Labels of the photos: boxes in a COCO .json, or a folder of PNG masks.",
        section=DATA,
        metavar="PATH",
        shown="the class folders",
    )
    metric: str | None = option(
        None,
        Text("FILE.py:CALLABLE"),
        help="Your own figure of merit, called with each artifact; this runs the code in it.",
        section=DATA,
        metavar="FILE.py:CALLABLE",
    )
    loss: str | None = option(
        None,
        Text("FILE.py:CALLABLE"),
        help="Your own training loss, whose gradient signals score by; this runs the code in it.",
        section=PRUNING,
        metavar="FILE.py:CALLABLE",
        shown="cross-entropy with labels, else random projections of the outputs",
    )
    out: Path = option(  # noqa: RUF009
        Path("mm-edge-run"), Folder(), help="Run directory.", section=FILES, metavar="DIR", shown="mm-edge-MODEL"
    )
    split: tuple[float, float, float] = option(
        (0.5, 0.25, 0.25),
        Numbers("0.5,0.25,0.25", parts="CAL,VAL,TEST"),
        help="Fractions for calibration, validation and test, where the images are one pool.",
        section=DATA,
        metavar="CAL,VAL,TEST",
    )
    signals: tuple[str, ...] = option(
        ("magnitude", "gradient", "product"),
        Names(SIGNALS, noun="signal"),
        help="How weights are scored.",
        section=PRUNING,
        metavar="NAME,...",
    )
    strategies: tuple[str, ...] = option(
        lambda: tuple(STRATEGIES),
        Names(STRATEGIES, noun="strategy", all=True),
        help="How a sparsity is set for each layer inside its range.",
        section=PRUNING,
        metavar="NAME,...",
    )
    ranges: str = option("rules", Name(RANGES), help="Source of the sparsity ranges:", section=PRUNING, metavar="NAME")
    kinds: tuple[str, ...] = option(
        ("structured",), Names(KINDS), help="What is removed.", section=PRUNING, metavar="NAME,..."
    )
    input_sizes: InputSizes = option(  # noqa: RUF009
        None,
        Sides(),
        help="Also prune at these sides of the input; auto: down to 0.7 of it.",
        section=PRUNING,
        metavar="auto|none|PX,...",
        shown="only dense controls, with data",
    )
    prune_norms: bool = option(
        False, Flag(), help="Let LayerNorm lose channels: exact, but it runs slower than fused.", section=PRUNING
    )
    recover: str = option(
        "none",
        Name(RECOVERIES),
        help="How accuracy is regained:",
        section=RECOVERY,
        metavar="NAME",
        shown="closed-form with data, else none",
        default_by=lambda values: "none" if values["data"] is None else "closed-form",
    )
    epochs: int = option(
        10,
        Whole(),
        help="Longest fine-tuning, in passes over the calibration images.",
        section=RECOVERY,
        metavar="N",
        check=_check_epochs,
    )
    select: str = option(
        "signal",
        Name(SELECTIONS),
        help="Which channels stay:",
        section=RECOVERY,
        metavar="NAME",
        shown="auto with closed-form, tune and finetune, else signal",
        default_by=lambda values: "auto" if RECOVERIES[values["recover"]].from_moments else "signal",
    )
    effort: str = option(
        "normal",
        Name(EFFORTS),
        help="How much is spent on recovery:",
        section=RECOVERY,
        metavar="NAME",
    )
    macs: tuple[float, ...] = option(
        (),
        Numbers("0.5,0.25"),
        help="Add candidates at these fractions of the dense MACs.",
        section=BUDGETS,
        metavar="FRACTION,...",
        check=_check_fractions,
    )
    allocate_by: str = option(
        "macs", Name(ALLOCATIONS), help="What budgets of time take widths by:", section=BUDGETS, metavar="NAME"
    )
    max_drop: float | None = option(
        None,
        Number(),
        help="Largest loss of top-1 accuracy, in points.",
        section=BUDGETS,
        metavar="POINTS",
        check=_check_points,
    )
    latency: float | None = option(
        None, Number("5"), help="Largest median latency.", section=BUDGETS, metavar="MS", check=_check_limit
    )
    speedup: float | None = option(
        None, Number("1.5"), help="Smallest measured speed-up.", section=BUDGETS, metavar="X", check=_check_limit
    )
    size: int | None = option(
        None, Whole(example="1000000"), help="Largest file.", section=BUDGETS, metavar="BYTES", check=_check_limit
    )
    host: str | None = option(
        None,
        Text("USER@HOST"),
        help="Measure on this device, through ssh.",
        section=MEASURING,
        metavar="USER@HOST[:PORT]",
        shown="this machine",
    )
    bench: bool = option(
        True,
        Flag(),
        help="Make the artifacts without measuring.",
        python_help="Whether to measure.",
        section=MEASURING,
        spelled="--no-bench",
        shown="off",
    )
    sustained: float | None = option(
        None,
        Number("10"),
        help="Also run the chosen model and dense in turn without pause, and show how times change with heat.",
        section=MEASURING,
        metavar="MINUTES",
        check=_check_limit,
    )
    accuracy_on: str = option(
        "host", Name(ACCURACY_ON), help="Where accuracy is measured:", section=MEASURING, metavar="NAME"
    )
    precision: tuple[str, ...] = option(
        ("fp32",),
        Names(PRECISIONS),
        help="Number formats; int8 and fp16 are made of the dense model and of the front.",
        section=FILES,
        metavar="NAME,...",
    )
    formats: tuple[str, ...] = option(
        (), Flags(FORMATS, noun="format"), help="Files written beside the chosen model:", section=FILES
    )
    archive: bool = option(False, Flag(), help="Also write the bundle as bundle.tar.gz.", section=FILES)
    seed: int = option(0, Whole(0, 2**63 - 1), help="Seed of every random choice.", section=FILES, metavar="N")
    resume: bool = option(
        True,
        Flag(),
        help="Reuse finished stages, or start over.",
        python_help="Reuse finished stages; False starts over.",
        section=FILES,
        spelled="--resume/--fresh",
        shown="resume",
    )

    @property
    def constraints(self) -> Constraints:
        """What the chosen candidate has to meet."""
        return Constraints(self.max_drop, self.latency, self.speedup, self.size)


# --- rules across options -------------------------------------------------------------------------------------------

# A rule takes the request and the names of the options given, and returns why it is refused, or None.
Rule = Callable[[Request, Collection[str]], str | None]


def recovery_needs_images(request: Request, given: Collection[str]) -> str | None:
    """Refuse a recovery without data, because it needs calibration images."""
    if RECOVERIES[request.recover].needs_images and request.data is None:
        return f"--recover {request.recover} needs calibration images; give --data PATH"
    return None


def labels_need_photos(request: Request, given: Collection[str]) -> str | None:
    """Refuse labels without the photos they belong to, and beside a metric, because one figure decides."""
    if request.labels is not None and request.data is None:
        return f"--labels {request.labels} labels photos; give --data PATH with it"
    if request.labels is not None and request.metric is not None:
        return "--labels and --metric are two figures of merit; leave one out, or read the labels in the metric"
    return None


def loss_needs_gradients(request: Request, given: Collection[str]) -> str | None:
    """Refuse a loss without images, or where nothing is scored by gradients."""
    if request.loss is None:
        return None
    if request.data is None:
        return f"--loss {request.loss} is taken on calibration images; give --data PATH with it"
    if not need_gradient(request.signals) and request.ranges != "observed":
        return f"--loss {request.loss} is for signals that need gradients; give --signals gradient,product with it"
    return None


def epochs_need_finetuning(request: Request, given: Collection[str]) -> str | None:
    """Refuse epochs without fine-tuning, which alone has them."""
    if "epochs" in given and not RECOVERIES[request.recover].has_epochs:
        return f"--epochs {request.epochs} is for fine-tuning; give --recover finetune with it"
    return None


def selection_needs_moments(request: Request, given: Collection[str]) -> str | None:
    """Refuse brain surgeon without the closed form, whose moments it needs."""
    if request.select != "signal" and not RECOVERIES[request.recover].from_moments:
        return f"--select {request.select} goes by the closed form's moments; give --recover closed-form with it"
    return None


def latency_table_needs_a_budget_of_time(request: Request, given: Collection[str]) -> str | None:
    """Refuse the latency table without a budget of time, which alone uses it."""
    if request.allocate_by == "latency" and request.latency is None and request.speedup is None:
        return "--allocate-by latency is for budgets of time; give --speedup X or --latency MS with it"
    return None


def host_is_for_measuring(request: Request, given: Collection[str]) -> str | None:
    """Refuse a device where nothing is measured."""
    if request.host is not None and not request.bench:
        return "--host names a device to measure on and --no-bench measures nothing; leave one out"
    return None


def sustained_is_for_measuring(request: Request, given: Collection[str]) -> str | None:
    """Refuse a sustained run where nothing is measured."""
    if request.sustained is not None and not request.bench:
        return "--sustained measures for minutes and --no-bench measures nothing; leave one out"
    return None


RULES: tuple[Rule, ...] = (
    recovery_needs_images,
    labels_need_photos,
    loss_needs_gradients,
    epochs_need_finetuning,
    selection_needs_moments,
    latency_table_needs_a_budget_of_time,
    host_is_for_measuring,
    sustained_is_for_measuring,
)


# --- making a request -----------------------------------------------------------------------------------------------


def make_request(**given: Any) -> Request:
    """Return the checked request; None stands for an option that is not given.

    Values are what the fields of `Request` hold, or the text one writes on the command line. Two older spellings are
    taken too: `precisions`, and `constraints` with a records.Constraints.

    Raises:
        UsageError: an option or a name is unknown, a value cannot be read or is out of its bounds, or two options do
            not go together.
    """
    given = _translate(given)
    request = Request(**read_options(Request, given))
    named = {name for name, value in given.items() if value is not None}
    for rule in RULES:
        reason = rule(request, named)
        if reason is not None:
            raise UsageError(reason)
    return request


def make_model_options(**given: Any) -> ModelOptions:
    """Return the checked options on how to read a model; None stands for an option that is not given.

    Raises:
        UsageError: an option is unknown, or a value cannot be read.
    """
    return ModelOptions(**read_options(ModelOptions, given))


def _translate(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return `given` with older spellings replaced by the current ones."""
    rest = dict(given)
    precisions, limits = rest.pop("precisions", None), rest.pop("constraints", None)
    if precisions is not None:
        _put(rest, "precision", precisions, "precisions")
    if limits is not None:
        if not isinstance(limits, Constraints):
            raise UsageError(
                f"constraints takes a records.Constraints, not {type_name(limits)}; give max_drop, latency, speedup "
                "or size"
            )
        for name, value in zip(("max_drop", "latency", "speedup", "size"), _values(limits), strict=True):
            if value is not None:
                _put(rest, name, value, "constraints")
    return rest


def _values(limits: Constraints) -> tuple[float | None, ...]:
    return limits.max_drop, limits.latency_ms, limits.speedup, limits.size_bytes


def _put(rest: dict[str, Any], name: str, value: Any, older: str) -> None:
    if rest.get(name) is not None:
        raise UsageError(f"{name} is given twice: by {older} too; leave {older} out")
    rest[name] = value

"""The records that pass between stages: frozen dataclasses that round-trip through JSON.

Units and conventions: sparsity and accuracy are fractions in [0, 1], drops are in points of 100,
times are milliseconds in reports and nanoseconds in raw samples, sizes are bytes, shapes are
tuples of int. A value that was not measured is None. Layers and tensors are keyed by their fully
qualified PyTorch name (`fqn`), never by position.

SCHEMA_VERSION history (fields are added under a raised version, never renamed):
    1  first version.
    2  Candidate: epochs, stopped.
    3  Candidate: removed_blocks. An id may end in @SIDE, an input size other than the dense model's; candidates of kind
       "dense" at another input size are controls (dense@SIDE).
    4  Candidate: planned_by. Report: budgets.
    5  Candidate and dense: fidelity, metric, accuracy_ci; Candidate: drop_ci, dense_latency_ms. dense: accuracy_images.
       Latencies: verdict. chosen: dense_accuracy_top1_test, fidelity_test; null where nothing was compared. Report:
       sustained, layers, command. data: labelled, kind, preprocessing.
    6  layers: time_before, time_after. model: licence.
    7  fidelity: boxes.
"""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

SCHEMA_VERSION = 7
# With fewer boxes than these mean average precision says nothing: candidates are compared by their outputs.
FEWEST_BOXES = 30
# The longest JSON text that is read, in characters. Reports of some hundred rows take less than a million.
LONGEST_JSON = 1 << 28
# The longest whole number that is read: any of 64 bits with its sign. Longer ones are looked for first, because
# reading every number by a function of ours would take three times as long.
MOST_DIGITS = 20
_LONG_DIGITS = re.compile(r"\d{20}")
_LONG_DIGIT_BYTES = re.compile(rb"\d{20}")

T = TypeVar("T")


@dataclass(frozen=True)
class InputSpec:
    """What the network expects of a picture: its shape and the preprocessing that produces it.

    Attributes:
        shape: channels, height and width, in this order whatever the layout.
        mean: subtracted from the scaled pixels, one value per channel in the order of `colours`.
        std: what they are divided by afterwards.
        interpolation: how pixels are resized: bilinear, bicubic, nearest or lanczos.
        crop_pct: with the resizing "crop", the share of the short side that is kept.
        layout: "NCHW" or "NHWC", the order of the axes of the network's input.
        colours: "RGB" or "BGR", the order of the channels.
        scale: what pixels in 0..255 are multiplied by before mean and std.
        resize: how a picture gets the height and width, a name of load.presets.RESIZES.
        pad: pixel value in 0..255 where the resizing leaves a border.
        assumed: the names of those fields that nobody stated.
    """

    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    layout: str = "NCHW"
    colours: str = "RGB"
    scale: float = 1 / 255
    resize: str = "crop"
    pad: int = 0
    assumed: tuple[str, ...] = ()

    @property
    def array_shape(self) -> tuple[int, int, int]:
        """The shape of one input as the network takes it, without the batch."""
        channels, height, width = self.shape
        return (height, width, channels) if self.layout == "NHWC" else self.shape


@dataclass(frozen=True)
class ModelInfo:
    """The `model` section of report.json. `source` says where the weights came from.

    `licence` is the weights' licence as their file or timm names it, None where neither does.
    """

    name: str
    source: str
    sha256: str | None
    params: int | None
    macs: int | None
    input_shape: tuple[int, ...]
    num_classes: int | None
    licence: str | None = None


@dataclass(frozen=True)
class Layer:
    """One prunable weight.

    Attributes:
        fqn: name of the weight tensor, e.g. "layer1.0.conv1.weight".
        kind: "conv", "depthwise" or "linear".
        role: function in the network, a key of the rule table in ranges.py.
        shape: as PyTorch stores it (out, in, *kernel).
        index: position in graph order, from 0.
        stage: resolution stage of the network, from 0 (down-sampling starts a new one).
        macs: multiply-adds of the dense layer at batch 1.
    """

    fqn: str
    kind: str
    role: str
    shape: tuple[int, ...]
    index: int
    stage: int
    macs: int

    @property
    def numel(self) -> int:
        """Number of weights."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class SparsityRange:
    """Allowed sparsity [lo, hi] of one layer, and the rule or constraint that set it."""

    lo: float
    hi: float
    reason: str


@dataclass(frozen=True)
class Assignment:
    """One strategy applied to one signal: a sparsity per layer.

    `names` lists every strategy that comes to the same network, the first names the candidate.
    """

    signal: str
    names: tuple[str, ...]
    sparsity: dict[str, float]

    @property
    def strategy(self) -> str:
        """The name the candidate carries."""
        return self.names[0]


@dataclass(frozen=True)
class Latency:
    """Latency percentiles of one model. `source` is "device", "host" or None (not measured).

    `verdict` says how far the times can be trusted: "stable", "noisy" or "unusable"; None where nothing was measured.
    """

    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    samples: int = 0
    threads: int | None = None
    source: str | None = None
    verdict: str | None = None


@dataclass(frozen=True)
class ParityInputs:
    """What a parity check was run on: how many inputs, and "images" or "noise"."""

    count: int
    kind: str


@dataclass(frozen=True)
class Parity:
    """Agreement of a compact model with its masked model.

    `max_rel_err` is relative to the reference output's largest magnitude.
    """

    max_abs_err: float
    max_rel_err: float
    top1_agreement: float
    inputs: ParityInputs


@dataclass(frozen=True)
class OutputFidelity:
    """How like the dense network's one output is, on held-back inputs; None where it has no finite value.

    `nmse` is the squared error over the variance, `cosine` that of the angle between the two outputs.
    """

    nmse: float | None
    cosine: float | None


@dataclass(frozen=True)
class Fidelity:
    """How like the dense network's the outputs are, on held-back inputs; None where a figure does not apply.

    `map50_to_dense` and `map_to_dense` are the mean average precision of the detected boxes against those that the
    dense network detects, at an overlap of 0.5 and over the overlaps from 0.5 to 0.95. `miou_to_dense` is the mean
    intersection over union of the segmented classes against the dense network's. `boxes` is how many boxes the dense
    network detects on these inputs.
    """

    outputs: dict[str, OutputFidelity] = field(default_factory=dict)
    map50_to_dense: float | None = None
    map_to_dense: float | None = None
    miou_to_dense: float | None = None
    boxes: int | None = None

    @property
    def has_enough_boxes(self) -> bool:
        """Whether mean average precision may rank candidates."""
        return self.map50_to_dense is not None and (self.boxes is None or self.boxes >= FEWEST_BOXES)

    @property
    def likeness(self) -> float | None:
        """1 less the mean error of the outputs over their variance; None where an output has no error."""
        errors = [item.nmse for item in self.outputs.values()]
        known = [error for error in errors if error is not None]
        return None if not known or len(known) < len(errors) else 1 - sum(known) / len(known)

    @property
    def invisible_loss(self) -> float | None:
        """The loss, in points, that so few boxes can hide; None where it is below one point.

        By the rule of three: where none of n boxes is lost, up to 3 / n of all may be lost (95 % bound). A loss that is
        seen is no more certain than that.
        """
        if not self.boxes or not self.has_enough_boxes:
            return None
        points = min(100.0, 300 / self.boxes)
        return points if points > 1 else None


@dataclass(frozen=True)
class MetricValue:
    """A figure of merit: that of the user, or the one that the user's labels make possible.

    `others` holds further figures by name; only `value` decides. A value that `is_fraction` lies in [0, 1], and a drop
    of it is counted in points of 100; a drop of another is counted in its own unit.
    """

    name: str
    value: float
    higher_is_better: bool = True
    is_fraction: bool = False
    others: dict[str, float] = field(default_factory=dict)

    def drop(self, found: MetricValue) -> float:
        """Return by how much `found` is worse than this; below 0 where it is better."""
        worse = self.value - found.value if self.higher_is_better else found.value - self.value
        return 100 * worse if self.is_fraction else worse


@dataclass(frozen=True)
class DenseFigures:
    """The measurements of the dense network.

    `accuracy_ci` is the exact 95 % interval of `accuracy_top1`, `accuracy_images` the number of validation images.
    """

    accuracy_top1: float | None
    latency_ms: Latency
    peak_memory_bytes: int | None
    file_bytes: int | None
    params: int
    macs: int
    fidelity: Fidelity | None = None
    metric: MetricValue | None = None
    accuracy_ci: tuple[float, float] | None = None
    accuracy_images: int | None = None

    @property
    def merit(self) -> float:
        """What candidates are compared with: accuracy, else the metric, else 1: it is like itself."""
        if self.accuracy_top1 is not None:
            return self.accuracy_top1
        if self.metric is not None:
            return self.metric.value if self.metric.higher_is_better else -self.metric.value
        return 1.0

    def loss_of(self, candidate: Candidate) -> float | None:
        """Return by how much a candidate is worse: in points of 100, or in the metric's unit; None if not compared."""
        if self.accuracy_top1 is not None:
            return candidate.accuracy_drop
        if self.metric is not None:
            return None if candidate.metric is None else self.metric.drop(candidate.metric)
        return None if candidate.likeness is None else 100 * (1 - candidate.likeness[0])


@dataclass(frozen=True)
class Candidate:
    """One candidate: what was made, its cost and its accuracy.

    `file_bytes` is the size of the `artifact`, or of the `stored_file`, which holds no zeros. `accuracy_top1` is on
    validation images; `accuracy_drop` is dense minus this, in points. `epochs` is the number of epochs of fine-tuning,
    `stopped` why it ended, or the outcome of block-wise tuning. `planned_by` says how the cost of a candidate was
    planned for its budget, and whether it was counted or measured. `accuracy_ci` is the exact 95 % interval of
    `accuracy_top1`; `drop_ci` that of `accuracy_drop`, in points, from images that only one of the two networks reads
    right. `dense_latency_ms` is the dense network's, timed in turn with this candidate, at the same moments.
    `fidelity` and `metric` are on validation images. `also_named` are the other strategies that this network is the
    candidate of, `also_ids` all its other ids: those strategies, and the signals that change nothing.
    """

    id: str
    signal: str
    strategy: str
    kind: str
    precision: str
    sparsity: float
    params: int
    macs: int
    input_shape: tuple[int, ...]
    accuracy_top1: float | None = None
    accuracy_drop: float | None = None
    agreement_top1: float | None = None
    kl_to_dense: float | None = None
    latency_ms: Latency = field(default_factory=Latency)
    speedup: float | None = None
    speedup_ci: tuple[float, float] | None = None
    peak_memory_bytes: int | None = None
    file_bytes: int | None = None
    parity: Parity | None = None
    recovered_by: str | None = None
    epochs: int | None = None
    stopped: str | None = None
    pareto: bool = False
    artifact: str | None = None
    stored_file: str | None = None
    masked_state_dict: str | None = None
    also_named: tuple[str, ...] = ()
    also_ids: tuple[str, ...] = ()
    removed_blocks: tuple[str, ...] = ()
    planned_by: str | None = None
    fidelity: Fidelity | None = None
    metric: MetricValue | None = None
    accuracy_ci: tuple[float, float] | None = None
    drop_ci: tuple[float, float] | None = None
    dense_latency_ms: Latency = field(default_factory=Latency)

    @property
    def is_pruned(self) -> bool:
        """Whether anything was removed; a budget may also ask for the unpruned network at a smaller input size."""
        return self.kind != "dense" and (self.sparsity > 0 or bool(self.removed_blocks))

    @property
    def was_compared(self) -> bool:
        """Whether its answers to anything but the parity check's inputs were compared with labels or with dense's."""
        return self.merit is not None

    @property
    def likeness(self) -> tuple[float, str] | None:
        """How like the dense network it answers, 1 for the same, and by what it was compared; None if it was not."""
        found = self.fidelity
        if found is not None and found.map50_to_dense is not None and found.has_enough_boxes:
            return found.map50_to_dense, "mAP50 on the dense network's boxes"
        if found is not None and found.miou_to_dense is not None:
            return found.miou_to_dense, "mIoU with the dense network's masks"
        if self.agreement_top1 is not None:
            return self.agreement_top1, "agreement with dense"
        if found is None or found.likeness is None:
            return None
        return found.likeness, "likeness of the outputs"

    @property
    def merit(self) -> float | None:
        """What candidates are ranked by, more is better: accuracy, else the metric, else likeness; None of none."""
        if self.accuracy_top1 is not None:
            return self.accuracy_top1
        if self.metric is not None:
            return self.metric.value if self.metric.higher_is_better else -self.metric.value
        return None if self.likeness is None else self.likeness[0]

    @property
    def is_unusable(self) -> bool:
        """Whether it was timed and the times cannot be used."""
        return self.latency_ms.verdict == "unusable"

    @property
    def is_budget(self) -> bool:
        """Whether it was planned for a budget, and not by a strategy."""
        return self.planned_by is not None


def candidate_id(signal: str, strategy: str, kind: str, precision: str, side: int | None) -> str:
    """Return a candidate's id in the report; `side` is that of its input, None for the dense network's own size."""
    name = _id_without_size(signal, strategy, kind, precision, side)
    return name if side is None else f"{name}@{side}"


def file_name(signal: str, strategy: str, kind: str, precision: str, side: int | None) -> str:
    """Return the name that the files of the candidate with these fields carry, without suffix."""
    name = _id_without_size(signal, strategy, kind, precision, side).replace("/", "-").replace(":", "_")
    return name if side is None else f"{name}-{side}px"


def _id_without_size(signal: str, strategy: str, kind: str, precision: str, side: int | None) -> str:
    if kind != "dense":
        return f"{signal}/{strategy}/{kind}/{precision}"
    # The dense network has one fp32 version at every other size, which is named by the size alone.
    return "dense" if precision == "fp32" and side is not None else f"dense/{precision}"


@dataclass(frozen=True)
class Chosen:
    """The chosen candidate, the reason, and how it does on test images (read once, last).

    That is its accuracy and the dense network's, or how like the dense network's the outputs of no classifier are.
    """

    id: str
    reason: str
    accuracy_top1_test: float | None = None
    dense_accuracy_top1_test: float | None = None
    fidelity_test: Fidelity | None = None


@dataclass(frozen=True)
class SustainedPoint:
    """One point of a sustained run: seconds since its start, median times since the point before, clock and heat."""

    seconds: float
    dense_ms: float
    candidate_ms: float
    clock_mhz: float | None = None
    temperature_c: float | None = None


@dataclass(frozen=True)
class Sustained:
    """The dense network and the candidate `id` in turn without pause for `minutes`."""

    id: str
    minutes: float
    points: tuple[SustainedPoint, ...]


@dataclass(frozen=True)
class Constraints:
    """What the user asked for; None where nothing was asked."""

    max_drop: float | None = None
    latency_ms: float | None = None
    speedup: float | None = None
    size_bytes: int | None = None


@dataclass(frozen=True)
class Budget:
    """One budget: its kind ("macs", "size", "speedup" or "latency") and the value that was given."""

    kind: str
    value: float

    @property
    def asked(self) -> str:
        """The option as it was given."""
        return f"--{self.kind} {self._text('g')}"

    @property
    def strategy(self) -> str:
        """The name its candidates carry in place of a strategy's."""
        return f"{self.kind}_{self._text('.4g')}"

    @property
    def is_time(self) -> bool:
        """Whether it limits time, which has to be measured."""
        return self.kind in ("speedup", "latency")

    def _text(self, form: str) -> str:
        return str(int(self.value)) if self.kind == "size" else format(self.value, form)


def asked_budgets(macs: Sequence[float], limits: Constraints, kinds: Sequence[str]) -> tuple[Budget, ...]:
    """Return the budgets that candidates are made for.

    A constraint adds a budget where structured candidates are made: only these can be scaled to a time or a size.
    """
    budgets = tuple(Budget("macs", fraction) for fraction in macs)
    return (*budgets, *constraint_budgets(limits)) if "structured" in kinds else budgets


def constraint_budgets(limits: Constraints) -> tuple[Budget, ...]:
    """Return the budgets that constraints set."""
    asked = (("latency", limits.latency_ms), ("speedup", limits.speedup), ("size", limits.size_bytes))
    return tuple(Budget(kind, value) for kind, value in asked if value is not None)


@dataclass(frozen=True)
class BudgetOutcome:
    """A budget as it was asked for, the id of the best candidate that meets it, or None, and a sentence about it."""

    asked: str
    winner: str | None
    reason: str


@dataclass(frozen=True)
class SkippedGroup:
    """A coupled group that keeps its full width, its layers and the reason."""

    group: str
    layers: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class LayerPicture:
    """What became of one layer of the chosen network.

    Attributes:
        fqn: name of the weight tensor.
        role: function in the network.
        width: output channels of the dense layer.
        kept: those that are left.
        sparsity: share of its weights that was removed.
        lo: least sparsity of its range, in [0, 1]; None where the ranges were observed.
        hi: largest sparsity of its range.
        sensitivity: divergence in nats with a quarter of its output channels removed and nothing else; None where it
            was not measured.
        time_before: its share of the dense network's time, in [0, 1]; None where it was not measured.
        time_after: its share of the chosen network's time.
    """

    fqn: str
    role: str
    width: int
    kept: int
    sparsity: float
    lo: float | None = None
    hi: float | None = None
    sensitivity: float | None = None
    time_before: float | None = None
    time_after: float | None = None


@dataclass(frozen=True)
class Report:
    """report.json, which other tools read. `command` runs the same job again."""

    model: ModelInfo
    target: dict[str, Any]
    environment: dict[str, Any]
    data: dict[str, Any]
    dense: DenseFigures
    candidates: tuple[Candidate, ...]
    chosen: Chosen | None
    constraints: Constraints
    skipped_groups: tuple[SkippedGroup, ...]
    warnings: tuple[str, ...]
    seconds: dict[str, float]
    budgets: tuple[BudgetOutcome, ...] = ()
    sustained: Sustained | None = None
    layers: tuple[LayerPicture, ...] = ()
    command: str | None = None
    schema_version: int = SCHEMA_VERSION

    def is_control(self, candidate: Candidate) -> bool:
        """Whether a candidate is the dense network on images of another size, which pruned candidates have to beat."""
        return candidate.kind == "dense" and candidate.input_shape[-2:] != self.model.input_shape[-2:]


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text that others wrote; use this in place of `json.loads`.

    Raises:
        ValueError: it is not JSON, longer than LONGEST_JSON, or nested too deep to be read.
    """
    if len(text) > LONGEST_JSON:
        raise ValueError(f"{len(text):,} characters of JSON, more than {LONGEST_JSON:,}")
    try:
        long = _LONG_DIGITS.search(text) if isinstance(text, str) else _LONG_DIGIT_BYTES.search(text)
        if long is not None:
            return json.loads(text, parse_int=_whole)
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("JSON that is nested too deep") from error


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(digits)


def to_json(record: Any) -> Any:
    """Return `record` as plain JSON values (dicts, lists, numbers, strings, None).

    A field whose metadata says json=False is left out.
    """
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        fields = (f for f in dataclasses.fields(record) if f.metadata.get("json", True))
        return {f.name: to_json(getattr(record, f.name)) for f in fields}
    if isinstance(record, dict):
        return {str(key): to_json(value) for key, value in record.items()}
    if isinstance(record, (list, tuple)):
        return [to_json(value) for value in record]
    return record


def from_json(cls: type[T], data: Any) -> T:
    """Rebuild a record of type `cls` from what `to_json` returned.

    Raises:
        ValueError: `data` does not have the shape of `cls`; the message names the field.
    """
    return typing.cast(T, _build(cls, data, cls.__name__))


def _build(kind: Any, data: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    args = typing.get_args(kind)
    if kind is Any:
        return data
    if origin in (typing.Union, types.UnionType):
        if data is None and type(None) in args:
            return None
        return _build(next(arg for arg in args if arg is not type(None)), data, where)
    if origin is dict:
        _expect(isinstance(data, dict), where, "an object")
        return {key: _build(args[1], value, f"{where}.{key}") for key, value in data.items()}
    if origin is tuple:
        _expect(isinstance(data, (list, tuple)), where, "a list")
        kinds = args[:1] * len(data) if args[-1] is Ellipsis else args
        _expect(len(kinds) == len(data), where, f"{len(kinds)} values")
        return tuple(_build(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, data, strict=True)))
    if dataclasses.is_dataclass(kind):
        return _build_record(typing.cast(type, kind), data, where)
    if kind is float:
        _expect(isinstance(data, (int, float)) and not isinstance(data, bool), where, "a number")
        return float(data)
    _expect(isinstance(data, kind) and (kind is bool or not isinstance(data, bool)), where, kind.__name__)
    return data


def _build_record(cls: type, data: Any, where: str) -> Any:
    _expect(isinstance(data, dict), where, "an object")
    hints = typing.get_type_hints(cls)
    values = {}
    for f in dataclasses.fields(cls):
        if f.name in data:
            values[f.name] = _build(hints[f.name], data[f.name], f"{where}.{f.name}")
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where}.{f.name} is missing")
    return cls(**values)


def _expect(good: bool, where: str, wanted: str) -> None:
    if not good:
        raise ValueError(f"{where}: expected {wanted}")

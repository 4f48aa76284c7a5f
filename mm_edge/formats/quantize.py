"""A deployed fp32 model to int8: static, or dynamic for networks of linear layers.

A tensor x is stored as q = clamp(round(x / s) + z) in 8 bits, weights with one scale per output channel and z = 0,
activations with one scale per tensor. Static scales come from calibration images:

    minmax   [min over images of the image's minimum, max over images of its maximum]
    mean     the means of those: clips what only few images reach

Both ranges are tried, and the one of smaller KL(fp32 || int8) on images held back from calibration is taken. Layers
that lower this divergence most when they alone stay in fp32 are then left in fp32, one after the other. The outputs of
a network that is no classifier are compared by squared error over variance (divergences.py) instead of KL, and its last
layers and what decodes their results stay in fp32.

Which types the 8-bit numbers have depends on the target (schemes.py).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType, quantize_dynamic
from onnxruntime.quantization.calibrate import TensorsData

from mm_edge.arrays import Float32Array, by_input
from mm_edge.bench.target import Target
from mm_edge.errors import JobError, UsageError, first_line
from mm_edge.formats.conversion import CalibrationImages, QuantReport
from mm_edge.formats.int8_graph import (
    EXTREMES,
    WEIGHTED_OPS,
    add_extremes_,
    decoding_nodes,
    free_outputs_,
    hold_in_fp32_,
    is_classifier,
    is_mostly_linear,
    read_ready,
    weighted_layers,
)
from mm_edge.formats.schemes import Scheme, scheme_for
from mm_edge.progress import Advance
from mm_edge.quality.divergences import error_per_image
from mm_edge.quality.evaluation import Evaluation, compare_logits, run_onnx, run_outputs
from mm_edge.runtime import open_session
from mm_edge.store import refuse_link, write_atomically

# Operators between the weighted ones that have 8-bit kernels, or only move bytes; leaving one out costs a round trip.
CARRYING_OPS = tuple(
    "Add Mul Clip Relu LeakyRelu Sigmoid MaxPool AveragePool GlobalAveragePool Concat Reshape Flatten Squeeze "
    "Unsqueeze Transpose Split Slice Resize Pad".split()
)
# Below this divergence (nats) top-1 agreement is within the noise of some hundred images.
GOAL_KL = 0.01
MOST_FP32_LAYERS = 6
# A layer stays in fp32 only if that alone saves this share of the divergence: each costs time and bytes.
LEAST_SHARE = 0.1


@dataclass(frozen=True)
class Extremes:
    """The smallest and largest value of every activation in every calibration image, each (images, tensors)."""

    names: tuple[str, ...]
    low: Float32Array
    high: Float32Array

    def ranges(self, method: str) -> dict[str, tuple[float, float]]:
        """Return [low, high] by tensor, by "minmax" or "mean" over the images."""
        low = self.low.min(axis=0) if method == "minmax" else self.low.mean(axis=0)
        high = self.high.max(axis=0) if method == "minmax" else self.high.mean(axis=0)
        return {name: (float(a), float(b)) for name, a, b in zip(self.names, low, high, strict=True)}


@dataclass(frozen=True)
class Fp32Layers:
    """Layers to leave in fp32, in the order found; `saved_kl` is by how much each lowers the divergence on its own."""

    fp32_layers: tuple[str, ...]
    kl_before: float
    kl_after: float
    saved_kl: dict[str, float]


def layer_names(model: Path) -> tuple[str, ...]:
    """Return the names of the layers with constant weights, in graph order; what `fp32_layers` and `exclude` mean."""
    return tuple(weighted_layers(read_ready(model)))


def calibrate(model: Path, images: Iterable[Float32Array]) -> Extremes:
    """Run `model` on `images` (batches (N, C, H, W)) and return the extremes of every floating-point activation.

    Raises:
        UsageError: no images.
        JobError: an activation is NaN or infinite.
    """
    proto = read_ready(model)
    names = add_extremes_(proto)
    session = open_session(proto.SerializeToString())
    names_of_inputs = [item.name for item in session.get_inputs()]
    examples = (batch[at : at + 1] for batch in images for at in range(len(batch)))
    rows = [session.run([EXTREMES], by_input(example, names_of_inputs))[0] for example in examples]
    if not rows:
        raise UsageError("int8 needs calibration images; give --data PATH, or ask for --precision fp32")
    values = np.stack(rows)
    if not np.isfinite(values).all():
        bad = names[int(np.flatnonzero(~np.isfinite(values).all(axis=(0, 1)))[0])]
        raise JobError(f"activation '{bad}' is not finite on a calibration image, so it has no 8-bit range")
    return Extremes(names, values[:, 0], values[:, 1])


def quantise_static(
    model: Path, out: Path, ranges: Mapping[str, tuple[float, float]], scheme: Scheme, exclude: Iterable[str] = ()
) -> QuantReport:
    """Write `model` with 8-bit layers (QDQ) to `out`; the layers named in `exclude` stay in fp32.

    The same inputs give the same bytes.

    Raises:
        UsageError: `exclude` names no layer of the model.
        JobError: ONNX Runtime's quantiser fails.
    """
    proto = read_ready(model)
    left = tuple(exclude)
    content = _quantised(proto, ranges, scheme, left)
    write_atomically(out, content)
    layers = len(weighted_layers(proto)) - len(left)
    return QuantReport("int8", "static", len(content), scheme=scheme.name, layers=layers, fp32_layers=left)


def quantise_dynamic(model: Path, out: Path, scheme: Scheme) -> QuantReport:
    """Write `model` with 8-bit weights in its linear layers, activations scaled as they come; convolutions stay fp32.

    Raises:
        UsageError: the model has no linear layer.
        JobError: ONNX Runtime's quantiser fails.
    """
    proto = read_ready(model)
    weighted = weighted_layers(proto)
    linear = [name for name, node in weighted.items() if node.op_type in ("Gemm", "MatMul")]
    if not linear:
        raise UsageError("dynamic int8 is for linear layers and this network has none; use static int8")
    proto.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")  # it is: shapes are inferred
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "dynamic.onnx"
        try:
            # A Gemm becomes a MatMul first; MatMuls without constant weights are left alone by default.
            quantize_dynamic(proto, written, ["MatMul"], per_channel=True, reduce_range=scheme.reduce_range)
        except Exception as error:  # the quantiser's exceptions have no common base
            raise JobError(f"ONNX Runtime cannot quantise the model: {first_line(error)}") from error
        made = onnx.load(written)
    _drop_metadata_(made, "onnx.quant.pre_process")
    content = made.SerializeToString()
    write_atomically(out, content)
    rest = tuple(name for name in weighted if name not in linear)
    return QuantReport("int8", "dynamic", len(content), scheme="U8S8", layers=len(linear), fp32_layers=rest)


def find_sensitive_layers(
    model: Path,
    ranges: Mapping[str, tuple[float, float]],
    scheme: Scheme,
    held_back: Float32Array,
    *,
    goal_kl: float = GOAL_KL,
    most: int = MOST_FP32_LAYERS,
    threads: int = 1,
    advance: Advance | None = None,
) -> Fp32Layers:
    """Return the layers, at most `most`, whose staying in fp32 brings KL to fp32 towards `goal_kl`.

    Greedy: in the order of what each saves alone, and only while the divergence falls. `held_back` (N, C, H, W) are
    calibration images that `ranges` were not taken from. Costs one pass over them per layer when int8 misses the goal,
    one in all when it meets it.
    """
    proto = read_ready(model)
    fp32 = _Comparison(model, held_back, threads)

    def divergence(left: Iterable[str]) -> float:
        return fp32.kl(_quantised(proto, ranges, scheme, tuple(left)))

    before = divergence(())
    if before <= goal_kl or most < 1:
        return Fp32Layers((), before, before, {})
    names = tuple(weighted_layers(proto))
    saved: dict[str, float] = {}
    for index, name in enumerate(names):
        saved[name] = before - divergence((name,))
        if advance is not None:
            advance(index + 1, len(names))
    kept: list[str] = []
    after = before
    for name in sorted(names, key=lambda item: -saved[item]):
        if after <= goal_kl or len(kept) == most or saved[name] < LEAST_SHARE * before:
            break
        found = divergence((*kept, name))
        if found < after:
            kept.append(name)
            after = found
    return Fp32Layers(tuple(kept), before, after, saved)


def convert_int8(
    model: Path,
    out: Path,
    target: Target,
    images: CalibrationImages | None,
    threads: int,
    advance: Advance | None,
) -> QuantReport:
    """Write the int8 version of `model`: `quantise` as the registry of precisions calls it.

    Raises:
        JobError: it cannot be quantised.
    """
    assert images is not None
    return quantise(model, out, target, [images.ranges], images.held_back, threads=threads, advance=advance)


def quantise(
    model: Path,
    out: Path,
    target: Target,
    calibration: Iterable[Float32Array],
    held_back: Float32Array,
    *,
    goal_kl: float = GOAL_KL,
    most_fp32_layers: int = MOST_FP32_LAYERS,
    threads: int = 1,
    advance: Advance | None = None,
) -> QuantReport:
    """Write the int8 version of `model` for `target` that is nearest to fp32 on `held_back` images (N, C, H, W).

    Static with the better of two ranges and sensitive layers left in fp32; dynamic instead where the network is made
    of linear layers, static misses `goal_kl` and dynamic is nearer.

    Raises:
        UsageError: the target does not list int8, or there are no calibration images.
        JobError: it cannot be quantised.
    """
    scheme = scheme_for(target)
    extremes = calibrate(model, calibration)
    proto = read_ready(model)
    fp32 = _Comparison(model, held_back, threads)
    found = {method: fp32.kl(_quantised(proto, extremes.ranges(method), scheme, ())) for method in ("minmax", "mean")}
    method = min(found, key=lambda item: found[item])
    ranges = extremes.ranges(method)
    sensitive = find_sensitive_layers(
        model, ranges, scheme, held_back, goal_kl=goal_kl, most=most_fp32_layers, threads=threads, advance=advance
    )
    report = quantise_static(model, out, ranges, scheme, sensitive.fp32_layers)
    report = fp32.complete(replace(report, ranges=method), out)
    if sensitive.kl_after > goal_kl and is_mostly_linear(proto):
        report = _dynamic_if_nearer(model, out, scheme, fp32, report)
    return report


class _Comparison:
    """Compares int8 models with one fp32 model on the held-back images."""

    def __init__(self, model: Path, images: Float32Array, threads: int) -> None:
        if not len(images):
            raise UsageError("int8 needs images held back from calibration to judge it; give more images with --data")
        self._batches = [(images, np.zeros(len(images), dtype=np.int64))]
        self._threads = threads
        self._scores = is_classifier(read_ready(model))
        if self._scores:
            self._reference = run_onnx(model, self._batches, threads)
        else:
            self._outputs = run_outputs(model, self._batches, threads)

    def kl(self, content: bytes) -> float:
        found = self._classify(content).kl_to_dense if self._scores else self._error(content)
        return float("inf") if found is None else found

    def complete(self, report: QuantReport, path: Path) -> QuantReport:
        if not self._scores:
            return replace(report, kl_to_fp32=self._error(path))
        found = self._classify(path)
        return replace(report, kl_to_fp32=found.kl_to_dense, agreement_top1=found.agreement_top1)

    def _classify(self, model: Path | bytes) -> Evaluation:
        return compare_logits(run_onnx(model, self._batches, self._threads), None, self._reference)

    def _error(self, model: Path | bytes) -> float | None:
        """Return the mean over outputs of squared error over variance; None where an output is not finite."""
        found = run_outputs(model, self._batches, self._threads)
        pairs = [(own, found[name]) for name, own in self._outputs.items()]
        if not all(np.isfinite(other).all() for _, other in pairs):
            return None
        return float(np.mean([error_per_image(own, other).mean() for own, other in pairs]))


def _dynamic_if_nearer(model: Path, out: Path, scheme: Scheme, fp32: _Comparison, static: QuantReport) -> QuantReport:
    other = out.with_name(f"{out.stem}.dynamic{out.suffix}")
    try:
        dynamic = fp32.complete(quantise_dynamic(model, other, scheme), other)
        nearer = (dynamic.kl_to_fp32 or 0.0) < (static.kl_to_fp32 if static.kl_to_fp32 is not None else float("inf"))
        if dynamic.kl_to_fp32 is None or not nearer:
            return static
        refuse_link(out)
        other.replace(out)
        note = f"static int8 diverges by {static.kl_to_fp32:.3g} nats, dynamic by {dynamic.kl_to_fp32:.3g}"
        return replace(dynamic, notes=(note,))
    finally:
        other.unlink(missing_ok=True)


def _quantised(
    proto: onnx.ModelProto, ranges: Mapping[str, tuple[float, float]], scheme: Scheme, exclude: tuple[str, ...]
) -> bytes:
    unknown = sorted(set(exclude) - set(weighted_layers(proto)))
    if unknown:
        raise UsageError(f"no layer of the model is called '{unknown[0]}'; quantize.layer_names lists them")
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    # Eight bits for a whole decoded output cannot hold scores beside pixels.
    decoding = () if is_classifier(proto) else decoding_nodes(proto)
    values = {name: (np.float32(low), np.float32(high)) for name, (low, high) in ranges.items()}
    try:
        quantiser = QDQQuantizer(
            copy,
            True,  # one scale per output channel
            scheme.reduce_range,
            QuantType.QInt8,
            QuantType.QInt8 if scheme.signed else QuantType.QUInt8,
            TensorsData(CalibrationMethod.MinMax, values),
            [],
            [*exclude, *decoding],
            [*WEIGHTED_OPS, *CARRYING_OPS],
            {
                "ActivationSymmetric": scheme.symmetric,
                "MatMulConstBOnly": True,
                "AddQDQPairToWeight": scheme.plain_weights,
                "QuantizeBias": not scheme.plain_weights,
            },
        )
        quantiser.quantize_model()
    except Exception as error:  # the quantiser's exceptions have no common base
        raise JobError(f"ONNX Runtime cannot quantise the model: {first_line(error)}") from error
    made: onnx.ModelProto = quantiser.model.model
    hold_in_fp32_(made, [*exclude, *(name for name in weighted_layers(proto) if name in decoding)])
    free_outputs_(made)
    content: bytes = made.SerializeToString(deterministic=True)
    return content


def _drop_metadata_(proto: onnx.ModelProto, key: str) -> None:
    kept = [(entry.key, entry.value) for entry in proto.metadata_props if entry.key != key]
    del proto.metadata_props[:]
    for name, value in kept:
        proto.metadata_props.add(key=name, value=value)

"""The networks of a run: the model at every input shape, with what recovery measures there.

export once -> export again at other sizes -> moments, sensitivities of groups and blocks -> dense answers
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir

from mm_edge.arrays import Arrays, Float32Array, IntArray
from mm_edge.errors import UsageError
from mm_edge.formats.device_files import add_metadata_, write_model
from mm_edge.graph.axes import Axis
from mm_edge.graph.deploy import deploy
from mm_edge.graph.depth import find_branches
from mm_edge.graph.export import RawGraph
from mm_edge.graph.groups import Structure, read_structure
from mm_edge.graph.layers import read_layers
from mm_edge.graph.onnx_graph import read_raw
from mm_edge.graph.sizes import auto_sizes, export_at, match_groups, remake, square_side, total_stride
from mm_edge.graph.widths import AllowedWidths
from mm_edge.load.data import DataSplits, noise_of
from mm_edge.load.models import LoadedModel
from mm_edge.plan.n_m import reduced_axes
from mm_edge.plan.target_widths import allowed_widths_on
from mm_edge.quality.answers import Answers
from mm_edge.quality.evaluation import Reference, compare_logits, refer_to_outputs, run_onnx, run_outputs
from mm_edge.records import InputSpec, Layer
from mm_edge.recover.closed_form.branches import MeasuredBranch, measure_branches
from mm_edge.recover.closed_form.context import RecoveryContext, build_context
from mm_edge.recover.closed_form.sensitivity import (
    Sensitivity,
    from_arrays,
    measurable,
    measure_sensitivities,
    to_arrays,
)
from mm_edge.run.job import IMAGES_PER_BATCH, Job
from mm_edge.run.labels import expect, score
from mm_edge.run.reuse import now_and_then
from mm_edge.runtime import cores
from mm_edge.store import hash_file

CLOSED_FORM_IMAGES = 500
RECOVERY_IMAGES = 128
PARITY_IMAGES = 8
# The most bytes of the dense network's answers that are stored in the run directory.
KEPT_BYTES = 256 << 20

T = TypeVar("T")


@dataclass(frozen=True)
class Images:
    """The images that candidates at one input shape are checked, adjusted and judged with.

    Attributes:
        parity: inputs of the parity check (N, C, H, W).
        parity_kind: what they are, "images" or "noise".
        other_sizes: one batch of noise at other sizes, for a network that leaves sizes open; None for any other.
        recovery: yields batches of calibration images; None without data.
        validation: (images, labels) read in batches; None without data.
    """

    parity: Float32Array
    parity_kind: str
    other_sizes: Float32Array | None = None
    recovery: Callable[[], Iterator[Float32Array]] | None = None
    validation: Callable[[], Iterator[tuple[Float32Array, IntArray]]] | None = None


@dataclass(frozen=True)
class Network:
    """The model at one input shape.

    Attributes:
        model: the model with its input specification.
        data: the images prepared for that input; None without data.
        raw: its raw graph.
        structure: its groups.
        layers: its prunable layers, with their multiply-adds at this shape.
        images: what its candidates are judged with.
        side: the side of the input that ids name; None at the shape the model was given at.
        pruned: whether candidates are pruned at this shape; otherwise only the control is made.
        leaves: for the leaf of each group of the dense network, the leaf of the same group here.
        recovery: what the closed form works from; None without it.
        sensitivities: what removing channels of each group costs; measured at the shape the model was given at.
        branches: what removing each residual branch costs; measured there alone.
    """

    model: LoadedModel
    data: DataSplits | None
    raw: RawGraph
    structure: Structure
    layers: tuple[Layer, ...]
    images: Images
    side: int | None = None
    pruned: bool = True
    leaves: Mapping[Axis, Axis] = field(default_factory=dict)
    recovery: RecoveryContext | None = None
    sensitivities: Mapping[Axis, Sensitivity] = field(default_factory=dict)
    branches: tuple[MeasuredBranch, ...] = ()

    @property
    def spec(self) -> InputSpec:
        """The input it takes."""
        return self.model.input

    @property
    def is_dense_size(self) -> bool:
        """Whether this is the shape the model was given at."""
        return self.side is None

    @property
    def pixels(self) -> int:
        """The side of the input in pixels; unlike `side`, it is a number for the dense network too."""
        return self.spec.shape[-1]

    def translate(self, by_group: Mapping[Axis, T]) -> dict[Axis, T]:
        """Return values by the dense network's groups, such as what each keeps, by the same groups of this network."""
        return {self.leaves[leaf]: value for leaf, value in by_group.items()}

    def allowed_widths(self, job: Job) -> tuple[AllowedWidths, ...]:
        """Return the widths that each group may have on the job's target."""
        return allowed_widths_on(self.structure, self.layers, job.target, job.request.precision)


@dataclass(frozen=True)
class Networks:
    """The networks of a run, and what the dense one answers.

    Attributes:
        dense: the network at the shape the model was given at.
        others: the networks at other shapes.
        reference: what the dense network answers on the validation images.
    """

    dense: Network
    others: tuple[Network, ...]
    reference: Reference

    def __iter__(self) -> Iterator[Network]:
        """Yield every network, the dense one first."""
        return iter((self.dense, *self.others))

    @property
    def pruned(self) -> tuple[Network, ...]:
        """The networks at whose shape candidates are pruned."""
        return tuple(network for network in self if network.pruned)

    def at(self, side: int | None) -> Network:
        """Return the network whose input has this side in pixels; None stands for the dense network."""
        return self.dense if side is None else next(network for network in self if network.pixels == side)


def build_networks(job: Job) -> Networks:
    """Export the model at every input shape, measure what recovery needs, and run the dense network.

    Raises:
        UsageError: the network cannot take an input size that was asked for.
    """
    dense = _export_dense(job)
    if not dense.structure.groups and "structured" in job.request.kinds:
        job.note("no group of this network can lose channels; see 'mm-edge inspect' for the reasons")
    others = _export_others(job, dense)
    dense = _measure_dense(job, dense)
    others = [_with_moments(job, dense, network) for network in others]
    reference = _write_dense(job, dense)
    return Networks(dense, tuple(others), reference)


def recovery_images(data: DataSplits) -> Float32Array:
    """Return the calibration images (N, C, H, W) that the closed form works from."""
    return np.concatenate([batch for batch, _ in data.calibration.take(CLOSED_FORM_IMAGES).batches(IMAGES_PER_BATCH)])


def labels_of(job: Job) -> tuple[str, ...]:
    """Return the names of the classes, from the model or else from the data."""
    return job.model.labels or (job.data.classes if job.data is not None else ())


def provenance_of(job: Job, model: LoadedModel) -> dict[str, Any]:
    """Return the provenance that is written into every artifact made from `model`."""
    return {"model": model.info, "target": job.target.name, "versions": job.versions}


# ---- export


def _export_dense(job: Job) -> Network:
    with job.stages.stage("export"):
        network = _read_network(job, job.model, read_raw(job.model), job.data)
    asked = job.request.input_sizes
    return replace(
        network,
        pruned=not isinstance(asked, tuple) or network.pixels in asked,
        leaves={group.leaf: group.leaf for group in network.structure.groups},
    )


def _read_network(job: Job, model: LoadedModel, raw: RawGraph, data: DataSplits | None) -> Network:
    """Return the network of a raw graph, with its groups and its prunable layers."""
    return Network(
        model=model,
        data=data,
        raw=raw,
        structure=read_structure(raw, job.request.keep, prune_norms=job.request.prune_norms),
        layers=tuple(layer for layer in read_layers(raw) if layer.fqn in raw.weights),
        images=_images(job, model, data),
    )


def _export_others(job: Job, dense: Network) -> list[Network]:
    """Export the model at every other size: those asked for, otherwise those of the controls.

    Raises:
        UsageError: the network cannot take a size that was asked for.
    """
    asked = job.request.input_sizes
    validated = job.data is not None and len(job.data.validation) > 0
    if asked == "none" or (asked is None and not validated):
        return []
    found: list[Network] = []
    try:
        stride = total_stride(job.model, dense.raw)
        sides = asked if isinstance(asked, tuple) else auto_sizes(square_side(job.model, "auto"), stride)
        with job.stages.stage("input sizes") as advance:
            for side in sides:
                if side != dense.pixels:
                    found.append(_export_at(job, dense, side))
                advance(len(found), len(sides))
    except UsageError as error:
        if isinstance(asked, tuple):
            raise
        job.note(f"no other input sizes: {error}")
        return found
    for network in found:
        if network.pixels % stride:
            multiple = f"is no multiple of the network's stride, {stride}"
            job.note(f"--input-sizes {network.side} {multiple}: it costs more than it saves")
    return found


def _export_at(job: Job, dense: Network, side: int) -> Network:
    model = remake(job.model, side)
    data = None if job.data is None else job.data.prepared_for(model.input)
    network = _read_network(job, model, export_at(model), data)
    return replace(
        network,
        side=side,
        pruned=job.request.input_sizes is not None,
        leaves=match_groups(dense.structure, network.structure, side),
    )


def _images(job: Job, model: LoadedModel, data: DataSplits | None) -> Images:
    noise = noise_of(model.input, model.inputs, PARITY_IMAGES, job.request.seed)
    other = _noise_at_other_sizes(model, job.request.seed)
    if data is None:
        return Images(noise, "noise", other)
    calibration, validation = data.calibration, data.validation
    source = calibration if len(calibration) else validation
    parity = next(iter(source.batches(PARITY_IMAGES)))[0] if len(source) else noise
    recovery = calibration.take(RECOVERY_IMAGES)
    return Images(
        parity=parity,
        parity_kind="images" if len(source) else "noise",
        other_sizes=other,
        recovery=(lambda: (images for images, _ in recovery.batches(IMAGES_PER_BATCH))) if len(recovery) else None,
        validation=(lambda: validation.batches(IMAGES_PER_BATCH)) if len(validation) else None,
    )


def _noise_at_other_sizes(model: LoadedModel, seed: int) -> Float32Array | None:
    """Return one batch of noise at other sizes than the measured ones; None where no size is open."""
    if model.onnx_path is None or all(item.other == item.measured for item in model.inputs):
        return None
    inputs = [replace(item, measured=item.other) for item in model.inputs]
    spec = model.input
    if len(inputs) == 1 and inputs[0].is_image:
        spec = replace(spec, shape=inputs[0].image_shape)
    return noise_of(spec, inputs, inputs[0].other[0], seed)


# ---- what recovery measures


def _measure_dense(job: Job, dense: Network) -> Network:
    """Return the dense network with its moments and the sensitivities of its groups and residual branches."""
    dense = replace(dense, recovery=_dense_moments(job, dense))
    return replace(dense, sensitivities=_sensitivities(job, dense), branches=_branches(job, dense))


def _with_moments(job: Job, dense: Network, network: Network) -> Network:
    """Return a network of another shape with its own moments and the dense network's sensitivities."""
    if dense.recovery is None or not network.pruned:
        return network
    # Images that are held back for the dense network must not give moments here.
    moments = _dense_moments(job, network, len(dense.recovery.images))
    if moments is not None and _is_comparable(moments, dense.recovery):
        # Class scores are compared with the dense network's at its own shape, not with those to smaller images.
        moments = replace(moments, answers=dense.recovery.answers)
    known = {leaf: replace(item, leaf=network.leaves[leaf]) for leaf, item in dense.sensitivities.items()}
    return replace(network, recovery=moments, sensitivities=network.translate(known))


def _is_comparable(found: RecoveryContext, dense: RecoveryContext) -> bool:
    """Return whether answers at one shape can be compared with those at another: class scores to the same images.

    Maps and boxes have other positions at another shape.
    """
    scores = found.judged.class_scores is not None and found.answers[0].shape == dense.answers[0].shape
    return scores and found.held_back == dense.held_back


def _dense_moments(job: Job, network: Network, most: int = CLOSED_FORM_IMAGES) -> RecoveryContext | None:
    """Return the moments that the closed form needs for every candidate, from one pass over calibration images."""
    pattern = "n:m" in job.request.kinds
    wanted_by = pattern or ("structured" in job.request.kinds and network.structure.groups)
    if not job.recovery.base.needs_moments or network.data is None or not wanted_by:
        return None
    also = tuple(reduced_axes(network.raw.model)) if pattern else ()
    images = recovery_images(network.data)[:most]
    with job.stages.stage("dense moments") as advance:
        return build_context(
            network.raw,
            network.structure,
            images,
            also=also,
            judge=job.request.judge,
            threads=cores(),
            progress=advance,
            module=network.model.module,
        )


def _sensitivities(job: Job, dense: Network) -> dict[Axis, Sensitivity]:
    """Return each group's sensitivity, by which channels are selected and budgets are allocated.

    They are stored while they are measured, which takes many minutes for a large network.
    """
    if dense.recovery is None or "structured" not in job.request.kinds:
        return {}
    allowed = dense.allowed_widths(job)
    key = _key_of_measured(job, widths=[item.widths for item in allowed])
    stored = job.store.load_arrays("sensitivities", key)
    known = {} if stored is None else from_arrays(dense.structure, stored)
    # The orders take long to compute, and selections need them again.
    dense.recovery.orders.update({leaf: item.surgeon for leaf, item in known.items()})
    if stored is not None and known.keys() >= {group.leaf for group in measurable(dense.recovery, allowed)}:
        return known

    def save(found: Mapping[Axis, Sensitivity]) -> None:
        job.store.save_arrays("sensitivities", key, to_arrays(dense.structure, found))

    with job.stages.stage("sensitivities") as advance:
        known = measure_sensitivities(dense.recovery, allowed, advance, known, now_and_then(save))
    save(known)
    return known


def _branches(job: Job, dense: Network) -> tuple[MeasuredBranch, ...]:
    """Return what removing each residual branch costs, where there are budgets."""
    if dense.recovery is None or not job.budgets:
        return ()
    found = find_branches(dense.raw.model, dense.structure)
    key = _key_of_measured(job, branches=[item.id for item in found])
    stored = job.store.load_json("branches", key)
    known = [float(kl) for kl in stored or ()]
    if stored is not None and len(known) == len(found):
        return tuple(MeasuredBranch(branch, kl) for branch, kl in zip(found, known, strict=True))
    save = partial(job.store.save_json, "branches", key)
    with job.stages.stage("blocks") as advance:
        measured = measure_branches(dense.recovery, found, advance, known, now_and_then(save))
    save([item.kl for item in measured])
    return measured


def _key_of_measured(job: Job, **parts: Any) -> dict[str, Any]:
    """Return the key of what the closed form measures, group by group or branch by branch."""
    request = job.request
    if request.judge:
        parts["judge"] = request.judge
    return job.key(
        data=job.data_key, images=CLOSED_FORM_IMAGES, keep=request.keep, prune_norms=request.prune_norms, **parts
    )


# ---- what the dense network answers


def _write_dense(job: Job, dense: Network) -> Reference:
    """Write dense.onnx and return what it answers on the validation images."""
    file = job.dense_file
    with job.stages.stage("dense model") as advance:
        model = (dense.raw.given or dense.raw.model).clone()
        proto = ir.to_proto(deploy(model, keep_names=dense.raw.keeps_names))
        provenance = {**provenance_of(job, dense.model), "candidate": "dense"}
        add_metadata_(proto, dense.spec, labels_of(job), provenance, dense.model.open_shapes)
        job.store.claim("dense.onnx", "dense.onnx.data")
        write_model(proto, file)
        if dense.images.validation is None or job.data is None:
            return Reference()
        total = len(job.data.validation)
        done = 0

        def count(batch: int) -> None:
            nonlocal done
            done += batch
            advance(done, total)

        batches = dense.images.validation()
        if dense.model.info.num_classes is None:
            outputs = _load_or_run(job, job.data, lambda: run_outputs(file, batches, cores(), count))
            return _with_labels(job, refer_to_outputs(outputs, dense.spec.shape[1:], job.has_masks))
        logits = _load_or_run(job, job.data, lambda: {"logits": run_onnx(file, batches, cores(), count)})["logits"]
        # The labels are read after the images, because images that cannot be decoded are left out.
        labels = job.data.validation.labels
        return Reference(labels, logits, compare_logits(logits, labels, None).accuracy_top1)


def _load_or_run(job: Job, data: DataSplits, run: Callable[[], Arrays]) -> Arrays:
    """Return the dense network's answers on the validation images, those stored or those that `run` returns.

    They are not stored beyond KEPT_BYTES, nor where an image could not be read, because only reading tells which.
    """
    key = job.key(data=job.data_key, artifact=hash_file(job.dense_file))
    found = job.store.load_arrays("dense_answers", key)
    if found is None:
        found = run()
        if data.all_readable and sum(array.nbytes for array in found.values()) <= KEPT_BYTES:
            job.store.save_arrays("dense_answers", key, found)
    return found


def _with_labels(job: Job, reference: Reference) -> Reference:
    """Return the reference with what the user's boxes or masks say about the validation images.

    Raises:
        UsageError: the labels are boxes and the network is no detector, or masks and it is no segmenter.
    """
    if job.labels is None or job.data is None:
        return reference
    count = len(next(iter((reference.outputs or {}).values()), ()))
    photos = job.data.validation.names[:count]
    answers = reference.answers or Answers()
    expected = expect(job.labels, reference.reader, photos, job.model.input, answers)
    assert reference.reader is not None
    found = partial(score, expected=expected, reader=reference.reader)
    return replace(reference, score=found, metric=found(answers))

"""The network at every input size of a run, and what recovery needs to know of it there.

load -> export once -> export again at other sizes -> dense moments, sensitivities of groups and blocks
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mm_edge.errors import UsageError
from mm_edge.graph.axes import Axis
from mm_edge.graph.depth import find_branches
from mm_edge.graph.export import read_raw
from mm_edge.graph.groups import read_structure
from mm_edge.graph.layers import read_layers
from mm_edge.graph.sizes import SizedNetwork, auto_sizes, export_at, remake, square_side, total_stride
from mm_edge.plan.n_m import reduced_axes
from mm_edge.recover.closed_form.branches import MeasuredBranch, measure_branches
from mm_edge.recover.closed_form.context import RecoveryContext, build_context
from mm_edge.recover.closed_form.sensitivity import Sensitivity, from_arrays, measure_sensitivities, to_arrays
from mm_edge.run.job import CLOSED_FORM_IMAGES, FROM_MOMENTS, Job, Place, recovery_images
from mm_edge.run.make import make_ladders
from mm_edge.runtime import cores


def export_dense(job: Job) -> SizedNetwork:
    """Export the network at its own size and read its coupled groups."""
    raw = read_raw(job.model)
    structure = read_structure(raw, job.request.keep, prune_norms=job.request.prune_norms)
    layers = tuple(layer for layer in read_layers(raw) if layer.fqn in raw.weights)
    leaves = {group.leaf: group.leaf for group in structure.groups}
    return SizedNetwork(job.model.input.shape[-1], job.model, raw, structure, layers, leaves)


def export_sizes(job: Job, dense: SizedNetwork) -> tuple[list[SizedNetwork], list[str]]:
    """Make the network again at every other size: those asked for, else those that controls are taken at.

    Raises:
        UsageError: the network cannot take a size that was asked for.
    """
    asked = job.request.input_sizes
    validated = job.data is not None and len(job.data.validation) > 0
    if asked == "none" or (asked is None and not validated):
        return [], []
    found: list[SizedNetwork] = []
    try:
        if isinstance(asked, tuple):
            sides = asked
        else:
            sides = auto_sizes(square_side(job.model, "auto"), total_stride(job.model, dense.raw))
        with job.stages.stage("input sizes") as advance:
            for side in sides:
                if side != dense.side:
                    model = remake(job.model, side)
                    keep, norms = job.request.keep, job.request.prune_norms
                    found.append(export_at(model, dense.structure, keep, prune_norms=norms))
                advance(len(found), len(sides))
    except UsageError as error:
        if isinstance(asked, tuple):
            raise
        return found, [f"no other input sizes: {error}"]
    stride = total_stride(job.model, dense.raw)
    notes = [
        f"--input-sizes {item.side} is no multiple of the network's stride, {stride}: it costs more than it saves"
        for item in found
        if item.side % stride
    ]
    return found, notes


def lay_out_places(job: Job, dense: SizedNetwork, sizes: list[SizedNetwork]) -> list[Place]:
    """Lay out the input sizes, the dense one first, with what recovery needs at each."""
    asked = job.request.input_sizes
    recovery = _dense_moments(job, dense)
    sensitivities = _sensitivities(job, dense, recovery)
    wanted = asked if isinstance(asked, tuple) else (dense.side,)
    branches = _branches(job, dense, recovery)
    places = [Place(job, dense, True, dense.side in wanted, recovery, sensitivities, branches)]
    for network in sizes:
        place = Place(job.at(network), network, False, asked is not None)
        if recovery is not None and place.pruned:
            # No moment here may come from images that are held back there.
            moments = _dense_moments(place.job, network, len(recovery.images))
            if moments is not None and moments.held_back == recovery.held_back:
                # The network to come near to is the one given, not what it says of smaller pictures.
                moments = replace(moments, logits=recovery.logits)
            known = {leaf: replace(item, leaf=network.leaves[leaf]) for leaf, item in sensitivities.items()}
            place = replace(place, recovery=moments, sensitivities=network.translate(known))
        places.append(place)
    return places


def _dense_moments(job: Job, network: SizedNetwork, most: int = CLOSED_FORM_IMAGES) -> RecoveryContext | None:
    """Run the dense network once over calibration images: what the closed form needs for every candidate."""
    pattern = "n:m" in job.request.kinds
    wanted_by = pattern or ("structured" in job.request.kinds and network.structure.groups)
    if job.request.recover not in FROM_MOMENTS or job.data is None or not wanted_by:
        return None
    also = tuple(reduced_axes(network.raw.model)) if pattern else ()
    images = recovery_images(job.data)[:most]
    with job.stages.stage("dense moments") as advance:
        return build_context(
            network.raw,
            network.structure,
            images,
            also=also,
            threads=cores(),
            progress=advance,
            module=job.model.module,
        )


def _sensitivities(job: Job, network: SizedNetwork, recovery: RecoveryContext | None) -> dict[Axis, Sensitivity]:
    """Measure each group's sensitivity (recipe A, point 5): which selection suits it, and what a budget takes first."""
    if recovery is None or "structured" not in job.request.kinds:
        return {}
    structure = network.structure
    ladders = make_ladders(structure, network.layers, job.target, job.request.precisions)
    key = _key_of_measured(job, widths=[item.widths for item in ladders])
    stored = job.store.load_arrays("sensitivities", key)
    if stored is not None:
        found = from_arrays(structure, stored)
        # The costly part of them; selections ask for it again.
        recovery.orders.update({leaf: item.surgeon for leaf, item in found.items()})
        return found
    with job.stages.stage("sensitivities") as advance:
        found = measure_sensitivities(recovery, ladders, advance)
    job.store.save_arrays("sensitivities", key, to_arrays(structure, found))
    return found


def _key_of_measured(job: Job, **parts: Any) -> dict[str, Any]:
    """Return the key of what is measured by the closed form, group by group or block by block."""
    request = job.request
    return job.key(
        data=job.data_key, images=CLOSED_FORM_IMAGES, keep=request.keep, prune_norms=request.prune_norms, **parts
    )


def _branches(job: Job, network: SizedNetwork, recovery: RecoveryContext | None) -> tuple[MeasuredBranch, ...]:
    """Measure what removing each residual branch costs, where a budget may ask for it."""
    if recovery is None or not job.budgets:
        return ()
    found = find_branches(network.raw.model, network.structure)
    key = _key_of_measured(job, branches=[item.id for item in found])
    stored = job.store.load_json("branches", key)
    if stored is None:
        with job.stages.stage("blocks") as advance:
            stored = [item.kl for item in measure_branches(recovery, found, advance)]
        job.store.save_json("branches", key, stored)
    return tuple(MeasuredBranch(branch, float(kl)) for branch, kl in zip(found, stored, strict=True))

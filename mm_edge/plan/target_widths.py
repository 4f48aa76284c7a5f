"""The widths that each coupled group may have on a target: multiples of what the target's kernels want."""

from __future__ import annotations

from collections.abc import Sequence

from mm_edge.bench.target import Target
from mm_edge.graph.groups import Group, Structure
from mm_edge.graph.widths import AllowedWidths, allowed_widths
from mm_edge.records import Layer


def channel_multiple(group: Group, layers: Sequence[Layer], target: Target, precisions: Sequence[str]) -> int:
    """Return the channel multiple `target` wants for a group: the largest any of its layers wants in any precision."""
    reached = set(group.tensors)
    classes = {operator_class(layer) for layer in layers if layer.fqn in reached}
    return max((target.multiple(kind, precision) for kind in classes for precision in precisions), default=1)


def operator_class(layer: Layer) -> str:
    """Return the class of operator under which a target lists its channel multiples."""
    if layer.kind == "linear":
        return "matmul"
    if layer.kind == "depthwise":
        return "depthwise"
    return "pointwise" if all(size == 1 for size in layer.shape[2:]) else "conv"


def allowed_widths_on(
    structure: Structure, layers: Sequence[Layer], target: Target, precisions: Sequence[str] = ("fp32",)
) -> tuple[AllowedWidths, ...]:
    """Return the widths each group may have on `target` when its candidates run in `precisions`."""
    return tuple(
        allowed_widths(group, channel_multiple(group, layers, target, precisions)) for group in structure.groups
    )

"""What a network costs, counted on its graph: parameters and multiply-adds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mm_edge.graph.axes import Keep
from mm_edge.graph.costs import Cost
from mm_edge.graph.depth import live_nodes
from mm_edge.graph.export import RawGraph
from mm_edge.graph.groups import Structure
from mm_edge.graph.reading import CostTerm


def count_parameters(raw: RawGraph) -> int:
    """Count the parameters of the dense network."""
    shapes = [raw.model.graph.initializers[name].shape for name in raw.parameters]
    return sum(int(np.prod(shape.numpy())) for shape in shapes if shape is not None)


def parameter_cost(raw: RawGraph, structure: Structure) -> Cost:
    """Return the parameters as a cost of widths."""
    known = sorted(raw.parameters & structure.tensor_axes.keys())
    items = tuple(CostTerm(name, structure.tensor_axes[name]) for name in known)
    cost = Cost(structure.table, items)
    return replace(cost, fixed=count_parameters(raw) - cost.total())


def count_macs(raw: RawGraph, structure: Structure, keep: Keep) -> float:
    """Return the multiply-adds of the compact graph; nodes that an emptied group leaves without effect cost nothing."""
    counts = {leaf: float(kept.sum()) for leaf, kept in keep.items()}
    if all(counts.values()):
        return structure.macs(counts)
    alive = live_nodes(raw.model, structure, keep)
    return replace(structure, work=tuple(item for item in structure.work if item.node in alive)).macs(counts)

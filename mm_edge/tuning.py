"""Block-wise tuning of one candidate: what the closed form made of it, a few hundred gradient steps later.

    saved masked state -> tuned state (masks hold) -> compact graph -> file -> parity -> accuracy

A candidate on smaller pictures is tuned at the size the network was given at: what the dense network puts out there is
right, on smaller pictures it is not. Whether that helps is asked at the candidate's own size.
"""

from __future__ import annotations

from dataclasses import replace

from mm_edge.candidates import Plan, Workbench, read_masked_state, save_trained
from mm_edge.graph.compact import Keep
from mm_edge.progress import Advance
from mm_edge.records import Candidate
from mm_edge.recover.context import Tensors
from mm_edge.recover.tune import Tuned, adopt, tune


def tune_candidate(
    bench: Workbench, given: Workbench, plan: Plan, row: Candidate, seed: int, advance: Advance | None = None
) -> Candidate:
    """Tune the network of `row` and return its new record; the old one, with why, where the images say no better.

    `given` is the workbench of the size the network was given at; `bench` where the plan has another.

    Raises:
        ParityError: the artifact does not agree with its masked model; nothing is kept of it.
    """
    assert row.masked_state_dict is not None
    plan, start = read_masked_state(bench.structure, plan, bench.folder / row.masked_state_dict)
    assert plan.keep is not None
    found = _tune(bench, given, plan.keep, start, seed, advance)
    if not found.better:
        return replace(row, stopped=found.note)
    made = save_trained(bench, plan, found.tensors, "tune", f"{plan.file_name}-tuned")
    return replace(made, stopped=found.note)


def _tune(bench: Workbench, given: Workbench, keep: Keep, start: Tensors, seed: int, advance: Advance | None) -> Tuned:
    assert given.module is not None and given.recovery is not None and bench.recovery is not None
    if bench is given:
        return tune(given.recovery, given.module, keep, start, seed=seed, progress=advance)
    leaves = {group.id: group.leaf for group in bench.structure.groups}
    there = {group.leaf: keep[leaves[group.id]] for group in given.structure.groups if leaves.get(group.id) in keep}
    # Position tables have the shapes of their size, and stay.
    shapes = {name: array.shape for name, array in given.recovery.network.arrays.items()}
    shared = {name: array for name, array in start.items() if shapes.get(name) == array.shape}
    found = tune(given.recovery, given.module, there, shared, seed=seed, progress=advance)
    return adopt(bench.recovery, given.recovery, keep, start, found)

"""Tuning of one candidate: what the closed form made of it, a few hundred gradient steps later (recover/adapt.py).

saved masked state -> tuned state (masks hold) -> compact graph -> file -> parity -> accuracy
"""

from __future__ import annotations

from dataclasses import replace

from mm_edge.progress import Advance
from mm_edge.records import Candidate
from mm_edge.recover.training.adapt import tune_for
from mm_edge.run.make import Plan, Workbench, read_masked_state, save_trained


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
    assert bench.recovery is not None and given.recovery is not None
    found = tune_for(bench.recovery, given.recovery, plan.keep, start, seed=seed, progress=advance)
    if not found.better:
        return replace(row, stopped=found.note)
    made = save_trained(bench, plan, found.tensors, "tune", f"{plan.file_name}-tuned")
    return replace(made, stopped=found.note)

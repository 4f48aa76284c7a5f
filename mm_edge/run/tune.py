"""Tuning of one candidate: a few hundred gradient steps that start from the closed form's weights.

saved masked state -> tuned state (masks hold) -> compact graph -> file -> parity -> accuracy
"""

from __future__ import annotations

from dataclasses import replace

from mm_edge.plan.plans import ChannelPlan
from mm_edge.records import Candidate
from mm_edge.recover.training.adapt import tune_for
from mm_edge.run.make import read_masked_state, save_trained
from mm_edge.run.reuse import load_or_make
from mm_edge.run.work import Work


def tune_candidate(work: Work) -> Candidate:
    """Tune a candidate, or return the one that an earlier run stored.

    Raises:
        ParityError: the artifact does not agree with its masked model; nothing is kept of it.
    """
    job, plan = work.job, work.plan
    key = job.key(
        work.networks.at(plan.side).model, data=job.data_key, plan=plan.digest(), recover="tune", start=work.start
    )
    return load_or_make(job, f"tuned/{plan.file_name}", key, lambda: _tune(work))


def _tune(work: Work) -> Candidate:
    """Return the tuned candidate, or the old one with the reason if it is no better on held-back images."""
    networks, candidate, settings = work.networks, work.candidate, work.settings
    network = networks.at(work.plan.side)
    assert candidate.masked_state_dict is not None and isinstance(work.plan, ChannelPlan)
    state = settings.folder / candidate.masked_state_dict
    plan, start = read_masked_state(network.structure, work.plan, state)
    own, given = network.recovery, networks.dense.recovery
    assert own is not None and given is not None and isinstance(plan, ChannelPlan)
    found = tune_for(own, given, plan.keep, start, seed=work.job.request.seed, progress=work.advance)
    if not found.better:
        return replace(candidate, stopped=found.note)
    made = save_trained(network, plan, settings, found.tensors, "tune", f"{plan.file_name}-tuned")
    return replace(made, stopped=found.note)

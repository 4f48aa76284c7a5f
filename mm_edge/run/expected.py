"""The stages a run is expected to take, in order, so that its progress can name those to come."""

from __future__ import annotations

from mm_edge.records import Budget
from mm_edge.run.job import Job
from mm_edge.run.plan import combining_stage
from mm_edge.run.score import needs_gradient


def expected_stages(job: Job) -> tuple[str, ...]:
    """Return the names of the stages after `load`. Stages whose result is stored are named too and then left out."""
    with_data = job.data is not None
    structured = "structured" in job.request.kinds
    timed = job.transport is not None and job.transport.source != "emulated"
    stages = {
        "export": True,
        "input sizes": job.request.input_sizes != "none" and (with_data or job.request.input_sizes is not None),
        "dense moments": _solves(job),
        "sensitivities": _solves(job) and structured,
        "blocks": _solves(job) and bool(job.budgets),
        "dense model": True,
        "gradients": with_data and job.model.module is not None and needs_gradient(job.request),
        "scores": True,
        "plan": True,
        "latency table": timed and job.request.allocate_by == "latency" and any(map(_is_time, job.budgets)),
        "plan budgets": bool(job.budgets),
        **{combining_stage(budget): _solves(job) and structured for budget in job.budgets},
        "candidates": True,
        "walk the front": _solves(job) and structured and job.request.effort != "quick",
        job.recovery.stage: job.recovery.improve is not None,
        "smaller numbers": job.request.precision != ("fp32",),
        "emulate": job.transport is not None and not timed,
        "measure": timed,
        "accuracy on the device": job.request.accuracy_on == "device",
        "test": job.data is not None and len(job.data.test) > 0,
        "sustained": timed and job.request.sustained is not None,
        "shares of time": timed and with_data,
        "bundle": with_data or job.metric is not None,  # nothing is chosen that was compared with nothing
    }
    return tuple(name for name, wanted in stages.items() if wanted)


def _solves(job: Job) -> bool:
    return job.data is not None and job.recovery.from_moments


def _is_time(budget: Budget) -> bool:
    return budget.is_time

"""Which candidates are walked."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest

from mm_edge.plan.plans import Plan
from mm_edge.records import Candidate, DenseFigures, Fidelity, Latency
from mm_edge.run.networks import Networks
from mm_edge.run.recover import _worth_walking

DENSE = DenseFigures(None, Latency(), None, None, 1, 100)


def screened(signal: str, macs: int, overlap: float) -> Candidate:
    return Candidate(
        id=f"{signal}/{macs}",
        signal=signal,
        strategy=f"macs_{macs / 100}",
        kind="structured",
        precision="fp32",
        sparsity=0.5,
        params=1,
        macs=macs,
        input_shape=(3, 8, 8),
        fidelity=Fidelity({}, map50_to_dense=overlap, map_to_dense=overlap),
        planned_by="multiply-adds, counted",
    )


@pytest.mark.parametrize(("scores", "walked"), [(None, ["sensitivity/50", "sensitivity/80"]), ("y", None)])
def test_of_a_detectors_budget_the_best_screened_candidate_alone_is_walked(
    scores: str | None, walked: list[str] | None
) -> None:
    candidates = [
        screened("magnitude", 49, 0.2),  # on the front, but behind under its budget
        screened("magnitude", 80, 0.6),
        screened("sensitivity", 50, 0.8),
        screened("sensitivity", 80, 0.9),
    ]
    candidates[0] = replace(candidates[0], strategy="macs_0.5")
    recovery = SimpleNamespace(judged=SimpleNamespace(class_scores=scores))
    networks = cast(Networks, SimpleNamespace(dense=SimpleNamespace(recovery=recovery)))
    plans = {item.id: cast(Plan, SimpleNamespace(side=None)) for item in candidates}
    found = [item.id for item in _worth_walking(networks, plans, candidates, DENSE)]
    assert found == (walked or [item.id for item in candidates])

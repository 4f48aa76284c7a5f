"""Reports made by hand, for tests of what is made of them."""

from __future__ import annotations

import dataclasses

from mm_edge.records import (
    Candidate,
    Chosen,
    Constraints,
    DenseFigures,
    Latency,
    ModelInfo,
    Parity,
    ParityInputs,
    Report,
    SkippedGroup,
)


def candidate(strategy: str, p50: float | None, drop: float | None = 0.5, pareto: bool = False) -> Candidate:
    return Candidate(
        id=f"product/{strategy}/structured/fp32",
        signal="product",
        strategy=strategy,
        kind="structured",
        precision="fp32",
        sparsity=0.5,
        params=500_000,
        macs=50_000_000,
        input_shape=(1, 3, 32, 32),
        accuracy_top1=None if drop is None else 0.9 - drop / 100,
        accuracy_drop=drop,
        latency_ms=Latency(p50=p50, p90=p50, p99=p50, samples=200, threads=1, source="host") if p50 else Latency(),
        speedup=2.0 / p50 if p50 else None,
        speedup_ci=(2.0 / p50 - 0.05, 2.0 / p50 + 0.05) if p50 else None,
        file_bytes=2_000_000,
        parity=Parity(1e-6, 2.5e-7, 1.0, ParityInputs(8, "images")),
        pareto=pareto,
        artifact=f"models/{strategy}.onnx",
    )


def make_report(*candidates: Candidate, chosen: int | None = 0, **changes: object) -> Report:
    report = Report(
        model=ModelInfo("net", "checkpoint", "ab" * 32, 1_000_000, 100_000_000, (1, 3, 32, 32), 10),
        target={"name": "host", "threads": 1},
        environment={"python": "3.11"},
        data={"splits": {"calibration": 4, "validation": 2, "test": 2}},
        dense=DenseFigures(
            accuracy_top1=0.9,
            latency_ms=Latency(p50=2.0, p90=2.1, p99=2.5, samples=200, threads=1, source="host"),
            peak_memory_bytes=None,
            file_bytes=4_000_000,
            params=1_000_000,
            macs=100_000_000,
        ),
        candidates=candidates,
        chosen=None if chosen is None else Chosen(candidates[chosen].id, "the fastest", 0.885),
        constraints=Constraints(),
        skipped_groups=(
            SkippedGroup("g0", ("a.weight", "b.weight"), "an axis of the input"),
            SkippedGroup("g1", ("b.weight",), "an axis of the input"),
        ),
        warnings=("two images were skipped",),
        seconds={"score": 1.25},
    )
    return dataclasses.replace(report, **changes)  # type: ignore[arg-type]


FAST = candidate("balanced", 1.0, pareto=True)
UNMEASURED = candidate("uniform", None, None)

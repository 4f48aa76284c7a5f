"""Everything that is taken from the device: times, memory, and accuracy where it was asked for there.

One thing at a time; what a device answered is kept under the hash of the file and of the device's own record.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mm_edge.arrays import Float32Array
from mm_edge.bench.session import (
    MINIMUM_PAIRS,
    Measurement,
    compare_outputs,
    environment,
    evaluate_in_pieces,
    measure_memory,
    measure_pair,
    merge_doubts,
)
from mm_edge.bench.target import Target, matches_this_machine
from mm_edge.bench.transport import Transport
from mm_edge.quality.evaluation import Reference, compare_logits, judge
from mm_edge.records import Candidate, DenseRow, Latency
from mm_edge.run.job import Job
from mm_edge.run.make import Benches, Images, bench_of
from mm_edge.select import mark_pareto
from mm_edge.store import hash_file

SAMPLES_FOLDER = "samples"


def measure_all(
    job: Job, benches: Benches, dense: DenseRow, candidates: list[Candidate]
) -> tuple[DenseRow, list[Candidate], dict[str, Any], list[str]]:
    """Time every candidate against the dense model, and take each one's memory in a process of its own."""
    transport = job.transport
    if transport is None:
        return dense, candidates, {"controller": job.key()["versions"]}, []
    if transport.source == "emulated":
        return _emulate(job, benches, transport, dense, candidates)
    timings: list[Measurement] = []
    measured: list[Candidate] = []
    dense_file = job.folder / "dense.onnx"
    with job.stages.stage("measure") as advance:
        env = environment(job.target, transport)
        fingerprint = env["fingerprint"]
        memory = _memory(job, dense_file, transport, fingerprint)
        dense_latencies: list[Latency] = []
        for index, candidate in enumerate(candidates):
            assert candidate.artifact is not None
            artifact = job.folder / candidate.artifact
            samples = job.folder / SAMPLES_FOLDER / f"{artifact.stem}.json"
            timing = measure_pair(
                dense_file,
                artifact,
                job.target,
                transport=transport,
                pairs=MINIMUM_PAIRS,
                raw_samples=samples,
                fingerprint=fingerprint,
            )
            timings.append(timing)
            dense_latencies.append(timing.dense_latency)
            measured.append(
                replace(
                    candidate,
                    latency_ms=timing.latency,
                    speedup=timing.speedup,
                    speedup_ci=timing.speedup_ci,
                    peak_memory_bytes=_memory(job, artifact, transport, fingerprint),
                )
            )
            advance(index + 1, len(candidates))
    # Every pair timed the dense model anew; the one in the middle stands for it, so that drift does not pick the row.
    timed = sorted((item for item in dense_latencies if item.p50 is not None), key=lambda item: item.p50 or 0.0)
    middle = timed[len(timed) // 2] if timed else Latency()
    dense = replace(dense, latency_ms=middle, peak_memory_bytes=memory)
    env = {**env, "packages": job.key()["versions"]}
    return dense, measured, env, [*(str(text) for text in env.get("doubts", [])), *merge_doubts(timings)]


def _emulate(
    job: Job, benches: Benches, transport: Transport, dense: DenseRow, candidates: list[Candidate]
) -> tuple[DenseRow, list[Candidate], dict[str, Any], list[str]]:
    """Compare outputs on the emulated core with this machine's; its times and memory are not the device's: null.

    An emulated inference takes seconds, so only the rows on the front go through.
    """
    front = [row for row in mark_pareto(candidates, dense) if row.pareto or len(candidates) == 1] or candidates[:1]
    notes = [f"{transport.name} is emulated: latency and memory are not measured"]
    with job.stages.stage("emulate") as advance, tempfile.TemporaryDirectory() as scratch:
        env = environment(job.target, transport)
        files = {side: Path(scratch) / f"images-{side}.npy" for side in benches}
        for side, file in files.items():
            np.save(file, benches[side].images.parity)
        for index, row in enumerate(front):
            assert row.artifact is not None
            artifact, side = job.folder / row.artifact, row.input_shape[-1]
            kind = benches[side].images.parity_kind
            found = compare_outputs(artifact, files[side], job.target, transport=transport, kind=kind)
            notes.append(
                f"{row.id}, emulated: top-1 agrees with this machine's on {found.top1_agreement:.0%} of "
                f"{found.inputs.count} inputs, largest difference {found.max_rel_err:.0e} of the output's scale"
            )
            advance(index + 1, len(front))
    return dense, candidates, {**env, "packages": job.key()["versions"]}, notes


def judge_on_device(
    job: Job, benches: Benches, dense: DenseRow, candidates: list[Candidate], fingerprint: str
) -> tuple[DenseRow, list[Candidate], str]:
    """Take every accuracy from the device: its kernels, int8 ones above all, may answer otherwise than this machine's.

    Agreement and divergence are with the dense model on the device too.
    """
    bench = bench_of(benches, None)
    assert job.transport is not None and bench.images.labels is not None
    rows: list[Candidate] = []
    moved: list[float] = []
    with job.stages.stage("accuracy on the device") as advance, tempfile.TemporaryDirectory() as scratch:
        pieces = {side: _save_images(item.images, Path(scratch), side) for side, item in benches.items()}
        reference = _device_logits(job, job.folder / "dense.onnx", pieces[bench.spec.shape[-1]], fingerprint)
        own = compare_logits(reference, bench.images.labels, None).accuracy_top1
        for index, row in enumerate(candidates):
            assert row.artifact is not None
            logits = _device_logits(job, job.folder / row.artifact, pieces[row.input_shape[-1]], fingerprint)
            rows.append(replace(row, **judge(logits, Reference(bench.images.labels, reference, own))))
            moved.append(abs((rows[-1].accuracy_top1 or 0.0) - (row.accuracy_top1 or 0.0)))
            advance(index + 1, len(candidates))
    note = (
        f"accuracy was measured on {job.transport.name}, on {len(bench.images.labels)} validation images; the row that "
        f"differs most from this machine's figure differs by {100 * max(moved, default=0.0):.2f} points"
    )
    return replace(dense, accuracy_top1=own), rows, note


def _save_images(images: Images, folder: Path, side: int) -> list[Path]:
    """Write the validation images as the files that a device is sent, a batch each."""
    assert images.validation is not None
    pieces: list[Path] = []
    for number, (batch, _) in enumerate(images.validation()):
        pieces.append(folder / f"images-{side}-{number:05d}.npy")
        np.save(pieces[-1], batch)
    return pieces


def _device_logits(job: Job, model: Path, pieces: Sequence[Path], fingerprint: str) -> Float32Array:
    """Return the device's answers for the validation images, from an earlier run where nothing has changed."""
    assert job.transport is not None
    key = job.key(data=job.data_key, artifact=hash_file(model), target=job.target, fingerprint=fingerprint)
    stored = job.store.load_arrays(f"device_logits/{model.stem}", key)
    if stored is None:
        stored = {"logits": evaluate_in_pieces(model, pieces, job.target, transport=job.transport)}
        job.store.save_arrays(f"device_logits/{model.stem}", key, stored)
    return stored["logits"]


def _memory(job: Job, model: Path, transport: Transport, fingerprint: str) -> int | None:
    key = {"model": hash_file(model), "target": job.target, "fingerprint": fingerprint}
    stored = job.store.load_json(f"memory/{model.stem}", key)
    if stored is None:
        stored = [measure_memory(model, job.target, transport=transport)]
        job.store.save_json(f"memory/{model.stem}", key, stored)
    value: int | None = stored[0]
    return value


def how_to_measure(target: Target) -> str:
    """Return what to do for times where none were taken."""
    if matches_this_machine(target):
        return "latency is not measured: --no-bench was given; run the same command without it to measure"
    return (
        f"latency is not measured: this machine is not {target.name} and no device was given; give --host USER@HOST, "
        f"or copy dense.onnx and the artifacts to one and run there: "
        f"mm-edge bench dense.onnx ARTIFACT.onnx --target {target.name}"
    )

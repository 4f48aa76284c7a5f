"""Measures on the device: times, memory, and accuracy where that was asked for.

Measurements run one after the other. Results are stored under the hash of the file and the device's fingerprint.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mm_edge.arrays import Float32Array
from mm_edge.bench import MINIMUM_PAIRS
from mm_edge.bench.session import (
    Measurement,
    environment,
    measure_memory,
    measure_pair,
    merge_doubts,
    run_model,
    run_model_in_pieces,
)
from mm_edge.bench.target import Target, matches_this_machine
from mm_edge.bench.transport import Transport
from mm_edge.quality.evaluation import Reference, compare_logits, interval_of, judge_logits
from mm_edge.quality.parity import compare_with_outputs
from mm_edge.records import Candidate, DenseFigures, Latency
from mm_edge.run.job import Job
from mm_edge.run.networks import Network, Networks
from mm_edge.select import mark_pareto
from mm_edge.store import hash_file

SAMPLES_FOLDER = "samples"


def measure(
    job: Job, networks: Networks, dense: DenseFigures, candidates: Sequence[Candidate]
) -> tuple[DenseFigures, list[Candidate], dict[str, Any]]:
    """Measure times, memory and, where asked for, accuracy on the device.

    Returns:
        The dense network's figures, the candidates with theirs, and the environment they were measured in.
    """
    dense, measured, env = _measure_times(job, networks, dense, list(candidates))
    env = {**env, "accuracy_on": job.request.accuracy_on}
    if job.request.accuracy_on == "device":
        dense, measured = _judge_on_device(job, networks, dense, measured, env["fingerprint"])
    return dense, measured, env


def _measure_times(
    job: Job, networks: Networks, dense: DenseFigures, candidates: list[Candidate]
) -> tuple[DenseFigures, list[Candidate], dict[str, Any]]:
    """Time every candidate against the dense network, and measure the memory of each in its own process."""
    transport = job.transport
    if transport is None:
        return dense, candidates, {"controller": job.versions}
    if transport.source == "emulated":
        return dense, candidates, _emulate(job, networks, transport, dense, candidates)
    timings: list[Measurement] = []
    measured: list[Candidate] = []
    with job.stages.stage("measure") as advance:
        env = environment(job.target, transport)
        fingerprint = env["fingerprint"]
        memory = _memory(job, job.dense_file, transport, fingerprint)
        for index, candidate in enumerate(candidates):
            artifact = job.artifact(candidate)
            samples = job.folder / SAMPLES_FOLDER / f"{artifact.stem}.json"
            job.store.claim(f"{SAMPLES_FOLDER}/{samples.name}")
            timing = measure_pair(
                job.dense_file,
                artifact,
                job.target,
                transport=transport,
                pairs=MINIMUM_PAIRS,
                raw_samples=samples,
                fingerprint=fingerprint,
            )
            timings.append(timing)
            measured.append(
                replace(
                    candidate,
                    latency_ms=timing.latency,
                    speedup=timing.speedup,
                    speedup_ci=timing.speedup_ci,
                    dense_latency_ms=timing.dense_latency,
                    peak_memory_bytes=_memory(job, artifact, transport, fingerprint),
                )
            )
            advance(index + 1, len(candidates))
    # Every pair timed the dense network again. The median of these is reported, so that drift has little effect.
    latencies = [timing.dense_latency for timing in timings if timing.dense_latency.p50 is not None]
    latencies.sort(key=lambda latency: latency.p50 or 0.0)
    middle = latencies[len(latencies) // 2] if latencies else Latency()
    dense = replace(dense, latency_ms=middle, peak_memory_bytes=memory)
    job.note(*(str(text) for text in env.get("doubts", [])), *merge_doubts(timings))
    return dense, measured, {**env, "packages": job.versions}


def _emulate(
    job: Job, networks: Networks, transport: Transport, dense: DenseFigures, candidates: list[Candidate]
) -> dict[str, Any]:
    """Compare outputs on the emulated core with this machine's; times and memory are not measured there.

    An emulated inference takes seconds, so only the candidates on the front are run.
    """
    front = [item for item in mark_pareto(candidates, dense) if item.pareto or len(candidates) == 1] or candidates[:1]
    job.note(f"{transport.name} is emulated: latency and memory are not measured")
    with job.stages.stage("emulate") as advance, tempfile.TemporaryDirectory() as scratch:
        env = environment(job.target, transport)
        files = {network.side: Path(scratch) / f"images-{network.pixels}.npy" for network in networks}
        for network in networks:
            np.save(files[network.side], network.images.parity)
        for index, candidate in enumerate(front):
            network = networks.at(candidate.input_shape[-1])
            artifact, file = job.artifact(candidate), files[network.side]
            outputs = run_model(artifact, file, job.target, transport=transport)
            found = compare_with_outputs(artifact, outputs, network.images.parity, network.images.parity_kind)
            job.note(
                f"{candidate.id}, emulated: top-1 agrees with this machine's on {found.top1_agreement:.0%} of "
                f"{found.inputs.count} inputs, largest difference {found.max_rel_err:.0e} of the output's scale"
            )
            advance(index + 1, len(front))
    return {**env, "packages": job.versions}


def _judge_on_device(
    job: Job, networks: Networks, dense: DenseFigures, candidates: Sequence[Candidate], fingerprint: str
) -> tuple[DenseFigures, list[Candidate]]:
    """Measure every accuracy on the device, whose kernels, above all for int8, may differ from this machine's.

    Agreement and divergence are with the dense network on the device too.
    """
    labels = networks.reference.labels
    assert job.transport is not None and labels is not None
    judged: list[Candidate] = []
    differences: list[float] = []
    with job.stages.stage("accuracy on the device") as advance, tempfile.TemporaryDirectory() as scratch:
        pieces = {network.side: _save_images(network, Path(scratch)) for network in networks}
        logits = _device_logits(job, job.dense_file, pieces[None], fingerprint)
        own = Reference(labels, logits, compare_logits(logits, labels, None).accuracy_top1)
        for index, candidate in enumerate(candidates):
            side = networks.at(candidate.input_shape[-1]).side
            logits = _device_logits(job, job.artifact(candidate), pieces[side], fingerprint)
            judged.append(replace(candidate, **judge_logits(logits, own)))
            differences.append(abs((judged[-1].accuracy_top1 or 0.0) - (candidate.accuracy_top1 or 0.0)))
            advance(index + 1, len(candidates))
    job.note(
        f"accuracy was measured on {job.transport.name}, on {len(labels)} validation images; the row that "
        f"differs most from this machine's figure differs by {100 * max(differences, default=0.0):.2f} points"
    )
    interval = interval_of(own.accuracy, len(labels))
    return replace(dense, accuracy_top1=own.accuracy, accuracy_ci=interval, accuracy_images=len(labels)), judged


def _save_images(network: Network, folder: Path) -> list[Path]:
    """Write the validation images to files that are sent to the device, one for each batch."""
    assert network.images.validation is not None
    pieces: list[Path] = []
    for number, (batch, _) in enumerate(network.images.validation()):
        pieces.append(folder / f"images-{network.pixels}-{number:05d}.npy")
        np.save(pieces[-1], batch)
    return pieces


def _device_logits(job: Job, model: Path, pieces: Sequence[Path], fingerprint: str) -> Float32Array:
    """Return the device's answers for the validation images, which are stored."""
    assert job.transport is not None
    key = job.key(data=job.data_key, artifact=hash_file(model), target=job.target, fingerprint=fingerprint)
    stored = job.store.load_arrays(f"device_logits/{model.stem}", key)
    if stored is None:
        stored = {"logits": run_model_in_pieces(model, pieces, job.target, transport=job.transport)}
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
    """Return the warning that says why latency was not measured, and how to measure it."""
    if matches_this_machine(target):
        return "latency is not measured: --no-bench was given; run the same command without it to measure"
    return (
        f"latency is not measured: this machine is not {target.name} and no device was given; give --host USER@HOST, "
        f"or copy dense.onnx and the artifacts to one and run there: "
        f"mm-edge bench dense.onnx ARTIFACT.onnx --target {target.name}"
    )

"""Requests to a worker, and the records made of its answers. A device measures one thing at a time.

Raw samples are kept as JSON (SAMPLES_VERSION) together with the hashes of the models, the options and the fingerprint
of the machine. A second run over the same files on the same machine reads them instead of measuring again; samples of
another machine are never used.

SAMPLES_VERSION history:
    1  first version.
    2  disturbed, sittings, clocks_khz and load; the states have throttled.
    3  samples of PROCESSES worker processes, one after the other; a digest.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mm_edge.arrays import Float32Array
from mm_edge.bench import MINIMUM_PAIRS, host, stats
from mm_edge.bench.readiness import require_ready
from mm_edge.bench.target import Target, pattern_options
from mm_edge.bench.transport import DEFAULT_TIMEOUT_S, Transport, hash_sent_file
from mm_edge.errors import BenchError, UsageError
from mm_edge.records import Latency, parse_json
from mm_edge.store import SAMPLES_START, hash_key, refuse_link, starts_with, write_atomically

SAMPLES_VERSION = 3
# How many worker processes a pair is timed in. The ratio differs from process to process by about 0.7 % even where
# nothing else runs, so one process alone gives a ratio that the next run does not find again (benchmarks/load.py).
PROCESSES = 4
QUIET = 20  # the percentile of the samples that other programs hardly disturb
SECONDS_PER_IMAGE = 10.0  # a device that takes longer is taken to hang
SECONDS_PER_PAIR = 20.0  # likewise
MAX_SAMPLE_NS = 3_600_000_000_000  # an hour: anything longer is not a sample


@dataclass(frozen=True)
class Doubt:
    """One reason to doubt a measurement.

    Attributes:
        kind: what the doubt is about, such as "spread" or "clock".
        size: how large the effect is, as a fraction; 0 where it has no size.
        text: the sentence the user reads, with the remedy.
    """

    kind: str
    size: float
    text: str


UNUSABLE = "unusable"
MAX_WIDTH = 1e9  # stands for a measurement without any interval
_UNUSABLE_TEXT = "times are unusable and no speed-up is stated: stop other programs and measure again"

EMULATED = Doubt("emulated", 0.0, "emulated: the target's own kernels, but neither time nor memory is the device's")


@dataclass(frozen=True)
class Measurement:
    """Dense and candidate timed together.

    Attributes:
        latency: of the candidate; its numbers are None when the device is emulated.
        dense_latency: of the dense model, likewise.
        speedup: how many times faster the candidate is (see stats); None when the device is emulated or the times are
            unusable.
        speedup_ci: the 95 % interval of `speedup`.
        samples_file: where the raw samples are kept; None if they are not.
        doubts: why the figures may be wrong.
        quiet_ratio: the dense model's QUIET percentile divided by the candidate's. It varies less than `speedup` from
            one measurement to the next when other programs run, but it is not a speed-up that a user would see.
        ratio: `speedup`, also where the times are unusable: to plan by, and not to be reported.
        ratio_ci: the 95 % interval of `ratio`.
    """

    latency: Latency
    dense_latency: Latency
    speedup: float | None
    speedup_ci: tuple[float, float] | None
    samples_file: str | None
    doubts: tuple[Doubt, ...]
    quiet_ratio: float | None = None
    ratio: float | None = None
    ratio_ci: tuple[float, float] | None = None

    @property
    def verdict(self) -> str | None:
        """How far the times can be trusted: "stable", "noisy" or "unusable"; None when the device is emulated."""
        return self.latency.verdict


@dataclass(frozen=True)
class Footprint:
    """One model's memory, cold start and size, measured in a fresh process.

    Attributes:
        peak_rss_bytes: peak resident memory beyond the harness's own; None when the device is emulated.
        session_ms: time to load the model; None when the device is emulated.
        first_run_ms: time of the first inference; None when the device is emulated.
        file_bytes: size of the model's file.
        arena: whether ONNX Runtime's memory arena was on.
    """

    peak_rss_bytes: int | None
    session_ms: float | None
    first_run_ms: float | None
    file_bytes: int
    arena: bool


def environment(target: Target, transport: Transport) -> dict[str, Any]:
    """Return the environment record of the device behind `transport`; see host.describe.

    Raises:
        BenchError: the device lacks what measuring needs (the message gives the remedy), or its record is malformed.
    """
    info = read_info(transport)
    require_ready(info, transport.name)
    return host.describe_machine(info, target, transport.name)


def read_info(transport: Transport) -> dict[str, Any]:
    """Return the device's checked info record, even if the device lacks something; BenchError if it is malformed."""
    return _checked_info(transport.ask("info", {}, {}), transport.name)


def measure_pair(
    dense: Path,
    candidate: Path,
    target: Target,
    *,
    transport: Transport,
    pairs: int = MINIMUM_PAIRS,
    raw_samples: Path | None = None,
    fingerprint: str | None = None,
) -> Measurement:
    """Time `dense` and `candidate` interleaved, in PROCESSES worker processes one after the other.

    Args:
        dense: the reference model.
        candidate: the model compared with it.
        target: gives threads, affinity, provider and session options.
        transport: the open transport to the device.
        pairs: how many pairs of runs.
        raw_samples: the file that keeps the samples. If it already holds samples of the same models with the same
            settings on the machine of `fingerprint`, they are used and nothing is measured.
        fingerprint: the fingerprint of the environment; without it kept samples are never used.

    Raises:
        BenchError: the worker could not measure; the message says why.
    """
    if transport.source == EMULATED.kind:
        return Measurement(Latency(), Latency(), None, None, None, (EMULATED,))
    options = {**run_options(target), "pairs": pairs}
    identity = {
        "dense": hash_sent_file(dense),
        "candidate": hash_sent_file(candidate),
        "options": options,
        "fingerprint": fingerprint,
    }
    _refuse_foreign(raw_samples)
    result = _reuse(raw_samples, identity)
    if result is None:
        result = _take_samples({"dense": dense, "candidate": candidate}, options, pairs, transport)
        if raw_samples is not None:
            document = {
                "samples_version": SAMPLES_VERSION,
                "identity": identity,
                "digest": hash_key(result),
                "result": result,
            }
            write_atomically(raw_samples, json.dumps(document).encode())
    return _summarise(result, transport.source, raw_samples, pairs)


def _take_samples(
    files: Mapping[str, Path], options: Mapping[str, Any], pairs: int, transport: Transport
) -> dict[str, Any]:
    """Return the checked samples of all processes together, as one process would send them."""
    results = []
    for number in range(PROCESSES):
        own = pairs * (number + 1) // PROCESSES - pairs * number // PROCESSES
        result = transport.ask("measure", files, {**options, "pairs": own}, SECONDS_PER_PAIR * own + DEFAULT_TIMEOUT_S)
        _check_samples(result, own, transport.name)
        results.append(result)
    joined = {
        key: [item for result in results for item in result[key]]
        for key in ("dense_ns", "candidate_ns", "disturbed", "sittings", "clocks_khz")
    }
    return {
        **results[0],
        **joined,
        "warm_up_stable": all(result["warm_up_stable"] for result in results),
        "after": results[-1]["after"],
        "load": _mean_load([result["load"] for result in results]),
    }


def _mean_load(loads: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean load; None for what a process did not know."""
    taken = {key: [load[key] for load in loads] for key in ("others", "stolen")}
    means = {key: None if None in values else float(np.mean(values)) for key, values in taken.items()}
    return {"cores": loads[0]["cores"], **means}


def measure_memory(model: Path, target: Target, *, transport: Transport) -> int | None:
    """Return the peak resident bytes `model` adds in a fresh worker process; None when the device is emulated."""
    return measure_footprint(model, target, transport=transport).peak_rss_bytes


def measure_footprint(model: Path, target: Target, *, transport: Transport, arena: bool = True) -> Footprint:
    """Return memory, cold start and file size of `model`, with ONNX Runtime's memory arena on if `arena`, else off.

    Raises:
        BenchError: the worker could not measure; the message says why.
    """
    if transport.source == EMULATED.kind:
        return Footprint(None, None, None, model.stat().st_size, arena)
    result = transport.ask("memory", {"model": model}, {**run_options(target), "arena": arena})
    keys = ("peak_rss_bytes", "session_ns", "first_run_ns", "file_bytes")
    peak, load_ns, first_ns, size = (_natural(result, key, transport.name) for key in keys)
    return Footprint(peak, load_ns / 1e6, first_ns / 1e6, size, arena)


def measure_null(target: Target, *, transport: Transport, runs: int = 1000) -> float | None:
    """Return the harness's own cost per inference in milliseconds (median); None when the device is emulated."""
    if transport.source == EMULATED.kind:
        return None
    result = transport.ask("null", {}, {**run_options(target), "pairs": runs})
    return stats.percentile_ms(_samples(result, "null_ns", runs, transport.name), 50)


def measure_products(
    products: Sequence[tuple[int, int, int]], target: Target, *, transport: Transport, runs: int = MINIMUM_PAIRS
) -> list[tuple[list[int], list[int]]]:
    """Time matrix products (rows, inputs, outputs) dense and 2:4 on the device's GPU; nanoseconds, `runs` samples each.

    Raises:
        BenchError: the device has no PyTorch or no GPU with 2:4 kernels, or its answer is malformed.
    """
    options = {**run_options(target), "products": [list(item) for item in products], "runs": runs}
    result = transport.ask("products", {}, options)
    lists = [result.get(key) for key in ("dense_ns", "sparse_ns")]
    if not all(isinstance(item, list) and len(item) == len(products) for item in lists):
        raise BenchError(f"{transport.name} sent no samples for the {len(products)} products; the answer was refused")
    kinds = [
        [_samples({"product_ns": samples}, "product_ns", runs, transport.name) for samples in item]
        for item in lists
        if isinstance(item, list)
    ]
    return list(zip(*kinds, strict=True))


def run_model(model: Path, images: Path, target: Target, *, transport: Transport) -> Float32Array:
    """Return the first output of `model` on the device for every row of the .npy file `images`.

    Raises:
        BenchError: the images cannot be read, the worker could not run the model, or its answer is malformed.
    """
    try:
        count = len(np.load(images, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError) as error:
        raise BenchError(f"cannot read the images {images}: {error}") from error
    files = {"model": model, "images": images}
    result = transport.ask("evaluate", files, run_options(target), DEFAULT_TIMEOUT_S + SECONDS_PER_IMAGE * count)
    shape = result.get("shape")
    if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape):
        raise BenchError(f"{transport.name} sent outputs of shape {shape!r}")
    if shape[:1] != [count]:
        raise BenchError(f"{transport.name} sent outputs of shape {shape} for {count} images")
    try:
        data = base64.b64decode(str(result.get("data")), validate=True)
    except ValueError as error:
        raise BenchError(f"{transport.name} sent outputs that are not base64") from error
    if len(data) != 4 * math.prod(shape):
        raise BenchError(f"{transport.name} sent {len(data)} bytes for outputs of shape {shape}")
    outputs = np.frombuffer(data, dtype="<f4").reshape(shape).astype(np.float32)
    bad = int(np.isnan(outputs.reshape(count, -1)).any(axis=1).sum())
    if bad:
        raise BenchError(
            f"{transport.name} sent NaN for {bad} of {count} images: {model.name} does not run right there; try "
            "another provider or precision"
        )
    return outputs


def run_model_in_pieces(model: Path, pieces: Sequence[Path], target: Target, *, transport: Transport) -> Float32Array:
    """Return the first output of `model` on the device for every row of the .npy files `pieces`, in their order.

    Small pieces need little memory on the device, and each is sent once for all models.
    """
    return np.concatenate([run_model(model, piece, target, transport=transport) for piece in pieces])


def run_options(target: Target) -> dict[str, Any]:
    """Return the options every worker command takes from the target."""
    return {
        "threads": 0 if target.threads == "auto" else target.threads,
        "affinity": list(target.affinity),
        "provider": target.provider,
        "provider_options": pattern_options(target),
        "session_options": target.session_options,
    }


def _summarise(result: Mapping[str, Any], source: str, samples_file: Path | None, asked: int) -> Measurement:
    sittings, threads = result["sittings"], result["threads"]
    used = stats.usable_pairs(result["disturbed"], sittings, asked)
    ratios = stats.sitting_ratios(result["dense_ns"], result["candidate_ns"], sittings, used)
    ratio, interval = stats.mean_ratio(ratios, _busy_share(result))
    kept = np.concatenate(used)
    dense_ns, candidate_ns = (np.asarray(result[key])[kept].tolist() for key in ("dense_ns", "candidate_ns"))
    doubts = _doubts(result, dense_ns, candidate_ns)
    width = stats.half_width(ratio, interval)
    verdict = _verdict(doubts, width)
    if verdict == UNUSABLE:
        text = f"{_UNUSABLE_TEXT} ({_width_text(width)}); {_load_text(result)}"
        doubts = [Doubt(UNUSABLE, min(width, MAX_WIDTH), text), *doubts]
    stated = verdict != UNUSABLE
    return Measurement(
        latency=stats.summarise_latency(candidate_ns, threads, source, verdict),
        dense_latency=stats.summarise_latency(dense_ns, threads, source, verdict),
        speedup=ratio if stated else None,
        speedup_ci=interval if stated else None,
        samples_file=str(samples_file) if samples_file else None,
        doubts=tuple(doubts),
        quiet_ratio=float(np.percentile(dense_ns, QUIET) / np.percentile(candidate_ns, QUIET)),
        ratio=ratio,
        ratio_ci=interval,
    )


def _verdict(doubts: Sequence[Doubt], width: float) -> str:
    """Return the verdict; see stats. Any doubt but that of the samples' spread, which no ratio needs, means noise."""
    if width > stats.UNUSABLE_WIDTH:
        return UNUSABLE
    noisy = width > stats.STABLE_WIDTH or any(doubt.kind != "spread" for doubt in doubts)
    return "noisy" if noisy else "stable"


def _width_text(width: float) -> str:
    return "no interval" if width == float("inf") else f"the interval is +-{width:.0%}"


def _busy_share(result: Mapping[str, Any]) -> float:
    """Return the share of the device's cores that other programs and the hypervisor took; 0 where it does not say."""
    load = result["load"]
    return float(((load["others"] or 0.0) + (load["stolen"] or 0.0)) / load["cores"])


def _load_text(result: Mapping[str, Any]) -> str:
    """Return what others took of the device, and how many pairs they disturbed."""
    load, share = result["load"], np.mean(result["disturbed"])
    found = f"{share:.0%} of the pairs were disturbed"
    if load["others"] is None:
        return found
    taken = f"other programs kept {load['others']:.1f} of {load['cores']} cores busy"
    stolen = f", the hypervisor took {load['stolen']:.1f}" if load["stolen"] >= 0.05 else ""
    return f"{taken}{stolen}; {found}"


def merge_doubts(measurements: Sequence[Measurement]) -> list[str]:
    """Return one sentence per kind of doubt: the largest doubt's, and how many measurements have that kind.

    That times are unusable comes first.
    """
    kinds: dict[str, list[Doubt]] = {}
    for measurement in measurements:
        for doubt in measurement.doubts:
            kinds.setdefault(doubt.kind, []).append(doubt)
    sentences = []
    for found in sorted(kinds.values(), key=lambda found: found[0].kind != UNUSABLE):
        worst = max(found, key=lambda doubt: doubt.size).text
        share = f" (the worst of {len(found)} such among {len(measurements)} measurements)" if len(found) > 1 else ""
        sentences.append(f"{worst}{share}")
    return sentences


def _doubts(result: Mapping[str, Any], dense_ns: Sequence[int], candidate_ns: Sequence[int]) -> list[Doubt]:
    """Return the reasons to doubt a measurement; the samples are those of the pairs that are used."""
    found = []
    share = float(np.mean(result["disturbed"]))
    taken = _busy_share(result)
    if share > 1 - stats.STABLE_SHARE or taken > stats.STABLE_LOAD:
        text = f"the device was busy while measuring: {_load_text(result)}; stop other programs and measure again"
        found.append(Doubt("load", max(share, taken), text))
    wide = max(stats.spread(samples) for samples in (dense_ns, candidate_ns))
    if wide > stats.SPREAD_LIMIT:
        text = (
            f"the spread of the samples is {wide:.0%} of their median: stop other programs, set the CPU governor to "
            "performance, or lower the target's thread count, and measure again"
        )
        found.append(Doubt("spread", wide, text))
    slower = stats.drift(dense_ns)
    if slower > stats.DRIFT_LIMIT:
        text = (
            f"the dense model ended {slower:.0%} slower than it began: the device throttles or is loaded; let it cool"
        )
        found.append(Doubt("drift", slower, text))
    found += _heat(result)
    if not result["warm_up_stable"]:
        found.append(Doubt("warm-up", 0.0, "warm-up did not settle: stop other programs and measure again"))
    return found


def _heat(result: Mapping[str, Any]) -> list[Doubt]:
    """Return doubts about the clock: lower at the end or in some sitting, or lowered by the cores against heat."""
    before, after = result["before"], result["after"]
    clocks = [
        clock for clock in (before.get("frequency_khz"), *result["clocks_khz"], after.get("frequency_khz")) if clock
    ]
    found = []
    if clocks and min(clocks) < max(clocks) * (1 - stats.DRIFT_LIMIT):
        text = (
            f"the clock was between {min(clocks) / 1000:.0f} and {max(clocks) / 1000:.0f} MHz while measuring: let the "
            "device cool, or fix its clock"
        )
        found.append(Doubt("clock", 1 - min(clocks) / max(clocks), text))
    slowed = (after.get("throttled") or 0) - (before.get("throttled") or 0)
    if slowed > 0:
        text = f"the cores were slowed down against heat {slowed} times while measuring: let the device cool"
        found.append(Doubt("throttled", float(slowed), text))
    return found


# --- what a device sends is checked before it is used ---------------------------------------------------------------


def _check_samples(result: Mapping[str, Any], pairs: int, device: str) -> None:
    for key in ("dense_ns", "candidate_ns"):
        _samples(result, key, pairs, device)
    if len(result["dense_ns"]) != len(result["candidate_ns"]):
        raise BenchError(f"{device} sent unequal numbers of samples; the answer was refused")
    for key in ("block", "threads"):
        if _natural(result, key, device) < 1:
            raise BenchError(f"{device} sent {key} {result[key]!r}; the answer was refused")
    if type(result.get("warm_up_stable")) is not bool:
        raise BenchError(f"{device} sent no warm_up_stable; the answer was refused")
    for key in ("before", "after"):
        state = result.get(key)
        for name in ("frequency_khz", "throttled"):
            count = state.get(name) if isinstance(state, dict) else "no record"
            if count is not None and (type(count) is not int or count < 0):
                raise BenchError(f"{device} sent {key} {count!r}; the answer was refused")
    _check_disturbances(result, device)


def _check_disturbances(result: Mapping[str, Any], device: str) -> None:
    count = len(result["dense_ns"])
    disturbed, sittings, clocks, load = (result.get(key) for key in ("disturbed", "sittings", "clocks_khz", "load"))
    if not isinstance(disturbed, list) or len(disturbed) != count or not all(item in (0, 1) for item in disturbed):
        raise BenchError(f"{device} sent disturbed that does not mark {count} pairs; the answer was refused")
    naturals = all(
        isinstance(items, list) and all(type(item) is int and item > 0 for item in items)
        for items in (sittings, clocks)
    )
    if not naturals or not isinstance(sittings, list) or sum(sittings) != count:
        raise BenchError(f"{device} sent sittings {sittings!r} for {count} pairs; the answer was refused")
    if not isinstance(load, dict) or not (type(load.get("cores")) is int and load["cores"] > 0):
        raise BenchError(f"{device} sent load {load!r}; the answer was refused")
    for key in ("others", "stolen"):
        if load.get(key) is not None and not (type(load[key]) in (int, float) and 0 <= load[key] < MAX_WIDTH):
            raise BenchError(f"{device} sent load {load!r}; the answer was refused")


def _samples(result: Mapping[str, Any], key: str, least: int, device: str) -> list[int]:
    values = result.get(key)
    if not isinstance(values, list) or not all(type(v) is int and 0 < v < MAX_SAMPLE_NS for v in values):
        raise BenchError(f"{device} sent {key} that are not times; the answer was refused")
    if not least <= len(values) <= 2 * least + 16:
        raise BenchError(f"{device} sent {len(values)} {key} where {least} were asked for; the answer was refused")
    return values


def _natural(result: Mapping[str, Any], key: str, device: str) -> int:
    value = result.get(key)
    if type(value) is not int or not 0 <= value < 1 << 60:
        raise BenchError(f"{device} sent {key} {value!r}; the answer was refused")
    return value


_INFO_KINDS: dict[str, tuple[type, ...]] = {
    "isa": (str,),
    "cpu_model": (str,),
    "flags": (list,),
    "cpu_parts": (list,),
    "cores": (int,),
    "physical_cores": (int,),
    "threads_auto": (int,),
    "governors": (list,),
    "frequency_khz": (int, type(None)),
    "temperature_c": (float, int, type(None)),
    "memory_bytes": (int, type(None)),
    "memory_available_bytes": (int, type(None)),
    "os": (str,),
    "host": (str,),
    "python": (str,),
    "numpy": (str, type(None)),
    "onnxruntime": (str, type(None)),
    "onnxruntime_error": (str, type(None)),
    "providers": (list,),
    "emulated": (bool,),
}


def _checked_info(info: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Return the known fields of an info record; BenchError if one is of the wrong kind."""
    for key, kinds in _INFO_KINDS.items():
        if key not in info or not isinstance(info[key], kinds):
            raise BenchError(f"{device} sent {key} {info.get(key)!r}; the answer was refused")
        if type(info[key]) is int and not 0 <= info[key] < 1 << 60:
            raise BenchError(f"{device} sent {key} {info[key]!r}; the answer was refused")
        if isinstance(info[key], list) and not all(isinstance(item, str) for item in info[key]):
            raise BenchError(f"{device} sent {key} that are not names; the answer was refused")
    return {key: info[key] for key in _INFO_KINDS}


# --- raw samples ----------------------------------------------------------------------------------------------------


def _refuse_foreign(path: Path | None) -> None:
    """Refuse to replace a file that does not start as a file of samples does; an empty one holds nothing to lose."""
    if path is None or not path.exists():
        return
    refuse_link(path)
    if path.stat().st_size and not starts_with(path, SAMPLES_START):
        raise UsageError(f"'{path}' is no file of samples and would be overwritten; move it, or give another folder")


def _reuse(path: Path | None, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the result kept in `path` if it was measured on the same files with the same settings, else None."""
    if path is None or identity["fingerprint"] is None or not path.is_file():
        return None
    try:
        kept = parse_json(path.read_text(encoding="utf-8"))
        if kept["samples_version"] != SAMPLES_VERSION or kept["identity"] != identity:
            return None
        if kept["digest"] != hash_key(kept["result"]):
            return None
        _check_samples(kept["result"], identity["options"]["pairs"], str(path))
    except (OSError, ValueError, KeyError, TypeError, BenchError):
        return None  # not a file of samples, or damaged: the caller measures again and replaces it
    result: dict[str, Any] = kept["result"]
    return result

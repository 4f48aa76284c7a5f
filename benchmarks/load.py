"""Whether times can be trusted on a loaded machine: speed-ups, their intervals and their verdicts under three loads.

    python benchmarks/load.py DEMO [--loaded 100] [--pairs 200] [--minutes 14] [--out benchmarks/results/load.json]

DEMO is a run folder of `mm-edge demo`. Three pairs are timed: the demo's dense network against one pruned candidate,
against itself on smaller images, and two stacks of convolutions that are made here. In turn, round after round, this
script loads the machine with nothing (every second round), one busy core, bursts (two programs that work and sleep at
random, 0.3 s each in the mean) and memory traffic (one program that copies 128 MB back and forth).

The quiet ratio of a pair is the geometric mean of its five measurements of least load, among those without a load of
this script. What else the machine did is in every row (`others`, the cores that other programs kept busy while
measuring; `undisturbed`, the share of pairs): nothing here can make a shared machine quiet.

    covered    the interval holds the quiet ratio (the raw interval too where the verdict is unusable)
    right      stable: within 3 % of the quiet ratio; noisy: within 10 %; unusable: said under a load of this script
               or where others kept a quarter of the cores busy

Estimators that were considered are computed from the same samples. Their error is against the quiet ratio that the same
estimator gives on the quiet measurements, so that none is favoured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper, save

from mm_edge.bench import MINIMUM_PAIRS, stats
from mm_edge.bench.session import Measurement, measure_pair
from mm_edge.bench.target import Target, load_target, resolve_host
from mm_edge.bench.transport import LocalTransport
from mm_edge.store import write_atomically

PROMISES = {"stable": 0.03, "noisy": 0.10}
QUIET_RUNS = 5


def keep_busy() -> None:
    while True:
        pass


def work_in_bursts() -> None:
    chance = random.Random()
    while True:
        until = time.monotonic() + chance.expovariate(1 / 0.3)
        while time.monotonic() < until:
            pass
        time.sleep(chance.expovariate(1 / 0.3))


def move_memory() -> None:
    source, target = np.ones(16_000_000), np.zeros(16_000_000)
    while True:
        target[:] = source
        source[:] = target


LOADS: dict[str, tuple[Callable[[], None], ...]] = {
    "none": (),
    "busy core": (keep_busy,),
    "bursts": (work_in_bursts, work_in_bursts),
    "memory": (move_memory,),
}


@contextmanager
def loaded(name: str) -> Iterator[None]:
    started = [multiprocessing.Process(target=work, daemon=True) for work in LOADS[name]]
    for process in started:
        process.start()
    try:
        time.sleep(0.5 if started else 0.0)
        yield
    finally:
        for process in started:
            process.kill()
            process.join()


def save_convs(path: Path, channels: int, size: int = 24) -> Path:
    """Save three 3x3 convolutions of `channels` channels, input (1, 3, size, size)."""
    generator = np.random.default_rng(channels)
    nodes, weights, last, width = [], [], "input", 3
    for index in range(3):
        array = (generator.standard_normal((channels, width, 3, 3)) / np.sqrt(9 * width)).astype(np.float32)
        weights.append(numpy_helper.from_array(array, f"w{index}"))
        nodes.append(helper.make_node("Conv", [last, f"w{index}"], [f"c{index}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{index}"], [f"r{index}"]))
        last, width = f"r{index}", channels
    shapes = ([1, 3, size, size], [1, channels, size, size])
    feed, answer = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in zip(("input", last), shapes, strict=True)
    )
    graph = helper.make_graph(nodes, "convs", [feed], [answer], weights)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def find_pairs(demo: Path, folder: Path) -> dict[str, tuple[Path, Path]]:
    report = json.loads((demo / "report.json").read_text())
    made = {item["id"]: demo / item["artifact"] for item in report["candidates"]}
    pruned = next(path for name, path in made.items() if "/balanced/structured/fp32" in name)
    smaller = next(path for name, path in made.items() if name.startswith("dense@"))
    return {
        "demo, pruned": (demo / "dense.onnx", pruned),
        "demo, smaller images": (demo / "dense.onnx", smaller),
        "convolutions": (save_convs(folder / "wide.onnx", 64), save_convs(folder / "narrow.onnx", 40)),
    }


# --- estimators -----------------------------------------------------------------------------------------------------


def estimate(result: Mapping[str, Any], asked: int) -> dict[str, float]:
    """Return the ratio by every estimator considered, from the samples of one measurement."""
    dense, candidate = (np.asarray(result[key], dtype=np.float64) for key in ("dense_ns", "candidate_ns"))
    calm = np.asarray(result["disturbed"]) == 0
    calm = calm if calm.sum() >= asked // 4 else np.ones_like(calm)
    used = stats.usable_pairs(result["disturbed"], result["sittings"], asked)
    by_sitting = stats.sitting_ratios(result["dense_ns"], result["candidate_ns"], result["sittings"], used)
    return {
        "median of pair ratios": float(np.median(dense / candidate)),
        "median of ratios of undisturbed pairs": float(np.median((dense / candidate)[calm])),
        "regression through the origin on undisturbed pairs": float(
            (dense[calm] @ candidate[calm]) / (candidate[calm] @ candidate[calm])
        ),
        "ratio of 20th percentiles": float(np.percentile(dense, 20) / np.percentile(candidate, 20)),
        "ratio of 10th percentiles of undisturbed pairs, mean of sittings": stats.mean_ratio(by_sitting)[0],
    }


def compare_estimators(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return for each estimator its mean and root mean square error in percent, by load."""
    rows = [row for row in rows if "estimates" in row]
    found: dict[str, dict[str, float]] = {}
    for name in rows[0]["estimates"]:
        quiet = {
            pair: geometric_mean([row["estimates"][name] for row in quietest(rows, pair)]) for pair in pairs_of(rows)
        }
        found[name] = {}
        for load in LOADS:
            errors = [100 * math.log(r["estimates"][name] / quiet[r["pair"]]) for r in rows if r["load"] == load]
            if errors:
                found[name][f"{load}: mean error, %"] = round(float(np.mean(errors)), 2)
                found[name][f"{load}: rms error, %"] = round(float(np.sqrt(np.mean(np.square(errors)))), 2)
    return found


# --- verdicts -------------------------------------------------------------------------------------------------------


def pairs_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["pair"] for row in rows))


def quietest(rows: Sequence[Mapping[str, Any]], pair: str) -> list[Mapping[str, Any]]:
    quiet = [row for row in rows if row["pair"] == pair and row["load"] == "none"]
    return sorted(quiet, key=lambda row: (row["others"] or 0.0) - row["undisturbed"])[:QUIET_RUNS]


def geometric_mean(values: Sequence[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def judge(row: Mapping[str, Any], quiet: float) -> dict[str, bool]:
    lo, hi = row["ratio_ci"]
    error = abs(row["ratio"] / quiet - 1)
    busy = row["load"] != "none" or (row["others"] or 0.0) > stats.STABLE_LOAD * (os.cpu_count() or 1)
    right = busy if row["verdict"] == "unusable" else error <= PROMISES[row["verdict"]]
    return {"covered": lo <= quiet <= hi, "right": right}


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    quiet = {pair: geometric_mean([row["ratio"] for row in quietest(rows, pair)]) for pair in pairs_of(rows)}
    judged = [{**row, **judge(row, quiet[row["pair"]])} for row in rows]
    loads = {}
    for load in LOADS:
        own = [row for row in judged if row["load"] == load]
        loads[load] = {
            "measurements": len(own),
            "covered": sum(row["covered"] for row in own),
            "verdicts right": sum(row["right"] for row in own),
            "verdicts": {name: sum(row["verdict"] == name for row in own) for name in ("stable", "noisy", "unusable")},
            "cores kept busy by others and by the load, mean": round(
                float(np.mean([r["others"] or 0 for r in own])), 2
            ),
        }
    under_load = [row for row in judged if row["load"] != "none"]
    return {
        "quiet ratios": {pair: round(value, 4) for pair, value in quiet.items()},
        "largest over smallest of the quiet runs": {
            pair: round(max(r["ratio"] for r in runs) / min(r["ratio"] for r in runs), 4)
            for pair in quiet
            for runs in [quietest(rows, pair)]
        },
        "cores kept busy by others in the quiet runs": {
            pair: [round(row["others"] or 0.0, 2) for row in quietest(rows, pair)] for pair in quiet
        },
        "under load": {
            "measurements": len(under_load),
            "covered": sum(row["covered"] for row in under_load),
            "verdicts right": sum(row["right"] for row in under_load),
        },
        "loads": loads,
        "estimators": {
            "measurements": sum("estimates" in row for row in rows),
            "errors": compare_estimators(rows),
        },
        "rows": judged,
    }


# --- measuring ------------------------------------------------------------------------------------------------------


def describe(found: Measurement, samples: Path, asked: int) -> dict[str, Any]:
    result = json.loads(samples.read_text())["result"]
    assert found.ratio is not None
    ratio, interval = found.ratio, found.ratio_ci or (0.0, math.inf)
    return {
        "verdict": found.verdict,
        "ratio": round(ratio, 4),
        "ratio_ci": [round(edge, 4) for edge in interval],
        "others": result["load"]["others"],
        "stolen": result["load"]["stolen"],
        "undisturbed": round(1 - float(np.mean(result["disturbed"])), 3),
        "pairs": len(result["disturbed"]),
        "loadavg": os.getloadavg()[0],
        "estimates": {name: round(value, 4) for name, value in estimate(result, asked).items()},
    }


def measure_all(arguments: argparse.Namespace, target: Target, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add measurements to `rows` until there are as many under load as were asked for, or the time is over."""
    deadline = time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory() as folder, LocalTransport() as here:
        pairs = find_pairs(arguments.demo, Path(folder))
        samples = Path(folder) / "samples.json"
        for number in itertools.count():
            if sum(row["load"] != "none" for row in rows) >= arguments.loaded or time.monotonic() > deadline:
                break
            for load in list(LOADS)[number % 2 :]:
                with loaded(load):
                    for pair, (dense, candidate) in pairs.items():
                        samples.unlink(missing_ok=True)
                        found = measure_pair(
                            dense, candidate, target, transport=here, pairs=arguments.pairs, raw_samples=samples
                        )
                        rows.append({"load": load, "pair": pair, **describe(found, samples, arguments.pairs)})
                        print(load, pair, rows[-1]["verdict"], rows[-1]["ratio"], rows[-1]["ratio_ci"], file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--loaded", type=int, default=100, help="measurements under load")
    parser.add_argument("--pairs", type=int, default=MINIMUM_PAIRS)
    parser.add_argument("--minutes", type=float, default=14.0, help="start no new round after this")
    parser.add_argument("--extend", action="store_true", help="add to the measurements in --out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "load.json")
    arguments = parser.parse_args()
    target = replace(resolve_host(load_target("host")), threads=1)
    start = time.monotonic()
    kept = json.loads(arguments.out.read_text()) if arguments.extend else {"rows": [], "minutes": 0.0}
    rows = measure_all(arguments, target, kept["rows"])
    document = {
        "what": "speed-ups, intervals and verdicts under load; see benchmarks/load.py",
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": {name: version(name) for name in ("onnxruntime", "numpy")},
        "pairs asked for": arguments.pairs,
        "minutes": round(kept["minutes"] + (time.monotonic() - start) / 60, 1),
        **summarise(rows),
    }
    write_atomically(arguments.out, (json.dumps(document, indent=1) + "\n").encode())


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()

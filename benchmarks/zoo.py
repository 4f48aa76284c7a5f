"""One network of every timm module through the structured part of the pipeline.

    python benchmarks/zoo.py --work DIR [--jobs N] [--only FAMILY,...] [--limit SECONDS]
    python benchmarks/zoo.py --page
    python benchmarks/zoo.py --compare FILE

For each module the smallest network of at least a million parameters (inputs up to 256 pixels preferred). Its norms,
layer scales and BatchNorm statistics are randomised, so that exactness means something. Each network runs in a
process of its own and leaves DIR/FAMILY.json; a second call goes on where the first stopped. When none is left the
rows are gathered in benchmarks/results/zoo.json, from which --page writes docs/zoo.md; --compare holds another run's
file beside it.

The three signals are planned to see that they can be and how long it takes. Gradients are seeded noise: nothing here
says anything about accuracy.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import copy
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mm_edge  # before timm, which it makes importable beside CPU-only torch

# isort: split
import numpy as np
import timm
import torch
from torch import nn

from mm_edge.bench.target import load_target
from mm_edge.graph.axes import Keep
from mm_edge.graph.compact import mask_tensors, materialise
from mm_edge.graph.deploy import deploy
from mm_edge.graph.export import RawGraph, export_raw
from mm_edge.graph.groups import Structure, read_structure
from mm_edge.graph.layers import read_layer_weights, read_layers
from mm_edge.graph.widths import group_scores, select_indices
from mm_edge.plan.plans import ChannelPlan, plan_all
from mm_edge.plan.ranges import apply_constraints, rule_ranges
from mm_edge.plan.scaling import plan_budget
from mm_edge.plan.scores import score_weights
from mm_edge.plan.signals import SIGNALS
from mm_edge.plan.strategies import STRATEGIES, assign
from mm_edge.plan.target_widths import allowed_widths_on
from mm_edge.quality.parity import TOLERANCE, compare, onnx_runner, torch_runner

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "zoo.json"
PEERS = ROOT / "benchmarks" / "results" / "zoo_peers.json"
PAGE = ROOT / "docs" / "zoo.md"
PEER_NAMES = ("torch-pruning", "onnxsim")
TARGET = "x86_64-avx512"
BUDGET = 0.50
BUDGET_SLACK = 0.03
WANTED_RATIO = 0.75
SMALLEST = 1e6
LARGE = 40e6
LARGE_LIMIT_FACTOR = 5
CALIBRATION_IMAGES = 4


def representatives() -> dict[str, dict[str, Any]]:
    """Return, per timm module, its smallest real network: name, input shape and parameters."""
    from timm.models import _registry

    best: dict[str, tuple[bool, int, str, tuple[int, int, int]]] = {}
    for name in timm.list_models():
        if name.startswith("test_"):
            continue
        config = timm.get_pretrained_cfg(name, allow_unregistered=True)
        size = tuple(config.input_size) if config is not None else (3, 224, 224)
        try:
            with torch.device("meta"):
                module = timm.create_model(name)
        except Exception:
            continue
        count = sum(parameter.numel() for parameter in module.parameters())
        if count >= SMALLEST:
            found = (size[-1] > 256, count, name, size)
            family = _registry._model_to_module[name]
            best[family] = min(best.get(family, found), found)
    return {
        family: {"name": name, "input_shape": size, "params": count}
        for family, (_, count, name, size) in sorted(best.items())
    }


def randomise_(module: nn.Module, shape: Sequence[int]) -> None:
    """Give norms, biases, layer scales and BatchNorm statistics values of their own; keep activations in bounds."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            largest = float(parameter.abs().max())
            if parameter.ndim <= 1 or parameter.numel() == max(parameter.shape):
                noise = torch.randn(parameter.shape, generator=generator)
                if largest > 0.5:
                    parameter.add_(0.2 * noise)
                elif "gamma" in name or "ls" in name:
                    parameter.copy_(torch.rand(parameter.shape, generator=generator) * 0.4 + 0.3)
                else:
                    parameter.copy_(0.1 * noise)
            elif largest < 1e-3:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
        norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
        hooks = [part.register_forward_pre_hook(set_statistics) for part in norms if part.running_mean is not None]
        generator.manual_seed(2)
        module(torch.randn(CALIBRATION_IMAGES, *shape, generator=generator))
    for hook in hooks:
        hook.remove()


def set_statistics(part: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
    """Give a BatchNorm the statistics of what it is about to read, disturbed, so that its result stays in bounds."""
    x = arguments[0].transpose(0, 1).flatten(1)
    mean, var = x.mean(1), x.var(1)
    # Noise images are alike: variances of pooled features are all but zero and would magnify rounding.
    var = torch.maximum(var, torch.maximum(0.1 * var.mean(), 0.01 * mean.square()))
    generator = torch.Generator().manual_seed(len(mean))
    part.get_buffer("running_mean").copy_(mean + 0.1 * var.sqrt() * torch.randn(len(mean), generator=generator))
    part.get_buffer("running_var").copy_(var * (0.5 + torch.rand(len(mean), generator=generator)))


@contextmanager
def timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[what] = round(time.perf_counter() - started, 3)


def measure(name: str, shape: Sequence[int]) -> dict[str, Any]:
    """Return one network's row; what was not reached is missing, and `error` says why."""
    torch.manual_seed(0)
    row: dict[str, Any] = {"seconds": {}}
    seconds = row["seconds"]
    module = timm.create_model(name).eval()
    inputs = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    randomise_(module, shape)
    with timed(seconds, "export"):
        raw = export_raw(module, inputs[:1])
    images = inputs.numpy()
    row["dense_error"] = compare(onnx_runner(raw.model), torch_runner(module), images, "noise").max_rel_err
    with timed(seconds, "read"):
        structure = read_structure(raw)
        layers = read_layers(raw)
    row |= {"macs": structure.macs(), "layers": len(layers), "groups": len(structure.groups), "pins": pins(structure)}
    weights = read_layer_weights(raw, layers)
    rng = np.random.default_rng(0)
    noise = {fqn: rng.standard_normal(array.shape, dtype=np.float32) for fqn, array in weights.items()}
    scores = score_weights(weights, noise, tuple(SIGNALS))
    ranges = apply_constraints(layers, rule_ranges(layers, type(module).__name__), structured=True)
    allowed = allowed_widths_on(structure, layers, load_target(TARGET))
    with timed(seconds, "plan_30"):
        assignments = [item for signal in SIGNALS for item in assign(tuple(STRATEGIES), signal, layers, ranges)]
        plans = plan_all(structure, layers, allowed, scores, assignments, ("structured",))
    row["planned"] = sum(len(plan.assignment.names) for plan in plans)
    # Strategies that come to the same widths share a plan, which is called by the first of them.
    named = (plan for plan in plans if plan.assignment.signal == "magnitude" and "balanced" in plan.assignment.names)
    balanced = next(named)
    assert isinstance(balanced, ChannelPlan)
    row["balanced"] = check(module, raw, structure, balanced.keep, images)
    with timed(seconds, "plan_budget"):
        _, counts = plan_budget(structure, layers, allowed, ranges, BUDGET)
        keep = select_indices(counts, group_scores(structure, scores["magnitude"]))
    row["budget"] = check(module, raw, structure, keep, images)
    return row


def check(module: nn.Module, raw: RawGraph, structure: Structure, keep: Keep, images: np.ndarray) -> dict[str, Any]:
    """Materialise `keep` and compare it with the masked module."""
    started = time.perf_counter()
    run = onnx_runner(deploy(materialise(raw, structure, keep)))
    seconds = time.perf_counter() - started
    masked = copy.deepcopy(module)
    parameters = dict(masked.named_parameters())
    with torch.no_grad():
        for name, mask in mask_tensors(structure, keep).items():
            parameters[name].mul_(torch.from_numpy(mask.dense()))
    parity = compare(run, torch_runner(masked), images, "noise")
    counts = {leaf: float(mask.sum()) for leaf, mask in keep.items()}
    return {
        "macs_ratio": structure.macs(counts) / structure.macs(),
        "max_rel_err": parity.max_rel_err,
        "top1_agreement": parity.top1_agreement,
        "seconds": round(seconds, 3),
    }


def pins(structure: Structure) -> list[dict[str, Any]]:
    """Return the three reasons that hold most tensor slices: how many indices, over all tensors."""
    sizes: Counter[str] = Counter()
    for group in structure.pinned:
        sizes[_general(group.reason)] += group.size * len(group.tensors)
    return [{"reason": reason, "indices": size} for reason, size in sizes.most_common(3)]


def _general(reason: str) -> str:
    """Leave node names out of a reason, so that alike ones count together."""
    head, opened, rest = reason.partition(" (")
    return head + rest.partition(")")[2] if opened else reason


# --- many networks ---------------------------------------------------------------------------------


def run_one(family: str, chosen: dict[str, Any], work: Path, limit: float) -> None:
    """Measure one network in a process of its own and leave its row in `work`."""
    limit *= LARGE_LIMIT_FACTOR if chosen["params"] > LARGE else 1
    command = [sys.executable, "-W", "ignore", __file__, "--one", chosen["name"], *map(str, chosen["input_shape"])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        row = json.loads(lines[-1]) if lines else {"error": f"exit {done.returncode}: {done.stderr[-300:]}"}
    except subprocess.TimeoutExpired:
        row = {"error": f"not done after {limit:.0f} s"}
    path = work / f"{family}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"family": family, **chosen, **row}))
    temporary.replace(path)
    print(verdict(json.loads(path.read_text())), flush=True)


def run_child(name: str, shape: Sequence[int]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        row = measure(name, shape)
    except Exception as error:
        row = {"error": f"{type(error).__name__}: {str(error)[:400]}"}
    print(json.dumps(row))


def exact(part: dict[str, Any]) -> bool:
    return bool(part["max_rel_err"] <= TOLERANCE and part["top1_agreement"] == 1.0)


def pruned(row: dict[str, Any]) -> bool:
    """The zoo's criterion at `balanced`: a quarter of the multiply-adds gone, and exact."""
    return "error" not in row and exact(row["balanced"]) and row["balanced"]["macs_ratio"] <= WANTED_RATIO


def on_budget(row: dict[str, Any]) -> bool:
    """At most the budget, at most 3 % of it below, and exact."""
    low = BUDGET * (1 - BUDGET_SLACK)
    return "error" not in row and exact(row["budget"]) and low <= row["budget"]["macs_ratio"] <= BUDGET


def verdict(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['family']}: {row['error']}"
    balanced, budget = row["balanced"], row["budget"]
    return (
        f"{row['family']} ({row['name']}): balanced {balanced['macs_ratio']:.3f} at {balanced['max_rel_err']:.0e}, "
        f"budget {budget['macs_ratio']:.3f} at {budget['max_rel_err']:.0e}, {sum(row['seconds'].values()):.0f} s"
    )


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    fine = [row for row in rows if "error" not in row]
    ratios = sorted((row["balanced"]["macs_ratio"], row["family"]) for row in fine)
    return {
        "versions": {
            package: importlib.metadata.version(package)
            for package in ("timm", "torch", "onnxruntime", "onnx-ir", "onnxscript")
        }
        | {"mm-edge": mm_edge.__version__, "python": platform.python_version()},
        "target": TARGET,
        "families": len(rows),
        "pruned": sum(pruned(row) for row in rows),
        "on_budget": sum(on_budget(row) for row in rows),
        "median_macs_ratio_balanced": statistics.median(ratio for ratio, _ in ratios) if ratios else None,
        "pruned_least": [family for _, family in ratios[::-1][:5]],
        "rows": rows,
    }


def gather(families: dict[str, dict[str, Any]], work: Path) -> None:
    rows = [json.loads((work / f"{family}.json").read_text()) for family in families]
    RESULT.write_text(json.dumps(summarise(rows), indent=1) + "\n")
    print(f"wrote {RESULT}")


# --- the page ----------------------------------------------------------------------------------------

INTRODUCTION = """# Every architecture timm has

Made by `python benchmarks/zoo.py --page` from `benchmarks/results/zoo.json` and `zoo_peers.json`; do not edit.

The smallest network of at least a million parameters of every timm module, norms, layer scales and BatchNorm
statistics randomised. `balanced` is the multiply-adds left by that strategy under the rule ranges for the target
{target}; `--macs 0.50` what the budget leaves. Error is the compact ONNX model against the masked PyTorch module,
relative to the largest output, on two random inputs; at most 1e-4 is exact. Weights are random: this says nothing of
accuracy. Torch-Pruning and onnxsim were asked for a channel ratio of 0.5 on the same networks
(`benchmarks/zoo_peers.py`); where their model does not run or its output changes shape, the column says so.

- {pruned} of {families} families lose at least a quarter of their multiply-adds at `balanced`, exactly.
- {on_budget} of {families} reach `--macs 0.50` (at most 3 % below it), exactly.
- Median of the multiply-adds left at `balanced`: {median:.1%}.
{peers}
- {versions}.
"""


def peer_line(name: str, peers: dict[str, Any]) -> str:
    found = peers[name]
    return (
        f"- {name} {peers['versions'][name]} at ratio 0.5: a working model of {found['works']} of {peers['families']} "
        f"families, median {found['median_macs_ratio']:.1%} of the multiply-adds left; {found['at_most_0.75']} "
        f"families come under 75 %, {found['at_most_0.50']} under 50 %, {found['not_pruned']} are not pruned at all."
    )


def peer_cell(row: dict[str, Any]) -> str:
    """What a peer left of one network, or why there is nothing to compare."""
    if not row["runs"]:
        return "too slow" if row.get("error", "").startswith("not done after") else "fails"
    return f"{row['macs_ratio']:.1%}" if row["same_shape"] else "wrong shape"


def page(result: dict[str, Any], peers: dict[str, Any]) -> str:
    """Return the page as Markdown."""
    by_peer = {row["family"]: row for row in peers["rows"]}
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    median = result["median_macs_ratio_balanced"]
    lines = [
        INTRODUCTION.format(
            **{**result, "versions": versions},
            peers="\n".join(peer_line(name, peers) for name in PEER_NAMES),
            median=median,
        )
    ]
    lines += [
        "| family | network | balanced | error | `--macs 0.50` | error | Torch-Pruning | onnxsim | groups | export s "
        "| 30 plans s |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|---|---|"]
    failed = [row for row in result["rows"] if "error" in row]
    for row in result["rows"]:
        if "error" in row:
            continue
        balanced, budget, seconds = row["balanced"], row["budget"], row["seconds"]
        others = " | ".join(peer_cell(by_peer[row["family"]][name]) for name in PEER_NAMES)
        lines.append(
            f"| {row['family']} | {row['name']} | {balanced['macs_ratio']:.1%}{'' if pruned(row) else ' (!)'} "
            f"| {balanced['max_rel_err']:.0e} | {budget['macs_ratio']:.1%}{'' if on_budget(row) else ' (!)'} "
            f"| {budget['max_rel_err']:.0e} | {others} | {row['groups']} "
            f"| {seconds['export']:.1f} | {seconds['plan_30']:.1f} |"
        )
    lines += ["", "## What holds the five families pruned least", ""]
    by_family = {row["family"]: row for row in result["rows"]}
    for family in result["pruned_least"]:
        held = "; ".join(f"{item['reason']} ({item['indices']:,} indices)" for item in by_family[family]["pins"])
        lines.append(f"- **{family}** ({by_family[family]['balanced']['macs_ratio']:.1%} left): {held}")
    if failed:
        lines += ["", "## Not done", "", *(f"- **{row['family']}** ({row['name']}): {row['error']}" for row in failed)]
    return "\n".join(lines) + "\n"


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Return what a second run found otherwise: families, errors, multiply-adds left, exactness; times apart."""
    rows = [{row["family"]: row for row in run["rows"]} for run in (first, second)]
    found = [f"{family}: in one run only" for family in sorted(rows[0].keys() ^ rows[1].keys())]
    for family in sorted(rows[0].keys() & rows[1].keys()):
        one, other = rows[0][family], rows[1][family]
        if "error" in one or "error" in other:
            if one.get("error") != other.get("error"):
                found.append(f"{family}: {one.get('error')} and {other.get('error')}")
            continue
        for part in ("balanced", "budget"):
            ratios = (one[part]["macs_ratio"], other[part]["macs_ratio"])
            if ratios[0] != ratios[1] or exact(one[part]) != exact(other[part]):
                found.append(f"{family} {part}: {ratios[0]:.6f} and {ratios[1]:.6f} of the multiply-adds")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="One network of every timm module through the structured pipeline.")
    parser.add_argument("--work", type=Path, help="folder of the rows, kept between calls")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", default="", help="comma-separated families, done again")
    parser.add_argument(
        "--limit", type=float, default=120, help="seconds a network may take (five times that over 40 M)"
    )
    parser.add_argument("--page", action="store_true", help="write docs/zoo.md from the committed results")
    parser.add_argument("--compare", type=Path, help="print what another run's results have otherwise")
    parser.add_argument("--one", nargs=4, metavar=("NAME", "C", "H", "W"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        run_child(arguments.one[0], [int(size) for size in arguments.one[1:]])
    elif arguments.page:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(json.loads(RESULT.read_text()), json.loads(PEERS.read_text())))
        print(f"wrote {PAGE}")
    elif arguments.compare:
        found = differences(json.loads(RESULT.read_text()), json.loads(arguments.compare.read_text()))
        print("\n".join(found) or "the same families, multiply-adds and exactness in both runs")
    elif arguments.work is None:
        parser.error("--work DIR is needed (or --page, or --compare FILE)")
    else:
        run_all(arguments.work, arguments.jobs, [name for name in arguments.only.split(",") if name], arguments.limit)


def run_all(work: Path, jobs: int, only: list[str], limit: float) -> None:
    work.mkdir(parents=True, exist_ok=True)
    listing = work / "families.list"
    if not listing.exists():
        listing.write_text(json.dumps(representatives(), indent=1))
    families: dict[str, dict[str, Any]] = json.loads(listing.read_text())
    unknown = sorted(set(only) - set(families))
    if unknown:
        sys.exit(f"unknown families {', '.join(unknown)}; known: {', '.join(families)}")
    left = only or [family for family in families if not (work / f"{family}.json").exists()]
    left.sort(key=lambda family: families[family]["params"])
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda family: run_one(family, families[family], work, limit), left))
    if all((work / f"{family}.json").exists() for family in families):
        gather(families, work)


if __name__ == "__main__":
    main()

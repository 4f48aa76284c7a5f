"""Which row of the range table every layer of one network per timm family gets, and how its strategies are ordered.

    python benchmarks/rows.py --work DIR [--only FAMILY,...] [--seconds LIMIT]
    python benchmarks/rows.py --page

The networks are those of benchmarks/results/zoo.json, with random weights: only their structure is read. Each network
leaves DIR/FAMILY.json. No network is started after LIMIT seconds; the same call goes on with those that are left, the
best known and then the small ones first. Every call writes benchmarks/results/rows.json of all that were read so far,
from which --page makes docs/rows.md.

For the ten strategies the file holds multiply-adds and sparsity as E7 asks for them and as the allowed widths of the
target make them, all as shares of the dense network's.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import mm_edge  # noqa: F401  before timm, which it makes importable beside CPU-only torch

# isort: split
import timm
import torch

from mm_edge.bench.target import load_target
from mm_edge.graph.export import export_raw
from mm_edge.graph.groups import Structure, read_structure
from mm_edge.graph.layers import ROLES, read_layers
from mm_edge.graph.rounding import find_goals, round_widths, weight_cost
from mm_edge.plan.ranges import apply_constraints, rule_ranges
from mm_edge.plan.strategies import STRATEGIES, assign
from mm_edge.plan.target_widths import allowed_widths_on
from mm_edge.records import Layer, SparsityRange

ROOT = Path(__file__).resolve().parent.parent
ZOO = ROOT / "benchmarks" / "results" / "zoo.json"
RESULT = ROOT / "benchmarks" / "results" / "rows.json"
PAGE = ROOT / "docs" / "rows.md"
TARGET = "x86_64-avx512"
# Strategies that place every layer at one share of its range, from the least to the most that is removed.
LADDER = ("min_conservative", "lower_30th", "balanced", "upper_70th", "upper_90th", "max_aggressive")
# Read first: families of the networks that most people start from.
WELL_KNOWN = frozenset(
    "resnet vgg efficientnet mobilenetv3 densenet inception_v3 xception convnext regnet senet vision_transformer deit "
    "swin_transformer levit mobilevit efficientformer repvit fastvit res2net hrnet".split()
)
SHARE_DIGITS = 6
# How many patterns of layer names stand in one cell.
NAMES_SHOWN = 6


def read_network(name: str, shape: list[int]) -> dict[str, Any]:
    """Return the rows of one network's layers, and what its strategies ask for and get."""
    torch.manual_seed(0)
    module = timm.create_model(name).eval()
    raw = export_raw(module, torch.zeros(1, *shape))
    structure, layers = read_structure(raw), read_layers(raw)
    ranges = apply_constraints(layers, rule_ranges(layers, type(module).__name__), structured=True)
    return {
        "class": type(module).__name__,
        "macs": round(structure.macs()),
        "rows": list(group_rows(layers, ranges)),
        "strategies": measure_strategies(structure, layers, ranges),
    }


def group_rows(layers: tuple[Layer, ...], ranges: dict[str, SparsityRange]) -> Iterator[dict[str, Any]]:
    """Yield one record per role and row: its range, its layers' names with numbers left out, and their MACs."""
    grouped: dict[tuple[str, str], list[Layer]] = defaultdict(list)
    for layer in layers:
        grouped[layer.role, ranges[layer.fqn].reason].append(layer)
    for (role, reason), found in grouped.items():
        yield {
            "role": role,
            "row": reason,
            "lo": ranges[found[0].fqn].lo,
            "hi": ranges[found[0].fqn].hi,
            "layers": len(found),
            "macs": sum(layer.macs for layer in found),
            "names": list(dict.fromkeys(shorten(layer.fqn) for layer in found)),
        }


def shorten(fqn: str) -> str:
    """Return a layer's name without `.weight` and with a star for numbers and for numbered letters such as `b2`."""
    return ".".join(re.sub(r"^([a-z]?)\d+$", r"\1*", part) for part in fqn.removesuffix(".weight").split("."))


def measure_strategies(
    structure: Structure, layers: tuple[Layer, ...], ranges: dict[str, SparsityRange]
) -> dict[str, dict[str, float]]:
    """Return, per strategy, the shares of MACs that are left and of weights that are removed: asked for, and made."""
    allowed = allowed_widths_on(structure, layers, load_target(TARGET))
    weights = weight_cost(structure, layers)
    macs, count = structure.macs(), sum(layer.numel for layer in layers)
    found = {}
    for assignment in assign(tuple(STRATEGIES), "magnitude", layers, ranges):
        goals = find_goals(structure, layers, assignment.sparsity, allowed)
        counts = round_widths(structure, layers, assignment.sparsity, allowed)
        shares = {
            "macs_asked": goals.macs / macs,
            "macs": structure.macs(dict(counts)) / macs,
            "sparsity_asked": (weights.total() - goals.weights) / count,
            "sparsity": (weights.total() - weights.total(dict(counts))) / count,
        }
        found[assignment.strategy] = {name: round(share, SHARE_DIGITS) for name, share in shares.items()}
    return found


def out_of_order(row: dict[str, Any]) -> list[str]:
    """Return the steps of the ladder at which MACs or sparsity go the wrong way."""
    found = row["strategies"]
    wrong = []
    for less, more in pairwise(LADDER):
        macs, sparsity = found[more]["macs"] > found[less]["macs"], found[more]["sparsity"] < found[less]["sparsity"]
        wrong += [f"{less} > {more}"] if macs or sparsity else []
    return wrong


# --- many networks ---------------------------------------------------------------------------------


def run(work: Path, only: set[str], seconds: float) -> None:
    """Read the networks that are left, small ones first, and gather them when none is."""
    work.mkdir(parents=True, exist_ok=True)
    zoo = {row["family"]: row for row in json.loads(ZOO.read_text())["rows"]}
    left = [family for family in zoo if not (work / f"{family}.json").exists() and (not only or family in only)]
    started = time.monotonic()
    for family in sorted(left, key=lambda family: (family not in WELL_KNOWN, zoo[family]["params"])):
        if time.monotonic() - started > seconds:
            break
        chosen = {key: zoo[family][key] for key in ("family", "name", "input_shape")}
        row = read_network(chosen["name"], chosen["input_shape"])
        (work / f"{family}.json").write_text(json.dumps(chosen | row))
        print(family, f"{row['strategies']['balanced']['macs']:.3f}", *out_of_order(row), flush=True)
        gc.collect()
    rows = [json.loads((work / f"{family}.json").read_text()) for family in zoo if (work / f"{family}.json").exists()]
    head = json.dumps({"target": TARGET, "timm": timm.__version__, "families": len(zoo)})
    listed = ",\n".join(json.dumps(row) for row in rows)  # one line a network
    RESULT.write_text(f'{head.removesuffix("}")}, "rows": [\n{listed}\n]}}\n')
    print(f"{len(rows)} of {len(zoo)} networks read: {RESULT}")


# --- the page ----------------------------------------------------------------------------------------

INTRODUCTION = """# The row of every layer

Made by `python benchmarks/rows.py --page` from `benchmarks/results/rows.json`; do not edit. One network of each of
{read} of timm's {families} families, random weights: this says how the range table is read and nothing of accuracy.
`mm-edge inspect` shows the same for any network, layer by layer. [method.md](method.md#ranges-by-rule) explains the
table.

A row is named by the network's class and the role it is for; "default" serves every class and role without one. Names
have a star for a number. Shares are of the network's multiply-adds.

## Roles

The first that applies is taken.

| role | recognised by |
|---|---|
"""

READ = """## Read by eye

The rows of the twenty best known families (resnet, vgg, efficientnet, mobilenetv3, densenet, inception_v3, xception,
convnext, regnet, senet, vision_transformer, deit, swin_transformer, levit, mobilevit, efficientformer, repvit, fastvit,
res2net, hrnet) were read layer by layer, and those of resnet50, efficientnet_b0, convnext_tiny, fastvit_sa12 and
mobilevitv2_050 beside them. No role was wrong but the last one below. What may surprise:

- The first 1x1 convolution of a bottleneck that halves the resolution (ResNet-50, Res2Net) still sees the larger map
  and takes the row of the stage before. The stage is read from the size of the output.
- An MLP of linear layers takes the MLP's row (30-60); one of 1x1 convolutions, as in convnext_zepto, EfficientFormer,
  FastViT and RepViT, a convolution's (10-60). So ConvNeXt's MLPs have 30-60 in convnext_tiny.
- A strided depthwise convolution takes the row of its kind and not that of down-sampling.
- The second convolution of a stem is "downsample" where it is strided too (HRNet, EfficientFormer, RepViT). Where
  tokens follow at once (LeViT) all of them are the patch embedding.
- DenseNet's transitions are plain convolutions: a pooling follows them and shrinks their results, nothing of it is a
  shortcut. MobileNetV3's last convolution, which reads pooled features, is a convolution too.
- In HRNet down-sampling holds more than half of the multiply-adds: strided 3x3 convolutions join its resolutions, the
  largest of them before the classifier.
- MobileViT of the second version (mobilevitv2_*) weights values by a softmax and sums them without a matrix product.
  Such attention is not recognised: its projections take a convolution's row. Networks that mix branches so (SKNet,
  ResNeSt) hold no attention, and the operators are the same.
"""


def write_page(results: dict[str, Any]) -> str:
    """Return docs/rows.md."""
    introduction = INTRODUCTION.format(read=len(results["rows"]), families=results["families"])
    roles = "".join(f"| {role} | {how} |\n" for role, how in ROLES.items())
    parts = [introduction + roles, READ, _write_order(results)]
    for network in results["rows"]:
        lines = [f"## {network['family']}: {network['name']} ({network['class']})\n"]
        lines += ["| row | range | layers | MACs | which |", "|---|---|---|---|---|"]
        for row in network["rows"]:
            lines.append(_write_row(row, network["macs"]))
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _write_row(row: dict[str, Any], macs: int) -> str:
    every = list(dict.fromkeys(map(shorten, row["names"])))
    names = every[:NAMES_SHOWN]
    more = len(every) - len(names)
    which = ", ".join(f"`{name}`" for name in names) + (f" and {more} more" if more else "")
    role = "" if row["row"].partition(";")[0].partition(",")[0].endswith(row["role"]) else f" ({row['role']})"
    text = row["row"].removeprefix("rule ") + role
    return f"| {text} | {row['lo']:.0%}-{row['hi']:.0%} | {row['layers']} | {row['macs'] / macs:.1%} | {which} |"


def _write_order(results: dict[str, Any]) -> str:
    rows = results["rows"]
    wrong = {row["family"]: found for row in rows if (found := out_of_order(row))}
    missed = sorted(abs(found["macs"] - found["macs_asked"]) for row in rows for found in row["strategies"].values())
    half, most = missed[len(missed) // 2], missed[len(missed) * 9 // 10]
    text = (
        "## How the strategies are ordered\n\n"
        f"Multiply-adds and sparsity of {', '.join(f'`{name}`' for name in LADDER[:3])},\n"
        f"{', '.join(f'`{name}`' for name in LADDER[3:])}, in this order,\n"
        f"for the target {results['target']}: in {len(rows) - len(wrong)} of {len(rows)} networks each removes at\n"
        "least as much as the one before it. The multiply-adds of all ten strategies are within\n"
        f"{half:.2%} of the dense network's from what E7 asks for in half of the cases, within {most:.2%} in nine of\n"
        f"ten, and within {missed[-1]:.1%} in all.\n"
    )
    return text + "".join(f"\n- {family}: {', '.join(found)}" for family, found in wrong.items()) + "\n"


def main() -> None:
    """Read the networks, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--page", action="store_true")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if given.work is not None:
        run(given.work, set(filter(None, given.only.split(","))), given.seconds)
    if given.page:
        PAGE.write_text(write_page(json.loads(RESULT.read_text())))
        print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()

"""The sparsity a layer may have, [lo, hi], from rules or from baseline rankings, then constraints (E4, E5).

    observed (E4)   for b in {MAG |w|, SNIP |w g|, GraSP w (H g)}, t in {0.70, 0.80, 0.90}:
                    prune the lowest t of all weights together; s(b, t, l) = share of layer l that went
                    lo(l) = min over (b, t) of s,   hi(l) = max
    rules           the table below: family -> role -> [lo, hi], by stage or by size where the row says so
    constraints     [lo, hi] -> [clip(lo, a, b), clip(hi, a, b)] for each constraint [a, b] in order (E5)

In all three baselines a higher score means keep. Source: arXiv 2603.20280; the rows are the values its released
code uses, the default rows serve every other network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mm_edge.arrays import Float32Array
from mm_edge.errors import JobError
from mm_edge.records import Layer, SparsityRange

GLOBAL_SPARSITIES = (0.70, 0.80, 0.90)
SMALL_LAYER = 10_000
SIZE_STEPS = (100_000, 500_000)

Bounds = tuple[float, float]


@dataclass(frozen=True)
class RoleRange:
    """One row: its ranges, chosen by nothing ("role"), by "stage" or by "size" (SIZE_STEPS)."""

    bounds: tuple[Bounds, ...]
    by: str = "role"


def _row(lo: float, hi: float) -> RoleRange:
    return RoleRange(((lo, hi),))


_VGG_CONV = RoleRange(((0.40, 0.80), (0.50, 0.85), (0.60, 0.90)), by="size")

DEFAULT_ROLE_RANGES: dict[str, RoleRange] = {
    "stem": _row(0.0, 0.20),
    "downsample": _row(0.05, 0.20),
    "conv": _row(0.10, 0.60),
    "qkv": _row(0.20, 0.50),
    "attention_projection": _row(0.20, 0.50),
    "mlp": _row(0.30, 0.60),
    "classifier": _row(0.0, 0.30),
}

_LEVIT_ROLE_RANGES: dict[str, RoleRange] = {
    "patch_embedding": _row(0.0, 0.20),
    "qkv": _row(0.0, 0.30),
    "mlp": _row(0.0, 0.40),
    "attention_projection": _row(0.50, 0.80),
    "classifier": _row(0.0, 0.30),
}

FAMILY_ROLE_RANGES: dict[str, dict[str, RoleRange]] = {
    "VGG": {"stem": _VGG_CONV, "conv": _VGG_CONV, "mlp": _row(0.30, 0.70), "classifier": _row(0.30, 0.70)},
    "ResNet": {
        "stem": _row(0.0, 0.30),
        "deep_stem": _row(0.0, 0.30),
        "downsample": _row(0.0, 0.20),
        "conv": RoleRange(((0.30, 0.50), (0.40, 0.60), (0.50, 0.70), (0.75, 0.95)), by="stage"),
        "classifier": _row(0.0, 0.30),
    },
    "Levit": _LEVIT_ROLE_RANGES,
    "LevitDistilled": _LEVIT_ROLE_RANGES,
    "SwinTransformer": {
        "patch_embedding": _row(0.0, 0.10),
        "downsample": _row(0.05, 0.20),
        "classifier": _row(0.0, 0.15),
        "qkv": RoleRange(((0.10, 0.30), (0.15, 0.35), (0.20, 0.40), (0.25, 0.45)), by="stage"),
        "attention_projection": RoleRange(((0.20, 0.40), (0.25, 0.45), (0.30, 0.50), (0.35, 0.55)), by="stage"),
        "mlp_fc1": RoleRange(((0.30, 0.45), (0.35, 0.50), (0.40, 0.55), (0.45, 0.60)), by="stage"),
        "mlp_fc2": RoleRange(((0.25, 0.40), (0.30, 0.45), (0.35, 0.50), (0.40, 0.55)), by="stage"),
    },
}

# The row that serves a role with none of its own.
GENERAL_ROLE = {
    "patch_embedding": "stem",
    "deep_stem": "conv",
    "depthwise": "conv",
    "se": "conv",
    "mlp_fc1": "mlp",
    "mlp_fc2": "mlp",
}


@dataclass(frozen=True)
class Constraint:
    """Bounds that a layer's range is clipped to where `applies(layer, structured)`; `reason` says why."""

    reason: str
    bounds: Bounds
    applies: Callable[[Layer, bool], bool]


# In this order: the last that applies wins.
CONSTRAINTS = (
    Constraint("patch embedding", (0.15, 0.30), lambda layer, structured: layer.role == "patch_embedding"),
    Constraint(
        f"fewer than {SMALL_LAYER:,} weights",
        (0.0, 0.10),
        lambda layer, structured: not structured and layer.numel < SMALL_LAYER,
    ),
    Constraint("normalisation", (0.0, 0.0), lambda layer, structured: layer.role == "normalisation"),
)


def rule_ranges(layers: Sequence[Layer], family: str) -> dict[str, SparsityRange]:
    """Return the rule table's range of each layer by fqn, before constraints.

    `family` is the network's class name ("ResNet", "SwinTransformer", ...); a family or a role without a row of its
    own has the default one. Stages are counted from the first stage that has layers under a row by stage.
    """
    found = {layer.fqn: _find_rule(layer.role, family) for layer in layers}
    staged = sorted({layer.stage for layer in layers if found[layer.fqn][1].by == "stage"})
    ranges = {}
    for layer in layers:
        row, rule = found[layer.fqn]
        number = min(_row_number(layer, rule, staged), len(rule.bounds) - 1)
        detail = f", {rule.by} row {number + 1}" if len(rule.bounds) > 1 else ""
        ranges[layer.fqn] = SparsityRange(*rule.bounds[number], f"rule {row}{detail}")
    return ranges


def observed_ranges(
    layers: Sequence[Layer],
    weights: Mapping[str, Float32Array],
    gradients: Mapping[str, Float32Array] | None = None,
    hessian_gradients: Mapping[str, Float32Array] | None = None,
) -> dict[str, SparsityRange]:
    """Return E4's range of each layer by fqn, before constraints.

    Without gradients (a network that exists only as .onnx) SNIP and GraSP are left out, and the reason says so.

    Raises:
        JobError: a layer lacks its gradient or Hessian product.
    """
    observed: dict[str, list[float]] = {layer.fqn: [] for layer in layers}
    used = []
    for name, factors in (("MAG", None), ("SNIP", gradients), ("GraSP", hessian_gradients)):
        if name != "MAG" and factors is None:
            continue
        used.append(name)
        scores = [_baseline_score(name, layer.fqn, weights, factors) for layer in layers]
        for shares in _globally_pruned_shares(scores):
            for layer, share in zip(layers, shares, strict=True):
                observed[layer.fqn].append(share)
    reason = f"observed with {', '.join(used)}"
    return {fqn: SparsityRange(min(shares), max(shares), reason) for fqn, shares in observed.items()}


def apply_constraints(
    layers: Iterable[Layer], ranges: Mapping[str, SparsityRange], structured: bool
) -> dict[str, SparsityRange]:
    """E5: return `ranges` clipped by the architectural constraints, the last that applies winning.

    `structured` leaves the small-layer cap out: a structured plan changes such layers with their neighbours.
    """
    clipped = {}
    for layer in layers:
        bounds = ranges[layer.fqn]
        for constraint in CONSTRAINTS:
            if constraint.applies(layer, structured):
                bounds = _clip(bounds, constraint)
        clipped[layer.fqn] = bounds
    return clipped


def _find_rule(role: str, family: str) -> tuple[str, RoleRange]:
    """Return the row for `role` and its name: the family's own, then the default; the exact role, then the general."""
    roles = (role, GENERAL_ROLE.get(role, "conv"))
    for name, table in ((family, FAMILY_ROLE_RANGES.get(family, {})), ("default", DEFAULT_ROLE_RANGES)):
        for candidate in roles:
            if candidate in table:
                return f"{name}: {candidate}", table[candidate]
    raise AssertionError(f"the default rules have no row for {roles}")


def _row_number(layer: Layer, rule: RoleRange, staged: list[int]) -> int:
    if rule.by == "stage":
        return staged.index(layer.stage)
    if rule.by == "size":
        return sum(layer.numel >= step for step in SIZE_STEPS)
    return 0


def _clip(bounds: SparsityRange, constraint: Constraint) -> SparsityRange:
    low, high = constraint.bounds
    return SparsityRange(
        min(max(bounds.lo, low), high), min(max(bounds.hi, low), high), f"{bounds.reason}; {constraint.reason}"
    )


def _baseline_score(
    name: str, fqn: str, weights: Mapping[str, Float32Array], factors: Mapping[str, Float32Array] | None
) -> Float32Array:
    """Return MAG's |w|, SNIP's |w g| or GraSP's w (H g) of one layer, flat; higher means keep."""
    weight = weights[fqn].ravel()
    if factors is None:
        return np.abs(weight)
    if fqn not in factors:
        raise JobError(f"layer '{fqn}' has no {name} score: it is no parameter of the module; use --ranges rules")
    product = weight * factors[fqn].ravel()
    return product if name == "GraSP" else np.abs(product)


def _globally_pruned_shares(scores: list[Float32Array]) -> list[list[float]]:
    """Return, per global sparsity, the share of each layer among the lowest scores of all (ties by position)."""
    everything = np.concatenate(scores)
    counts = [math.floor(sparsity * everything.size + 0.5) for sparsity in GLOBAL_SPARSITIES]
    indices = sorted({count - 1 for count in counts if count > 0})
    everything.partition(indices)
    return [_shares_below(scores, everything[count - 1], count) if count else [0.0] * len(scores) for count in counts]


def _shares_below(scores: list[Float32Array], threshold: np.float32, count: int) -> list[float]:
    below = [int(np.count_nonzero(score < threshold)) for score in scores]
    left = count - sum(below)
    shares = []
    for score, pruned in zip(scores, below, strict=True):
        ties = min(left, int(np.count_nonzero(score == threshold)))
        left -= ties
        shares.append((pruned + ties) / score.size)
    return shares

"""Widths of strategies: one of the two around E7's, near its cost, and ordered as the strategies are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import mm_edge  # noqa: F401  before timm, which it makes importable beside CPU-only torch

# isort: split
import pytest
import timm
import torch
from tiny_graphs import leaf_of, structure_of, tiny

from mm_edge.bench.target import load_target
from mm_edge.demo import MODEL
from mm_edge.graph.axes import Axis
from mm_edge.graph.export import export_raw
from mm_edge.graph.groups import Structure, read_structure
from mm_edge.graph.layers import read_layers
from mm_edge.graph.rounding import WidthGoals, find_goals, round_widths, weight_cost
from mm_edge.graph.widths import AllowedWidths, allowed_widths, solve_widths
from mm_edge.plan.ranges import apply_constraints, rule_ranges
from mm_edge.plan.strategies import STRATEGIES, assign
from mm_edge.plan.target_widths import allowed_widths_on
from mm_edge.records import Layer

ROOT = Path(__file__).resolve().parents[2]
# The strategies that place every layer at one share of its range, from the least to the most that is removed.
LADDER = ("min_conservative", "lower_30th", "balanced", "upper_70th", "upper_90th", "max_aggressive")


@dataclass(frozen=True)
class Planned:
    structure: Structure
    layers: tuple[Layer, ...]
    sparsity: dict[str, dict[str, float]]


def plan(name: str) -> Planned:
    """Return one network's structure, read at a small size, and the sparsities of its strategies."""
    model = timm.create_model(f"local-dir:{MODEL}" if name == "demo" else name).eval()
    channels = 1 if name == "demo" else 3
    raw = export_raw(model, torch.zeros(1, channels, 64, 64))
    layers = read_layers(raw)
    ranges = apply_constraints(layers, rule_ranges(layers, type(model).__name__), structured=True)
    assigned = assign(tuple(STRATEGIES), "magnitude", layers, ranges)
    return Planned(read_structure(raw), layers, {item.strategy: item.sparsity for item in assigned})


@pytest.fixture(scope="module", params=["resnet18", "resnet18d", "resnet50", "vgg11_bn", "demo"])
def planned(request: pytest.FixtureRequest) -> Iterator[Planned]:
    yield plan(request.param)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["x86_64-avx512", "raspberry-pi-4"])
def test_strategies_keep_their_order_and_stay_one_step_from_what_e7_asks_for(planned: Planned, target: str) -> None:
    structure, layers = planned.structure, planned.layers
    allowed = allowed_widths_on(structure, layers, load_target(target))
    weights = weight_cost(structure, layers)
    goals = {name: find_goals(structure, layers, rho, allowed) for name, rho in planned.sparsity.items()}
    counts = {name: round_widths(structure, layers, rho, allowed) for name, rho in planned.sparsity.items()}
    for name, found in counts.items():
        assert_next_to(found, goals[name], allowed)
    macs = {name: structure.macs(dict(found)) for name, found in counts.items()}
    for less, more in pairwise(LADDER):
        assert goals[less].macs >= goals[more].macs and macs[less] >= macs[more]
        assert weights.total(dict(counts[less])) >= weights.total(dict(counts[more]))
    # No step of one group is as large as what the least strategy misses its budget by.
    least = counts["min_conservative"]
    steps = [
        abs(macs["min_conservative"] - structure.macs({**least, item.leaf: width}))
        for item in allowed
        if (width := item.above(least[item.leaf]) or item.below(least[item.leaf])) is not None
    ]
    assert abs(macs["min_conservative"] - goals["min_conservative"].macs) <= max(steps)


def test_the_strategies_of_the_zoo_s_networks_were_read_in_order() -> None:
    """What benchmarks/rows.py read of the zoo; reading it again takes an hour."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "rows.json").read_text())["rows"]
    assert len(rows) > 0
    for row in rows:
        for less, more in pairwise(row["strategies"][name] for name in LADDER):
            assert less["macs"] >= more["macs"] and less["sparsity"] <= more["sparsity"], row["name"]


def assert_next_to(counts: dict[Axis, int], goals: WidthGoals, allowed: tuple[AllowedWidths, ...]) -> None:
    for item in allowed:
        assert counts[item.leaf] in item.around(goals.widths[item.leaf])


@pytest.mark.parametrize(
    ("wanted", "around"),
    [
        (3.0, (8, 8)),
        (8.0, (8, 8)),
        (8.1, (8, 16)),
        (15.9, (8, 16)),
        (16.0001, (16, 16)),
        (19.9, (16, 20)),
        (30, (20, 20)),
    ],
)
def test_the_widths_around_are_floor_and_ceil_among_the_allowed(wanted: float, around: tuple[int, int]) -> None:
    assert AllowedWidths(0, (8, 16, 20)).around(wanted) == around


CHAIN = "a = Conv(x, w1) r = Relu(a) b = Conv(r, w2) s = Relu(b) y = Conv(s, w3)"
WEIGHTS = {"w1": (64, 3, 1, 1), "w2": (64, 64, 1, 1), "w3": (4, 64, 1, 1)}


def test_of_floor_and_ceil_those_are_taken_whose_cost_is_nearest() -> None:
    """w2 alone: k = sqrt(1 - rho) on both sides, 40 of 64. One of two up and one down is nearest to 40 * 40."""
    raw = tiny("float[1,3,4,4] x", CHAIN, WEIGHTS)
    structure = structure_of(raw)
    layers = [layer for layer in read_layers(raw) if layer.fqn == "w2"]
    allowed = [allowed_widths(group, 16) for group in structure.groups]
    counts = round_widths(structure, layers, {"w2": 1 - (40 / 64) ** 2}, allowed)
    assert sorted(counts.values()) == [32, 48]


def test_a_group_without_a_choice_is_made_good_for_by_the_others() -> None:
    raw = tiny("float[1,3,4,4] x", CHAIN, WEIGHTS | {"w1": (16, 3, 1, 1), "w2": (64, 16, 1, 1)})
    structure = structure_of(raw)
    layers = [layer for layer in read_layers(raw) if layer.fqn == "w2"]
    allowed = [allowed_widths(group, 16) for group in structure.groups]
    goals = find_goals(structure, layers, {"w2": 0.5}, allowed)
    assert goals.widths[leaf_of(structure, "w1:0")] == 16
    assert goals.widths[leaf_of(structure, "w2:0")] == pytest.approx(32, rel=1e-3)
    asked = solve_widths(structure, layers, {"w2": 0.5})
    assert goals.weights == pytest.approx(64 * 16 * asked[leaf_of(structure, "w2:0")] ** 2, rel=1e-3)
    assert set(round_widths(structure, layers, {"w2": 0.5}, allowed).values()) == {16, 32}

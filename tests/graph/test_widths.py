"""E7 by hand, rounding and budgets by property, channel scores and sparsity by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_graphs import leaf_of, structure_of, tiny

from mm_edge.graph.export import RawGraph
from mm_edge.graph.groups import Group, Structure
from mm_edge.graph.layers import read_layers
from mm_edge.graph.rounding import round_widths
from mm_edge.graph.widths import (
    AllowedWidths,
    allowed_widths,
    group_scores,
    meet_budget,
    select_indices,
    solve_widths,
    sparsity_of,
)
from mm_edge.plan.scaling import plan_budget
from mm_edge.records import Layer, SparsityRange

CHAIN = "a = Conv(x, w1) r = Relu(a) b = Conv(r, w2) s = Relu(b) y = Conv(s, w3)"
CHAIN_WEIGHTS = {"w1": (16, 3, 1, 1), "w2": (32, 16, 1, 1), "w3": (4, 32, 1, 1)}


Chain = tuple[Structure, dict[str, Layer]]


def read(raw: RawGraph) -> Chain:
    return structure_of(raw), {layer.fqn: layer for layer in read_layers(raw)}


@pytest.fixture(scope="module")
def chain() -> Chain:
    return read(tiny("float[1,3,4,4] x", CHAIN, CHAIN_WEIGHTS))


@pytest.fixture(scope="module")
def wide_chain() -> Chain:
    return read(tiny("float[1,3,4,4] x", CHAIN, {"w1": (96, 3, 1, 1), "w2": (128, 96, 1, 1), "w3": (4, 128, 1, 1)}))


# --- E7 -------------------------------------------------------------------------------------------


def test_a_layer_between_two_groups_shares_its_sparsity_evenly(chain: Chain) -> None:
    """k_in k_out = 1 - rho and nothing else to choose between them: k = sqrt(1 - rho)."""
    structure, layers = chain
    kept = solve_widths(structure, [layers["w2"]], {"w2": 0.36})
    assert kept[leaf_of(structure, "w2:1")] == pytest.approx(0.8, abs=1e-4)
    assert kept[leaf_of(structure, "w2:0")] == pytest.approx(0.8, abs=1e-4)


def test_a_pinned_axis_contributes_nothing(chain: Chain) -> None:
    structure, layers = chain
    kept = solve_widths(structure, [layers["w1"], layers["w3"]], {"w1": 0.25, "w3": 0.5})
    assert kept[leaf_of(structure, "w1:0")] == pytest.approx(0.75, abs=1e-4)
    assert kept[leaf_of(structure, "w3:1")] == pytest.approx(0.5, abs=1e-4)


def test_layers_that_disagree_are_weighted_by_their_macs(chain: Chain) -> None:
    """w1 asks for log k1 = log 0.5, w2 for log k1 + log k2 = 0, w3 for log k2 = 0; least squares by hand."""
    structure, layers = chain
    kept = solve_widths(structure, list(layers.values()), {"w1": 0.5, "w2": 0.0, "w3": 0.0})
    m1, m2 = layers["w1"].macs, layers["w2"].macs
    # k2 is at its bound 1, which leaves m1 (x1 - log .5)^2 + m2 x1^2.
    assert math.log(kept[leaf_of(structure, "w1:0")]) == pytest.approx(m1 * math.log(0.5) / (m1 + m2), abs=1e-3)
    assert kept[leaf_of(structure, "w2:0")] == pytest.approx(1.0, abs=1e-6)


def test_a_depthwise_layer_counts_its_group_once() -> None:
    body = "a = Conv(x, w) d = Conv<group=8>(a, dw) y = Conv(d, v)"
    structure, layers = read(tiny("float[1,3,4,4] x", body, {"w": (8, 3, 1, 1), "dw": (8, 1, 3, 3), "v": (4, 8, 1, 1)}))
    kept = solve_widths(structure, [layers["dw"]], {"dw": 0.5})
    assert kept[leaf_of(structure, "dw:0")] == pytest.approx(0.5, abs=1e-4)


def test_a_grouped_layer_keeps_groups_times_inputs_times_outputs() -> None:
    body = "a = Conv(x, w) d = Conv<group=4>(a, gw) y = Conv(d, v)"
    weights = {"w": (16, 3, 1, 1), "gw": (24, 4, 1, 1), "v": (4, 24, 1, 1)}
    structure, layers = read(tiny("float[1,3,4,4] x", body, weights))
    kept = solve_widths(structure, [layers["gw"]], {"gw": 1 - 0.512})
    assert [kept[group.leaf] for group in structure.groups] == pytest.approx([0.8, 0.8, 0.8], abs=1e-4)


def test_a_concatenation_is_the_share_weighted_sum_of_its_parts() -> None:
    body = "a = Conv(x, w) b = Conv(x, u) c = Concat<axis=1>(a, b) y = Conv(c, v)"
    weights = {"w": (8, 3, 1, 1), "u": (24, 3, 1, 1), "v": (64, 32, 1, 1)}
    structure, layers = read(tiny("float[1,3,4,4] x", body, weights))
    first, second = leaf_of(structure, "w:0"), leaf_of(structure, "u:0")
    kept = solve_widths(structure, [layers["v"]], {"v": 0.5})
    assert (8 * kept[first] + 24 * kept[second]) / 32 == pytest.approx(0.5, abs=1e-3)
    kept = solve_widths(structure, [layers["v"]], {"v": 0.5}, fixed={first: 0.8})
    assert kept[first] == 0.8
    assert kept[second] == pytest.approx((0.5 * 32 - 0.8 * 8) / 24, abs=1e-3)


def test_nothing_is_removed_at_zero_and_a_tenth_stays_at_one(chain: Chain) -> None:
    structure, layers = chain
    everything = list(layers.values())
    assert set(solve_widths(structure, everything, dict.fromkeys(layers, 0.0)).values()) == {1.0}
    kept = solve_widths(structure, everything, dict.fromkeys(layers, 1.0))
    assert list(kept.values()) == pytest.approx([0.1, 0.1], abs=1e-6)


@given(st.lists(st.floats(0, 1), min_size=3, max_size=3))
@settings(max_examples=60, deadline=None)
def test_fractions_stay_within_bounds(chain: Chain, rho: list[float]) -> None:
    structure, layers = chain
    kept = solve_widths(structure, list(layers.values()), dict(zip(layers, rho, strict=True)))
    assert all(0.1 - 1e-9 <= fraction <= 1 for fraction in kept.values())


# --- allowed widths, rounding, budgets ------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "inner", "multiple", "widths"),
    [
        (20, 1, 8, (8, 16, 20)),
        (16, 1, 8, (8, 16)),
        (6, 1, 8, (6,)),
        (6, 4, 8, (2, 4, 6)),
        (4, 64, 16, (1, 2, 3, 4)),
        (12, 3, 8, (8, 12)),
        (3, 1, 1, (1, 2, 3)),
    ],
)
def test_allowed_widths_are_the_multiples_below_the_size_and_the_size(
    size: int, inner: int, multiple: int, widths: tuple[int, ...]
) -> None:
    assert allowed_widths(Group("g", 0, size, (), inner), multiple).widths == widths


def test_the_nearest_width_is_by_ratio_and_ties_go_up() -> None:
    item = AllowedWidths(0, (8, 16, 24))
    assert [item.nearest(wanted) for wanted in (0.0, 11.2, 11.4, 19.5, 19.7, 99.0)] == [8, 8, 16, 16, 24, 24]
    assert AllowedWidths(0, (4, 16)).nearest(8) == 16
    assert (item.below(8), item.below(24), item.above(24), item.above(8)) == (None, 16, None, 16)


def test_halving_allowed_widths_keeps_the_largest_and_ends_at_steps_of_one() -> None:
    assert AllowedWidths(0, (16, 32, 40)).halved().widths == (8, 16, 24, 32, 40)
    assert AllowedWidths(0, (6,)).halved().widths == (3, 6)
    assert AllowedWidths(0, (1, 2, 3)).halved() == AllowedWidths(0, (1, 2, 3))


def test_multiples_too_coarse_for_a_budget_are_halved_for_it(wide_chain: Chain) -> None:
    structure, layers = wide_chain
    allowed = [allowed_widths(group, 64) for group in structure.groups]
    ranges = {fqn: SparsityRange(0.1, 0.6, "rule") for fqn in layers}
    _, counts = plan_budget(structure, list(layers.values()), allowed, ranges, 0.55)
    assert 0.97 * 0.55 <= structure.macs(counts) / structure.macs() <= 0.55
    assert any(counts[item.leaf] not in item.widths for item in allowed)


@given(st.lists(st.floats(0, 0.99), min_size=3, max_size=3), st.sampled_from([1, 4, 8, 16]))
@settings(max_examples=80, deadline=None)
def test_rounded_widths_are_allowed_and_near_the_unrounded_cost(chain: Chain, rho: list[float], multiple: int) -> None:
    structure, layers = chain
    everything, sparsity = list(layers.values()), dict(zip(layers, rho, strict=True))
    allowed = [allowed_widths(group, multiple) for group in structure.groups]
    counts = round_widths(structure, everything, sparsity, allowed)
    for item in allowed:
        assert counts[item.leaf] in item.widths
        assert counts[item.leaf] > 0
    if multiple == 1:
        fractions = solve_widths(structure, everything, sparsity)
        sizes = {group.leaf: group.size for group in structure.groups}
        wanted = structure.macs({leaf: part * sizes[leaf] for leaf, part in fractions.items()})
        largest = max(
            structure.macs(counts) - structure.macs({**counts, item.leaf: counts[item.leaf] - 1}) for item in allowed
        )
        assert abs(structure.macs(counts) - wanted) <= largest


@given(st.floats(0.05, 1.0), st.sampled_from([1, 4, 8]))
@settings(max_examples=80, deadline=None)
def test_a_strict_budget_is_never_passed_and_nothing_more_would_fit(
    chain: Chain, fraction: float, multiple: int
) -> None:
    structure, _ = chain
    allowed = [allowed_widths(group, multiple) for group in structure.groups]
    budget = fraction * structure.macs()
    dense = {item.leaf: item.widths[-1] for item in allowed}
    counts = meet_budget(
        structure.mac_cost, allowed, dense, {leaf: float(size) for leaf, size in dense.items()}, budget
    )
    lowest = structure.macs({item.leaf: float(item.widths[0]) for item in allowed})
    assert structure.macs(counts) <= max(budget, lowest)
    for item in allowed:
        wider = item.above(counts[item.leaf])
        if wider is not None:
            assert structure.macs({**counts, item.leaf: wider}) > budget


@given(st.floats(0.2, 0.95))
@settings(max_examples=40, deadline=None)
def test_a_planned_budget_is_met_from_below_within_three_percent(wide_chain: Chain, fraction: float) -> None:
    structure, layers = wide_chain
    allowed = [allowed_widths(group, 1) for group in structure.groups]
    ranges = {fqn: SparsityRange(0.1, 0.6, "rule") for fqn in layers}
    sparsity, counts = plan_budget(structure, list(layers.values()), allowed, ranges, fraction)
    assert 0.97 * fraction <= structure.macs(counts) / structure.macs() <= fraction
    assert all(0 <= value <= 1 for value in sparsity.values())
    assert min(counts.values()) > 0


def test_groups_that_are_few_are_rounded_first_and_the_others_make_good_for_them() -> None:
    body = "a = Conv(x, w) d = Conv<group=2>(a, gw) y = Conv(d, v)"
    weights = {"w": (64, 3, 1, 1), "gw": (64, 32, 1, 1), "v": (4, 64, 1, 1)}
    structure, layers = read(tiny("float[1,3,4,4] x", body, weights))
    sparsity = {"w": 0.3, "gw": 0.4, "v": 0.3}
    group, inner, outer = leaf_of(structure, "gw:0/0"), leaf_of(structure, "gw:1"), leaf_of(structure, "gw:0/1")
    fractions = solve_widths(structure, list(layers.values()), sparsity)
    # g i = 0.7, g o = 0.7 and g i o = 0.6 hold together at i = o = 0.857, g = 0.817: both groups stay.
    assert fractions[group] == pytest.approx(0.817, abs=1e-3)
    assert fractions[inner] == pytest.approx(0.857, abs=1e-3)
    counts = round_widths(
        structure, list(layers.values()), sparsity, [allowed_widths(item, 1) for item in structure.groups]
    )
    assert counts[group] == 2
    assert counts[inner] * counts[outer] / 32**2 == pytest.approx(0.6, abs=0.04)


# --- scores, choice, sparsity ---------------------------------------------------------------------


def test_a_group_s_scores_are_summed_over_every_slice_it_owns(chain: Chain) -> None:
    structure, _ = chain
    rng = np.random.default_rng(0)
    scores = {name: rng.random(shape).astype(np.float32) for name, shape in CHAIN_WEIGHTS.items()}
    found = group_scores(structure, scores)
    expected = scores["w1"].sum((1, 2, 3)) + scores["w2"].sum((0, 2, 3))
    assert found[leaf_of(structure, "w1:0")] == pytest.approx(expected, rel=1e-5)
    without = group_scores(structure, {"w1": scores["w1"]})
    assert without[leaf_of(structure, "w1:0")] == pytest.approx(scores["w1"].sum((1, 2, 3)), rel=1e-5)
    assert not without[leaf_of(structure, "w3:1")].any()


def test_scores_of_a_flattened_map_are_summed_over_its_positions() -> None:
    body = "a = Conv(x, w) f = Flatten<axis=1>(a) y = Gemm(f, v)"
    structure = structure_of(tiny("float[1,3,1,2] x", body, {"w": (3, 3, 1, 1), "v": (6, 2)}))
    found = group_scores(structure, {"v": np.arange(12, dtype=np.float32).reshape(6, 2)})
    assert found[leaf_of(structure, "w:0")].tolist() == [0 + 1 + 2 + 3, 4 + 5 + 6 + 7, 8 + 9 + 10 + 11]


def test_scores_of_a_part_of_a_concatenation_leave_the_other_part_out() -> None:
    body = "a = Conv(x, w) b = Conv(x, u) c = Concat<axis=1>(a, b) y = Conv(c, v)"
    structure = structure_of(tiny("float[1,3,1,1] x", body, {"w": (2, 3, 1, 1), "u": (3, 3, 1, 1), "v": (1, 5, 1, 1)}))
    found = group_scores(structure, {"v": np.array([[1, 2, 3, 4, 5]], np.float32)[..., None, None]})
    assert found[leaf_of(structure, "w:0")].tolist() == [1, 2]
    assert found[leaf_of(structure, "u:0")].tolist() == [3, 4, 5]


def test_the_highest_scores_stay_and_ties_go_to_the_lower_index() -> None:
    keep = select_indices({7: 3}, {7: np.array([1.0, 5.0, 1.0, 2.0, 1.0])})
    assert keep[7].tolist() == [True, True, False, True, False]


def test_sparsity_is_one_minus_kept_over_dense_weights(chain: Chain) -> None:
    structure, layers = chain
    keep = {
        leaf_of(structure, "w1:0"): np.arange(16) < 8,
        leaf_of(structure, "w3:1"): np.arange(32) < 24,
    }
    kept = 8 * 3 + 24 * 8 + 4 * 24
    dense = 16 * 3 + 32 * 16 + 4 * 32
    assert sparsity_of(structure, list(layers.values()), keep) == pytest.approx(1 - kept / dense)
    assert sparsity_of(structure, list(layers.values()), {}) == 0
    assert sparsity_of(structure, [], keep) == 0

"""The model of time: it finds again the law a table was made by, and allocation follows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_graphs import structure_of, tiny

from mm_edge.errors import UsageError
from mm_edge.graph.axes import Keep
from mm_edge.graph.costs import Cost
from mm_edge.graph.groups import Structure
from mm_edge.graph.widths import AllowedWidths, allowed_widths
from mm_edge.plan.latency_table import TimedWidth, at_another_size, fit_time, measure_table
from mm_edge.records import Constraints
from mm_edge.recover.closed_form.sensitivity import Measured, Sensitivity, allocate
from mm_edge.recover.closed_form.surgeon import Order
from mm_edge.run.request import make_request

# Two pairs of layers alike in multiply-adds; nothing but time tells their groups apart.
BODY = "a = Conv(x, w1) b = Relu(a) c = Conv(b, w2) d = Relu(c) e = Conv(d, w3) f = Relu(e) y = Conv(f, w4)"
WEIGHTS = {"w1": (64, 8, 1, 1), "w2": (8, 64, 1, 1), "w3": (64, 8, 1, 1), "w4": (8, 64, 1, 1)}


@pytest.fixture(scope="module")
def net() -> Structure:
    return structure_of(tiny("float[1,8,4,4] x", BODY, WEIGHTS))


def widths_of(net: Structure) -> list[AllowedWidths]:
    return [allowed_widths(group, 8) for group in net.groups]


def law(net: Structure, shares: tuple[float, ...]) -> Cost:
    """Return the time of a network whose nodes take `shares`, the rest being fixed."""
    cost = net.mac_cost
    items = [
        type(item)(item.node, item.axes, item.constant * share / cost.of_item(item, {}))
        for item, share in zip(cost.items, shares, strict=True)
    ]
    return Cost(cost.table, tuple(items), 1 - sum(shares))


def table_of(net: Structure, truth: Cost) -> tuple[TimedWidth, ...]:
    def time(keep: Keep) -> float:
        return truth.total({leaf: float(kept.sum()) for leaf, kept in keep.items()})

    return measure_table(net, widths_of(net), time)


def test_each_group_is_timed_at_a_half_and_a_quarter(net: Structure) -> None:
    table = table_of(net, law(net, (0.25,) * 4))
    sizes = {group.leaf: group.size for group in net.groups}
    assert [(item.leaf, item.count) for item in table] == [
        (leaf, round(part * size)) for leaf, size in sizes.items() for part in ((0.5, 0.25) if size > 8 else ())
    ]


@pytest.mark.parametrize("shares", [(0.1, 0.1, 0.3, 0.3), (0.3, 0.3, 0.02, 0.02), (0.05, 0.05, 0.05, 0.05)])
def test_the_law_behind_a_table_is_found_again(net: Structure, shares: tuple[float, ...]) -> None:
    truth = law(net, shares)
    found = fit_time(net.mac_cost, table_of(net, truth))
    assert found.total() == pytest.approx(1.0)
    assert all(item.constant >= 0 for item in found.items)
    rng = np.random.default_rng(0)
    for _ in range(20):
        counts = {group.leaf: float(rng.integers(1, group.size + 1)) for group in net.groups if group.size > 8}
        assert found.total(counts) == pytest.approx(truth.total(counts), abs=0.01)
    by_macs = net.mac_cost
    narrow = {net.groups[0].leaf: 16.0}
    assert abs(by_macs.total(narrow) / by_macs.total() - truth.total(narrow)) > 0.05


def test_a_device_on_which_nothing_gets_faster_has_all_its_time_fixed(net: Structure) -> None:
    found = fit_time(net.mac_cost, [TimedWidth(item.leaf, 16, 1.0) for item in widths_of(net) if len(item.widths) > 1])
    assert found.fixed > 0.95 and found.total() == pytest.approx(1.0)


def test_at_another_size_time_goes_with_the_work_of_each_node(net: Structure) -> None:
    small = structure_of(tiny("float[1,8,2,2] x", BODY, WEIGHTS))
    truth = law(net, (0.1, 0.1, 0.3, 0.3))
    found = at_another_size(truth, small.mac_cost, net.mac_cost)
    assert found.total() == pytest.approx(0.2 + 0.8 / 4)
    assert found.total({small.groups[-1].leaf: 32.0}) == pytest.approx(0.2 + (0.2 + 0.3) / 4)
    other = structure_of(tiny("float[1,8,4,4] x", "a = Conv(x, w1) b = Relu(a) y = Conv(b, w2)", WEIGHTS))
    assert at_another_size(truth, other.mac_cost, net.mac_cost).total() == pytest.approx(0.2 + 0.8 / 2)


def test_widths_are_taken_where_they_cost_least_divergence_per_time(net: Structure) -> None:
    """Two groups that diverge alike and hold as many multiply-adds; the second takes three times as long."""
    wide = [group.leaf for group in net.groups if group.size == 64]
    order = Order(np.arange(64), np.arange(1, 65) / 64)
    points = tuple(Measured(count, 0.1 * (64 - count) / 64, "obs", 0.03) for count in (48, 32, 16))
    alike = {leaf: Sensitivity(leaf, order, order, points) for leaf in wide}
    time = law(net, (0.1, 0.1, 0.3, 0.3))
    by_time = allocate(time, alike, 0.85, widths_of(net))
    assert by_time[wide[0]] > by_time[wide[1]]
    assert time.total({leaf: float(count) for leaf, count in by_time.items()}) <= 0.85
    by_macs = allocate(net.mac_cost, alike, 0.8 * net.macs(), widths_of(net))
    assert abs(by_macs[wide[0]] - by_macs[wide[1]]) <= 8


def test_the_setting_is_for_budgets_of_time(tmp_path: Path) -> None:
    setting = {"out": tmp_path, "data": "images"}
    with pytest.raises(UsageError, match=r"^--allocate-by latency is for budgets of time; give --speedup X or --lat"):
        make_request(**setting, allocate_by="latency", constraints=Constraints(size_bytes=100))
    with pytest.raises(UsageError, match=r"'time'.*--allocate-by|--allocate-by.*'time'|unknown"):
        make_request(**setting, allocate_by="time")
    timed: Any = {"allocate_by": "latency", "constraints": Constraints(speedup=1.5)}
    assert make_request(**setting, **timed).allocate_by == "latency"

"""Axis variables: every view of one axis keeps and loses the same indices, whatever was split, merged or unified."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_edge.graph.axes import Axis, AxisTable

SIZE = 24
FACTORS = [(2, 12), (12, 2), (3, 8), (8, 3), (4, 6), (6, 4), (2, 3, 4), (4, 3, 2), (2, 2, 6), (24, 1), (1, 24)]


def random_keep(table: AxisTable, axes: list[Axis], seed: int) -> dict[Axis, np.ndarray]:
    """Return a random keep of every leaf below `axes` that may lose indices; one of size one is never a group."""
    rng = np.random.default_rng(seed)
    leaves = {leaf for axis in axes for leaf in table.leaves(axis) if table.size(leaf) > 1}
    return {leaf: rng.random(table.size(leaf)) < 0.6 for leaf in sorted(leaves) if table.pin_reason(leaf) is None}


def partition(cuts: list[int]) -> list[int]:
    edges = [0, *sorted(cuts), SIZE]
    return [b - a for a, b in itertools.pairwise(edges)]


views = st.one_of(
    st.tuples(st.just("product"), st.sampled_from(FACTORS)),
    st.tuples(st.just("sum"), st.lists(st.integers(0, SIZE), min_size=1, max_size=3).map(partition)),
)


def take_view(table: AxisTable, axis: Axis, kind: str, sizes: tuple[int, ...]) -> Axis:
    """Split `axis` and put the pieces together again: another view of the same positions."""
    parts = table.split_product(axis, sizes) if kind == "product" else table.split_sum(axis, sizes)
    assert [table.size(part) for part in parts] == list(sizes)
    return table.product(parts) if kind == "product" else table.sum(parts)


@given(st.lists(views, min_size=1, max_size=6), st.integers(0, 99))
@settings(max_examples=300, deadline=None)
def test_every_view_of_an_axis_keeps_the_same_indices(programme: list[tuple[str, tuple[int, ...]]], seed: int) -> None:
    table = AxisTable()
    axis = table.fresh(SIZE)
    seen = [axis, *(take_view(table, axis, kind, sizes) for kind, sizes in programme)]
    keep = random_keep(table, seen, seed)
    expected = table.kept(axis, keep)
    for view in seen:
        assert table.kept(view, keep).tolist() == expected.tolist()


@given(st.lists(views, max_size=3), st.lists(views, max_size=3), st.lists(views, max_size=2), st.integers(0, 99))
@settings(max_examples=300, deadline=None)
def test_unified_axes_keep_the_same_indices_whatever_each_was_made_of(
    left: list[tuple[str, tuple[int, ...]]],
    right: list[tuple[str, tuple[int, ...]]],
    after: list[tuple[str, tuple[int, ...]]],
    seed: int,
) -> None:
    table = AxisTable()
    a, b = table.fresh(SIZE), table.fresh(SIZE)
    seen = [a, b, *(take_view(table, a, *view) for view in left), *(take_view(table, b, *view) for view in right)]
    table.unify(a, b)
    seen += [take_view(table, a, *view) for view in after]
    keep = random_keep(table, seen, seed)
    expected = table.kept(a, keep)
    for view in seen:
        assert table.kept(view, keep).tolist() == expected.tolist()


@given(st.lists(views, max_size=4), st.integers(0, 99))
@settings(max_examples=200, deadline=None)
def test_kept_is_what_the_coordinates_say_and_kept_size_is_its_sum(
    programme: list[tuple[str, tuple[int, ...]]], seed: int
) -> None:
    table = AxisTable()
    axis = table.fresh(SIZE)
    for kind, sizes in programme:
        take_view(table, axis, kind, sizes)
    keep = random_keep(table, [axis], seed)
    expected = np.ones(SIZE, dtype=np.bool_)
    for leaf, mask in keep.items():
        for coordinates in table.coordinates(axis, leaf):
            reached = coordinates >= 0
            expected[reached] &= mask[coordinates[reached]]
    assert table.kept(axis, keep).tolist() == expected.tolist()
    counts = {leaf: float(mask.sum()) for leaf, mask in keep.items()}
    assert table.kept_size(axis, counts) == expected.sum()


def test_a_product_runs_over_its_factors_the_major_one_first() -> None:
    table = AxisTable()
    head, width = table.fresh(2), table.fresh(3)
    axis = table.product([head, width])
    assert table.coordinates(axis, head)[0].tolist() == [0, 0, 0, 1, 1, 1]
    assert table.coordinates(axis, width)[0].tolist() == [0, 1, 2, 0, 1, 2]
    keep = {head: np.array([True, False]), width: np.array([True, False, True])}
    assert table.kept(axis, keep).tolist() == [True, False, True, False, False, False]


def test_a_sum_puts_its_parts_one_behind_the_other_and_marks_what_a_part_does_not_cover() -> None:
    table = AxisTable()
    first, second = table.fresh(2), table.fresh(3)
    axis = table.sum([first, second])
    assert table.coordinates(axis, second)[0].tolist() == [-1, -1, 0, 1, 2]
    assert table.kept(axis, {second: np.array([False, True, True])}).tolist() == [True, True, False, True, True]


def test_an_axis_concatenated_with_itself_has_two_occurrences() -> None:
    table = AxisTable()
    part = table.fresh(2)
    axis = table.sum([part, part])
    assert [item.tolist() for item in table.coordinates(axis, part)] == [[0, 1, -1, -1], [-1, -1, 0, 1]]
    assert table.kept_size(axis, {part: 1.0}) == 2


def test_splitting_what_was_merged_gives_the_factors_back() -> None:
    table = AxisTable()
    factors = [table.fresh(size) for size in (3, 4, 2)]
    assert table.split_product(table.product(factors), [3, 4, 2]) == factors
    parts = [table.fresh(size) for size in (3, 4, 2)]
    assert table.split_sum(table.sum(parts), [3, 4, 2]) == parts


def test_a_finer_split_refines_a_coarser_one() -> None:
    table = AxisTable()
    axis = table.fresh(24)
    outer, inner = table.split_product(axis, [4, 6])
    a, b, c = table.split_product(axis, [4, 2, 3])
    assert table.find(a) == table.find(outer)
    assert list(table.leaves(inner)) == [table.find(b), table.find(c)]


def test_ones_and_empty_parts_come_back_in_place_and_bind_nothing() -> None:
    table = AxisTable()
    axis = table.fresh(6)
    one, same, last = table.split_product(axis, [1, 6, 1])
    assert (table.size(one), same, table.size(last)) == (1, axis, 1)
    empty, whole = table.split_sum(axis, [0, 6])
    assert (table.size(empty), whole) == (0, axis)
    assert table.binding(axis) is None


@pytest.mark.parametrize("kind", ["two products", "a cut inside a factor", "a factor across a cut"])
def test_cuts_that_do_not_meet_pin_the_axis(kind: str) -> None:
    table = AxisTable()
    axis = table.fresh(24)
    if kind == "two products":
        table.split_product(axis, [3, 8])
        table.split_product(axis, [4, 6])
        reason = "two reshapes cut this axis at different places"
    elif kind == "a cut inside a factor":
        table.split_product(axis, [3, 8])
        table.split_sum(axis, [4, 20])
        reason = "a split cuts this axis where a reshape does not"
    else:
        table.split_sum(axis, [4, 20])
        table.split_product(axis, [3, 8])
        reason = "a reshape cuts this axis where a concatenation or split does not"
    assert {table.pin_reason(leaf) for leaf in table.leaves(axis)} == {reason}


def test_misaligned_factors_pin_up_to_the_next_boundary_both_sides_share_and_no_further() -> None:
    table = AxisTable()
    axis = table.fresh(48)
    *_, last = table.split_product(axis, [4, 3, 4])
    *_, same = table.split_product(axis, [3, 4, 4])
    assert table.find(last) == table.find(same)
    assert table.pin_reason(last) is None
    assert [table.pin_reason(leaf) is None for leaf in table.leaves(axis)] == [False, False, True]


def test_different_sizes_pin_both_sides() -> None:
    table = AxisTable()
    a, b = table.fresh(4), table.fresh(6)
    table.unify(a, b)
    assert table.find(a) != table.find(b)
    assert {table.pin_reason(a), table.pin_reason(b)} == {"its size is 4 on one side and 6 on the other"}


def test_axes_of_size_one_are_never_coupled() -> None:
    table = AxisTable()
    a, b = table.fresh(1), table.fresh(1)
    table.unify(a, b)
    assert table.find(a) != table.find(b)


def test_a_pin_reaches_every_leaf_and_survives_unify_and_split_and_the_first_reason_stays() -> None:
    table = AxisTable()
    a, b = table.fresh(6), table.fresh(6)
    table.pin(a, "first")
    table.unify(b, a)
    table.pin(b, "second")
    factors = table.split_product(b, [2, 3])
    assert [table.pin_reason(factor) for factor in factors] == ["first", "first"]
    bound = table.product([table.fresh(2), table.fresh(3)])
    table.unify(bound, a)
    assert {table.pin_reason(leaf) for leaf in table.leaves(bound)} == {"first"}


def test_a_concatenation_of_whole_multiples_can_be_factored() -> None:
    """[4 + 2] * 3 channels read as (6, 3): the majors concatenate, the minor is common."""
    table = AxisTable()
    axis = table.sum([table.fresh(12), table.fresh(6)])
    major, minor = table.split_product(axis, [6, 3])
    assert [table.size(leaf) for leaf in table.leaves(major)] == [4, 2]
    keep = {minor: np.array([True, False, True])}
    assert table.kept(axis, keep).tolist() == [True, False, True] * 6


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_kept_sizes_may_be_fractions(sizes: list[int]) -> None:
    table = AxisTable()
    factors = [table.fresh(size) for size in sizes]
    counts = {factor: 0.5 * table.size(factor) for factor in factors if table.size(factor) > 1}
    expected = math.prod(0.5 * size if size > 1 else 1 for size in sizes)
    assert table.kept_size(table.product(factors), counts) == pytest.approx(expected)

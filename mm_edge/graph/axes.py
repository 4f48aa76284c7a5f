"""Axes of tensors as variables, and what operators say about them.

Every axis of every tensor is a variable of known size. An operator can say three things:

    unify(a, b)         a and b are the same axis: they keep and lose the same indices
    product(f1, ..fn)   index = (i1 * |f2| + i2) * ... + in          (reshape merges or splits)
    sum(s1, ..sn)       the parts one after the other                (concat, split, slice)

A variable is thus a *leaf*, or bound to a product or a sum of smaller variables. Leaves that no
operator pinned are the coupled groups: removing index i of a leaf removes, from every axis built
of it, all positions whose coordinate in that leaf is i.

Two statements may contradict each other: a reshape cuts an axis where a split does not. Then every leaf of both axes
is pinned, which makes the compact graph right whatever the statements say. Parts are always smaller than the whole
and factors of size one are dropped, so the bindings form no cycle.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mm_edge.arrays import BoolArray, IntArray

Axis = int
# Which indices each group keeps, by the group's leaf; a group that is absent keeps them all.
Keep = Mapping[Axis, BoolArray]


@dataclass(frozen=True)
class Binding:
    """What a variable is made of: a "product" (major factor first) or a "sum" (in order) of parts."""

    kind: str
    parts: tuple[Axis, ...]


class AxisTable:
    """All axis variables of one graph, with union-find."""

    def __init__(self) -> None:
        """Start with no variables."""
        self._size: list[int] = []
        self._parent: list[Axis] = []
        self._binding: list[Binding | None] = []
        self._pin: list[str | None] = []

    def fresh(self, size: int, pin: str | None = None) -> Axis:
        """Return a new variable of `size`, pinned with the reason `pin` if one is given."""
        self._size.append(size)
        self._parent.append(len(self._parent))
        self._binding.append(None)
        self._pin.append(pin)
        return len(self._parent) - 1

    def find(self, axis: Axis) -> Axis:
        """Return the representative of `axis`."""
        root = axis
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[axis] != root:
            self._parent[axis], axis = root, self._parent[axis]
        return root

    def size(self, axis: Axis) -> int:
        """Return the dense size of `axis`."""
        return self._size[axis]

    def binding(self, axis: Axis) -> Binding | None:
        """Return what `axis` is made of, or None for a leaf."""
        return self._binding[self.find(axis)]

    def pin_reason(self, leaf: Axis) -> str | None:
        """Return why `leaf` may not lose an index, or None."""
        return self._pin[self.find(leaf)]

    def leaves(self, axis: Axis) -> Iterator[Axis]:
        """Yield the leaves `axis` is made of, in order, with repetitions."""
        root = self.find(axis)
        binding = self._binding[root]
        if binding is None:
            yield root
            return
        for part in binding.parts:
            yield from self.leaves(part)

    def pin(self, axis: Axis, reason: str) -> None:
        """Keep every index of `axis`; a leaf that is pinned twice keeps its first reason."""
        for leaf in list(self.leaves(axis)):
            if self._pin[leaf] is None:
                self._pin[leaf] = reason

    def product(self, factors: Sequence[Axis]) -> Axis:
        """Return the axis whose index runs over `factors`, the major one first."""
        wide = [factor for factor in factors if self.size(factor) > 1]
        if not wide:
            return self.fresh(1)
        if len(wide) == 1:
            return wide[0]
        axis = self.fresh(math.prod(self.size(factor) for factor in wide))
        self._binding[axis] = Binding("product", tuple(wide))
        return axis

    def sum(self, parts: Sequence[Axis]) -> Axis:
        """Return the axis made of `parts` one after the other."""
        filled = [part for part in parts if self.size(part) > 0]
        if len(filled) == 1:
            return filled[0]
        axis = self.fresh(sum(self.size(part) for part in filled))
        if filled:
            self._binding[axis] = Binding("sum", tuple(filled))
        return axis

    def unify(self, a: Axis, b: Axis) -> None:
        """Make `a` and `b` one axis; if their sizes differ, pin both."""
        a, b = self.find(a), self.find(b)
        if a == b:
            return
        if self._size[a] != self._size[b]:
            self._conflict(a, b, f"its size is {self._size[a]} on one side and {self._size[b]} on the other")
            return
        if self._size[a] == 1:
            return
        bound_a, bound_b = self._binding[a], self._binding[b]
        if bound_a is not None and bound_b is not None:
            self._unify_bound(a, bound_a, b, bound_b)
            return
        child, root = (a, b) if bound_a is None else (b, a)
        self._parent[child] = root
        reason = self._pin[child]
        if reason is not None:
            self.pin(root, reason)

    def split_product(self, axis: Axis, sizes: Sequence[int]) -> list[Axis]:
        """Return factors of `sizes` (major first) whose product is `axis`.

        Factors of size one come back as variables of their own.
        """
        wide = [size for size in sizes if size > 1]
        factors = self._split_wide(axis, wide) if len(wide) > 1 else [axis] * len(wide)
        rest = iter(factors)
        return [next(rest) if size > 1 else self.fresh(1) for size in sizes]

    def split_sum(self, axis: Axis, sizes: Sequence[int]) -> list[Axis]:
        """Return the consecutive parts of `axis` that have `sizes`; empty parts come back as size 0."""
        filled = [size for size in sizes if size > 0]
        parts = self._split_parts(axis, filled) if len(filled) > 1 else [axis] * len(filled)
        rest = iter(parts)
        return [next(rest) if size > 0 else self.fresh(0) for size in sizes]

    def kept(self, axis: Axis, keep: Keep) -> BoolArray:
        """Return which indices of `axis` stay, a bool array of its size, given those of its leaves.

        A leaf that is not in `keep` stays whole.
        """
        root = self.find(axis)
        binding = self._binding[root]
        if binding is None:
            mask = keep.get(root)
            return np.ones(self._size[root], dtype=np.bool_) if mask is None else mask
        parts = [self.kept(part, keep) for part in binding.parts]
        if binding.kind == "sum":
            return np.concatenate(parts)
        mask = parts[0]
        for part in parts[1:]:
            mask = np.logical_and.outer(mask, part).reshape(-1)
        return mask

    def kept_size(self, axis: Axis, counts: dict[Axis, float]) -> float:
        """Return how many indices of `axis` stay when each leaf keeps `counts[leaf]` of its own.

        Counts may be fractions (E7 works on real numbers). A leaf that is not in `counts` stays whole.
        """
        root = self.find(axis)
        binding = self._binding[root]
        if binding is None:
            return counts.get(root, self._size[root])
        parts = [self.kept_size(part, counts) for part in binding.parts]
        return math.prod(parts) if binding.kind == "product" else math.fsum(parts)

    def coordinates(self, axis: Axis, leaf: Axis) -> list[IntArray]:
        """Return, for each occurrence of `leaf` in `axis`, the leaf's index at every position of the axis.

        Arrays have the axis' size; -1 stands where the occurrence does not cover a position.
        """
        root = self.find(axis)
        binding = self._binding[root]
        if binding is None:
            return [np.arange(self._size[root])] if root == self.find(leaf) else []
        found: list[IntArray] = []
        before = 0 if binding.kind == "sum" else 1
        for part in binding.parts:
            size = self._size[part]
            for inner in self.coordinates(part, leaf):
                if binding.kind == "sum":
                    full = np.full(self._size[root], -1)
                    full[before : before + size] = inner
                else:
                    after = self._size[root] // (before * size)
                    full = np.tile(np.repeat(inner, after), before)
                found.append(full)
            before = before + size if binding.kind == "sum" else before * size
        return found

    def _unify_bound(self, a: Axis, bound_a: Binding, b: Axis, bound_b: Binding) -> None:
        if bound_a.kind == bound_b.kind == "product":
            self._match(list(bound_a.parts), list(bound_b.parts), divide=True)
        else:
            # Cut both at the sum's boundaries; a product can be cut only between indices of its major factor.
            sizes = [self.size(part) for part in (bound_a if bound_a.kind == "sum" else bound_b).parts]
            for part_a, part_b in zip(self.split_sum(a, sizes), self.split_sum(b, sizes), strict=True):
                self.unify(part_a, part_b)
        a, b = self.find(a), self.find(b)
        if a != b:
            self._parent[a] = b

    def _match(self, left: list[Axis], right: list[Axis], *, divide: bool) -> None:
        """Unify two lists of parts after cutting both at each other's boundaries.

        Parts are factors when `divide` (sizes divide), else terms of a sum (sizes subtract). Factors whose
        boundaries meet nowhere are pinned together, up to the next boundary both sides share.
        """
        left, right = left[::-1], right[::-1]
        while left and right:
            a, b = left.pop(), right.pop()
            size_a, size_b = self.size(a), self.size(b)
            if size_a == size_b:
                self.unify(a, b)
                continue
            if size_a < size_b:
                a, b, size_a, size_b, left, right = b, a, size_b, size_a, right, left
            if divide and size_a % size_b:
                self._pin_misaligned(a, b, left, right)
                continue
            sizes = [size_b, size_a // size_b if divide else size_a - size_b]
            head, tail = self.split_product(a, sizes) if divide else self.split_sum(a, sizes)
            self.unify(head, b)
            left.append(tail)

    def _pin_misaligned(self, a: Axis, b: Axis, left: list[Axis], right: list[Axis]) -> None:
        """Pin `a`, `b` and what follows on either side, up to the next shared boundary."""
        reason = "two reshapes cut this axis at different places"
        self.pin(a, reason)
        self.pin(b, reason)
        size_a, size_b = self.size(a), self.size(b)
        while size_a != size_b:
            axis = (left if size_a < size_b else right).pop()
            self.pin(axis, reason)
            if size_a < size_b:
                size_a *= self.size(axis)
            else:
                size_b *= self.size(axis)

    def _split_wide(self, axis: Axis, sizes: list[int]) -> list[Axis]:
        root = self.find(axis)
        binding = self._binding[root]
        if binding is not None and binding.kind == "sum":
            return self._factor_sum(root, binding.parts, sizes)
        factors = [self.fresh(size) for size in sizes]
        if binding is None:
            self._bind(root, Binding("product", tuple(factors)))
        elif [self.size(part) for part in binding.parts] == sizes:
            return list(binding.parts)
        else:
            self._match(list(binding.parts), list(factors), divide=True)
        return factors

    def _factor_sum(self, root: Axis, parts: tuple[Axis, ...], sizes: list[int]) -> list[Axis]:
        """Write a sum as major * rest: every part must hold whole multiples of the rest."""
        rest_size = math.prod(sizes[1:])
        rest = self.fresh(rest_size)
        if any(self.size(part) % rest_size for part in parts):
            self.pin(root, "a reshape cuts this axis where a concatenation or split does not")
            return [self.fresh(size, pin="cut from an axis that cannot be cut there") for size in sizes]
        majors = []
        for part in parts:
            major, inner = self.split_product(part, [self.size(part) // rest_size, rest_size])
            self.unify(inner, rest)
            majors.append(major)
        return [self.sum(majors), *self.split_product(rest, sizes[1:])]

    def _split_parts(self, axis: Axis, sizes: list[int]) -> list[Axis]:
        root = self.find(axis)
        binding = self._binding[root]
        if binding is not None and binding.kind == "product":
            return self._cut_product(root, binding.parts, sizes)
        parts = [self.fresh(size) for size in sizes]
        if binding is None:
            self._bind(root, Binding("sum", tuple(parts)))
        elif [self.size(part) for part in binding.parts] == sizes:
            return list(binding.parts)
        else:
            self._match(list(binding.parts), list(parts), divide=False)
        return parts

    def _cut_product(self, root: Axis, factors: tuple[Axis, ...], sizes: list[int]) -> list[Axis]:
        """Cut a product into parts: the cuts must fall between indices of its major factor."""
        inner = self._size[root] // self.size(factors[0])
        if any(size % inner for size in sizes):
            self.pin(root, "a split cuts this axis where a reshape does not")
            return [self.fresh(size, pin="cut from an axis that cannot be cut there") for size in sizes]
        majors = self.split_sum(factors[0], [size // inner for size in sizes])
        return [self.product([major, *factors[1:]]) for major in majors]

    def _bind(self, root: Axis, binding: Binding) -> None:
        reason = self._pin[root]
        self._binding[root] = binding
        if reason is not None:
            self.pin(root, reason)

    def _conflict(self, a: Axis, b: Axis, reason: str) -> None:
        self.pin(a, reason)
        self.pin(b, reason)

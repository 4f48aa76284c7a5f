"""What one candidate removes: the records, and the plans of the strategies.

A plan keeps whole channels (`ChannelPlan`: structured) or single weights (`WeightPlan`: unstructured or n:m).
Plans that meet a budget are made in scaling.py and budgets.py.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from mm_edge.arrays import BoolArray
from mm_edge.errors import UsageError
from mm_edge.graph.axes import Keep
from mm_edge.graph.export import RawGraph
from mm_edge.graph.groups import Structure
from mm_edge.graph.rounding import round_widths
from mm_edge.graph.widths import AllowedWidths, Counts, group_scores, select_indices
from mm_edge.plan.masks import build_masks, rank_scores
from mm_edge.plan.n_m import parse_pattern, project, reduced_axes
from mm_edge.plan.scores import Scores
from mm_edge.records import Assignment, Layer, candidate_id, file_name

_P = TypeVar("_P", bound="Plan")

# The pattern that candidates of kind "n:m" follow.
PATTERN = parse_pattern("2:4")


@dataclass(frozen=True)
class Plan(ABC):
    """What to remove for one candidate.

    Attributes:
        assignment: the signal and the strategies it stands for, with a sparsity per layer.
        kind: the candidate's kind, one of plan.kinds.KINDS.
        side: the side of the input; None for the size the dense network was given at.
        planned_by: how the plan came to meet its budget; None for a plan of a strategy.
    """

    assignment: Assignment
    kind: str
    side: int | None = field(default=None, kw_only=True)
    planned_by: str | None = field(default=None, kw_only=True)

    @property
    def id(self) -> str:
        """The candidate's id in the report."""
        return candidate_id(self.assignment.signal, self.assignment.strategy, self.kind, "fp32", self.side)

    @property
    def file_name(self) -> str:
        """The name its files carry, without suffix."""
        return file_name(self.assignment.signal, self.assignment.strategy, self.kind, "fp32", self.side)

    def digest(self) -> str:
        """Return a hash of the candidate's names and of what is removed."""
        names = ",".join(self.assignment.names)
        return hashlib.sha256(f"{self.id} {names} {hash_masks(self._kept())}".encode()).hexdigest()

    @abstractmethod
    def _kept(self) -> Mapping[Any, BoolArray]:
        """Return the arrays that say what stays."""


@dataclass(frozen=True)
class ChannelPlan(Plan):
    """Whole channels go.

    Attributes:
        keep: which indices stay, by the groups of the network at `side`.
        removed: ids of the residual branches that go as a whole: their groups keep nothing.
    """

    kind: str = field(default="structured", init=False)
    keep: Keep
    removed: tuple[str, ...] = ()

    def _kept(self) -> Mapping[Any, BoolArray]:
        return self.keep


@dataclass(frozen=True)
class WeightPlan(Plan):
    """Single weights go; `kind` is "unstructured" or "n:m".

    Attributes:
        masks: which weights stay, by fqn, of each weight's shape.
    """

    masks: Mapping[str, BoolArray]

    def _kept(self) -> Mapping[Any, BoolArray]:
        return self.masks


def plan_all(
    structure: Structure,
    layers: Sequence[Layer],
    allowed: Sequence[AllowedWidths],
    scores: Scores,
    assignments: Sequence[Assignment],
    kinds: Sequence[str],
) -> list[Plan]:
    """Return the plans of all assignments, kind by kind. Rankings are made once per signal."""
    plans: list[Plan] = []
    if "structured" in kinds:
        plans += plan_structured(structure, layers, allowed, scores, assignments)
    if "unstructured" in kinds:
        for signal in scores:
            rankings = rank_scores(layers, scores[signal])
            for assignment in assignments:
                if assignment.signal == signal:
                    plans.append(WeightPlan(assignment, "unstructured", build_masks(rankings, assignment)))
    return plans


def plan_structured(
    structure: Structure,
    layers: Sequence[Layer],
    allowed: Sequence[AllowedWidths],
    scores: Scores,
    assignments: Sequence[Assignment],
) -> list[ChannelPlan]:
    """Return one plan per signal and set of widths: E7's, rounded to what the target allows, the highest scores kept.

    Widths depend on the strategy alone, so they are found once for all signals. Strategies that come to the same widths
    make one plan, which carries all their names.
    """
    by_signal = {signal: group_scores(structure, scores[signal]) for signal in scores}
    widths: dict[tuple[str, ...], Counts] = {}
    plans: dict[tuple[str, str], ChannelPlan] = {}
    for assignment in assignments:
        if assignment.names not in widths:
            widths[assignment.names] = round_widths(structure, layers, assignment.sparsity, allowed)
        keep = select_indices(widths[assignment.names], by_signal[assignment.signal])
        _add_name_(plans, assignment, hash_masks(keep), ChannelPlan(replace(assignment, names=()), keep))
    return list(plans.values())


def _add_name_(plans: dict[tuple[str, str], _P], assignment: Assignment, kept: str, plan: _P) -> None:
    """Add `plan`, or the names of its assignment to the plan of the same signal that keeps the same."""
    first = plans.get((assignment.signal, kept), plan)
    names = (*first.assignment.names, *assignment.names)
    plans[assignment.signal, kept] = replace(first, assignment=replace(first.assignment, names=names))


def plan_n_m(
    raw: RawGraph, layers: Sequence[Layer], scores: Scores, assignments: Sequence[Assignment]
) -> tuple[list[WeightPlan], dict[str, str]]:
    """Return one n:m plan per different set of masks, and why the layers that none of them touches stay dense.

    The pattern takes the same share whatever the strategy's rho, so most strategies of a signal come to the same masks:
    one plan carries all their names.

    Raises:
        UsageError: no layer is large enough to gain from the pattern.
    """
    axes = reduced_axes(raw.model)
    plans: dict[tuple[str, str], WeightPlan] = {}
    dense: dict[str, str] = {}
    for assignment in assignments:
        found = project(layers, scores[assignment.signal], assignment.sparsity, axes, PATTERN)
        dense = {fqn: reason for fqn, reason in found.dense.items() if fqn in dense or not plans}
        if found.masks:
            plan = WeightPlan(replace(assignment, names=()), "n:m", found.masks)
            _add_name_(plans, assignment, hash_masks(found.masks), plan)
    if not plans:
        reason = next(iter(dense.values()), "it has no layer of that kind")
        raise UsageError(f"--kinds n:m: no layer of this network takes {PATTERN}: {reason}; use --kinds structured")
    return list(plans.values()), dense


def hash_masks(masks: Mapping[Any, BoolArray]) -> str:
    """Return a hash of masks and their names, whatever their order."""
    state = hashlib.sha256()
    for name, mask in sorted(masks.items(), key=lambda item: str(item[0])):
        state.update(f"{name}".encode())
        state.update(np.packbits(mask).tobytes())
    return state.hexdigest()

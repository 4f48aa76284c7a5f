"""How widths are found that meet a budget.

`--macs`, `--size`, `--speedup` and `--latency` all say how large a share of the dense network a candidate may cost:

    macs F      F of the multiply-adds
    size B      B of the bytes of dense.onnx
    speedup X   1 / X of the time
    latency L   L of the dense network's milliseconds

Widths are first chosen so that their modelled share of the dense cost equals an aim. Their actual share is then
checked: multiply-adds and bytes are counted, time is measured. Where the actual share is not what was asked for, the
aim is corrected and widths are chosen again, at most CORRECTIONS times. The correction takes the actual share to be a
linear function of the modelled one, through the unpruned network (m0, s0) and the widths just tried (m, s):

    aim' = m0 - (s0 - goal) (m0 - m) / (s0 - s)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from mm_edge.graph.axes import Axis, Keep
from mm_edge.graph.costs import Cost
from mm_edge.records import Budget

CORRECTIONS = 2
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class BudgetCheck:
    """What one budget allows at one input size, and how widths are checked against it.

    All shares are of the cost of the dense network at its own size.

    Attributes:
        largest_share: the largest share that meets the budget.
        cost: the modelled cost, which widths are chosen by.
        dense: the cost of the dense network at its own size.
        whole: the checked share of the unpruned network at this size.
        check: returns the actual share of what is kept, counted or measured.
        aim: the part of `largest_share` that is aimed at.
        window: the parts of `largest_share` between which widths are not corrected.
    """

    largest_share: float
    cost: Cost
    dense: float
    whole: float
    check: Callable[[Keep], float]
    aim: float
    window: tuple[float, float]

    def model(self, keep: Keep | None = None) -> float:
        """Return the modelled share of what is kept; of the unpruned network without."""
        return self.cost.total(counts_of(keep or {})) / self.dense


@dataclass(frozen=True)
class Draft:
    """Widths tried for a budget: the indices that stay, and the sparsities they come from, if any."""

    keep: Keep
    sparsity: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Met:
    """The draft chosen for a budget, its actual share, and how many corrections were made before it."""

    draft: Draft
    share: float
    corrections: int

    def fits(self, limit: BudgetCheck) -> bool:
        """Return whether it meets the limit."""
        return self.share <= limit.largest_share * (1 + _TOLERANCE)


def meet(draw: Callable[[float], Draft], limit: BudgetCheck) -> Met:
    """Return the draft chosen for a budget; `draw` makes a draft for a modelled share. See the top of the file.

    Of several drafts that meet the budget the one of largest share is taken; where none does, the one of smallest.
    """
    goal = limit.aim * limit.largest_share
    start = (limit.model(), limit.whole)
    aim = goal * start[0] / start[1]
    tried: list[Met] = []
    while len(tried) <= CORRECTIONS:
        draft = draw(aim)
        if any(counts_of(draft.keep) == counts_of(item.draft.keep) for item in tried):
            break
        tried.append(Met(draft, limit.check(draft.keep), len(tried)))
        share, modelled = tried[-1].share, limit.model(draft.keep)
        low, high = (part * limit.largest_share for part in limit.window)
        if low <= share <= high * (1 + _TOLERANCE) or share >= start[1] or modelled >= start[0]:
            break
        aim = start[0] - (start[1] - goal) * (start[0] - modelled) / (start[1] - share)
        if aim <= 0:
            break
    fitting = [item for item in tried if item.fits(limit)]
    return max(fitting, key=lambda item: item.share) if fitting else min(tried, key=lambda item: item.share)


def counts_of(keep: Keep) -> dict[Axis, int]:
    """Return how many indices each group keeps."""
    return {leaf: int(kept.sum()) for leaf, kept in keep.items()}


def words_for(budget: Budget, met: Met, *, measured: bool, by_table: bool) -> str:
    """Return how the cost of a plan was modelled and checked, for the report."""
    corrected = {0: "", 1: ", corrected once", 2: ", corrected twice"}[met.corrections]
    if not budget.is_time:
        return f"{'bytes of the file' if budget.kind == 'size' else 'multiply-adds'}, counted{corrected}"
    model = "latencies of its groups" if by_table else "multiply-adds in place of time"
    if not measured:
        return f"{model}, which is not measured"
    return f"{model}, measured at {1 / met.share:.2f}x{corrected}"

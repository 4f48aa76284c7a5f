"""What a budget is, and how widths are found that meet it.

`--macs`, `--size`, `--speedup` and `--latency` all say how large a share of the dense network a candidate may cost:

    macs F      F of the multiply-adds
    size B      B of the bytes of dense.onnx
    speedup X   1 / X of the time
    latency L   L of the dense network's milliseconds

Widths are drawn so that a modelled cost comes out at an aim; then the share is checked: multiply-adds and bytes are
counted, time is measured. Where the check misses what was asked, the aim moves along the line through the unpruned
network (m0, s0) and the draft (m, s), modelled and checked, and widths are drawn anew, CORRECTIONS times at most:

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
class Ruler:
    """How the plans of one budget are drawn and checked at one input size.

    All shares are of the dense network at its own size.

    Attributes:
        target: the largest share that meets the budget.
        cost: what plans are drawn by.
        dense: the cost of the dense network at its own size.
        whole: the checked share of the unpruned network at this size.
        check: the share of what is kept.
        aim: the part of `target` that plans are drawn for.
        window: the parts of `target` between which a plan is not corrected.
    """

    target: float
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
    """A plan on its way: what stays, and the sparsities it was drawn from, if any."""

    keep: Keep
    sparsity: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Met:
    """The draft that came nearest to a budget, the share it was checked to have, and how often it was corrected."""

    draft: Draft
    share: float
    corrections: int

    def fits(self, ruler: Ruler) -> bool:
        """Return whether it meets the budget."""
        return self.share <= ruler.target * (1 + _TOLERANCE)


def meet(draw: Callable[[float], Draft], ruler: Ruler) -> Met:
    """Return what `draw` (from a modelled share to a draft) gives under the budget; see the top of the file.

    Of several drafts that meet it the dearest is taken, and where none does the cheapest.
    """
    goal = ruler.aim * ruler.target
    start = (ruler.model(), ruler.whole)
    aim = goal * start[0] / start[1]
    tried: list[Met] = []
    while len(tried) <= CORRECTIONS:
        draft = draw(aim)
        if any(counts_of(draft.keep) == counts_of(item.draft.keep) for item in tried):
            break
        tried.append(Met(draft, ruler.check(draft.keep), len(tried)))
        share, modelled = tried[-1].share, ruler.model(draft.keep)
        low, high = (part * ruler.target for part in ruler.window)
        if low <= share <= high * (1 + _TOLERANCE) or share >= start[1] or modelled >= start[0]:
            break
        aim = start[0] - (start[1] - goal) * (start[0] - modelled) / (start[1] - share)
        if aim <= 0:
            break
    fitting = [item for item in tried if item.fits(ruler)]
    return max(fitting, key=lambda item: item.share) if fitting else min(tried, key=lambda item: item.share)


def counts_of(keep: Keep) -> dict[Axis, int]:
    """Return how many indices each group keeps."""
    return {leaf: int(kept.sum()) for leaf, kept in keep.items()}


def words_for(budget: Budget, met: Met, *, measured: bool, by_table: bool) -> str:
    """Return how a plan came to meet its budget, for the report."""
    corrected = {0: "", 1: ", corrected once", 2: ", corrected twice"}[met.corrections]
    if not budget.is_time:
        return f"{'bytes of the file' if budget.kind == 'size' else 'multiply-adds'}, counted{corrected}"
    model = "latencies of its groups" if by_table else "multiply-adds in place of time"
    if not measured:
        return f"{model}, which is not measured"
    return f"{model}, measured at {1 / met.share:.2f}x{corrected}"

"""Recoveries, which regain accuracy, by the name users type with --recover.

A recovery may act at three points, each of them one function of its entry:

    solve     before masks are applied: other channels, other weights            (network, plan, settings, walked)
    adjust    changes the masked PyTorch module                                  (module, network, plan)
    improve   after a candidate was made, for those on the front                 (work)

This module imports nothing heavy, so that the command line can name the recoveries without PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mm_edge.deferred import Deferred


@dataclass(frozen=True)
class Recovery:
    """One recovery.

    Attributes:
        help: what it does, in a few words, for --help.
        starts_with: name of the recovery that comes before it; None where nothing does.
        solve: takes a network, a plan, make.MakeSettings and whether to take the second, slower step; chooses
            channels and weights of the plan before masks are applied and returns a make.Solved.
        adjust: takes the masked PyTorch module, the network and the plan; changes the module in place and returns what
            the report calls that, None where it did nothing.
        improve: takes a work.Work, improves its candidate and returns the new record, or the old one with the reason.
        improves: the kinds of candidates it improves.
        stage: name of the stage that improves candidates.
        needs_images: whether it needs calibration images.
        needs_moments: whether it needs the dense network's moments on calibration images.
        holds_out: whether held-back images judge it, so that the recovery before it must not use them.
        trains_sizes: whether it trains networks at smaller input sizes to answer as the dense network does at its own.
        trains: whether it takes gradient steps, so that it needs a PyTorch module.
        has_epochs: whether --epochs limits it.
        least_images: how many calibration images it needs.
    """

    help: str
    starts_with: str | None = None
    solve: Callable[..., Any] | None = None
    adjust: Callable[..., Any] | None = None
    improve: Callable[..., Any] | None = None
    improves: tuple[str, ...] = ("structured", "n:m", "unstructured")
    stage: str = "recover"
    needs_images: bool = True
    needs_moments: bool = False
    holds_out: bool = False
    trains_sizes: bool = False
    trains: bool = False
    has_epochs: bool = False
    least_images: int = 0

    @property
    def base(self) -> Recovery:
        """What every candidate gets when it is made: this recovery itself, or the one it starts with."""
        return self if self.starts_with is None else RECOVERIES[self.starts_with]

    @property
    def from_moments(self) -> bool:
        """Whether it works from the dense network's moments, itself or by what it starts with."""
        return self.base.needs_moments


RECOVERIES: dict[str, Recovery] = {
    "none": Recovery("leaves the weights as pruning left them", needs_images=False),
    "bn": Recovery(
        "re-estimates BatchNorm statistics on calibration images",
        adjust=Deferred("mm_edge.run.closed_form:reestimate_"),
    ),
    "closed-form": Recovery(
        "chooses channels and solves weights on calibration images, without labels or training",
        solve=Deferred("mm_edge.run.closed_form:solve"),
        adjust=Deferred("mm_edge.run.closed_form:reestimate_masked_weights_"),
        needs_moments=True,
    ),
    "tune": Recovery(
        "the closed form, then some hundred gradient steps without labels for the front",
        starts_with="closed-form",
        improve=Deferred("mm_edge.run.tune:tune_candidate"),
        improves=("structured",),  # the closed form does not solve masks of single weights
        stage="tune",
        holds_out=True,
        trains_sizes=True,
        trains=True,
    ),
    "finetune": Recovery(
        "the closed form, then trains the front under its masks",
        starts_with="closed-form",
        improve=Deferred("mm_edge.run.finetune:finetune_candidate"),
        stage="fine-tune",
        trains=True,
        has_epochs=True,
        least_images=2,
    ),
}

"""Recoveries: the ways to regain accuracy, by the name users type with --recover.

A recovery may act at three moments, each of them one function of its entry:

    solve     before masks are applied: other channels, other weights            (network, plan, settings, walked)
    adjust    on the masked PyTorch module, in place                             (module, network, plan)
    improve   on what was made, for the candidates on the front                  (job, networks, candidate, ...)

This module imports nothing heavy, so that the command line can name the recoveries without PyTorch: the functions
import what they need when they are called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from mm_edge.plan.plans import Plan
    from mm_edge.progress import Advance
    from mm_edge.records import Candidate
    from mm_edge.run.job import Job
    from mm_edge.run.make import MakeSettings, Solved
    from mm_edge.run.networks import Network, Networks

    Solve = Callable[[Network, Plan, MakeSettings, bool], Solved]
    Adjust = Callable[[nn.Module, Network, Plan], str | None]
    Improve = Callable[["Work"], Candidate]


@dataclass(frozen=True)
class Work:
    """One candidate that a recovery is to improve.

    Attributes:
        job: the job.
        networks: the networks of the run.
        settings: how candidates are made, written and judged.
        plan: the candidate's plan.
        candidate: what was made of it so far.
        start: SHA-256 of the masked weights it starts from, with the input size.
        advance: called with (steps done, of how many).
    """

    job: Job
    networks: Networks
    settings: MakeSettings
    plan: Plan
    candidate: Candidate
    start: str
    advance: Advance


@dataclass(frozen=True)
class Recovery:
    """One way to regain accuracy.

    Attributes:
        help: what it does, in a few words, for --help.
        starts_with: name of the recovery that comes before it; None where nothing does.
        solve: chooses channels and weights of a plan before masks are applied.
        adjust: changes the masked module in place and returns what the report calls that, None where it did nothing.
        improve: improves one candidate on the front and returns the new record, or the old one with the reason.
        improves: the kinds of candidates it improves.
        stage: what the progress display calls the improving.
        needs_moments: whether it needs the dense network's moments on calibration images.
        holds_out: whether held-back images judge it, so that no weight may be solved for them before.
        teaches_sizes: whether it teaches networks on smaller pictures what the dense one answers to larger ones.
        trains: whether it takes gradient steps, so that it needs a PyTorch module.
        least_images: how many labelled calibration images it needs.
    """

    help: str
    starts_with: str | None = None
    solve: Solve | None = None
    adjust: Adjust | None = None
    improve: Improve | None = None
    improves: tuple[str, ...] = ("structured", "n:m", "unstructured")
    stage: str = "recover"
    needs_moments: bool = False
    holds_out: bool = False
    teaches_sizes: bool = False
    trains: bool = False
    least_images: int = 0

    @property
    def base(self) -> Recovery:
        """What every candidate gets when it is made: this recovery itself, or the one it starts with."""
        return self if self.starts_with is None else RECOVERIES[self.starts_with]

    @property
    def from_moments(self) -> bool:
        """Whether it works from the dense network's moments, itself or by what it starts with."""
        return self.base.needs_moments


def _solve_closed_form(network: Network, plan: Plan, settings: MakeSettings, walked: bool) -> Solved:
    from mm_edge.run.closed_form import solve

    return solve(network, plan, settings, walked)


def _reestimate_masked_weights(module: nn.Module, network: Network, plan: Plan) -> str | None:
    """The closed form has nothing to say of single weights without a pattern: their BatchNorm is re-estimated."""
    return _reestimate(module, network, plan) if plan.kind == "unstructured" else None


def _reestimate(module: nn.Module, network: Network, plan: Plan) -> str | None:
    from mm_edge.run.closed_form import reestimate_

    return reestimate_(module, network)


def _tune(work: Work) -> Candidate:
    from mm_edge.run.tune import tune_candidate

    return tune_candidate(work)


def _finetune(work: Work) -> Candidate:
    from mm_edge.run.finetune import finetune_candidate

    return finetune_candidate(work)


RECOVERIES: dict[str, Recovery] = {
    "none": Recovery("leaves the weights as pruning left them"),
    "bn": Recovery("re-estimates BatchNorm statistics on calibration images", adjust=_reestimate),
    "closed-form": Recovery(
        "chooses channels and solves weights on calibration images, without labels or training",
        solve=_solve_closed_form,
        adjust=_reestimate_masked_weights,
        needs_moments=True,
    ),
    "tune": Recovery(
        "the closed form, then some hundred gradient steps without labels for the front",
        starts_with="closed-form",
        improve=_tune,
        improves=("structured",),  # masks of single weights have no closed form to go on from
        stage="tune",
        holds_out=True,
        teaches_sizes=True,
        trains=True,
    ),
    "finetune": Recovery(
        "the closed form, then trains the front under its masks",
        starts_with="closed-form",
        improve=_finetune,
        stage="fine-tune",
        trains=True,
        least_images=2,
    ),
}

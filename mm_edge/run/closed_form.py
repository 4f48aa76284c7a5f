"""Applies the recoveries without training to one candidate: the closed form (E9) and BatchNorm statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from mm_edge.graph.axes import Axis, Keep
from mm_edge.plan.plans import ChannelPlan, Plan, WeightPlan
from mm_edge.recover.closed_form.batchnorm import has_batch_norm, reestimate_batch_norm_
from mm_edge.recover.closed_form.context import RecoveryContext
from mm_edge.recover.closed_form.pattern import recover_pattern
from mm_edge.recover.closed_form.sensitivity import Sensitivity
from mm_edge.recover.closed_form.structured import Recovered, recover_closed_form
from mm_edge.run.make import MakeSettings, Solved
from mm_edge.run.networks import Network


def solve(network: Network, plan: Plan, settings: MakeSettings, walked: bool) -> Solved:
    """Return the plan with the channels the closed form keeps, and the weights it solved.

    The closed form starts from the dense network's moments; with `walked` it goes on through the pruned network.
    """
    if network.recovery is None:
        return Solved(plan)
    if isinstance(plan, ChannelPlan):
        return _solve_channels(network, network.recovery, plan, settings, walked)
    assert isinstance(plan, WeightPlan)
    found = recover_pattern(network.recovery, plan.masks) if plan.kind == "n:m" else None
    if found is None:
        return Solved(plan)
    return Solved(plan, dict(found.tensors), "closed-form" if found.layers else None)


def _solve_channels(
    network: Network, recovery: RecoveryContext, plan: ChannelPlan, settings: MakeSettings, walked: bool
) -> Solved:
    found = recover_keep(recovery, plan.keep, settings.select, network.sensitivities, walked=walked)
    # The images that judge a later recovery must not be used to solve weights.
    tensors = found.fitted if settings.held_out else found.tensors
    name = "closed-form" if walked else "closed-form (screened)"
    return Solved(replace(plan, keep={**plan.keep, **found.keep}), dict(tensors), name)


def recover_keep(
    recovery: RecoveryContext, keep: Keep, select: str, sensitivities: Mapping[Axis, Sensitivity], *, walked: bool
) -> Recovered:
    """Recover what `keep` leaves by the closed form; groups that keep nothing are left out."""
    counts = {leaf: int(kept.sum()) for leaf, kept in keep.items() if kept.any()}
    measured = {leaf: item for leaf, item in sensitivities.items() if leaf in counts}
    return recover_closed_form(recovery, keep, counts, select=select, sensitivities=measured, walked=walked)


def reestimate_masked_weights_(module: nn.Module, network: Network, plan: Plan) -> str | None:
    """Re-estimate BatchNorm where single weights were removed: the closed form solves nothing for them."""
    return reestimate_(module, network, plan) if plan.kind == "unstructured" else None


def reestimate_(module: nn.Module, network: Network, plan: Plan) -> str | None:
    """Re-estimate the BatchNorm statistics of `module` in place; return "bn", or None without BatchNorm or images."""
    if network.images.recovery is None or not has_batch_norm(module):
        return None
    reestimate_batch_norm_(module, (torch.from_numpy(batch) for batch in network.images.recovery()))
    return "bn"
